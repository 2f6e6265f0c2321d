"""Does the hub run while batches do, and do threads and hubs find each other?"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest

from tests.children import Program, not_on_libuv, once, run

pytestmark = once

HUBS = ["gevent", "patched"]
LEGS = ["thread", *HUBS]
LIBUV = {"GEVENT_LOOP": "libuv"}
LOOPS = [
    pytest.param({}, id="libev"),
    pytest.param(
        LIBUV,
        id="libuv",
        marks=pytest.mark.skipif(
            not (find_spec("cffi") and find_spec("gevent.libuv._corecffi")),
            reason="gevent runs on libuv only where cffi is installed",
        ),
    ),
]


def heartbeat(leg: str) -> dict[str, float]:
    """Beat every millisecond beside a handler that always runs; tell how late."""
    import ctypes
    from time import perf_counter

    from tests.apps.inside import world_of

    world = world_of(leg)
    import gevent

    from ubatch import UBatch

    usleep = ctypes.CDLL(None).usleep

    def handler(items: list[int]) -> list[int]:
        usleep(50_000)  # as C code that releases the GIL
        return items

    ub = UBatch(8, 0.01, handler=handler, backend="gevent").start()
    enough = False

    def keep_busy() -> None:
        while not enough:
            ub.ubatch(1)

    callers = [world.spawn(keep_busy) for _ in range(16)]
    world.until(lambda: ub.stats().running)
    before = ub.stats().handler_seconds
    late = []
    begin = now = perf_counter()
    while now < begin + 3.0:
        gevent.sleep(0.001)
        then, now = now, perf_counter()
        late.append(now - then - 0.001)
    busy = ub.stats().handler_seconds - before
    enough = True
    for caller in callers:
        caller.result()
    ub.stop()
    late.sort()
    return {
        "p50": late[len(late) // 2] * 1000,
        "p99": late[len(late) * 99 // 100] * 1000,
        "worst": late[-1] * 1000,
        "busy": busy * 1000,
    }


@pytest.mark.timing
@pytest.mark.parametrize("leg", HUBS)
def test_the_hub_beats_while_handlers_run(
    leg: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a 50 ms handler that always runs, a heartbeat is < 5 ms late at p99."""
    for _ in range(3):  # whatever else runs on this machine can only make it worse
        seen = run(heartbeat, leg)
        figures = ", ".join(f"{name} {seen[name]:.2f}" for name in seen)
        with capsys.disabled():
            print(f"\nheartbeat beside a handler, {leg}, ms: {figures}")
        assert seen["busy"] > 2500
        if seen["p99"] < 5.0:
            break
    else:
        pytest.fail(figures)


def look_up_names(leg: str) -> dict[str, float]:
    """Look localhost up, alone and while 12 batchers have their handlers running."""
    from time import perf_counter

    from tests.apps.inside import world_of

    world = world_of(leg)
    from gevent import socket

    from tests.fakes import Gate
    from ubatch import UBatch

    gate = Gate()

    def handler(items: list[int]) -> list[int]:
        gate.wait()
        return items

    def look_up() -> float:
        """Return the median of some look-ups, in ms."""
        seconds = []
        for _ in range(21):
            begin = perf_counter()
            socket.getaddrinfo("localhost", 80)
            seconds.append(perf_counter() - begin)
        return sorted(seconds)[10] * 1000

    alone = look_up()
    # The hub's own pool has ten threads.
    batchers = [UBatch(8, 0.01, handler=handler, backend="gevent") for _ in range(12)]
    futures = [ub.start().submit(1) for ub in batchers]
    world.until(lambda: all(ub.stats().running for ub in batchers))
    beside = look_up()
    assert not any(future.done() for future in futures)
    gate.open()
    for future, ub in zip(futures, batchers, strict=True):
        assert future.result(30.0) == 1
        ub.stop()
    return {"alone": alone, "beside": beside}


@pytest.mark.parametrize("leg", HUBS)
def test_names_are_looked_up_while_handlers_run(leg: str) -> None:
    """Handlers that hold their threads for ever do not hold the resolver's."""
    run(look_up_names, leg)


