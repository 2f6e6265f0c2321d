"""Does every example do what it shows?

Each runs as its own docstring says: as a program, or under gunicorn on a free port.
"""

from __future__ import annotations

import json
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin

import pytest

from tests.children import PATIENCE, ROOT, Answer, Server, environment
from tests.children import gunicorn as run_gunicorn
from tests.children import once, run

pytestmark = once

EXAMPLES = ROOT / "examples"
DIGITS = EXAMPLES / "digits"
JSON = {"Content-Type": "application/json"}
NESTED = b"[" * 3000
"""What Python's JSON parser answers with a RecursionError, which is no ValueError."""

LOCAL = {"no_proxy": "127.0.0.1"}
"""Keeps the test from the proxy of whoever runs it."""


# The two examples with threads.


@pytest.mark.parametrize("patch", [False, True], ids=["plain", "patched"])
def test_threads_share_calls_of_one_function(patch: bool) -> None:
    """``threads.py`` prints ten squares, and each number was in one batch."""
    lines = _printed("threads.py", patch)

    assert _squares(lines) == {number: number**2 for number in range(10)}
    assert sorted(sum(_batches(lines), [])) == list(range(10))


@pytest.mark.parametrize("patch", [False, True], ids=["plain", "patched"])
def test_a_decorated_function_takes_lists_and_single_items(patch: bool) -> None:
    """``decorator.py`` squares a list as it is, and single numbers five at a time."""
    lines = _printed("decorator.py", patch)
    called, *joined = _batches(lines)

    assert called == list(range(10))
    assert f"output {[number**2 for number in range(10)]}" in lines
    assert _squares(lines) == {number: number**2 for number in range(10)}
    assert sorted(sum(joined, [])) == list(range(10))
    assert max(map(len, joined)) <= 5


def _printed(name: str, patch: bool) -> list[str]:
    """Run an example, which must end well; return the lines it printed."""
    how = ["-m", "gevent.monkey"] if patch else []
    ended = subprocess.run(
        [sys.executable, "-W", "error", *how, EXAMPLES / name],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def _squares(lines: list[str]) -> dict[int, int]:
    found = [re.fullmatch(r"input (\d+), output (\d+)", line) for line in lines]
    pairs = [(int(match[1]), int(match[2])) for match in found if match]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def _batches(lines: list[str]) -> list[list[int]]:
    return [json.loads(line[6:]) for line in lines if line.startswith("batch ")]


# flask_predict.py


@pytest.fixture(scope="module")
def wine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``flask_predict.py`` under gunicorn."""
    log = tmp_path_factory.mktemp("wine") / "log"
    with _gunicorn(log, "flask_predict:app") as server:
        yield server


@pytest.mark.server
def test_every_wine_gets_the_answer_of_its_own_row(wine: Server) -> None:
    """178 rows posted together are answered as the model's own predict answers."""

    def predict() -> Any:
        from flask_predict import model, wine

        names = wine.target_names[model.predict(wine.data)]
        return [wine.data.tolist(), names.tolist()]

    rows, names = run(predict, env={"PYTHONPATH": f"{ROOT}:{EXAMPLES}"})
    answers = _post_all(wine.port, "/predict", [{"input": row} for row in rows])

    assert len(rows) == 178
    assert answers == [Answer(200, {"prediction": name}) for name in names]


ROW: list[Any] = [1.0] * 12

BAD_ROWS: dict[str, tuple[Any, str]] = {
    "empty body": (b"", "JSON object"),
    "not JSON": (b"{", "JSON object"),
    "not text": (b"\xff\xfe", "JSON object"),
    "nested": (NESTED, "JSON object"),
    "a list": ([], "JSON object"),
    "another key": ({"inputs": [*ROW, 1.0]}, '"input" is missing'),
    "a number": ({"input": 1.0}, "list of 13 numbers"),
    "too short": ({"input": ROW}, "list of 13 numbers"),
    "too long": ({"input": [*ROW, 1.0, 1.0]}, "list of 13 numbers"),
    "text": ({"input": [*ROW, "1.0"]}, "only numbers"),
    "null": ({"input": [*ROW, None]}, "only numbers"),
    "a bool": ({"input": [*ROW, True]}, "only numbers"),
    "a row in a row": ({"input": [*ROW, [1.0]]}, "only numbers"),
    "NaN": ({"input": [*ROW, float("nan")]}, "only numbers"),
    "infinite": ({"input": [*ROW, float("inf")]}, "only numbers"),
    "too large": ({"input": [*ROW, 10**400]}, "only numbers"),
}


@pytest.mark.server
@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_is_told_what_is_wrong(wine: Server, bad: str) -> None:
    """What the model cannot take is answered with 400 and named; it joins no batch."""
    body, problem = BAD_ROWS[bad]
    status, answer = _post(wine.port, "/predict", body)

    assert status == 400
    assert problem in answer["message"]


@pytest.mark.server
def test_a_row_has_to_be_sent_as_json(wine: Server) -> None:
    """A good row under another content type is answered with 400, which says so."""
    body = {"input": [*ROW, 1.0]}
    status, answer = _post(wine.port, "/predict", body, {"Content-Type": "text/plain"})

    assert status == 400
    assert "Content-Type: application/json" in answer["message"]


# flask_join_requests.py and upstream.py


class Joined(NamedTuple):
    """The service that joins titles, and the upstream that it asks."""

    service: Server
    upstream: Server

    def ask(self, title: str) -> HTTPConnection:
        """Send a title; the answer is to be received."""
        return _send(self.service.port, "/predict", {"title": title})

    def seen(self) -> list[int]:
        """Return how many titles came with each request that reached the upstream."""
        found = re.findall(r"one request with (\d+) titles", self.upstream.log)
        return [int(count) for count in found]


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Joined]:
    """``flask_join_requests.py`` and ``upstream.py``, each under gunicorn."""
    logs = tmp_path_factory.mktemp("joined")
    with ExitStack() as stack:  # they have no "/", which entering them would ask for
        upstream = _gunicorn(logs / "upstream", "upstream:app")
        stack.push(upstream)
        url = f"http://127.0.0.1:{upstream.port}/predict"
        service = _gunicorn(
            logs / "service", "flask_join_requests:app", UPSTREAM_URL=url
        )
        stack.push(service)
        yield Joined(service, upstream)


