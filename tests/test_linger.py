"""Does the default linger as well as the best of the others, whatever the load?"""

from __future__ import annotations

from functools import cache
from math import prod

import pytest

from tests.children import once
from tests.simulation import AtOnce, BentoML, Load, Ours, Rule, Served, Simulation
from tests.simulation import loads as all_loads
from ubatch.policy import Linger

pytestmark = once  # nothing here depends on what is patched

SECONDS, WARM = 1.2, 0.3
LOADS = {load.name: load for load in all_loads(SECONDS)}
FIXED: tuple[Linger, ...] = ("now", "settle", "full")
NEAR = 1.05


def served(load: Load, rule: Rule) -> Served:
    return Simulation(load, rule).run(SECONDS, WARM)


def served_on_the_hub(load: Load, linger: Linger) -> float:
    rule = Ours(linger, overlaps=False)
    return Simulation(load, rule, overlaps=False).run(4.0, WARM).throughput


@cache
def by(name: str, linger: Linger) -> Served:
    return served(LOADS[name], Ours(linger))


@pytest.mark.parametrize("name", LOADS)
def test_adaptive_is_within_five_percent_of_the_best_fixed_linger(name: str) -> None:
    """By throughput and by p99, with no load's tuning."""
    best = [by(name, linger) for linger in FIXED]
    adaptive = by(name, "adaptive")
    assert adaptive.throughput * NEAR >= max(one.throughput for one in best)
    assert adaptive.p99 <= NEAR * min(one.p99 for one in best)


@pytest.mark.parametrize("linger", FIXED)
def test_no_fixed_linger_is_near_the_best_everywhere(linger: Linger) -> None:
    """Else there would be nothing to adapt, and the test above could not fail."""
    lost = [by(name, linger).p99 / by(name, "adaptive").p99 for name in LOADS]
    assert max(lost) > 1.25


@pytest.mark.parametrize("peer, lost", [(BentoML, 3), (AtOnce, 0)])
def test_adaptive_beats_the_rules_of_peers(peer: type[Rule], lost: int) -> None:
    """On the average, and but for a few loads in each of them.

    BentoML's is faster with 64 clients on a hub that is busy all the time.
    """
    waits, calls = [], []
    for name, load in LOADS.items():
        theirs, ours = served(load, peer()), by(name, "adaptive")
        waits.append(theirs.p99 / ours.p99)
        calls.append(ours.throughput / theirs.throughput)
    assert sum(ratio < 0.95 for ratio in waits) <= lost
    assert sum(ratio < 0.95 for ratio in calls) <= lost
    assert _mean(waits) > 1.05 and _mean(calls) > 1.02


def test_on_the_hub_adaptive_serves_as_many_as_the_best_fixed_linger() -> None:
    """Where the handler runs instead of the callers, waiting costs no overlap."""
    for load in [load for name, load in LOADS.items() if "clients" in name]:
        best = max(served_on_the_hub(load, linger) for linger in FIXED)
        assert served_on_the_hub(load, "adaptive") * NEAR >= best, load.name


def _mean(ratios: list[float]) -> float:
    return float(prod(ratios) ** (1 / len(ratios)))
