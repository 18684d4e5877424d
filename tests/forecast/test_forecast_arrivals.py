"""When the next request comes, on traffic whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_traffic import DAY_S, START_S, bursts, daily, exact, fit, fitted, poisson, quantile_s, traffic

from autoscaling.forecast import arrival_choice
from autoscaling.forecast.arrivals import HORIZON_S, batch_size
from autoscaling.forecast.fit import Job, fit_standard
from autoscaling.forecast.history import Floats, history_of
from autoscaling.forecast.prior import NO_FLEET, pooled
from autoscaling.forecast.timer import Timer


def test_without_traffic_there_is_no_forecast() -> None:
    assert fit([], START_S + DAY_S) is None


def test_one_request_ever_is_judged_by_the_fleet_and_says_so() -> None:
    found = fitted([START_S], START_S + 3600)
    shown = found.forecast(START_S + 3600)
    assert shown.next_arrival is not None
    assert shown.demand is None
    assert "fleet" in shown.details["next_arrival"]
    assert quantile_s(found, START_S + 3600, 0.5) > 600


def test_a_fleet_of_quick_models_makes_a_new_one_be_expected_sooner() -> None:
    quick = pooled(
        fitted(
            START_S + np.cumsum(np.random.default_rng(seed).exponential(120, 200)), START_S + 9 * 3600
        ).share
        for seed in range(10)
    )
    new = [START_S + 100]
    alone = quantile_s(fitted(new, START_S + 110), START_S + 110, 0.9)
    among = fit(new, START_S + 110, prior=quick)
    assert among is not None
    assert quantile_s(among, START_S + 110, 0.9) < alone / 4


def test_long_silence_is_believed() -> None:
    times = [START_S, START_S + 60, START_S + 4000]
    now_s = START_S + 10 * DAY_S
    shown = fitted(times, now_s).forecast(now_s).next_arrival
    assert shown is not None
    assert np.interp(3600, shown.times_s, shown.survival) > 0.95


@pytest.mark.parametrize("mean_s", [300.0, 4 * 3600.0])
def test_poisson_arrivals_have_no_memory(mean_s: float) -> None:
    times = START_S + np.cumsum(np.random.default_rng(3).exponential(mean_s, 300))
    last = float(times[-1])
    found = fitted(times, last + 30)
    fresh, old = quantile_s(found, last + 30, 0.5), quantile_s(found, last + mean_s, 0.5)
    assert 0.5 < fresh / (mean_s * np.log(2)) < 2
    assert 0.5 < old / (mean_s * np.log(2)) < 2


def test_a_timer_has_a_narrow_distribution() -> None:
    times = START_S + np.arange(1, 240) * 600.0 + np.random.default_rng(0).normal(20, 1, 239)
    last = float(times[-1])
    found = fitted(times, last + 60)
    low, high = quantile_s(found, last + 60, 0.05), quantile_s(found, last + 60, 0.95)
    assert low < 540 < high
    assert high - low < 120


def test_a_daily_job_is_expected_at_its_time() -> None:
    times = START_S + 9 * 3600 + np.arange(14) * DAY_S
    now_s = float(times[-1]) + 3600
    found = fitted(times, now_s)
    assert abs(quantile_s(found, now_s, 0.5) - 23 * 3600) < 600
    assert quantile_s(found, now_s, 0.05) > 22 * 3600


@pytest.mark.parametrize("cycles", [5, 8, 20, 480])
def test_bursts_every_three_minutes_are_learned_after_a_few(cycles: int) -> None:
    """As a controller needs it: at the middle of a silence the next burst is not yet due, and then within seconds."""
    times = bursts(cycles)
    found = fitted(times, START_S + (cycles - 1) * 180 + 90)
    at_s = START_S + (cycles - 1) * 180 + 90
    low, middle = quantile_s(found, at_s, 0.05), quantile_s(found, at_s, 0.5)
    assert abs(middle - 90) < 15
    assert low > 60
    assert quantile_s(found, at_s, 0.75) - middle < 20


def test_bursts_of_changing_length_are_timed_from_their_beginnings() -> None:
    random = np.random.default_rng(5)
    parts = [
        START_S + k * 300 + np.cumsum(random.exponential(1.0, random.integers(5, 100))) for k in range(20)
    ]
    found = fitted(np.concatenate(parts), START_S + 19 * 300 + 200)
    assert found.arrivals.name == "timer"
    assert abs(quantile_s(found, START_S + 19 * 300 + 200, 0.5) - 100) < 15


def test_a_missed_beat_is_not_the_end_of_the_rhythm() -> None:
    times = bursts(20)
    found = fitted(times, START_S + 19 * 180 + 90)
    late = START_S + 20 * 180 + 60  # nothing came at the twentieth beat
    assert abs(quantile_s(found, late, 0.5) - 120) < 40


@pytest.mark.parametrize(("period_s", "late_s"), [(DAY_S, 3600.0), (3600.0, 240.0), (DAY_S, -3600.0)])
def test_one_run_out_of_time_does_not_blur_the_others(period_s: float, late_s: float) -> None:
    """As when clocks are set to summer time, in the first case: the job is at its new time from then on."""
    beats = np.arange(1, 25) * period_s
    for shifted in (np.where(np.arange(24) == 16, late_s, 0.0), np.where(np.arange(24) >= 16, late_s, 0.0)):
        times = START_S + 9 * 3600 + beats + shifted
        now_s = float(times[-1]) + 0.9 * period_s
        found = fitted(times, now_s)
        assert abs(quantile_s(found, now_s, 0.5) - 0.1 * period_s) < 10
        assert quantile_s(found, now_s, 0.8) - quantile_s(found, now_s, 0.2) < 20


def test_a_rhythm_of_the_day_within_that_of_days() -> None:
    """Every three hours in the daytime: the first run and those after it are due to the second."""
    times = np.concatenate([START_S + day * DAY_S + 3600 * np.arange(6, 22, 3.0) for day in range(14)])
    for before in (-1, -3, -6):
        known, due_s = times[:before], float(times[before])
        history = history_of(exact(known, due_s - 600), due_s - 600)
        recent = fitted(known, due_s - 600).recent
        found = Timer().fit(history, NO_FLEET).log_survival(due_s - 600, recent, np.asarray([580.0, 620.0]))
        assert np.exp(found[0]) > 0.8
        assert np.exp(found[1]) < 0.5


def test_the_night_of_a_daily_model_is_waited_through() -> None:
    times = daily(1 / 900, 14, depth=1.0)
    found = fitted(times, START_S + 14 * DAY_S)
    midnight, noon = START_S + 14 * DAY_S, START_S + 13.5 * DAY_S
    before_noon = fitted(times[times < noon], noon)
    assert quantile_s(found, midnight, 0.5) > 3 * quantile_s(before_noon, noon, 0.5)


def test_the_backtest_prefers_what_fits() -> None:
    memoryless = arrival_choice.choose(
        history_of(traffic(poisson(1 / 1800, 7), START_S + 7 * DAY_S), START_S + 7 * DAY_S), NO_FLEET
    )
    assert (
        memoryless.scores["renewal"].log_score > memoryless.scores["timer"].log_score - 0.5
        if "timer" in memoryless.scores
        else True
    )
    regular = arrival_choice.choose(history_of(traffic(bursts(20), START_S + 3600), START_S + 3600), NO_FLEET)
    assert regular.fitted.name == "timer"
    assert regular.scores["timer"].log_score > regular.scores["poisson"].log_score + 1


@pytest.mark.parametrize("times", [poisson(1 / 1800, 7), bursts(20)])
def test_bands_decide_nothing(times: Floats) -> None:
    """A replay, which works out none, chooses as the cluster does."""
    now_s = float(times[-1]) + 60
    history = history_of(traffic(times, now_s), now_s)
    told, untold = (arrival_choice.choose(history, NO_FLEET, bands=bands) for bands in (True, False))
    assert untold.odds == told.odds
    assert untold.fitted.name == told.fitted.name
    assert len(told.scores) > 2
    for name, score in told.scores.items():
        assert untold.scores[name].log_score == score.log_score
        assert 0 <= score.coverage <= 1 and score.width_s > 0
        assert np.isnan(untold.scores[name].coverage) and np.isnan(untold.scores[name].width_s)


def test_what_fits_the_fleet_is_believed_sooner() -> None:
    """One that looks a little better is taken where it is right for the others too, and not where it never was."""
    times = np.cumsum(np.random.default_rng(5).normal(600, 200, 7)) + START_S
    now_s = float(times[-1]) + 30
    history = history_of(traffic(times, now_s), now_s)
    alone = arrival_choice.choose(history, NO_FLEET)
    among = arrival_choice.choose(history, replace(NO_FLEET, odds={"timer": 500.0}))
    others = arrival_choice.choose(history, replace(NO_FLEET, odds={"poisson": 500.0}))
    assert alone.odds["timer"] < among.odds["timer"]
    assert others.odds["poisson"] > alone.odds["poisson"]
    assert sum(among.odds.values()) == pytest.approx(1)
    # However large the fleet, no more than so much is needed to tell otherwise.
    ratio = (among.odds["timer"] / among.odds["renewal"]) / (alone.odds["timer"] / alone.odds["renewal"])
    assert ratio <= np.exp(2 * arrival_choice.MARGIN) * (1 + 1e-9)


def test_a_fleet_shares_which_forecasters_are_right() -> None:
    found = [fitted(bursts(20) + 7.0 * i, START_S + 3600) for i in range(5)]
    odds = pooled(each.share for each in found).odds
    assert sum(odds.values()) == pytest.approx(5)
    assert max(odds, key=lambda name: odds[name]) == "timer"


def test_batches_are_counted_from_a_bursts_first_seconds() -> None:
    alone = fitted(START_S + np.arange(20) * 150.0, START_S + 3000)
    together = fitted(np.repeat(START_S + np.arange(20) * 150.0, 12), START_S + 3000)
    assert alone.batch_size == pytest.approx(1.0, abs=0.1)
    assert 9 < together.batch_size <= 12


@pytest.mark.parametrize("name", ["poisson", "bursts", "timer", "renewal"])
def test_the_ninety_percent_band_holds(name: str) -> None:
    """Learned on the first part, judged on the silences after it."""
    random = np.random.default_rng(11)
    made = {
        "poisson": np.cumsum(random.exponential(900, 1500)),
        "bursts": bursts(900, jitter_s=4) - START_S,
        "timer": np.arange(600) * 1200 + random.normal(200, 60, 600),
        "renewal": np.cumsum(np.exp(random.normal(6, 1.2, 1200))),
    }[name] + START_S
    end_s = float(made[-1])
    whole = history_of(exact(made, end_s), end_s)
    covered = []
    for share in (0.5, 0.6, 0.7, 0.8, 0.9):
        learn_s = START_S + share * (end_s - START_S)
        choice = arrival_choice.choose(history_of(traffic(made[made < learn_s], learn_s), learn_s), NO_FLEET)
        after = [s for s in arrival_choice.silences_of(whole, 10**6) if s.made_s > learn_s][:60]
        ends = [arrival_choice.judged(choice.fitted, silence)[1:] for silence in after]
        covered += [
            arrival_choice.band(choice.fitted, silence, end)[0]
            for silence, end in zip(after, ends, strict=True)
        ]
    assert len(covered) >= 200
    assert 0.84 <= np.mean(covered) <= 0.96


def test_the_grid_reaches_two_days_and_is_fine_near_now() -> None:
    shown = fitted([START_S, START_S + 500], START_S + 1000).forecast(START_S + 1000).next_arrival
    assert shown is not None
    assert shown.times_s[0] == 0 and shown.times_s[1] <= 1
    assert shown.times_s[-1] == pytest.approx(HORIZON_S)


def test_the_same_history_gives_the_same_forecast() -> None:
    times = bursts(30)
    now_s = START_S + 30 * 180
    job = Job(traffic(times, now_s), now_s, 60.0, NO_FLEET)
    one, two = fit_standard(job), fit_standard(job)
    assert one is not None and two is not None
    assert one.forecast(now_s) == two.forecast(now_s)


@pytest.mark.parametrize("begins_s", [-1.5, 30.0, 1800.0], ids=["at an edge", "early", "late"])
def test_old_bursts_are_as_large_as_they_were(begins_s: float) -> None:
    """40 requests 1.2 s apart, once a day, known by the hour and by five minutes: five of them come in five seconds."""
    days = START_S + DAY_S * np.arange(1, 20)
    times = np.concatenate([day + begins_s + np.arange(40) * 1.2 for day in days])
    now_s = float(times[-1]) + 3 * DAY_S
    history = history_of(traffic(times, now_s), now_s)
    assert len(history.events) < 60
    assert batch_size(history) == pytest.approx(batch_size(history_of(exact(times, now_s), now_s)), rel=0.4)
