"""When the next request comes: forecasters of the time until it, given how long nothing has come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from autoscaling.core.types import Forecast, NextArrival
from autoscaling.forecast import gaps
from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.gaps import EDGES_S, GapSample, log_survival
from autoscaling.forecast.history import Events, Floats, History, Recent
from autoscaling.forecast.prior import Prior
from autoscaling.forecast.season import FLAT, Season, activity, season_of

HORIZON_S = 48 * 3600.0
GRID_S: Floats = np.concatenate([np.arange(10.0), np.geomspace(10.0, HORIZON_S, 150)])
"""Seconds from now: every second at first, then in steps of 7 %."""
MAX_EVENTS = 4000
MIN_SILENCE_S = 10.0
STRENGTH = 2.0
"""Pseudo-gaps of the fleet's distribution that every model starts with."""
RECENT_STRENGTH = 4.0


class ArrivalFitted(Protocol):
    @property
    def name(self) -> str: ...

    def log_survival(self, now_s: float, recent: Recent, times_s: Floats) -> Floats:
        """log P(nothing until now_s + times_s | nothing since recent.last_s until now_s); times ascend from >= 0."""
        ...

    def extra_times(self, now_s: float, recent: Recent) -> Floats:
        """Seconds from now at which the survival bends more sharply than the grid shows."""
        ...

    def forecast(self, now_s: float, recent: Recent | None) -> Forecast: ...


def next_arrival(fitted: ArrivalFitted, now_s: float, recent: Recent) -> NextArrival:
    """On a grid that is fine where it matters, from 0 to 48 h."""
    times, survival = survival_grid(fitted, now_s, recent)
    return NextArrival(now_s, tuple(times.tolist()), tuple(survival.tolist()))


class Later(NextArrival):
    """The same, worked out when it is looked at: mostly it is not, since a model with requests has none to wait for."""

    __slots__ = ("_fitted", "_known", "_recent")
    _fitted: ArrivalFitted
    _known: tuple[Floats, Floats] | None
    _recent: Recent

    def __init__(self, fitted: ArrivalFitted, now_s: float, recent: Recent) -> None:
        put = object.__setattr__
        put(self, "made_s", now_s)
        put(self, "_fitted", fitted)
        put(self, "_recent", recent)
        put(self, "_known", None)

    @property
    def arrays(self) -> tuple[Floats, Floats]:
        """(times_s, survival), shape (n,) each."""
        known = self._known
        if known is None:
            known = survival_grid(self._fitted, self.made_s, self._recent)
            object.__setattr__(self, "_known", known)
        return known

    @property
    def end_s(self) -> float:
        # Where every grid ends: to say so nothing needs to be worked out.
        return self.made_s + HORIZON_S

    @property
    def times_s(self) -> tuple[float, ...]:
        return tuple(self.arrays[0].tolist())

    @property
    def survival(self) -> tuple[float, ...]:
        return tuple(self.arrays[1].tolist())


def survival_grid(fitted: ArrivalFitted, now_s: float, recent: Recent) -> tuple[Floats, Floats]:
    """(times_s, survival), ascending from 0 and descending from 1."""
    times = GRID_S
    extra = fitted.extra_times(now_s, recent)
    if len(extra):
        times = np.unique(np.concatenate([times, extra[(extra > 0) & (extra < HORIZON_S)].round(3)]))
    survival = np.exp(np.minimum(fitted.log_survival(now_s, recent, times), 0.0))
    survival[0] = 1.0
    return times, np.minimum.accumulate(survival)


NO_TIMES: Floats = np.zeros(0)


class ArrivalBase:
    """What the fitted forecasters of the next arrival have in common."""

    def extra_times(self, now_s: float, recent: Recent) -> Floats:
        return NO_TIMES

    def forecast(self: ArrivalFitted, now_s: float, recent: Recent | None) -> Forecast:
        if recent is None:
            return Forecast(now_s, self.name)
        return Forecast(now_s, self.name, next_arrival=next_arrival(self, now_s, recent))


