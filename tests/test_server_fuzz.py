"""Does anything that a client may send leave a model server as it was?

Some hundred cases, the same each time; FUZZ_CASES=10000 tries as many new ones.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from struct import pack as pack_struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.children import once
from tests.serving import ModelServer, Raw
from ubatch.parcel import pack_columns
from ubatch.wire import HEADER, MAGIC, VERSION, Kind, encode

pytestmark = [once, pytest.mark.server]

CASES = os.environ.get("FUZZ_CASES")

fuzz = settings(
    max_examples=int(CASES or 400),
    derandomize=CASES is None,
    database=None,
    deadline=None,
)

numbers = (
    st.integers(-2, 5)
    | st.sampled_from(
        [1 << 16, 1 << 20, 1 << 31, 1 << 32, 1 << 64, 10**400, -(1 << 70)]
    )
    | st.floats()
)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=3)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
kinds = st.sampled_from([*Kind, Kind.CALLS, Kind.CALLS, Kind.LEAVE, Kind.STATUS])
idents = st.integers(0, 3)

sensible = st.builds(
    lambda columns, names, size, deadline: [
        columns,
        names,
        size,
        deadline and [deadline] * size,
    ],
    st.integers(0, 3),
    st.lists(st.sampled_from("abc"), max_size=2),
    st.integers(0, 4),
    st.none() | st.sampled_from([-1.0, 0.0, 0.001, 60.0, 1e9, 1e10]),
)
heads = sensible | st.lists(anything, min_size=4, max_size=4) | anything
notes = st.just([[]]) | st.lists(anything, min_size=1, max_size=4) | anything
parcels = st.sampled_from(
    [
        [b"x"],
        [b""],
        [pickle.dumps(7)],
        [pickle.dumps(([7], {}))],
        [pickle.dumps(([[1, 2]], {"a": 3}), 5), b"more"],
        pack_columns([["a", "b", "c", "d"]] * 3, {"a": [1] * 4, "b": [2] * 4}),
        pack_columns([["a"]], {}),
    ]
) | st.just([])


def frame(kind: Kind, ident: int, head: Any, note: Any, parts: list[Any]) -> bytes:
    return b"".join(encode(kind, ident, head, parts, note))


good = st.just([[]])
frames = st.builds(frame, kinds, idents, heads, good | notes, parcels)
asks = st.builds(frame, st.just(Kind.CALLS), idents, sensible, good, parcels)
leaves = st.builds(
    frame,
    st.just(Kind.LEAVE),
    idents,
    st.lists(scalars, max_size=4) | anything,
    good,
    st.just([]),
)
headers = st.builds(
    lambda magic, version, kind, parts, total, rest: HEADER.pack(
        magic, version, kind, parts, 1, total
    )
    + rest,
    st.sampled_from([MAGIC, MAGIC, b"http"]),
    st.sampled_from([VERSION, VERSION, 0, 255]),
    st.integers(0, 255),
    st.integers(0, 3) | st.just(0xFFFF),
    st.integers(0, 40) | st.sampled_from([1 << 20, 1 << 30, (1 << 64) - 1]),
    st.binary(max_size=40)
    | st.lists(st.integers(0, 9), max_size=3).map(
        lambda sizes: pack_struct(f"<{len(sizes)}Q", *sizes)
    ),
)


@st.composite
def cut(draw: st.DrawFn) -> bytes:
    """Return a frame that lacks some of it, or has a byte that is wrong."""
    data = bytearray(draw(frames))
    at = draw(st.integers(0, len(data) - 1))
    if draw(st.booleans()):
        return bytes(data[:at])
    data[at] = draw(st.integers(0, 255))
    return bytes(data)


said = st.lists(
    asks | frames | leaves | headers | cut() | st.binary(max_size=99), max_size=6
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    with ModelServer(tmp_path_factory.mktemp("fuzz")) as server:
        yield server


@pytest.fixture(scope="module")
def witness(server: ModelServer) -> Iterator[Raw]:
    """Return a client that is there all the time; and then look at the server."""
    with Raw(server.path) as raw:
        raw.hello()
        raw.ask(1, ["before"])
        raw.answers(1)
        yield raw
        check(server)


def check(server: ModelServer) -> None:
    """No client, no call and no memory is left of all those; nothing was printed."""
    server.until(lambda: server.status()["clients"] == 1)
    server.until(lambda: server.pending() == 0)
    status = server.status()
    assert (0, 1) == (status["running"], len(status["models"]))
    assert status["memory_bytes"] < 100 << 20
    assert not server.noise(), server.log
    assert 1 == server.log.count("is ready after"), server.log
    if CASES is None:
        assert len(server.lines("WARNING")) > 100


@fuzz
@given(
    said=said,
    hello=st.booleans() | st.just(True),
    how=st.sampled_from("reads cuts".split()),
)
def test_whatever_a_client_says_harms_nobody(
    server: ModelServer, witness: Raw, said: list[bytes], hello: bool, how: str
) -> None:
    """It is answered or dropped; another one is served, and nothing escapes."""
    with Raw(server.path) as raw:
        if hello:
            raw.hello()
        raw.throw(b"".join(said))
        if how == "reads":
            raw.half_close()
            raw.ended()
    witness.ask(1, ["witness"])
    assert ["witness"] == witness.answers(1)[0]["row"]
