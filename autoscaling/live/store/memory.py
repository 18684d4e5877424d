"""What the store holds in memory: what readers are served from, and what waits to be written."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from autoscaling.core.types import State
from autoscaling.live.records import Override
from autoscaling.live.store.buffer import Batch
from autoscaling.live.store.mirror import STEPS, Amounts, Entry, LevelArrays, Mirror

MAX_PENDING = 200_000
"""Records that may wait while the database is away: 3 minutes of 1,000 busy models by the second, days by the hour."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that memory knows, to begin a new database with."""

    levels: Mapping[str, Mapping[int, LevelArrays]]
    """model -> step_s -> buckets, pending ones among them."""
    since: Mapping[tuple[str, int], float]
    states: Mapping[str, State]
    plan: str | None
    overrides: tuple[Override, ...]


@dataclass(slots=True)
class Memory:
    """Every field is used under `lock`, which is never held over a call to the database."""

    max_pending: int = MAX_PENDING
    lock: threading.RLock = field(default_factory=threading.RLock)
    mirror: Mirror = field(default_factory=Mirror)
    buffer: Batch = field(default_factory=Batch)
    inflight: Batch | None = None
    """Taken to be written, and not known to be in."""
    last_seq: int = 0
    """Of what was taken last to be written; what comes now will be the next."""
    written_seq: int = 0
    states: dict[str, State] = field(default_factory=dict)
    plan: str | None = None
    overrides: dict[str, Override] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    notices: list[str] = field(default_factory=list)

    def bound(self) -> None:
        """Keeps what waits within its limit."""
        if len(self.buffer) > self.max_pending:
            self.dropped.update(self.buffer.shrink(self.max_pending))

    def take(self) -> Batch | None:
        """The batch to be written next; the same again until `written` says that it is in."""
        with self.lock:
            if self.inflight is None and self.buffer:
                self.last_seq += 1
                self.inflight, self.buffer = self.buffer, Batch()
                self.inflight.seq = self.last_seq
            return self.inflight

    def written(self) -> None:
        with self.lock:
            if self.inflight is not None:
                self.written_seq = self.inflight.seq
            self.inflight = None

    def waiting(self) -> Iterator[Batch]:
        """What is not known to be in the database, oldest first."""
        if self.inflight is not None:
            yield self.inflight
        yield self.buffer

    def replay(self, seconds: Iterable[tuple[str, Entry]], now_s: float) -> None:
        """Makes the one-second level anew from the journal and what waits; the coarse ones are loaded when wanted."""
        self.mirror.forget_levels()
        for model, entry in seconds:
            self.mirror.add(model, entry, now_s)
        for batch in self.waiting():
            for (model, time_s, step_s), amounts in batch.traffic.items():
                self.mirror.add(model, (time_s, step_s, amounts), now_s)

    def snapshot(self, now_s: float) -> Snapshot:
        """Everything; traffic that waits is in it, and waits no longer."""
        levels, since = {}, {}
        for model, series in self.mirror.models.items():
            series.fold(now_s)
            levels[model] = {step_s: series.arrays(step_s) for step_s in STEPS}
            since.update({(model, step_s): since_s for step_s, since_s in series.since.items()})
        for batch in self.waiting():
            batch.traffic = {}
        return Snapshot(levels, since, dict(self.states), self.plan, tuple(self.overrides.values()))


def amounts_of(arrays: LevelArrays) -> Iterator[tuple[int, Amounts]]:
    """(index, amounts) of each bucket, as Python's numbers."""
    counts = np.rint(arrays.amounts[:3].astype(np.float64)).astype(np.int64)
    for index, arrivals, tokens_in, tokens_out, busy_s, waited_s in zip(
        arrays.index.tolist(), *counts.tolist(), *arrays.amounts[3:].tolist(), strict=True
    ):
        yield index, (arrivals, tokens_in, tokens_out, busy_s, waited_s)
