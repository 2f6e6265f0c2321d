"""gunicorn's settings for a model server beside its workers."""

import os

from ubatch.gunicorn import post_worker_init, serve, worker_exit  # noqa: F401

# A file in the user's home, that all gunicorns would share. Older ones know none.
control_socket_disable = True
graceful_timeout = 10

socket = os.environ["SOCKET"]
if os.path.exists(f"{socket}.moved"):
    socket += ".other"
on_starting, on_reload, on_exit = serve(
    os.environ.get("FACTORY", "tests.apps.beside:make"), socket=socket, max_size=8
)
