"""Each policy in the cases that its algorithm is known by, with the reasons."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from autoscaling.core.decide import decide
from autoscaling.core.policies import POLICIES, wrong_choice
from autoscaling.core.types import (
    Capacity,
    Forecast,
    Observation,
    Reason,
    Rung,
    RungProfile,
    Spec,
    State,
    Window,
)
from tests.core.lab import RUNGS, T0, Cluster, demand, later, lit, seen, spec, timer


def first(
    asked: Spec, observation: Observation, forecast: Forecast | None = None
) -> tuple[int | None, Reason]:
    _, decision = decide(asked, State(), observation, forecast)
    return decision.replicas, decision.reason


@pytest.mark.parametrize(
    ("policy", "params", "observation", "expected"),
    [
        ("predictive", {}, seen(queued=1), (1, Reason.WAKE)),
        ("predictive", {}, seen(queued=25), (3, Reason.WAKE)),
        ("predictive", {}, lit(in_flight=5), (1, Reason.DEMAND)),
        ("predictive", {}, lit(in_flight=10, queued=11), (3, Reason.PANIC)),
        ("predictive", {}, lit(replicas=3, in_flight=20), (3, Reason.DEMAND)),
        ("predictive", {}, lit(replicas=3, in_flight=5), (3, Reason.SCALE_DOWN_DELAY)),
        ("predictive", {}, lit(in_flight=20, capacity=Capacity(20.0)), (1, Reason.DEMAND)),
        ("predictive", {}, lit(in_flight=10, capacity=Capacity(2.0)), (5, Reason.PANIC)),
        ("predictive", {}, lit(), (1, Reason.KEEP_ALIVE)),
        ("predictive", {}, seen(), (0, Reason.DARK)),
        ("predictive", {}, seen(rung=Rung.PARKED), (0, Reason.PARK)),
        ("reactive", {}, seen(queued=1), (1, Reason.WAKE)),
        ("reactive", {}, lit(in_flight=21), (3, Reason.DEMAND)),
        ("reactive", {"target": 7}, lit(in_flight=21), (3, Reason.DEMAND)),
        ("reactive", {}, lit(replicas=3, in_flight=5), (3, Reason.SCALE_DOWN_DELAY)),
        ("reactive", {}, lit(), (1, Reason.KEEP_ALIVE)),
        ("reactive", {}, lit(last_busy_s=T0 - 61), (0, Reason.PARK)),
        ("keep-alive", {}, seen(queued=11), (2, Reason.WAKE)),
        ("keep-alive", {}, lit(last_busy_s=T0 - 59), (1, Reason.KEEP_ALIVE)),
        ("keep-alive", {"idle_s": 300}, lit(last_busy_s=T0 - 299), (1, Reason.KEEP_ALIVE)),
        ("keep-alive", {"idle_s": 300}, lit(last_busy_s=T0 - 300), (0, Reason.PARK)),
        ("hybrid-histogram", {}, lit(), (1, Reason.KEEP_ALIVE)),
        ("hybrid-histogram", {}, seen(queued=11), (2, Reason.WAKE)),
        ("kpa", {}, seen(queued=1), (1, Reason.WAKE)),
        ("kpa", {}, lit(in_flight=7), (1, Reason.DEMAND)),
        ("kpa", {}, lit(in_flight=8), (2, Reason.PANIC)),
        ("kpa", {"target_utilization": 1}, lit(in_flight=10), (1, Reason.DEMAND)),
        ("kpa", {}, lit(), (1, Reason.KEEP_ALIVE)),
        ("kpa", {"scale_to_zero_grace_s": 0}, lit(), (0, Reason.PARK)),
        ("ray-default", {}, seen(queued=35), (1, Reason.WAKE)),
        ("ray-default", {"upscale_delay_s": 0}, lit(in_flight=35), (4, Reason.DEMAND)),
        (
            "ray-default",
            {"upscale_delay_s": 0, "upscaling_factor": 0.5},
            lit(in_flight=35),
            (3, Reason.DEMAND),
        ),
        ("ray-default", {}, lit(in_flight=35), (1, Reason.DEMAND)),
        ("ray-default", {}, lit(), (1, Reason.KEEP_ALIVE)),
        ("ray-default", {"downscale_delay_s": 0}, lit(replicas=3), (1, Reason.KEEP_ALIVE)),
        ("ray-default", {"downscale_delay_s": 0}, lit(), (0, Reason.PARK)),
        ("scheduled", {}, lit(), (0, Reason.PARK)),
        ("scheduled", {}, seen(queued=1), (1, Reason.WAKE)),
        ("scheduled", {}, lit(in_flight=11), (2, Reason.DEMAND)),
        ("fixed", {}, seen(), (1, Reason.FIXED)),
        ("fixed", {"replicas": 3}, lit(in_flight=79), (3, Reason.FIXED)),
        ("fixed", {"replicas": 0}, lit(), (0, Reason.FIXED)),
    ],
)
def test_what_is_decided_at_first_sight(
    policy: str, params: dict[str, float], observation: Observation, expected: tuple[int, Reason]
) -> None:
    assert first(spec(policy, params=params), observation) == expected


def test_parking_is_for_those_that_park() -> None:
    idle = lit(last_busy_s=T0 - 61)
    _, parks = decide(spec("keep-alive"), State(), idle, None)
    _, does_not = decide(spec("keep-alive", park=False), State(), idle, None)
    assert (parks.rung, parks.reason) == (Rung.PARKED, Reason.PARK)
    assert (does_not.rung, does_not.reason) == (Rung.TEMPLATE, Reason.GO_DARK)
    _, ended = decide(spec("keep-alive", park=False), State(), seen(rung=Rung.PARKED), None)
    assert (ended.rung, ended.reason) == (Rung.TEMPLATE, Reason.GO_DARK)


def test_a_model_that_is_being_parked_is_not_asked_for_less_meanwhile() -> None:
    asked = spec("keep-alive")
    idle = lit(last_busy_s=T0 - 61)
    state, _ = decide(asked, State(), idle, None)
    parking = seen(T0 + 1, last_busy_s=T0 - 61, rung=Rung.TEMPLATE)
    state, decision = decide(asked, state, parking, None)
    assert (decision.replicas, decision.rung) == (0, Rung.PARKED)
    # If it never arrives there, it was put out for want of memory, and is not built again.
    _, decision = decide(asked, state, later(parking, decision.until_s), None)
    assert (decision.replicas, decision.rung, decision.reason) == (0, Rung.TEMPLATE, Reason.DARK)


@pytest.mark.parametrize("policy", ["keep-alive", "reactive", "kpa", "ray-default"])
def test_where_nodes_come_and_go_none_is_held_for_a_dark_model(policy: str) -> None:
    """Warmth holds a node there, with its GPU; a policy that weighs no costs asks for none."""
    rungs = (RungProfile(Rung.COLD, 240.0, 300.0, 0.0), RungProfile(Rung.NODE, 60.0, 90.0, 1.0), *RUNGS)
    for rung in (Rung.COLD, Rung.NODE, Rung.TEMPLATE, Rung.PARKED):
        _, decision = decide(spec(policy), State(), seen(last_busy_s=T0 - 9999, rung=rung, rungs=rungs), None)
        assert (decision.replicas, decision.rung) == (0, Rung.COLD)


# predictive


def test_predictive_goes_down_only_after_the_stable_window_and_with_room() -> None:
    cluster = Cluster(spec(), ready=3, target=3)
    calm = cluster.run(120, 15)
    counts = [decision.replicas for decision in calm]
    # 15 requests need two replicas, and two are filled to 0.75 of their capacity.
    assert counts[:60] == [3] * 60
    assert counts[61:] == [2] * 59
    assert calm[0].reason is Reason.SCALE_DOWN_DELAY
    assert calm[-1].reason is Reason.DEMAND
    crowded = Cluster(spec(), ready=3, target=3).run(120, 17)
    # Two would be filled to 0.85: too little room.
    assert [decision.replicas for decision in crowded] == [3] * 120


def test_predictive_calls_a_jump_a_panic_for_some_seconds() -> None:
    cluster = Cluster(spec(), ready=1, target=1)
    cluster.run(5, 5)
    reasons = [decision.reason for decision in cluster.run(10, 35)]
    assert reasons == [Reason.PANIC] * 6 + [Reason.SCALE_DOWN_DELAY] * 4 or reasons == (
        [Reason.PANIC] * 6 + [Reason.DEMAND] * 4
    )
    assert cluster.target == 4


def test_predictive_prepares_for_the_demand_of_a_start_ahead() -> None:
    """In a minute 30 requests at once, 45 at the 0.9 quantile: from TEMPLATE a start takes 5 s."""
    foreseen = Forecast(T0, "dense", demand=demand(5, 30, 5, 5, 5))
    observation = lit(in_flight=5)
    asked = spec(params={"demand_quantile": 0.9})
    state, decision = decide(asked, State(), observation, foreseen)
    assert (decision.replicas, decision.reason) == (1, Reason.DEMAND)
    for _ in range(10):
        now_s = decision.until_s
        state, decision = decide(asked, state, later(observation, now_s), foreseen)
        if decision.replicas != 1:
            break
    assert now_s == pytest.approx(T0 + 55, abs=0.01)
    assert (decision.replicas, decision.reason) == (5, Reason.FORECAST_DEMAND)
    _, median = decide(spec(params={"demand_quantile": 0.5}), State(), lit(T0 + 56, in_flight=5), foreseen)
    assert median.replicas == 3


def test_predictive_goes_down_only_if_it_could_be_back_before_a_forecast_peak() -> None:
    """The peak is at T0 + 120, and a start takes 5 s."""
    observation = lit(replicas=3, in_flight=5)
    soon = Forecast(T0, "dense", demand=demand(5, 5, 20, 5, 5, 5, 5, step_s=60))
    state, _ = decide(spec(), State(), observation, None)
    _, alone = decide(spec(), state, later(observation, T0 + 116), None)
    _, early = decide(spec(), state, later(observation, T0 + 114), soon)
    _, late = decide(spec(), state, later(observation, T0 + 116), soon)
    assert alone.replicas == 1
    assert early.replicas == 1
    assert late.replicas is not None and late.replicas >= 3


def test_predictive_prepares_for_the_quantile_that_waiting_is_worth() -> None:
    """A replica holds 10: at a wait_cost of 0.2 too many half of the time is right, at 1 a tenth of it."""
    foreseen = Forecast(T0, "dense", demand=demand(28, 28, 28))
    observation = lit(replicas=1, in_flight=9)
    found = [
        decide(spec(wait_cost=cost), State(), observation, foreseen)[1].replicas
        for cost in (0.0, 0.2, 1.0, 10.0)
    ]
    assert found[:3] == [3, 3, 5]  # 28 at the median, 42 at 0.9
    assert found[3] is not None and found[3] > 5


def test_predictive_starts_nothing_for_requests_that_will_be_through_before() -> None:
    """12 in a replica for 10; 5 are expected, each for a second, and a start takes 5 s."""
    crowded = lit(in_flight=10, queued=2)
    calm = Forecast(T0, "dense", demand=demand(5, 5, 5, spread=0.1))
    busy = Forecast(T0, "dense", demand=demand(9.9, 9.9, 9.9, spread=0.0))
    assert first(spec(), crowded) == (2, Reason.PANIC)
    _, soon_gone = decide(spec(), State(), crowded, calm)
    _, stays = decide(spec(), State(), crowded, busy)
    assert (soon_gone.replicas, stays.replicas) == (1, 2)
    # So many more can't be chance, whatever is forecast.
    _, jumped = decide(spec(), State(), lit(in_flight=10, queued=30), calm)
    assert jumped.replicas == 4


def test_predictive_takes_the_forecast_for_too_low_where_more_is_in_progress() -> None:
    """20 are forecast, and 30 in half a minute; 40 are in progress, of which sqrt(40) may be chance."""
    foreseen = Forecast(T0, "dense", demand=demand(20, 30, step_s=30.0, spread=0.0))
    asked = spec(wait_cost=0.0)
    later_s = T0 + 26
    _, as_told = decide(asked, State(), lit(later_s, replicas=5, in_flight=20), foreseen)
    _, more = decide(asked, State(), lit(later_s, replicas=5, in_flight=40), foreseen)
    assert (as_told.numbers["forecast_replicas"], more.numbers["forecast_replicas"]) == (3, 5)


@pytest.mark.parametrize("working", [1, 2, 3])
def test_predictive_keeps_no_second_replica_for_one_request_at_a_time(working: int) -> None:
    cluster = Cluster(spec(target_ongoing_requests=1.0), ready=working + 1, target=working + 1)
    assert cluster.run(120, working)[-1].replicas == working


def test_predictive_forgets_replicas_that_a_gone_window_kept() -> None:
    asked = spec(windows=(Window(T0, T0 + 100, 4),))
    cluster = Cluster(asked)
    inside = cluster.run(90, 5)
    assert {decision.replicas for decision in inside} == {4}
    assert inside[-1].reason is Reason.SCHEDULE
    assert cluster.run(30, 5)[-1].replicas == 1


# reactive and keep-alive


def test_reactive_goes_down_after_its_delay_and_out_after_its_idle_time() -> None:
    cluster = Cluster(spec("reactive"), ready=1, target=1)
    cluster.run(10, 40)
    down = [decision.replicas for decision in cluster.run(40, 5)]
    assert down == [4] * 30 + [1] * 10
    idle = cluster.run(70, 0)
    assert [decision.replicas for decision in idle] == [1] * 59 + [0] * 11
    assert idle[0].reason is Reason.KEEP_ALIVE


def test_keep_alive_keeps_each_replica_for_its_idle_time() -> None:
    cluster = Cluster(spec("keep-alive", keep_alive_s=20.0), ready=1, target=1)
    cluster.run(10, 40)
    assert [decision.replicas for decision in cluster.run(25, 5)] == [4] * 20 + [1] * 5
    assert [decision.replicas for decision in cluster.run(25, 0)] == [1] * 19 + [0] * 6


# hybrid-histogram


def _with_gaps(*gaps_s: float, request_s: float = 2.0) -> Cluster:
    """A model whose requests take `request_s` and come after those idle times."""
    cluster = Cluster(spec("hybrid-histogram", park=False), start_s=1.0)
    for gap_s in (*gaps_s, None):
        cluster.step(1, 1)
        cluster.now_s += request_s
        cluster.step(0, 0)
        if gap_s is None:
            break
        cluster.now_s += gap_s - request_s + 2.0
    return cluster


def test_hybrid_histogram_learns_when_to_be_dark_and_when_to_be_there() -> None:
    cluster = _with_gaps(*[601.0] * 10)
    ended_s = cluster.last_busy_s
    assert ended_s is not None
    decision = cluster.decision
    assert decision is not None
    # Ten minutes lie in the cell [600, 660): dark from the start to 600 * 0.9 less a start, lit until 660 * 1.1.
    assert (decision.replicas, decision.reason) == (0, Reason.GO_DARK)
    assert decision.numbers["histogram_used"] == 1.0
    cluster.now_s = decision.until_s
    assert decision.until_s == pytest.approx(ended_s + 540 - 5)
    decision = cluster.step(0)
    assert (decision.replicas, decision.reason) == (1, Reason.PREWARM)
    cluster.now_s = ended_s + 541
    decision = cluster.step(0)
    assert (decision.replicas, decision.reason) == (1, Reason.KEEP_ALIVE)
    assert decision.until_s == pytest.approx(ended_s + 726)
    cluster.now_s = decision.until_s
    decision = cluster.step(0)
    assert (decision.replicas, decision.reason, decision.until_s) == (0, Reason.GO_DARK, math.inf)


def test_hybrid_histogram_keeps_for_its_whole_range_while_it_knows_too_little() -> None:
    for cluster in (_with_gaps(601.0), _with_gaps(*[60.0 * minute for minute in range(1, 200, 1)])):
        decision = cluster.decision
        assert decision is not None
        ended_s = cluster.last_busy_s
        assert ended_s is not None
        assert (decision.replicas, decision.reason) == (1, Reason.KEEP_ALIVE)
        assert decision.until_s == pytest.approx(ended_s + 4 * 3600)


def test_hybrid_histogram_asks_the_forecast_beyond_its_range() -> None:
    cluster = _with_gaps(*[5 * 3600.0] * 6)
    ended_s = cluster.last_busy_s
    assert ended_s is not None
    cluster.now_s += 1
    foreseen = timer(ended_s + 18000, cluster.now_s, width_s=0.1, horizon_s=40000)
    decision = cluster.step(0, 0, foreseen)
    assert decision.replicas == 0
    assert decision.numbers["forecast_used"] == 1.0
    assert decision.until_s == pytest.approx(ended_s + 18000 * 0.85 - 5, abs=1)
    assert cluster.state.histogram[240] == 6


def test_hybrid_histogram_starts_at_once_below_a_minute() -> None:
    """The head's cell begins at 0: no prewarm window, kept from the last request on."""
    cluster = _with_gaps(*[30.0] * 8)
    decision = cluster.decision
    assert decision is not None
    assert (decision.replicas, decision.reason) == (1, Reason.KEEP_ALIVE)
    assert decision.until_s == pytest.approx((cluster.last_busy_s or 0) + 66)


