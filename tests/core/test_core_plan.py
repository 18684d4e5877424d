"""The plan as JSON, and what Serve's policy does with it and without it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from autoscaling.core.plan import HOLD_S, BrokenPlan, Entry, Plan, follow, from_json, make_plan, to_json
from autoscaling.core.types import Decision, Observation, Reason, Rung, State, Window
from tests.core.lab import T0, lit, seen, spec


def entry(replicas: int | None, reason: Reason = Reason.KEEP_ALIVE, **changes: object) -> Entry:
    return replace(Entry(replicas, Rung.TEMPLATE, reason, T0 + 100, spec()), **changes)  # type: ignore[arg-type]


def serve(observation: Observation) -> Observation:
    """As Serve sees it: no rungs, no history."""
    return replace(observation, rungs=(), last_busy_s=None, last_arrival_s=None, arrivals=None, rung=None)


# JSON


def test_a_plan_survives_json() -> None:
    asked = spec(windows=(Window(T0, T0 + 5, 2, Rung.PARKED, "prewarm", "x"),), params={"stable_s": 3.0})
    plan = Plan(
        T0,
        T0 + 10,
        {
            "m": Entry(2, Rung.PARKED, Reason.PREWARM, math.inf, asked, ceiling=3),
            "n": Entry(None, Rung.COLD, Reason.UNKNOWN_HOLD, T0, asked),
        },
    )
    text = to_json(plan)
    assert from_json(text) == plan
    assert "Infinity" not in text


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (lambda data: data.update(version=2), ["version", "2"]),
        (lambda data: data.pop("version"), ["version", "None"]),
        (lambda data: data.pop("expires_s"), ["expires_s", "missing"]),
        (lambda data: data.update(expires_s="inf"), ["expires_s", "finite"]),
        (lambda data: data.update(more=1), ["'more'"]),
        (lambda data: data["entries"]["m"].pop("replicas"), ["entries.m", "replicas"]),
        (lambda data: data["entries"]["m"].update(replicas=1.5), ["replicas", "1.5"]),
        (lambda data: data["entries"]["m"].update(replicas=True), ["replicas", "True"]),
        (lambda data: data["entries"]["m"].update(rung="hot"), ["rung", "'hot'", "parked"]),
        (lambda data: data["entries"]["m"].update(reason="because"), ["reason", "'because'"]),
        (lambda data: data["entries"]["m"]["spec"].update(wait_cost="much"), ["wait_cost", "'much'"]),
        (lambda data: data.update(entries=[]), ["entries", "[]"]),
    ],
)
def test_a_broken_plan_is_an_error_and_not_half_a_plan(breaks: object, words: list[str]) -> None:
    data = json.loads(to_json(Plan(T0, T0 + 10, {"m": entry(1)})))
    breaks(data)  # type: ignore[operator]
    broken = from_json(json.dumps(data))
    assert isinstance(broken, BrokenPlan)
    assert all(word in broken.message for word in words), broken.message


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", "[" * 100000, b"\xff"])
def test_what_is_no_json_is_broken(text: str | bytes) -> None:
    assert isinstance(from_json(text), BrokenPlan)


def test_a_plan_says_nothing_after_it_expired() -> None:
    plan = Plan(T0, T0 + 10, {"m": entry(1)})
    assert plan.entry("m", T0 + 9.9) is not None
    assert plan.entry("m", T0 + 10) is None
    assert plan.entry("other", T0) is None


def test_a_plan_is_made_of_decisions() -> None:
    cut = Decision("m", T0, 1, Rung.COLD, Reason.DEMAND, T0 + 5, "predictive", ceiling=1)
    free = replace(cut, model="n", ceiling=None, clamps=(Reason.MAX_REPLICAS,))
    plan = make_plan(T0, {"m": spec(), "n": spec()}, [cut, free, replace(cut, model="gone")])
    assert set(plan.entries) == {"m", "n"}
    assert (plan.entries["m"].ceiling, plan.entries["n"].ceiling) == (1, None)
    assert plan.expires_s == T0 + 10


# following


@pytest.mark.parametrize(
    ("planned", "observation", "expected"),
    [
        (0, seen(), (0, Reason.KEEP_ALIVE)),
        (2, seen(), (2, Reason.KEEP_ALIVE)),
        (2, lit(replicas=1, in_flight=5), (2, Reason.KEEP_ALIVE)),
        (1, lit(replicas=3, in_flight=5), (1, Reason.KEEP_ALIVE)),
        (1, lit(in_flight=21), (3, Reason.DEMAND)),
        (0, seen(queued=1), (1, Reason.WAKE)),
        (1, seen(queued=15), (2, Reason.WAKE)),
        (0, seen(queued=1000), (8, Reason.WAKE)),
    ],
)
def test_the_plan_is_the_floor_and_demand_goes_above_it(
    planned: int, observation: Observation, expected: tuple[int, Reason]
) -> None:
    _, decision = follow(spec(), State(), serve(observation), entry(planned), T0)
    assert (decision.replicas, decision.reason) == expected


@pytest.mark.parametrize(
    ("policy", "params", "expected"),
    [
        ("predictive", {}, 7),
        ("reactive", {}, 7),
        ("reactive", {"target": 35.0}, 2),
        ("keep-alive", {"target": 35.0}, 2),
        ("scheduled", {"target": 5.0}, 8),
        ("hybrid-histogram", {"target": 20.0}, 4),
        # They have delays and averages of their own, or none at all.
        ("fixed", {"replicas": 1.0}, 1),
        ("kpa", {}, 1),
        ("ray-default", {}, 1),
    ],
)
def test_demand_goes_above_the_plan_as_the_models_own_policy_has_it(
    policy: str, params: dict[str, float], expected: int
) -> None:
    asked = spec(policy, params=params)
    _, decision = follow(asked, State(), serve(lit(in_flight=70)), entry(1, spec=asked), T0)
    assert decision.replicas == expected
    _, woken = follow(asked, State(), serve(seen(queued=1)), entry(0, spec=asked), T0)
    assert (woken.replicas, woken.reason) == (1, Reason.WAKE)


def test_what_demand_raised_is_held_until_the_plan_can_know() -> None:
    state = State()
    state, up = follow(spec(), state, serve(lit(in_flight=30)), entry(1), T0)
    counts = []
    for tick in range(1, 80):
        now_s = T0 + tick / 10
        state, decision = follow(spec(), state, serve(lit(now_s, replicas=3, in_flight=2)), entry(1), now_s)
        counts.append(decision.replicas)
    held = round(HOLD_S * 10)
    assert up.replicas == 3
    assert counts[: held - 1] == [3] * (held - 1)
    assert counts[held + 1 :] == [1] * (len(counts) - held - 1)


def test_a_budget_is_a_ceiling_for_demand_too() -> None:
    _, decision = follow(spec(), State(), serve(lit(in_flight=70)), entry(2, ceiling=2), T0)
    assert (decision.replicas, decision.clamps) == (2, (Reason.GPU_BUDGET,))


def test_a_budget_that_took_the_minimum_away_is_kept() -> None:
    """The plan knows of `min_replicas`; what a spent day or a lack of GPUs left of it stands."""
    asked = spec(min_replicas=1)
    _, decision = follow(asked, State(), serve(lit()), entry(0, ceiling=1, spec=asked), T0)
    assert decision.replicas == 0
    _, decision = follow(asked, State(), serve(lit(in_flight=1)), entry(0, ceiling=1, spec=asked), T0)
    assert decision.replicas == 1


def test_a_budget_is_a_ceiling_where_the_plan_has_no_opinion() -> None:
    """A held model scales reactively, but not past what there is room for, nor below what there is."""
    _, dark = follow(spec(), State(), serve(seen(queued=60)), entry(None, ceiling=0), T0)
    assert (dark.replicas, dark.clamps) == (0, (Reason.GPU_BUDGET,))
    _, lit_ = follow(spec(), State(), serve(lit(replicas=2, in_flight=70)), entry(None, ceiling=0), T0)
    assert (lit_.replicas, lit_.clamps) == (2, (Reason.GPU_BUDGET,))
    _, free = follow(spec(), State(), serve(seen(queued=60)), entry(None, ceiling=3), T0)
    assert free.replicas == 3


def test_the_entrys_spec_counts_not_the_deployed_one() -> None:
    small = spec(max_replicas=2, target_ongoing_requests=1.0)
    _, decision = follow(spec(), State(), serve(lit(in_flight=5)), entry(1, spec=small), T0)
    assert (decision.replicas, decision.clamps) == (2, (Reason.MAX_REPLICAS,))


def test_unknown_load_never_goes_below_what_there_is() -> None:
    for unknown in ({"queued": None}, {"in_flight": math.nan}):
        down = replace(serve(lit(replicas=3, in_flight=20)), **unknown)  # type: ignore[arg-type]
        _, decision = follow(spec(), State(), down, entry(1), T0)
        assert (decision.replicas, decision.reason) == (3, Reason.UNKNOWN_HOLD)
        _, decision = follow(spec(), State(), down, None, T0)
        assert (decision.replicas, decision.reason) == (None, Reason.UNKNOWN_HOLD)


def test_without_a_plan_it_is_reactive() -> None:
    state, decision = follow(spec(), State(), serve(seen(queued=21)), None, T0)
    assert (decision.replicas, decision.reason, decision.policy) == (3, Reason.WAKE, "reactive")
    state, decision = follow(spec(), state, serve(lit(T0 + 1, replicas=3)), None, T0 + 1)
    assert decision.replicas == 3
    state, decision = follow(spec(), state, serve(lit(T0 + 40, replicas=3)), None, T0 + 40)
    assert (decision.replicas, decision.reason) == (1, Reason.KEEP_ALIVE)
    state, decision = follow(spec(), state, serve(lit(T0 + 62)), None, T0 + 62)
    assert decision.replicas == 0


def test_without_a_plan_parameters_of_another_policy_mean_nothing() -> None:
    """`scheduled` keeps nothing by its own `idle_s` of 0; reactively an idle replica stays for keep_alive_s."""
    asked = spec("scheduled", params={"idle_s": 0.0, "target": 1.0})
    state, decision = follow(asked, State(), serve(lit(in_flight=5)), None, T0)
    assert decision.replicas == 1
    _, decision = follow(asked, state, serve(lit(T0 + 40)), None, T0 + 40)
    assert decision.replicas == 1


def test_without_an_opinion_it_is_reactive() -> None:
    _, decision = follow(spec(), State(), serve(lit(in_flight=21)), entry(None), T0)
    assert (decision.replicas, decision.reason) == (3, Reason.DEMAND)


def test_a_lost_controller_changes_nothing_for_the_keep_alive_time() -> None:
    """The plan expires: what it kept lit stays for keep_alive_s, so that a restarted controller finds it."""
    state = State()
    asked = spec(keep_alive_s=30.0)
    planned = entry(2, spec=asked)
    for tick in range(100):
        now_s = T0 + tick / 10
        state, decision = follow(asked, state, serve(lit(now_s, replicas=2)), planned, now_s)
    assert decision.replicas == 2
    counts = []
    for tick in range(100, 500):
        now_s = T0 + tick / 10
        present = 2 if not counts else counts[-1]
        observation = serve(lit(now_s, replicas=present or 0))
        state, decision = follow(asked, state, observation, None, now_s)
        assert decision.replicas is not None
        counts.append(decision.replicas)
    # Idle for 30 s, of which the last moment of the plan is the beginning.
    assert counts.index(0) == pytest.approx(299, abs=2)
    assert counts == sorted(counts, reverse=True)


def test_a_lost_controller_wakes_nothing() -> None:
    state = State()
    for tick in range(50):
        now_s = T0 + tick
        planned = entry(0, Reason.DARK) if tick < 20 else None
        state, decision = follow(spec(), state, serve(seen(now_s)), planned, now_s)
        assert decision.replicas == 0


def test_a_serve_controller_that_restarts_holds_what_there_is() -> None:
    """No memory and no plan: replicas stay for their idle time and are not taken for superfluous at once."""
    _, decision = follow(spec(), State(), serve(lit(replicas=3, in_flight=4)), None, T0)
    assert (decision.replicas, decision.reason) == (3, Reason.SCALE_DOWN_DELAY)
    _, decision = follow(spec(), State(), serve(lit(replicas=1)), None, T0)
    assert (decision.replicas, decision.reason) == (1, Reason.KEEP_ALIVE)


def test_a_clock_that_goes_back_does_not_hold_a_raise_for_ever() -> None:
    state, _ = follow(spec(), State(), serve(lit(in_flight=30)), entry(1), T0)
    _, decision = follow(spec(), state, serve(lit(T0 - 5000, in_flight=2)), entry(1), T0 - 5000)
    assert decision.replicas == 1
