"""What is measured: which systems are there, and how is each called?

Opening a system gives a *call*: it takes one item, blocks its caller and returns that
item's result. Callers are greenlets, native threads or asyncio tasks: the system's
*world*. In the asyncio world the call is a coroutine function, and the system is opened
under a running loop. Greenlets' systems run in a monkey-patched interpreter, as a
gunicorn worker would run them.

Nothing here imports more than the standard library until a system is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from environments import Environment
from systems import floors, ours, rivals

Call = Callable[[Any], Any]


@dataclass(frozen=True)
class System:
    """One thing to measure, in one world."""

    name: str
    """Like ``ours:gevent:inline``: what comes before the first colon is its kind."""
    world: str
    """``"gevent"``, ``"thread"`` or ``"asyncio"``: who calls."""
    opener: Callable[..., AbstractContextManager[Call]]
    environment: Environment | None = None
    """Where it runs; None for this interpreter and the working tree."""
    elsewhere: bool = False
    """Whether handlers run in another process: it is opened with what makes one, a
    function that can be pickled or ``"module:function"``."""

    @property
    def patched(self) -> bool:
        """Whether its process is monkey-patched before anything else."""
        return self.world == "gevent"

    def open(
        self, handler: Any, max_size: int, timeout: float, **options: Any
    ) -> AbstractContextManager[Call]:
        """Return a context in which the system's *call* can be made.

        Args:
            handler: Takes a list, returns a list; or what makes that, see *elsewhere*.
                Not a coroutine function: where a system wants one, it is wrapped.
            max_size: Calls in a batch at most.
            timeout: Seconds that a batch may wait for more calls.
            options: More options of ours, such as ``linger="now"``.
        """
        return self.opener(handler, max_size, timeout, **options)


U002 = Environment("ubatch-0.0.2", ("ubatch==0.0.2", "gevent"), "ubatch")
STREAMER = Environment(
    "service-streamer",
    # It declares neither redis nor tqdm, and imports both.
    ("service_streamer==0.1.2", "redis==8.1.0", "tqdm==4.70.1", "gevent"),
    "service_streamer",
)
BATCHED = Environment("batched", ("batched==0.1.5",), "batched")
RAY = Environment("ray-serve", ("ray[serve]==2.60.0",), "ray.serve.batching")
BENTO = Environment(
    "bentoml", ("bentoml==1.4.38",), "bentoml._internal.marshal.dispatcher"
)

SYSTEMS = {
    system.name: system
    for system in (
        System("ours:gevent:inline", "gevent", ours.inline),
        System("ours:gevent:threadpool", "gevent", ours.threadpool),
        System("ours:thread", "thread", ours.thread),
        *(
            System(f"ours-{name}:{world}", world, opener(world), elsewhere=True)
            for name, opener in (("process", ours.process), ("server", ours.server))
            for world in ("gevent", "thread")
        ),
        *(
            System(f"linger:{name}", "gevent", ours.lingering(name))
            for name in ("now", "settle", "full", "adaptive")
        ),
        System("floor:call", "thread", floors.call),
        System("floor:switch", "gevent", floors.switch),
        System("floor:waiter", "gevent", floors.waiter),
        System("floor:lock", "thread", floors.lock),
        System("floor:future", "asyncio", floors.future),
        System("ubatch-0.0.2:gevent", "gevent", rivals.u002, U002),
        System("ubatch-0.0.2:thread", "thread", rivals.u002, U002),
        System("service-streamer:gevent", "gevent", rivals.streamer, STREAMER),
        System("service-streamer:thread", "thread", rivals.streamer, STREAMER),
        System("batched:thread", "thread", rivals.batched_thread, BATCHED),
        System("batched:asyncio", "asyncio", rivals.batched_asyncio, BATCHED),
        System("ray-serve:asyncio", "asyncio", rivals.ray_serve, RAY),
        System("bentoml:asyncio", "asyncio", rivals.bentoml, BENTO),
    )
}


def selected(names: Iterable[str]) -> list[System]:
    """Return the systems with these names, or whose names begin with them.

    Raises:
        ValueError: There is no such system.
    """
    wanted = list(names)
    for name in wanted:
        if not any(_matches(system, name) for system in SYSTEMS):
            raise ValueError(f"no system {name!r}; there are {', '.join(SYSTEMS)}")
    return [s for s in SYSTEMS.values() if any(_matches(s.name, n) for n in wanted)]


def _matches(system: str, name: str) -> bool:
    return system == name or system.startswith(f"{name}:")
