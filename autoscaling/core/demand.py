"""How much is expected: quantiles of the requests in progress over a span of the forecast."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from autoscaling.core.types import Demand

SNAP = 1e-6
"""Share of a step within which a moment counts as the next step's beginning: Unix times as floats are not exact."""


@dataclass(frozen=True, slots=True)
class Expected:
    """The most that a quantile reaches within a span, and when the span takes in or leaves behind a step."""

    concurrency: float
    until_s: float


def expected(demand: Demand | None, quantile: float, now_s: float, ahead_s: float) -> Expected | None:
    """Over [now_s, now_s + ahead_s]. None if the forecast does not say: it ended, or its numbers are broken."""
    if demand is None or not math.isfinite(demand.made_s) or not (0 < demand.step_s < math.inf):
        return None
    rows = demand.concurrency
    since = (now_s - demand.made_s) / demand.step_s + SNAP
    first = max(0, math.floor(since))
    last = max(0, math.floor(since + ahead_s / demand.step_s))
    if first >= len(rows):
        return None
    most = 0.0
    for row in rows[first : last + 1]:
        value = at_quantile(demand.quantiles, row, quantile)
        if value is None:
            return None
        most = max(most, value)
    leaves_s = demand.made_s + (first + 1) * demand.step_s
    enters_s = demand.made_s + (last + 1) * demand.step_s - ahead_s if last + 1 < len(rows) else math.inf
    return Expected(most, min(leaves_s, enters_s))


def service_s(demand: Demand, now_s: float) -> float | None:
    """How long a request is expected to hold its place, by Little's law from the medians; None if they don't say."""
    rows = zip(demand.rate_per_s, demand.concurrency, strict=False)
    at = max(0, math.floor((now_s - demand.made_s) / demand.step_s + SNAP))
    for rates, busy in list(rows)[at : at + 1]:
        rate, load = at_quantile(demand.quantiles, rates, 0.5), at_quantile(demand.quantiles, busy, 0.5)
        if rate is not None and load is not None and rate > 0 and load > 0:
            return load / rate
    return None


def at_quantile(quantiles: Sequence[float], row: Sequence[float], wanted: float) -> float | None:
    """Between two quantiles, and above the highest, as if normally distributed there; below the lowest its value."""
    count = len(quantiles)
    if len(row) != count or not row or not math.isfinite(sum(row)):
        return None
    if wanted <= quantiles[0] or count == 1:
        return row[0]
    places = _places(tuple(quantiles))
    place = _place(wanted)
    i = min(bisect.bisect_left(quantiles, wanted), count - 1)
    share = (place - places[i - 1]) / (places[i] - places[i - 1])
    return row[i - 1] + share * (row[i] - row[i - 1])


@lru_cache(maxsize=64)
def _places(quantiles: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(map(_place, quantiles))


@lru_cache(maxsize=256)
def _place(quantile: float) -> float:
    """In standard deviations from the mean of a normal distribution."""
    return NormalDist().inv_cdf(min(max(quantile, 1e-9), 1 - 1e-9))


__all__ = ["Expected", "at_quantile", "expected", "service_s"]
