"""The one place where time is read. Everything else is given the time, or a clock."""

from __future__ import annotations

import time


class SystemClock:
    """The machine's clocks, as `autoscaling.ports.Clock` wants them."""

    def now_s(self) -> float:
        """Unix seconds. May jump: it is set by people and by NTP."""
        return time.time()

    def monotonic_s(self) -> float:
        """Seconds since some moment; never goes back, and counts on while the clock is set."""
        return time.monotonic()
