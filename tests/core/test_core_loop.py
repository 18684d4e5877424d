"""One tick over ports: when it decides anew, and what it does when anything fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

import autoscaling.core.decide as deciding
import autoscaling.loop as looping
from autoscaling.core.accounts import Prewarm, Usage, day_of
from autoscaling.core.budget import Budget
from autoscaling.core.types import Decision, Forecast, Observation, Reason, Spec, State, Window
from autoscaling.loop import Loop
from tests.core.lab import T0, TWO, lit, poisson, seen, spec, timer


@dataclass
class World:
    """Every port at once: what it says is set from outside, what it is told is kept."""

    specs_now: dict[str, Spec] = field(default_factory=dict)
    seen_now: dict[str, Observation] = field(default_factory=dict)
    foreseen: dict[str, Forecast] = field(default_factory=dict)
    fails: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    applied: list[list[Decision]] = field(default_factory=list)
    recorded: list[tuple[list[Decision], dict[str, State]]] = field(default_factory=list)
    usage: list[Usage] = field(default_factory=list)
    prewarms: list[Prewarm] = field(default_factory=list)

    def _may_fail(self, port: str) -> None:
        if port in self.fails:
            raise OSError(f"{port} is away")

    def specs(self, now_s: float) -> Mapping[str, Spec]:
        self._may_fail("specs")
        return self.specs_now

    def observe(self, now_s: float) -> Mapping[str, Observation]:
        self._may_fail("metrics")
        return {model: replace(observation, now_s=now_s) for model, observation in self.seen_now.items()}

    def forecast(self, model: str, now_s: float) -> Forecast | None:
        self.asked.append(model)
        self._may_fail("forecast")
        return self.foreseen.get(model)

    def apply(self, now_s: float, specs: Mapping[str, Spec], decisions: Sequence[Decision]) -> None:
        self.applied.append(list(decisions))
        self._may_fail("actuator")

    def record(
        self,
        now_s: float,
        observations: Mapping[str, Observation],
        decisions: Sequence[Decision],
        states: Mapping[str, State],
    ) -> None:
        self._may_fail("sink")
        self.recorded.append((list(decisions), dict(states)))

    def account(self, now_s: float, usage: Sequence[Usage], prewarms: Sequence[Prewarm]) -> None:
        self._may_fail("accounts")
        self.usage += usage
        self.prewarms += prewarms

    def loop(
        self,
        budget: Budget | None = None,
        states: Mapping[str, State] | None = None,
        *,
        spent: tuple[str, float] = ("", 0.0),
        jump_s: float = looping.JUMP_S,
    ) -> Loop:
        return Loop(self, self, self, self, self, budget, states, accounts=self, spent=spent, jump_s=jump_s)


def world(**models: Observation) -> World:
    return World({name: spec("reactive", model=name) for name in models}, dict(models))


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which models were decided, in order."""
    models: list[str] = []
    real = deciding.decide

    def counting(
        asked: Spec, state: State, observation: Observation, forecast: Forecast | None
    ) -> tuple[State, Decision]:
        models.append(asked.model)
        return real(asked, state, observation, forecast)

    monkeypatch.setattr(looping, "decide", counting)
    return models


def test_it_decides_only_where_something_happened(decided: list[str]) -> None:
    there = world(a=lit(in_flight=5), b=seen(), c=lit(in_flight=5))
    loop = there.loop()
    assert {decision.model for decision in loop.tick(T0)} == {"a", "b", "c"}
    for i in range(1, 5):
        loop.tick(T0 + i)
    decided.clear()
    assert loop.tick(T0 + 5) == []
    assert decided == []
    there.seen_now["a"] = lit(in_flight=25)
    assert [(decision.model, decision.replicas) for decision in loop.tick(T0 + 6)] == [("a", 3)]
    assert decided == ["a"]


@pytest.mark.parametrize(
    "change",
    [
        {"queued": 1},
        {"ready": 2},
        {"starting": 1},
        {"target": 2},
        {"arrivals": 1},
        {"rung": 4},
        {"rungs": ()},
        {"in_flight": None},
    ],
)
def test_what_matters_of_an_observation(change: dict[str, object], decided: list[str]) -> None:
    there = world(a=lit(in_flight=5))
    loop = there.loop()
    loop.tick(T0)
    decided.clear()
    there.seen_now["a"] = replace(there.seen_now["a"], **change)  # type: ignore[arg-type]
    loop.tick(T0 + 1)
    assert decided == ["a"]


