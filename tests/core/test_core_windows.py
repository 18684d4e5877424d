"""Floors from schedules and manual prewarms, under any policy."""

from __future__ import annotations

import math

import pytest

from autoscaling.core.decide import decide
from autoscaling.core.policies import POLICIES
from autoscaling.core.types import Reason, Rung, State, Window
from tests.core.lab import T0, Cluster, later, lit, seen, spec

NINE = T0 + 1000
FIVE = T0 + 2000


def office(replicas: int = 2, rung: Rung = Rung.SERVING, source: str = "schedule") -> tuple[Window, ...]:
    return (Window(NINE, FIVE, replicas, rung, source),)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize(("source", "reason"), [("schedule", Reason.SCHEDULE), ("prewarm", Reason.MANUAL)])
def test_a_window_is_a_floor_under_every_policy(policy: str, source: str, reason: Reason) -> None:
    asked = spec(policy, windows=office(source=source))
    _, decision = decide(asked, State(), seen(NINE + 1, last_busy_s=T0 - 20000), None)
    assert (decision.replicas, decision.reason) == (2, reason)
    assert decision.until_s <= FIVE


def test_replicas_are_started_a_start_before_the_window() -> None:
    asked = spec(windows=office())
    observation = seen(T0)
    state, decision = decide(asked, State(), observation, None)
    assert (decision.replicas, decision.until_s) == (0, NINE - 5)
    state, decision = decide(asked, state, later(observation, NINE - 5), None)
    assert (decision.replicas, decision.reason, decision.until_s) == (2, Reason.SCHEDULE, FIVE)
    _, decision = decide(asked, state, later(observation, FIVE), None)
    assert decision.replicas == 0


def test_what_was_begun_for_a_window_is_not_given_up_when_starts_get_faster() -> None:
    asked = spec(windows=office())
    slow = seen(T0, rung=Rung.WEIGHTS)
    state, decision = decide(asked, State(), slow, None)
    assert decision.until_s == NINE - 50
    state, decision = decide(asked, state, later(slow, NINE - 50), None)
    assert decision.replicas == 2
    templated = seen(T0, rung=Rung.TEMPLATE, starting=2, target=2)
    _, decision = decide(asked, state, later(templated, NINE - 40), None)
    assert (decision.replicas, decision.reason) == (2, Reason.SCHEDULE)


def test_demand_goes_above_the_floor() -> None:
    asked = spec(windows=office())
    _, decision = decide(asked, State(), lit(NINE + 1, replicas=2, in_flight=45), None)
    assert (decision.replicas, decision.reason) == (5, Reason.PANIC)


def test_a_window_of_a_rung_keeps_it_warm_without_a_replica() -> None:
    asked = spec(windows=office(0, Rung.PARKED))
    observation = seen(T0)
    state, decision = decide(asked, State(), observation, None)
    # A start takes 5 s, from PARKED 1.5 s: what lies between is the way to PARKED.
    assert decision.until_s == NINE - 3.5
    state, decision = decide(asked, state, later(observation, NINE - 3.5), None)
    assert (decision.replicas, decision.rung, decision.reason) == (0, Rung.PARKED, Reason.SCHEDULE)
    parked = seen(T0, rung=Rung.PARKED)
    _, decision = decide(asked, state, later(parked, FIVE - 1), None)
    assert (decision.replicas, decision.rung) == (0, Rung.PARKED)
    assert decision.until_s == FIVE


def test_overlapping_windows_are_the_greater_of_them() -> None:
    windows = (Window(T0, T0 + 100, 1), Window(T0 + 50, T0 + 80, 3), Window(T0 + 60, T0 + 200, 2))
    cluster = Cluster(spec("scheduled", windows=windows))
    counts = [decision.replicas for decision in cluster.run(220)]
    assert counts[:45] == [1] * 45
    assert counts[45:80] == [3] * 35
    assert counts[80:200] == [2] * 120
    assert counts[200:] == [0] * 20


def test_the_ceiling_is_above_the_floor() -> None:
    asked = spec(windows=office(5), max_replicas=3)
    _, decision = decide(asked, State(), seen(NINE), None)
    assert (decision.replicas, decision.clamps) == (3, (Reason.MAX_REPLICAS,))
    assert decision.reason is Reason.SCHEDULE


def test_min_replicas_are_said() -> None:
    asked = spec(min_replicas=2)
    _, decision = decide(asked, State(), lit(replicas=2, last_busy_s=T0 - 5000), None)
    assert (decision.replicas, decision.reason, decision.clamps) == (
        2,
        Reason.MIN_REPLICAS,
        (Reason.MIN_REPLICAS,),
    )
    assert decision.until_s == math.inf


def test_a_window_that_ends_before_it_begins_is_none() -> None:
    asked = spec(windows=(Window(FIVE, NINE, 3),))
    _, decision = decide(asked, State(), seen(NINE + 1), None)
    assert decision.replicas == 0