@pytest.mark.timing
@pytest.mark.parametrize("leg", HUBS)
def test_looking_a_name_up_takes_what_it_takes(leg: str) -> None:
    """A look-up of localhost beside twelve running batches is not slowed down."""
    seen = run(look_up_names, leg)
    assert seen["beside"] < max(20.0, 10 * seen["alone"])


def idle(leg: str, batchers: int) -> dict[str, float]:
    """Serve some calls, do nothing for ten seconds, tell what that took."""
    import os
    import time
    from typing import Any

    from tests.apps.inside import world_of

    world = world_of(leg)
    import gevent

    from ubatch import UBatch

    started = []
    for number in range(batchers):
        options: Any = {
            "backend": world.backend,
            "executor": ["threadpool", "inline"][number % 2],
            "linger": ["settle", "full", "now"][number % 3],
        }
        ub = UBatch(8, 0.01, handler=lambda items: items, **options).start()
        callers = [world.spawn(ub.ubatch, item) for item in range(20)]
        assert [caller.result() for caller in callers] == list(range(20))
        assert ub.with_options(deadline=60.0).ubatch(1) == 1
        started.append(ub)

    def pause(seconds: float) -> None:
        (gevent if world.is_gevent else time).sleep(seconds)

    def switches() -> int:
        total = 0
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/status") as status:
                for line in status:
                    if line.startswith("voluntary_ctxt_switches:"):
                        total += int(line.split()[1])
        return total

    pause(0.5)
    before, cpu = switches(), time.process_time()
    pause(10.0)
    cpu, after = time.process_time() - cpu, switches()
    for ub in started:  # they were there all the time
        ub.stop()
    return {"wake-ups": after - before, "cpu": cpu}


@pytest.mark.timing
def test_an_idle_batcher_costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """For ten seconds, a process with started batchers does what one without does."""
    with_and_without = [
        (leg, Program(idle, leg, 12), Program(idle, leg, 0)) for leg in LEGS
    ]
    for leg, with_batchers, without in with_and_without:
        seen, control = with_batchers.end().value, without.end().value
        with capsys.disabled():
            print(f"\nidle for 10 s, {leg}: {seen}, without ubatch: {control}")
        assert seen["wake-ups"] <= control["wake-ups"] + 2, leg
        assert seen["cpu"] <= control["cpu"] + 0.01, leg


def ping_beside_inline() -> dict[str, int]:
    """Ping over a socket while an inline handler keeps the hub as busy as it can."""
    import logging
    from time import perf_counter

    import gevent
    from gevent import socket

    from ubatch import UBatch

    def handler(items: list[int]) -> list[int]:
        end = perf_counter() + 0.002
        while perf_counter() < end:
            pass
        return items

    # On a machine that does other things it may be said to keep the hub too long.
    logging.getLogger("ubatch").setLevel(logging.ERROR)
    ub = UBatch(4, 0.01, handler=handler, backend="gevent", executor="inline").start()

    def keep_busy() -> None:
        while True:
            ub.ubatch(1)

    callers = [gevent.spawn(keep_busy) for _ in range(16)]
    here, there = socket.socketpair()

    def echo() -> None:
        while there.send(there.recv(1)):
            pass

    echoing = gevent.spawn(echo)
    batches = []
    for _ in range(50):
        before = ub.stats().batches_total
        here.send(b".")
        here.recv(1)
        batches.append(ub.stats().batches_total - before)
    gevent.killall([*callers, echoing])
    here.close()
    there.close()
    ub.stop()
    return {"most": max(batches), "total": ub.stats().batches_total}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_busy_inline_handler_starves_nobody(loop: dict[str, str]) -> None:
    """A ping over a socket waits for a few inline batches, not for the last."""
    seen = run(ping_beside_inline, env=loop)
    assert seen["total"] >= 25  # it was busy
    assert seen["most"] <= 5


