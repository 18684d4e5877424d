"""The core's backward induction compiled: the very same function, on arrays; and what leads up to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from autoscaling.core import induction, survival, warmth
from autoscaling.core.induction import Costs, Solved, passes_of, start_cost
from autoscaling.core.survival import LEAST, Curve
from autoscaling.core.types import NextArrival
from autoscaling.core.warmth import FINEST_S, SHARES, STEPS
from autoscaling.forecast import demand_model, gap_record, gaps, hazard
from autoscaling.forecast.arrivals import Later
from autoscaling.forecast.gap_record import CLOSE_S, DAYS, WIDE_S, YESTERDAY_S
from autoscaling.forecast.hazard import DAY_S
from autoscaling.sim import compiled_demand, compiled_gaps

Floats = NDArray[np.float64]
TIMES, SURVIVAL, HAZARDS, AREAS = range(4)
"""Rows of what is known of a curve, shape (4, n)."""
_SHARES = np.asarray(SHARES)

_fill: Callable[..., None] = njit(cache=True)(induction.fill)
arranged: Callable[[Floats, Floats, Floats, Floats, Floats], Floats] = njit(cache=True)(hazard._arranged)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _check(made_s: float, known: Floats) -> bool:
    """Whether an arrival's times and survival are in order, as the core's `from_arrival`; they become a curve's."""
    times, alive = known[TIMES], known[SURVIVAL]
    last = len(times) - 1
    if not (math.isfinite(made_s) and alive[last] >= 0.0 and 0.0 < alive[0] <= 1.0 and times[0] >= 0.0):
        return False
    for i in range(last):
        if not (times[i] < times[i + 1] and alive[i] >= alive[i + 1]):
            return False
    if not math.isfinite(times[last]):
        return False
    for i in range(last + 1):
        times[i] = made_s + times[i]
        alive[i] = max(LEAST, alive[i])
    return True


@njit(cache=True)  # type: ignore[untyped-decorator]
def _hazard(known: Floats, i: int) -> float:
    """As `Curve` defines them."""
    times, alive = known[TIMES], known[SURVIVAL]
    if i + 1 >= len(times) or alive[i + 1] >= alive[i]:
        return 0.0
    rate: float = math.log(alive[i] / alive[i + 1]) / (times[i + 1] - times[i])
    return rate


@njit(cache=True)  # type: ignore[untyped-decorator]
def _at(known: Floats, time_s: float) -> float:
    """As `Curve.at`."""
    times, alive = known[TIMES], known[SURVIVAL]
    if time_s <= times[0]:
        return float(alive[0])
    i = np.searchsorted(times, time_s, side="right") - 1
    found: float = alive[i] * math.exp(-_hazard(known, i) * (time_s - times[i]))
    return found


@njit(cache=True)  # type: ignore[untyped-decorator]
def _when_s(known: Floats, wanted: float) -> float:
    """As `Curve.when_s`."""
    times, alive = known[TIMES], known[SURVIVAL]
    low, high = 0, len(alive)
    while low < high:
        middle = (low + high) // 2
        if alive[middle] > wanted:
            low = middle + 1
        else:
            high = middle
    if low >= len(alive):
        return float(times[-1])
    if low == 0:
        return float(times[0])
    found: float = times[low - 1] + math.log(alive[low - 1] / wanted) / _hazard(known, low - 1)
    return min(found, float(times[low]))


@njit(cache=True)  # type: ignore[untyped-decorator]
def _grid(now_s: float, known: Floats, leads: Floats, points: Floats, grid: Floats) -> int:
    """As `warmth._grid`, into `grid`; how many points there are."""
    end_s = known[TIMES, -1]
    span_s = end_s - now_s
    first_s = min(FINEST_S, span_s / STEPS)
    growth = (span_s / first_s) ** (1.0 / STEPS)
    points[0] = end_s
    count = 1
    step_s = first_s
    for _ in range(STEPS):
        points[count] = now_s + step_s
        count += 1
        step_s *= growth
    alive = _at(known, now_s)
    comes = alive - known[SURVIVAL, -1]
    if comes > 1e-9 * alive:
        begin = count
        for share in _SHARES:
            points[count] = _when_s(known, alive - comes * share)
            count += 1
        for lead_s in leads:
            if lead_s > 0:
                for i in range(begin, begin + len(_SHARES)):
                    points[count] = points[i] - lead_s
                    count += 1
    points[:count].sort()
    grid[0] = last_s = now_s
    size = 1
    for point in points[:count]:
        if point - last_s >= 1e-3 and point < end_s:
            grid[size] = last_s = point
            size += 1
    grid[size] = end_s
    return size + 1


@njit(cache=True)  # type: ignore[untyped-decorator]
def _solve(  # noqa: PLR0917 - compiled, which takes no objects
    now_s: float,
    known: Floats,
    passes: tuple[NDArray[np.int64], Floats, Floats, Floats],
    serving: float,
    costs: tuple[Floats, Floats, Floats],
    points: Floats,
    rows: Floats,
    marks: NDArray[np.int64],
) -> int:
    held_costs, arrivals, leads = costs
    count = len(held_costs)
    size: int = _grid(now_s, known, leads[:count], points, rows[0])
    times, alive, hazards, areas = known[TIMES], known[SURVIVAL], known[HAZARDS], known[AREAS]
    for i in range(len(times) - 1):
        step_s = times[i + 1] - times[i]
        a, b = alive[i], alive[i + 1]
        rate = hazards[i] = _hazard(known, i)
        areas[i + 1] = areas[i] + ((a - b) / rate if rate * step_s > 1e-12 else a * step_s)
    _fill(
        rows[0, :size],
        times,
        alive,
        hazards,
        areas,
        passes[0],
        passes[1],
        passes[2],
        passes[3],
        serving,
        held_costs,
        arrivals,
        leads,
        rows[1, :size],
        rows[2, :size],
        rows[3, :size],
        marks[0, :size],
        rows[4 : 4 + count, :size],
        marks[1 : 1 + count, :size],
        rows[4 + count : 4 + count + len(leads), :size],
        marks[1 + count :, :size],
        rows[4 + count + len(leads) : 4 + count + 2 * len(leads), :size],
    )
    return size


