"""The expected-cost choice against brute force, and where the optimum is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from autoscaling.core import warmth
from autoscaling.core.decide import decide
from autoscaling.core.survival import build, curve_of
from autoscaling.core.types import Forecast, NextArrival, Reason, Rung, RungProfile, State
from tests.core.lab import RUNGS, T0, TWO, demand, later, lit, poisson, seen, spec, timer

STEP_S = 2.0
STEPS = 6
SMALL = {
    Rung.TEMPLATE: RungProfile(Rung.TEMPLATE, 3.0, 4.0, 0.05),
    Rung.PARKED: RungProfile(Rung.PARKED, 1.5, 2.0, 0.3),
    Rung.SERVING: RungProfile(Rung.SERVING, 0.0, 0.0, 1.0),
}
SURVIVALS = {
    "even": (1.0, 0.85, 0.72, 0.6, 0.5, 0.42, 0.35),
    "late": (1.0, 1.0, 1.0, 0.99, 0.3, 0.1, 0.1),
    "early then never": (1.0, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2),
    "never": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    "two humps": (1.0, 0.6, 0.6, 0.6, 0.6, 0.1, 0.1),
}


def plans(level: Rung) -> list[list[tuple[str, Rung]]]:
    """Every sequence of actions: hold a rung for a step, or start and wait for it."""
    found: list[list[tuple[str, Rung]]] = []

    def extend(plan: list[tuple[str, Rung]], at: int, rung: Rung) -> None:
        if at >= STEPS:
            found.append(plan)
            return
        for lower in SMALL:
            if lower <= rung:
                extend([*plan, ("hold", lower)], at + 1, lower)
        if rung < Rung.SERVING:
            took = round(SMALL[rung].delay_high_s / STEP_S)
            extend([*plan, ("start", rung)], at + took, Rung.SERVING)

    extend([], 0, level)
    return found


def costs_of_arrivals(plan: list[tuple[str, Rung]], when_s: np.ndarray, prices: warmth.Prices) -> np.ndarray:
    """What is spent if the request comes `when_s` after the beginning, for each of them, by going through the plan."""
    spent = np.zeros_like(when_s)
    late = np.linspace(0, prices.burst_s, 201)
    at_s = 0.0
    for action, rung in plan:
        took_s = STEP_S if action == "hold" else SMALL[rung].delay_high_s
        rate = SMALL[rung].cost_per_s if action == "hold" else 1.0
        spent += rate * np.clip(when_s - at_s, 0.0, took_s)
        here = (when_s >= at_s) & (when_s < at_s + took_s)
        left_s = SMALL[rung].delay_s if action == "hold" else at_s + took_s - when_s[here]
        left_s = np.broadcast_to(left_s, when_s[here].shape)
        later_s = np.maximum(0.0, left_s[:, None] - late[None, :]).mean(axis=1)
        spent[here] += left_s + prices.wait_cost * (left_s + (prices.batch_size - 1) * later_s)
        at_s += took_s
    return spent


def expected_cost(plan: list[tuple[str, Rung]], survival: tuple[float, ...], prices: warmth.Prices) -> float:
    fine = np.linspace(0, STEPS * STEP_S, 241)
    alive = np.exp(np.interp(fine, np.arange(STEPS + 1) * STEP_S, np.log(survival)))
    costs = costs_of_arrivals(plan, (fine[:-1] + fine[1:]) / 2, prices)
    # What a start spends beyond the end is spent, whether or not anybody comes.
    never = costs_of_arrivals(plan, np.array([1e9]), prices)
    return float((alive[:-1] - alive[1:]) @ costs + alive[-1] * never[0])


@pytest.mark.parametrize("name", SURVIVALS)
@pytest.mark.parametrize(("wait_cost", "batch_size"), [(0.3, 1.0), (2.0, 1.0), (8.0, 1.0), (1.0, 4.0)])
@pytest.mark.parametrize("level", [Rung.TEMPLATE, Rung.PARKED, Rung.SERVING])
def test_it_is_the_best_of_all_plans(
    name: str, wait_cost: float, batch_size: float, level: Rung, monkeypatch: pytest.MonkeyPatch
) -> None:
    survival = SURVIVALS[name]
    prices = warmth.Prices(SMALL, wait_cost, batch_size, burst_s=3.0)
    curve = build([T0 + i * STEP_S for i in range(STEPS + 1)], survival)
    monkeypatch.setattr(warmth, "_grid", lambda *_args: [T0 + i * STEP_S for i in range(STEPS + 1)])
    choice = warmth.choose(T0, curve, prices, level)
    options = plans(level)
    costs = sorted((expected_cost(plan, survival, prices), i) for i, plan in enumerate(options))
    best = options[costs[0][1]][0]
    mine = min(value for name, value in choice.numbers.items() if name.endswith("_cost_gpu_s"))
    assert mine == pytest.approx(costs[0][0], rel=0.02, abs=0.02)
    # Plans that begin with the same action are one choice; a near tie may go either way.
    others = [cost for cost, i in costs if options[i][0] != best]
    if not others or others[0] > costs[0][0] + 0.05:
        assert choice.lit == (best[0] == "start" or best[1] == Rung.SERVING)
        if not choice.lit:
            assert choice.rung == best[1]


def test_brute_force_tells_the_cases_apart() -> None:
    """The comparison above would prove nothing if one action were always the best."""
    firsts = set()
    for survival, wait_cost in itertools.product(SURVIVALS.values(), (0.3, 8.0)):
        prices = warmth.Prices(SMALL, wait_cost, 1.0, burst_s=3.0)
        options = plans(Rung.PARKED)
        best = min(options, key=lambda plan: expected_cost(plan, survival, prices))
        firsts.add(best[0])
    assert {("start", Rung.PARKED), ("hold", Rung.PARKED), ("hold", Rung.TEMPLATE)} <= firsts


@pytest.mark.parametrize("wait_cost", [0.5, 2.0, 10.0, 50.0])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.1, 2.0])
def test_memoryless_arrivals_are_kept_for_iff_a_second_costs_less_than_a_seconds_chance(
    wait_cost: float, share: float
) -> None:
    """Poisson: keep iff rate * cost of a cold start > cost of holding, at any age."""
    cold_cost = wait_cost * 4.0 + 4.0
    rate = share * 1.0 / cold_cost
    asked = spec(wait_cost=wait_cost, park=False)
    horizon_s = 10 / rate
    for age_s in (0.0, horizon_s / 10):
        observation = lit(T0, rungs=TWO, last_busy_s=T0)
        _, decision = decide(asked, State(), later(observation, T0 + age_s), poisson(rate, T0, horizon_s))
        assert decision.replicas == (1 if share > 1 else 0)
        assert decision.reason == (Reason.KEEP_ALIVE if share > 1 else Reason.GO_DARK)


@pytest.mark.parametrize("at_s", [30.0, 300.0, 3000.0])
def test_a_timer_is_met_by_a_start_one_lead_time_before(at_s: float) -> None:
    asked = spec(park=False)
    forecast = timer(T0 + at_s)
    observation = seen(T0, rungs=TWO)
    state, decision = decide(asked, State(), observation, forecast)
    assert (decision.replicas, decision.reason) == (0, Reason.DARK)
    begun_s = None
    for _ in range(20):
        now_s = decision.until_s
        state, decision = decide(asked, state, later(observation, now_s), forecast)
        if decision.replicas:
            begun_s = now_s
            break
    assert begun_s is not None
    lead_s = 5.0
    assert T0 + at_s - lead_s - 0.5 <= begun_s <= T0 + at_s - lead_s + 0.3
    assert decision.reason is Reason.PREWARM


def test_the_gap_to_a_timer_decides_whether_to_keep_or_to_end_and_start_again() -> None:
    """Holding costs a GPU-second each second; ending and starting again costs one start, whose delay is 5 s."""
    asked = spec(park=False)
    for gap_s, replicas in ((3.0, 1), (4.5, 1), (7.0, 0), (60.0, 0)):
        _, decision = decide(asked, State(), lit(T0, rungs=TWO), timer(T0 + gap_s))
        assert decision.replicas == replicas, gap_s


def test_parking_is_chosen_where_its_price_is_worth_its_speed() -> None:
    """Idle for a while: parking costs 0.02 a second and saves 3 s of 11 GPU-seconds each at the next request."""
    _, soon = decide(spec(), State(), lit(T0), poisson(1 / 200))
    _, late = decide(spec(), State(), lit(T0), poisson(1 / 5000, horizon_s=40000))
    assert (soon.replicas, soon.rung, soon.reason) == (0, Rung.PARKED, Reason.PARK)
    assert (late.replicas, late.rung, late.reason) == (0, Rung.TEMPLATE, Reason.GO_DARK)


def test_who_does_not_come_is_not_waited_for() -> None:
    asked = spec(park=False)
    forecast = timer(T0 + 60, width_s=10.0)
    forecast_end = T0 + 70
    observation = seen(T0, rungs=TWO)
    state, decision = decide(asked, State(), observation, forecast)
    state, decision = decide(asked, state, later(observation, decision.until_s), forecast)
    assert decision.reason is Reason.PREWARM
    up = lit(T0, rungs=TWO)
    state, decision = decide(asked, state, later(up, T0 + 61), forecast)
    assert decision.reason is Reason.KEEP_ALIVE
    assert decision.until_s <= forecast_end + 30
    state, decision = decide(asked, state, later(up, decision.until_s), forecast)
    assert decision.replicas == 0


def test_a_start_that_is_on_its_way_goes_on_even_if_it_is_late() -> None:
    asked = spec(park=False)
    forecast = timer(T0 + 60, width_s=60.0)
    observation = seen(T0, rungs=TWO)
    state, decision = decide(asked, State(), observation, forecast)
    begun_s = decision.until_s
    state, decision = decide(asked, state, later(observation, begun_s), forecast)
    assert decision.reason is Reason.PREWARM
    on_its_way = seen(T0, starting=1, target=1, rungs=TWO)
    for after_s in (1.0, 5.0, 20.0):
        state, decision = decide(asked, state, later(on_its_way, begun_s + after_s), forecast)
        assert (decision.replicas, decision.reason) == (1, Reason.PREWARM)


@pytest.mark.parametrize(
    ("delay_s", "batch", "burst_s", "expected"),
    [(10, 1, 5, 10), (10, 3, 5, 10 + 2 * 7.5), (2, 3, 5, 2 + 2 * 4 / 10), (10, 3, 0, 30), (0, 5, 5, 0)],
)
def test_late_members_of_a_batch_wait_less(
    delay_s: float, batch: float, burst_s: float, expected: float
) -> None:
    assert warmth.waiting(delay_s, batch, burst_s) == pytest.approx(expected)


def test_a_bigger_batch_never_makes_it_colder() -> None:
    choices = []
    for batch in (1.0, 3.0, 10.0, 100.0):
        curve = curve_of(poisson(1 / 8), T0)
        assert curve is not None
        prices = warmth.Prices({p.rung: p for p in RUNGS}, 1.0, batch)
        choices.append(warmth.choose(T0, curve, prices, Rung.SERVING).rung)
    assert choices == sorted(choices)
    assert choices[0] < choices[-1]


def test_without_a_forecast_it_is_kept_as_long_as_a_cold_start_costs() -> None:
    """Break-even: a second lit costs 1, a cold start 10 * 4 s of waiting and 4 s of loading."""
    asked = spec(park=False)
    state, decision = decide(asked, State(), lit(T0, rungs=TWO), None)
    assert (decision.replicas, decision.reason) == (1, Reason.KEEP_ALIVE)
    assert decision.until_s == pytest.approx(T0 + 44)
    _, decision = decide(asked, state, later(lit(T0, rungs=TWO), decision.until_s), None)
    assert (decision.replicas, decision.reason) == (0, Reason.GO_DARK)


def test_without_a_forecast_it_goes_down_the_lower_envelope() -> None:
    """Park after 11 / 0.98 s, where being parked instead of lit has paid for the slower start; dark after 33 / 0.02."""
    observation = lit(T0)
    state, decision = decide(spec(), State(), observation, None)
    assert decision.until_s == pytest.approx(T0 + 11 / 0.98)
    state, decision = decide(spec(), state, later(observation, decision.until_s), None)
    assert decision.reason is Reason.PARK
    parked = seen(T0, rung=Rung.PARKED)
    assert decision.until_s == pytest.approx(T0 + 33 / 0.02)
    state, decision = decide(spec(), state, later(parked, decision.until_s), None)
    assert (decision.replicas, decision.rung, decision.reason) == (0, Rung.TEMPLATE, Reason.GO_DARK)
    assert decision.until_s == math.inf


@pytest.mark.parametrize("idle_s", [0.5, 10.0, 43.0, 45.0, 100.0, 1e6])
def test_without_a_forecast_it_costs_at_most_twice_what_knowing_would(idle_s: float) -> None:
    """The competitive ratio of ski rental, with the states' own prices."""
    prices = warmth.Prices({p.rung: p for p in RUNGS}, 10.0)
    spent, now_s, level, is_lit = 0.0, T0, Rung.SERVING, True
    while now_s < T0 + idle_s:
        choice = warmth.without_forecast(T0, now_s, prices, level, lit=is_lit)
        level, is_lit = choice.rung, choice.lit
        then_s = min(choice.until_s, T0 + idle_s)
        assert then_s > now_s
        spent += prices.rungs[level].cost_per_s * (then_s - now_s)
        now_s = then_s
    spent += prices.arrival_cost(level)
    known = min(p.cost_per_s * idle_s + prices.arrival_cost(p.rung) for p in RUNGS)
    assert spent <= 2 * known + 1e-6


