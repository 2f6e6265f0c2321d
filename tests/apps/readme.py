"""The Flask example of ubatch 0.0.2's README, with a model that needs no library."""

from __future__ import annotations

from typing import Any

from flask import Flask, request
from numpy import array, ndarray

from ubatch import UBatch


class Model:
    """Sums the features of each row."""

    def batch_predict(self, rows: list[ndarray[Any, Any]]) -> ndarray[Any, Any]:
        """Predict many rows at once."""
        return array(rows).sum(axis=1, keepdims=True)


app = Flask(__name__)

model = Model()

predict_batch: UBatch[ndarray[Any, Any], ndarray[Any, Any]] = UBatch(
    max_size=50, timeout=0.01
)
predict_batch.set_handler(handler=model.batch_predict)
predict_batch.start()


@app.route("/predict")
def predict() -> dict[str, Any]:
    """Predict one row, given as ``?input=1,2,3``."""
    received_input = array([float(x) for x in request.args["input"].split(",")])
    result = predict_batch.ubatch(received_input)

    return {"prediction": result.tolist()}


@app.route("/")
def ready() -> str:
    """Say that the app is there."""
    return "ready"
