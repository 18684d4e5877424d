"""When in the week a model is active, and the clock that runs faster then."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoscaling.forecast.history import Floats, History

WEEK_S = 7 * 86400.0
HOURS = 168
ACTIVE_S = 300.0
HALF_LIFE_S = 14 * 86400.0
MAX_DAYS = 56


@dataclass(frozen=True, slots=True)
class Season:
    """Relative activity by hour of the week (UTC, from Thursday 00:00, as Unix time does), mean 1.

    `elapsed` is the clock of the time-rescaling theorem (Brown et al. 2002, Neural Computation 14): a process with the
    intensity season(t) * hazard(age on that clock) is a renewal process on it (Berman 1981, Biometrika 68). The night
    of a model that sleeps at night then hardly counts as silence.
    """

    weights: Floats
    cumulative: Floats
    """Shape (HOURS + 1,): seconds of that clock since the week began."""

    @staticmethod
    def of(weights: Floats) -> Season:
        weights = np.maximum(weights, 1e-3)
        weights = weights / weights.mean()
        return Season(weights, np.concatenate([[0.0], np.cumsum(weights)]) * 3600.0)

    def elapsed(self, times_s: Floats) -> Floats:
        """Seconds on the clock at those Unix times."""
        weeks = np.floor_divide(times_s, WEEK_S)
        hours = (times_s - weeks * WEEK_S) / 3600.0
        whole = np.minimum(hours.astype(np.int64), HOURS - 1)
        into = self.cumulative[whole] + (hours - whole) * 3600.0 * self.weights[whole]
        return np.asarray(weeks * self.cumulative[-1] + into)


FLAT = Season.of(np.ones(HOURS))


def activity(history: History) -> tuple[Floats, Floats]:
    """(active, known) by hour of the week, shape (HOURS,) each, recent weeks weighing more.

    Active: in how many 5-minute spans something came. Arrivals themselves would let one burst pass for a season.
    """
    now_s = history.now_s
    first = int(max(history.since_s, now_s - MAX_DAYS * 86400.0) // 3600)
    last = int(now_s // 3600)
    hours = np.arange(first, last + 1)
    weight = 0.5 ** ((now_s - hours * 3600.0) / HALF_LIFE_S)
    spans = np.minimum(hours * 3600.0 + 3600.0, now_s) - np.maximum(hours * 3600.0, history.since_s)
    known = np.bincount(hours % HOURS, weight * np.clip(spans / 3600.0, 0, 1), HOURS)
    lo = history.events.lo_s
    spans_seen = np.unique((lo[lo >= first * 3600.0] // ACTIVE_S).astype(np.int64))
    seen_hours = spans_seen // int(3600 / ACTIVE_S)
    seen_weight = 0.5 ** ((now_s - seen_hours * 3600.0) / HALF_LIFE_S)
    active = np.bincount(seen_hours % HOURS, seen_weight, HOURS)
    return active, known


def season_of(active: Floats, known: Floats, fleet: Floats | None = None) -> Season:
    """The season, shrunk towards the fleet's (relative activity, shape (HOURS,)) where little is known.

    Hour of the day, then day of the week, then single hours of the week, each by the posterior mean of a Poisson rate
    with a gamma prior around the level above; hours of the day are smoothed over their neighbours.
    """
    prior = np.ones(HOURS) if fleet is None else fleet / max(fleet.mean(), 1e-9)
    total, known_total = active.sum(), known.sum()
    if total <= 0 or known_total < 24:
        return Season.of(prior)
    expected = prior * known
    expected *= total / max(expected.sum(), 1e-9)
    by_hour = _shrunk(_smooth(_daily(active)), _smooth(_daily(expected)), 3.0)
    weights = prior * np.tile(by_hour, 7)
    if known_total >= 10 * 24:
        expected = weights * known
        expected *= total / max(expected.sum(), 1e-9)
        weights = weights * np.repeat(_shrunk(_weekly(active), _weekly(expected), 10.0), 24)
        expected = weights * known
        expected *= total / max(expected.sum(), 1e-9)
        weights = weights * _shrunk(active, expected, 12.0)
    return Season.of(weights)


def _shrunk(seen: Floats, expected: Floats, strength: float) -> Floats:
    return (seen + strength) / (expected + strength)


def _daily(by_week: Floats) -> Floats:
    return np.asarray(by_week.reshape(7, 24).sum(axis=0))


def _weekly(by_week: Floats) -> Floats:
    return np.asarray(by_week.reshape(7, 24).sum(axis=1))


def _smooth(by_hour: Floats) -> Floats:
    return np.asarray(0.5 * by_hour + 0.25 * (np.roll(by_hour, 1) + np.roll(by_hour, -1)))
