"""What holds for every policy, whatever comes."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from autoscaling.core import codec
from autoscaling.core.decide import decide
from autoscaling.core.policies import POLICIES
from autoscaling.core.series import alike, ceil
from autoscaling.core.types import (
    Capacity,
    Decision,
    Forecast,
    NextArrival,
    Observation,
    Reason,
    Rung,
    Spec,
    State,
    Window,
)
from tests.core.lab import RUNGS, T0, Cluster, demand, later, never, poisson, said, seen, spec, timer

quickly = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
names = st.sampled_from(sorted(POLICIES))


@st.composite
def windows(draw: st.DrawFn) -> tuple[Window, ...]:
    found = []
    for _ in range(draw(st.integers(0, 2))):
        start_s = T0 + draw(st.integers(-600, 900))
        found.append(
            Window(
                start_s,
                start_s + draw(st.integers(1, 900)),
                draw(st.integers(0, 5)),
                draw(st.sampled_from([Rung.SERVING, Rung.PARKED, Rung.TEMPLATE])),
                draw(st.sampled_from(["schedule", "prewarm"])),
            )
        )
    return tuple(sorted(found, key=lambda window: window.start_s))


@st.composite
def specs(draw: st.DrawFn, *, floors: bool = True) -> Spec:
    low = draw(st.integers(0, 2)) if floors else 0
    return spec(
        draw(names),
        wait_cost=draw(st.sampled_from([0.0, 0.1, 1.0, 10.0, 1000.0])),
        min_replicas=low,
        max_replicas=low + draw(st.integers(1, 8)),
        target_ongoing_requests=draw(st.sampled_from([1.0, 2.5, 10.0])),
        keep_alive_s=draw(st.sampled_from([0.0, 5.0, 60.0])),
        park=draw(st.booleans()),
        windows=draw(windows()) if floors else (),
    )


@st.composite
def forecasts(draw: st.DrawFn) -> Forecast | None:
    kind = draw(st.sampled_from(["none", "poisson", "timer", "never", "demand", "both"]))
    made_s = T0 + draw(st.floats(-300, 0))
    if kind == "none":
        return None
    if kind == "never":
        return never(made_s)
    if kind == "timer":
        return timer(T0 + draw(st.floats(20, 3000)), made_s)
    base = poisson(1 / draw(st.floats(2, 3000)), made_s)
    base = replace(base, batch_size=draw(st.sampled_from([1.0, 4.0])))
    if kind == "poisson":
        return base
    levels = draw(st.lists(st.floats(0, 40), min_size=1, max_size=20))
    dense = demand(*levels, made_s=made_s)
    return replace(base, demand=dense, next_arrival=base.next_arrival if kind == "both" else None)


@st.composite
def histories(draw: st.DrawFn, *, floors: bool = True) -> tuple[Cluster, Observation, Forecast | None]:
    """A model after some minutes of traffic, as it is next seen."""
    cluster = Cluster(draw(specs(floors=floors)), start_s=draw(st.sampled_from([0.5, 5.0, 40.0])))
    forecast = draw(forecasts())
    load = 0
    for _ in range(draw(st.integers(0, 12))):
        before, load = load, draw(st.sampled_from([0, 0, 1, 3, 9, 10, 11, 40, 100]))
        cluster.step(load, max(0, load - before), forecast)
        cluster.now_s += draw(st.sampled_from([1.0, 1.0, 1.0, 2.5, 30.0, 100.0]))
    load = draw(st.sampled_from([0, 0, 0, 1, 5, 25, 90]))
    return cluster, cluster.observe(load, draw(st.integers(0, load)) if load else 0), forecast


@quickly
@given(histories())
def test_decisions_are_within_bounds_and_say_so(
    history: tuple[Cluster, Observation, Forecast | None],
) -> None:
    cluster, observation, forecast = history
    _, decision = decide(cluster.spec, cluster.state, observation, forecast)
    assert decision.replicas is not None
    assert cluster.spec.min_replicas <= decision.replicas <= cluster.spec.max_replicas
    assert Rung.COLD <= decision.rung <= Rung.PARKED
    assert decision.until_s > observation.now_s
    assert all(math.isfinite(number) for number in decision.numbers.values())
    assert set(decision.clamps) <= {Reason.MIN_REPLICAS, Reason.MAX_REPLICAS}
    if Reason.MIN_REPLICAS in decision.clamps and Reason.MAX_REPLICAS not in decision.clamps:
        assert decision.replicas == cluster.spec.min_replicas
    if observation.queued or observation.in_flight:
        assert decision.replicas >= 1 or cluster.spec.policy == "fixed"


@quickly
@given(histories(), st.floats(0, 1))
def test_a_decision_stands_for_the_loads_that_it_names(
    history: tuple[Cluster, Observation, Forecast | None], share: float
) -> None:
    """A second later, whatever is in progress: the same, from the same memory, and the same is remembered."""
    cluster, observation, forecast = history
    state, decision = decide(cluster.spec, cluster.state, observation, forecast)
    load = (observation.queued or 0) + (observation.in_flight or 0)
    assume(load and decision.loads)
    assert decision.loads is not None
    least, most = decision.loads
    assert 1 <= least <= load <= most
    # Within the second nothing else changes it.
    assume(decision.until_s > observation.now_s + 1)
    found = []
    for other in (load, least, most, round(least + share * (most - least))):
        then = replace(observation, now_s=observation.now_s + 1, arrivals=0, queued=0, in_flight=other)
        after, again = decide(cluster.spec, state, then, forecast)
        found.append((again.replicas, again.rung, again.until_s, again.clamps, after))
    assert found == found[:1] * 4


@quickly
@given(histories())
def test_deciding_again_gives_the_same(history: tuple[Cluster, Observation, Forecast | None]) -> None:
    cluster, observation, forecast = history
    state, first = decide(cluster.spec, cluster.state, observation, forecast)
    again, second = decide(cluster.spec, state, observation, forecast)
    assert second == first
    assert again == state


@quickly
@given(histories())
def test_memory_goes_through_json(history: tuple[Cluster, Observation, Forecast | None]) -> None:
    cluster, observation, forecast = history
    stored = codec.from_json(State, codec.to_json(cluster.state))
    assert stored == cluster.state
    assert decide(cluster.spec, stored, observation, forecast) == decide(
        cluster.spec, cluster.state, observation, forecast
    )


@quickly
@given(histories(), st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_more_load_never_gives_fewer_replicas(
    history: tuple[Cluster, Observation, Forecast | None], queued: int, in_flight: int, more: int
) -> None:
    cluster, observation, forecast = history
    small = replace(observation, queued=queued, in_flight=in_flight)
    large = replace(observation, queued=queued + more, in_flight=in_flight)
    _, fewer = decide(cluster.spec, cluster.state, small, forecast)
    _, greater = decide(cluster.spec, cluster.state, large, forecast)
    assert fewer.replicas is not None and greater.replicas is not None
    assert fewer.replicas <= greater.replicas


@quickly
@given(histories(), st.data())
def test_a_decision_stands_until_it_says(
    history: tuple[Cluster, Observation, Forecast | None], data: st.DataObject
) -> None:
    """Nothing happens: no sooner than `until_s` is anything else decided, however often it is asked meanwhile."""
    cluster, observation, forecast = history
    state, decision = decide(cluster.spec, cluster.state, observation, forecast)
    span_s = min(decision.until_s - observation.now_s, 50_000.0)
    assume(span_s > 0.05)
    shares = sorted(data.draw(st.lists(st.floats(0, 1), max_size=3)))
    moments = [observation.now_s + share * (span_s - 0.02) for share in shares]
    _, then = decide(cluster.spec, state, later(observation, observation.now_s + span_s - 0.02), forecast)
    assert said(then) == said(decision)
    for now_s in moments:
        state, then = decide(cluster.spec, state, later(observation, now_s), forecast)
        assert said(then) == said(decision)
        assert then.until_s == pytest.approx(decision.until_s, abs=0.02) or then.until_s >= decision.until_s


@quickly
@given(histories(), st.data())
def test_a_decision_stands_for_the_loads_that_it_says(
    history: tuple[Cluster, Observation, Forecast | None], data: st.DataObject
) -> None:
    """Whether it is looked at meanwhile with any of those loads, or not: now and later the same is decided."""
    cluster, observation, forecast = history
    assume(observation.queued or observation.in_flight)
    state, decision = decide(cluster.spec, cluster.state, observation, forecast)
    if decision.loads is None:
        assert cluster.spec.policy not in {"keep-alive", "reactive", "hybrid-histogram"}
        return
    least, most = decision.loads
    assert 1 <= least <= (observation.queued or 0) + (observation.in_flight or 0) <= most
    span_s = min(decision.until_s - observation.now_s, 500.0)
    assume(span_s > 0.05)
    looked_at = state
    loads = st.one_of(st.sampled_from([least, most]), st.integers(least, most))
    for share in sorted(data.draw(st.lists(st.floats(0, 1), max_size=3))):
        load = data.draw(loads)
        now_s = observation.now_s + share * (span_s - 0.02)
        meanwhile = replace(
            observation, now_s=now_s, queued=0, in_flight=load, arrivals=load, last_arrival_s=now_s
        )
        looked_at, same = decide(cluster.spec, looked_at, meanwhile, forecast)
        assert said(same) == said(decision)
        assert same.until_s == decision.until_s
        assert same.loads == decision.loads
    then_s = observation.now_s + span_s + data.draw(st.sampled_from([-0.01, 0.0, 1.0, 70.0]))
    load = data.draw(st.one_of(loads, st.integers(0, 120)))
    then = replace(
        observation, now_s=then_s, queued=0, in_flight=load, last_busy_s=then_s - 0.5 * (load == 0)
    )
    assert decide(cluster.spec, looked_at, then, forecast) == decide(cluster.spec, state, then, forecast)


@given(st.integers(1, 300), st.lists(st.floats(0.01, 300), min_size=1, max_size=3))
def test_loads_that_are_alike_need_the_same(load: int, units: list[float]) -> None:
    def need(load: int) -> list[int]:
        return [ceil(load / unit) for unit in units]

    least, most = alike(load, *units)
    assert need(least) == need(load) == need(most)
    assert least == 1 or need(least - 1) != need(load)
    assert need(most + 1) != need(load)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    specs(floors=False),
    st.integers(1, 70),
    st.sampled_from([1.0, 5.0, 20.0]),
    st.sampled_from([0.0, 1.0, 3.0]),
    forecasts(),
)
def test_constant_load_settles(
    asked: Spec, load: int, start_s: float, lag_s: float, forecast: Forecast | None
) -> None:
    cluster = Cluster(asked, start_s=start_s, lag_s=lag_s)
    # The forecast of how much ends before the load does; a forecast that moves is no constant load.
    decisions = cluster.run(1600, load, replace(forecast, demand=None) if forecast else None)
    counts = [decision.replicas for decision in decisions]
    assert all(count is not None for count in counts)
    tail = counts[-400:]
    assert len(set(tail)) == 1, tail
    turns = _turns([count for count in counts if count is not None])
    assert turns <= 1, counts


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(specs(floors=False), st.integers(1, 70), st.sampled_from(["none", "never", "poisson"]))
def test_no_traffic_ends_at_zero(asked: Spec, load: int, kind: str) -> None:
    assume(asked.policy != "fixed")
    cluster = Cluster(asked)
    cluster.run(30, load)
    ended_s = cluster.now_s
    forecast = {"none": None, "never": never(ended_s, 4000), "poisson": poisson(1 / 1000, ended_s)}[kind]
    decision = _without_traffic(cluster, forecast, ended_s + 90_000)
    assert decision.replicas == 0
    assert decision.until_s == math.inf or decision.until_s > ended_s + 90_000
    assert decision.reason in {Reason.DARK, Reason.PARK, Reason.GO_DARK}


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    specs(floors=False),
    st.integers(1, 30),
    st.sampled_from([1.0, 5.0, 20.0]),
    st.sampled_from([0.0, 1.0, 3.0]),
    st.sampled_from(["none", "never", "poisson", "timer"]),
)
# A start that takes less than was measured: not parked for the seconds that are left.
@example(
    spec("predictive", wait_cost=10.0, max_replicas=1, target_ongoing_requests=1.0), 1, 1.0, 0.0, "timer"
)
def test_between_decision_and_effect_nothing_flaps(
    asked: Spec, load: int, start_s: float, lag_s: float, kind: str
) -> None:
    """Traffic ends; what is decided reaches the cluster late, and is seen later still. It goes down, and a timer brings
    it up once."""
    assume(asked.policy != "fixed")
    cluster = Cluster(asked, start_s=start_s, lag_s=lag_s)
    cluster.run(120, load)
    ended_s = cluster.now_s
    forecast = {
        "none": None,
        "never": never(ended_s, 4000),
        "poisson": poisson(1 / 1000, ended_s),
        "timer": timer(ended_s + 400, ended_s, width_s=30.0),
    }[kind]
    decisions = cluster.run(900, 0, forecast)
    counts = [decision.replicas for decision in decisions if decision.replicas is not None]
    assert len(counts) == len(decisions)
    assert _turns(counts) <= (2 if kind == "timer" else 0), counts
    rungs = [decision.rung for decision in decisions if decision.replicas == 0]
    assert kind == "timer" or _turns([int(rung) for rung in rungs]) == 0, rungs


def test_the_fixed_one_is_the_only_one_that_stays() -> None:
    cluster = Cluster(spec("fixed", params={"replicas": 2}))
    cluster.run(5, 10)
    decision = _without_traffic(cluster, None, cluster.now_s + 90_000)
    assert (decision.replicas, decision.reason) == (2, Reason.FIXED)


UNKNOWN: list[dict[str, Any]] = [
    {"ready": None},
    {"queued": None},
    {"in_flight": None},
    {"queued": math.nan},
    {"in_flight": math.inf},
    {"ready": math.nan},
    {"queued": -1},
    {"now_s": math.nan},
    {"now_s": math.inf},
]


@quickly
@given(histories(), st.sampled_from(UNKNOWN))
def test_what_is_unknown_holds(
    history: tuple[Cluster, Observation, Forecast | None], unknown: dict[str, Any]
) -> None:
    cluster, observation, forecast = history
    state, decision = decide(cluster.spec, cluster.state, replace(observation, **unknown), forecast)
    assert decision.replicas is None
    assert decision.reason is Reason.UNKNOWN_HOLD
    # And it goes on from where it was.
    expected = decide(cluster.spec, cluster.state, observation, forecast)
    assert decide(cluster.spec, state, observation, forecast) == expected


@quickly
@given(histories(floors=False), st.floats(0.001, 1e6))
def test_a_clock_that_goes_back_holds_once_and_goes_on(
    history: tuple[Cluster, Observation, Forecast | None], back_s: float
) -> None:
    cluster, observation, forecast = history
    state, _ = decide(cluster.spec, cluster.state, observation, forecast)
    earlier = replace(observation, now_s=observation.now_s - back_s, arrivals=0)
    state, held = decide(cluster.spec, state, earlier, forecast)
    assert (held.replicas, held.reason) == (None, Reason.UNKNOWN_HOLD)
    assert held.until_s <= earlier.now_s
    state, decision = decide(cluster.spec, state, replace(earlier, now_s=earlier.now_s + 1), forecast)
    assert decision.replicas is not None
    if observation.queued or observation.in_flight:
        assert decision.replicas >= 1 or cluster.spec.policy == "fixed"


@quickly
@given(
    names,
    st.sampled_from(["times", "survival", "length", "order", "demand", "batch", "made"]),
    st.booleans(),
)
def test_a_broken_forecast_is_none(name: str, broken: str, up: bool) -> None:
    good = poisson(1 / 30)
    nxt = good.next_arrival
    assert nxt is not None
    made: dict[str, Forecast] = {
        "times": replace(good, next_arrival=replace(nxt, times_s=(math.nan, *nxt.times_s[1:]))),
        "survival": replace(good, next_arrival=replace(nxt, survival=(1.0, *(math.nan,) * 60))),
        "length": replace(good, next_arrival=replace(nxt, survival=nxt.survival[:-1])),
        "order": replace(good, next_arrival=replace(nxt, times_s=nxt.times_s[::-1])),
        "demand": Forecast(T0, "x", demand=replace(demand(5.0), concurrency=((math.nan, 1.0),))),
        "batch": Forecast(T0, "x", batch_size=math.nan),
        "made": Forecast(math.nan, "x", NextArrival(math.nan, (0.0, 1.0), (1.0, 0.5))),
    }
    observation = seen(T0, ready=int(up), target=int(up))
    asked = spec(name)
    with_it = decide(asked, State(), observation, made[broken])
    if broken == "demand":
        # Its rates are fine, and say when.
        assert with_it[1].replicas is not None
        return
    assert said(with_it[1]) == said(decide(asked, State(), observation, None)[1])


@quickly
@given(histories())
def test_broken_capacity_and_prices_do_not_matter(
    history: tuple[Cluster, Observation, Forecast | None],
) -> None:
    cluster, observation, forecast = history
    broken = replace(
        observation, capacity=Capacity(math.nan), rungs=(*RUNGS, replace(RUNGS[0], delay_s=math.nan))
    )
    _, decision = decide(cluster.spec, cluster.state, broken, forecast)
    assert decision.replicas is not None
    assert decision.numbers.get("per_replica", 1.0) > 0


def _turns(counts: list[int]) -> int:
    """How often it went the other way."""
    steps = [b - a for a, b in pairwise(counts) if a != b]
    return sum(1 for a, b in pairwise(steps) if (a > 0) != (b > 0))


def _without_traffic(cluster: Cluster, forecast: Forecast | None, until_s: float) -> Decision:
    """From `until_s` to `until_s` of the decisions, and when a start is over: nobody polls."""
    for _ in range(2000):
        before = (cluster.ready, len(cluster.starts), cluster.target)
        decision = cluster.step(0, 0, forecast)
        then_s = min([decision.until_s, *cluster.starts])
        if before != (cluster.ready, len(cluster.starts), cluster.target):
            # What was done is seen a second later.
            then_s = min(then_s, cluster.now_s + 1)
        if then_s >= until_s:
            return decision
        assert then_s > cluster.now_s
        cluster.now_s = then_s
    raise AssertionError(f"it polls: {decision}")
