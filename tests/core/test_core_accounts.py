"""What is charged, and what prewarms are said to have been worth."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from autoscaling.core.accounts import NOTHING, Account, Booking, Prewarm, book, day_of, unmet
from autoscaling.core.types import Decision, Observation, Reason, Rung, RungProfile
from tests.core.lab import RUNGS, T0, lit, seen, spec

NOON = math.floor(T0 / 86400) * 86400 + 43200.0


class Ledger:
    """Books one step after another, and adds up."""

    def __init__(self) -> None:
        self.account = Account()
        self.gpu_s: dict[str, float] = {}
        self.requests = self.cold_requests = self.cold_starts = 0
        self.waited_s = 0.0
        self.days: dict[str, float] = {}
        self.prewarms: dict[str, Prewarm] = {}

    def book(self, observation: Observation, decision: Decision | None = None) -> Booking:
        self.account, booking = book(self.account, spec(), observation, decision)
        for row in booking.usage:
            for rung, value in row.gpu_s.items():
                self.gpu_s[rung] = self.gpu_s.get(rung, 0) + value
                self.days[row.day] = self.days.get(row.day, 0) + value
            self.requests += row.requests
            self.cold_requests += row.cold_requests
            self.cold_starts += row.cold_starts
            self.waited_s += row.waited_s
        self.prewarms |= {prewarm.id: prewarm for prewarm in booking.prewarms}
        return booking

    @property
    def prewarm(self) -> Prewarm:
        (prewarm,) = self.prewarms.values()
        return prewarm


def decided(now_s: float, replicas: int, reason: Reason, rung: Rung = Rung.TEMPLATE) -> Decision:
    return Decision("m", now_s, replicas, rung, reason, now_s + 10, "predictive")


def test_replicas_are_charged_from_their_start_and_rungs_while_they_are_held() -> None:
    ledger = Ledger()
    ledger.book(seen(NOON, rung=Rung.PARKED))
    ledger.book(seen(NOON + 10, rung=Rung.TEMPLATE, starting=1))
    ledger.book(lit(NOON + 15, replicas=2))
    ledger.book(lit(NOON + 25, replicas=2))
    assert ledger.gpu_s == pytest.approx({"parked": 10 * 0.02, "serving": 5 * 1 + 10 * 2})


@pytest.mark.parametrize(
    ("gpus", "rungs", "each"),
    [(2.0, (), 2.0), (0.0, (), 1.0), (2.0, (RUNGS[1], replace(RUNGS[3], cost_per_s=2.5)), 2.5)],
)
def test_a_replica_is_charged_as_the_gpus_that_it_holds(
    gpus: float, rungs: tuple[RungProfile, ...], each: float
) -> None:
    """Or as it was measured; one without GPUs as one."""
    asked = spec(gpus_per_replica=gpus)
    account, _ = book(Account(), asked, lit(NOON, replicas=3, rungs=rungs), None)
    _, booking = book(account, asked, lit(NOON + 10, replicas=3, rungs=rungs), None)
    assert booking.gpu_s == pytest.approx(3 * each * 10)


def test_a_start_that_is_seen_after_its_engine_answered_is_a_cold_start() -> None:
    """A gateway may light the engine itself: who asked is served before Serve's replica is seen."""
    ledger = Ledger()
    ledger.book(seen(NOON))
    ledger.book(seen(NOON + 1, arrivals=1))
    ledger.book(seen(NOON + 2, starting=1))
    ledger.book(lit(NOON + 3))
    assert (ledger.requests, ledger.cold_requests, ledger.cold_starts) == (1, 1, 1)
    # Long after the last request it is none, whoever wants the replica.
    ledger.book(seen(NOON + 10))
    ledger.book(seen(NOON + 100, starting=1))
    assert ledger.cold_starts == 1


def test_what_gateways_counted_of_waiting_goes_before_what_was_seen_of_it() -> None:
    """Also a queue that is gone before the next look; nothing of it is lost while Serve does not answer."""
    ledger = Ledger()
    ledger.book(seen(NOON))
    ledger.book(seen(NOON + 1, queued=3, arrivals=3))
    ledger.book(lit(NOON + 2))
    assert ledger.waited_s == pytest.approx(3.0)
    ledger.book(seen(NOON + 10, queued=3, waited_s=0.25))
    ledger.book(replace(seen(NOON + 11, waited_s=0.5), ready=None))
    ledger.book(lit(NOON + 12, waited_s=0.25))
    assert ledger.waited_s == pytest.approx(4.0)