def complete(leg: str, threads: int, rounds: int, calls: int) -> list[int]:
    """Have native threads ask much; return how many right answers came."""
    from tests.apps.inside import native_threads, world_of

    world = world_of(leg)
    from ubatch import UBatch

    def squares(numbers: list[int]) -> list[int]:
        return [number * number for number in numbers]

    ub = UBatch(64, 0.001, handler=squares, backend=world.backend, workers=2).start()
    assert ub.ubatch(0) == 0
    called: list[int] = []

    def ask() -> int:
        right = 0
        for first in range(rounds):
            numbers = range(first, first + calls)
            right += sum(
                answer == number * number
                for answer, number in zip(ub.map(numbers), numbers, strict=True)
            )
            right += ub.ubatch(first) == first * first
            future = ub.submit(first)
            future.add_done_callback(lambda future: called.append(future.result()))
            right += future.result() == first * first
        return right

    right = sum(native_threads(world, [ask] * threads))
    world.until(lambda: len(called) == threads * rounds)
    stats = ub.stats()
    ub.stop()
    ended = stats.results_total - 1
    return [right, stats.calls_total - 1, ended, stats.pending, stats.running]


@pytest.mark.concurrency
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("leg", LEGS)
def test_no_completion_is_lost_between_threads(leg: str, loop: dict[str, str]) -> None:
    """Of 100,000 calls that native threads make, each gets its own answer."""
    if leg == "thread" and loop:
        pytest.skip("the thread backend has no loop")
    total = 4 * 80 * (312 + 2)
    assert [total, total, total, 0, 0] == run(complete, leg, 4, 80, 312, env=loop)


def call_from_afar(leg: str, via: str, warm: bool) -> dict[str, Any]:
    """Use a batcher of the main hub from another thread in every way."""
    from typing import Any

    from tests.apps.inside import native_threads, world_of

    world = world_of(leg)
    import gevent
    from gevent import _hub_local, monkey

    from tests.fakes import Gate
    from ubatch import UBatch

    gate = Gate()
    handled: list[str] = []
    pause = monkey.get_original("time", "sleep")

    def handler(items: list[str]) -> list[Any]:
        handled.extend(items)
        if "held" in items:
            gate.wait()
        return [ValueError(item) if item == "bad" else item.upper() for item in items]

    ub = UBatch(8, 0.01, handler=handler, backend="gevent").start()
    gevent.get_hub()  # as any greenlet before would have
    if warm:
        assert ub.ubatch("a") == "A"

    def calls() -> dict[str, Any]:
        found: dict[str, Any] = {
            "ubatch": ub.ubatch("a"),
            "submit": ub.submit("b").result(),
            "map": ub.map("cd"),
            "errors": [repr(e) for e in ub.map(["bad"], return_exceptions=True)],
            "deadline": ub.with_options(deadline=60.0).ubatch("e"),
        }
        held = ub.submit("held")
        while not ub.stats().running:
            pause(0.001)
        queued = ub.submit("never")
        late = ub.with_options(deadline=0.01).submit("too late")
        found["cancel"] = [queued.cancel(), queued.cancelled(), queued.cancel()]
        found["cancel a running one"] = [held.cancel(), held.running(), held.done()]
        found["late"] = type(late.exception()).__name__
        called: list[str] = []
        held.add_done_callback(lambda future: called.append(future.result()))
        try:
            held.result(timeout=0.01)
        except TimeoutError:
            found["timeout"] = "TimeoutError"
        gate.open()
        found["held"] = held.result()
        while not called:
            pause(0.001)
        found["called"] = called
        found["hub"] = repr(_hub_local.get_hub_if_exists())
        return found

    if via == "thread":
        (found,) = native_threads(world, [calls])
    else:
        found = gevent.get_hub().threadpool.apply(calls)
    stats = ub.stats()
    ub.stop()
    return {
        **found,
        "handled": handled,
        "counts": [stats.cancelled_total, stats.expired_total, stats.pending],
    }


