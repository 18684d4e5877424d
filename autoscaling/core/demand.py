"""How much is expected: quantiles of the requests in progress over a span of the forecast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


def at_quantile(quantiles: Sequence[float], row: Sequence[float], wanted: float) -> float | None:
    """Between two quantiles a straight line, beyond the outer ones their values."""
    if len(row) != len(quantiles) or not row or not math.isfinite(sum(row)):
        return None
    if wanted <= quantiles[0]:
        return row[0]
    for i in range(1, len(row)):
        if wanted <= quantiles[i]:
            share = (wanted - quantiles[i - 1]) / (quantiles[i] - quantiles[i - 1])
            return row[i - 1] + share * (row[i] - row[i - 1])
    return row[-1]


__all__ = ["Expected", "at_quantile", "expected"]
