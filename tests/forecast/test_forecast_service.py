"""The service with real processes; what is waited for is what it says, not a time."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import bad_fitters
import numpy as np
import psutil
import pytest
from made_traffic import DAY_S, START_S, bursts, fitted, poisson, traffic

from autoscaling.core.types import Forecast, State
from autoscaling.forecast.book import Book
from autoscaling.forecast.fit import fit_full, fit_simple, fit_standard
from autoscaling.forecast.hazard import LEAST_SILENCES, NOTHING, ROUNDS, UNTOLD, Regression
from autoscaling.forecast.kept import to_state
from autoscaling.forecast.prior import NO_FLEET
from autoscaling.forecast.schedule import Schedule
from autoscaling.forecast.service import ForecastService
from autoscaling.forecast.worker import Fitter, Worker
from autoscaling.traffic import Traffic
from tests.fakes.waiting import until

NOW_S = START_S + 20 * 180 + 90
TIMES = bursts(21)


class Clock:
    """Stands still for the models; runs for the service's own deadlines, which are of real processes."""

    def now_s(self) -> float:
        return NOW_S

    def monotonic_s(self) -> float:
        return time.monotonic()


def store(model: str) -> Traffic:
    return traffic([] if model == "new" else TIMES, NOW_S, model=model)


Start = Callable[..., ForecastService]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[ForecastService] = []

    def begin(
        models: Sequence[str],
        fitters: Sequence[Fitter] = (fit_full, fit_standard, fit_simple),
        kept: State | None = None,
        **options: float,
    ) -> ForecastService:
        service = ForecastService(store, lambda _: 10.0, Clock(), fitters=fitters, **options)  # type: ignore[arg-type]
        started.append(service)
        service.watch(models)
        if kept is not None:
            service.restore(kept)
        service.start()
        return service

    yield begin
    for service in started:
        service.close()


def forecast(service: ForecastService, model: str) -> Forecast:
    until(lambda: service.forecast(model, NOW_S) is not None)
    found = service.forecast(model, NOW_S)
    assert found is not None
    return found


def test_what_is_watched_gets_a_forecast_with_its_scores(start: Start) -> None:
    service = start(["a", "b", "new"], processes=2)
    found = forecast(service, "a")
    assert "effort" not in found.details  # not the simple one
    assert found.next_arrival is not None
    shown = found.next_arrival
    assert np.interp(65, shown.times_s, shown.survival) > 0.8
    assert np.interp(115, shown.times_s, shown.survival) < 0.2
    assert service.scores("a")["next_arrival"]["timer"].silences > 5
    until(lambda: service.health()["fitted"] == 2 and service.health()["waiting"] == 1)
    assert service.forecast("new", NOW_S) is None
    assert service.health()["ok"]
    assert not service.health()["failing"]


@pytest.mark.parametrize(
    ("fitter", "budget_s", "said"),
    [
        (bad_fitters.hanging, 3.0, "hanging: killed after 3 s"),
        (bad_fitters.raising, 60.0, "raising: FloatingPointError: the matrix is singular (bad_fitters.py:"),
        (bad_fitters.dying, 60.0, "dying: its process ended"),
    ],
)
def test_a_fitter_that_fails_is_replaced_by_a_simpler_one_which_says_so(
    start: Start, fitter: Fitter, budget_s: float, said: str
) -> None:
    service = start(["bad", "good"], (fit_full, fitter, fit_simple), time_budget_s=budget_s)
    found = forecast(service, "bad")
    assert found.next_arrival is not None
    assert said in found.details["fallback"]
    assert said in service.health()["failing"]["bad"]
    good = forecast(service, "good")
    assert "fallback" not in good.details
    assert "effort" not in good.details
    assert service.health()["ok"]


def test_when_every_fitter_fails_there_is_no_forecast_and_the_reason(start: Start) -> None:
    service = start(["a"], (bad_fitters.unreadable,))
    until(lambda: "a" in service.health()["failing"])
    assert "can't be read: ValueError: made elsewhere" in service.health()["failing"]["a"]
    assert service.forecast("a", NOW_S) is None


