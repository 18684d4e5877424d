"""The next arrival as a curve: survival with piecewise constant hazard, in absolute time."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from autoscaling.core.types import Demand, Forecast, NextArrival

LEAST = 1e-9
"""A smaller chance of no arrival counts as none, so that hazards stay finite."""


@dataclass(frozen=True, slots=True)
class Curve:
    """P(no request until t), not conditioned on the present. Beyond the last time it stays what it was.

    All have shape (n,); `hazards[i]` and `areas[i]` belong to [times[i], times[i+1]).
    """

    times: tuple[float, ...]
    """Unix seconds, ascending."""
    survival: tuple[float, ...]
    hazards: tuple[float, ...]
    """Per second; the last one is 0."""
    areas: tuple[float, ...]
    """The integral of the survival from times[0] to times[i], in seconds."""

    @property
    def end_s(self) -> float:
        return self.times[-1]

    def at(self, time_s: float) -> float:
        """P(no request until `time_s`)."""
        times = self.times
        if time_s <= times[0]:
            return self.survival[0]
        i = bisect.bisect_right(times, time_s) - 1
        return self.survival[i] * math.exp(-self.hazards[i] * (time_s - times[i]))

    def along(self, times_s: Iterable[float]) -> tuple[list[float], list[float]]:
        """Survival and its integral from times[0] at ascending times, none before times[0]."""
        times, survival, hazards, areas = self.times, self.survival, self.hazards, self.areas
        last = len(times) - 1
        i = 0
        alive: list[float] = []
        area: list[float] = []
        for time_s in times_s:
            while i < last and times[i + 1] <= time_s:
                i += 1
            since_s = time_s - times[i]
            rate, held = hazards[i], survival[i]
            if rate * since_s > 1e-12:
                here = held * math.exp(-rate * since_s)
                area.append(areas[i] + (held - here) / rate)
            else:
                here = held
                area.append(areas[i] + held * since_s)
            alive.append(here)
        return alive, area

    def quantile_s(self, share: float, now_s: float) -> float | None:
        """When that share of the chance left at `now_s` (0 to 1) has come; None if that is beyond the end."""
        wanted = self.at(now_s) * (1.0 - share)
        if wanted < self.survival[-1]:
            return None
        return self.when_s(max(wanted, LEAST * LEAST))

    def when_s(self, survival: float) -> float:
        """When the survival has fallen to that value; the last time if it never does."""
        held = self.survival
        low, high = 0, len(held) - 1
        while low < high:
            middle = (low + high) // 2
            if held[middle] > survival:
                low = middle + 1
            else:
                high = middle
        if low == 0 or held[low] > survival:
            return self.times[low]
        i = low - 1
        return min(self.times[i] + math.log(held[i] / survival) / self.hazards[i], self.times[low])


def curve_of(forecast: Forecast | None, now_s: float) -> Curve | None:
    """What the forecast says of the next arrival; where it speaks of demand only, what follows from its mean rate.

    None if it says nothing, is broken (not finite, not in order), has ended before `now_s`, or leaves no
    chance that the request has not come by now.
    """
    if forecast is None:
        return None
    curve = _from_arrival(forecast.next_arrival) if forecast.next_arrival is not None else None
    if curve is None and forecast.demand is not None:
        curve = _from_demand(forecast.demand)
    if curve is None or now_s >= curve.end_s or curve.at(now_s) <= LEAST:
        return None
    return curve


def build(times: Sequence[float], survival: Sequence[float]) -> Curve:
    """A curve through those points. Times ascend, survival does not, and stays above 0."""
    hazards: list[float] = []
    areas = [0.0]
    for i in range(len(times) - 1):
        step_s = times[i + 1] - times[i]
        a, b = survival[i], survival[i + 1]
        rate = math.log(a / b) / step_s if b < a else 0.0
        hazards.append(rate)
        areas.append(areas[-1] + ((a - b) / rate if rate * step_s > 1e-12 else a * step_s))
    hazards.append(0.0)
    return Curve(tuple(times), tuple(survival), tuple(hazards), tuple(areas))


def _from_arrival(nxt: NextArrival) -> Curve | None:
    times, survival = nxt.times_s, nxt.survival
    if len(times) != len(survival) or len(times) < 2 or not math.isfinite(nxt.made_s):
        return None
    if not math.isfinite(sum(times)) or not math.isfinite(sum(survival)):
        return None
    if survival[-1] < 0.0 or not 0.0 < survival[0] <= 1.0 or times[0] < 0.0:
        return None
    if any(a >= b for a, b in pairwise(times)):
        return None
    if any(a < b for a, b in pairwise(survival)):
        return None
    made_s = nxt.made_s
    return build([made_s + time_s for time_s in times], [max(LEAST, value) for value in survival])


def _from_demand(demand: Demand) -> Curve | None:
    """Arrivals as a Poisson process, at the mean over the quantiles: trapezoids, flat beyond the outer ones."""
    if not (math.isfinite(demand.made_s) and math.isfinite(demand.step_s) and demand.step_s > 0):
        return None
    times, survival = [demand.made_s], [1.0]
    for row in demand.rate_per_s:
        rate = _mean(demand.quantiles, row)
        if rate is None:
            return None
        times.append(times[-1] + demand.step_s)
        survival.append(max(LEAST, survival[-1] * math.exp(-rate * demand.step_s)))
    return build(times, survival) if len(times) > 1 else None


def _mean(quantiles: Sequence[float], row: Sequence[float]) -> float | None:
    if len(row) != len(quantiles) or not row or not math.isfinite(sum(row)) or min(row) < 0:
        return None
    total = row[0] * quantiles[0] + row[-1] * (1.0 - quantiles[-1])
    for i in range(len(row) - 1):
        total += (row[i] + row[i + 1]) / 2 * (quantiles[i + 1] - quantiles[i])
    return total


__all__ = ["LEAST", "Curve", "build", "curve_of"]
