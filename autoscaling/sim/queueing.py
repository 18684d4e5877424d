"""Requests in the queue and in the replicas of one model, event by event. Compiled: see `advance`.

Replicas share their work equally among their requests (processor sharing), as continuous batching does: with b
requests in progress each second of work takes slowdown[b] seconds. A replica keeps a virtual time that advances by
dt / slowdown[b]; a request ends when it has advanced by its work, so that the next to end is the top of a heap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Columns of `f`, floats.
NOW, BUSY_S, HELD_S, WAITED_S, COLD_WAITED_S, IN_FLIGHT_S, LAST_ARRIVAL, LAST_BUSY, LONGEST_S = range(9)
FLOATS = 9
# Columns of `n`, whole numbers. The first eight are the state, the others counts.
HEAD, TAIL, END, IN_FLIGHT, READY, SLOTS, BUSY, EPISODE = range(8)
ARRIVED, REQUESTS, COLD, STARTED, REJECTED, IN_TIME, EPISODES, FINISHED = range(8, 16)
WHOLES = 16
NONE, ACCEPTS, DRAINS = 0, 1, 2
"""States of a slot."""

LOWEST_S, RATIO, CELLS = 1e-3, 1.01, 2200
"""The histogram of waiting: cell 0 is no waiting, cell i begins at LOWEST_S * RATIO**(i - 1)."""

DONE, DARK, FREED = 0, 1, 2
"""Why `advance` came back: it is `until_s`; a request came while no replica was there; a draining replica ended."""


def _advance(  # noqa: PLR0912, PLR0915, PLR0917 - one event loop, compiled as a whole
    until_s: float,
    stop: int,
    limits: Floats,
    times: Floats,
    work: Floats,
    cold: NDArray[np.uint8],
    f: Floats,
    n: NDArray[np.int64],
    state: NDArray[np.uint8],
    load: NDArray[np.int64],
    virtual: Floats,
    since: Floats,
    heap: Floats,
    slowdown: Floats,
    histogram: NDArray[np.int64],
) -> int:
    deadline_s, queue_limit, measure_s, slo_s = limits[0], limits[1], limits[2], limits[3]
    most = len(slowdown) - 1
    while True:
        # Who waits goes to the replica with the fewest requests.
        while n[HEAD] < n[TAIL]:
            i = n[HEAD]
            if work[i] < 0.0:
                n[HEAD] += 1
                continue
            best, fewest = -1, most
            for r in range(n[SLOTS]):
                if state[r] == 1 and load[r] < fewest:
                    best, fewest = r, load[r]
            if best < 0:
                break
            n[HEAD] += 1
            r, b = best, load[best]
            if b > 0:
                virtual[r] += (f[NOW] - since[r]) / slowdown[b]
            else:
                virtual[r] = 0.0
                n[BUSY] += 1
            since[r] = f[NOW]
            value = virtual[r] + work[i]
            child = b
            while child > 0:
                parent = (child - 1) // 2
                if heap[r, parent] <= value:
                    break
                heap[r, child] = heap[r, parent]
                child = parent
            heap[r, child] = value
            load[r] = b + 1
            n[IN_FLIGHT] += 1
            waited = f[NOW] - times[i]
            if times[i] >= measure_s:
                n[STARTED] += 1
                f[WAITED_S] += waited
                f[LONGEST_S] = max(f[LONGEST_S], waited)
                if cold[i]:
                    f[COLD_WAITED_S] += waited
                if waited <= slo_s:
                    n[IN_TIME] += 1
                cell = 0
                if waited >= LOWEST_S:
                    cell = min(CELLS - 1, 1 + int(math.log(waited / LOWEST_S) / math.log(RATIO)))
                histogram[cell] += 1
        # What comes next.
        next_s, kind, which = until_s, 0, -1
        for r in range(n[SLOTS]):
            b = load[r]
            if b > 0:
                ends_s = since[r] + (heap[r, 0] - virtual[r]) * slowdown[b]
                if ends_s <= next_s:
                    next_s, kind, which = ends_s, 2, r
        if n[HEAD] < n[TAIL] and times[n[HEAD]] + deadline_s < next_s:
            next_s, kind = times[n[HEAD]] + deadline_s, 3
        if n[TAIL] < n[END] and times[n[TAIL]] <= next_s:
            next_s, kind = times[n[TAIL]], 1
        next_s = max(next_s, f[NOW])
        span_s = next_s - f[NOW]
        if span_s > 0.0:
            held = 0
            for r in range(n[SLOTS]):
                if state[r] != 0:
                    held += 1
            f[BUSY_S] += n[BUSY] * span_s
            f[HELD_S] += held * span_s
            f[IN_FLIGHT_S] += n[IN_FLIGHT] * span_s
            f[NOW] = next_s
        if kind == 0:
            return 0
        if kind == 1:
            i = n[TAIL]
            n[TAIL] += 1
            n[ARRIVED] += 1
            f[LAST_ARRIVAL] = times[i]
            f[LAST_BUSY] = times[i]
            measured = times[i] >= measure_s
            if measured:
                n[REQUESTS] += 1
            if n[TAIL] - n[HEAD] > queue_limit:
                work[i] = -1.0
                if measured:
                    n[REJECTED] += 1
            elif n[READY] == 0:
                cold[i] = 1
                if measured:
                    n[COLD] += 1
                    if n[EPISODE] == 0:
                        n[EPISODE] = 1
                        n[EPISODES] += 1
                if stop & 1:
                    return 1
        elif kind == 2:
            r = which
            b = load[r]
            virtual[r] = heap[r, 0]
            since[r] = f[NOW]
            value = heap[r, b - 1]
            b -= 1
            parent = 0
            while True:
                child = 2 * parent + 1
                if child >= b:
                    break
                if child + 1 < b and heap[r, child + 1] < heap[r, child]:
                    child += 1
                if heap[r, child] >= value:
                    break
                heap[r, parent] = heap[r, child]
                parent = child
            heap[r, parent] = value
            load[r] = b
            n[IN_FLIGHT] -= 1
            n[FINISHED] += 1
            f[LAST_BUSY] = f[NOW]
            if b == 0:
                n[BUSY] -= 1
                if state[r] == 2:
                    state[r] = 0
                    if stop & 2:
                        return 2
        else:
            i = n[HEAD]
            n[HEAD] += 1
            f[LAST_BUSY] = f[NOW]
            if times[i] >= measure_s and work[i] >= 0.0:
                n[REJECTED] += 1


advance: Callable[..., int] = njit(cache=True)(_advance)
"""advance(until_s, stop, limits, times, work, cold, f, n, state, load, virtual, since, heap, slowdown, histogram)

