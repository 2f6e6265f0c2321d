"""How tests run gunicorn with the hooks of ours, as a user would import them."""

from ubatch.gunicorn import post_worker_init, worker_exit  # noqa: F401

# As in conf.py.
control_socket_disable = True
