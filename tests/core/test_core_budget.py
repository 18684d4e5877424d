"""All models together within a budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaling.core.budget import Budget, clamp
from autoscaling.core.types import Decision, Observation, Reason, Rung, Spec, Window
from tests.core.lab import T0, lit, seen, spec

Fleet = tuple[dict[str, Spec], dict[str, Observation], dict[str, Decision]]


def decided(replicas: int | None, reason: Reason = Reason.DEMAND) -> Decision:
    return Decision("m", T0, replicas, Rung.TEMPLATE, reason, T0 + 10, "predictive")


def fleet(*models: tuple[str, Spec, Observation, int | None]) -> Fleet:
    return (
        {name: replace(asked, model=name) for name, asked, _, _ in models},
        {name: observation for name, _, observation, _ in models},
        {name: replace(decided(replicas), model=name) for name, _, _, replicas in models},
    )


def counts(decisions: dict[str, Decision]) -> dict[str, int | None]:
    return {name: decision.replicas for name, decision in decisions.items()}


def test_within_the_budget_nothing_changes() -> None:
    specs, observations, decisions = fleet(("a", spec(), lit(in_flight=15), 2), ("b", spec(), seen(), 2))
    assert clamp(Budget(), specs, observations, decisions) == decisions
    assert clamp(Budget(gpus=4), specs, observations, decisions) == decisions


def test_what_requests_need_comes_before_what_is_prewarmed() -> None:
    specs, observations, decisions = fleet(
        ("a", spec(priority=9), seen(), 2), ("b", spec(), lit(in_flight=15), 2)
    )
    result = clamp(Budget(gpus=2), specs, observations, decisions)
    assert counts(result) == {"a": 0, "b": 2}
    assert result["a"].clamps == (Reason.GPU_BUDGET,)
    assert result["a"].numbers["wanted_replicas"] == 2
    assert result["b"].clamps == ()


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (spec(), Reason.MANUAL),
        (spec(min_replicas=1), Reason.MIN_REPLICAS),
        (spec(windows=(Window(T0 - 5, T0 + 60, 1),)), Reason.KEEP_ALIVE),
    ],
)
def test_what_people_asked_for_comes_before_what_is_kept_for_who_may_come(
    asked: Spec, reason: Reason
) -> None:
    """Whoever was lit first, and whatever the priority."""
    specs, observations, decisions = fleet(("a", spec(priority=1), lit(), 1), ("b", asked, seen(), 1))
    decisions["a"] = replace(decisions["a"], reason=Reason.KEEP_ALIVE)
    decisions["b"] = replace(decisions["b"], reason=reason)
    assert counts(clamp(Budget(gpus=1), specs, observations, decisions)) == {"a": 0, "b": 1}
    observations["a"] = lit(in_flight=1)
    assert counts(clamp(Budget(gpus=1), specs, observations, decisions)) == {"a": 1, "b": 0}


def test_higher_priority_comes_first() -> None:
    specs, observations, decisions = fleet(
        ("a", spec(priority=0), lit(in_flight=30), 3), ("b", spec(priority=1), lit(in_flight=30), 3)
    )
    assert counts(clamp(Budget(gpus=4), specs, observations, decisions)) == {"a": 1, "b": 3}


def test_equals_share_and_what_is_there_stays() -> None:
    specs, observations, decisions = fleet(
        ("a", spec(), seen(queued=30), 3), ("b", spec(), seen(queued=30), 3)
    )
    assert counts(clamp(Budget(gpus=4), specs, observations, decisions)) == {"a": 2, "b": 2}
    specs, observations, decisions = fleet(
        ("a", spec(), seen(queued=30), 3), ("b", spec(), lit(replicas=3, in_flight=30), 3)
    )
    assert counts(clamp(Budget(gpus=4), specs, observations, decisions)) == {"a": 1, "b": 3}


def test_a_second_replica_makes_room_for_what_another_models_requests_wait_for() -> None:
    """However long the first stays busy; a second that nobody needs goes for no prewarm of the same priority."""
    specs, observations, decisions = fleet(
        ("busy", spec(), lit(replicas=2, in_flight=15), 2), ("small", spec(), seen(queued=1), 1)
    )
    assert counts(clamp(Budget(gpus=2), specs, observations, decisions)) == {"busy": 1, "small": 1}
    specs, observations, decisions = fleet(
        ("busy", spec(priority=1), lit(replicas=2, in_flight=15), 2), ("small", spec(), seen(queued=1), 1)
    )
    assert counts(clamp(Budget(gpus=2), specs, observations, decisions)) == {"busy": 2, "small": 0}
    specs, observations, decisions = fleet(("busy", spec(), lit(replicas=2), 2), ("small", spec(), seen(), 1))
    assert counts(clamp(Budget(gpus=2), specs, observations, decisions)) == {"busy": 2, "small": 0}


def test_replicas_count_as_their_gpus() -> None:
    specs, observations, decisions = fleet(
        ("a", spec(gpus_per_replica=4), seen(queued=30), 3),
        ("b", spec(gpus_per_replica=0), seen(queued=30), 3),
    )
    assert counts(clamp(Budget(gpus=8), specs, observations, decisions)) == {"a": 2, "b": 3}
    assert counts(clamp(Budget(gpus=0), specs, observations, decisions)) == {"a": 0, "b": 3}


def test_requests_alone_raise_no_further_than_what_is_left() -> None:
    """Until the next decision, each model for itself; and one that holds no GPU without a bound."""
    specs, observations, decisions = fleet(
        ("a", spec(), lit(in_flight=5), 1),
        ("b", spec(gpus_per_replica=2), seen(), 0),
        ("c", spec(gpus_per_replica=0), seen(), 0),
        ("d", spec(), lit(), None),
    )
    result = clamp(Budget(gpus=5), specs, observations, decisions)
    assert result == decisions
    assert {name: decision.ceiling for name, decision in result.items()} == {
        "a": 4,
        "b": 1,
        "c": None,
        "d": 4,
    }
    full = clamp(Budget(gpus=2), specs, observations, decisions)
    assert {name: decision.ceiling for name, decision in full.items()} == {
        "a": 1,
        "b": 0,
        "c": None,
        "d": 1,
    }
    assert all(each.ceiling is None for each in clamp(Budget(), specs, observations, decisions).values())


def test_what_is_held_keeps_what_it_has() -> None:
    specs, observations, decisions = fleet(
        ("a", spec(), lit(replicas=3), None), ("b", spec(priority=5), lit(in_flight=30), 3)
    )
    assert counts(clamp(Budget(gpus=4), specs, observations, decisions)) == {"a": None, "b": 1}


def test_what_holds_no_gpu_stays_where_others_hold_more_than_all_of_them() -> None:
    """As after the budget was lowered: what is held counts as what Serve was told to have."""
    specs, observations, decisions = fleet(
        ("held", spec(), replace(lit(replicas=1), target=3), None),
        ("free", spec(gpus_per_replica=0), lit(in_flight=5), 1),
        ("lit", spec(), lit(in_flight=5), 1),
    )
    result = clamp(Budget(gpus=2), specs, observations, decisions)
    assert counts(result) == {"held": None, "free": 1, "lit": 0}
    assert result["lit"].ceiling == 0
    assert counts(clamp(Budget(gpus=4), specs, observations, decisions))["lit"] == 1


def test_a_second_replica_that_is_there_comes_before_one_that_would_be_started() -> None:
    specs, observations, decisions = fleet(("a", spec(), lit(), 2), ("b", spec(), lit(replicas=2), 2))
    assert counts(clamp(Budget(gpus=3), specs, observations, decisions)) == {"a": 1, "b": 2}


def test_of_two_budgets_the_tighter_bounds_what_requests_may_raise() -> None:
    specs, observations, decisions = fleet(("m", spec(), lit(replicas=2, in_flight=40), 4))
    for gpus, ceiling in ((1, 1), (8, 2)):
        budget = Budget(gpus=gpus, gpu_s_per_day=1000)
        assert clamp(budget, specs, observations, decisions, 1000.0)["m"].ceiling == ceiling


def test_a_spent_day_ends_what_nobody_uses() -> None:
    specs, observations, decisions = fleet(
        ("idle", spec(), lit(), 1),
        ("prewarm", spec(), seen(), 1),
        ("busy", spec(), lit(replicas=2, in_flight=40), 4),
        ("waking", spec(), seen(queued=40), 4),
        ("held", spec(), lit(), None),
    )
    budget = Budget(gpu_s_per_day=1000)
    assert clamp(budget, specs, observations, decisions, 999.0) == decisions
    result = clamp(budget, specs, observations, decisions, 1000.0)
    assert counts(result) == {"idle": 0, "prewarm": 0, "busy": 2, "waking": 1, "held": None}
    assert result["busy"].clamps == (Reason.SPEND_LIMIT,)
    assert {name: decision.ceiling for name, decision in result.items()} == {
        "idle": 1,
        "prewarm": 1,
        "busy": 2,
        "waking": 1,
        "held": 1,
    }


def test_what_requests_raised_after_the_day_was_spent_is_taken_back() -> None:
    """Serve's policy may raise once more before it is told of the ceiling; and less than that is kept from then on."""
    budget = Budget(gpu_s_per_day=1000)
    specs, observations, decisions = fleet(("m", spec(), lit(replicas=2, in_flight=40), 4))
    first = clamp(budget, specs, observations, decisions, 1000.0)
    raised = {"m": lit(replicas=4, in_flight=40)}
    assert counts(clamp(budget, specs, raised, decisions, 1001.0, before=first)) == {"m": 2}
    fewer = clamp(budget, specs, {"m": lit(in_flight=5)}, {"m": decided(1)}, 1002.0, before=first)
    assert counts(clamp(budget, specs, raised, decisions, 1003.0, before=fewer)) == {"m": 1}


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from([0.0, 0.5, 1.0, 4.0]),
            st.integers(0, 4),
            st.integers(0, 60),
            st.integers(0, 5),
        ),
        max_size=8,
    ),
    st.floats(0, 20),
)
def test_it_is_never_exceeded_nor_more_given_nor_the_order_of_models_of_any_matter(
    models: list[tuple[int, float, int, int, int]], gpus: float
) -> None:
    rows = [
        (
            f"m{i}",
            spec(priority=priority, gpus_per_replica=each),
            lit(replicas=present, in_flight=load) if present else seen(queued=load),
            wanted,
        )
        for i, (priority, each, present, load, wanted) in enumerate(models)
    ]
    specs, observations, decisions = fleet(*rows)
    result = clamp(Budget(gpus=gpus), specs, observations, decisions)
    used = sum(specs[name].gpus_per_replica * (decision.replicas or 0) for name, decision in result.items())
    assert used <= gpus + 1e-6 or result == decisions
    assert used <= gpus + 1e-6 or not decisions
    for name, decision in result.items():
        assert (decision.replicas or 0) <= (decisions[name].replicas or 0)
        assert (decision.replicas == decisions[name].replicas) == (decision.clamps == ())
    assert clamp(Budget(gpus=gpus), *fleet(*rows[::-1])) == result
    # Applied to its own result, it has nothing to do.
    assert counts(clamp(Budget(gpus=gpus), specs, observations, result)) == counts(result)


