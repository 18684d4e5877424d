"""The regression over the fleet: what it learns, that it can be learned in parts, and that nothing later is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from made_traffic import DAY_S, START_S, Floats, exact, fitted, traffic

from autoscaling.forecast import arrival_choice
from autoscaling.forecast.book import Book
from autoscaling.forecast.calibration import Calibrated
from autoscaling.forecast.fit import FittedModel, Job, Seen, fit_standard, share_at
from autoscaling.forecast.gap_record import (
    EMPTY,
    MOST,
    Silence,
    active,
    learn,
    own_hazard,
    rates_at,
    silences_in,
)
from autoscaling.forecast.hazard import BANDS, LEAST_SILENCES, NOTHING, ROUNDS, Expansion, Regression, bands
from autoscaling.forecast.history import THETAS_S, Recent, arrived, history_of
from autoscaling.forecast.prior import NO_FLEET, Prior, pooled
from autoscaling.traffic import Traffic


def sessions(seed: int, days: float = 3.0) -> Floats:
    """Requests 30 s apart for some minutes, then hours of nothing: how soon the next comes depends on how many came."""
    random = np.random.default_rng(seed)
    times: list[float] = []
    at = START_S + random.exponential(3600)
    while at < START_S + days * DAY_S:
        for _ in range(8):
            times.append(at)
            at += 15 + random.exponential(20)
        at += random.exponential(3 * 3600)
    return np.asarray(times)


def silences(times: Floats) -> list[Silence]:
    found, recent = [], None
    for time_s in times.tolist():
        if recent is not None and time_s - recent.last_s >= 10:
            found.append(
                Silence(
                    recent.last_s,
                    time_s,
                    recent.last_s + 10,
                    recent.rates,
                    tuple(recent.onsets_s[i] for i in (4, 7, 11)),
                )
            )
        recent = arrived(recent, time_s, 1)
    return found


def same(one: Expansion, other: Expansion) -> None:
    np.testing.assert_allclose(one.curvature, other.curvature, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(one.slope, other.slope, rtol=1e-3, atol=1e-3)
    assert one.silences == other.silences


def test_a_moment_that_parts_a_silence_changes_nothing_that_is_counted() -> None:
    all_of_it = silences(sessions(1))
    now_s, cut_s = START_S + 3 * DAY_S, START_S + 1.4 * DAY_S
    whole, record = learn(all_of_it, EMPTY, -np.inf, now_s, NOTHING)
    before = [each for each in all_of_it if each.begin_s < cut_s]
    after = [each for each in all_of_it if each.end_s > cut_s]
    first, between = learn(before, EMPTY, -np.inf, cut_s, NOTHING)
    second, again = learn(after, between, cut_s, now_s, NOTHING)
    assert first.silences + second.silences == whole.silences == len(all_of_it)
    assert again.known == record.known
    np.testing.assert_allclose(again.gaps_s, record.gaps_s)
    assert again.typical == pytest.approx(record.typical)


def test_models_add_up() -> None:
    now_s = START_S + 3 * DAY_S
    parts = [learn(silences(sessions(seed)), EMPTY, -np.inf, now_s, NOTHING)[0] for seed in range(4)]
    one = parts[0]
    for part in parts[1:]:
        one = one.plus(part)
    apart, together = NOTHING.next(parts), NOTHING.next([one])
    np.testing.assert_allclose(apart.coefficients, together.coefficients, atol=1e-3)
    assert apart.silences == together.silences == one.silences
    assert apart.round == 1
    assert apart.next(parts) is apart


def test_rounds_come_to_rest() -> None:
    known = [silences(sessions(seed)) for seed in range(6)]
    now_s = START_S + 3 * DAY_S
    regression = NOTHING
    steps = []
    for _ in range(12):
        following = regression.next(learn(each, EMPTY, -np.inf, now_s, regression)[0] for each in known)
        steps.append(float(np.abs(following.coefficients - regression.coefficients).max()))
        regression = following
    assert steps[-1] < 0.01 < steps[0]


def test_what_comes_after_a_silence_began_is_not_looked_at() -> None:
    times = sessions(2)
    history = history_of(traffic(times, START_S + 2 * DAY_S), START_S + 2 * DAY_S)
    known = silences(times[times < START_S + DAY_S])
    open_ = Silence(known[-1].end_s, np.inf, known[-1].end_s + 10, known[-1].rates, known[-1].onsets_s)
    until_s = START_S + 2 * DAY_S
    early = active(history.events, START_S + 2 * DAY_S)
    kept = replace(EMPTY, active_s=early[early <= open_.begin_s])
    with_later = replace(EMPTY, active_s=early)
    assert len(with_later.active_s) > len(kept.active_s)
    same(
        learn([open_], kept, -np.inf, until_s, NOTHING)[0],
        learn([open_], with_later, -np.inf, until_s, NOTHING)[0],
    )


def test_own_hazard_finds_the_age_at_which_silences_end() -> None:
    gaps = np.full(40, 600.0)
    hazard = own_hazard(gaps, np.asarray([60.0, 300.0, 600.0, 1200.0]))
    assert np.argmax(hazard[:, 0]) == 2
    assert hazard[2, 3] == 1.0
    assert hazard[0, 1] > hazard[3, 1]
    nothing = own_hazard(np.zeros(0), np.asarray([60.0]))
    assert np.isfinite(nothing).all()


def test_rates_from_buckets_are_those_of_the_arrivals() -> None:
    times = np.floor(sessions(3, 0.03))
    recent: Recent | None = None
    for time_s in times.tolist():
        recent = arrived(recent, time_s + 0.5, 1)
    assert recent is not None
    history = history_of(traffic(times, float(times[-1]) + 1), float(times[-1]) + 1)
    found = rates_at(history.events, [len(history.events) - 1])
    np.testing.assert_allclose(found[0], recent.rates, rtol=1e-6)
    assert silences_in(history)[-1].rates == pytest.approx(rates_at(history.events, [len(times) - 2])[0])


def fleet(
    rounds: int, models: int = 12, known: Callable[[Floats, float], Traffic] = traffic
) -> tuple[Prior, list[FittedModel]]:
    now_s = START_S + 3 * DAY_S
    prior, found = NO_FLEET, []
    for _ in range(rounds):
        found = [
            fit_standard(Job(known(sessions(seed), now_s), now_s, 60.0, prior)) for seed in range(models)
        ]
        prior = pooled((each.share for each in found if each is not None), prior)
    return prior, [each for each in found if each is not None]


def session_goes_on(known: Callable[[Floats, float], Traffic]) -> tuple[float, float]:
    """The chance that a request follows within a minute, after three of a session of eight and after all of them."""
    prior, _ = fleet(6, known=known)
    assert prior.hazard.silences > LEAST_SILENCES
    now_s = START_S + 3 * DAY_S
    found = fit_standard(Job(known(sessions(99)[:200], now_s), now_s, 60.0, prior))
    assert found is not None
    assert "fleet" in found.scores["next_arrival"]

    def soon(times: list[float]) -> float:
        recent = None
        for time_s in times:
            recent = arrived(recent, now_s + time_s, 1)
        shown = found.forecast(now_s + times[-1] + 10, recent).next_arrival
        assert shown is not None
        return 1 - float(np.interp(60.0, shown.times_s, shown.survival))

    return soon([0, 30, 60]), soon([0, 30, 60, 90, 120, 150, 180, 210])


def test_a_fleet_with_enough_silences_learns_how_sessions_end() -> None:
    """And the buckets of days ago teach what the seconds would, though they hide most of the short silences."""
    few, many = session_goes_on(traffic)
    assert few > many + 0.15
    assert (few, many) == pytest.approx(session_goes_on(exact), abs=0.05)


def test_a_small_fleet_goes_by_its_own_gaps() -> None:
    prior, found = fleet(ROUNDS + 1, 1)
    assert not prior.hazard.knows
    assert "fleet" not in found[0].scores["next_arrival"]


def test_the_book_hands_a_fit_the_silences_since_the_last_one() -> None:
    book = Book()
    for time_s in (0.0, 5.0, 100.0, 104.0, 400.0):
        book.arrived("m", START_S + time_s, 1)
    seen = book.begin_fit("m")
    assert [(each.begin_s - START_S, each.end_s - START_S) for each in seen.ended] == [(5, 100), (104, 400)]
    assert seen.recent is not None
    assert seen.recent.last_s == START_S + 400
    book.install("m", fitted(sessions(0), START_S + DAY_S))
    assert book.begin_fit("m").ended == ()


def test_what_a_fit_that_failed_was_given_the_next_one_gets() -> None:
    """Oldest first, with what has come since, and no more than is learned from at once."""
    book = Book()
    for time_s in (0.0, 100.0, 200.0):
        book.arrived("m", START_S + time_s, 1)
    book.begin_fit("m")
    book.arrived("m", START_S + 400, 1)
    ended = [each.end_s - START_S for each in book.begin_fit("m").ended]
    assert ended == [100, 200, 400]
    for i in range(MOST + 10):
        book.arrived("m", START_S + 1000 + 60 * i, 1)
    assert len(book.begin_fit("m").ended) == len(book.begin_fit("m").ended) == MOST


def test_a_fit_goes_on_where_the_one_before_ended() -> None:
    times = sessions(5)
    now_s = float(times[100]) + 1
    first = fit_standard(Job(traffic(times, now_s), now_s, 60.0, NO_FLEET))
    assert first is not None
    assert first.share.hazard is not None
    later = [each for each in silences(times) if times[100] <= each.begin_s and each.end_s <= times[140]]
    recent = Recent(float(times[140]), (float(times[140]),) * len(THETAS_S), (0.0,) * 5, float(times[140]))
    end_s = float(times[140]) + 1
    second = fit_standard(
        Job(traffic(times, end_s), end_s, 60.0, NO_FLEET, Seen(first, tuple(later), recent))
    )
    assert second is not None
    assert second.share.hazard is not None
    assert second.learned.record.known == first.learned.record.known + len(later)
    before = first.share.hazard.silences
    assert second.share.hazard.silences == pytest.approx(before + len(later))
    assert second.share.hazard.until_s == end_s


def test_a_silence_that_goes_on_counts_before_it_is_over() -> None:
    """Who waits for its end learns of the longest ones too late, and takes models for busier than they are."""
    times = sessions(6)
    now_s = float(times[-1]) + 1
    fitted = fit_standard(Job(exact(times, now_s), now_s, 60.0, NO_FLEET))
    assert fitted is not None
    assert fitted.share.hazard is not None
    assert share_at(fitted, None, now_s, NOTHING) is fitted.share
    later_s = now_s + DAY_S
    quiet = share_at(fitted, None, later_s, NOTHING).hazard
    assert quiet is not None
    # About the same as if it had been fitted then.
    whole = fit_standard(Job(exact(times, later_s), later_s, 60.0, NO_FLEET))
    assert whole is not None
    assert whole.share.hazard is not None
    assert quiet.until_s == whole.share.hazard.until_s == later_s
    assert quiet.slope[0] < fitted.share.hazard.slope[0]
    faded = fitted.share.hazard.faded(later_s)
    added = quiet.slope[0] - faded.slope[0]
    wanted = whole.share.hazard.slope[0] - fitted.share.hazard.slope[0]
    assert added == pytest.approx(wanted, rel=0.3)


def test_bands_are_by_age_and_by_hazard() -> None:
    found = bands(np.asarray([1.0, 1.0, 1e6, 1e6]), np.log(np.asarray([1e-6, 1.0, 1e-6, 1.0])))
    assert len(set(found.tolist())) == 4
    assert found.min() == 0
    assert found.max() == BANDS - 1


def test_a_regression_that_was_wrong_is_corrected_where_it_was() -> None:
    """Learned from a fleet that asks often, then asked of one that asks half as often."""
    now_s = START_S + 3 * DAY_S
    regression = NOTHING
    busy = [silences(sessions(seed)) for seed in range(12)]
    for _ in range(ROUNDS + 2):
        regression = regression.next(learn(each, EMPTY, -np.inf, now_s, regression)[0] for each in busy)
    assert regression.knows
    # Nothing that it has not seen: in all, as much came as it foretold.
    again = [learn(each, EMPTY, -np.inf, now_s, regression)[0] for each in busy]
    assert sum(each.came.sum() for each in again) == pytest.approx(
        sum(each.foretold.sum() for each in again), rel=0.05
    )

    def slower(times: Floats) -> Floats:
        return START_S + 2 * (times - START_S)

    calm = [silences(slower(sessions(seed))) for seed in range(12)]
    seen = [learn(each, EMPTY, -np.inf, START_S + 6 * DAY_S, regression)[0] for each in calm]
    came, foretold = sum(each.came for each in seen), sum(each.foretold for each in seen)
    corrected = regression.next(seen).correction
    # Within a session the gaps are about 35 s, now twice that: most of what was foretold for so soon did not come.
    soon = int(bands(np.asarray([40.0]), np.log(np.asarray([0.02])))[0])
    assert corrected[soon] == pytest.approx(np.log((came[soon] + 20) / (foretold[soon] + 20)))
    assert corrected[soon] < -0.2
    assert corrected[np.asarray(foretold) + came == 0] == pytest.approx(0.0)


def test_what_is_not_known_yet_is_not_corrected() -> None:
    part, _ = learn(silences(sessions(1)), EMPTY, -np.inf, START_S + 3 * DAY_S, NOTHING)
    assert not part.foretold.any()
    assert not part.came.any()
    assert not Regression(NOTHING.coefficients).correction.any()


def test_how_wrong_it_was_is_forgotten_sooner_than_what_was_learned() -> None:
    one = learn(silences(sessions(1)), EMPTY, -np.inf, START_S + 3 * DAY_S, NOTHING)[0]
    one = replace(
        one.faded(one.until_s), came=np.ones(BANDS, np.float32), foretold=np.ones(BANDS, np.float32)
    )
    later = one.faded(one.until_s + 14 * DAY_S)
    assert later.silences == pytest.approx(one.silences / 2)
    assert later.came == pytest.approx(np.full(BANDS, 1 / 16))


def test_the_fleets_own_correction_is_in_the_forecast_and_no_other() -> None:
    prior, _ = fleet(6)
    now_s = START_S + 3 * DAY_S
    job = Job(traffic(sessions(1), now_s), now_s, 60.0, prior)
    plain = fit_standard(job)
    assert plain is not None
    assert plain.arrivals.name == "fleet"
    assert not isinstance(plain.arrivals, Calibrated)
    less = replace(prior.hazard, correction=prior.hazard.correction + np.log(0.9))
    calmer = fit_standard(replace(job, prior=replace(prior, hazard=less)))
    assert calmer is not None
    assert calmer.arrivals.name == "fleet"
    times = np.asarray([60.0, 600.0, 3600.0])
    recent = plain.recent
    was = plain.arrivals.log_survival(recent.last_s + 30, recent, times)
    now = calmer.arrivals.log_survival(recent.last_s + 30, recent, times)
    np.testing.assert_allclose(now, 0.9 * was, rtol=1e-6)


def test_beside_the_regression_others_must_be_better_by_more_than_chance() -> None:
    """A few nats over a few silences are chance; a rhythm that is always right is not. With none, a few nats count."""
    knows = replace(NO_FLEET, hazard=Regression(NOTHING.coefficients, ROUNDS, LEAST_SILENCES))

    def best(prior: Prior, totals: dict[str, float], **sure: float) -> str:
        odds = arrival_choice._posterior(totals, sure, prior, 6)
        return max(odds, key=lambda name: odds[name])

    assert best(knows, {"fleet": 0.0, "renewal": 10.0}) == "fleet"
    assert best(knows, {"fleet": 0.0, "timer": 100.0}) == "timer"
    assert best(knows, {"fleet": 0.0, "timer": 10.0}, timer=8.0) == "timer"
    assert best(NO_FLEET, {"renewal": 0.0, "timer": 10.0}) == "timer"
    assert "poisson" not in {each.name for each in arrival_choice.forecasters_for(knows)}


def test_what_can_not_be_chance_counts_whole() -> None:
    even = np.ones(30)
    assert arrival_choice._sure(np.asarray([5.0, 5.2, 4.9, 5.1]), even[:4]) == pytest.approx(20, rel=0.1)
    assert arrival_choice._sure(np.asarray([5.0, 5.0]), even[:2]) == 0
    assert arrival_choice._sure(np.asarray([20.0, 0.1, -0.2, 0.0]), even[:4]) == 0
    noise = np.random.default_rng(0).normal(0.3, 2.0, 30)
    assert arrival_choice._sure(noise, even) == 0
    # What is forgotten is no evidence.
    assert arrival_choice._sure(np.full(4, 5.0), np.asarray([1e-9, 1e-9, 1.0, 1.0])) == 0


def test_who_was_silent_for_days_is_not_taken_to_come_at_the_time_of_its_last_request() -> None:
    """Silences are followed for two days. What comes after them goes by the mean of the second, and less and less."""
    prior, _ = fleet(6)
    now_s = START_S + 3 * DAY_S
    found = fit_standard(Job(traffic(sessions(99)[:200], now_s), now_s, 60.0, prior))
    assert found is not None
    recent = arrived(None, now_s, 1)
    assert recent is not None

    def comes(age_s: float, within_s: float) -> float:
        survival = found.arrivals.log_survival(now_s + age_s, recent, np.asarray([within_s]))
        return float(-survival[0])

    second_day = comes(DAY_S, DAY_S)
    hours = [comes(days * DAY_S, 3600.0) for days in (2, 3, 6)]
    assert hours[0] == pytest.approx(second_day / 24, rel=0.05)
    assert hours[1] == pytest.approx(hours[0] * 2 / 3, rel=0.05)
    assert hours[2] == pytest.approx(hours[0] / 3, rel=0.05)