@pytest.mark.server
def test_titles_travel_together_and_answers_find_their_own(joined: Joined) -> None:
    """30 titles reach the upstream in fewer requests; each gets its own answer."""
    # Bits counted: no shift of this row of answers is the same row.
    expected = [number.bit_count() % 2 == 1 for number in range(30)]
    titles = [
        f"{'A miracle' if suspicious else 'An invoice'}, no. {number}"
        for number, suspicious in enumerate(expected)
    ]
    before = len(joined.seen())
    bodies = [{"title": title} for title in titles]
    answers = _post_all(joined.service.port, "/predict", bodies)
    requests = joined.seen()[before:]

    assert answers == [Answer(200, {"prediction": known}) for known in expected]
    assert sum(requests) == 30
    assert len(requests) < 30


@pytest.mark.server
def test_a_failing_upstream_is_a_bad_gateway(joined: Joined) -> None:
    """An error of the upstream is answered with 502, and the next title is fine."""
    failed = _receive(joined.ask("fail"))
    fine = _receive(joined.ask("You are the winner"))

    assert failed == Answer(502, {"error": "the upstream service failed"})
    assert fine == Answer(200, {"prediction": True})


@pytest.mark.server
def test_a_slow_upstream_holds_up_only_who_waits_for_it(joined: Joined) -> None:
    """While one batch waits in vain, to end as 504, another title is answered."""
    before = len(joined.seen())
    slow = joined.ask("slow")
    joined.upstream.until(lambda: joined.seen()[before:])
    fine = _receive(joined.ask("A secret"))
    still_waiting = not _readable(slow)

    assert fine == Answer(200, {"prediction": True})
    assert still_waiting
    late = {"error": "the upstream service took too long"}
    assert _receive(slow) == Answer(504, late)


