"""Backward induction over a grid of times: what each state costs from each point on, and what is then best.

`fill` uses nothing but numbers, indexes and `math`, so that the simulator runs the very same function compiled (see
`autoscaling.sim.compiled`); `solve` is what calls it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoscaling.core.survival import Curve

Row = Sequence[float]


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one question. All in GPU-seconds, or in those a second."""

    serving: float
    """Of a replica, a second."""
    held: Row
    """Of each rung, a second. Lowest rung first; as are the next two."""
    arrivals: Row
    """Of a request that comes on that rung."""
    leads_s: Row
    """Of a start from each rung; one more at the end is worked out without being a choice."""
    wait: float
    """Of a second that the first request waits."""
    others: float
    """The same of those that come with it, all together."""
    burst_s: float
    """Over which time those come, evenly."""


@dataclass(slots=True)
class Solved:
    """All by grid point k. Expected costs are multiplied by the survival, so that they need not be conditioned."""

    alive: Row
    """The survival."""
    area: Row
    """Its integral, in seconds."""
    served: Row
    """The cost from there on with a replica that serves."""
    drops: Sequence[int]
    """The rung that is then gone down to, -1 to stay."""
    values: Sequence[Row]
    """values[r][k]: the cost on rung r."""
    held: Sequence[Sequence[int]]
    """held[r][k]: the rung that is then held, -1 a start."""
    starts: Row
    """The cost of a start that begins at the first point, for each of `leads_s`."""


@dataclass(frozen=True, slots=True)
class Passes:
    """Which times after the grid's points starts look at, for which of `leads_s`, and what a second costs them."""

    whose: Sequence[int]
    shifts_s: Row
    held: Row
    """Of the time until then, while nobody has come."""
    waited: Row
    """Of the time from a request until then."""


def passes_of(costs: Costs) -> Passes:
    """A request that comes during a start waits for its rest, and the GPU is held meanwhile. Those that come after it,
    evenly over the burst, by Simpson's rule at its beginning, middle and end.
    """
    whose: list[int] = []
    shifts: list[float] = []
    held: list[float] = []
    waited: list[float] = []
    spread = costs.burst_s > 0 and costs.others > 0
    for j, lead_s in enumerate(costs.leads_s):
        each = costs.wait + costs.serving + costs.others * (1 / 6 if spread else 1.0)
        parts = [(lead_s, costs.serving, each)]
        if spread:
            parts += [
                (lead_s - costs.burst_s / 2, 0.0, costs.others * 4 / 6),
                (lead_s - costs.burst_s, 0.0, costs.others / 6),
            ]
        for shift_s, hold, wait in parts:
            if shift_s > 0:
                whose.append(j)
                shifts.append(shift_s)
                held.append(hold)
                waited.append(wait)
    return Passes(whose, shifts, held, waited)


