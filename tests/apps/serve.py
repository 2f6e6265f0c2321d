"""Serve an app with gevent.pywsgi: python -m tests.apps.serve APP LISTENER [patch]."""

from __future__ import annotations

import sys

if sys.argv[3:] == ["patch"]:
    from gevent import monkey

    monkey.patch_all()

import socket  # noqa: E402
from importlib import import_module  # noqa: E402

from gevent import socket as gevent_socket  # noqa: E402
from gevent.pywsgi import WSGIServer  # noqa: E402


def main() -> None:
    """Serve until killed."""
    module, name = sys.argv[1].split(":")
    app = getattr(import_module(module), name)
    listener = gevent_socket.socket(
        socket.AF_INET, socket.SOCK_STREAM, fileno=int(sys.argv[2])
    )
    WSGIServer(listener, app, log=None).serve_forever()


if __name__ == "__main__":
    main()
