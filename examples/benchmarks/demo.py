"""What does ubatch do for a server? A minute, one small table.

Starts ``examples/digits`` under ``gunicorn -k gevent`` without batches, with ubatch
0.0.2 (installed into an environment of its own, where that can be done) and with this
ubatch; lets the same number of users ask each for a few seconds; and counts how often
the model was called.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from environments import ROOT, Environment, Missing, python_for, variables
from servers import HERE, Gunicorn
from systems import U002

DIGITS = ROOT / "examples" / "digits"
NEEDS = ("flask", "gunicorn[gevent]", "joblib", "numpy", "scikit-learn", "scipy")
WARM_UP = 0.5
ALONE = 0.25
"""The share of these seconds for which a lone user asks."""


Seen = dict[str, float]
"""What the users saw of one way."""


@dataclass(frozen=True)
class Way:
    """One way of serving the same model."""

    title: str
    path: str
    environment: Environment | None = None


UNBATCHED = Way("one call per request", "/predict_single")
ANCESTOR = Way("ubatch 0.0.2", "/predict", U002)
OURS = Way("ubatch, this one", "/predict")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demonstration."""
    options = _options(argv)
    ways = (UNBATCHED, OURS) if options.only_ours else (UNBATCHED, ANCESTOR, OURS)
    print(
        f"{options.users} users ask a model that reads digits, {options.seconds:g} s "
        "for each way of serving it ...",
        flush=True,
    )
    seen: dict[Way, Seen] = {}
    for way in ways:
        try:
            seen[way] = measure(way, options.users, options.seconds)
        except Missing as reason:
            print(f"({way.title} is left out: {reason})", flush=True)
    print(f"\n{table(seen)}\n\n{meaning(seen)}")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--users", type=_positive, default=32, help="how many ask at once (default: 32)"
    )
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="for each way (default: 4)"
    )
    parser.add_argument(
        "--only-ours", action="store_true", help="leave 0.0.2 out: installs nothing"
    )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def measure(way: Way, users: int, seconds: float) -> Seen:
    """Serve in one way, let the users ask, and return what they saw."""
    python = python_for(way.environment, NEEDS if way.environment else ())
    env = variables(way.environment)
    # The first one trains the model, which takes longer than gunicorn's patience.
    _child([python, str(DIGITS / "model.py")], env)
    # Not the digits' own: it wants hooks that 0.0.2 does not have.
    options = ["-k", "gevent", "-c", str(HERE / "serve_conf.py")]
    with Gunicorn("demo_app:app", options, env, python, own_group=True) as server:
        server.ask("/health")
        _drive(server, way, users, WARM_UP)
        before = server.ask("/calls")["calls"]
        found = _drive(server, way, users, seconds)
        calls = server.ask("/calls")["calls"] - before
        alone = _drive(server, way, 1, ALONE * seconds)["median"]
    share = 100 * calls / found["answered"]
    return {**found, "calls_per_100": share, "alone": alone}


def _drive(server: Gunicorn, way: Way, users: int, seconds: float) -> Seen:
    driver = [sys.executable, str(HERE / "demo_driver.py"), str(server.port), way.path]
    said = _child([*driver, str(users), str(seconds)], variables(None))
    found: Seen = json.loads(said)
    return found


def _child(command: list[str], env: dict[str, str]) -> str:
    """Run a child that the terminal's Ctrl-C does not reach, and that ends with us."""
    child = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = child.communicate()
    finally:
        child.kill()
        child.wait()
    if child.returncode:
        last = errors.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
        raise RuntimeError(f"{command[1]}: {last[0]}")
    return out


def table(seen: dict[Way, Seen]) -> str:
    """Return what was seen, for somebody who has never heard of percentiles."""
    first = ("", "requests", "half wait", "99 of 100", "calls of the", "a lone user")
    second = ("", "a second", "less than", "less than", "model per 100", "waits")
    rows = [
        (
            way.title,
            f"{found['per_second']:,.0f}",
            f"{found['median'] * 1000:,.0f} ms",
            f"{found['p99'] * 1000:,.0f} ms",
            f"{found['calls_per_100']:,.0f}",
            f"{found['alone'] * 1000:,.0f} ms",
        )
        for way, found in seen.items()
    ]
    widths = (22, 10, 12, 12, 15, 13)
    lines = [
        row[0].ljust(widths[0]) + "".join(map(str.rjust, row[1:], widths[1:]))
        for row in (first, second, *rows)
    ]
    return "\n".join(lines)


def meaning(seen: dict[Way, Seen]) -> str:
    """Return one sentence."""
    before, after = seen[UNBATCHED], seen[OURS]
    times = after["per_second"] / before["per_second"]
    return (
        f"The same process answered {times:.1f} times as many requests, because one "
        f"call of the model\nanswers {100 / after['calls_per_100']:.0f} of them: half "
        f"of the users waited less than {after['median'] * 1000:.0f} ms instead of "
        f"{before['median'] * 1000:.0f} ms."
    )


def _stopped() -> NoReturn:
    print("\nstopped; nothing is left running", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        _stopped()
    except RuntimeError as error:
        sys.exit(f"the demonstration failed: {error}")
