"""Does a Flask application answer our errors with the status each deserves?"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import flask_restx
import pytest
from flask import Blueprint, Flask
from gevent.threadpool import ThreadPool

import ubatch.flask
from tests.fakes import Gated, Recorder, World
from ubatch import (
    BackendError,
    DeadlineExceeded,
    QueueFull,
    Stopped,
    UBatch,
    UBatchError,
    WorkerLost,
)
from ubatch.flask import UNAVAILABLE

OURS = [
    (QueueFull, 503),
    (Stopped, 503),
    (BackendError, 503),
    (DeadlineExceeded, 504),
]
each_of_ours = pytest.mark.parametrize(("kind", "status"), OURS)


def failing(error: Exception) -> Callable[..., Any]:
    """Return a view that raises."""

    def view(**_: Any) -> Any:
        raise error

    return view


def app_with(error: Exception, rule: str = "/predict") -> Flask:
    """Return an application in production, where one view fails."""
    app = Flask(__name__)
    app.add_url_rule(rule, "predict", failing(error), methods=["GET", "POST"])
    return app


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what has been logged, by anybody."""
    return [f"{r.name} {r.levelname} {r.getMessage()}" for r in caplog.records]


def test_a_full_queue_is_answered_with_503_and_when_to_retry(world: World) -> None:
    """Over max_pending a request gets 503, JSON and Retry-After; the others 200."""
    handler = Gated(world.gate())
    ub = UBatch(1, 0.0, handler=handler, backend=world.backend, max_pending=1).start()
    app = Flask(__name__)
    app.add_url_rule("/<item>", "ask", lambda item: {"result": ub.ubatch(item)})
    ubatch.flask.init_app(app)

    def get(path: str) -> Any:
        return app.test_client().get(path)

    running = world.spawn(get, "/a")
    world.until(lambda: handler.batches)
    waiting = world.spawn(get, "/b")
    world.until(lambda: ub.stats().pending == 1)
    refused = get("/c")
    handler.gate.open()
    assert ["a", "b"] == [each.result().json["result"] for each in (running, waiting)]
    assert 503 == refused.status_code
    assert "1" == refused.headers["Retry-After"]
    assert "QueueFull" == refused.json["error"]
    assert "1 calls waiting, max_pending=1" in refused.json["message"]
    ub.stop()


def test_a_late_answer_is_504(world: World) -> None:
    """A request whose deadline passes gets 504, in JSON, and need not come back."""
    handler = Gated(world.gate())
    ub = UBatch(1, 0.0, handler=handler, backend=world.backend, deadline=0.001).start()
    app = Flask(__name__)
    app.add_url_rule("/", "ask", lambda: {"result": ub.ubatch(1)})
    ubatch.flask.init_app(app)
    late = app.test_client().get("/")
    handler.gate.open()
    ub.stop()
    assert (504, "DeadlineExceeded") == (late.status_code, late.json["error"])
    assert "Retry-After" not in late.headers


def test_a_batcher_that_is_stopped_or_cannot_run_is_503(world: World) -> None:
    """What another worker may answer well is 503, not 500."""
    stopped = UBatch(1, 0.0, handler=Recorder(), backend=world.backend).start()
    stopped.stop()
    pool = ThreadPool(1)
    wrong = UBatch(1, 0.0, handler=Recorder(), backend="thread", executor=pool).start()
    app = Flask(__name__)
    app.add_url_rule("/stopped", "stopped", lambda: {"result": stopped.ubatch(1)})
    app.add_url_rule("/wrong", "wrong", lambda: {"result": wrong.ubatch(1)})
    ubatch.flask.init_app(app)
    answers = [app.test_client().get(path) for path in ("/stopped", "/wrong")]
    assert [503, 503] == [each.status_code for each in answers]
    assert ["Stopped", "BackendError"] == [each.json["error"] for each in answers]
    pool.kill()


class Hostile:
    """A number of seconds that is none."""

    def __float__(self) -> float:
        raise LookupError("hostile")