def test_when_a_loaded_model_was_last_busy_does_not_matter(decided: list[str]) -> None:
    there = world(a=lit(in_flight=5))
    loop = there.loop()
    loop.tick(T0)
    decided.clear()
    there.seen_now["a"] = lit(in_flight=5, last_busy_s=T0 + 1)
    loop.tick(T0 + 1)
    assert decided == []


def test_it_decides_again_when_a_decision_ends(decided: list[str]) -> None:
    there = world(a=lit(last_busy_s=T0))
    loop = there.loop()
    loop.tick(T0)
    ends_s = loop.next_s()
    assert ends_s == T0 + 30
    for _ in range(100):
        if loop.decisions["a"].replicas == 0:
            break
        ended_s = loop.next_s()
        decided.clear()
        loop.tick(ended_s - 0.5)
        assert decided == []
        loop.tick(ended_s)
        assert decided == ["a"]
    assert ended_s == T0 + 60


def test_it_decides_again_when_the_spec_changes(decided: list[str]) -> None:
    there = world(a=seen(), b=seen())
    loop = there.loop()
    loop.tick(T0)
    decided.clear()
    window = Window(T0, T0 + 100, 2)
    there.specs_now = {**there.specs_now, "a": replace(there.specs_now["a"], windows=(window,))}
    (decision,) = loop.tick(T0 + 1)
    assert decided == ["a"]
    assert (decision.replicas, decision.reason) == (2, Reason.SCHEDULE)


def test_a_forecast_counts_when_it_was_fitted_anew_and_not_when_it_was_only_asked_again(
    decided: list[str],
) -> None:
    there = world(a=seen())
    there.specs_now = {"a": spec(model="a")}
    there.foreseen["a"] = replace(poisson(1 / 1000), fitted_s=T0)
    loop = there.loop()
    loop.tick(T0)
    decided.clear()
    for i in range(1, 40):
        there.foreseen["a"] = replace(poisson(1 / 1000, T0 + i), fitted_s=T0)
        loop.tick(T0 + i)
    assert decided == []
    assert 2 <= len(there.asked) <= 8
    there.foreseen["a"] = replace(poisson(1 / 2, T0 + 40), fitted_s=T0 + 40)
    for i in range(40, 60):
        loop.tick(T0 + i)
    assert decided == ["a"]
    assert loop.decisions["a"].reason is Reason.PREWARM


def test_a_dark_model_is_looked_at_again_where_its_forecast_ends_and_that_is_no_news() -> None:
    """A job that comes once a week lies beyond it. Until it is seen coming, fits change nothing that is told."""
    there = world(a=seen(T0, rungs=TWO))
    there.specs_now = {"a": spec(model="a", park=False)}
    loop = there.loop(jump_s=math.inf)
    for hour in range(6):
        now_s = T0 + 3600.0 * hour
        there.foreseen["a"] = replace(poisson(1e-9, now_s), fitted_s=now_s)
        loop.tick(now_s)
    assert [len(decisions) for decisions, _ in there.recorded] == [1, 0, 0, 0, 0, 0]
    assert loop.next_s() == math.inf
    assert loop.looks_s() == now_s + 7200.0
    # The same fit, which sees it by now.
    there.foreseen["a"] = replace(timer(loop.looks_s() + 60.0, loop.looks_s()), fitted_s=now_s)
    loop.tick(loop.looks_s() - 1)
    assert loop.decisions["a"].reason is Reason.DARK
    ends_s = loop.looks_s()
    loop.tick(ends_s)
    assert loop.decisions["a"].until_s < ends_s + 60.0
    loop.tick(loop.next_s())
    assert loop.decisions["a"].reason is Reason.PREWARM


def test_the_same_again_is_not_recorded_as_news() -> None:
    there = world(a=lit(in_flight=5))
    loop = there.loop()
    loop.tick(T0)
    there.seen_now["a"] = lit(in_flight=6)
    loop.tick(T0 + 1)
    assert [len(decisions) for decisions, _ in there.recorded] == [1, 0]
    # All that stands is applied all the same: a plan is renewed at every tick.
    assert [len(decisions) for decisions in there.applied] == [1, 1]


