"""Time that passes when somebody says so."""

from __future__ import annotations


class VirtualClock:
    """`ports.Clock` for simulations and tests."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s
        self._began_s = now_s

    def now_s(self) -> float:
        """Unix seconds."""
        return self._now_s

    def monotonic_s(self) -> float:
        """Seconds since the beginning."""
        return self._now_s - self._began_s

    def advance(self, to_s: float) -> None:
        """Raises ValueError for a moment in the past."""
        if to_s < self._now_s:
            raise ValueError(f"to_s: {to_s} lies before {self._now_s}; virtual time never goes back")
        self._now_s = to_s