def test_the_users_keep_alive_bounds_only_if_asked() -> None:
    bounded = spec(park=False, keep_alive_s=20.0, params={"keep_alive_bound": 1})
    observation = lit(T0, rungs=TWO)
    state, decision = decide(bounded, State(), observation, None)
    assert decision.until_s == T0 + 20
    _, decision = decide(bounded, state, later(observation, T0 + 20), None)
    assert decision.replicas == 0


def test_without_prices_it_is_the_specs_keep_alive() -> None:
    asked = spec(keep_alive_s=30.0)
    observation = lit(T0, rungs=())
    state, decision = decide(asked, State(), observation, poisson(1.0))
    assert (decision.replicas, decision.until_s) == (1, T0 + 30)
    _, decision = decide(asked, state, later(observation, T0 + 30), poisson(1.0))
    assert decision.replicas == 0


def test_the_numbers_say_what_the_alternatives_cost() -> None:
    _, decision = decide(spec(), State(), lit(T0), poisson(1 / 60))
    assert {"keep_cost_gpu_s", "park_cost_gpu_s", "dark_cost_gpu_s", "p_arrival_in_lead", "lead_s"} <= set(
        decision.numbers
    )
    _, dark = decide(spec(), State(), seen(T0), poisson(1 / 60))
    assert {"prewarm_cost_gpu_s", "dark_cost_gpu_s"} <= set(dark.numbers)
    lead_s = dark.numbers["lead_s"]
    assert dark.numbers["p_arrival_in_lead"] == pytest.approx(1 - math.exp(-lead_s / 60))


