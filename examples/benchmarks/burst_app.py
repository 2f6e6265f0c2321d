"""What do the bursts ask? A tiny Flask app, which tells of the batch of each request.

In the environment: LINGER, FIXED and EACH, as in ``traffic.Handler``.
"""

from __future__ import annotations

import os
import time
from typing import Any, cast

from flask import Flask, jsonify

from traffic import Handler
from ubatch import UBatch
from ubatch.policy import Linger

sleep = Handler(float(os.environ["FIXED"]), float(os.environ["EACH"]))


def tell(items: list[int]) -> list[int]:
    """Answer each call with the number of its batch."""
    sleep(items)
    return [len(sleep.sizes)] * len(items)


batcher = UBatch(
    64, 0.02, handler=tell, linger=cast(Linger, os.environ["LINGER"])
).start()
app = Flask(__name__)


@app.get("/")
def route() -> Any:
    """Answer one request."""
    return jsonify([os.getpid(), batcher.ubatch(0), time.process_time()])