# The naive one


@dataclass(frozen=True, slots=True)
class FittedPoisson(ArrivalBase):
    """A rate that is a gamma variable: the survival is Lomax's."""

    name: str
    shape: float
    exposure_s: float

    def log_survival(self, now_s: float, recent: Recent, times_s: Floats) -> Floats:
        return -self.shape * np.log1p(times_s / self.exposure_s)


@dataclass(frozen=True, slots=True)
class Poisson:
    """Arrivals without memory, at the mean rate of the last days: the baseline."""

    name: str = "poisson"
    half_life_s: float = 2 * 86400.0

    def fit(self, history: History, prior: Prior) -> FittedPoisson:
        tau = self.half_life_s / np.log(2)
        weight = np.exp(-(history.now_s - history.events.mid_s) / tau)
        known_s = max(1.0, history.now_s - history.since_s)
        exposure_s = tau * -np.expm1(-known_s / tau)
        return FittedPoisson(self.name, 0.5 + float((weight * history.events.count).sum()), float(exposure_s))


# Renewal: the hazard depends on the age of the silence


@dataclass(frozen=True, slots=True)
class FittedRenewal(ArrivalBase):
    name: str
    log_survival_at_edges: Floats
    season: Season

    def log_survival(self, now_s: float, recent: Recent, times_s: Floats) -> Floats:
        if self.season is FLAT:
            age = max(0.0, now_s - recent.last_s)
            if len(times_s) and times_s[0] == 0.0:
                # As grids begin: the first is the age itself.
                values = np.interp(age + times_s, EDGES_S, self.log_survival_at_edges)
                return np.asarray(values - values[0])
            ages = age + times_s
        else:
            clock = self.season.elapsed(np.concatenate([[min(recent.last_s, now_s), now_s], now_s + times_s]))
            age = clock[1] - clock[0]
            ages = clock[2:] - clock[0]
        values = np.interp(np.concatenate([[age], ages]), EDGES_S, self.log_survival_at_edges)
        return np.asarray(values[1:] - values[0])

    def __reduce__(self) -> tuple[object, ...]:
        flat = self.season is FLAT
        return _renewal, (
            self.name,
            self.log_survival_at_edges.astype(np.float32),
            None if flat else self.season,
        )


def _renewal(name: str, at_edges: Floats, season: Season | None) -> FittedRenewal:
    return FittedRenewal(name, np.asarray(at_edges, np.float64), FLAT if season is None else season)


