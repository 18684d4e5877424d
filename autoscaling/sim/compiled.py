"""The core's backward induction compiled: the very same function, on arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit  # type: ignore[import-untyped]

from autoscaling.core import induction
from autoscaling.core.induction import Costs, Row, Solved, passes_of, start_cost
from autoscaling.core.survival import Curve

_fill: Callable[..., None] = njit(cache=True)(induction.fill)


def _prepare(times: Any, survival: Any, hazards: Any, areas: Any) -> None:
    """A curve's hazards and areas, as `Curve` defines them."""
    for i in range(len(times) - 1):
        step_s = times[i + 1] - times[i]
        a, b = survival[i], survival[i + 1]
        rate = np.log(a / b) / step_s if b < a else 0.0
        hazards[i] = rate
        areas[i + 1] = areas[i] + ((a - b) / rate if rate * step_s > 1e-12 else a * step_s)


_prepared: Callable[..., None] = njit(cache=True)(_prepare)


def solve(curve: Curve, grid: Row, costs: Costs) -> Solved:
    """As `induction.solve`."""
    passes = passes_of(costs)
    size, count, leads = len(grid), len(costs.held), len(costs.leads_s)
    known = np.zeros((4, len(curve.times)))
    known[0], known[1] = curve.times, curve.survival
    _prepared(known[0], known[1], known[2], known[3])
    rows = np.zeros((3 + count + 2 * leads, size))
    marks = np.zeros((1 + count + leads, size), np.int64)
    alone, shares = rows[3 + count : 3 + count + leads], rows[3 + count + leads :]
    held, uppers = marks[1 : 1 + count], marks[1 + count :]
    values = rows[3 : 3 + count]
    _fill(
        np.asarray(grid),
        known[0],
        known[1],
        known[2],
        known[3],
        np.asarray(passes.whose, np.int64),
        np.asarray(passes.shifts_s, np.float64),
        np.asarray(passes.held, np.float64),
        np.asarray(passes.waited, np.float64),
        costs.serving,
        np.asarray(costs.held, np.float64),
        np.asarray(costs.arrivals, np.float64),
        np.asarray(costs.leads_s, np.float64),
        rows[0],
        rows[1],
        rows[2],
        marks[0],
        values,
        held,
        alone,
        uppers,
        shares,
    )
    alive, area, served = rows[:3].tolist()
    starts = [
        start_cost(float(alone[j, 0]), int(uppers[j, 0]), float(shares[j, 0]), served) for j in range(leads)
    ]
    return Solved(alive, area, served, marks[0].tolist(), values.tolist(), held.tolist(), starts)


def install() -> None:
    """Let the core of this process use it."""
    induction.solve = solve


__all__ = ["install", "solve"]
