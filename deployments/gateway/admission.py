"""Who may wait: one model's bounded queue as a value, and when those turned away should return."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from deployments.errors import QueueFull
from deployments.gateway.engines import Progress

# A first cold start has no estimate; a client that returns in five seconds learns more and costs nothing.
_UNKNOWN_START_S = 5


@dataclass(frozen=True, slots=True)
class Admission:
    """How many requests of one model wait for a lease (`queued`) and hold one (`in_flight`).

    Every method returns the next state. `queued` is bounded by `max_queued` at the door only: a request that
    was let in and whose engine died goes back to the queue even when that is full, for it was promised an
    answer.
    """

    max_queued: int
    queued: int = 0
    in_flight: int = 0

    def arrive(self, model: str, progress: Progress | None) -> Admission:
        """A request comes to wait. Raises `QueueFull`, with `retry_after_s`, at the bound."""
        if self.queued >= self.max_queued:
            raise QueueFull(
                f"{self.queued} requests already wait for an engine of {model!r}; its queue holds no more.",
                retry_after_s=retry_after_s(progress),
            )
        return replace(self, queued=self.queued + 1)

    def lease(self) -> Admission:
        """A waiting request was given an engine."""
        return replace(self, queued=self.queued - 1, in_flight=self.in_flight + 1)

    def requeue(self) -> Admission:
        """The engine of a request failed before the client saw a byte: it waits again."""
        return replace(self, queued=self.queued + 1, in_flight=self.in_flight - 1)

    def give_up(self) -> Admission:
        """A waiting request leaves: its deadline passed, its client hung up, or its engine can't start."""
        return replace(self, queued=self.queued - 1)

    def finish(self) -> Admission:
        """A request that held an engine is over."""
        return replace(self, in_flight=self.in_flight - 1)


def retry_after_s(progress: Progress | None) -> int:
    """Whole seconds, at least 1, until a turned-away client has a chance: what remains of the model's wake.

    A model that isn't being lit is full because it is busy; its queue moves within a second.
    """
    if progress is None:
        return 1
    if progress.estimate_s is None:
        return _UNKNOWN_START_S
    return max(1, math.ceil(progress.estimate_s - progress.elapsed_s))