def test_what_a_start_takes_is_not_said_to_be_spared_before_it_was_measured() -> None:
    ledger = Ledger()
    assumed = tuple(replace(each, starts=0) for each in RUNGS)
    ledger.book(seen(NOON, rungs=assumed), decided(NOON, 1, Reason.PREWARM))
    ledger.book(lit(NOON + 5, rungs=assumed), decided(NOON + 5, 1, Reason.PREWARM))
    ledger.book(lit(NOON + 6, rungs=assumed, arrivals=4, in_flight=4), decided(NOON + 6, 1, Reason.DEMAND))
    assert (ledger.prewarm.hit_s, ledger.prewarm.spared_requests) == (NOON + 6, 0)


def test_a_day_ends_at_midnight() -> None:
    ledger = Ledger()
    midnight = NOON + 43200
    ledger.book(lit(midnight - 4))
    ledger.book(lit(midnight + 6))
    assert ledger.days == pytest.approx({day_of(midnight - 1): 4.0, day_of(midnight): 6.0})


def test_what_nobody_saw_is_not_charged() -> None:
    ledger = Ledger()
    ledger.book(lit(NOON))
    ledger.book(lit(NOON + 3600))
    ledger.book(replace(lit(NOON + 3610), ready=None))
    ledger.book(lit(NOON + 3590))
    assert ledger.gpu_s == {}
    ledger.book(lit(NOON + 3600))
    assert ledger.gpu_s == pytest.approx({"serving": 10.0})


def test_a_cold_start_is_counted_with_who_waited() -> None:
    ledger = Ledger()
    ledger.book(seen(NOON))
    ledger.book(seen(NOON + 1, queued=2, arrivals=2), decided(NOON + 1, 1, Reason.WAKE))
    ledger.book(seen(NOON + 2, queued=3, arrivals=1, starting=1, target=1))
    ledger.book(lit(NOON + 5, in_flight=3))
    ledger.book(lit(NOON + 6, in_flight=4, arrivals=1))
    assert (ledger.requests, ledger.cold_requests, ledger.cold_starts) == (4, 3, 1)
    assert ledger.waited_s == pytest.approx(2 * 1 + 3 * 3)
    assert ledger.prewarms == {}


def test_a_request_that_was_told_late_met_nobody_knows_what() -> None:
    """It counts, but not as one that came while the model was dark: that is how it is now."""
    ledger = Ledger()
    ledger.book(seen(NOON))
    ledger.book(replace(seen(NOON + 1, arrivals=42), ready=None, late=40))
    ledger.book(replace(seen(NOON + 2, arrivals=30), late=30))
    assert (ledger.requests, ledger.cold_requests) == (72, 2)
    ledger.book(seen(NOON + 3, arrivals=1))
    assert (ledger.requests, ledger.cold_requests) == (73, 3)


def test_a_request_that_met_an_engine_without_its_replica_did_not_meet_the_dark() -> None:
    """Where an engine is lit beside its replica it answers some seconds before that is there."""
    ledger = Ledger()
    ledger.book(seen(NOON))
    ledger.book(replace(seen(NOON + 1, arrivals=1, in_flight=1), answering=True))
    ledger.book(replace(seen(NOON + 2, arrivals=5), answering=True))
    ledger.book(replace(lit(NOON + 3), arrivals=2, answering=True))
    assert (ledger.requests, ledger.cold_requests) == (8, 1)


def test_a_prewarm_ends_where_the_clock_goes_back() -> None:
    """It can't be measured any more, and is not left open for ever."""
    ledger = Ledger()
    ledger.book(seen(NOON), decided(NOON, 1, Reason.PREWARM))
    ledger.book(lit(NOON + 5))
    ledger.book(lit(NOON - 3600))
    assert (ledger.prewarm.ended_s, ledger.prewarm.hit_s) == (NOON, None)
    ledger.book(lit(NOON - 3599, in_flight=1, arrivals=1))
    assert (ledger.prewarm.hit_s, ledger.prewarm.spared_requests) == (None, 0)


