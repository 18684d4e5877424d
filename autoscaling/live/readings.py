"""What was last read of each engine: several gateways read the same one, and tell what they read over and over."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from typing import Generic, TypeVar

SET_BACK_AFTER_S = 15.0
"""Gateways have gone on reading for so long, three readings, and none was newer: their clock was set back."""

T = TypeVar("T")


@dataclass(slots=True)
class _Last(Generic[T]):
    at_s: float
    reading: T
    older_s: float = math.inf
    """The time of the first that was no newer."""


class LastReadings(Generic[T]):
    """Not thread-safe."""

    def __init__(self) -> None:
        self._last: dict[str, _Last[T]] = {}

    def take(self, engine_id: str, at_s: float, reading: T) -> tuple[bool, T | None]:
        """(whether it is news, the reading before it). `at_s` is the Unix time at which a gateway read it."""
        last = self._last.get(engine_id)
        if last is not None and at_s <= last.at_s and at_s - last.older_s < SET_BACK_AFTER_S:
            last.older_s = min(last.older_s, at_s)
            return False, None
        self._last[engine_id] = _Last(at_s, reading)
        return True, None if last is None else last.reading

    def forget(self, living: Container[str]) -> None:
        """Only these engines are left."""
        self._last = {engine: last for engine, last in self._last.items() if engine in living}


__all__ = ["LastReadings"]
