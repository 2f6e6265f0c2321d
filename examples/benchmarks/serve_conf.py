"""How do `serve` and `demo` run gunicorn? All else is on the command line."""

# A file in the user's home, that all gunicorns would share. Older ones know none.
control_socket_disable = True

# A worker whose loop stands still that long is replaced; unbatched ones nearly do.
timeout = 120