Args:
    until_s: everything up to and at this moment happens.
    stop: 1 comes back when a request comes and no replica accepts, 2 when a draining replica has ended, 3 both.
    limits: (deadline_s of waiting, requests that may wait, Unix second from which is measured, slo_s of waiting).
    times, work, cold: of the requests, shape (m,). Waiting are those from n[HEAD] to n[TAIL], known to come those up to
        n[END]; work is in seconds alone on a replica, negative for one that was rejected.
    f, n: see the columns above. Sums over time and counts of requests that came from measure_s on.
    state, load, virtual, since: of each slot for a replica, shape (slots,).
    heap: shape (slots, most requests in progress at once).
    slowdown: shape (most + 1,).
"""


def _next_s(  # noqa: PLR0917 - as above
    times: Floats,
    n: NDArray[np.int64],
    load: NDArray[np.int64],
    virtual: Floats,
    since: Floats,
    heap: Floats,
    slowdown: Floats,
    deadline_s: float,
) -> float:
    next_s = np.inf
    for r in range(n[SLOTS]):
        b = load[r]
        if b > 0:
            next_s = min(next_s, since[r] + (heap[r, 0] - virtual[r]) * slowdown[b])
    if n[HEAD] < n[TAIL]:
        next_s = min(next_s, times[n[HEAD]] + deadline_s)
    if n[TAIL] < n[END]:
        next_s = min(next_s, times[n[TAIL]])
    return next_s


next_event_s: Callable[..., float] = njit(cache=True)(_next_s)
"""When a request comes, ends, or has waited too long; infinite if none does."""


class Queue:
    """The arrays of one model, and what is done with them."""

    def __init__(self, slowdown: Floats, *, deadline_s: float, queue_limit: float, slo_s: float) -> None:
        self.slowdown = slowdown
        self.limits = np.asarray([deadline_s, queue_limit, -math.inf, slo_s])
        self.f = np.zeros(FLOATS)
        self.f[NOW] = self.f[LAST_ARRIVAL] = self.f[LAST_BUSY] = -math.inf
        self.n = np.zeros(WHOLES, np.int64)
        self.times, self.work = np.zeros(0), np.zeros(0)
        self.cold = np.zeros(0, np.uint8)
        self.histogram = np.zeros(CELLS, np.int64)
        self._size(4)

    def _size(self, slots: int) -> None:
        self.state = np.zeros(slots, np.uint8)
        self.load = np.zeros(slots, np.int64)
        self.virtual, self.since = np.zeros(slots), np.zeros(slots)
        self.heap = np.zeros((slots, len(self.slowdown) - 1))

    def begin(self, now_s: float) -> None:
        """Time begins to count here."""
        self.f[NOW] = now_s

    def feed(self, times: Floats, work: Floats) -> None:
        """More requests, in the order of their times, none before those that are there."""
        head, end = int(self.n[HEAD]), int(self.n[END])
        self.times = np.concatenate([self.times[head:end], times])
        self.work = np.concatenate([self.work[head:end], work])
        self.cold = np.concatenate([self.cold[head:end], np.zeros(len(times), np.uint8)])
        self.n[TAIL] -= head
        self.n[HEAD] = 0
        self.n[END] = len(self.times)

    def advance(self, until_s: float, stop: int = 0) -> int:
        """See `advance`."""
        return advance(
            until_s,
            stop,
            self.limits,
            self.times,
            self.work,
            self.cold,
            self.f,
            self.n,
            self.state,
            self.load,
            self.virtual,
            self.since,
            self.heap,
            self.slowdown,
            self.histogram,
        )

    def next_s(self) -> float:
        """See `next_event_s`."""
        return next_event_s(
            self.times,
            self.n,
            self.load,
            self.virtual,
            self.since,
            self.heap,
            self.slowdown,
            self.limits[0],
        )

    def add_replica(self) -> None:
        """A replica that accepts from now on."""
        free = np.flatnonzero(self.state == NONE)
        if not len(free):
            old: tuple[NDArray[Any], ...] = (self.state, self.load, self.virtual, self.since, self.heap)
            count = len(self.state)
            self._size(2 * count)
            new: tuple[NDArray[Any], ...] = (self.state, self.load, self.virtual, self.since, self.heap)
            for before, after in zip(old, new, strict=True):
                after[:count] = before
            free = np.asarray([count])
        slot = int(free[0])
        self.state[slot] = ACCEPTS
        self.n[SLOTS] = max(self.n[SLOTS], slot + 1)
        self.n[READY] += 1
        self.n[EPISODE] = 0

    def drain_replica(self) -> bool:
        """The one with the fewest requests accepts no more, and ends when they have; whether it has ended at once."""
        accepts = np.flatnonzero(self.state == ACCEPTS)
        # The last of equals, so that slots fill from the first.
        slot = int(accepts[::-1][np.argmin(self.load[accepts[::-1]])])
        self.n[READY] -= 1
        idle = self.load[slot] == 0
        self.state[slot] = NONE if idle else DRAINS
        return bool(idle)

    @property
    def ready(self) -> int:
        return int(self.n[READY])

    @property
    def held(self) -> int:
        """Replicas that hold GPUs: ready, and draining."""
        return int(np.count_nonzero(self.state))

    @property
    def queued(self) -> int:
        return int(np.count_nonzero(self.work[self.n[HEAD] : self.n[TAIL]] >= 0))

    @property
    def in_flight(self) -> int:
        return int(self.n[IN_FLIGHT])

    def measure(self, from_s: float) -> None:
        """What was counted until now is forgotten; requests that come from then on count."""
        self.limits[2] = from_s
        for column in (BUSY_S, HELD_S, WAITED_S, COLD_WAITED_S, IN_FLIGHT_S, LONGEST_S):
            self.f[column] = 0.0
        for column in (REQUESTS, COLD, STARTED, REJECTED, IN_TIME, EPISODES):
            self.n[column] = 0
        self.histogram[:] = 0


def waited_quantile_s(histogram: NDArray[np.int64], share: float) -> float:
    """Within 1 %: the middle of the cell. 0 of nothing."""
    total = int(histogram.sum())
    if total == 0:
        return 0.0
    cell = int(np.searchsorted(np.cumsum(histogram), math.ceil(share * total)))
    return 0.0 if cell == 0 else float(LOWEST_S * RATIO ** (cell - 0.5))


__all__ = ["Queue", "advance", "next_event_s", "waited_quantile_s"]
