"""What each rung of warmth costs and how long a start from it takes: measured on the model's own cold starts.

Until a model has started once from a rung, that rung's delay is assumed, and says so (`starts` = 0).
"""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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


def lead_s(row: ColdStartRow) -> float:
    """From the decision that there shall be a replica to its engine being ready: how far ahead a prewarm begins.

    A request may be answered by an engine that was started beside its replica, and so sooner than a replica takes.
    """
    ends = {p["name"]: float(p["start_s"]) + float(p["duration_s"]) for p in row.phases}
    if "replica" not in ends or ends["replica"] <= row.ready_s:
        return delay_s(row)
    begun_s = min(float(p["start_s"]) for p in row.phases)
    return max(delay_s(row), ends["replica"] - begun_s + row.total_s)


def can_be(row: ColdStartRow, deadline_s: float) -> bool:
    """Whether a start can have taken what it says, where an engine has `deadline_s` to start, and who waits as long.

    A clock that was set, or a machine that slept, between its begin and its end makes it anything.
    """
    took_s = delay_s(row), lead_s(row)
    if not (all(math.isfinite(each) for each in took_s) and took_s[0] >= 0):
        return False
    # What has no deadline: weights are fetched for as long as that takes.
    fetched_s = sum(float(p["duration_s"]) for p in row.phases if p["name"] == "download")
    return max(took_s) - max(0.0, fetched_s) <= 2 * deadline_s


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
        self._starts: dict[tuple[str, Rung], deque[_Start]] = {}
        # Asked for every model at every tick; a new start or another price is rare.
        self._answers: dict[str, tuple[Mapping[Rung, float], tuple[RungProfile, ...]]] = {}

    def add(self, row: ColdStartRow, deadline_s: float = math.inf) -> None:
        """A start, or more of one that is known. One that can't be counts for nothing (see `can_be`)."""
        if not can_be(row, deadline_s):
            return
        start = _Start((row.engine_id, row.ready_s), delay_s(row), lead_s(row), row.prewarmed)
        with self._lock:
            starts = self._starts.setdefault((row.model, row.rung), deque(maxlen=KEPT_STARTS))
            known = next((n for n, s in enumerate(starts) if s.key == start.key), None)
            if known is None:
                starts.append(start)
            else:
                starts[known] = start
            self._answers.pop(row.model, None)

    def profiles(self, model: str, costs_per_s: Mapping[Rung, float]) -> tuple[RungProfile, ...]:
        """A profile for each rung of `costs_per_s` (GPU-seconds a second), lowest first.

        A start from a lower rung takes no less than one from a higher: where few starts say otherwise, the lower takes
        as long as the higher, and what is assumed gives way to what was measured.
        """
        with self._lock:
            answer = self._answers.get(model)
            if answer is None or answer[0] != costs_per_s:
                answer = self._answers[model] = dict(costs_per_s), self._profiles(model, costs_per_s)
            return answer[1]

    def _profiles(self, model: str, costs_per_s: Mapping[Rung, float]) -> tuple[RungProfile, ...]:
        lower_s: list[float] = [math.inf, math.inf]
        found: list[RungProfile] = []
        measured = {rung: self._measured(model, rung) for rung in ASSUMED_DELAY_S}
        for rung in sorted(costs_per_s):
            if rung is Rung.SERVING:
                found.append(RungProfile(rung, 0.0, 0.0, costs_per_s[rung]))
                continue
            *own_s, starts = measured[rung]
            higher = [m for r, m in measured.items() if r > rung and r in costs_per_s and m[2]]
            for i in range(2):
                own_s[i] = max([own_s[i], *(m[i] for m in higher)])
                if starts:
                    lower_s[i] = own_s[i]
                own_s[i] = min(own_s[i], lower_s[i])
            found.append(RungProfile(rung, own_s[0], own_s[1], costs_per_s[rung], starts))
        return tuple(found)

    def _measured(self, model: str, rung: Rung) -> tuple[float, float, int]:
        """(median of what who waited waited, upper quantile of what a prewarm takes, number of starts)."""
        starts = self._starts.get((model, rung))
        if not starts:
            assumed = ASSUMED_DELAY_S[rung]
            return assumed, assumed * _ASSUMED_SPREAD, 0
        # What nobody waited for tells what a wait would have been only where there is nothing better.
        waited = [start.delay_s for start in starts if not start.prewarmed]
        leads = sorted(start.lead_s for start in starts)
        median = statistics.median(leads)
        upper = leads[min(len(leads) - 1, math.ceil(UPPER_QUANTILE * len(leads)) - 1)]
        # Of few starts the largest is no upper quantile yet: as many medians more as there are starts to one.
        upper = max(upper, median * (1.0 + 1.0 / len(leads)))
        return statistics.median(waited) if waited else median, upper, len(starts)


@dataclass(frozen=True, slots=True)
class _Start:
    key: tuple[str, float]
    delay_s: float
    lead_s: float
    prewarmed: bool