@pytest.mark.parametrize("ready", [0, 1])
def test_every_request_is_in_the_accounts_once(ready: int) -> None:
    """Of the first observation, of those while Serve does not answer, and of a clock that goes back or stands."""
    ledger = Ledger()
    unknown = replace(seen(NOON, arrivals=5), ready=None, starting=None)
    ledger.book(unknown)
    ledger.book(lit(NOON + 1, ready, arrivals=2))
    assert (ledger.requests, ledger.cold_requests) == (7, 0 if ready else 7)
    for second in range(2, 5):
        ledger.book(replace(unknown, now_s=NOON + second))
    assert ledger.requests == 7
    ledger.book(lit(NOON + 5, 1 - ready, arrivals=1))
    assert (ledger.requests, ledger.cold_requests) == (23, 0 if ready else 23)
    ledger.book(lit(NOON + 5, ready, arrivals=3))
    ledger.book(replace(unknown, now_s=NOON + 4))
    ledger.book(lit(NOON - 60, ready, arrivals=4))
    assert ledger.requests == 35
    ledger.book(lit(NOON - 59, ready))
    assert ledger.requests == 35
    assert ledger.cold_starts == 1


def test_a_prewarm_is_met_by_what_came_while_serve_did_not_answer() -> None:
    ledger = Ledger()
    prewarmed(ledger)
    ledger.book(replace(lit(NOON + 6, arrivals=1), ready=None))
    assert ledger.prewarm.hit_s is None
    ledger.book(lit(NOON + 7), decided(NOON + 7, 1, Reason.KEEP_ALIVE))
    assert (ledger.prewarm.hit_s, ledger.prewarm.spared_requests) == (NOON + 7, 1)


def test_without_accounts_nothing_of_a_model_is_kept_while_serve_does_not_answer() -> None:
    unknown = replace(seen(NOON, arrivals=5), ready=None)
    assert book(Account(), spec(), unknown, None, used=False) == (Account(), NOTHING)


def prewarmed(ledger: Ledger) -> None:
    """Begun at noon from TEMPLATE, whose start takes 4 s; ready after 5."""
    ledger.book(seen(NOON), decided(NOON, 1, Reason.PREWARM))
    ledger.book(seen(NOON + 1, starting=1, target=1), decided(NOON + 1, 1, Reason.PREWARM))
    ledger.book(lit(NOON + 5), decided(NOON + 5, 1, Reason.KEEP_ALIVE))


def test_a_prewarm_that_is_hit() -> None:
    ledger = Ledger()
    prewarmed(ledger)
    assert ledger.prewarm.ready_s == NOON + 5
    ledger.book(lit(NOON + 10), decided(NOON + 10, 1, Reason.KEEP_ALIVE))
    ledger.book(lit(NOON + 11, in_flight=2, arrivals=2), decided(NOON + 11, 1, Reason.DEMAND))
    ledger.book(lit(NOON + 14, in_flight=3, arrivals=1), decided(NOON + 14, 1, Reason.DEMAND))
    ledger.book(lit(NOON + 16, in_flight=4, arrivals=1), decided(NOON + 16, 1, Reason.DEMAND))
    prewarm = ledger.prewarm
    assert (prewarm.hit_s, prewarm.ended_s, prewarm.reason) == (NOON + 11, NOON + 11, Reason.PREWARM)
    assert prewarm.cost_gpu_s == pytest.approx(10.0)
    # Two would have waited 4 s, one that came 3 s later 1 s, and one after the start nothing.
    assert prewarm.spared_requests == 3
    assert prewarm.spared_wait_s == pytest.approx(2 * 4 + 1)
    assert ledger.cold_starts == 0


def test_a_prewarm_that_is_met_half_way_spares_what_it_was_ahead() -> None:
    ledger = Ledger()
    ledger.book(seen(NOON), decided(NOON, 1, Reason.PREWARM))
    ledger.book(seen(NOON + 1, starting=1, target=1), decided(NOON + 1, 1, Reason.PREWARM))
    ledger.book(seen(NOON + 3, starting=1, target=1, queued=1, arrivals=1), decided(NOON + 3, 1, Reason.WAKE))
    assert ledger.prewarm.hit_s == NOON + 3
    assert ledger.prewarm.spared_wait_s == pytest.approx(3.0)
    assert ledger.cold_starts == 0


def test_a_request_that_comes_before_a_prewarm_is_seen_to_start_makes_it_no_cold_start() -> None:
    ledger = Ledger()
    ledger.book(seen(NOON), decided(NOON, 1, Reason.PREWARM))
    ledger.book(seen(NOON + 1, starting=1, target=1, queued=1, arrivals=1), decided(NOON + 1, 1, Reason.WAKE))
    assert (ledger.requests, ledger.cold_requests, ledger.cold_starts) == (1, 1, 0)