def test_what_serve_raised_above_the_ceiling_is_not_the_models_to_keep() -> None:
    """For a request at its handle Serve starts one replica before it is told: it must not cost who serves its own."""
    specs, before, decisions = fleet(("a", spec(), seen(queued=0), 0), ("b", spec(), lit(in_flight=4), 1))
    first = clamp(Budget(gpus=1), specs, before, decisions)
    assert {name: decision.ceiling for name, decision in first.items()} == {"a": 0, "b": 1}
    _, after, decisions = fleet(
        ("a", spec(), seen(starting=1, target=1, queued=1), 1), ("b", spec(), lit(in_flight=4), 1)
    )
    assert counts(clamp(Budget(gpus=1), specs, after, decisions, before=first)) == {"a": 0, "b": 1}
    assert counts(clamp(Budget(gpus=1), specs, after, decisions)) == {"a": 1, "b": 0}


class Shared:
    """Models with one GPU each, under one budget, second by second: told at one, done at the next."""

    def __init__(self, gpus: float, starts_s: float = 10.0, drains_s: float = 0.0, **models: Spec) -> None:
        self.budget, self.starts_s, self.drains_s = Budget(gpus=gpus), starts_s, drains_s
        self.measured = 1
        self.specs = {name: replace(asked, model=name) for name, asked in models.items()}
        self.loads = dict.fromkeys(models, 1)
        self.targets = dict.fromkeys(models, 0)
        self.due_s: dict[str, float] = {}
        self.made: dict[str, Decision] = {}
        self.now_s = T0
        self.busy_s = dict.fromkeys(models, T0)
        self.ready: list[tuple[float, str]] = []
        """(when, who), each time that one begins to serve."""
        self.left: list[tuple[float, str]] = []

    def seen(self, name: str) -> Observation:
        serves = self.targets[name] > 0 and self.now_s >= self.due_s[name]
        queued = 0 if serves else self.loads[name]
        if self.loads[name]:
            self.busy_s[name] = self.now_s
        rungs = tuple(
            replace(rung, delay_s=self.starts_s, delay_high_s=2 * self.starts_s, starts=self.measured)
            if rung.rung is Rung.TEMPLATE
            else rung
            for rung in seen().rungs
        )
        return seen(
            self.now_s,
            ready=int(serves),
            target=self.targets[name],
            queued=queued,
            in_flight=self.loads[name] - queued,
            last_busy_s=self.busy_s[name],
            rungs=rungs,
        )

    def run(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            observations = {name: self.seen(name) for name in self.specs}
            decisions = {
                name: replace(decided(min(1, load)), model=name, made_s=self.now_s, until_s=self.now_s + 600)
                for name, load in self.loads.items()
            }
            was = {name: observation.ready for name, observation in observations.items()}
            self.made = clamp(self.budget, self.specs, observations, decisions, before=self.made)
            assert sum(each.replicas or 0 for each in self.made.values()) <= self.budget.gpus  # type: ignore[operator]
            for name, decision in self.made.items():
                assert decision.until_s > self.now_s
                told = decision.replicas or 0
                if told > self.targets[name]:
                    self.due_s[name] = self.now_s + self.starts_s + self.drains_s
                elif told < self.targets[name]:
                    self.left.append((self.now_s - T0, name))
                self.targets[name] = told
            self.now_s += 1
            for name in self.specs:
                if self.seen(name).ready and not was[name]:
                    self.ready.append((self.now_s - T0, name))


def test_who_all_need_the_one_gpu_take_turns() -> None:
    """A minute each from when it serves, however long the one before takes to go; who waited longest comes next."""
    shared = Shared(1, drains_s=100.0, a=spec(), b=spec(), c=spec())
    shared.run(1200)
    # 110 to start; then a minute; and a second until what was decided is done.
    assert [name for _, name in shared.ready][:7] == ["a", "b", "c", "a", "b", "c", "a"]
    assert [name for _, name in shared.left][:6] == ["a", "b", "c", "a", "b", "c"]
    served_s = [gone - came for (came, _), (gone, _) in zip(shared.ready[1:], shared.left[1:], strict=False)]
    assert all(60 <= each <= 62 for each in served_s), served_s


@pytest.mark.parametrize(
    ("starts_s", "measured", "turn_s"), [(80.0, 3, 160.0), (200.0, 3, 180.0), (200.0, 0, 60.0)]
)
def test_a_turn_is_no_shorter_than_two_starts_nor_longer_than_who_waits_has_patience(
    starts_s: float, measured: int, turn_s: float
) -> None:
    """What is only assumed of starts does not count."""
    shared = Shared(1, starts_s=starts_s, a=spec(), b=spec())
    shared.measured = measured
    shared.run(1200)
    served_s = [gone - came for (came, _), (gone, _) in zip(shared.ready[1:], shared.left[1:], strict=False)]
    assert len(served_s) >= 2
    assert all(turn_s <= each <= turn_s + 2 for each in served_s), served_s


def test_nobody_yields_to_a_lower_priority_nor_to_who_is_not_asked() -> None:
    shared = Shared(1, a=spec(priority=1), b=spec(), c=spec(priority=1))
    shared.loads["c"] = 0
    shared.run(600)
    assert shared.left == []
    assert [name for _, name in shared.ready] == ["a"]
    shared.loads["c"] = 1
    shared.run(600)
    assert {name for _, name in shared.ready} == {"a", "c"}


def test_who_has_waited_keeps_its_place_while_it_comes_and_loses_it_with_its_requests() -> None:
    """Then the one that it was to follow goes on."""
    shared = Shared(1, starts_s=30.0, a=spec(), b=spec())
    shared.run(30 + 60 + 10)
    assert shared.targets == {"a": 0, "b": 1}
    shared.loads["b"] = 0
    shared.run(1)
    assert shared.targets == {"a": 1, "b": 0}


@pytest.mark.parametrize(("away_s", "turn_s"), [(5.0, 70.0), (20.0, 95.0)])
def test_who_gives_up_waiting_and_asks_again_at_once_keeps_its_place(away_s: float, turn_s: float) -> None:
    """The first serves from 10 s on, the other asks no more at 15."""
    shared = Shared(1, starts_s=10.0, a=spec(), b=spec())
    shared.run(15)
    shared.loads["b"] = 0
    shared.run(away_s)
    shared.loads["b"] = 1
    shared.run(100)
    assert shared.left == [(pytest.approx(turn_s, abs=1), "a")]


def test_who_never_comes_does_not_keep_the_others_waiting_for_ever() -> None:
    """Its node can't be had, say."""
    shared = Shared(1, starts_s=1e6, a=spec(), b=spec())
    shared.measured = 0
    shared.run(2000)
    assert shared.left == [(pytest.approx(900, abs=1), "a"), (pytest.approx(1800, abs=1), "b")]


def test_two_of_three_models_that_need_two_gpus_serve_at_any_time() -> None:
    shared = Shared(2, a=spec(), b=spec(), c=spec())
    shared.run(2000)
    served = {name: sum(each == name for _, each in shared.ready) for name in "abc"}
    assert max(served.values()) - min(served.values()) <= 1
    assert min(served.values()) > 5
