"""The compiled induction is the core's own: the same choices, to the last digits of their costs."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaling.core import induction, survival, warmth
from autoscaling.core.survival import Curve, build
from autoscaling.core.types import Forecast, NextArrival, Rung, RungProfile
from autoscaling.forecast import demand, demand_model, gap_record, gaps, hazard
from autoscaling.forecast.arrivals import HORIZON_S, FittedPoisson, Later, next_arrival
from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.demand_model import FittedDemand, Smoothed
from autoscaling.forecast.history import Recent, history_of
from autoscaling.forecast.profile import Profile
from autoscaling.sim import compiled, compiled_demand, compiled_gaps
from tests.forecast.made_traffic import DAY_S, START_S, traffic

NOW_S = 1.7e9
EVEN_S = START_S + np.arange(0.0, 3 * 3600.0, 3.7)
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
    before = warmth.solved
    try:
        for name, solved in (("plain", warmth._solved), ("compiled", compiled.solved)):
            warmth.solved = solved
            made[name] = warmth.choose(NOW_S + since_s, curve, prices, level, left_s)
    finally:
        warmth.solved = before
    plain, fast = made["plain"], made["compiled"]
    assert dict(fast.numbers) == pytest.approx(dict(plain.numbers), rel=1e-9, abs=1e-9)
    # Sums in another order may tip what is exactly even; nothing here is.
    assert (fast.lit, fast.rung) == (plain.lit, plain.rung)
    assert fast.until_s == pytest.approx(plain.until_s, abs=1e-3)


class Known:
    """A forecaster that says what it was given."""

    name = "known"

    def __init__(self, times_s: Any, survival: Any) -> None:
        self.times_s, self.survival = times_s, survival

    def log_survival(self, now_s: float, recent: Recent, times_s: Any) -> Any:
        return np.log(self.survival)

    def extra_times(self, now_s: float, recent: Recent) -> Any:
        return np.zeros(0)

    def forecast(self, now_s: float, recent: Recent | None) -> Forecast:
        return Forecast(now_s, self.name)


@given(
    curve=curves(),
    broken=st.sampled_from([None, None, None, "nan", "inf", "order", "rises", "above", "gone"]),
    asked_s=st.lists(st.floats(-10.0, 200000.0), max_size=5),
)
@settings(max_examples=150)
def test_a_curve_on_arrays_is_the_same(curve: Curve, broken: str | None, asked_s: list[float]) -> None:
    times, alive = GRID_S.copy(), np.asarray(curve.survival)
    if broken in {"nan", "inf"}:
        times[40] = float(broken)
    elif broken == "order":
        times[40] = times[39]
    elif broken == "rises":
        alive[40] = alive[39] * 1.01
    elif broken == "above":
        alive[0] = 1.5
    elif broken == "gone":
        alive[60:] = 0.0
    later = Later(Known(times, alive), NOW_S, Recent(NOW_S, (), (), NOW_S))
    object.__setattr__(later, "_known", (times, alive))
    plain = survival._from_arrival(NextArrival(NOW_S, tuple(times.tolist()), tuple(alive.tolist())))
    fast = compiled.from_arrival(later)
    assert (fast is None) == (plain is None) == (broken not in {None, "gone"})
    if plain is None or fast is None:
        return
    assert (fast.times, fast.survival, fast.end_s) == (plain.times, plain.survival, plain.end_s)
    for ahead_s in asked_s:
        assert fast.at(NOW_S + ahead_s) == plain.at(NOW_S + ahead_s)
    costs = induction.Costs(1.0, (0.0, 0.01), (50.0, 20.0), (5.0, 1.0), 10.0, 0.0, 5.0)
    grid, _ = compiled.solved(NOW_S + 3.0, fast, costs)
    assert list(grid) == warmth._grid(NOW_S + 3.0, plain, (5.0, 1.0))


@given(
    active=st.lists(st.integers(0, 2600), max_size=60, unique=True),
    times=st.lists(st.integers(0, 2600), max_size=20),
    known=st.sampled_from(["all", "each", "little"]),
)
@settings(max_examples=150)
def test_what_came_at_the_same_time_is_counted_the_same(
    active: list[int], times: list[int], known: str
) -> None:
    active_s = np.sort(np.asarray(active, float)) * 300.0 + 150.0
    time_s = np.asarray(times, float) * 330.0 + 7 * 86400.0
    before_s = {"all": np.inf, "each": time_s - 500.0, "little": time_s - 3 * 86400.0}[known]
    plain = gap_record._came(active_s, time_s, before_s)
    assert np.array_equal(compiled.came(active_s, time_s, before_s), plain)


def test_features_are_arranged_the_same() -> None:
    random = np.random.default_rng(4)
    for rows in (1, 3, 76):
        columns = [random.normal(0, 4, (rows, width)) for width in (5, 3, 3, 4, 5)]
        plain, fast = hazard._arranged(*columns), compiled.arranged(*columns)
        assert plain.flags.c_contiguous and fast.flags.c_contiguous
        assert np.array_equal(plain, fast)


@given(
    gaps_s=st.lists(
        st.tuples(st.floats(0, 1e6), st.sampled_from([0.05, 1.0, 60.0, 3600.0, 1e7]), st.floats(0, 10)),
        max_size=60,
    ),
    strength=st.sampled_from([0.5, 2.0, 20.0]),
    open_s=st.one_of(st.none(), st.floats(0, 1e8)),
)
@settings(max_examples=150)
def test_gaps_are_distributed_the_same(
    gaps_s: list[tuple[float, float, float]], strength: float, open_s: float | None
) -> None:
    lo_s, wide_s, weight = np.asarray(gaps_s).reshape(-1, 3).T
    sample = gaps.GapSample(lo_s, lo_s + wide_s, weight)
    plain = gaps._gap_mass(sample, gaps.default_prior(), strength, open_s)
    fast = compiled_gaps.gap_mass(sample, gaps.default_prior(), strength, open_s)
    assert fast == pytest.approx(plain, rel=1e-9, abs=1e-15)


@pytest.fixture(scope="module")
def fitted_demand() -> dict[str, FittedDemand]:
    """One of each kind, periodic or not, of steps of a minute and of ten seconds."""
    days = np.arange(0.0, 8 * DAY_S, 40.0)
    daily = (
        START_S + days[np.random.default_rng(0).random(len(days)) < 0.5 + 0.5 * np.sin(days / DAY_S * 6.283)]
    )
    found = {}
    for name, until_s in (("long", 8 * DAY_S), ("some hours", 3 * 3600.0), ("young", 700.0)):
        now_s = START_S + until_s
        history = history_of(traffic(daily[daily < now_s] if name == "long" else EVEN_S, now_s), now_s)
        for kind, profile in demand.CHEAP.items():
            with contextlib.suppress(NotApplicable):
                chosen = demand.choose(history, 120.0, 2.0, {kind: profile})
                found[f"{name}, {kind}"] = chosen.fitted
    last = found["long, daily"]
    profile = Profile(60.0, np.random.default_rng(1).gamma(2.0, 0.02, 2000), START_S + 5 * DAY_S)
    last = replace(last, model=replace(last.model, profile=profile), smoothed=Smoothed.of(profile))
    return {**found, "of a season of its own": last}


@given(
    off_s=st.floats(0, 10 * DAY_S),
    rates=st.lists(st.floats(0, 20.0), min_size=5, max_size=5),
    steps=st.integers(1, 60),
    service_s=st.sampled_from([0.01, 2.0, 300.0]),
)
@settings(max_examples=60)
def test_as_much_is_expected(
    fitted_demand: dict[str, FittedDemand], off_s: float, rates: list[float], steps: int, service_s: float
) -> None:
    assert {each.model.profile.period_s is None for each in fitted_demand.values()} == {True, False}
    assert {each.step_s for each in fitted_demand.values()} == {10.0, 60.0}
    now_s = START_S + off_s
    recent = Recent(now_s - 7.0, (), tuple(rates), now_s - 7.0)
    for each in fitted_demand.values():
        fitted = replace(each, service_s=service_s)
        plain = demand_model._predict(fitted, now_s, recent, steps)
        fast = compiled_demand.predict(fitted, now_s, recent, steps)
        assert (fast.made_s, fast.step_s, fast.quantiles) == (plain.made_s, plain.step_s, plain.quantiles)
        # Whole requests: what is within rounding of two is either.
        assert np.asarray(fast.rate_per_s) == pytest.approx(
            np.asarray(plain.rate_per_s), abs=1.001 / plain.step_s
        )
        assert np.asarray(fast.concurrency) == pytest.approx(
            np.asarray(plain.concurrency), rel=1e-6, abs=1e-6
        )


class Bent(FittedPoisson):
    """With times of its own, up to the horizon and beyond."""

    def extra_times(self, now_s: float, recent: Recent) -> Any:
        return np.asarray([3.3, HORIZON_S - 1e-5, 2 * HORIZON_S])


@pytest.mark.parametrize("kind", [FittedPoisson, Bent])
def test_what_is_looked_at_later_is_what_was_said(kind: type[FittedPoisson]) -> None:
    """Its end is known before that."""
    fitted = kind("poisson", 2.0, 100.0)
    recent = Recent(NOW_S - 20.0, (), (), NOW_S)
    said, later = next_arrival(fitted, NOW_S, recent), Later(fitted, NOW_S, recent)
    assert later.end_s == said.end_s
    assert (later.made_s, later.times_s, later.survival) == (said.made_s, said.times_s, said.survival)


def test_a_replay_uses_it() -> None:
    from tests.sim import lab

    def used() -> tuple[Any, ...]:
        core = warmth.solved, survival.from_arrival
        return *core, gap_record.came, hazard.arranged, gaps.gap_mass, demand_model.predict

    def use(core: Any, curve: Any, *forecast: Any) -> None:
        warmth.solved, survival.from_arrival = core, curve
        gap_record.came, hazard.arranged, gaps.gap_mass, demand_model.predict = forecast

    before = used()
    try:
        use(
            *(warmth._solved, survival._from_arrival),
            *(gap_record._came, hazard._arranged, gaps._gap_mass, demand_model._predict),
        )
        lab.run(lab.requests([10.0]))
        assert used() == (
            *(compiled.solved, compiled.from_arrival, compiled.came, compiled.arranged),
            *(compiled_gaps.gap_mass, compiled_demand.predict),
        )
    finally:
        use(*before)