def test_a_model_that_is_not_seen_is_held(decided: list[str]) -> None:
    there = world(a=lit(in_flight=25), b=seen())
    loop = there.loop()
    loop.tick(T0)
    there.seen_now.pop("a")
    (decision,) = loop.tick(T0 + 1)
    assert (decision.model, decision.replicas, decision.reason) == ("a", None, Reason.UNKNOWN_HOLD)
    decided.clear()
    assert loop.tick(T0 + 2) == []
    assert decided == []
    there.seen_now["a"] = lit(in_flight=25)
    (decision,) = loop.tick(T0 + 3)
    assert decision.replicas == 3


def test_what_was_seen_long_ago_is_unknown() -> None:
    there = world(a=lit(in_flight=25))
    loop = there.loop()
    loop.tick(T0)
    stuck = replace(there.seen_now["a"], now_s=T0)
    there.observe = lambda now_s: {"a": stuck}  # type: ignore[method-assign]
    loop.tick(T0 + 9)
    assert loop.decisions["a"].replicas == 3
    loop.tick(T0 + 11)
    assert loop.decisions["a"].reason is Reason.UNKNOWN_HOLD


def test_one_policy_that_raises_holds_its_model_only() -> None:
    there = world(a=lit(in_flight=25), b=lit(in_flight=25))
    there.specs_now["a"] = replace(there.specs_now["a"], policy="nope")
    loop = there.loop()
    loop.tick(T0)
    assert loop.decisions["a"].reason is Reason.UNKNOWN_HOLD
    assert loop.decisions["b"].replicas == 3
    assert "nope" in loop.errors["model a"]
    assert set(loop.errors) == {"model a"}
    there.specs_now = {**there.specs_now, "a": spec("reactive", model="a")}
    loop.tick(T0 + 1)
    assert loop.decisions["a"].replicas == 3
    assert loop.errors == {}


def test_a_model_whose_policy_raised_is_tried_at_every_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    there = world(a=lit(in_flight=25))
    loop = there.loop()
    real = looping.decide
    failing: Callable[..., tuple[State, Decision]] = lambda *_args: 1 / 0  # type: ignore[assignment,return-value] # noqa: E731
    monkeypatch.setattr(looping, "decide", failing)
    loop.tick(T0)
    assert "ZeroDivisionError" in loop.errors["model a"]
    monkeypatch.setattr(looping, "decide", real)
    loop.tick(T0 + 1)
    assert loop.decisions["a"].replicas == 3


@pytest.mark.parametrize("port", ["specs", "metrics", "actuator", "sink", "accounts", "forecast"])
def test_a_port_that_fails_stops_nothing_and_is_said(port: str) -> None:
    there = world(a=lit(in_flight=25))
    loop = there.loop()
    loop.tick(T0)
    there.fails = {port}
    there.seen_now["a"] = lit(replicas=3, in_flight=45)
    loop.tick(T0 + 1)
    named = "forecast a" if port == "forecast" else port
    assert "is away" in loop.errors[named]
    decision = loop.decisions["a"]
    if port == "metrics":
        assert decision.reason is Reason.UNKNOWN_HOLD
    else:
        assert decision.replicas == 5
    there.fails = set()
    there.seen_now["a"] = lit(replicas=3, in_flight=25)
    loop.tick(T0 + 2)
    assert loop.errors == {}
    assert loop.decisions["a"].replicas == (3 if port == "metrics" else 5)


def test_a_clock_that_jumps_ahead_holds_for_one_tick() -> None:
    there = world(a=lit(last_busy_s=T0), b=lit(in_flight=25))
    loop = there.loop()
    loop.tick(T0)
    loop.tick(T0 + 1)
    loop.tick(T0 + 3600)
    assert {decision.reason for decision in loop.decisions.values()} == {Reason.UNKNOWN_HOLD}
    assert all(decision.replicas is None for decision in loop.decisions.values())
    loop.tick(T0 + 3601)
    assert loop.decisions["b"].replicas == 3
    assert loop.decisions["a"].replicas == 0


