"""How do `serve` and `demo` run gunicorn? All else is on the command line."""

import json
import os

# A file in the user's home, that all gunicorns would share. Older ones know none.
control_socket_disable = True

# A worker whose loop stands still that long is replaced; unbatched ones nearly do.
timeout = 120

# Where a model server is to run beside the workers.
if os.environ.get("BENCH_BATCHER") == "server":
    from ubatch.gunicorn import serve

    on_starting, on_reload, on_exit = serve(
        "serve_model:make",
        socket=os.path.join(os.environ["BENCH_HOME"], "socket"),
        **json.loads(os.environ.get("BENCH_OPTIONS", "{}")),
    )
