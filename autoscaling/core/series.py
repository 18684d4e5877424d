"""Values over a sliding window, as they were between observations: each holds until the next one is seen."""

from __future__ import annotations

import bisect
import math
from functools import lru_cache

Series = tuple[tuple[float, float], ...]

TICK_S = 1e-3
"""Added where a bound must be passed, not only reached: Unix times as floats resolve a quarter of a microsecond."""


def push_peak(series: Series, now_s: float, value: float, window_s: float) -> Series:
    """A sliding maximum as a monotonic queue: (until when the value held, value), values strictly descending.

    What was last pushed has held until now, so that pushing seldom and pushing often give the same maximum.
    """
    if len(series) == 1 and series[0][1] <= value:
        # As it mostly is.
        return ((now_s, value),)
    kept = [(min(time_s, now_s), held) for time_s, held in series]
    if kept:
        kept[-1] = (now_s, kept[-1][1])
    while kept and kept[-1][1] <= value:
        kept.pop()
    kept.append((now_s, value))
    return (*[pair for pair in kept[:-1] if pair[0] + window_s > now_s], kept[-1])


def peak(series: Series) -> float:
    """The maximum over the window, 0 of nothing."""
    return series[0][1] if series else 0.0


def peak_until_s(series: Series, window_s: float) -> float:
    """When the maximum falls if nothing happens; infinite if it is the present value."""
    return series[0][0] + window_s if len(series) > 1 else math.inf


def push_step(series: Series, now_s: float, value: float, window_s: float) -> Series:
    """A step function: (since when the value holds, value). Holds what is needed for averages over `window_s`."""
    kept = [pair for pair in series if pair[0] < now_s]
    if not kept or kept[-1][1] != value:
        kept.append((now_s, value))
    first = 0
    while first + 1 < len(kept) and kept[first + 1][0] <= now_s - window_s:
        first += 1
    return tuple(kept[first:])


def mean(series: Series, now_s: float, window_s: float) -> float:
    """The average of a step function over the last `window_s`. Before its first value it was the same."""
    if not series:
        return 0.0
    since_s = now_s - window_s
    total = 0.0
    held = series[0][1]
    from_s = since_s
    for time_s, value in series:
        if time_s > from_s:
            reach_s = min(time_s, now_s)
            total += held * (reach_s - from_s)
            from_s = reach_s
        held = value
    total += held * max(0.0, now_s - from_s)
    return total / window_s


def ceil(value: float) -> int:
    """The next whole number; a millionth above one counts as that one, for averages are not exact."""
    return math.ceil(value - 1e-6)


def need_of(load: int, unit: float) -> int:
    """Units of that size for so many: one at least for any, however large it is."""
    return max(min(load, 1), ceil(load / unit))


@lru_cache(maxsize=4096)
def alike(load: int, *units: float) -> tuple[int, int]:
    """The least (1 if not more) and the most that need as many units of each size as `load`, which is not 0."""
    least, most = 1, load
    for i, unit in enumerate(units):
        need = ceil(load / unit)
        low, high = min(load, max(1, math.floor((need - 1) * unit))), max(load, math.ceil(need * unit) + 1)
        while ceil(low / unit) < need:
            low += 1
        while ceil(high / unit) > need:
            high -= 1
        least, most = max(least, low), high if i == 0 else min(most, high)
    return least, most


def mean_until_s(
    series: Series, now_s: float, window_s: float, scale: float = 1.0, offset: float = 0.0
) -> float:
    """When ceil(mean * scale + offset) changes if the last value goes on; infinite if it never does.

    The average of a step function is linear between the moments when a value leaves the window, so that the crossing
    within each stretch is solved for.
    """
    if len(series) < 2:
        return math.inf
    average = mean(series, now_s, window_s)
    level = ceil(average * scale + offset)
    at_s = now_s
    leaves = [time_s + window_s for time_s, _ in series[1:]]
    for edge_s in leaves[bisect.bisect_right(leaves, now_s) :]:
        then = mean(series, edge_s, window_s)
        if ceil(then * scale + offset) != level:
            bound = ((level if then > average else level - 1) + 1e-6 - offset) / scale
            share = (bound - average) / (then - average)
            return at_s + max(0.0, min(1.0, share)) * (edge_s - at_s) + TICK_S
        at_s, average = edge_s, then
    return math.inf


__all__ = [
    "TICK_S",
    "Series",
    "alike",
    "ceil",
    "mean",
    "mean_until_s",
    "need_of",
    "peak",
    "peak_until_s",
    "push_peak",
    "push_step",
]