def test_a_prewarm_is_charged_for_its_own_replicas_alone() -> None:
    ledger = Ledger()
    ledger.book(lit(NOON, in_flight=5), decided(NOON, 2, Reason.FORECAST_DEMAND))
    for after_s in (1, 3):
        ledger.book(lit(NOON + after_s, replicas=4, in_flight=5))
    assert ledger.prewarm.cost_gpu_s == pytest.approx(2.0)


def test_a_prewarm_that_is_given_up() -> None:
    ledger = Ledger()
    prewarmed(ledger)
    ledger.book(lit(NOON + 20), decided(NOON + 20, 0, Reason.GO_DARK))
    prewarm = ledger.prewarm
    assert (prewarm.hit_s, prewarm.ended_s) == (None, NOON + 20)
    assert prewarm.cost_gpu_s == pytest.approx(19.0)
    assert (prewarm.spared_requests, prewarm.spared_wait_s) == (0, 0.0)
    ledger.book(seen(NOON + 30), decided(NOON + 30, 1, Reason.PREWARM))
    assert len(ledger.prewarms) == 2


def test_a_prewarm_above_a_base_is_hit_by_what_the_base_cannot_carry() -> None:
    ledger = Ledger()
    ledger.book(lit(NOON, in_flight=5), decided(NOON, 3, Reason.FORECAST_DEMAND))
    ledger.book(
        lit(NOON + 5, replicas=3, in_flight=9, arrivals=9), decided(NOON + 5, 3, Reason.FORECAST_DEMAND)
    )
    assert (ledger.prewarm.base, ledger.prewarm.replicas, ledger.prewarm.hit_s) == (1, 2, None)
    ledger.book(lit(NOON + 9, replicas=3, in_flight=25, arrivals=9), decided(NOON + 9, 3, Reason.DEMAND))
    prewarm = ledger.prewarm
    assert prewarm.hit_s == NOON + 9
    assert (prewarm.spared_requests, prewarm.spared_wait_s) == (15, 60.0)
    assert prewarm.cost_gpu_s == pytest.approx(2 * 4)


@pytest.mark.parametrize(("load", "met"), [(0, False), (10, False), (11, True)])
def test_what_the_base_carries_changes_nothing_of_a_prewarm(load: int, met: bool) -> None:
    ledger = Ledger()
    ledger.book(lit(NOON, in_flight=5), decided(NOON, 2, Reason.FORECAST_DEMAND))
    ledger.book(lit(NOON + 5, replicas=2, in_flight=5), decided(NOON + 5, 2, Reason.DEMAND))
    then = lit(NOON + 6, replicas=2, in_flight=load, arrivals=load)
    assert unmet(ledger.prewarm, spec(), then) == 10
    ledger.book(then, decided(NOON + 6, 2, Reason.DEMAND))
    assert (ledger.prewarm.hit_s is not None) == met
    if met:
        assert unmet(ledger.prewarm, spec(), then) == math.inf


def test_each_request_that_comes_meets_a_prewarm_from_zero() -> None:
    ledger = Ledger()
    ledger.book(seen(NOON), decided(NOON, 1, Reason.PREWARM))
    assert unmet(ledger.prewarm, spec(), seen(NOON)) is None


def test_a_prewarm_of_a_rung() -> None:
    ledger = Ledger()
    ledger.book(seen(NOON), decided(NOON, 0, Reason.MANUAL, Rung.PARKED))
    ledger.book(seen(NOON + 4, rung=Rung.PARKED), decided(NOON + 4, 0, Reason.MANUAL, Rung.PARKED))
    ledger.book(seen(NOON + 54, rung=Rung.PARKED), decided(NOON + 54, 0, Reason.MANUAL, Rung.PARKED))
    prewarm = ledger.prewarm
    assert (prewarm.rung, prewarm.replicas, prewarm.ready_s) == (Rung.PARKED, 0, NOON + 4)
    assert prewarm.cost_gpu_s == pytest.approx(50 * 0.02)
    ledger.book(seen(NOON + 55, rung=Rung.PARKED), decided(NOON + 55, 0, Reason.GO_DARK))
    assert ledger.prewarm.ended_s == NOON + 55


def test_a_request_that_waits_is_no_prewarm() -> None:
    ledger = Ledger()
    ledger.book(seen(NOON))
    ledger.book(seen(NOON + 1, queued=1, arrivals=1), decided(NOON + 1, 2, Reason.SCHEDULE))
    assert ledger.prewarms == {}
