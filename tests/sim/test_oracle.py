"""The bound, where it is known by hand: which replica is needed when, and which gaps are shorter than a start."""

from __future__ import annotations

import numpy as np
import pytest

from autoscaling.core.types import Demand, Rung
from autoscaling.sim.compare import Base, Variant, simulate
from autoscaling.sim.oracle import STEP_S, Oracle
from autoscaling.sim.profile import Engine, Start
from autoscaling.sim.replay import Setup
from tests.sim import lab

START_S, WORK_S = 60.0, 20.0
ONE_AT_A_TIME = lab.profile(
    engine=Engine(concurrency=1, service_s=WORK_S), starts={Rung.TEMPLATE: Start((START_S,))}, slo_s=0.5
)


def test_it_is_the_least_that_serves_everybody_at_once() -> None:
    """Three at once, three again after a gap that is shorter than a start, and two much later."""
    times = [0.0, *[1000.0] * 3, *[1050.0] * 3, *[4000.0] * 2]
    base = Base(
        lab.requests(times, WORK_S),
        Setup(profile=ONE_AT_A_TIME, measure_from_s=500.0),
        spec=lab.spec(max_replicas=8, target_ongoing_requests=1.0),
    )
    total = simulate(base, Variant("oracle")).total
    assert total.slo_attainment == 1.0
    # Three that are held through the gap and two later.
    assert total.starts == 5
    least = 3 * (START_S + 50 + WORK_S) + 2 * (START_S + WORK_S)
    # It sees demand in steps, and begins by the upper quantile of a start.
    assert least <= total.gpu_s <= least + 5 * (2 * STEP_S + START_S / 32 + 1)


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("acts_s", [0.5, 2.0, 7.5])
@pytest.mark.parametrize("name", ["apply_s", "wake_s"])
def test_nobody_waits_for_the_way_of_a_decision(name: str, acts_s: float, most: int) -> None:
    """It is begun as much earlier as that takes, and costs only so much more."""
    gaps_s = np.random.default_rng(1).exponential(400.0, 100)
    rows = lab.requests([0.0, *(gaps_s.cumsum() + 600.0)], exec_s=3.0 if most == 1 else 90.0)
    engine = Engine(concurrency=1 if most == 1 else 2)
    at_once, late = (
        simulate(
            Base(
                rows,
                Setup(profile=lab.profile(4.0, engine=engine, **way), measure_from_s=500.0),
                spec=lab.spec(max_replicas=most),
            ),
            Variant("oracle"),
        ).total
        for way in ({}, {name: acts_s})
    )
    assert (late.cold_starts, late.slo_attainment) == (0, 1.0)
    # Each replica idles for as long before its request, and stays for as long after it.
    assert late.gpu_s <= at_once.gpu_s + 2 * (acts_s + 1.0) * late.starts


@pytest.mark.parametrize(("share", "over_s"), [(1.0, 0.0), (0.5, 0.0), (1.0, 60.0), (0.5, 60.0)])
def test_it_tells_of_as_much_as_it_is_asked_to(share: float, over_s: float) -> None:
    oracle = Oracle(np.ones(2), share=share, over_s=over_s)
    oracle.watch("m", 0.0, 300.0)
    # Two in progress from 100 to 120, one of them until 200.
    oracle.coming("m", np.asarray([0.0, 100.0, 100.0]), np.asarray([1.0, 20.0, 100.0]))
    forecast = oracle.forecast("m", 90.0)
    assert forecast is not None
    demand = forecast.demand
    assert isinstance(demand, Demand)
    told = {demand.made_s + i * STEP_S: row[0] for i, row in enumerate(demand.concurrency)}
    if over_s:
        # From 115 to 175: two until 120, one from there.
        assert told[140.0] == pytest.approx(share * (2 * 5 + 1 * 55) / 60)
    else:
        assert (told[100.0], told[140.0]) == (2 * share, share)