def test_demand_alone_says_when_to_light() -> None:
    """A forecast of how much, without one of when, still prewarms: rate 0 for two minutes, then 5 a second."""
    asked = spec(park=False)
    forecast = Forecast(T0, "dense", demand=demand(0.0, 0.0, 5.0, 5.0, spread=0.0))
    observation = seen(T0, rungs=TWO)
    state, decision = decide(asked, State(), observation, forecast)
    assert decision.reason is Reason.DARK
    for _ in range(20):
        now_s = decision.until_s
        state, decision = decide(asked, state, later(observation, now_s), forecast)
        if decision.replicas:
            break
    assert decision.reason is Reason.PREWARM
    assert T0 + 114 <= now_s <= T0 + 116


def test_what_is_left_of_a_start_decides_whether_it_goes_on() -> None:
    """From WEIGHTS a start takes 50 s. Somebody may come within 20 s: worth 5 s of a GPU, not worth 50."""
    rungs = (RUNGS[0], RUNGS[3])
    prices = warmth.Prices({profile.rung: profile for profile in rungs}, 0.5)
    curve = build((T0, T0 + 20, T0 + 3600), (1.0, 0.6, 0.6))
    begun = warmth.choose(T0, curve, prices, Rung.WEIGHTS, starting_left_s=5.0)
    fresh = warmth.choose(T0, curve, prices, Rung.WEIGHTS)
    assert (begun.lit, fresh.lit) == (True, False)
    assert begun.numbers["keep_cost_gpu_s"] < begun.numbers["dark_cost_gpu_s"]


