"""What each rung of warmth costs and how long a start from it takes: measured on the model's own cold starts.

Until a model has started once from a rung, that rung's delay is assumed, and says so (`starts` = 0).
"""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from autoscaling.core.types import Rung, RungProfile
from autoscaling.live.records import ColdStartRow

KEPT_STARTS = 32
"""Starts of each model and rung that count: the machine, the network and the model's version change."""
UPPER_QUANTILE = 0.9

ASSUMED_DELAY_S: Mapping[Rung, float] = {
    Rung.COLD: 240.0,
    Rung.NODE: 60.0,
    Rung.WEIGHTS: 20.0,
    Rung.TEMPLATE: 4.0,
    Rung.PARKED: 2.0,
}
_ASSUMED_SPREAD = 1.5

MEMORY_PRICE = 0.05
"""GPUs' worth of all the memory of a node with one GPU. Cloud prices put it between 3 and 10 % (memory-optimised
against compute-optimised machines, for each GiB)."""
AMPLE, SCARCE = 0.3, 0.1
"""Shares of a node's memory: with more than AMPLE available it costs nothing, at SCARCE its full price."""


def rung_of_start(kind: str, phases: Iterable[Mapping[str, Any]], *, own_template: bool) -> Rung:
    """Where a start began, from how the engine came to be.

    `own_template`: whether a template with the model's engine already built is possible here. Where it is not, the
    node's template, from which every engine can be forked, is all that there is to be warm.
    """
    if any(phase["name"] == "download" for phase in phases):
        return Rung.NODE
    if kind == "adopted":
        return Rung.PARKED
    if kind == "prebuilt" or not own_template:
        return Rung.TEMPLATE
    return Rung.WEIGHTS


def delay_s(row: ColdStartRow) -> float:
    """From the beginning of a start to the first token of who waited for it."""
    first_s = next((float(p["duration_s"]) for p in row.phases if p["name"] == "first_token"), 0.0)
    # After a prewarm the first token is that of a request which came later, and met an engine that was there.
    return row.total_s + (0.0 if row.prewarmed else first_s)


def scarcity(available_share: float | None) -> float:
    """How much of its price memory costs: 0 where there is plenty (or nobody knows), 1 where there is none left."""
    if available_share is None or not math.isfinite(available_share):
        return 0.0
    return min(1.0, max(0.0, (AMPLE - available_share) / (AMPLE - SCARCE)))


def memory_cost_per_s(held_bytes: float, node_bytes: float | None, available_share: float | None) -> float:
    """GPU-seconds a second for memory that is held on a node: its share, at MEMORY_PRICE, as scarce as it is."""
    if not node_bytes or not math.isfinite(held_bytes):
        return 0.0
    return MEMORY_PRICE * max(0.0, held_bytes) / node_bytes * scarcity(available_share)


class RungBook:
    """The last starts of every model, by the rung at which they began. One start said twice counts once.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: dict[tuple[str, Rung], deque[tuple[str, float, float]]] = {}

    def add(self, row: ColdStartRow) -> None:
        """A start, or more of one that is known."""
        delay = delay_s(row)
        if not math.isfinite(delay) or delay < 0:
            return
        start = (row.engine_id, row.ready_s, delay)
        with self._lock:
            starts = self._starts.setdefault((row.model, row.rung), deque(maxlen=KEPT_STARTS))
            known = next((n for n, s in enumerate(starts) if s[:2] == start[:2]), None)
            if known is None:
                starts.append(start)
            else:
                starts[known] = start

    def profiles(self, model: str, costs_per_s: Mapping[Rung, float]) -> tuple[RungProfile, ...]:
        """A profile for each rung of `costs_per_s` (GPU-seconds a second), lowest first.

        A start from a lower rung takes no less than one from a higher: where starts are few, the longer delay of the
        two is taken for the lower.
        """
        found: list[RungProfile] = []
        delay = high = 0.0
        for rung in sorted(costs_per_s, reverse=True):
            if rung is Rung.SERVING:
                found.append(RungProfile(rung, 0.0, 0.0, costs_per_s[rung]))
                continue
            own, own_high, starts = self._measured(model, rung)
            delay, high = max(delay, own), max(high, own_high)
            found.append(RungProfile(rung, delay, high, costs_per_s[rung], starts))
        return tuple(reversed(found))

    def _measured(self, model: str, rung: Rung) -> tuple[float, float, int]:
        """(median, upper quantile, number of starts)."""
        with self._lock:
            delays = sorted(delay for _, _, delay in self._starts.get((model, rung), ()))
        if not delays:
            assumed = ASSUMED_DELAY_S[rung]
            return assumed, assumed * _ASSUMED_SPREAD, 0
        median = statistics.median(delays)
        upper = delays[min(len(delays) - 1, math.ceil(UPPER_QUANTILE * len(delays)) - 1)]
        # Of few starts the largest is no upper quantile yet: as many medians more as there are starts to one.
        return median, max(upper, median * (1.0 + 1.0 / len(delays))), len(delays)
