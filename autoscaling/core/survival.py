"""The next arrival as a curve: survival with piecewise constant hazard, in absolute time."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from operator import ge, lt, neg

from autoscaling.core.types import Demand, Forecast, NextArrival

LEAST = 1e-9
"""A smaller chance of no arrival counts as none, so that hazards stay finite."""


@dataclass(frozen=True)
class Curve:
    """P(no request until t), not conditioned on the present. Beyond the last time it stays what it was.

    All have shape (n,); `hazards[i]` and `areas[i]` belong to [times[i], times[i+1]).
    """

    times: tuple[float, ...]
    """Unix seconds, ascending."""
    survival: tuple[float, ...]
    """Not ascending, above 0."""

    @cached_property
    def hazards(self) -> tuple[float, ...]:
        """Per second; the last one is 0."""
        log = math.log
        return (
            *(
                log(a / b) / (end_s - begin_s) if b < a else 0.0
                for (begin_s, end_s), (a, b) in zip(
                    pairwise(self.times), pairwise(self.survival), strict=True
                )
            ),
            0.0,
        )

    @cached_property
    def areas(self) -> tuple[float, ...]:
        """The integral of the survival from times[0] to times[i], in seconds."""
        found = [0.0]
        area = 0.0
        for rate, (begin_s, end_s), (a, b) in zip(
            self.hazards, pairwise(self.times), pairwise(self.survival), strict=False
        ):
            step_s = end_s - begin_s
            area += (a - b) / rate if rate * step_s > 1e-12 else a * step_s
            found.append(area)
        return tuple(found)

    @property
    def end_s(self) -> float:
        return self.times[-1]

    def at(self, time_s: float) -> float:
        """P(no request until `time_s`)."""
        times = self.times
        if time_s <= times[0]:
            return self.survival[0]
        i = bisect.bisect_right(times, time_s) - 1
        return self.survival[i] * math.exp(-self._hazard(i) * (time_s - times[i]))

    def quantile_s(self, share: float, now_s: float) -> float | None:
        """When that share of the chance left at `now_s` (0 to 1) has come; None if that is beyond the end."""
        wanted = self.at(now_s) * (1.0 - share)
        if wanted < self.survival[-1]:
            return None
        return self.when_s(max(wanted, LEAST * LEAST))

    def when_s(self, survival: float) -> float:
        """When the survival has fallen to that value; the last time if it never does."""
        held = self.survival
        i = bisect.bisect_left(held, -survival, key=neg)
        if i >= len(held):
            return self.times[-1]
        if i == 0:
            return self.times[0]
        before = i - 1
        return min(
            self.times[before] + math.log(held[before] / survival) / self._hazard(before), self.times[i]
        )

    def _hazard(self, i: int) -> float:
        """One of `hazards`, without working all of them out."""
        if i + 1 >= len(self.times):
            return 0.0
        a, b = self.survival[i], self.survival[i + 1]
        return math.log(a / b) / (self.times[i + 1] - self.times[i]) if b < a else 0.0


def curve_of(forecast: Forecast | None, now_s: float) -> Curve | None:
    """What the forecast says of the next arrival; where it speaks of demand only, what follows from its mean rate.

    None if it says nothing, is broken (not finite, not in order), has ended before `now_s`, or leaves no
    chance that the request has not come by now.
    """
    if forecast is None:
        return None
    curve = from_arrival(forecast.next_arrival) if forecast.next_arrival is not None else None
    if curve is None and forecast.demand is not None:
        curve = _from_demand(forecast.demand)
    if curve is None or now_s >= curve.end_s or curve.at(now_s) <= LEAST:
        return None
    return curve


def build(times: Sequence[float], survival: Sequence[float]) -> Curve:
    """A curve through those points. Times ascend, survival does not, and stays above 0."""
    return Curve(tuple(times), tuple(survival))


def _from_arrival(nxt: NextArrival) -> Curve | None:
    times, survival = nxt.times_s, nxt.survival
    if len(times) != len(survival) or len(times) < 2 or not math.isfinite(nxt.made_s):
        return None
    if not math.isfinite(sum(times)) or not math.isfinite(sum(survival)):
        return None
    if survival[-1] < 0.0 or not 0.0 < survival[0] <= 1.0 or times[0] < 0.0:
        return None
    if any(map(ge, times, times[1:])) or any(map(lt, survival, survival[1:])):
        return None
    made_s = nxt.made_s
    if survival[-1] < LEAST:
        survival = tuple([max(LEAST, value) for value in survival])
    return build([made_s + time_s for time_s in times], survival)


from_arrival: Callable[[NextArrival], Curve | None] = _from_arrival
"""None of one that is broken. The simulator exchanges it for its own."""


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