class ArrayCurve(Curve):
    """The same, on arrays."""

    def __init__(self, known: Floats) -> None:
        self.__dict__["known"] = known

    known: Floats
    """Hazards and areas are worked out with the first solution."""

    @cached_property
    def times(self) -> tuple[float, ...]:
        return tuple(self.known[TIMES].tolist())

    @cached_property
    def survival(self) -> tuple[float, ...]:
        return tuple(self.known[SURVIVAL].tolist())

    @property
    def end_s(self) -> float:
        return float(self.known[TIMES, -1])

    def at(self, time_s: float) -> float:
        return float(_at(self.known, time_s))


def from_arrival(nxt: NextArrival) -> Curve | None:
    """As `survival.from_arrival`, without making tuples of what a forecaster has as arrays."""
    if not isinstance(nxt, Later):
        return survival._from_arrival(nxt)
    times, alive = nxt.arrays
    if len(times) != len(alive) or len(times) < 2:
        return None
    known = np.zeros((4, len(times)))
    known[TIMES], known[SURVIVAL] = times, alive
    return ArrayCurve(known) if _check(nxt.made_s, known) else None


@lru_cache(maxsize=1024)
def _asked(costs: Costs) -> tuple[tuple[Any, ...], float, tuple[Floats, Floats, Floats]]:
    passes = passes_of(costs)
    return (
        (
            np.asarray(passes.whose, np.int64),
            np.asarray(passes.shifts_s, np.float64),
            np.asarray(passes.held, np.float64),
            np.asarray(passes.waited, np.float64),
        ),
        float(costs.serving),
        (
            np.asarray(costs.held, np.float64),
            np.asarray(costs.arrivals, np.float64),
            np.asarray(costs.leads_s, np.float64),
        ),
    )


def solved(now_s: float, curve: Curve, costs: Costs) -> tuple[Sequence[float], Solved]:
    """As `warmth.solved`; of costs only those at the first two points, at which alone they are looked at."""
    if isinstance(curve, ArrayCurve):
        known = curve.known
    else:
        known = np.zeros((4, len(curve.times)))
        known[TIMES], known[SURVIVAL] = curve.times, curve.survival
    count, leads = len(costs.held), len(costs.leads_s)
    most = 2 + STEPS + len(SHARES) * (1 + count)
    rows = np.zeros((5 + count + 2 * leads, most))
    marks = np.zeros((1 + count + leads, most), np.int64)
    size = _solve(now_s, known, *_asked(costs), rows[-1], rows, marks)
    first = rows[:, :2].tolist()
    drops, *held = marks[: 1 + count, :size].tolist()
    served = rows[3]
    starts = []
    for j in range(leads):
        upper = int(marks[1 + count + j, 0])
        around = {upper: float(served[upper]), upper - 1: float(served[upper - 1])} if upper >= 0 else {}
        starts.append(start_cost(first[4 + count + j][0], upper, first[4 + count + leads + j][0], around))
    return rows[0, :size].tolist(), Solved(
        first[1], first[2], first[3], drops, first[4 : 4 + count], held, starts
    )


@njit(cache=True)  # type: ignore[untyped-decorator]
def _place(ordered: Floats, wanted: float, near: int) -> int:
    """As `np.searchsorted`, from a place that is near."""
    while near < len(ordered) and ordered[near] < wanted:
        near += 1
    while near > 0 and ordered[near - 1] >= wanted:
        near -= 1
    return near


@njit(cache=True)  # type: ignore[untyped-decorator]
def _count(active_s: Floats, time_s: Floats, before_s: Floats, found: NDArray[np.int64]) -> None:
    for day in range(DAYS):
        places = np.full(6, np.searchsorted(active_s, time_s[0] - (day + 1) * DAY_S))
        for i in range(len(time_s)):
            at, most = time_s[i] - (day + 1) * DAY_S, before_s[i % len(before_s)]
            places[0] = _place(active_s, at - WIDE_S, places[0])
            places[1] = _place(active_s, min(at + WIDE_S, most), places[1])
            found[i, 0] += places[1] > places[0]
            places[2] = _place(active_s, at - CLOSE_S[0], places[2])
            places[3] = _place(active_s, min(at + CLOSE_S[1], most), places[3])
            found[i, 1] += places[3] > places[2]
            if day == 0:
                places[4] = _place(active_s, at - YESTERDAY_S, places[4])
                places[5] = _place(active_s, min(at + YESTERDAY_S, most), places[5])
                found[i, 2] = max(0, places[5] - places[4])


def came(active_s: Floats, time_s: Floats, before_s: Floats | float) -> NDArray[np.int64]:
    """As `gap_record.came`."""
    found = np.zeros((len(time_s), 3), np.int64)
    if len(time_s):
        _count(active_s, time_s, np.atleast_1d(np.asarray(before_s, np.float64)), found)
    return found


def install() -> None:
    """Let the core of this process use it."""
    warmth.solved, survival.from_arrival = solved, from_arrival
    gap_record.came, hazard.arranged = came, arranged
    gaps.gap_mass, demand_model.predict = compiled_gaps.gap_mass, compiled_demand.predict


__all__ = ["arranged", "came", "from_arrival", "install", "solved"]