def test_a_start_counts_from_its_decision_though_it_is_seen_later() -> None:
    asked = spec(park=False, wait_cost=0.5)
    rungs = (RUNGS[0], RUNGS[3])
    sure = timer(T0 + 50, width_s=20.0)
    state, decision = decide(asked, State(), seen(T0, rung=Rung.WEIGHTS, rungs=rungs), sure)
    while decision.replicas == 0:
        now_s = decision.until_s
        state, decision = decide(
            asked, state, seen(now_s, rung=Rung.WEIGHTS, rungs=rungs, last_busy_s=T0), sure
        )
    begun_s = decision.made_s
    unseen = seen(begun_s + 3, rung=Rung.WEIGHTS, rungs=rungs, last_busy_s=T0)
    state, _ = decide(asked, state, unseen, sure)
    # By now it is 45 s on its way, and the forecast is not what it was.
    doubtful = Forecast(begun_s + 45, "x", NextArrival(begun_s + 45, (0.0, 20.0, 3600.0), (1.0, 0.6, 0.6)))
    on_its_way = seen(begun_s + 45, starting=1, target=1, rung=Rung.WEIGHTS, rungs=rungs, last_busy_s=T0)
    _, decision = decide(asked, state, on_its_way, doubtful)
    assert (decision.replicas, decision.reason) == (1, Reason.PREWARM)
    # One of which nothing is remembered may have begun just now.
    _, decision = decide(asked, State(), on_its_way, doubtful)
    assert decision.replicas == 0


def test_a_question_is_answered_once_for_as_long_as_the_answer_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked_for: list[float] = []
    real = warmth.choose

    def counting(now_s: float, *rest: object) -> warmth.Choice:
        asked_for.append(now_s)
        return real(now_s, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(warmth, "choose", counting)
    asked = spec(park=False)
    observation = seen(T0, rungs=TWO)
    state = State()
    for second in range(40):
        # The same fit, said from later: it is the same question.
        now_s = T0 + second
        forecast = replace(timer(T0 + 60, now_s), fitted_s=T0)
        state, decision = decide(asked, state, later(observation, now_s), forecast)
    assert len(asked_for) == 1
    refitted = replace(timer(T0 + 43, T0 + 40), fitted_s=T0 + 40)
    state, decision = decide(asked, state, later(observation, T0 + 40), refitted)
    assert len(asked_for) == 2
    assert decision.reason is Reason.PREWARM
    _, decision = decide(replace(asked, wait_cost=0.0), state, later(observation, T0 + 40), refitted)
    assert len(asked_for) == 3
    assert decision.replicas == 0
