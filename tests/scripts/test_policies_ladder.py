"""How the ladder is held against policies that know two states only."""

from __future__ import annotations

from typing import Any

import pytest
from bench import policies_bound_ladder, policies_ladder
from bench.policies_sparse import TWO_STATES, Job

from autoscaling.sim.compare import Variant
from autoscaling.sim.profile import Profile


def point(profile: Profile, policy: str, gpu_s: float, waited_s: float, **settings: float) -> Any:
    told = {"policy": policy, "settings": settings, "gpu_s": gpu_s, "waited_s": waited_s, "parked_gpu_s": 1.0}
    return Job("any", profile, Variant(policy, settings)), told


def test_the_ladder_may_spend_no_more_than_the_best_of_two_states() -> None:
    points = [
        point(TWO_STATES, "keep-alive", 100.0, 90.0, keep_alive_s=0.0),
        point(TWO_STATES, "keep-alive", 400.0, 10.0, keep_alive_s=60.0),
        point(TWO_STATES, "keep-alive", 401.0, 5.0, keep_alive_s=1e9),
        *(
            point(policies_ladder.LADDER, "predictive", gpu_s, waited_s, wait_cost=wait_cost, park=1.0)
            for wait_cost, gpu_s, waited_s in ((1, 50, 40), (3, 99, 30), (10, 101, 2), (30, 401, 1))
        ),
        point(policies_ladder.LADDER, "predictive", 500.0, 0.5, wait_cost=100.0, park=1.0),
        point(policies_ladder.LADDER, "predictive", 600.0, 0.4, wait_cost=300.0, park=1.0),
    ]
    rows = {row["wait_cost"]: row for row in policies_ladder.judged(points)["rows"]}
    assert rows[1.0]["ladder_wait_cost"] == 3, "101 GPU-seconds are more than 100"
    assert rows[1.0]["wait_ratio"] == pytest.approx(30 / 90)
    assert rows[1.0]["least_ratio"] == pytest.approx(5 / 90)
    assert rows[300.0]["best"].startswith("keep-alive (keep_alive_s=60")
    assert rows[300.0]["wait_ratio"] == pytest.approx(0.2)
    assert rows[300.0]["least_ratio"] == pytest.approx(0.5)
    assert "met" in policies_ladder.text({"any": {"rows": list(rows.values())}})


def test_no_run_of_the_ladder_that_spends_as_little_is_a_miss() -> None:
    points = [
        point(TWO_STATES, "keep-alive", 1.0, 9.0, keep_alive_s=0.0),
        *(
            point(policies_ladder.LADDER, "predictive", 2.0, 1.0, wait_cost=each, park=1.0)
            for each in policies_ladder.WAIT_COSTS
        ),
    ]
    found = policies_ladder.judged(points)
    assert {row["wait_ratio"] for row in found["rows"]} == {None}
    assert policies_ladder.text({"any": found}).count("missed") == len(policies_ladder.WAIT_COSTS)


def test_what_trees_could_do_lies_between_the_runs_that_spend_less_and_more() -> None:
    others = [point(TWO_STATES, "keep-alive", 100.0, 90.0, keep_alive_s=0.0)[1]]
    trees = [
        point(policies_ladder.LADDER, "predictive", gpu_s, waited_s, wait_cost=wait_cost, park=1.0)[1]
        for wait_cost, gpu_s, waited_s in ((1, 50, 40), (3, 100, 30), (10, 110, 27), (30, 401, 1))
    ]
    rows = policies_bound_ladder.judged(trees, others)
    assert [row["wait_cost"] for row in rows] == list(policies_ladder.WAIT_COSTS)
    assert rows[0]["at_most"] == pytest.approx(30 / 90)
    assert rows[0]["at_least"] == pytest.approx(27 / 90)
    (alone,) = {row["at_least"] for row in policies_bound_ladder.judged(trees[:2], others)}
    assert alone is None
    assert "0.300" in policies_bound_ladder.text({"any": {"learned before": rows}})
