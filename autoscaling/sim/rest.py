"""What a model rests on while it has no replicas: its rung, what holding that costs, and the way to another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from autoscaling.core.types import Rung
from autoscaling.sim.pool import Pool, Sharer
from autoscaling.sim.profile import Profile


@dataclass(slots=True)
class Used:
    """GPU-seconds and counts of one model since it is measured."""

    since_s: float = -math.inf
    starting_s: float = 0.0
    stopping_s: float = 0.0
    parked_s: float = 0.0
    """What the parked engine's memory is charged."""
    node_s: float = 0.0
    """The same of rungs below, while nothing runs: nodes that are kept."""
    starts: dict[str, int] = field(default_factory=dict)
    """By the rung where they began."""
    failed_starts: int = 0
    cancelled_starts: int = 0
    scale_ups: int = 0
    scale_downs: int = 0
    evictions: int = 0

    def starting(self, begun_s: float, until_s: float, gpus: float) -> None:
        """GPUs that a start held, from when it is measured."""
        self.starting_s += max(0.0, until_s - max(begun_s, self.since_s)) * gpus

    def stopping(self, begun_s: float, until_s: float, gpus: float) -> None:
        """GPUs that a replica held while it was ended, from when it is measured."""
        self.stopping_s += max(0.0, until_s - max(begun_s, self.since_s)) * gpus


class Rest:
    """Of one model. Dark from the beginning, on the profile's base."""

    def __init__(self, model: Sharer, profile: Profile, pool: Pool, delay_s: Callable[[Rung], float]) -> None:
        """`delay_s` draws what a start from a rung takes."""
        self.used = Used()
        self.rung = self._base = profile.up_to(profile.base)
        self.moved = False
        """Whether the rung changed at once when it was asked for."""
        self.evicted = False
        """Another model's engine took the memory of this one's, and that has not been seen yet."""
        self._model = model
        self._profile = profile
        self._pool = pool
        self._delay_s = delay_s
        self._then = self._reached = self.rung
        self._asked: Rung | None = None
        self._dark_s: float | None = -math.inf
        self._warming: tuple[float, float, Rung] | None = None  # (ready, begun, to)

    @property
    def dark(self) -> bool:
        return self._dark_s is not None

    @property
    def next_s(self) -> float:
        """When the way up ends."""
        return math.inf if self._warming is None else self._warming[0]

    def begin(self, now_s: float) -> None:
        self._dark_s = self.used.since_s = now_s

    def ask(self, rung: Rung) -> None:
        """What it is to rest on when it is dark."""
        if rung != self._asked:
            self._asked = rung
            self._then = self._profile.up_to(min(rung, Rung.PARKED))

    def darken(self, now_s: float) -> None:
        """The last replica, or start of one, is gone."""
        self._dark_s = now_s
        # Only an engine that was there can be parked: a start that is given up leaves what it began from.
        self.rung = min(self._then, max(self._reached, self._base))
        if self.rung == Rung.PARKED:
            self._pool.park(self._model, now_s)
        self.hold(now_s)

    def served(self) -> None:
        """A replica is ready: its engine can be parked from now on."""
        self._reached = max(self._reached, Rung.PARKED)

    def left_s(self, now_s: float) -> float:
        """What a start that begins now has left of the way that has begun, which ends here; infinite if none has."""
        if self._warming is None:
            return math.inf
        ready_s, _, rung = self._warming
        self._unwarm(now_s)
        return ready_s - now_s + self._delay_s(rung)

    def light(self, now_s: float) -> Rung:
        """A start begins; from which rung."""
        if self.dark:
            self._reached = self.rung
        self.book(now_s)
        self._dark_s = None
        rung = self.rung
        if rung == Rung.PARKED:
            self._pool.unpark(self._model)
            self.rung = self._base
        return rung

    def book(self, now_s: float) -> None:
        """What holding the present rung has cost."""
        if self._dark_s is None:
            return
        span_s = max(0.0, now_s - self._dark_s)
        self._dark_s = now_s
        cost = self._profile.starts[self.rung].cost_per_s * self._model.gpus * span_s
        if self.rung == Rung.PARKED:
            self.used.parked_s += cost
        else:
            self.used.node_s += cost

    def warmed(self) -> None:
        """The way up has come to its end."""
        assert self._warming is not None
        ready_s, _, rung = self._warming
        self._unwarm(ready_s)
        self.book(ready_s)
        self.rung = rung
        if rung == Rung.PARKED:
            self._pool.park(self._model, ready_s)

    def evict(self, now_s: float) -> None:
        """Another model's parked engine takes the place of this one's."""
        self.book(max(now_s, self._dark_s or now_s))
        self.rung = self._base
        self.evicted = True
        self.used.evictions += 1

    def measure(self, now_s: float) -> None:
        """Only what is from now on counts."""
        self.book(now_s)
        self.used = Used(now_s)

    def close(self, now_s: float) -> None:
        """What is still open is charged until now."""
        self.book(now_s)
        if self._warming is not None:
            self._unwarm(now_s)

    def hold(self, now_s: float) -> None:
        """What was asked for: down at once, up in the time that is between the two."""
        # Whose engine just had to make room for another's is decided anew first.
        if not self.dark or self.evicted:
            return
        rung = self._then
        if self._warming is not None and self._warming[2] != rung:
            self._unwarm(now_s)
        if rung < self.rung:
            self.moved = True
            self.book(now_s)
            self._pool.unpark(self._model)
            self.rung = rung
        elif rung > self.rung and self._warming is None:
            if rung == Rung.PARKED and not self._pool.take(self._model.devices):
                return
            takes_s = max(0.0, self._delay_s(self.rung) - self._profile.starts[rung].quantile_s(0.5))
            self._warming = (now_s + takes_s, now_s, rung)

    def _unwarm(self, now_s: float) -> None:
        assert self._warming is not None
        _, begun_s, rung = self._warming
        if rung == Rung.PARKED:
            self.used.starting(begun_s, now_s, self._model.gpus)
            self._pool.give(self._model.devices)
        self._warming = None


__all__ = ["Rest", "Used"]