@pytest.mark.parametrize(
    ("seconds", "header"),
    [
        *[(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2"), (59.5, "60")],
        *[(1e9, "3600"), (float("inf"), "3600"), (float("nan"), "1"), (-1e999, "1")],
        *[(None, "1"), ("soon", "1"), (Hostile(), "1")],
    ],
)
def test_retry_after_is_in_whole_seconds(seconds: Any, header: str) -> None:
    """Rounded up, since who comes too early is refused again; 1 where it is no time."""
    app = app_with(QueueFull("full", 8, 8, retry_after=seconds))
    ubatch.flask.init_app(app)
    assert header == app.test_client().get("/predict").headers["Retry-After"]


@each_of_ours
def test_each_answer_is_logged_in_one_line(
    kind: type[Exception], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning says the route, the status and why; nobody else logs anything."""
    caplog.set_level(logging.DEBUG)
    app = app_with(kind("why"))
    ubatch.flask.init_app(app)
    assert status == app.test_client().post("/predict").status_code
    line = f"POST /predict: answered with {status}, {kind.__name__}: why"
    assert [f"ubatch.flask WARNING {line}"] == lines(caplog)


def test_a_client_cannot_forge_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    """Neither the path nor the message can end the line, nor make it endless."""
    error = Stopped("a\nERROR b\r\x1b[2J\u2028" + "x" * 9999)
    app = app_with(error, "/<path:p>")
    app.before_request(failing(error))  # before Flask refuses the method
    ubatch.flask.init_app(app)
    for method in ("GET", "GET\nERROR c"):
        answer = app.test_client().open("/d%0AERROR%20e", method=method)
        assert 503 == answer.status_code
    for line in lines(caplog):
        assert line.isprintable() and len(line) < 500
        assert "ERROR e" not in line
    assert 2 == len(lines(caplog))


def test_other_errors_stay_what_they_are(caplog: pytest.LogCaptureFixture) -> None:
    """A bug is a 500 with its traceback in the log, an unknown path a 404."""
    app = app_with(ZeroDivisionError("a bug"))
    app.add_url_rule("/output", "output", failing(UBatchError("ours")))
    ubatch.flask.init_app(app)
    client = app.test_client()
    paths = "/predict", "/output", "/unknown"
    assert [500, 500, 404] == [client.get(path).status_code for path in paths]
    assert ["test_flask"] * 2 == [r.name.rpartition(".")[2] for r in caplog.records]
    assert all(record.exc_info for record in caplog.records)


@each_of_ours
def test_outside_a_request_our_errors_are_raised(
    kind: type[Exception], status: int
) -> None:
    """A command or a background task of the application catches them itself."""
    app = Flask(__name__)
    ubatch.flask.init_app(app)

    @app.cli.command("train")
    def train() -> None:
        raise kind("in a command")

    result = app.test_cli_runner().invoke(args=["train"])
    assert isinstance(result.exception, kind)


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_a_handler_of_the_users_wins(first: str) -> None:
    """One for the same class is asked instead, registered before or after."""
    app = app_with(QueueFull("full"))
    if first == "ours":
        ubatch.flask.init_app(app)
    app.register_error_handler(QueueFull, lambda error: ("theirs", 418))
    if first == "theirs":
        ubatch.flask.init_app(app)
    answer = app.test_client().get("/predict")
    assert (418, "theirs") == (answer.status_code, answer.text)


def test_a_handler_for_all_errors_leaves_ours_alone() -> None:
    """The closest class wins, as everywhere in Flask: Exception is further away."""
    app = app_with(QueueFull("full"))
    app.register_error_handler(Exception, lambda error: ("oops", 500))
    ubatch.flask.init_app(app)
    app.register_error_handler(UBatchError, lambda error: ("oops", 500))
    assert 503 == app.test_client().get("/predict").status_code


def test_blueprints_are_answered_too_and_their_handlers_win() -> None:
    """A blueprint's view needs nothing; its own handler goes before the app's."""
    app = Flask(__name__)
    ubatch.flask.init_app(app)
    for name in ("plain", "own"):
        blueprint = Blueprint(name, __name__, url_prefix=f"/{name}")
        blueprint.add_url_rule("/", "fail", failing(QueueFull("full")))
        if name == "own":
            blueprint.register_error_handler(QueueFull, lambda error: ("own", 429))
        app.register_blueprint(blueprint)
    client = app.test_client()
    assert [503, 429] == [client.get(f"/{p}/").status_code for p in ("plain", "own")]


def test_init_app_may_be_called_again(caplog: pytest.LogCaptureFixture) -> None:
    """Also after the first request; the answer is logged once all the same."""
    app = app_with(QueueFull("full"))
    ubatch.flask.init_app(app)
    ubatch.flask.init_app(app)
    assert 503 == app.test_client().get("/predict").status_code
    ubatch.flask.init_app(app)
    assert 503 == app.test_client().get("/predict").status_code
    assert 2 == len(lines(caplog))


def test_each_app_of_a_factory_is_on_its_own() -> None:
    """What one application was given, another that was not is without."""
    with_it, without = app_with(QueueFull("full")), app_with(QueueFull("full"))
    ubatch.flask.init_app(with_it)
    apps = with_it, without
    assert [503, 500] == [a.test_client().get("/predict").status_code for a in apps]


class Failing(flask_restx.Resource):
    """A resource that fails as it is told to."""

    def get(self, name: str) -> Any:
        kinds = {kind.__name__: kind for kind, _ in OURS}
        raise kinds.get(name, ZeroDivisionError)("why")


def api_on(app: Flask, where: str) -> flask_restx.Api:
    """Give an application an API, in one of the ways that there are."""
    if where == "app":
        api = flask_restx.Api(app)
    else:
        blueprint = Blueprint("api", __name__)
        api = flask_restx.Api(blueprint)
    namespace = flask_restx.Namespace("ns")
    namespace.add_resource(Failing, "/<name>")
    api.add_namespace(namespace)
    if where == "blueprint":
        app.register_blueprint(blueprint)
    return api


@pytest.mark.parametrize("testing", [False, True])
@pytest.mark.parametrize("first", ["api", "ours"])
@pytest.mark.parametrize("where", ["app", "blueprint"])
def test_an_api_of_flask_restx_is_answered_alike(
    where: str, first: str, testing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its resources get the same answers, in tests and in production."""
    app = Flask(__name__)
    app.testing = testing
    if first == "ours":
        ubatch.flask.init_app(app)
    api_on(app, where)
    second = Blueprint("second", __name__, url_prefix="/second")
    flask_restx.Api(second)
    app.register_blueprint(second)
    if first == "api":
        ubatch.flask.init_app(app)
    for kind, status in OURS:
        answer = app.test_client().get(f"/ns/{kind.__name__}")
        assert status == answer.status_code
        why = UNAVAILABLE if issubclass(kind, BackendError) else "why"
        assert {"error": kind.__name__, "message": why} == answer.json
    assert len(OURS) == len(lines(caplog))


@pytest.mark.parametrize("kind", [BackendError, WorkerLost])
def test_a_client_is_not_told_of_paths_and_processes(
    kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """What the log says is not for whoever asks from outside."""
    app = app_with(kind("unix:/run/secret: process 4711 was killed"))
    ubatch.flask.init_app(app)
    answer = app.test_client().get("/predict")
    assert {"error": kind.__name__, "message": UNAVAILABLE} == answer.json
    assert "/run/secret: process 4711" in caplog.text


def test_an_apis_own_handlers_win() -> None:
    """One of the API's, or of a namespace, for the same class is asked instead."""
    app = Flask(__name__)
    ubatch.flask.init_app(app)
    api = api_on(app, "app")
    api.errorhandler(QueueFull)(lambda error: ({"message": "busy"}, 429))
    api.errorhandler(Exception)(lambda error: ({"message": "oops"}, 500))
    api.namespaces[-1].errorhandler(Stopped)(lambda error: ({"message": "no"}, 410))
    paths = "/ns/QueueFull", "/ns/Stopped", "/ns/DeadlineExceeded", "/ns/bug"
    statuses = [app.test_client().get(path).status_code for path in paths]
    assert [429, 410, 504, 500] == statuses
