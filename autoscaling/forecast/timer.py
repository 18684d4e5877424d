"""Bursts that begin at a fixed interval: timers, cron jobs, on/off patterns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from autoscaling.forecast.arrivals import ArrivalBase, FittedRenewal, Renewal
from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.history import THETAS_S, Floats, History, Recent, clipped, onset_times
from autoscaling.forecast.prior import Prior

LOOK_BACK = 64
MISSES = 4
NESTED = 2
"""Rhythms at most: every three hours in the daytime is one within one."""
TOLERANCE = 0.1
USUAL = 0.8
"""Of how many of the latest intervals the scatter is that which is usual."""
FAR, FAR_S = 4.0, 2.0
"""How many times that, and how many seconds more, is not the beat's scatter any more, but another beat: one run that
was late, or a clock set to summer time, says nothing of how sharp the others are."""
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
    """Within a burst `within` rules; after `theta_s` of silence, the time since the burst began does."""

    name: str
    rhythm: Rhythm
    within: FittedRenewal | FittedTimer
    """The renewal process, or the rhythm of the shorter bursts that a longer one is made of."""

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
        times = np.append((beats * self.rhythm.period_s - since + around * np.sqrt(beats)).ravel(), theta_s)
        return np.append(times, self.within.extra_times(now_s, recent))


@dataclass(frozen=True, slots=True)
class Timer:
    name: str = "timer"

    def fit(self, history: History, prior: Prior) -> FittedTimer:
        found = rhythms_of(history)
        if not found:
            raise NotApplicable("bursts keep to no interval")
        fitted: FittedRenewal | FittedTimer = Renewal().fit(history, prior)
        for rhythm in reversed(found):
            fitted = FittedTimer(self.name, rhythm, fitted)
        assert isinstance(fitted, FittedTimer)
        return fitted


def rhythms_of(history: History) -> list[Rhythm]:
    """The most regular beginning of bursts over the possible silences between them; and that of the shorter bursts
    within those, where they have one. Empty where nothing is regular."""
    events = history.events
    if len(events) < 3:
        return []
    events = events.part(slice(-2000, None))
    first, blur = events.first_s, events.blur_s
    onsets = onset_times(events)
    found: list[tuple[Rhythm, int]] = []
    """Each with the last of THETAS_S that tells the same bursts apart."""
    before, same = -1, False
    for theta in range(len(THETAS_S)):
        beginning = np.flatnonzero(onsets[theta] == first)
        if len(beginning) < 3:
            break
        if len(beginning) == before:
            if same:
                found[-1] = found[-1][0], theta
            continue
        before = len(beginning)
        rhythm = _beat(theta, first[beginning], blur[beginning])
        same = rhythm is not None
        if rhythm is not None:
            found.append((rhythm, theta))
    chosen: list[Rhythm] = []
    for _ in range(NESTED):
        if not found:
            break
        at = max(range(len(found)), key=lambda i: found[i][0].quality)
        rhythm, last = found[at]
        # A silence in the middle of those that tell these bursts apart is the safest.
        chosen.append(replace(rhythm, theta=(rhythm.theta + last) // 2))
        found = found[:at]
    return chosen


def _beat(theta: int, onsets: Floats, step: Floats) -> Rhythm | None:
    onsets, step = onsets[-LOOK_BACK:], step[-LOOK_BACK:]
    intervals = np.diff(onsets)
    blur = np.maximum(step[1:], step[:-1])
    n = len(intervals)
    # What is known to the second counts more than what is known to the minute.
    weight = 0.5 ** (np.arange(n)[::-1] / 16.0) / (1.0 + blur / _median(intervals) * 50)
    period = _weighted_quantile(intervals, weight, 0.5)
    for _ in range(2):
        beats = clipped((intervals / period).round(), 1, MISSES)
        off = intervals - beats * period
        usual = FAR * _weighted_quantile(np.abs(off), weight, USUAL) + FAR_S
        near = np.abs(off) <= np.maximum(np.minimum(TOLERANCE * period, usual), blur)
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
        deviation = max(1.4826 * _weighted_quantile(np.abs(away), counted, 0.5), rms / 2)
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


def _weighted_quantile(values: Floats, weight: Floats, share: float) -> float:
    order = np.argsort(values)
    cumulative = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(cumulative, cumulative[-1] * share)])
