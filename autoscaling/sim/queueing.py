"""Requests in the queue and in the replicas of one model: the arrays of `events`, and what is done with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscaling.loop import Stands
from autoscaling.sim import events
from autoscaling.sim.events import (
    ACCEPTS,
    ARRIVED,
    BUSY_S,
    CELLS,
    COLD,
    COLD_WAITED_S,
    DARK,
    DONE,
    DRAINS,
    END,
    EPISODE,
    EPISODES,
    FLOATS,
    FREED,
    HEAD,
    HELD,
    HELD_S,
    IN_FLIGHT,
    IN_FLIGHT_S,
    IN_TIME,
    LAST_ARRIVAL,
    LAST_BUSY,
    LONGEST_S,
    LOWEST_S,
    NEXT,
    NONE,
    NOW,
    RATIO,
    READY,
    REJECTED,
    REQUESTS,
    SLOTS,
    STARTED,
    TAIL,
    WAITED_S,
    WAITING,
    WHOLES,
    Floats,
)

RIDE = 256
"""Ticks of one ride at most."""
ROUNDING_S = 1e-6
"""Differences of Unix seconds are right to a quarter of that."""


class Queue:
    """Of one model."""

    def __init__(
        self,
        slowdown: Floats,
        *,
        deadline_s: float,
        queue_limit: float,
        slo_s: float,
        handoff_s: float = 0.0,
    ) -> None:
        self.slowdown = slowdown
        self.limits = np.asarray([deadline_s, queue_limit, -math.inf, slo_s + ROUNDING_S, handoff_s])
        self.f = np.zeros(FLOATS)
        self.f[NOW] = self.f[LAST_ARRIVAL] = self.f[LAST_BUSY] = -math.inf
        self.n = np.zeros(WHOLES, np.int64)
        self.times, self.work = np.zeros(0), np.zeros(0)
        self.cold = np.zeros(0, np.uint8)
        self.histogram = np.zeros(CELLS, np.int64)
        self.ticks: Floats | None = None
        self._size(4)

    def _size(self, slots: int) -> None:
        self.state = np.zeros(slots, np.uint8)
        self.load = np.zeros(slots, np.int64)
        self.virtual, self.since, self.ends = np.zeros(slots), np.zeros(slots), np.zeros(slots)
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
        self.f[NEXT] = math.nan

    def advance(self, until_s: float, stop: int = 0) -> int:
        """See `events.advance`."""
        return events.advance(until_s, stop, *self._arrays())

    def _arrays(self) -> tuple[Any, ...]:
        """What `events` works on, in its order; some are exchanged as requests and replicas come."""
        return (
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
            self.ends,
            self.heap,
            self.slowdown,
            self.histogram,
        )

    def ride(self, now_s: float, before_s: float, tick_s: float, stands: Stands) -> Floats:
        """The ticks of `events.ride`."""
        if self.ticks is None:
            self.ticks = np.zeros(RIDE)
        count = events.ride(now_s, before_s, tick_s, *stands, self.ticks, *self._arrays())
        return self.ticks[:count]

    def next_s(self) -> float:
        """See `events.next_event_s`."""
        known_s = float(self.f[NEXT])
        if known_s == known_s:  # noqa: PLR0124 - not NaN
            return known_s
        found_s = float(events.next_event_s(self.times, self.n, self.load, self.ends, self.limits[0]))
        self.f[NEXT] = found_s
        return found_s

    def add_replica(self) -> None:
        """A replica that accepts from now on."""
        states = self.state.tolist()
        if NONE in states:
            slot = states.index(NONE)
        else:
            old = self._slots()
            slot = len(states)
            self._size(2 * slot)
            new = self._slots()
            for before, after in zip(old, new, strict=True):
                after[:slot] = before
        self.state[slot] = ACCEPTS
        self.n[SLOTS] = max(self.n[SLOTS], slot + 1)
        self.n[READY] += 1
        self.n[HELD] += 1
        self.n[EPISODE] = 0
        if self.n[WAITING]:
            # They begin at the next advance.
            self.f[NEXT] = self.f[NOW]

    def _slots(self) -> tuple[NDArray[Any], ...]:
        return self.state, self.load, self.virtual, self.since, self.ends, self.heap

    def drain_replica(self) -> bool:
        """The one with the fewest requests accepts no more, and ends when they have; whether it has ended at once."""
        states, loads = self.state.tolist(), self.load.tolist()
        # The last of equals, so that slots fill from the first.
        accepts = (slot for slot in reversed(range(len(states))) if states[slot] == ACCEPTS)
        slot = min(accepts, key=loads.__getitem__)
        self.n[READY] -= 1
        if self.load[slot]:
            self.state[slot] = DRAINS
            return False
        self.state[slot] = NONE
        self.n[HELD] -= 1
        while self.n[SLOTS] and self.state[self.n[SLOTS] - 1] == NONE:
            self.n[SLOTS] -= 1
        return True

    @property
    def ready(self) -> int:
        return int(self.n[READY])

    @property
    def held(self) -> int:
        """Replicas that hold GPUs: ready, and draining."""
        return int(self.n[HELD])

    @property
    def queued(self) -> int:
        return int(self.n[WAITING])

    @property
    def in_flight(self) -> int:
        return int(self.n[IN_FLIGHT])

    @property
    def unanswered(self) -> bool:
        """A request waits, is in progress, or is known to come."""
        n = self.n
        return bool(n[WAITING] or n[IN_FLIGHT] or n[TAIL] < n[END])

    def works_s(self) -> float:
        """Until when requests are worked on at the least, as what is in progress by now goes; -inf if nothing is."""
        slots = int(self.n[SLOTS])
        return float(self.ends[:slots].max(where=self.load[:slots] > 0, initial=-math.inf))

    def close(self, least_s: float) -> None:
        """Whoever still waits has waited in vain until now, and for so long at least."""
        head, tail = int(self.n[HEAD]), int(self.n[TAIL])
        for i in range(head, tail):
            if self.work[i] >= 0.0 and self.times[i] >= self.limits[2]:
                events.count_wait(i, self.times, self.cold, self.f, self.n, self.histogram, least_s)

    def measure(self, from_s: float) -> None:
        """What was counted until now is forgotten; requests that come from then on count."""
        self.limits[2] = from_s
        for column in (BUSY_S, HELD_S, WAITED_S, COLD_WAITED_S, IN_FLIGHT_S, LONGEST_S):
            self.f[column] = 0.0
        # Who comes to wait in a dark span that has begun waits in one that counts.
        for column in (REQUESTS, COLD, STARTED, REJECTED, IN_TIME, EPISODES, EPISODE):
            self.n[column] = 0
        self.histogram[:] = 0


def waited_quantile_s(histogram: NDArray[np.int64], share: float) -> float:
    """Within 1 %: the middle of the cell. 0 of nothing."""
    total = int(histogram.sum())
    if total == 0:
        return 0.0
    cell = int(np.searchsorted(np.cumsum(histogram), math.ceil(share * total)))
    return 0.0 if cell == 0 else float(LOWEST_S * RATIO ** (cell - 0.5))


__all__ = [
    "ARRIVED",
    "BUSY_S",
    "CELLS",
    "COLD",
    "COLD_WAITED_S",
    "DARK",
    "DONE",
    "EPISODES",
    "FREED",
    "HELD_S",
    "IN_FLIGHT",
    "IN_FLIGHT_S",
    "IN_TIME",
    "LAST_ARRIVAL",
    "LAST_BUSY",
    "LONGEST_S",
    "NOW",
    "READY",
    "REJECTED",
    "REQUESTS",
    "TAIL",
    "WAITED_S",
    "WAITING",
    "Floats",
    "Queue",
    "waited_quantile_s",
]
