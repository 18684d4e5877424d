"""Made-up traffic, as the store would keep it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoscaling.forecast.fit import FittedModel, Job, fit_standard
from autoscaling.forecast.prior import NO_FLEET, Prior
from autoscaling.traffic import LEVELS, Buckets, Traffic

Floats = NDArray[np.float64]
START_S = 1_767_571_200.0  # a Monday, 00:00 UTC
DAY_S = 86400.0


def buckets(times: Floats, step_s: float, since_s: float, now_s: float, busy_s: float = 2.0) -> Buckets:
    index, where = np.unique((times // step_s).astype(np.int64), return_inverse=True)
    keep = index >= np.floor(since_s / step_s)
    first, last = (
        np.floor(times[np.diff(where, prepend=-1) > 0]),
        np.floor(times[np.diff(where, append=-1) != 0]),
    )
    silent = [
        np.asarray(s[keep], np.uint16) for s in (first - index * step_s, (index + 1) * step_s - 1 - last)
    ]
    count = np.bincount(where, minlength=len(index)).astype(np.float32)[keep]
    zeros = np.zeros(len(count), np.float32)
    return Buckets(step_s, since_s, now_s, index[keep], count, zeros, zeros, count * busy_s, *silent)


def traffic(
    times: Sequence[float] | Floats,
    now_s: float,
    since_s: float = START_S,
    busy_s: float = 2.0,
    model: str = "m",
) -> Traffic:
    """Every arrival in every level, for as long as the level keeps."""
    seen = np.sort(np.asarray(times, np.float64))
    seen = seen[seen <= now_s]
    return Traffic(
        model,
        now_s,
        tuple(buckets(seen, step, max(since_s, now_s - kept), now_s, busy_s) for step, kept in LEVELS),
    )


def exact(times: Floats, now_s: float, since_s: float = START_S) -> Traffic:
    """All of it by the second: what happened, for judging what was forecast."""
    return Traffic("m", now_s, (buckets(times[times <= now_s], 1.0, since_s, now_s),))


def fit(
    times: Sequence[float] | Floats,
    now_s: float,
    *,
    since_s: float = START_S,
    horizon_s: float = 60.0,
    prior: Prior = NO_FLEET,
    busy_s: float = 2.0,
) -> FittedModel | None:
    return fit_standard(Job(traffic(times, now_s, since_s, busy_s), now_s, horizon_s, prior))


def fitted(times: Sequence[float] | Floats, now_s: float, **options: float) -> FittedModel:
    found = fit(times, now_s, **options)  # type: ignore[arg-type]
    assert found is not None
    return found


def poisson(rate_per_s: float, days: float, seed: int = 0) -> Floats:
    random = np.random.default_rng(seed)
    count = random.poisson(rate_per_s * days * DAY_S)
    return START_S + np.sort(random.uniform(0, days * DAY_S, count))


def daily(rate_per_s: float, days: float, seed: int = 0, depth: float = 1.0) -> Floats:
    """Poisson, whose rate swings over the day: least at 00:00 UTC, most at 12:00."""
    random = np.random.default_rng(seed)
    times = poisson(2 * rate_per_s, days, seed)
    share = 0.5 * (1 - depth * np.cos((times - START_S) / DAY_S * 2 * np.pi))
    return times[random.uniform(size=len(times)) < share]


def bursts(
    count: int, period_s: float = 180.0, length_s: float = 20.0, jitter_s: float = 2.0, seed: int = 0
) -> Floats:
    """One request a second for about `length_s`, every `period_s`."""
    random = np.random.default_rng(seed)
    parts = []
    for k in range(count):
        begin = START_S + k * period_s + random.normal(0, jitter_s)
        parts.append(begin + np.cumsum(random.exponential(1.0, int(length_s))))
    return np.concatenate(parts)


def quantile_s(fit_: FittedModel, now_s: float, share: float) -> float:
    """When, in seconds from now, the next arrival has come with that probability; the grid's end if it has not."""
    shown = fit_.forecast(now_s).next_arrival
    assert shown is not None
    return float(np.interp(-(1 - share), -np.asarray(shown.survival), shown.times_s))