@pytest.mark.parametrize(
    "policy", ["predictive", "reactive", "keep-alive", "kpa", "ray-default", "hybrid-histogram"]
)
def test_after_a_sleep_one_request_lights_one_replica(policy: str) -> None:
    """What was needed when the machine was suspended, or its clock was right, is not needed any more."""
    there = World(
        {"a": spec(policy, model="a", target_ongoing_requests=4)}, {"a": lit(replicas=6, in_flight=24)}
    )
    loop = there.loop()
    for i in range(90):
        loop.tick(T0 + i)
    assert (loop.decisions["a"].replicas or 0) >= 6
    there.seen_now["a"] = seen(queued=1)
    for i in range(40):
        loop.tick(T0 + 3 * 86400 + i)
        assert loop.decisions["a"].replicas in (None, 1) if i else True


def test_a_simulation_may_skip_time() -> None:
    there = world(a=lit(last_busy_s=T0))
    loop = there.loop(jump_s=math.inf)
    loop.tick(T0)
    loop.tick(T0 + 3600)
    assert loop.decisions["a"].replicas == 0


def test_a_clock_that_goes_back_holds_for_one_tick_and_goes_on() -> None:
    there = world(a=lit(last_busy_s=T0), b=lit(in_flight=25))
    loop = there.loop()
    loop.tick(T0)
    loop.tick(T0 - 500)
    assert all(decision.replicas is None for decision in loop.decisions.values())
    loop.tick(T0 - 499)
    assert (loop.decisions["a"].replicas, loop.decisions["b"].replicas) == (1, 3)
    for i in range(100):
        loop.tick(T0 - 498 + i)
    assert (loop.decisions["a"].replicas, loop.decisions["b"].replicas) == (0, 3)


@pytest.mark.parametrize("now_s", [math.nan, math.inf])
def test_a_time_that_is_none_changes_nothing(now_s: float) -> None:
    there = world(a=lit(in_flight=25))
    loop = there.loop()
    loop.tick(T0)
    assert loop.tick(now_s) == []
    assert "clock" in loop.errors
    assert loop.decisions["a"].replicas == 3
    loop.tick(T0 + 1)
    assert loop.errors == {}


def test_models_come_and_go() -> None:
    there = world(a=lit(in_flight=5), b=seen())
    loop = there.loop()
    loop.tick(T0)
    there.specs_now = {"b": there.specs_now["b"]}
    loop.tick(T0 + 1)
    assert set(loop.decisions) == {"b"}
    assert set(loop.states) == {"b"}


def test_a_restarted_loop_goes_on_from_its_states() -> None:
    there = world(a=lit(replicas=4, in_flight=40))
    first = there.loop()
    first.tick(T0)
    there.seen_now["a"] = lit(replicas=4, in_flight=5)
    first.tick(T0 + 1)
    _, states = there.recorded[-1]
    restarted = there.loop(states=states)
    restarted.tick(T0 + 10)
    assert restarted.decisions["a"].replicas == 4
    assert restarted.decisions["a"].until_s == first.decisions["a"].until_s


def test_the_budget_fits_all_and_is_said_in_what_is_applied() -> None:
    there = world(a=lit(in_flight=25), b=lit(in_flight=25))
    there.specs_now["a"] = replace(there.specs_now["a"], priority=1)
    loop = there.loop(Budget(gpus=4))
    fresh = loop.tick(T0)
    assert {decision.model: decision.replicas for decision in fresh} == {"a": 3, "b": 1}
    assert there.applied[-1] == list(loop.decisions.values())
    assert loop.decisions["b"].clamps == (Reason.GPU_BUDGET,)
    # The same clamp at the next tick is no news, and its end is.
    assert loop.tick(T0 + 1) == []
    there.seen_now["a"] = lit(in_flight=1)
    for i in range(2, 40):
        loop.tick(T0 + i)
    assert {model: decision.replicas for model, decision in loop.decisions.items()} == {"a": 1, "b": 3}


def test_what_is_used_is_booked_and_the_days_spend_is_a_bound() -> None:
    there = world(a=lit(last_busy_s=T0 + 100))
    loop = there.loop(Budget(gpu_s_per_day=5.0), spent=(day_of(T0), 2.5))
    loop.tick(T0)
    loop.tick(T0 + 2)
    assert loop.spent_gpu_s == pytest.approx(4.5)
    assert loop.decisions["a"].replicas == 1
    loop.tick(T0 + 3)
    loop.tick(T0 + 4)
    assert loop.decisions["a"].replicas == 0
    assert loop.decisions["a"].clamps == (Reason.SPEND_LIMIT,)
    assert math.fsum(row.gpu_s["serving"] for row in there.usage) == pytest.approx(4.0)


