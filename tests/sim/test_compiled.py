"""The compiled induction is the core's own: the same choices, to the last digits of their costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaling.core import induction, warmth
from autoscaling.core.survival import Curve, build
from autoscaling.core.types import Rung, RungProfile
from autoscaling.sim import compiled

NOW_S = 1.7e9
GRID_S = np.concatenate([np.arange(10.0), np.geomspace(10.0, 172800.0, 80)])
LADDER = (
    RungProfile(Rung.WEIGHTS, 60.0, 66.0, 0.0),
    RungProfile(Rung.TEMPLATE, 4.0, 4.2, 0.001),
    RungProfile(Rung.PARKED, 1.0, 1.1, 0.01),
)
SERVING = RungProfile(Rung.SERVING, 0.0, 0.0, 1.0)


@st.composite
def curves(draw: Any) -> Curve:
    """Bursts, lulls, and stretches in which nothing can come."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape, power = draw(st.sampled_from([0.05, 0.3, 2.0])), draw(st.floats(0.2, 1.2))
    hazard = random.gamma(shape, 1.0, len(GRID_S)) * np.diff(GRID_S, prepend=-1.0) ** power
    hazard[random.random(len(GRID_S)) < draw(st.sampled_from([0.0, 0.3]))] = 0.0
    hazard[0] = 0.0
    gone = draw(st.sampled_from([0.05, 1.0, 5.0, 18.0]))
    survival = np.exp(-np.cumsum(hazard) / max(hazard.sum(), 1e-9) * gone)
    return build((NOW_S + GRID_S).tolist(), survival.tolist())


@given(
    curve=curves(),
    rungs=st.integers(1, 7),
    wait_cost=st.sampled_from([0.1, 1.0, 10.0, 300.0]),
    batch_size=st.sampled_from([1.0, 4.0, 50.0]),
    burst_s=st.sampled_from([0.0, 5.0, 90.0]),
    level=st.sampled_from([Rung.WEIGHTS, Rung.PARKED, Rung.SERVING]),
    lead_s=st.sampled_from([None, 0.0, 30.0]),
    left_s=st.one_of(st.none(), st.floats(0.1, 40.0)),
    since_s=st.floats(0.0, 5000.0),
)
@settings(max_examples=150)
def test_both_choose_the_same(  # noqa: PLR0917 - what is drawn
    curve: Curve,
    rungs: int,
    wait_cost: float,
    batch_size: float,
    burst_s: float,
    level: Rung,
    lead_s: float | None,
    left_s: float | None,
    since_s: float,
) -> None:
    held = [profile for i, profile in enumerate(LADDER) if rungs >> i & 1]
    if lead_s is not None:
        held[-1] = replace(held[-1], delay_high_s=lead_s)
    profiles = {profile.rung: profile for profile in (*held, SERVING)}
    prices = warmth.Prices(profiles, wait_cost, batch_size, burst_s)
    made = {}
    before = induction.solve
    try:
        for name, solve in (("plain", induction._solve), ("compiled", compiled.solve)):
            induction.solve = solve
            made[name] = warmth.choose(NOW_S + since_s, curve, prices, level, left_s)
    finally:
        induction.solve = before
    plain, fast = made["plain"], made["compiled"]
    assert dict(fast.numbers) == pytest.approx(dict(plain.numbers), rel=1e-9, abs=1e-9)
    # Sums in another order may tip what is exactly even; nothing here is.
    assert (fast.lit, fast.rung) == (plain.lit, plain.rung)
    assert fast.until_s == pytest.approx(plain.until_s, abs=1e-3)


def test_a_replay_uses_it() -> None:
    from tests.sim import lab

    before = induction.solve
    try:
        induction.solve = induction._solve
        lab.run(lab.requests([10.0]))
        assert induction.solve is compiled.solve
    finally:
        induction.solve = before