# kpa


def test_kpa_panics_and_does_not_go_down_meanwhile() -> None:
    cluster = Cluster(spec("kpa", max_replicas=20), ready=1, target=1, start_s=2.0)
    cluster.run(60, 5)
    jump = cluster.run(30, 70)
    # 70 requests over 0.7 * 10: ten replicas, as soon as the six seconds' mean needs twice what is ready.
    assert jump[-1].replicas == 10
    assert jump[8].reason is Reason.PANIC
    first_panic = next(i for i, decision in enumerate(jump) if decision.reason is Reason.PANIC)
    assert first_panic <= 2
    calm = cluster.run(100, 5)
    counts = [decision.replicas for decision in calm]
    in_panic = [decision.reason is Reason.PANIC for decision in calm]
    assert all(in_panic[:30]) and not any(in_panic[40:])
    assert counts[: in_panic.index(False)] == [10] * in_panic.index(False)
    assert counts[-1] == 1


def test_kpa_goes_down_by_half_at_most() -> None:
    state = State("kpa", {"now_s": T0 - 1, "proposed": 8.0}, ((T0 - 500, 5.0),))
    _, decision = decide(spec("kpa"), state, lit(replicas=8, in_flight=5), None)
    assert decision.replicas == 4


def test_kpa_ends_the_last_one_a_grace_after_the_stable_window() -> None:
    cluster = Cluster(spec("kpa"), ready=1, target=1)
    cluster.run(60, 5)
    counts = [decision.replicas for decision in cluster.run(100, 0)]
    gone = counts.index(0)
    assert 60 + 30 - 1 <= gone <= 60 + 30 + 1