def fill(  # noqa: PLR0912, PLR0915, PLR0917 - one function, so that it compiles as it is
    grid: Any,
    times: Any,
    survival: Any,
    hazards: Any,
    areas: Any,
    whose: Any,
    shifts: Any,
    held_costs: Any,
    waited_costs: Any,
    serving: float,
    costs: Any,
    arrivals: Any,
    leads: Any,
    alive: Any,
    area: Any,
    served: Any,
    drops: Any,
    values: Any,
    held: Any,
    alone: Any,
    uppers: Any,
    shares: Any,
) -> None:
    """Everything of `Solved` but its `starts`, into what is given.

    Args:
        grid: ascending, shape (size,). times, survival, hazards, areas: a curve's, shape (n,).
        whose, shifts, held_costs, waited_costs: `Passes`, shape (m,).
        serving, costs, arrivals: of `Costs`, shape (rungs,); leads: shape (rungs,) or one more.
        alive, area, served, drops: shape (size,), zeros. values, held: shape (rungs, size), zeros.
        alone, uppers, shares: of a start at a point, shape (leads, size), zeros: its cost until it serves; the point at
            or after which it does, -1 beyond the end; and how far before that point, as a share of the step.
    """
    size, last = len(grid), len(times) - 1
    end_s = grid[size - 1]
    for p in range(-1, len(shifts)):
        shift_s = 0.0 if p < 0 else shifts[p]
        i = 0
        for k in range(size):
            time_s = grid[k] + shift_s
            while i < last and times[i + 1] <= time_s:
                i += 1
            since_s = time_s - times[i]
            rate = hazards[i]
            if rate * since_s > 1e-12:
                here = survival[i] * math.exp(-rate * since_s)
                total = areas[i] + (survival[i] - here) / rate
            else:
                here = survival[i]
                total = areas[i] + here * since_s
            if p < 0:
                alive[k] = here
                area[k] = total
            else:
                span_s = total - area[k]
                alone[whose[p]][k] += held_costs[p] * span_s + waited_costs[p] * (alive[k] * shift_s - span_s)
    for j in range(len(leads)):
        u = 0
        for k in range(size):
            ready_s = grid[k] + leads[j]
            if ready_s >= end_s:
                uppers[j][k] = -1
                continue
            while grid[u] < ready_s:
                u += 1
            uppers[j][k] = u
            # A start that takes no time serves at its own point.
            if u > k and grid[u] > ready_s:
                shares[j][k] = (grid[u] - ready_s) / (grid[u] - grid[u - 1])
    count = len(costs)
    for r in range(count):
        held[r][size - 1] = r
    drops[size - 1] = -1
    for k in range(size - 2, -1, -1):
        span_s = area[k + 1] - area[k]
        come = alive[k] - alive[k + 1]
        lowest, lowest_r = math.inf, 0
        for r in range(count):
            hold = costs[r] * span_s + come * arrivals[r] + values[r][k + 1]
            # Ties stay: moving down is free, but pointless where nothing is saved.
            if hold <= lowest:
                lowest, lowest_r = hold, r
            values[r][k] = lowest
            held[r][k] = lowest_r
        keep = serving * span_s + served[k + 1]
        if keep <= lowest:
            served[k] = keep
            drops[k] = -1
        else:
            served[k] = lowest
            drops[k] = lowest_r
        for r in range(count):
            cost = alone[r][k]
            u = uppers[r][k]
            if u >= 0:
                cost += served[u]
                if shares[r][k] > 0.0:
                    cost += shares[r][k] * (served[u - 1] - served[u])
            if cost < values[r][k]:
                values[r][k] = cost
                held[r][k] = -1


def solve(curve: Curve, grid: Row, costs: Costs) -> Solved:
    """Everything from the first point of the grid to its last; the grid lies within the curve."""
    passes = passes_of(costs)
    size, count, leads = len(grid), len(costs.held), len(costs.leads_s)
    alive, area, served, drops = [0.0] * size, [0.0] * size, [0.0] * size, [0] * size
    values, held = [[0.0] * size for _ in range(count)], [[0] * size for _ in range(count)]
    alone, shares = [[0.0] * size for _ in range(leads)], [[0.0] * size for _ in range(leads)]
    uppers = [[0] * size for _ in range(leads)]
    fill(
        grid,
        curve.times,
        curve.survival,
        curve.hazards,
        curve.areas,
        passes.whose,
        passes.shifts_s,
        passes.held,
        passes.waited,
        costs.serving,
        costs.held,
        costs.arrivals,
        costs.leads_s,
        alive,
        area,
        served,
        drops,
        values,
        held,
        alone,
        uppers,
        shares,
    )
    starts = [start_cost(alone[j][0], uppers[j][0], shares[j][0], served) for j in range(leads)]
    return Solved(alive, area, served, drops, values, held, starts)


def start_cost(alone: float, upper: int, share: float, served: Row | Mapping[int, float]) -> float:
    """Of a start, from what `fill` says of it and what it costs once it serves."""
    if upper < 0:
        return alone
    if share <= 0:
        return alone + served[upper]
    return alone + served[upper] + share * (served[upper - 1] - served[upper])


__all__ = ["Costs", "Passes", "Solved", "fill", "passes_of", "solve", "start_cost"]
