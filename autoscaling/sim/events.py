"""What happens to the requests of one model, event by event. Compiled: see `advance`.

Replicas share their work equally among their requests (processor sharing), as continuous batching does: with b
requests in progress each second of work takes slowdown[b] seconds. A replica keeps a virtual time that advances by
dt / slowdown[b]; a request ends when it has advanced by its work, so that the next to end is the top of a heap.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Columns of `f`, floats.
NOW, BUSY_S, HELD_S, WAITED_S, COLD_WAITED_S, IN_FLIGHT_S, LAST_ARRIVAL, LAST_BUSY, LONGEST_S, NEXT = range(
    10
)
FLOATS = 10
# Columns of `n`, whole numbers. The first ten are the state, the others counts.
HEAD, TAIL, END, IN_FLIGHT, READY, SLOTS, BUSY, EPISODE, WAITING, HELD = range(10)
ARRIVED, REQUESTS, COLD, STARTED, REJECTED, IN_TIME, EPISODES, FINISHED = range(10, 18)
WHOLES = 18
NONE, ACCEPTS, DRAINS = 0, 1, 2
"""States of a slot."""

LOWEST_S, RATIO, CELLS = 1e-3, 1.01, 2200
"""The histogram of waiting: cell 0 is no waiting, cell i begins at LOWEST_S * RATIO**(i - 1)."""

DONE, DARK, FREED = 0, 1, 2
"""Why `advance` came back: it is `until_s`; a request came while no replica was there; a draining replica ended."""


def _count_wait(  # noqa: PLR0917 - the loop's own arrays
    i: int,
    times: Floats,
    cold: NDArray[np.uint8],
    f: Floats,
    n: NDArray[np.int64],
    histogram: NDArray[np.int64],
    least_s: float,
) -> float:
    """Request i stops waiting now, whatever for; it has waited so long at least."""
    waited: float = max(f[NOW] - times[i], least_s)
    n[STARTED] += 1
    f[WAITED_S] += waited
    f[LONGEST_S] = max(f[LONGEST_S], waited)
    if cold[i]:
        f[COLD_WAITED_S] += waited
    cell = 0
    if waited >= LOWEST_S:
        # The last cell has no end. Compared before it is a whole number, which infinity has none of.
        place = math.log(waited / LOWEST_S) / math.log(RATIO)
        cell = 1 + int(place) if place < CELLS - 2 else CELLS - 1
    histogram[cell] += 1
    return waited


count_wait: Callable[..., float] = njit(cache=True)(_count_wait)


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
    ends: Floats,
    heap: Floats,
    slowdown: Floats,
    histogram: NDArray[np.int64],
) -> int:
    deadline_s, queue_limit, measure_s, slo_s, handoff_s = limits
    most = len(slowdown) - 1
    # Where no replica has room, none has until one ends a request.
    full = False
    while True:
        # Who waits goes to the replica with the fewest requests.
        while n[WAITING] > 0 and not full:
            i = n[HEAD]
            if work[i] < 0.0:
                n[HEAD] += 1
                continue
            best, fewest = -1, most
            for r in range(n[SLOTS]):
                if state[r] == 1 and load[r] < fewest:
                    best, fewest = r, load[r]
                    if fewest == 0:
                        break
            if best < 0:
                full = True
                break
            n[HEAD] += 1
            n[WAITING] -= 1
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
            ends[r] = since[r] + (heap[r, 0] - virtual[r]) * slowdown[b + 1]
            n[IN_FLIGHT] += 1
            if times[i] >= measure_s and count_wait(i, times, cold, f, n, histogram, handoff_s) <= slo_s:
                n[IN_TIME] += 1
        # What comes next.
        next_s, kind, which = math.inf, 0, -1
        for r in range(n[SLOTS]):
            if ends[r] <= next_s and load[r] > 0:
                next_s, kind, which = ends[r], 2, r
        if n[WAITING] > 0 and times[n[HEAD]] + deadline_s < next_s:
            next_s, kind = times[n[HEAD]] + deadline_s, 3
        if n[TAIL] < n[END] and times[n[TAIL]] <= next_s:
            next_s, kind = times[n[TAIL]], 1
        if next_s > until_s or (kind == 3 and next_s >= until_s):
            f[NEXT] = next_s
            next_s, kind = until_s, 0
        next_s = max(next_s, f[NOW])
        span_s = next_s - f[NOW]
        if span_s > 0.0:
            f[BUSY_S] += n[BUSY] * span_s
            f[HELD_S] += n[HELD] * span_s
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
            if n[WAITING] == 0:
                # Whoever was turned away behind the last that waited is passed over.
                n[HEAD] = i
            if n[WAITING] >= queue_limit and not _has_room(state, load, n[SLOTS], most):
                work[i] = -1.0
                if n[WAITING] == 0:
                    n[HEAD] = n[TAIL]
                if measured:
                    n[REJECTED] += 1
                    # As one that waited in vain: to turn requests away must not be the cheapest.
                    count_wait(i, times, cold, f, n, histogram, deadline_s)
            else:
                n[WAITING] += 1
                if n[READY] == 0:
                    cold[i] = 1
                    if measured:
                        n[COLD] += 1
                        if n[EPISODE] == 0:
                            n[EPISODE] = 1
                            n[EPISODES] += 1
                    if stop & 1:
                        f[NEXT] = math.nan
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
            full = False
            if b > 0:
                ends[r] = since[r] + (heap[r, 0] - virtual[r]) * slowdown[b]
            else:
                n[BUSY] -= 1
                if state[r] == 2:
                    state[r] = 0
                    n[HELD] -= 1
                    while n[SLOTS] > 0 and state[n[SLOTS] - 1] == 0:
                        n[SLOTS] -= 1
                    if stop & 2:
                        f[NEXT] = math.nan
                        return 2
        else:
            i = n[HEAD]
            n[HEAD] += 1
            n[WAITING] -= 1
            while n[WAITING] > 0 and work[n[HEAD]] < 0.0:
                n[HEAD] += 1
            f[LAST_BUSY] = f[NOW]
            if times[i] >= measure_s:
                n[REJECTED] += 1
                count_wait(i, times, cold, f, n, histogram, 0.0)


def _room(state: NDArray[np.uint8], load: NDArray[np.int64], slots: int, most: int) -> bool:
    for r in range(slots):  # noqa: SIM110 - the compiler does better with a loop
        if state[r] == 1 and load[r] < most:
            return True
    return False


_has_room: Callable[..., bool] = njit(cache=True)(_room)

advance: Callable[..., int] = njit(cache=True)(_advance)
"""advance(until_s, stop, limits, times, work, cold, f, n, state, load, virtual, since, ends, heap, slowdown, histogram)

