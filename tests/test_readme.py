"""Does what the README shows work?"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from configparser import ConfigParser
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.children import ROOT, Server, environment, once, run

pytestmark = once

README = (ROOT / "README.rst").read_text()
BLOCK = re.compile(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", re.MULTILINE)
SNIPPETS = [textwrap.dedent(block) for block in BLOCK.findall(README)]


def every_snippet(snippets: list[str]) -> dict[str, Any]:
    from gevent import monkey

    monkey.patch_all()
    import gevent
    from flask import Flask, request
    from gevent.pywsgi import WSGIServer

    upstream = Flask("upstream")

    @upstream.post("/predict")
    def answer() -> dict[str, Any]:
        return {"predictions": ["free" in title for title in request.json["predict"]]}

    server = WSGIServer(("127.0.0.1", 0), upstream, log=None)
    server.start()
    address = f"http://127.0.0.1:{server.server_port}/predict"
    shown: dict[str, Any] = {"__name__": __name__, "print": lambda *_: None}
    for snippet in snippets:
        snippet = snippet.replace("http://upstream/predict", address)
        exec(compile(snippet, "README.rst", "exec"), shown)

    shown["app"].add_url_rule("/full", view_func=lambda: shown["full"]())
    images, digits = shown["load_digits"](return_X_y=True)
    client = shown["app"].test_client

    def ask(image: Any) -> int:
        answer = client().post("/predict", json={"input": image.tolist()})
        return int(answer.json["prediction"])

    asked = [gevent.spawn(ask, image) for image in images[:40]]
    gevent.joinall(asked, raise_error=True)
    titles = [gevent.spawn(shown["suspicious"].ubatch, t) for t in ("free!", "news")]
    gevent.joinall(titles, raise_error=True)
    statuses = []
    import logging

    from ubatch import BackendError, DeadlineExceeded, QueueFull, Stopped

    logging.disable()  # each answer is a warning
    for error in (QueueFull, Stopped, BackendError, DeadlineExceeded):

        def fail(error: Any = error) -> None:
            raise error("no room")

        shown["full"] = fail
        statuses.append(client().get("/full").status_code)
    return {
        "right": sum(bool(a.value == d) for a, d in zip(asked, digits)),
        "titles": [title.value for title in titles],
        "statuses": statuses,
        "backend": shown["predict"].stats().backend,
        "batches": shown["predict"].stats().batches_total,
    }


def test_every_snippet_runs_and_does_what_it_says() -> None:
    """All Python blocks, one after the other, in a patched process."""
    assert len(SNIPPETS) >= 6
    seen = run(every_snippet, SNIPPETS)
    assert seen["right"] >= 36  # of 40, of a linear model
    assert [True, False] == seen["titles"]
    assert [503, 503, 503, 504] == seen["statuses"]
    assert "gevent" == seen["backend"]
    assert seen["batches"] < 40


@pytest.mark.server
def test_the_first_snippet_is_an_application(tmp_path: Path) -> None:
    """Saved as app.py and served by gunicorn -k gevent, it answers."""
    route = '\n@app.get("/")\ndef ready():\n    return "ready"\n'
    (tmp_path / "app.py").write_text(SNIPPETS[0] + route)
    three = "0,0,7,15,13,1,0,0,0,8,13,6,15,4,0,0,0,2,1,13,13,0,0,0,0,0,2,15,11,1,0,0"
    three += ",0,0,0,1,12,12,1,0,0,0,0,0,1,10,8,0,0,0,8,4,5,14,9,0,0,0,7,13,13,9,0,0"

    def command(listener: int) -> list[str]:
        program = [sys.executable, "-m", "gunicorn", "-k", "gevent", "app:app"]
        options = ["-b", f"fd://{listener}", "-c", f"{ROOT}/tests/apps/conf.py"]
        return [*program, "--chdir", str(tmp_path), *options]

    with Server(command, tmp_path / "log") as server:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = json.dumps({"input": json.loads(f"[{three}]")})
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/predict", body, headers)
        answer = json.loads(connection.getresponse().read())
        connection.close()
    assert {"prediction": 3} == answer


def snippet(of: str) -> str:
    """Return the one Python block that holds a text."""
    (found,) = [each for each in SNIPPETS if of in each]
    return found


def both_readers(own: str, shared: str) -> list[list[int]]:
    from sklearn.datasets import load_digits

    rows = list(load_digits().data[:20])
    read = []
    for code in (own, shared):
        shown: dict[str, Any] = {}
        exec(f"from ubatch import UBatch\n{code}", shown)
        with shown["reader"] as reader:
            read.append([int(digit) for digit in reader.map(rows)])
    return read


@pytest.mark.server
def test_the_model_of_the_readme_reads_digits(tmp_path: Path) -> None:
    """In a process of its own, and in the server that gunicorn.conf.py starts."""
    from sklearn.datasets import load_digits

    (tmp_path / "reader.py").write_text(snippet("def make("))
    ready = "\n\ndef app(environ, start):\n    start('200 OK', [])\n    return [b'']\n"
    (tmp_path / "app.py").write_text(ready)
    conf = f"control_socket_disable = True\n{snippet('on_starting')}"
    (tmp_path / "gunicorn.conf.py").write_text(conf)

    def command(listener: int) -> list[str]:
        program = [sys.executable, "-m", "gunicorn", "-b", f"fd://{listener}"]
        where = ["--chdir", str(tmp_path), "-c", str(tmp_path / "gunicorn.conf.py")]
        return [*program, *where, "app:app"]

    with Server(command, tmp_path / "log"):
        own, shared = snippet("ProcessExecutor("), snippet("UBatch.connect(")
        path = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
        shared = shared.replace("unix:run", f"unix:{tmp_path}/run")
        read = run(both_readers, own, shared, env=path)
    digits = load_digits().target[:20].tolist()
    assert [digits, digits] == read


def test_what_the_readme_names_exists() -> None:
    """Every file, make target and option that it names is there."""
    for name in re.findall(r"``((?:examples|ubatch)/[\w./]*)``", README):
        assert (ROOT / name).exists(), name
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"``(?:\$ )?make ([a-z-]+)", README)) <= targets
    assert environment()["PYTHONPATH"] == str(ROOT)


def test_the_oldest_gevent_that_is_tested_is_the_oldest_allowed() -> None:
    """make test-all installs the lower bounds that setup.cfg states."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    allowed = config["options"]["install_requires"].split()
    tested = config["testenv"]["deps"].replace("gevent_oldest: ", "").split()
    assert allowed == [one.replace("==", ">=").removesuffix(".*") for one in tested]