@pytest.mark.server
def test_an_absent_upstream_is_a_bad_gateway(tmp_path: Path) -> None:
    """If no upstream listens, each of many titles is answered with 502."""
    with _reserved_port() as nobody, ExitStack() as stack:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/predict"
        service = _gunicorn(
            tmp_path / "log", "flask_join_requests:app", UPSTREAM_URL=url
        )
        stack.push(service)
        bodies = [{"title": f"An invoice, no. {number}"} for number in range(10)]
        answers = _post_all(service.port, "/predict", bodies)

    assert answers == [Answer(502, {"error": "the upstream service failed"})] * 10


@pytest.mark.server
@pytest.mark.parametrize(
    "body", [b"", b"{", NESTED, [], {}, {"title": 1}, {"title": None}]
)
def test_a_bad_title_is_told_what_is_wrong(joined: Joined, body: Any) -> None:
    """What is no title is answered with 400, which shows what to send."""
    status, answer = _post(joined.service.port, "/predict", body)

    assert status == 400
    assert '{"title": "some text"}' in answer["error"]


# digits


class Data(NamedTuple):
    """What scikit-learn knows of the digits, and how well our model does."""

    accuracy: float
    pictures: list[list[float]]
    digits: list[int]


@pytest.fixture(scope="module")
def data() -> Data:
    """200 pictures, and a model that is in its cache from now on."""

    def load() -> Any:
        from sklearn.datasets import load_digits

        import model

        pictures, digits = load_digits(return_X_y=True)
        accuracy = model.accuracy(model.load())
        return accuracy, pictures[:200].tolist(), digits[:200].tolist()

    # In a fresh clone it is trained first: 8 s, and far more on a busy machine.
    return Data(*run(load, env={"PYTHONPATH": f"{ROOT}:{DIGITS}"}, timeout=100.0))


