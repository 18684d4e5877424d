"""Jobs at several times of the day: due to the second, each for itself."""

from __future__ import annotations

import numpy as np
import pytest
from made_traffic import DAY_S, START_S, exact, fitted, poisson, quantile_s, traffic

from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.history import Floats, history_of
from autoscaling.forecast.prior import NO_FLEET
from autoscaling.forecast.timetable import Timetable

MIDNIGHT_S = START_S - START_S % DAY_S


def jobs(days: int, hours: tuple[float, ...], *, weekdays: bool = False, jitter_s: float = 0.0) -> Floats:
    """One request at each of those hours of each day; `weekdays`: Monday to Friday."""
    random = np.random.default_rng(1)
    found = [
        MIDNIGHT_S + day * DAY_S + hour * 3600 + (random.normal(0, jitter_s) if jitter_s else 0.0)
        for day in range(days)
        if not weekdays or int((MIDNIGHT_S + day * DAY_S) // DAY_S + 3) % 7 < 5
        for hour in hours
    ]
    return np.asarray(found)


@pytest.mark.parametrize("hours", [(9, 17), (8.5, 12, 18), (1, 7, 13.25, 20)])
@pytest.mark.parametrize("weekdays", [False, True])
def test_each_job_of_a_day_is_due_to_the_second(hours: tuple[float, ...], weekdays: bool) -> None:
    times = jobs(21, hours, weekdays=weekdays, jitter_s=2.0)
    for next_ in range(len(times) - 2 * len(hours), len(times)):
        due_s = float(times[next_])
        found = fitted(times[:next_], due_s - 600)
        assert abs(quantile_s(found, due_s - 600, 0.5) - 600) < 15
        assert quantile_s(found, due_s - 600, 0.1) > 560


def test_a_weekend_without_jobs_is_waited_through() -> None:
    """On Saturday morning hardly anything is foreseen, on Monday morning it is."""
    times = jobs(28, (9, 17), weekdays=True)
    friday = max(time for time in times if int(time // DAY_S + 3) % 7 == 4)
    known = times[times <= friday]
    found = fitted(known, float(known[-1]) + 600)
    saturday_s = float(known[-1]) + 16 * 3600 - 300
    assert quantile_s(found, saturday_s, 0.2) > 600
    monday_s = saturday_s + 2 * DAY_S
    assert abs(quantile_s(found, monday_s, 0.5) - 300) < 15


def test_a_job_that_is_no_more_is_given_up_within_days() -> None:
    both, one = jobs(14, (9, 17)), jobs(28, (17,))
    times = np.unique(np.concatenate([both, one]))
    now_s = MIDNIGHT_S + 28 * DAY_S + 9 * 3600 - 300
    assert quantile_s(fitted(times, now_s), now_s, 0.2) > 600


def test_who_asks_at_random_has_no_timetable() -> None:
    for rate in (1 / 3600, 1 / 600):
        times = poisson(rate, 21)
        now_s = START_S + 21 * DAY_S
        with pytest.raises(NotApplicable):
            Timetable().fit(history_of(traffic(times, now_s), now_s), NO_FLEET)


def test_its_survival_falls_whatever_is_asked() -> None:
    """From any moment, after a job or before it, late or not; and what is foreseen twice is the same."""
    times = jobs(10, (9, 17, 23.9), jitter_s=5.0)
    now_s = float(times[-1]) + 60
    history = history_of(exact(times, now_s), now_s)
    fit = Timetable().fit(history, NO_FLEET)
    recent = fitted(times, now_s).recent
    grid = np.linspace(0, 3 * DAY_S, 5000)
    for later in (0.0, 600.0, 9 * 3600 - 5.0, 9 * 3600 + 30.0, 2 * DAY_S):
        values = fit.log_survival(now_s + later, recent, grid)
        assert np.isfinite(values).all()
        assert values[0] == pytest.approx(0, abs=1e-9)
        assert (np.diff(values) <= 1e-9).all()