@dataclass(frozen=True, slots=True)
class Renewal:
    """hazard(t) = season(t) * shape(age), the age being measured on the season's clock.

    The shape is a smoothed self-consistent estimate (gaps.gap_mass), recent gaps weighing more, shrunk to the fleet's.
    With `by_gaps`, the last so many silences weigh most, however long they took, and the shape is shrunk to the
    model's own over the long run: for patterns that have just begun.
    """

    name: str = "renewal"
    seasonal: bool = False
    half_life_s: float = 7 * 86400.0
    by_gaps: int | None = None

    def fit(self, history: History, prior: Prior) -> FittedRenewal:
        season = FLAT
        if self.seasonal:
            if history.now_s - history.since_s < 2 * 86400.0:
                raise NotApplicable("less than two days are known")
            season = season_of(*activity(history), prior.season)
        mass = self.mass(history, prior, season)
        if self.by_gaps is not None:
            mass = self._recent(history, mass)
        return FittedRenewal(self.name, log_survival(mass), season)

    def mass(self, history: History, prior: Prior, season: Season) -> Floats:
        """Of the gaps on the season's clock, by age bin (see gaps.gap_mass)."""
        if season is not FLAT:
            return self._mass(history, prior, season)
        key = ("mass", self.half_life_s, id(prior.gaps))
        return history.once(key, lambda: self._mass(history, prior, season))

    def _mass(self, history: History, prior: Prior, season: Season) -> Floats:
        events = _latest(history.events, MAX_EVENTS)
        weight = 0.5 ** ((history.now_s - events.mid_s) / self.half_life_s)
        sample = gaps_of(events, weight, season)
        return gaps.gap_mass(sample, prior.gaps, STRENGTH, _silence(history, season))

    def _recent(self, history: History, own: Floats) -> Floats:
        events = _latest(history.events, MAX_EVENTS // 4)
        silent = np.append(idle(events), False)
        behind = silent[::-1].cumsum()[::-1]
        if not behind.size or behind[0] < 3:
            raise NotApplicable("fewer than three silences are known")
        assert self.by_gaps is not None
        sample = gaps_of(events, 0.5 ** (behind / self.by_gaps), FLAT)
        return gaps.gap_mass(sample, own, RECENT_STRENGTH, _silence(history, FLAT))


def _silence(history: History, season: Season) -> float | None:
    if not len(history.events):
        return None
    ends = season.elapsed(np.asarray([history.events.hi_s[-1], history.now_s]))
    return float(ends[1] - ends[0])


def _latest(events: Events, most: int) -> Events:
    return events.part(slice(-most, None))


def idle(events: Events) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether the gap after each event but the last is a silence, shape (n - 1,): it reached `silent_from`."""
    return np.asarray(events.lo_s[1:] >= silent_from(events)[:-1])


def silent_from(events: Events) -> Floats:
    """When a silence after each event can be told from a burst that goes on: after ten seconds, where its beginning is
    blurred after as much again, and not before its bucket ended: of those that were over by then none is seen."""
    return np.asarray(
        np.maximum(np.maximum(events.hi_s + events.blur_s, events.last_s + MIN_SILENCE_S), events.end_s)
    )


def gaps_of(events: Events, weight: Floats, season: Season) -> GapSample:
    """Gaps between buckets, and those between the arrivals of one: shorter than it, more is not known."""
    mid = events.mid_s
    step = events.hi_s - events.lo_s
    blur = events.blur_s
    lo = np.maximum(events.lo_s[1:] - events.hi_s[:-1], 0.0)
    hi = (events.lo_s + blur)[1:] - (events.hi_s - blur)[:-1]
    if season is not FLAT and len(mid):
        scale = np.diff(season.elapsed(mid)) / np.maximum(np.diff(mid), 1e-3)
        lo, hi = lo * scale, hi * scale
    within = np.maximum(np.round(events.count) - 1, 0.0) * weight
    return GapSample(
        np.concatenate([lo, np.zeros(len(step))]),
        np.concatenate([hi, np.maximum(step, 1e-3)]),
        np.concatenate([weight[1:], np.minimum(within, 100.0)]),
    )


def batch_size(history: History, within_s: float = 5.0) -> float:
    """Mean arrivals in the first `within_s` seconds of a burst, at least 1, the latest bursts weighing more.

    What comes in an event comes evenly over it. Where its first and last request are not known, the burst is taken to
    begin anywhere in the bucket and to go on to its end, so that it shows only its mean rate.
    """
    events = _latest(history.events, 1000)
    if not len(events):
        return 1.0
    starts = np.flatnonzero(np.append(True, idle(events)))[-50:]
    total = np.concatenate([[0.0], np.cumsum(events.count)])
    span_s = np.maximum(events.hi_s - events.lo_s, 1e-9)
    others = np.maximum(events.count - 1, 0)
    until_s = events.lo_s[starts] + within_s
    last = np.searchsorted(events.lo_s, until_s) - 1
    of_last = 1 + others[last] * np.minimum(1.0, (until_s - events.lo_s[last]) / span_s[last])
    blurred = events.blur_s[starts] > within_s
    mean = 1 + others[starts] * np.minimum(1.0, within_s / (span_s[starts] / 2))
    sizes = np.where(blurred, mean, total[last] - total[starts] + of_last)
    weight = 0.5 ** (np.arange(len(starts))[::-1] / 10.0) * np.where(blurred, 0.2, 1.0)
    return max(1.0, float(((weight * sizes).sum() + 1.0) / (weight.sum() + 1.0)))