# ray-default


def test_ray_default_waits_for_its_delays_and_goes_to_zero_in_two_steps() -> None:
    params = {
        "upscale_delay_s": 10,
        "downscale_delay_s": 20,
        "downscale_to_zero_delay_s": 5,
        "look_back_period_s": 1,
    }
    cluster = Cluster(spec("ray-default", params=params), ready=1, target=1, start_s=1.0)
    up = [decision.replicas for decision in cluster.run(20, 35)]
    assert up[:9] == [1] * 9 and up[12] == 4
    down = [decision.replicas for decision in cluster.run(40, 0)]
    assert 19 <= down.index(1) <= 22
    assert 4 <= down.index(0) - down.index(1) <= 6


def test_ray_default_forgets_a_delay_that_demand_interrupts() -> None:
    params = {"upscale_delay_s": 10, "look_back_period_s": 0.5}
    cluster = Cluster(spec("ray-default", params=params), ready=1, target=1)
    for _ in range(5):
        counts = {decision.replicas for decision in (*cluster.run(8, 35), *cluster.run(2, 5))}
        assert counts == {1}


# all


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_load_that_swings_is_no_reason_to_start_and_end_replicas(policy: str) -> None:
    """Between one replica's load and two's, from second to second."""
    params = {"replicas": 2.0} if policy == "fixed" else {"idle_s": 60.0} if policy == "scheduled" else {}
    cluster = Cluster(spec(policy, params=params), ready=2, target=2)
    counts = [decision.replicas for decision in cluster.run(120, lambda at: 7 if at % 2 else 13)]
    assert set(counts) <= {2, 3}
    assert counts == sorted(counts) or policy == "kpa"


