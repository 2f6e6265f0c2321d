"""Does anything that users or clients may pass lead to a clear answer?

A few hundred cases, the same each time; ``make fuzz`` tries thousands of new ones.
"""

from __future__ import annotations

import io
import logging
import os
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
from flask import Flask, request
from hypothesis import given, settings
from hypothesis import strategies as st

import ubatch.flask
from tests.fakes import World
from ubatch import (
    BackendError,
    DeadlineExceeded,
    QueueFull,
    Stopped,
    UBatch,
    UBatchError,
    ubatch_decorator,
)

CASES = os.environ.get("FUZZ_CASES")
TESTS = 12
"""Those below, once for each backend of the plain leg."""

fuzz = settings(
    max_examples=max(1, int(CASES or 600) // TESTS),
    derandomize=CASES is None,
    database=None,
    deadline=None,
)


class Hostile:
    """An object that can neither be shown, nor compared, nor turned into anything."""

    def _refuse(self, *_: Any) -> Any:
        raise LookupError("hostile")

    __repr__ = __str__ = __index__ = __float__ = __int__ = _refuse  # type: ignore
    __eq__ = __bool__ = __len__ = __hash__ = _refuse  # type: ignore


class Odd:
    """An object that turns into something else than it should."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Odd\n" * 1000

    def __index__(self) -> Any:
        return self.value

    def __float__(self) -> Any:
        return self.value


class Text(str):
    """A string of a class of its own."""


ANY_TEXT = st.text(st.characters(exclude_categories=()))  # surrogates too
NUMBERS = st.one_of(
    st.integers(-2, 100),
    st.integers(),
    # By their exponents: Python, and so Hypothesis, refuses to print the longest.
    st.sampled_from([31, 63, 64, 1400, 17000]).map(lambda bits: 2**bits - 1),
    st.just(17000).map(lambda bits: -(2**bits)),
    st.floats(),
    st.floats().map(numpy.float64),
    st.integers(-(2**31), 2**31 - 1).map(numpy.int64),
    st.booleans(),
    st.fractions(),
    st.decimals(),
    st.complex_numbers(),
)
WORDS = ["adaptive", "settle", "full", "now", "gevent", "thread", "auto"]
WORDS += ["threadpool", "hub_threadpool", "inline"]
ANYTHING = st.one_of(
    NUMBERS,
    ANY_TEXT,
    st.sampled_from([*WORDS, *map(Text, WORDS)]),
    st.binary(),
    st.none(),
    st.builds(Hostile),
    st.builds(Odd, st.one_of(st.integers(), st.floats(), st.none(), st.text())),
    st.sampled_from(
        [object(), int, len, numpy.arange(3), numpy.array(2), Decimal("NaN")]
    ),
    st.lists(st.integers(), max_size=3),
    st.just(Fraction(1, 3)),
)
OPTIONS = ["max_size", "timeout", "workers", "linger", "executor", "max_pending"]
OPTIONS += ["deadline", "name", "backend"]


def check_refusal(error: Exception, options: dict[str, Any]) -> None:
    """Check that an error names an option, and is short enough to be read."""
    message = str(error)
    assert any(message.startswith(option) for option in options), message
    assert len(message) < 500


def check_batcher(ub: UBatch[Any, Any]) -> None:
    """Check that a batcher does what batchers do."""
    assert ub.name and isinstance(ub.name, str) and repr(ub.name) in repr(ub)
    ub.start()
    try:
        future = ub.submit("item")
    except BackendError:  # an executor that this backend cannot use
        return
    ub.stop()
    try:
        assert "item" == future.result(30)
    except DeadlineExceeded:
        assert ub._deadline is not None


def echo(items: list[Any]) -> list[Any]:
    """Answer each item with itself."""
    return items


def test_any_option_is_taken_or_refused_clearly(world: World) -> None:
    """One option of any value: a batcher that works, or an error that names it."""

    @fuzz
    @given(st.sampled_from(OPTIONS), ANYTHING)
    def check(option: str, value: Any) -> None:
        options = {"max_size": 2, "timeout": 0.0, "backend": world.backend}
        options |= {"name": "fuzzed", option: value}
        try:
            ub: UBatch[Any, Any] = UBatch(**options, handler=echo)
        except (TypeError, ValueError) as error:
            check_refusal(error, {option: value})
        else:
            check_batcher(ub)

    check()


def test_any_options_are_taken_or_refused_clearly(world: World) -> None:
    """All options at once, also those of the decorator."""
    some = st.fixed_dictionaries(
        {"max_size": NUMBERS, "timeout": NUMBERS},
        optional={
            "workers": st.one_of(NUMBERS, st.integers(1, 4)),
            "linger": st.sampled_from(WORDS),
            "executor": st.sampled_from(WORDS),
            "max_pending": st.one_of(NUMBERS, st.none()),
            "deadline": st.one_of(NUMBERS, st.none()),
            "name": st.one_of(ANY_TEXT, st.none()),
        },
    )

    @fuzz
    @given(some)
    def check(options: dict[str, Any]) -> None:
        try:
            decorated = ubatch_decorator(**options, backend=world.backend)(echo)
        except (TypeError, ValueError) as error:
            check_refusal(error, options)
        else:
            check_batcher(decorated._batcher)

    check()


def test_any_deadline_and_patience_is_taken_or_refused_clearly(world: World) -> None:
    """with_options(deadline=) and stop(timeout=) refuse as the constructor does."""

    @fuzz
    @given(ANYTHING, ANYTHING)
    def check(deadline: Any, timeout: Any) -> None:
        ub = UBatch(1, 0.0, handler=echo, backend=world.backend).start()
        try:
            view = ub.with_options(deadline=deadline)
        except (TypeError, ValueError) as error:
            check_refusal(error, {"deadline": deadline})
            view = ub.with_options(deadline=30)
        future = view.submit(1)
        try:
            ub.stop(timeout)
        except (TypeError, ValueError) as error:
            check_refusal(error, {"timeout": timeout})
            ub.stop()
        try:
            assert 1 == future.result(30)
        except (DeadlineExceeded, Stopped):
            pass

    check()


def test_any_arguments_reach_the_handler(world: World) -> None:
    """A call may have any items, by position and by name; but not none at all."""

    def handler(*lists: Any, **named: Any) -> list[Any]:
        columns = [*lists, *(named[name] for name in sorted(named))]
        return list(zip(*columns))

    @fuzz
    @given(st.lists(ANYTHING, max_size=3), st.dictionaries(ANY_TEXT, ANYTHING))
    def check(args: list[Any], kwargs: dict[str, Any]) -> None:
        with UBatch(2, 0.0, handler=handler, backend=world.backend) as ub:
            try:
                found = ub.submit(*args, **kwargs).result(30)
            except TypeError as error:
                assert "at least one argument" in str(error)
                assert not args and not kwargs
            else:
                wanted = [*args, *(kwargs[name] for name in sorted(kwargs))]
                assert all(a is b for a, b in zip(found, wanted, strict=True))

    check()


class Lines(logging.Handler):
    """Keeps what is logged, as text."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


def check_answer(answer: Any) -> None:
    """Check that an answer says in JSON what is the matter."""
    assert answer.status_code in (503, 504), answer
    assert {"error", "message"} == set(answer.json)
    assert all(isinstance(text, str) for text in answer.json.values())
    if answer.json["error"] == "QueueFull":
        assert 1 <= int(answer.headers["Retry-After"]) <= 3600


def test_any_error_of_ours_gets_a_clear_answer() -> None:
    """Whatever an error carries and a client asks for: JSON, and one line logged."""
    app, lines, to_raise = Flask(__name__), Lines(), []

    @app.before_request
    def fail() -> Any:
        raise to_raise.pop()

    ubatch.flask.init_app(app)
    messages = st.one_of(ANYTHING, ANY_TEXT.map(lambda text: 1000 * text))
    full = st.builds(QueueFull, messages, ANYTHING, ANYTHING, ANYTHING)
    kinds = st.sampled_from([QueueFull, Stopped, BackendError, DeadlineExceeded])
    others = st.builds(lambda kind, message: kind(message), kinds, messages)

    @fuzz
    @given(st.one_of(full, others), ANY_TEXT)
    def check(error: Exception, path: str) -> None:
        to_raise.append(error)
        lines.seen.clear()
        address = {"PATH_INFO": "/" + path.encode(errors="replace").decode("latin-1")}
        check_answer(app.test_client().get(environ_overrides=address))
        (line,) = lines.seen
        assert line.isprintable() and len(line) < 4000

    logging.getLogger("ubatch.flask").addHandler(lines)
    try:
        check()
    finally:
        logging.getLogger("ubatch.flask").removeHandler(lines)


def test_any_request_gets_a_clear_answer(world: World) -> None:
    """Whatever is sent to a route that batches, the answer is 2xx, 4xx, 503 or 504."""
    app = Flask(__name__)
    batchers: dict[str, UBatch[bytes, int]] = {}

    def lengths(bodies: list[bytes]) -> list[Any]:
        return [len(b) if b.isascii() else ValueError("not ASCII") for b in bodies]

    @app.route("/<which>/<path:path>", methods=["POST"])
    def measure(which: str, path: str) -> Any:
        ub = batchers[which] if which in batchers else None
        if ub is None:
            return {"error": "NotFound", "message": "no such batcher"}, 404
        try:
            return {"length": ub.ubatch(request.get_data())}
        except ValueError as error:
            return {"error": "ValueError", "message": str(error)}, 400

    ubatch.flask.init_app(app)

    def batcher(**options: Any) -> UBatch[bytes, int]:
        return UBatch(4, 0.0, handler=lengths, backend=world.backend, **options)

    paths = st.one_of(ANY_TEXT, st.sampled_from(["a", "a/b"]))
    which = st.sampled_from(["good", "stopped", "full", "late", "unknown"])

    @fuzz
    @given(
        which, paths, st.binary(), st.dictionaries(st.text("abc-"), st.text("a\"'{"))
    )
    def check(which: str, path: str, body: bytes, headers: dict[str, str]) -> None:
        address = f"/{which}/" + path.encode(errors="replace").decode("latin-1")
        environ = {"PATH_INFO": address, "wsgi.input": io.BytesIO(body)}
        environ["CONTENT_LENGTH"] = str(len(body))
        environ |= {f"HTTP_{name.upper()}": value for name, value in headers.items()}
        answer = app.test_client().post(environ_overrides=environ)
        if answer.status_code in (503, 504):
            check_answer(answer)
        else:
            assert answer.status_code in (200, 308) or 400 <= answer.status_code < 500
            wanted = {"length": len(body)}
            assert answer.status_code != 200 or wanted == answer.json

    batchers["good"] = batcher().start()
    batchers["stopped"] = batcher().start()
    batchers["stopped"].stop()
    batchers["full"] = batcher(max_pending=1)  # and not started, so that calls wait
    batchers["full"].submit(b"the one that may wait")
    batchers["late"] = batcher(deadline=0.001)
    try:
        check()
    finally:
        for each in batchers.values():
            each.stop()


def test_errors_of_ours_survive_any_contents() -> None:
    """A copy for each caller says what the original says, whatever it holds."""

    @fuzz
    @given(st.builds(QueueFull, ANYTHING, ANYTHING, ANYTHING, ANYTHING))
    def check(error: QueueFull) -> None:
        mine = ubatch.errors.Failure(error).own()
        assert isinstance(mine, UBatchError) and isinstance(mine, QueueFull)
        assert mine.retry_after is error.retry_after
        assert mine.pending is error.pending

    check()
