"""Classify wine, many requests per predict(): gunicorn -k gevent flask_predict:app."""

from __future__ import annotations

from typing import Any

from flask import Flask, request
from flask_restx import Api, Resource, abort
from sklearn.datasets import load_wine
from sklearn.ensemble import RandomForestClassifier

from ubatch import DeadlineExceeded, QueueFull, Stopped, UBatch

wine = load_wine()
model = RandomForestClassifier(n_estimators=50, random_state=0)
model.fit(wine.data, wine.target)

app = Flask(__name__)
api = Api(app, title="Wine", description="POST 13 measurements, get the grower's name")


def predict_all(rows: list[list[float]]) -> list[str]:
    """Answer a batch of rows with one predict()."""
    return [str(wine.target_names[target]) for target in model.predict(rows)]


predictions: UBatch[list[float], str] = UBatch(
    max_size=50, timeout=0.01, handler=predict_all, max_pending=500, deadline=5.0
)
predictions.start()


@api.route("/predict")
class Predict(Resource):
    def post(self) -> dict[str, str]:
        return {"prediction": predictions.ubatch(read_row())}


def read_row() -> list[float]:
    """Return the request's row, or answer 400 and say what is wrong with it."""
    try:
        body = request.get_json(silent=True)
    except RecursionError:  # "[[[[[[..."
        body = None
    if not isinstance(body, dict):
        abort(400, "send a JSON object, with Content-Type: application/json")
    if "input" not in body:
        abort(400, '"input" is missing')
    row: Any = body["input"]
    length = wine.data.shape[1]
    if not isinstance(row, list) or len(row) != length:
        abort(400, f'"input" must be a list of {length} numbers')
    if not all(is_number(value) for value in row):
        abort(400, '"input" must hold only numbers')
    return row


def is_number(value: Any) -> bool:
    """Tell whether *value* is a number the model can take; NaN is not."""
    return type(value) in (int, float) and abs(value) < 1e6


@api.errorhandler(QueueFull)
@api.errorhandler(Stopped)
def answer_busy(error: Exception) -> tuple[dict[str, str], int]:
    return {"message": str(error)}, 503


@api.errorhandler(DeadlineExceeded)
def answer_late(error: Exception) -> tuple[dict[str, str], int]:
    return {"message": str(error)}, 504
