"""Traffic in memory, as forecasters read it: for each model and level, sorted arrays of the buckets that are not empty.

Arrays are never changed once they are made, so readers share them with the writer. 28 bytes a bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscaling.live.store.schema import AMOUNTS, SILENT
from autoscaling.traffic import LEVELS, Buckets, Traffic

STEPS = tuple(int(step_s) for step_s, _ in LEVELS)
KEPT_S = {int(step_s): kept_s for step_s, kept_s in LEVELS}

WATCHED = 0
"""In the place of a level: since when a model is watched here, of which what is imported says nothing."""

TAIL = 256
"""Rows that wait in a list before they are folded into the arrays, unless somebody reads."""

Amounts = tuple[int, int, int, float, float]
"""arrivals, input_tokens, output_tokens, busy_s, waited_s."""

Entry = tuple[int, int, Amounts]
"""(time_s, step_s, amounts): what came in [time_s, time_s + step_s)."""


def silent(
    times_s: NDArray[np.int64], steps_s: NDArray[np.int64] | int, arrivals: NDArray[Any], step_s: int
) -> NDArray[np.uint16]:
    """lead_s and trail_s in buckets of `step_s` of what came in [times_s, times_s + steps_s): shape (2, n).

    The whole bucket where no request came; 0 of what is longer than a second, in which of them it came being unknown.
    Those of entries that share a bucket are the least of theirs.
    """
    lead_s = times_s % step_s
    both = np.where(np.asarray(steps_s) == 1, np.stack([lead_s, step_s - lead_s - 1]), 0)
    return np.where(arrivals > 0, both, step_s).astype(np.uint16)


@dataclass(frozen=True, slots=True)
class LevelArrays:
    """The buckets of one level. `index` has shape (n,) and ascends; `amounts` has shape (5, n), ordered as AMOUNTS;
    `silent` has shape (2, n), ordered as SILENT."""

    index: NDArray[np.uint32]
    amounts: NDArray[np.float32]
    silent: NDArray[np.uint16]

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + self.amounts.nbytes + self.silent.nbytes

    def added(
        self,
        index: NDArray[np.int64],
        amounts: NDArray[np.float64],
        silent: NDArray[np.uint16],
        *,
        first: int = 0,
    ) -> LevelArrays:
        """With these buckets added, in any order and with repeats; buckets before `first` are left out."""
        order = np.argsort(index, kind="stable")
        index, amounts, silent = index[order], amounts[:, order], silent[:, order]
        old = int(np.searchsorted(self.index, first))
        # What comes is recent: nearly always only the last bucket is met again, and the rest is appended.
        kept = int(np.searchsorted(self.index, index[0])) if len(index) else len(self.index)
        kept = max(kept, old)
        tail_index = np.concatenate([self.index[kept:].astype(np.int64), index])
        tail = np.concatenate([self.amounts[:, kept:].astype(np.float64), amounts], axis=1)
        least = np.concatenate([self.silent[:, kept:], silent], axis=1)
        order = np.argsort(tail_index, kind="stable")
        tail_index, tail, least = tail_index[order], tail[:, order], least[:, order]
        starts = np.flatnonzero(np.diff(tail_index, prepend=-1))
        if len(starts):
            tail_index, tail = tail_index[starts], np.add.reduceat(tail, starts, axis=1)
            least = np.minimum.reduceat(least, starts, axis=1)
        recent = tail_index >= first
        return LevelArrays(
            np.concatenate([self.index[old:kept], tail_index[recent].astype(np.uint32)]),
            np.concatenate([self.amounts[:, old:kept], tail[:, recent].astype(np.float32)], axis=1),
            np.concatenate([self.silent[:, old:kept], least[:, recent]], axis=1),
        )

    def coarser(self, step_s: int) -> LevelArrays:
        """Seconds in buckets of `step_s`."""
        seconds = self.index.astype(np.int64)
        amounts = self.amounts.astype(np.float64)
        return EMPTY.added(seconds // step_s, amounts, silent(seconds, 1, amounts[0], step_s))

    def between(self, first: int, end: int) -> slice:
        """Where the buckets first <= index < end are."""
        return slice(*(int(i) for i in np.searchsorted(self.index, (first, end))))


EMPTY = LevelArrays(
    np.zeros(0, np.uint32), np.zeros((len(AMOUNTS), 0), np.float32), np.zeros((len(SILENT), 0), np.uint16)
)


@dataclass(slots=True)
class Series:
    """One model. The one-second level is always here; the others once they were loaded from the database."""

    since: dict[int, float] = field(default_factory=dict)
    """step_s -> since when it is known; missing if it isn't. WATCHED -> since when the model is watched."""
    levels: dict[int, LevelArrays] = field(default_factory=lambda: {1: EMPTY})
    tail: list[Entry] = field(default_factory=list)

    @property
    def loaded(self) -> bool:
        return len(self.levels) == len(STEPS)

    @property
    def nbytes(self) -> int:
        return sum(level.nbytes for level in self.levels.values())

    def fold(self, now_s: float) -> None:
        """Moves what waits in the tail into the arrays, and leaves out what is too old to be kept."""
        if not self.tail:
            return
        times = np.array([entry[0] for entry in self.tail], np.int64)
        steps = np.array([entry[1] for entry in self.tail], np.int64)
        amounts = np.array([entry[2] for entry in self.tail], np.float64).T
        self.tail = []
        for step_s, level in self.levels.items():
            fits = steps <= step_s
            first = max(0, int((now_s - KEPT_S[step_s]) // step_s))
            least = silent(times[fits], steps[fits], amounts[0, fits], step_s)
            self.levels[step_s] = level.added(times[fits] // step_s, amounts[:, fits], least, first=first)

    def load(self, levels: Mapping[int, LevelArrays], waiting: Iterable[Entry], now_s: float) -> None:
        """Takes the coarse levels over from the database, and adds what is not in it yet."""
        self.fold(now_s)
        seconds = self.levels[1]
        self.levels = {step_s: levels.get(step_s, EMPTY) for step_s in STEPS if step_s != 1}
        self.tail = list(waiting)
        self.fold(now_s)
        self.levels = {1: seconds, **self.levels}

    def traffic(self, model: str, now_s: float) -> Traffic:
        """As it is known at `now_s`. While the coarse levels aren't loaded they are made from the seconds there are."""
        self.fold(now_s)
        return Traffic(model, now_s, tuple(self._buckets(step_s, now_s) for step_s in STEPS))

    def window(self, step_s: int, now_s: float) -> tuple[int, int]:
        """First and end index of what is known of a level; both are equal where nothing is."""
        end = int(now_s // step_s) + 1  # the present bucket, though it may have only just begun
        since = self.since.get(step_s if self.loaded else 1)
        if since is None:
            return end, end
        if not self.loaded:
            # No more is known of a coarse level than the seconds tell, and its first bucket only in part.
            since = max(since, now_s - KEPT_S[1])
        first = max(int(since // step_s), end - int(KEPT_S[step_s] // step_s))
        return min(first, end), end

    def known_s(self, step_s: int, now_s: float) -> float:
        """Since when all is known of a level: its first bucket, and of that no more than since it is watched."""
        start, end = self.window(step_s, now_s)
        since_s = self.since.get(step_s if self.loaded else 1, 0.0)
        return min(max(start * step_s, since_s), end * step_s)

    def arrays(self, step_s: int) -> LevelArrays:
        if step_s in self.levels:
            return self.levels[step_s]
        return self.levels[1].coarser(step_s)

    def _buckets(self, step_s: int, now_s: float) -> Buckets:
        first, end = self.window(step_s, now_s)
        arrays = self.arrays(step_s)
        part = arrays.between(first, end)
        arrivals, input_tokens, output_tokens, busy_s, _ = arrays.amounts[:, part]
        lead_s, trail_s = arrays.silent[:, part]
        return Buckets(
            step_s=float(step_s),
            start_s=float(first * step_s),
            end_s=float(end * step_s),
            index=arrays.index[part].astype(np.int64),
            arrivals=arrivals,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            busy_s=busy_s,
            lead_s=lead_s,
            trail_s=trail_s,
        )


class Mirror:
    """All models. Not thread-safe: the store's lock is held around every call."""

    def __init__(self) -> None:
        self.models: dict[str, Series] = {}

    def add(self, model: str, entry: Entry, now_s: float) -> None:
        series = self.models.setdefault(model, Series())
        series.tail.append(entry)
        if len(series.tail) >= TAIL:
            series.fold(now_s)

    def know_since(self, model: str, step_s: int, since_s: float) -> bool:
        """Notes since when a level is known. True if that is news."""
        since = self.models.setdefault(model, Series()).since
        if since_s >= since.get(step_s, float("inf")):
            return False
        since[step_s] = since_s
        return True

    def nothing(self, model: str, now_s: float) -> Traffic:
        """The traffic of a model of which nothing is known."""
        return Series().traffic(model, now_s)

    def forget_levels(self) -> None:
        """Nothing in memory is trusted any more: the seconds are to be replayed, the coarse levels loaded again."""
        for series in self.models.values():
            series.levels = {1: EMPTY}
            series.tail = []

    @property
    def nbytes(self) -> int:
        return sum(series.nbytes for series in self.models.values())


def level_arrays(rows: Sequence[Sequence[float]]) -> LevelArrays:
    """From rows (bucket, *amounts, *silent) that ascend."""
    if not rows:
        return EMPTY
    table = np.array(rows, np.float64)
    amounts, least = np.split(table[:, 1:].T, [len(AMOUNTS)])
    return LevelArrays(
        table[:, 0].astype(np.uint32),
        np.ascontiguousarray(amounts, dtype=np.float32),
        np.ascontiguousarray(least, dtype=np.uint16),
    )
