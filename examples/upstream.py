"""A stand-in for a paid service: gunicorn -k gevent -b :8001 upstream:app."""

from __future__ import annotations

import time

from flask import Flask, abort, request

app = Flask(__name__)

SUSPICIOUS = ("free", "miracle", "secret", "winner")


@app.post("/predict")
def predict() -> dict[str, list[bool]]:
    titles = request.get_json()["predict"]
    print(f"one request with {len(titles)} titles", flush=True)
    if "fail" in titles:
        abort(500)
    if "slow" in titles:
        time.sleep(10)
    return {"predictions": [is_suspicious(title) for title in titles]}


def is_suspicious(title: str) -> bool:
    return any(word in title.lower() for word in SUSPICIOUS)