@pytest.mark.parametrize("policy", ["predictive", "reactive", "keep-alive", "scheduled", "hybrid-histogram"])
def test_one_replica_serves_however_many_it_is_to_carry(policy: str) -> None:
    """Who wants a single one, whatever comes, sets a target beyond reach."""
    asked = spec(policy, target_ongoing_requests=1e6)
    _, decision = decide(asked, State(), lit(in_flight=1), None)
    assert decision.replicas == 1


def test_every_policy_says_where_it_is_from_and_what_it_takes() -> None:
    assert next(iter(POLICIES)) == "predictive"
    for name, policy in POLICIES.items():
        assert policy.name == name
        assert len(policy.source) > 20
        assert (
            wrong_choice(
                name, {param.name: param.default for param in policy.params if param.default is not None}
            )
            is None
        )
        for param in policy.params:
            assert param.doc and param.unit
            assert param.low < param.high
            assert param.default is None or param.low <= param.default <= param.high


@pytest.mark.parametrize(
    ("policy", "params", "words"),
    [
        ("nope", {}, ["'nope'", "predictive", "fixed"]),
        ("predictive", {"stable": 3}, ["predictive", "params.stable", "stable_s"]),
        ("predictive", {"headroom": 2}, ["headroom", "2", "0.1", "1"]),
        ("kpa", {"panic_threshold": "two"}, ["panic_threshold", "'two'", "1.1"]),
        ("kpa", {"panic_threshold": math.nan}, ["panic_threshold", "nan"]),
        ("fixed", {"replicas": True}, ["replicas", "True"]),
    ],
)
def test_wrong_parameters_are_named(policy: str, params: dict[str, object], words: list[str]) -> None:
    wrong = wrong_choice(policy, params)
    assert wrong is not None
    assert all(word in str(wrong) for word in words), wrong


