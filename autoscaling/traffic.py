"""Traffic of one model as forecasters read it: counts in buckets, fine where recent, coarse where old."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVELS: tuple[tuple[float, float], ...] = (
    (1.0, 3600.0),
    (60.0, 2 * 86400.0),
    (300.0, 28 * 86400.0),
    (3600.0, 400 * 86400.0),
)
"""(bucket_s, kept_s), finest first. Every level holds the whole of its span, so the finer ones overlap the coarser."""
LONGEST_WINDOW_S = 2 * LEVELS[-1][0]
"""What is only known by longer windows is in no level. Spread over more than two buckets, the single request of each
window would come by a clock that nobody keeps."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """Non-empty buckets only: a bucket that is absent within [start_s, end_s) saw nothing.

    All arrays have shape (n,) and ascend with `index`; bucket i covers [index[i]*step_s, (index[i]+1)*step_s) in Unix
    time.
    """

    step_s: float
    start_s: float
    """Since when it is known; before it, nothing is known."""
    end_s: float
    index: NDArray[np.int64]
    arrivals: NDArray[np.float32]
    input_tokens: NDArray[np.float32]
    output_tokens: NDArray[np.float32]
    busy_s: NDArray[np.float32]
    """Request-seconds in progress (queued ones not counted): over `step_s` it is the mean concurrency."""
    lead_s: NDArray[np.uint16] | None = None
    """Whole seconds of the bucket before the one in which its first request came. None: not known, taken for 0."""
    trail_s: NDArray[np.uint16] | None = None
    """Whole seconds after the one in which its last request came. None: not known, taken for 0."""

    @property
    def silent_s(self) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        """(lead_s, trail_s), 0 where they are not known."""
        if self.lead_s is None or self.trail_s is None:
            none = np.zeros(len(self.index), np.uint16)
            return none, none
        return self.lead_s, self.trail_s

    def dense(self, column: str = "arrivals") -> NDArray[np.float32]:
        """That column with its zeros, shape (round((end_s - start_s) / step_s),)."""
        first = round(self.start_s / self.step_s)
        values = np.zeros(max(0, round(self.end_s / self.step_s) - first), np.float32)
        offsets = self.index - first
        inside = (offsets >= 0) & (offsets < len(values))
        values[offsets[inside]] = getattr(self, column)[inside]
        return values


@dataclass(frozen=True, slots=True)
class Traffic:
    """The history of one model, a level for each of LEVELS."""

    model: str
    until_s: float
    """What happened up to here is in; the present bucket may be half full."""
    levels: tuple[Buckets, ...]