@pytest.fixture(scope="module")
def page(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The digits, served by one worker."""
    with Digits(tmp_path_factory.mktemp("digits") / "log") as server:
        yield server


class Digits(Server):
    """The digits as their gunicorn.conf.py serves them, on a port from the environment.

    Nobody gets the port in the meantime: we keep it, but do not listen.
    """

    def __init__(self, log: Path, workers: int = 1, model: str = "worker") -> None:
        self._kept = _reserved_port()
        port = self._kept.getsockname()[1]
        where = {"HOST": "127.0.0.1", "PORT": str(port), "WORKERS": str(workers)}
        where["MODEL"] = model
        program = [sys.executable, "-m", "gunicorn", "app:app"]
        conf = str(DIGITS / "gunicorn.conf.py")
        super().__init__(lambda _: [*program, "-c", conf], log, **where)
        self.port = port

    def __enter__(self) -> Digits:
        try:
            self.until(lambda: self.get("/health").status == 200)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *how: Any) -> None:
        super().__exit__(*how)
        self._kept.close()


@pytest.mark.server
def test_all_workers_may_share_one_model(data: Data, tmp_path: Path) -> None:
    """With MODEL=process two workers answer alike, and neither imports the model."""
    bodies = [{"pixels": picture} for picture in data.pictures]
    with Digits(tmp_path / "log", workers=2, model="process") as server:
        answers = _post_all(server.port, "/predict", bodies)
        pids = {server.get("/stats").body["pid"] for _ in range(30)}
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in pids]

    assert {answer.status for answer in answers} == {200}
    right = [one.body["digit"] == digit for one, digit in zip(answers, data.digits)]
    assert sum(right) >= 0.95 * len(right)
    assert len(pids) == 2
    assert not any("sklearn" in each for each in maps)


def test_the_model_reads_digits_well(data: Data) -> None:
    """Of the digits kept from training, at least 95 % are read right."""
    assert data.accuracy >= 0.95


@pytest.mark.server
def test_batched_answers_equal_single_ones(page: Server, data: Data) -> None:
    """200 pictures posted together are read in few calls, and as one by one."""
    bodies = [{"pixels": picture} for picture in data.pictures]
    before = page.get("/stats").body
    batched = _post_all(page.port, "/predict", bodies)
    stats = page.get("/stats").body
    single = _post_all(page.port, "/predict_single", bodies)

    assert {answer.status for answer in (*batched, *single)} == {200}
    for one, other in zip(batched, single, strict=True):
        assert one.body["digit"] == other.body["digit"]
        # Another size of a batch may round another way.
        close = pytest.approx(other.body["probabilities"], abs=2e-4)
        assert one.body["probabilities"] == close
    right = [one.body["digit"] == digit for one, digit in zip(batched, data.digits)]
    assert sum(right) >= 190
    assert stats["calls_total"] - before["calls_total"] == 200
    assert stats["batches_total"] < stats["calls_total"]
    assert stats["mean_batch_size"] > 1


@pytest.mark.server
def test_stats_agree_with_each_other(page: Server, data: Data) -> None:
    """Once all is answered, the sizes of the batches sum up to the calls."""
    bodies = [{"pixels": picture} for picture in data.pictures[:20]]
    _post_all(page.port, "/predict", bodies)
    status, stats = page.get("/stats")
    sizes = {int(size): count for size, count in stats["batch_sizes"].items()}

    assert status == 200
    assert (stats["backend"], stats["pending"], stats["running"]) == ("gevent", 0, 0)
    assert sum(sizes.values()) == stats["batches_total"]
    assert sum(size * count for size, count in sizes.items()) == stats["calls_total"]
    assert sum(stats["dispatch_reasons"].values()) == stats["batches_total"]


@pytest.mark.server
def test_health_is_answered(page: Server) -> None:
    """``/health`` says ok."""
    assert page.get("/health") == Answer(200, {"status": "ok"})


PIXELS: list[Any] = [0] * 63

BAD_PICTURES: dict[str, tuple[Any, str]] = {
    "empty body": (b"", "JSON object"),
    "not JSON": (b"{", "JSON object"),
    "not text": (b"\xff\xfe", "JSON object"),
    "nested": (NESTED, "JSON object"),
    "a list": ([*PIXELS, 0], "JSON object"),
    "another key": ({"image": [*PIXELS, 0]}, '"pixels" is missing'),
    "null": ({"pixels": None}, "list of 64 numbers"),
    "too short": ({"pixels": PIXELS}, "list of 64 numbers"),
    "too long": ({"pixels": [*PIXELS, 0, 0]}, "list of 64 numbers"),
    "text": ({"pixels": [*PIXELS, "0"]}, '"pixels"[63] must be a number from 0 to 16'),
    "a bool": ({"pixels": [*PIXELS, True]}, '"pixels"[63]'),
    "a list inside": ({"pixels": [[0], *PIXELS]}, '"pixels"[0]'),
    "negative": ({"pixels": [*PIXELS, -0.1]}, '"pixels"[63]'),
    "too much ink": ({"pixels": [16.1, *PIXELS]}, '"pixels"[0]'),
    "NaN": ({"pixels": [*PIXELS, float("nan")]}, '"pixels"[63]'),
    "infinite": ({"pixels": [*PIXELS, float("inf")]}, '"pixels"[63]'),
}


@pytest.mark.server
@pytest.mark.parametrize("path", ["/predict", "/predict_single"])
@pytest.mark.parametrize("bad", BAD_PICTURES)
def test_a_bad_picture_is_told_what_is_wrong(page: Server, bad: str, path: str) -> None:
    """What is no picture is answered with 400 and named, batched or not."""
    body, problem = BAD_PICTURES[bad]
    status, answer = _post(page.port, path, body)

    assert status == 400
    assert problem in answer["error"]


@pytest.mark.server
@pytest.mark.parametrize("length", [4097, 100_000])
def test_a_body_that_is_too_large_is_not_read(page: Server, length: int) -> None:
    """More than 4096 bytes are answered with 413, in JSON as every error."""
    status, answer = _post(page.port, "/predict", b" " * length)

    assert status == 413
    assert "exceeds" in answer["error"]


@pytest.mark.server
def test_other_errors_are_json_too(page: Server) -> None:
    """An unknown path is 404 and a wrong method 405, in JSON."""
    unknown, wrong = page.get("/nowhere"), page.get("/predict")

    assert (unknown.status, wrong.status) == (404, 405)
    assert unknown.body["error"] and wrong.body["error"]


@pytest.mark.server
def test_the_page_finds_all_its_files(page: Server) -> None:
    """All that the page names, and all that its scripts import, is served."""
    named = re.compile(r"""(?:href|src)="([^"]+)"|\bfrom "([^"]+)";""")
    found: set[str] = set()
    todo = ["/"]
    while todo:
        path = todo.pop()
        status, text = page.get(path)
        assert status == 200, path
        found.add(path)
        links = {urljoin(path, one or other) for one, other in named.findall(text)}
        todo += links.difference(found, todo)

    used = {Path(path).name for path in found - {"/"}}
    assert used == {file.name for file in (DIGITS / "static").iterdir()}


def test_the_page_asks_no_other_server() -> None:
    """No file of the page names a URL, except as the name of SVG."""
    files = [*(DIGITS / "static").iterdir(), *(DIGITS / "templates").iterdir()]
    for file in files:
        text = file.read_text().replace('"http://www.w3.org/2000/svg"', "")
        assert not re.findall(r".*//\S.*", text), file.name  # a comment has a space

    assert len(files) > 1


@pytest.mark.server
def test_the_environment_chooses_and_sigterm_is_obeyed(
    data: Data, tmp_path: Path
) -> None:
    """WORKERS start on HOST and PORT; at SIGTERM all end, with exit code 0."""
    with Digits(tmp_path / "log", workers=2) as server:
        workers: set[int] = set()

        def both_serve() -> bool:
            workers.add(server.get("/stats").body["pid"])
            return len(workers) == 2

        server.until(both_serve)  # a signal to one that only just starts may get lost
        picture = {"pixels": data.pictures[0]}
        answers = _post_all(server.port, "/predict", [picture] * 20)
        server.signal(signal.SIGTERM)
        code = server.end()
        log = server.log

    assert {(answer.status, answer.body["digit"]) for answer in answers} == {(200, 0)}
    assert code == 0
    assert f"Listening at: http://127.0.0.1:{server.port} " in log
    assert log.count("Worker exiting") == 2
    assert "Traceback" not in log


# Servers and requests


def _gunicorn(log: Path, app: str, **env: str) -> Server:
    """Serve an app of the examples as its docstring says."""
    options = ["-k", "gevent", "--chdir", str(EXAMPLES)]
    return run_gunicorn(log, app, *options, **LOCAL, **env)


def _reserved_port() -> socket.socket:
    """Return a socket that keeps a port, and refuses connections.

    A server may take the port over, as it also sets SO_REUSEADDR; the kernel gives it
    to nobody.
    """
    keeper = socket.socket()
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    keeper.bind(("127.0.0.1", 0))
    return keeper


def _send(
    port: int, path: str, body: Any, headers: dict[str, str] = JSON
) -> HTTPConnection:
    """Post bytes, or anything else as JSON, on a new connection."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("POST", path, content, headers)
    return connection


def _receive(connection: HTTPConnection) -> Answer:
    """Wait for the answer, which must be JSON, and close the connection."""
    try:
        response = connection.getresponse()
        text = response.read().decode()
        assert response.headers["Content-Type"] == "application/json", text
        return Answer(response.status, json.loads(text))
    finally:
        connection.close()


def _post(port: int, path: str, body: Any, headers: dict[str, str] = JSON) -> Answer:
    return _receive(_send(port, path, body, headers))


def _post_all(port: int, path: str, bodies: Iterable[Any]) -> list[Answer]:
    """Send all requests before any answer is read, each on its own connection."""
    with ExitStack() as stack:
        sent = []
        for body in bodies:
            sent.append(_send(port, path, body))
            stack.callback(sent[-1].close)
        return [_receive(connection) for connection in sent]


def _readable(connection: HTTPConnection) -> bool:
    """Tell whether an answer has begun to arrive."""
    return bool(select.select([connection.sock], [], [], 0)[0])
