"""gunicorn's settings for a model server beside its workers."""

import os

from ubatch.gunicorn import post_worker_init, serve, worker_exit  # noqa: F401

# A file in the user's home, that all gunicorns would share. Older ones know none.
control_socket_disable = True
graceful_timeout = 10

on_starting, on_reload, on_exit = serve(
    "tests.apps.beside:make", socket=os.environ["SOCKET"], max_size=8
)