Args:
    until_s: everything up to and at this moment happens, but that a deadline at that very moment has not passed yet.
    stop: 1 comes back when a request comes and no replica accepts, 2 when a draining replica has ended, 3 both.
    limits: (deadline_s of waiting, requests that may wait, Unix second from which is measured, slo_s of waiting,
        seconds that a request waits at least before a replica begins with it), shape (5,).
    times, work, cold: of the requests, shape (m,). Those that came and have not begun are from n[HEAD] to n[TAIL],
        known to come those up to n[END]; work is in seconds alone on a replica, negative for one that was rejected.
    f, n: see the columns above. Sums over time and counts of requests that came from measure_s on. f[NEXT] is when
        something happens next, NaN where that must be worked out anew.
    state, load, virtual, since, ends: of each slot for a replica, shape (slots,). `ends`: when its next request does.
    heap: shape (slots, most requests in progress at once).
    slowdown: shape (most + 1,).
"""


def _next_s(
    times: Floats, n: NDArray[np.int64], load: NDArray[np.int64], ends: Floats, deadline_s: float
) -> float:
    next_s = np.inf
    for r in range(n[SLOTS]):
        if load[r] > 0:
            next_s = min(next_s, ends[r])
    if n[WAITING] > 0:
        next_s = min(next_s, times[n[HEAD]] + deadline_s)
    if n[TAIL] < n[END]:
        next_s = min(next_s, times[n[TAIL]])
    return next_s


next_event_s: Callable[..., float] = njit(cache=True)(_next_s)
"""When a request comes, ends, or has waited too long; infinite if none does."""


GRID = 1e-6
"""Share of a tick within which a moment counts as the tick."""


def _ride(  # noqa: PLR0917 - what `advance` is given, and its own
    now_s: float,
    before_s: float,
    tick_s: float,
    least: int,
    most: int,
    silence_s: float,
    ticks: Floats,
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
    ends: Floats,
    heap: Floats,
    slowdown: Floats,
    histogram: NDArray[np.int64],
) -> int:
    for done in range(len(ticks)):
        next_s = f[NEXT]
        if math.isnan(next_s):
            next_s = next_event_s(times, n, load, ends, limits[0])
        if next_s >= before_s:
            return done
        to_s = max(math.ceil(next_s / tick_s - GRID) * tick_s, now_s + tick_s)
        if to_s >= before_s:
            return done
        advance(
            to_s,
            0,
            limits,
            times,
            work,
            cold,
            f,
            n,
            state,
            load,
            virtual,
            since,
            ends,
            heap,
            slowdown,
            histogram,
        )
        ticks[done] = now_s = to_s
        here = n[WAITING] + n[IN_FLIGHT]
        if here == 0 and silence_s > 0.0 and n[TAIL] < n[END]:
            comes_s = max(math.ceil(times[n[TAIL]] / tick_s - GRID) * tick_s, now_s + tick_s)
            if comes_s < before_s and comes_s < f[LAST_BUSY] + silence_s:
                continue
        if not least <= here <= most:
            return done + 1
    return len(ticks)


ride: Callable[..., int] = njit(cache=True)(_ride)
"""ride(now_s, before_s, tick_s, least, most, silence_s, ticks, ...): `advance` from tick to tick where something
happens, up to the last one before `before_s`, or the first at which fewer than `least` or more than `most` requests
wait or are in progress; but over none at all if the next one is seen before `silence_s` is over and before `before_s`.

Time passes in the very steps in which it would if each tick were looked at, so that no sum differs in its last digit.
At least one replica must accept requests and none be draining. Returns how many ticks there were; `ticks`, of any shape
(m,), is filled with them, and ends it when it is full.
"""


__all__ = ["CELLS", "DARK", "DONE", "FREED", "GRID", "Floats", "advance", "next_event_s", "ride"]
