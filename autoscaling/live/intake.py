"""The gateways' counts on their way into the store: each batch once, acknowledged when it can't be lost any more."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from autoscaling.core.types import State
from autoscaling.live.records import TrafficRow
from autoscaling.live.store.store import AHEAD_S
from autoscaling.ports import Clock

STATE_KEY = "gateways"
"""Under which the store keeps how far every gateway's batches are in, beside the models' states."""
KEPT_SOURCES = 256
WAIT_S = 60.0
"""For how long nothing is taken while the store was not reached yet. What is in it of a gateway's batches is not known
then, and gateways keep them for a while."""
ACKNOWLEDGE_ANYWAY_S = 10.0
"""While the store can't write it holds what came in memory, bounded; gateways would only do the same once more."""


class TrafficStore(Protocol):
    """The part of the store that is needed here."""

    @property
    def attached(self) -> bool: ...
    def states(self) -> Mapping[str, State]: ...
    def add_traffic(self, rows: Sequence[TrafficRow]) -> None: ...
    def put_states(self, states: Mapping[str, State]) -> None: ...
    def together(self) -> AbstractContextManager[int]: ...
    @property
    def committed(self) -> int: ...


@dataclass(slots=True)
class _Source:
    """One gateway's counter: the last batch taken, and the last one that is committed."""

    taken: int = 0
    durable: int = 0
    waiting: list[tuple[int, int, float]] = field(default_factory=list)
    """(batch, the store's transaction that it goes into, when it was taken) of those that are not acknowledged."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What one report brought."""

    rows: Sequence[TrafficRow]
    sequence: int
    """What the gateway need not keep any more."""


class Intake:
    """Takes batches. Thread-safe."""

    def __init__(self, store: TrafficStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._sources: OrderedDict[str, _Source] | None = None
        self._begun_s = clock.monotonic_s()

    def take(self, source: str, batches: Sequence[tuple[int, Sequence[Sequence[Any]]]]) -> Taken:
        """What is new in a report's batches, and up to where the gateway may forget."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            sources = self._sources = self._sources if self._sources is not None else self._known(now_s)
            if sources is None:
                return Taken((), 0)
            known = sources.setdefault(source, _Source())
            sources.move_to_end(source)
            while len(sources) > KEPT_SOURCES:
                sources.popitem(last=False)
            new: list[int] = []
            rows: list[TrafficRow] = []
            for sequence, batch in batches:
                if sequence > known.taken:
                    known.taken = sequence
                    new.append(sequence)
                    rows += [TrafficRow(str(row[0]), self._second(row[1]), *row[2:]) for row in batch]
            if new:
                marks = {name: float(each.taken) for name, each in sources.items()}
                # In one transaction: a kill between the two would lose a batch, or count it twice.
                with self._store.together() as transaction:
                    self._store.put_states({STATE_KEY: State(values=marks)})
                    self._store.add_traffic(rows)
                known.waiting += [(sequence, transaction, now_s) for sequence in new]
            self._settle(known, now_s)
            return Taken(rows, known.durable)

    def _second(self, second: int) -> int:
        """What comes from further ahead than the store takes came now: the clock was set back, or clocks differ."""
        now_s = self._clock.now_s()
        return int(second if second <= now_s + AHEAD_S else now_s)

    def _known(self, now_s: float) -> OrderedDict[str, _Source] | None:
        """How far each gateway's batches are in, as the store has it; None while that may still be learned."""
        if not self._store.attached and now_s < self._begun_s + WAIT_S:
            return None
        marks = self._store.states().get(STATE_KEY)
        return OrderedDict(
            (source, _Source(int(sequence), int(sequence)))
            for source, sequence in (marks.values if marks else {}).items()
        )

    def _settle(self, known: _Source, now_s: float) -> None:
        committed = self._store.committed
        while known.waiting:
            sequence, transaction, taken_s = known.waiting[0]
            if transaction > committed and now_s - taken_s < ACKNOWLEDGE_ANYWAY_S:
                return
            known.durable = sequence
            known.waiting.pop(0)
