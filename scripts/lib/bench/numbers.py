"""Statistics of few samples, and tables of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not below `share` of them (nearest rank: no made-up values in between)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and range, with the values themselves, so that whoever reads the JSON can judge the noise."""
    if not values:
        return {"n": 0}
    return {
        "n": len(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "first": values[0],
        "last": values[-1],
        "values": [round(v, 5) for v in values],
    }


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None where there is no other side."""
    return numerator / denominator if numerator is not None and denominator else None


def median_of(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """Key by key, over the rows that have the key, in the order in which the keys came."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            found.setdefault(key, []).append(value)
    return {key: statistics.median(values) for key, values in found.items()}


def show(value: Any, digits: int = 3) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.1f}"
    return str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as they must be; numbers to the right."""
    text = [[show(cell) for cell in row] for row in rows]
    widths = [max(len(str(line[i])) for line in [list(head), *text]) for i in range(len(head))]
    numeric = [
        any(isinstance(row[i], int | float) for row in rows)
        and all(row[i] is None or isinstance(row[i], int | float) for row in rows)
        for i in range(len(head))
    ]

    def line(cells: Sequence[str]) -> str:
        padded = (
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(list(head)), line(["-" * w for w in widths]), *(line(row) for row in text)])