def test_parameters_out_of_bounds_count_as_their_bounds() -> None:
    _, decision = decide(spec("fixed", params={"replicas": -3}), State(), lit(), None)
    assert decision.replicas == 0
    _, decision = decide(spec("fixed", params={"replicas": math.nan}), State(), lit(), None)
    assert decision.replicas == 1


def test_another_policy_starts_without_memory() -> None:
    state, _ = decide(spec("reactive"), State(), lit(in_flight=40), None)
    state, _ = decide(spec("keep-alive"), state, lit(T0 + 1, in_flight=5), None)
    assert state.policy == "keep-alive"
    assert len(state.series) == 1


def test_a_policy_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'nope'.*predictive"):
        decide(spec("nope"), State(), lit(), None)


def test_prices_without_a_serving_rung_charge_the_spec() -> None:
    two_gpus = spec(gpus_per_replica=2.0, park=False)
    _, decision = decide(two_gpus, State(), lit(rungs=(RUNGS[1],)), None)
    # A cold start costs 10 * 4 s of waiting and 2 * 4 of loading; a second lit costs 2.
    assert decision.until_s == pytest.approx(T0 + 48 / 2)
    free = replace(RUNGS[3], cost_per_s=0.0)
    _, decision = decide(two_gpus, State(), lit(rungs=(RUNGS[1], free)), None)
    assert decision.until_s == pytest.approx(T0 + 48 / 2)