@pytest.mark.concurrency
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("via", ["thread", "pool"])
@pytest.mark.parametrize("leg", HUBS)
def test_a_native_thread_may_call(
    leg: str, via: str, warm: bool, loop: dict[str, str]
) -> None:
    """A thread that has no hub uses a batcher as a greenlet does, and gets no hub."""
    seen = run(call_from_afar, leg, via, warm, env=loop)
    handled = seen.pop("handled")
    assert ["a"] * warm + ["a", "b", "c", "d", "bad", "e", "held"] == handled
    assert {
        "ubatch": "A",
        "submit": "B",
        "map": ["C", "D"],
        "errors": ["ValueError('bad')"],
        "deadline": "E",
        "cancel": [True, True, True],
        "cancel a running one": [False, True, False],
        "late": "DeadlineExceeded",
        "timeout": "TimeoutError",
        "held": "HELD",
        "called": ["HELD"],
        "hub": "None",
        "counts": [1, 1, 0],
    } == seen


def nested(leg: str, inner_executor: str, backend: str) -> list[Any]:
    """Have a handler call another batcher, which nobody has called before."""
    from typing import Any

    from tests.apps.inside import world_of

    world = world_of(leg)
    from ubatch import UBatch

    options: Any = {"backend": backend, "executor": inner_executor}
    inner = UBatch(64, 0.01, handler=lambda ns: [n + 1 for n in ns], **options).start()

    def handler(numbers: list[int]) -> list[int]:
        return [n * 10 for n in inner.map(numbers)] if numbers else []

    outer = UBatch(64, 0.01, handler=handler, backend=world.backend).start()
    callers = [world.spawn(outer.ubatch, number) for number in range(50)]
    results = [caller.result() for caller in callers]
    counts = outer.stats().results_total, inner.stats().results_total
    outer.stop()
    inner.stop()
    return [results, *counts]


@pytest.mark.concurrency
@pytest.mark.parametrize("backend", ["same", "auto"])
@pytest.mark.parametrize("executor", ["threadpool", "inline"])
@pytest.mark.parametrize("leg", LEGS)
def test_a_handler_may_call_another_batcher(
    leg: str, executor: str, backend: str
) -> None:
    """A handler on the pool asks another batcher, even as the first to do so."""
    if backend == "same":
        backend = "thread" if leg == "thread" else "gevent"
    seen = run(nested, leg, executor, backend)
    assert [[(n + 1) * 10 for n in range(50)], 50, 50] == seen


def lone_main(leg: str, executor: str) -> list[int]:
    """Call from the main greenlet, with nothing else on the hub."""
    from concurrent.futures import ThreadPoolExecutor
    from typing import Any

    from tests.apps.inside import world_of

    world_of(leg)
    import gevent
    from gevent.threadpool import ThreadPool

    from ubatch import UBatch

    pool: Any = executor
    if executor == "concurrent.futures":
        pool = ThreadPoolExecutor(2)
    elif executor == "gevent.threadpool":
        pool = ThreadPool(2)
    with UBatch(
        8, 0.01, handler=lambda ns: [n * n for n in ns], backend="gevent", executor=pool
    ) as ub:
        results = [ub.ubatch(2), ub.submit(3).result(), *ub.map([4, 5])]
        (ready,) = gevent.wait([ub.submit(6)])  # type: ignore[list-item]
        results.append(ready.result())
    if executor == "concurrent.futures":
        pool.shutdown()
    return results


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "executor",
    [
        "threadpool",
        "hub_threadpool",
        "inline",
        "concurrent.futures",
        "gevent.threadpool",
    ],
)
@pytest.mark.parametrize("leg", HUBS)
def test_the_main_greenlet_may_be_the_only_one(
    leg: str, executor: str, loop: dict[str, str]
) -> None:
    """A script whose main greenlet alone calls gets results, not a LoopExit."""
    assert [4, 9, 16, 25, 36] == run(lone_main, leg, executor, env=loop)


