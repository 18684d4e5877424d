"""What Serve says of a model's replicas, sampled over and over, and what follows from the samples."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.clusters import BenchError, Running

EVERY_S = 0.25
STOPPING = "STOPPING"


@dataclass(frozen=True, slots=True)
class Sample:
    """One model's replicas at one moment."""

    at_s: float
    """Unix time at which they were so."""
    states: Mapping[str, int]
    """Serve's state -> count; starting, running and stopping ones hold GPUs."""

    @property
    def held(self) -> int:
        return sum(self.states.values())

    @property
    def stays(self) -> int:
        """Of those, what is not being stopped."""
        return sum(n for state, n in self.states.items() if state != STOPPING)


class Watch:
    """Samples of every model of a running cluster, for as long as the block lasts."""

    def __init__(self, running: Running, every_s: float = EVERY_S) -> None:
        self.samples: dict[str, list[Sample]] = {}
        self._running = running
        self._every_s = every_s

    async def __aenter__(self) -> Watch:
        self._task = asyncio.ensure_future(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        done = (await asyncio.gather(self._task, return_exceptions=True))[0]
        if isinstance(done, Exception):
            raise done

    async def _watch(self) -> None:
        while True:
            asked_s = time.time()
            status = await asyncio.to_thread(self._running.status)
            # Serve is asked anew for each status.
            at_s = (asked_s + time.time()) / 2
            for model in status["models"]:
                states = dict(model["replicas_by_state"])
                self.samples.setdefault(model["id"], []).append(Sample(at_s, states))
            await asyncio.sleep(max(0.0, asked_s + self._every_s - time.time()))

    async def dark(self, model: str, timeout_s: float = 180) -> None:
        """Until the model has no replica of any state. Raises BenchError."""
        since_s = time.time()
        while not any(s.held == 0 and s.at_s >= since_s for s in self.samples.get(model, [])[-1:]):
            if self._task.done():
                self._task.result()
            if time.time() > since_s + timeout_s:
                raise BenchError(f"{model} does not go dark within {timeout_s:.0f} s")
            await asyncio.sleep(self._every_s)


def held_s(samples: Sequence[Sample], from_s: float, until_s: float) -> float:
    """Replica-seconds in a span: between two samples the mean of both holds."""
    total = 0.0
    for one, other in itertools.pairwise(samples):
        span_s = min(other.at_s, until_s) - max(one.at_s, from_s)
        if span_s > 0:
            total += (one.held + other.held) / 2 * span_s
    return total


@dataclass(frozen=True, slots=True)
class Life:
    """One replica's, from the samples of a model that has one at most. Each moment is halfway between two samples."""

    begun_s: float
    let_go_s: float
    gone_s: float


def life(samples: Sequence[Sample], after_s: float) -> Life:
    """The first that began after a moment. Raises BenchError if it did not begin, or has not ended."""
    found: list[float] = []
    wanted = (lambda s: s.held > 0, lambda s: s.stays == 0, lambda s: s.held == 0)
    for one, other in itertools.pairwise(samples):
        if other.at_s < after_s:
            continue
        middle_s = max(after_s, (one.at_s + other.at_s) / 2)
        while len(found) < len(wanted) and wanted[len(found)](other):
            found.append(middle_s)
    if len(found) < len(wanted):
        raise BenchError(f"{len(samples)} samples have no whole life of a replica after {after_s:.1f}")
    return Life(*found)
