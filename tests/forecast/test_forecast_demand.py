"""How much comes, on traffic whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from made_traffic import DAY_S, START_S, daily, fitted, poisson, traffic

from autoscaling.forecast import demand
from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.conformal import QUANTILES, calibrate
from autoscaling.forecast.demand_model import Smoothed
from autoscaling.forecast.fit import FULL
from autoscaling.forecast.history import TAUS_S, Recent, history_of, recent_of
from autoscaling.forecast.profile import Profile

MEDIAN, HIGH = QUANTILES.index(0.5), QUANTILES.index(0.95)


def test_a_steady_rate_is_forecast_with_poisson_spread() -> None:
    found = fitted(poisson(0.5, 3), START_S + 3 * DAY_S)
    shown = found.forecast(START_S + 3 * DAY_S).demand
    assert shown is not None
    assert shown.step_s == 60
    counts = np.asarray(shown.rate_per_s) * 60
    assert 27 <= counts[0, MEDIAN] <= 33
    assert 36 <= counts[0, HIGH] <= 44  # 30 + 1.64 * sqrt(30)


def test_concurrency_is_rate_times_service_time() -> None:
    found = fitted(poisson(0.5, 3), START_S + 3 * DAY_S, busy_s=8.0)
    shown = found.forecast(START_S + 3 * DAY_S).demand
    assert shown is not None
    assert shown.concurrency[0][MEDIAN] == pytest.approx(4.0, rel=0.2)
    assert shown.concurrency[0][HIGH] > 6  # of a Poisson number around 4


def test_without_a_service_time_there_is_no_concurrency_to_guess() -> None:
    found = fitted(poisson(0.5, 3), START_S + 3 * DAY_S, busy_s=0.0)
    assert found.forecast(START_S + 3 * DAY_S).demand is None
    assert "time in progress" in found.details["demand"]


def test_the_daily_rise_is_seen_before_it_comes() -> None:
    times = daily(1.0, 14)
    now_s = START_S + 14 * DAY_S + 5 * 3600
    times = np.concatenate([times, daily(1.0, 15)[daily(1.0, 15) >= START_S + 14 * DAY_S]])
    found = fitted(times[times < now_s], now_s, horizon_s=1800.0)
    assert found.demand is not None and found.demand.name in {"daily", "daily-hourly", "weekly"}
    shown = found.forecast(now_s).demand
    assert shown is not None
    assert shown.rate_per_s[-1][MEDIAN] > 1.3 * shown.rate_per_s[0][MEDIAN]


def test_a_sudden_load_raises_the_forecast_at_once() -> None:
    found = fitted(poisson(0.2, 3), START_S + 3 * DAY_S)
    now_s = START_S + 3 * DAY_S
    assert found.demand is not None
    calm = Recent(now_s, (now_s,) * 15, (0.2,) * len(TAUS_S), now_s)
    loud = Recent(now_s, (now_s,) * 15, tuple(0.2 + 2.0 * 300 / tau_s for tau_s in TAUS_S), now_s)
    assert (
        found.demand.counts(now_s, loud, 5)[0, MEDIAN] > found.demand.counts(now_s, calm, 5)[0, MEDIAN] * 1.02
    )


def test_a_sparse_model_gets_no_demand_forecast_and_the_reason() -> None:
    found = fitted(poisson(1 / 7200, 7), START_S + 7 * DAY_S)
    assert found.demand is None
    assert "too sparse" in found.details["demand"]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("made", ["poisson", "bursty", "daily", "rare"])
def test_the_ninety_percent_band_holds(made: str, seed: int) -> None:
    """Of the chosen forecaster, on the day after it learned, as it is told of what comes."""
    random = np.random.default_rng(seed)
    if made == "bursty":
        minutes = random.poisson(20 * random.gamma(0.7, 1 / 0.7, 4 * 1440))
        times = (
            START_S
            + np.repeat(np.arange(len(minutes)) * 60.0, minutes)
            + random.uniform(0, 60, minutes.sum())
        )
    else:
        times = {
            "poisson": poisson(0.5, 4, seed),
            "daily": daily(0.5, 4, seed),
            "rare": poisson(0.02, 4, seed),
        }[made]
    learn_s = START_S + 3 * DAY_S
    history = history_of(traffic(times, learn_s), learn_s)
    found = demand.choose(history, 120.0, 2.0).fitted
    events = history_of(traffic(times, START_S + 4 * DAY_S), START_S + 4 * DAY_S).events
    covered = []
    for now_s in learn_s + np.arange(60, 86400 - 600, 900.0):
        recent = recent_of(events.between(-np.inf, now_s), now_s)
        assert recent is not None
        quantiles = found.counts(now_s, recent, 5)
        index = ((times - now_s) // 60).astype(int)
        seen = np.bincount(index[(index >= 0) & (index < 5)], minlength=5) + random.uniform(-0.5, 0.5, 5)
        covered.append((seen >= quantiles[:, 0]) & (seen <= quantiles[:, HIGH]))
    assert 0.84 <= np.mean(covered) <= 0.96


def test_conformal_quantiles_hold_for_any_distribution() -> None:
    random = np.random.default_rng(0)
    errors = random.standard_cauchy((4000, 1))
    means = random.uniform(0, 10, (4000, 1))
    found = calibrate(errors[:2000], means[:2000], half_life=1e9)
    low, high = (np.asarray([found.of(m)[0, q] for m in means[2000:]]) for q in (0, HIGH))
    assert 0.88 <= ((errors[2000:, 0] >= low) & (errors[2000:, 0] <= high)).mean() <= 0.93


@pytest.mark.parametrize(
    "profile",
    [
        Profile(300.0, np.linspace(1, 9, 288), 0.0, DAY_S),
        Profile(60.0, np.asarray([0.3]), period_s=60.0),
        Profile(3600.0, np.linspace(9, 1, 96), start_s=START_S),
    ],
)
def test_all_recent_rates_are_compared_to_the_profile_as_each_of_them_sees_it(profile: Profile) -> None:
    together = Smoothed.of(profile)
    for now_s in START_S + np.asarray([-DAY_S, 0, 5000.0, 3 * DAY_S, 40 * DAY_S]):
        one_by_one = [float(profile.smoothed(tau_s).at(np.asarray([now_s]))[0]) for tau_s in TAUS_S]
        assert together.at(float(now_s)) == pytest.approx(one_by_one, rel=1e-5)


def test_errors_are_wider_while_the_recent_rates_disagree() -> None:
    """A rate that holds for hours, and then jumps about for an hour."""
    random = np.random.default_rng(4)
    minutes = np.arange(3 * 1440)
    wild = (minutes // 60) % 6 == 5
    rate = 60 * np.where(wild, np.exp(random.normal(0, 0.5, len(minutes) // 5).repeat(5)), 1.0)
    counts = random.poisson(rate)
    times = START_S + np.repeat(minutes * 60.0, counts) + random.uniform(0, 60, counts.sum())
    now_s = START_S + 3 * DAY_S
    found = demand.choose(history_of(traffic(times, now_s), now_s), 120.0, 2.0).fitted
    calm = Recent(now_s, (now_s,) * 15, (1.0,) * len(TAUS_S), now_s)
    jumpy = Recent(now_s, (now_s,) * 15, (1.0, 1.6, 1.0, 1.0, 1.0), now_s)
    widths = [np.ptp(found.counts(now_s, recent, 1)[0]) for recent in (calm, jumpy)]
    assert widths[1] > 1.5 * widths[0]


def test_a_short_history_does_not_apply() -> None:
    with pytest.raises(NotApplicable, match="60 steps of 10 s"):
        demand.choose(history_of(traffic(poisson(1.0, 0.005), START_S + 432), START_S + 432), 60.0, 1.0)


def test_a_young_model_is_forecast_in_short_steps() -> None:
    now_s = START_S + 1800
    found = demand.choose(history_of(traffic(poisson(2.0, 0.02), now_s), now_s), 60.0, 1.0).fitted
    assert found.step_s == 10.0
    rates = tuple(2.0 * -np.expm1(-1800 / tau_s) for tau_s in TAUS_S)
    calm = Recent(now_s, (now_s,) * 15, rates, now_s)
    assert found.counts(now_s, calm, 6)[:, MEDIAN] == pytest.approx([20.0] * 6, rel=0.2)


@pytest.mark.slow
def test_statsforecast_gives_the_seasonal_part() -> None:
    times = daily(0.3, 10)
    history = history_of(traffic(times, START_S + 10 * DAY_S), START_S + 10 * DAY_S)
    found = demand.choose(history, 120.0, 2.0, FULL)
    assert "mstl" in found.scores, found.failures
    assert found.scores["mstl"].pinball < found.scores["level"].pinball * 1.05
    profile = FULL["mstl"](history)
    midnight, noon = START_S + 10 * DAY_S + 1800, START_S + 10.5 * DAY_S + 1800
    ahead = profile.at(np.asarray([midnight, noon]))
    assert ahead[1] > 5 * ahead[0]
    assert ahead[1] == pytest.approx(0.6, rel=0.25)
