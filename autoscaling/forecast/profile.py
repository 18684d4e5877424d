"""How much comes at which time of the hour, day or week: the seasonal part of a demand forecast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.history import Floats, History

DAY_S, WEEK_S = 86400.0, 7 * 86400.0
HALF_LIFE_S = 10 * DAY_S


@dataclass(frozen=True, slots=True)
class Profile:
    """Arrivals a second over time. Periodic, or, with `period_s` None, from `start_s` on and constant outside."""

    step_s: float
    values: Floats
    start_s: float = 0.0
    period_s: float | None = None

    def at(self, times_s: Floats) -> Floats:
        """Linear between the middles of the steps."""
        place = (times_s - self.start_s) / self.step_s - 0.5
        if self.period_s is None:
            return np.asarray(np.interp(place, np.arange(len(self.values)), self.values))
        whole = np.floor(place).astype(np.int64)
        part = place - whole
        n = len(self.values)
        return np.asarray((1 - part) * self.values[whole % n] + part * self.values[(whole + 1) % n])

    def smoothed(self, tau_s: float) -> Profile:
        """The same as an average over the past, exponentially weighted: what a recent rate is compared to."""
        decay = float(np.exp(-self.step_s / tau_s))
        if len(self.values) == 1 or decay < 1e-6:
            return self
        n = len(self.values)
        turns = 1 if self.period_s is None else int(np.clip(np.ceil(5 * tau_s / self.period_s), 1, 20)) + 1
        values = np.tile(self.values, turns)
        weighted = decayed_sums(values, decay)
        weights = 1 - decay ** np.arange(1, len(values) + 1)
        means = (weighted * (1 - decay) / weights)[-n:]
        # The sum up to a step's end; `at` reads a step at its middle.
        before = np.roll(means, 1) if self.period_s is not None else np.append(means[:1], means[:-1])
        return Profile(self.step_s, (means + before) / 2, self.start_s, self.period_s)


def decayed_sums(values: Floats, decay: float, block: int = 64) -> Floats:
    """s[t] = decay * s[t-1] + values[t], in blocks, so that numpy does the work."""
    n = len(values)
    rows = -(-n // block)
    padded = np.concatenate([values, np.zeros(rows * block - n)]).reshape(rows, block)
    powers = decay ** np.arange(block)
    distance = np.subtract.outer(np.arange(block), np.arange(block))
    inside = padded @ np.where(distance >= 0, decay ** np.maximum(distance, 0), 0.0).T
    carry = 0.0
    for row in range(rows):
        inside[row] += carry * decay * powers
        carry = float(inside[row, -1])
    return np.asarray(inside.ravel()[:n])


def flat(history: History) -> Profile:
    return Profile(60.0, np.asarray([max(_mean_rate(history), 1e-9)]), period_s=60.0)


def hourly(history: History) -> Profile:
    """By minute of the hour: what timers and batch jobs make."""
    level = history.level(60.0)
    if level is None or level.step_s > 300 or level.end_s - level.start_s < 3 * 3600:
        raise NotApplicable("less than three hours are known to a few minutes")
    return _periodic(history, level.step_s, 3600.0, smooth_s=0.0, half_life_s=DAY_S)


def daily(history: History) -> Profile:
    if history.now_s - history.since_s < 2 * DAY_S:
        raise NotApplicable("less than two days are known")
    return _periodic(history, 300.0, DAY_S, smooth_s=900.0)


def daily_hourly(history: History) -> Profile:
    """By time of day, times minute of the hour: what jobs on the hour add to what people do."""
    base = daily(history)
    level = history.level(60.0)
    if level is None or level.step_s > 60 or level.end_s - level.start_s < DAY_S:
        raise NotApplicable("less than a day is known to the minute")
    last = int(history.now_s // level.step_s)
    first = max(int(level.start_s // level.step_s) + 1, last - int(2 * DAY_S // level.step_s))
    minutes = np.arange(first, last)
    expected = np.bincount(minutes % 60, base.at((minutes + 0.5) * level.step_s) * level.step_s, 60)
    keep = (level.index >= first) & (level.index < last)
    seen = np.bincount(level.index[keep] % 60, level.arrivals[keep], 60)
    strength = float(expected.mean()) / 24
    factor = (seen + strength) / (expected + strength)
    middle_s = (np.arange(1440) + 0.5) * 60.0
    return Profile(
        60.0, np.maximum(base.at(middle_s) * np.tile(factor / factor.mean(), 24), 1e-9), 0.0, DAY_S
    )


def weekly(history: History) -> Profile:
    if history.now_s - history.since_s < 2 * WEEK_S:
        raise NotApplicable("less than two weeks are known")
    base = daily(history)
    return _periodic(history, 300.0, WEEK_S, smooth_s=1800.0, prior=base)


def _mean_rate(history: History) -> float:
    tau = 2 * DAY_S
    events = history.events
    known_s = max(history.now_s - history.since_s, 60.0)
    weight = np.exp(-(history.now_s - events.mid_s) / tau)
    return float((weight * events.count).sum() / (tau * -np.expm1(-known_s / tau)))


def _periodic(
    history: History,
    step_s: float,
    period_s: float,
    *,
    smooth_s: float,
    prior: Profile | None = None,
    half_life_s: float = HALF_LIFE_S,
) -> Profile:
    """Mean rates by step of the period, recent periods weighing more, smoothed and shrunk to the level above."""
    level = history.level(step_s)
    if level is None:
        raise NotApplicable(f"nothing is known in steps of {step_s:g} s or more")
    step_s = level.step_s
    bins = round(period_s / step_s)
    if bins < 2:
        raise NotApplicable(f"buckets of {step_s:g} s are too long for a period of {period_s:g} s")
    last = int(history.now_s // step_s)
    first = max(int(level.start_s // step_s) + 1, last - int(8 * WEEK_S // step_s))
    steps = np.arange(first, last)
    weight = 0.5 ** ((last - steps) * step_s / half_life_s)
    known = np.bincount(steps % bins, weight, bins)
    keep = (level.index >= first) & (level.index < last)
    index = level.index[keep]
    seen = np.bincount(index % bins, level.arrivals[keep] * weight[index - first], bins)
    width = smooth_s / step_s
    if width > 0.5:
        seen, known = _circular(seen, width), _circular(known, width)
    mean = float(seen.sum() / max(known.sum() * step_s, 1e-9))
    base = np.full(bins, mean) if prior is None else prior.at((np.arange(bins) + 0.5) * step_s)
    strength = 1.0
    return Profile(
        step_s, np.maximum((seen / step_s + strength * base) / (known + strength), 1e-9), 0.0, period_s
    )


def _circular(values: Floats, width: float) -> Floats:
    n = len(values)
    distance = np.minimum(np.arange(n), n - np.arange(n))
    kernel = np.exp(-0.5 * (distance / width) ** 2)
    smoothed = np.fft.irfft(np.fft.rfft(values) * np.fft.rfft(kernel / kernel.sum()), n)
    return np.asarray(np.maximum(smoothed, 0.0))
