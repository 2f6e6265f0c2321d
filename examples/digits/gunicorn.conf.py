"""Serve the digits: gunicorn -c examples/digits/gunicorn.conf.py app:app."""

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

from ubatch import gunicorn as hooks
from ubatch.gunicorn import worker_exit  # noqa: F401  # drains what nobody waits for

# One thread per BLAS or OpenMP call. By default each call wants every core, so two
# workers, or a batch beside the requests, would fight for them and all get slower.
# Set here because it must be in place before numpy is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

# Where `app` is found, whatever directory gunicorn was started from.
chdir = str(Path(__file__).resolve().parent)

# Only this machine can connect unless HOST says otherwise (0.0.0.0: everyone).
port = os.environ.get("PORT", "8000")
bind = f"{os.environ.get('HOST', '127.0.0.1')}:{port}"

# With MODEL=process the model lives once, in a process beside the workers, and batches
# are made of what all of them ask for; app.py is told where.
place = os.environ.get("MODEL", "worker")
if place not in ("worker", "process"):
    raise SystemExit(
        f"MODEL={place!r} is no place for the model; use worker or process"
    )
if place == "process":
    home = Path(tempfile.gettempdir(), f"ubatch-digits-{os.getuid()}-{port}")
    os.environ["MODEL_SOCKET"] = str(home / "model.sock")
    on_starting, on_reload, on_exit = hooks.serve(
        "model:make",
        socket=os.environ["MODEL_SOCKET"],
        max_size=64,
        timeout=0.01,
        max_pending=1000,
    )

# One greenlet per request: hundreds wait at once, which is what fills the batches.
worker_class = "gevent"

# Processes. Each has its own model and its own batches, so more of them than cores
# only make the batches smaller; with MODEL=process they share both.
wanted = os.environ.get("WORKERS", "1")
if not wanted.isdecimal() or int(wanted) < 1:
    raise SystemExit(f"WORKERS={wanted!r} is no number of workers; use 1, 2, 3 ...")
workers = int(wanted)

# Each worker imports the app after it was patched for gevent. With True the master
# imports it once, before; ubatch works either way, as it starts nothing at import.
preload_app = False

# On SIGTERM, seconds to finish the requests that were accepted.
graceful_timeout = 10

# A worker whose loop stands still this many seconds is replaced. The first start
# trains the model, which must fit in here.
timeout = 60

# No control socket: every gunicorn of this user would share the one in the home folder.
control_socket_disable = True


def post_worker_init(worker: Any) -> None:
    """Leave Ctrl-C, which reaches every process of the terminal, to the master.

    It tells its workers itself; a worker that also hears it prints a traceback.
    """
    hooks.post_worker_init(worker)  # warns of what can never fill a batch
    signal.signal(signal.SIGINT, signal.SIG_IGN)
