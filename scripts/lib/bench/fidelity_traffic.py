"""Traffic for `fidelity`: bursts and single requests, with gaps that leave no doubt of whether a replica is there."""

from __future__ import annotations

import random
from dataclasses import dataclass

BURST_WHEN_DARK, BURST_WHEN_LIT = 0.7, 0.2
"""Share of bursts among what comes after a gap longer, and shorter, than the keep-alive."""
ALONE_FIRST_S = 2.0


@dataclass(frozen=True, slots=True)
class Pattern:
    """How the traffic is drawn."""

    span_s: float
    keep_alive_s: float
    margin_s: float
    """No gap is as near as that below the keep-alive, nor twice as near above it, for that counts from the end of an
    answer: what decides is not a tenth of a second."""
    mean_gap_s: float
    burst_requests: int
    """On average."""
    burst_gap_s: float
    """Mean of the gaps within a burst."""

    def __post_init__(self) -> None:
        if self.keep_alive_s <= self.margin_s:
            raise ValueError(
                f"margin_s: {self.margin_s:g} is not below the keep-alive, {self.keep_alive_s:g}"
            )


def arrivals(pattern: Pattern, seed: int) -> list[float]:
    """Seconds from the beginning, ascending.

    Gaps between events are exponential, drawn anew while they are too near to the keep-alive; an event is a burst (an
    on period: at least two requests with exponential gaps) or a single request. All is dark again at the end of the
    span.
    """
    drawn = random.Random(seed)
    at_s, dark = ALONE_FIRST_S, True
    last_s = pattern.span_s - pattern.keep_alive_s - 2 * pattern.margin_s
    times: list[float] = []
    while at_s < last_s:
        times.append(at_s)
        if drawn.random() < (BURST_WHEN_DARK if dark else BURST_WHEN_LIT):
            for _ in range(drawn.randint(2, max(2, 2 * pattern.burst_requests - 2)) - 1):
                at_s += drawn.expovariate(1.0 / pattern.burst_gap_s)
                times.append(at_s)
        gap_s = pattern.keep_alive_s
        while -pattern.margin_s < gap_s - pattern.keep_alive_s < 2 * pattern.margin_s:
            gap_s = drawn.expovariate(1.0 / pattern.mean_gap_s)
        at_s += gap_s
        dark = gap_s > pattern.keep_alive_s
    return times