def hub_destroyed(leg: str, destroy_loop: bool) -> list[str]:
    """Destroy the hub while a batch runs; tell what comes of it and of new calls."""
    from tests.apps.inside import world_of

    world = world_of(leg)
    import gevent

    from tests.fakes import Gate
    from ubatch import BackendError, UBatch

    gate = Gate()
    let_through = False

    def handler(items: list[str]) -> list[str]:
        if not let_through:
            gate.wait()
        return [item.upper() for item in items]

    ub = UBatch(8, 0.01, handler=handler, backend="gevent").start()
    lost = ub.submit("lost")
    world.until(lambda: ub.stats().running)
    gevent.get_hub().destroy(destroy_loop=destroy_loop)
    let_through = True
    ends = []
    for ask in lost.result, lambda: ub.ubatch("new"), lambda: ub.map(["n"])[0]:
        try:
            ends.append(ask())
        except BackendError:
            ends.append("BackendError")
    gate.open()
    ends.append(ub.ubatch("newer"))
    ub.stop()
    return ends


hubs_are_destroyed_at_once = not_on_libuv(
    "gevent's hub.destroy() waits until all that is pending has ended"
)


@hubs_are_destroyed_at_once
@pytest.mark.parametrize("destroy_loop", [True, False])
@pytest.mark.parametrize("leg", HUBS)
def test_a_new_hub_takes_over(leg: str, destroy_loop: bool) -> None:
    """When the hub is destroyed its calls end with an error, and new ones run."""
    ended = Program(hub_destroyed, leg, destroy_loop).end()
    assert 0 == ended.returncode, ended  # gevent says on stderr that it was rude
    assert ["BackendError", "NEW", "N", "NEWER"] == json.loads(ended.stdout)


def hub_of_a_thread(end: str) -> list[Any]:
    """Have a batcher run on the hub of a thread, and call it from the main one."""
    import threading

    import gevent

    from tests.fakes import World
    from ubatch import UBatch

    world = World("thread")
    ub = UBatch(8, 0.01, handler=lambda ns: [n * n for n in ns], backend="gevent")
    ub.start()
    found: list[Any] = []
    enough = False

    def in_the_thread() -> None:
        found.append(gevent.spawn(ub.ubatch, 2).get())
        while not enough:
            gevent.sleep(0.001)
        if end == "destroyed":
            gevent.get_hub().destroy()

    thread = threading.Thread(target=in_the_thread)
    thread.start()
    world.until(lambda: found)
    found.append(ub.ubatch(3))
    enough = True
    thread.join()
    gone = threading.Event()
    others: list[threading.Thread] = []
    while len(others) < 50 and thread.ident not in [other.ident for other in others]:
        others.append(threading.Thread(target=gone.wait))  # until one gets its ident
        others[-1].start()
    found.append(ub.ubatch(4))
    gone.set()
    for other in others:
        other.join()
    ub.stop()
    return found


@pytest.mark.parametrize("end", ["destroyed", "left"])
def test_a_hub_may_live_in_any_thread(end: str) -> None:
    """A batcher first called on a thread's hub answers others, and outlives it."""
    assert [4, 9, 16] == run(hub_of_a_thread, end)


def wait_for_a_lost_hub(end: str) -> list[str]:
    """Have a native thread wait for a call whose hub goes away."""
    import threading

    import gevent

    from tests.fakes import Gate, World
    from ubatch import BackendError, UBatch

    world, gate = World("thread"), Gate()

    def handler(items: list[str]) -> list[str]:
        gate.wait()
        return items

    ub = UBatch(8, 0.01, handler=handler, backend="gevent").start()
    enough = False

    def own() -> None:
        gevent.spawn(ub.submit, "the first").join()
        while not enough:
            gevent.sleep(0.001)
        if end == "destroyed":
            gevent.get_hub().destroy(destroy_loop=True)
        if end == "kept":
            gevent.get_hub().destroy(destroy_loop=False)

    ends: list[str] = []

    def wait(call: Any) -> None:
        try:
            call("x")
            ends.append("answered")
        except BackendError:
            ends.append("BackendError")

    owner = threading.Thread(target=own)
    owner.start()
    world.until(lambda: ub.stats().running)
    calls = (
        ub.ubatch,
        lambda item: ub.submit(item).result(),
        lambda item: ub.map([item]),
    )
    waiters = [
        threading.Thread(target=wait, args=(call,), daemon=True) for call in calls
    ]
    for waiter in waiters:
        waiter.start()
    world.until(lambda: ub.stats().pending == 3)
    enough = True
    owner.join()
    gate.open()
    for waiter in waiters:
        waiter.join(10.0)
    return ends