def learned() -> State:
    """What a fleet with enough silences leaves."""
    hazard = Regression(
        NOTHING.coefficients, ROUNDS, 2 * LEAST_SILENCES, told=replace(UNTOLD, until_s=NOW_S - 60)
    )
    return to_state(replace(NO_FLEET, models=9, hazard=hazard))


def test_a_restart_goes_by_what_the_fleet_had_learned_from_the_first_fit_on(start: Start) -> None:
    service = start(["a"], kept=learned())
    forecast(service, "a")
    assert "fleet" in service.scores("a")["next_arrival"]
    assert service.health()["notice"] is None
    unknowing = start(["a"])
    forecast(unknowing, "a")
    assert "fleet" not in unknowing.scores("a")["next_arrival"]


def test_what_can_not_be_used_is_told_and_fits_begin_from_nothing(start: Start) -> None:
    service = start(["a"], kept=replace(learned(), histogram=(float("nan"),)))
    forecast(service, "a")
    assert "fleet" not in service.scores("a")["next_arrival"]
    assert service.health()["notice"] == (
        "what the fleet had learned is not used: it is broken: numbers are missing, or not finite"
    )
    assert service.health()["ok"]


def test_a_store_that_is_away_is_told_and_tried_again() -> None:
    def broken(model: str) -> Traffic:
        raise ConnectionError("the database is restarting")

    service = ForecastService(broken, lambda _: 10.0, Clock())
    service.watch(["a"])
    service.start()
    try:
        until(lambda: "a" in service.health()["failing"])
        assert "restarting" in service.health()["failing"]["a"]
        assert service.health()["ok"]
    finally:
        service.close()


def test_close_leaves_no_process(start: Start) -> None:
    before = {child.pid for child in psutil.Process().children()}
    service = start(["bad"], (fit_full, bad_fitters.hanging, fit_simple), processes=2)
    until(lambda: len({child.pid for child in psutil.Process().children()} - before) == 2)
    service.close()
    assert {child.pid for child in psutil.Process().children()} <= before


def test_an_arrival_turns_the_forecast_to_the_next_burst_at_once(start: Start) -> None:
    service = start(["a"])
    assert forecast(service, "a").next_arrival is not None
    service.arrived("a", NOW_S + 85, 1)
    found = service.forecast("a", NOW_S + 115)
    assert found is not None and found.next_arrival is not None
    shown = found.next_arrival
    assert np.interp(60, shown.times_s, shown.survival) > 0.8
    assert np.interp(200, shown.times_s, shown.survival) < 0.2


class SetClock(Clock):
    """As `Clock`, and as long after the start as it is set to."""

    later_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.later_s


def test_a_model_that_is_asked_now_and_then_is_fitted_again_four_times_as_often_as_one_that_is_not() -> None:
    clock = SetClock()
    asked, not_asked = "asked", "not asked"
    service = ForecastService(store, lambda _: 0.0, clock, fitters=(fit_standard,))
    fitted_at: dict[str, list[float]] = {asked: [], not_asked: []}

    def fits() -> int:
        for model, at in fitted_at.items():
            turn = service._schedule.turns[model]
            if turn.fitted_s is not None and turn.fitted_s not in at and not turn.running:
                at.append(turn.fitted_s)
        return sum(map(len, fitted_at.values()))

    service.watch([asked, not_asked])
    service.start()
    try:
        until(lambda: fits() == 2)
        service.arrived(asked, NOW_S, 1)
        # Everybody's turn, after a quarter of an hour give or take a fifth.
        clock.later_s += 1100.0
        until(lambda: fits() == 4)
        # Again, but for the one to which nothing had come.
        clock.later_s += 1100.0
        until(lambda: len(fitted_at[asked]) == fits() - 2 == 3)
        assert service.health()["fits"] == 5
        clock.later_s += 3300.0
        until(lambda: fits() == 7)
    finally:
        service.close()


