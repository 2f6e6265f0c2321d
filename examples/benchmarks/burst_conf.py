"""How does ``bursts.py`` run gunicorn? All else comes by the command line."""

# A file in the user's home, that all gunicorns would share. Older ones know none.
control_socket_disable = True
