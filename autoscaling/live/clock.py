"""The one place where time is read. Everything else is given the time, or a clock."""

from __future__ import annotations

import time

EARLIEST_S = 1_672_531_200.0
"""2023 begins; there was no Relight before. A clock that shows less was never set: a machine without a battery for it
begins at 1970, or where its firmware says, until NTP has told it the time."""


class SystemClock:
    """The machine's clocks, as `autoscaling.ports.Clock` wants them."""

    def now_s(self) -> float:
        """Unix seconds. May jump: it is set by people and by NTP."""
        return time.time()

    def monotonic_s(self) -> float:
        """Seconds since some moment; never goes back, and counts on while the clock is set."""
        return time.monotonic()
