"""Bursts that begin at a fixed interval: timers, cron jobs, on/off patterns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoscaling.forecast.arrivals import ArrivalBase, FittedRenewal, Renewal
from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.history import THETAS_S, Floats, History, Recent, clipped, onset_times
from autoscaling.forecast.prior import Prior

LOOK_BACK = 64
MISSES = 4
TOLERANCE = 0.1
MIN_QUALITY = np.log(4.0)


@dataclass(frozen=True, slots=True)
class Rhythm:
    """The interval between the beginnings of bursts, a burst being what follows `theta_s` of silence."""

    theta: int
    """Index into THETAS_S."""
    period_s: float
    spread_s: float
    """Scale of the logistic distribution around the period."""
    miss: float
    """The chance that a beat is left out."""
    irregular: float
    """The chance that the next burst keeps to no beat."""
    quality: float


@dataclass(frozen=True, slots=True)
class FittedTimer(ArrivalBase):
    """Within a burst the renewal process rules; after `theta_s` of silence, the time since the burst began does."""

    name: str
    rhythm: Rhythm
    within: FittedRenewal

    def log_survival(self, now_s: float, recent: Recent, times_s: Floats) -> Floats:
        theta_s = THETAS_S[self.rhythm.theta]
        age = max(0.0, now_s - recent.last_s)
        since = max(0.0, now_s - recent.onsets_s[self.rhythm.theta])
        switch = max(0.0, theta_s - age)
        ages = since + np.maximum(times_s, switch)
        values = np.log(self._survival(np.concatenate([[since + switch], ages])))
        result = values[1:] - values[0]
        if switch > 0:
            result = result + self.within.log_survival(now_s, recent, np.minimum(times_s, switch))
        return np.asarray(result)

    def _survival(self, ages: Floats) -> Floats:
        rhythm = self.rhythm
        beats = np.arange(1, MISSES + 1)
        spread = rhythm.spread_s * np.sqrt(beats)
        z = (ages[:, None] - beats * rhythm.period_s) / spread
        # 1 - logistic(z), without its overflow
        not_yet = 0.5 - 0.5 * np.tanh(clipped(z, -60, 60) / 2)
        chance = (1 - rhythm.miss) * rhythm.miss ** (beats - 1)
        kept = not_yet @ chance + rhythm.miss**MISSES
        loose = 1.0 / (1.0 + ages / rhythm.period_s)
        return np.asarray(np.maximum((1 - rhythm.irregular) * kept + rhythm.irregular * loose, 1e-12))

    def extra_times(self, now_s: float, recent: Recent) -> Floats:
        since = now_s - recent.onsets_s[self.rhythm.theta]
        first = max(1, int(np.floor(since / self.rhythm.period_s)))
        beats = np.arange(first, first + 2)[:, None]
        around = self.rhythm.spread_s * np.asarray([-9, -6, -4, -3, -2, -1.0, -0.5, 0, 0.5, 1, 2, 3, 4, 6, 9])
        theta_s = THETAS_S[self.rhythm.theta] - (now_s - recent.last_s)
        return np.append((beats * self.rhythm.period_s - since + around * np.sqrt(beats)).ravel(), theta_s)


@dataclass(frozen=True, slots=True)
class Timer:
    name: str = "timer"

    def fit(self, history: History, prior: Prior) -> FittedTimer:
        rhythm = rhythm_of(history)
        if rhythm is None:
            raise NotApplicable("bursts keep to no interval")
        return FittedTimer(self.name, rhythm, Renewal().fit(history, prior))


def rhythm_of(history: History) -> Rhythm | None:
    """The most regular beginning of bursts over the possible silences between them, None if none is regular."""
    events = history.events
    if len(events) < 3:
        return None
    events = events.part(slice(-2000, None))
    first, blur = events.first_s, events.blur_s
    onsets = onset_times(events)
    found: list[Rhythm] = []
    before = -1
    for theta in range(len(THETAS_S)):
        beginning = np.flatnonzero(onsets[theta] == first)
        if len(beginning) < 3:
            break
        if len(beginning) == before and found:
            # The same bursts: a silence in the middle of those that separate them is the safest.
            found.append(found[-1])
            continue
        before = len(beginning)
        rhythm = _beat(theta, first[beginning], blur[beginning])
        if rhythm is not None:
            found.append(rhythm)
    if not found:
        return None
    best = max(found, key=lambda rhythm: rhythm.quality)
    same = [i for i, rhythm in enumerate(found) if rhythm is best]
    theta = min(best.theta + (len(same) - 1) // 2, len(THETAS_S) - 1)
    return Rhythm(theta, best.period_s, best.spread_s, best.miss, best.irregular, best.quality)


def _beat(theta: int, onsets: Floats, step: Floats) -> Rhythm | None:
    onsets, step = onsets[-LOOK_BACK:], step[-LOOK_BACK:]
    intervals = np.diff(onsets)
    blur = np.maximum(step[1:], step[:-1])
    n = len(intervals)
    # What is known to the second counts more than what is known to the minute.
    weight = 0.5 ** (np.arange(n)[::-1] / 16.0) / (1.0 + blur / _median(intervals) * 50)
    period = _weighted_median(intervals, weight)
    for _ in range(2):
        beats = clipped((intervals / period).round(), 1, MISSES)
        off = intervals - beats * period
        near = np.abs(off) <= np.maximum(TOLERANCE * period, blur)
        nearly = weight * near
        total = nearly.sum()
        if not total:
            return None
        period += float((nearly * off / beats).sum() / total)
    kept = float(total / weight.sum())
    counted, away = weight[near], off[near]
    known = counted.sum()
    effective = float(known**2 / (counted**2).sum())
    rms = float(np.sqrt((counted * away**2).sum() / known))
    blurred_s = _median(blur[near])
    if blurred_s > rms / 2:
        # What the buckets' edges add to an interval is known; what is left is the rhythm's, or chance.
        deviation = float(np.sqrt(max(rms**2 * (1 + 2 * np.sqrt(2 / effective)) - blurred_s**2 / 6, 0.0)))
    else:
        deviation = max(1.4826 * _weighted_median(np.abs(away), counted), rms / 2)
    # Equal readings from coarse buckets bound the jitter by the chance that none crossed an edge.
    floor = max(0.5, blurred_s * min(0.29, 1.0 / effective))
    deviation = max(deviation, floor) * (1 + 2.0 / effective)
    quality = kept * float(np.log(period / deviation))
    if quality < MIN_QUALITY:
        return None
    missed = float((nearly * (beats > 1)).sum() / total)
    return Rhythm(
        theta=theta,
        period_s=float(period),
        spread_s=deviation * np.sqrt(3) / np.pi,
        miss=(missed * effective + 0.1) / (effective + 1),
        irregular=((1 - kept) * n + 0.5) / (n + 2),
        quality=quality,
    )


def _median(values: Floats) -> float:
    """As numpy's, of some dozen values, in a fifth of the time."""
    ordered = np.sort(values)
    middle = len(ordered) // 2
    return float(ordered[middle]) if len(ordered) % 2 else float((ordered[middle - 1] + ordered[middle]) / 2)


def _weighted_median(values: Floats, weight: Floats) -> float:
    order = np.argsort(values)
    cumulative = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(cumulative, cumulative[-1] / 2)])