def test_who_is_no_longer_watched_is_forgotten(start: Start) -> None:
    service = start(["a"])
    forecast(service, "a")
    service.watch([])
    assert service.forecast("a", NOW_S) is None
    service.arrived("a", NOW_S, 1)
    assert service.health()["models"] == 0


def test_bad_arrivals_change_nothing(start: Start) -> None:
    service = start(["a"])
    found = forecast(service, "a")
    for time_s, count in [(np.nan, 1), (np.inf, 1), (NOW_S, np.nan), (NOW_S, -3), (NOW_S, 0)]:
        service.arrived("a", time_s, count)
    assert service.forecast("a", NOW_S) is found


@pytest.mark.parametrize("option", [{"processes": 0}, {"time_budget_s": 0}, {"fitters": ()}])
def test_options_that_cannot_work_are_refused(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        ForecastService(store, lambda _: 10.0, Clock(), **option)  # type: ignore[arg-type]


# The book and the schedule, without processes


def test_a_forecast_is_worked_out_anew_only_when_it_has_moved() -> None:
    book = Book()
    book.install("a", fitted(TIMES, NOW_S))
    one = book.forecast("a", NOW_S)
    assert one is not None
    assert book.forecast("a", NOW_S + 0.5) is one
    assert book.forecast("a", NOW_S + 5) is one  # the silence is 70 s old
    later = book.forecast("a", NOW_S + 10)
    assert later is not None and later.made_s == NOW_S + 10
    book.arrived("a", NOW_S + 11, 1)
    assert book.forecast("a", NOW_S + 11) is not later
    back = book.forecast("a", NOW_S - 100)  # a clock that jumps back gets no forecast from its future
    assert back is not None and back.made_s == NOW_S - 100


def test_after_a_clock_was_set_back_silence_grows_with_each_look() -> None:
    """What came lies ahead of it for an hour: it came when that was first seen."""
    book = Book()
    book.install("a", fitted(poisson(1 / 60, 1), START_S + DAY_S))
    book.arrived("a", START_S + DAY_S + 5, 1)
    set_s = START_S + DAY_S - 3600

    def waits_s(now_s: float) -> float:
        found = book.forecast("a", now_s)
        assert found is not None and found.next_arrival is not None
        return float(np.interp(-0.5, -np.asarray(found.next_arrival.survival), found.next_arrival.times_s))

    at_once, later = waits_s(set_s), waits_s(set_s + 1800)
    assert later > 3 * at_once
    book.arrived("a", set_s + 1810, 1)
    assert waits_s(set_s + 1811) < 2 * at_once


def test_how_much_comes_holds_for_ten_seconds_whatever_came() -> None:
    """When the next request comes is another question with each that came."""
    book = Book()
    now_s = START_S + DAY_S
    book.install("a", fitted(poisson(0.05, 1), now_s))
    one = book.forecast("a", now_s)
    assert one is not None and one.demand is not None
    book.arrived("a", now_s + 9, 20)
    then = book.forecast("a", now_s + 9)
    assert then is not None and then.demand is one.demand
    assert then.next_arrival != one.next_arrival
    book.arrived("a", now_s + 10, 20)
    last = book.forecast("a", now_s + 10)
    assert last is not None and last.demand is not None
    assert last.demand.made_s == now_s + 10
    # What was fitted anew says anew how much comes.
    book.install("a", fitted(poisson(0.05, 1), now_s + 11))
    anew = book.forecast("a", now_s + 11)
    assert anew is not None and anew.demand is not None and anew.demand.made_s == now_s + 11


def test_arrivals_before_the_first_fit_are_not_lost_and_not_counted_twice() -> None:
    book = Book()
    for second in range(3):
        book.arrived("a", TIMES[-1] - second, 1)
    book.arrived("a", NOW_S, 1)
    book.install("a", fitted(TIMES, NOW_S))
    recent = book.page("a").recent
    assert recent is not None
    assert recent.last_s == NOW_S
    known = fitted(TIMES, NOW_S).recent
    assert recent.rates[1] == pytest.approx(known.rates[1] + 1 / 300, rel=0.05)


def test_a_forecaster_that_raises_when_asked_is_dropped_and_told() -> None:
    book = Book()
    found = fitted(TIMES, NOW_S)
    object.__setattr__(found, "arrivals", None)
    book.install("a", found)
    assert book.forecast("a", NOW_S) is None
    assert "AttributeError" in book.page("a").error


def test_new_models_come_first_then_changed_ones_then_the_oldest() -> None:
    schedule = Schedule(3)
    schedule.watch(["old", "changed"])
    for _ in range(2):
        following = schedule.next(0.0)
        assert following is not None
        schedule.done(following.model, 0.0, wants_full=False, sticky=False, effort=1, cost_s=0.01)
    assert schedule.next(10.0) is None
    schedule.watch(["old", "changed", "new"])
    schedule.changed("changed", 10.0, silences=(1, 2), arrivals=(1.0, 100.0))
    order = [schedule.next(5000.0) for _ in range(4)]
    assert [one.model if one else None for one in order] == ["new", "changed", "old", None]


def test_a_failed_fitter_is_not_tried_again_for_hours() -> None:
    schedule = Schedule(3)
    schedule.watch(["a"])
    first = schedule.next(0.0)
    assert first is not None and first.effort == 1
    assert schedule.failed("a", 0.0, 1, "hung")
    second = schedule.next(0.0)
    assert second is not None and second.effort == 2
    schedule.done("a", 0.0, wants_full=False, sticky=False, effort=2, cost_s=0.0)
    third = schedule.next(2000.0)
    assert third is not None and third.effort == 2
    schedule.done("a", 2000.0, wants_full=False, sticky=False, effort=2, cost_s=0.0)
    fourth = schedule.next(7 * 3600.0)
    assert fourth is not None and fourth.effort == 1


def test_the_thorough_fitter_is_for_busy_models_when_nothing_presses() -> None:
    schedule = Schedule(3)
    schedule.watch(["a"])
    schedule.next(0.0)
    schedule.done("a", 0.0, wants_full=True, sticky=False, effort=1, cost_s=0.0)
    regular = schedule.next(2000.0)
    assert regular is not None and regular.effort == 0
    schedule.done("a", 2000.0, wants_full=True, sticky=False, effort=0, cost_s=0.0)
    again = schedule.next(4000.0)
    assert again is not None and again.effort == 1
    schedule.done("a", 4000.0, wants_full=True, sticky=True, effort=0, cost_s=0.0)
    stuck = schedule.next(6000.0)
    assert stuck is not None and stuck.effort == 0


def test_a_fit_survives_its_way_between_processes() -> None:
    found = fitted(TIMES, NOW_S)
    sent = pickle.dumps(found)
    assert len(sent) < 40_000
    back = pickle.loads(sent)
    one, two = found.forecast(NOW_S).next_arrival, back.forecast(NOW_S).next_arrival
    assert one is not None and two is not None
    assert np.allclose(one.survival, two.survival, atol=1e-5)


def test_a_process_gives_back_the_memory_of_the_thorough_fitter() -> None:
    worker = Worker(0.0)
    try:
        worker.ready, worker.heavy, worker.free_since_s = True, True, 100.0
        assert not worker.is_spent(130.0)
        assert worker.is_spent(161.0)
        worker.heavy = False
        assert not worker.is_spent(1e6)
    finally:
        worker.end()


ORPHAN = """
import sys, time
sys.path[:] = {path!r}
import bad_fitters
from autoscaling.forecast.worker import Task, Worker
from made_traffic import START_S, traffic
from autoscaling.forecast.fit import Job
from autoscaling.forecast.prior import NO_FLEET
worker = Worker(time.monotonic())
assert worker.connection.recv().id == -1
job = Job(traffic([START_S], START_S + 60, model="bad"), START_S + 60, 1.0, NO_FLEET)
worker.give(Task(1, bad_fitters.hanging, job, 1.0), time.monotonic())
print(worker.process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_process_that_hangs_does_not_outlive_a_parent_that_was_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN.format(path=sys.path)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    orphan = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    until(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE)