@pytest.mark.parametrize(
    "end",
    [
        pytest.param("destroyed", marks=hubs_are_destroyed_at_once),
        pytest.param("kept", marks=hubs_are_destroyed_at_once),
        "left",
    ],
)
def test_nobody_waits_for_a_lost_hub(end: str) -> None:
    """Native threads whose calls were on a hub that is gone get an error."""
    ended = Program(wait_for_a_lost_hub, end).end()
    assert 0 == ended.returncode, ended  # gevent may complain on stderr
    assert ["BackendError"] * 3 == json.loads(ended.stdout)


def stop_and_forget(leg: str) -> None:
    """Leave batchers behind, stopped or not, until their threads are gone."""
    import gc
    import os

    from tests.apps.inside import world_of

    world = world_of(leg)
    from ubatch import UBatch

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    def use(stops: int) -> None:
        ub = UBatch(8, 0.01, handler=lambda ns: [n * n for n in ns], backend=backend)
        for _ in range(3):
            ub.start()
            assert [ub.ubatch(2), *ub.map([3, 4])] == [4, 9, 16]
            for _ in range(stops):
                ub.stop()

    backend: Any = world.backend
    before = threads()
    for stops in [0, 1, 2] * 20:
        use(stops)
        world.spawn(bool).result()  # the hub has turned
    gc.collect()
    world.until(lambda: threads() == before)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("leg", LEGS)
def test_a_batcher_may_be_stopped_and_forgotten(leg: str, loop: dict[str, str]) -> None:
    """A batcher that is garbage leaves no thread and no noise, stopped or not."""
    run(stop_and_forget, leg, env=loop)


def stop_early() -> int:
    """Stop while the thread that answered still has to tell its pool; count threads."""
    import os
    from time import sleep

    from gevent import _threading

    from tests.fakes import World
    from ubatch import UBatch

    task_done = _threading.Queue.task_done

    def late(queue: Any) -> None:
        sleep(0.01)
        task_done(queue)

    _threading.Queue.task_done = late
    world = World("gevent")
    before = len(os.listdir("/proc/self/task"))
    for _ in range(10):
        with UBatch(8, 0.01, handler=lambda ns: ns, backend="gevent") as ub:
            ub.ubatch(1)
    world.until(lambda: len(os.listdir("/proc/self/task")) == before)
    return before


def test_stop_waits_for_no_luck_to_end_its_threads() -> None:
    """A pool's thread ends, even if its batcher stops before it has settled down."""
    assert 1 == run(stop_early)


def short_times() -> list[Any]:
    """Linger, and wait with deadlines, for a millisecond or so."""
    from typing import Any

    from tests.apps.inside import world_of

    world = world_of("gevent")
    from ubatch import UBatch

    def squares(numbers: list[int]) -> list[int]:
        return [number * number for number in numbers]

    options: Any = {"handler": squares, "backend": "gevent"}
    answered = []
    for linger in "settle", "full", "now":
        for executor in "threadpool", "inline":
            chosen = {"linger": linger, "executor": executor, **options}
            with UBatch(8, 0.0003, **chosen) as ub:
                callers = [world.spawn(ub.ubatch, n) for n in range(3)]
                answered.append([caller.result() for caller in callers])

    expired = set()
    ub = UBatch(8, 3600.0, linger="full", **options).start()
    for deadline in 0.0003, 0.0019, 0.0028, 0.0037:
        view = ub.with_options(deadline=deadline)
        for ask in (
            view.ubatch,
            lambda n: view.submit(n).result(),
            lambda n: view.map([n]),
        ):
            try:
                ask(1)
            except Exception as error:
                expired.add(type(error).__name__)
    ub.stop()
    return [answered, *expired]


@pytest.mark.parametrize("loop", LOOPS)
def test_times_may_be_shorter_than_the_loop_can_tell(loop: dict[str, str]) -> None:
    """Timeouts and deadlines of about a millisecond work, and nothing warns of them."""
    assert [[[0, 1, 4]] * 6, "DeadlineExceeded"] == run(short_times, env=loop)
