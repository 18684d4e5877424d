"""Which parked engines to keep within a memory budget. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Parked:
    """A parked engine: `start_s` is what a start without it takes, `uses` how often it served since it was lit."""

    engine_id: str
    memory_bytes: int
    start_s: float
    uses: int
    parked_s: float  # Unix time


@dataclass(frozen=True, slots=True)
class Eviction:
    """Engines to end, least valuable first, and the clock for the next call."""

    evict: tuple[str, ...]
    clock: float


def value(engine: Parked, clock: float) -> float:
    """GreedyDual-Size-Frequency (Cherkasova, HPL-98-69R1): clock + frequency x cost / size, per MiB."""
    return clock + max(1, engine.uses) * engine.start_s / max(1.0, engine.memory_bytes / 2**20)


def evict(engines: Sequence[Parked], budget_bytes: int, clock: float = 0.0) -> Eviction:
    """Choose the engines to end so that the rest fits into `budget_bytes`. Ties: the longest parked goes first."""
    order = sorted(engines, key=lambda e: (value(e, clock), e.parked_s, e.engine_id))
    held_bytes = sum(e.memory_bytes for e in engines)
    evicted = []
    for engine in order:
        if held_bytes <= budget_bytes:
            break
        held_bytes -= engine.memory_bytes
        clock = value(engine, clock)
        evicted.append(engine.engine_id)
    return Eviction(tuple(evicted), clock)