def test_the_spend_begins_anew_with_the_day() -> None:
    midnight = (math.floor(T0 / 86400) + 1) * 86400.0
    there = world(a=lit(midnight - 1, last_busy_s=midnight - 1))
    loop = there.loop(Budget(gpu_s_per_day=5.0), spent=(day_of(midnight - 1), 6.0))
    loop.tick(midnight - 1)
    assert loop.decisions["a"].replicas == 0
    loop.tick(midnight + 1)
    assert loop.decisions["a"].replicas == 1
    assert loop.spent_gpu_s == pytest.approx(1.0)


@pytest.mark.parametrize("away_s", [86400.0, -86400.0, 400 * 86400.0])
def test_a_clock_that_is_in_another_day_for_a_while_forgets_no_spend(away_s: float) -> None:
    noon = math.floor(T0 / 86400) * 86400 + 43200.0
    there = world(a=lit(in_flight=1))
    loop = there.loop(Budget(gpu_s_per_day=5.0), spent=(day_of(noon), 2.0))
    loop.tick(noon)
    loop.tick(noon + 2)
    for second in range(3):
        loop.tick(noon + away_s + second)
    assert loop.spent_gpu_s == pytest.approx(2.0)
    loop.tick(noon + 6)
    assert loop.spent_gpu_s == pytest.approx(4.0)
    loop.tick(noon + 8)
    loop.tick(noon + 9)
    assert loop.spent_gpu_s == pytest.approx(7.0)
    there.seen_now["a"] = lit(noon)
    loop.tick(noon + 10)
    assert (loop.decisions["a"].replicas, loop.decisions["a"].clamps) == (0, (Reason.SPEND_LIMIT,))


def test_a_clock_that_goes_back_over_midnight_goes_on_with_the_old_days_spend() -> None:
    midnight = (math.floor(T0 / 86400) + 1) * 86400.0
    there = world(a=lit(in_flight=1))
    loop = there.loop(Budget(gpu_s_per_day=50.0), spent=(day_of(midnight - 1), 6.0))
    for at_s in (midnight - 2, midnight + 0.25):
        loop.tick(at_s)
    assert loop.spent_gpu_s == pytest.approx(0.25)
    loop.tick(midnight - 0.25)
    assert loop.spent_gpu_s == pytest.approx(8.0)
    for day in range(1, 9):
        loop.tick(midnight + 86400 * day)
    loop.tick(midnight - 0.25)
    assert loop.spent_gpu_s == 0.0


def test_what_was_spent_is_made_up_for_once_it_can_be_read() -> None:
    loop = world(a=lit(in_flight=1)).loop(Budget(gpu_s_per_day=50.0))
    loop.resume(day_of(T0), 3.0)
    loop.tick(T0)
    loop.tick(T0 + 2)
    loop.resume(day_of(T0), 4.5)
    loop.resume(day_of(T0 - 86400), 40.0)
    assert loop.spent_gpu_s == pytest.approx(5.0)
    loop.resume(day_of(T0), 9.0)
    assert loop.spent_gpu_s == pytest.approx(9.0)


def test_a_prewarm_is_told_as_it_goes_on() -> None:
    there = world(a=seen(last_busy_s=T0 - 5000))
    there.specs_now = {"a": spec("scheduled", model="a", windows=(Window(T0, T0 + 60, 1, source="prewarm"),))}
    loop = there.loop()
    loop.tick(T0)
    there.seen_now["a"] = lit(T0, last_busy_s=T0 - 5000)
    loop.tick(T0 + 1)
    there.seen_now["a"] = lit(T0, in_flight=1, arrivals=1)
    loop.tick(T0 + 2)
    assert [prewarm.id for prewarm in there.prewarms] == [there.prewarms[0].id] * len(there.prewarms)
    assert there.prewarms[0].reason is Reason.MANUAL
    assert there.prewarms[-1].hit_s == T0 + 2
