"""A model's traffic as the forecasters read it: cleaned, and spliced from the finest buckets that cover each moment."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from math import exp, isfinite
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoscaling.traffic import Buckets, Traffic

T = TypeVar("T")
Floats = NDArray[Any]
"""Of float64, or of what numpy makes of it."""


def clipped(values: Floats, low: float, high: float) -> Floats:
    """As `np.clip`, which takes several times as long on few values."""
    return np.asarray(np.minimum(np.maximum(values, low), high))


THETAS_S: tuple[float, ...] = tuple(2.0 * 2.0**k for k in range(15))
"""Silences, 2 s to 9 h, after which an arrival may be taken for the beginning of a burst. A model learns its own."""


@dataclass(frozen=True, slots=True)
class Events:
    """Non-empty buckets of mixed sizes that do not overlap, oldest first. All arrays have shape (n,).

    Each from the second of its first request to that of its last, where that is known: a job that asks once a day is
    known to the second, however long the buckets have become.
    """

    lo_s: Floats
    hi_s: Floats
    count: Floats
    busy_s: Floats
    end_s: Floats
    """When the bucket ended: until then no other request came, or it would be in this event."""
    blur_s: Floats
    """How sharply the first and the last request are known: to so many seconds. The whole bucket where they are not."""
    step_s: Floats
    """How long the bucket is."""

    def __len__(self) -> int:
        return len(self.lo_s)

    @property
    def mid_s(self) -> Floats:
        return (self.lo_s + self.hi_s) / 2

    @property
    def first_s(self) -> Floats:
        """When the first request came, as far as is known."""
        return self.lo_s + self.blur_s / 2

    @property
    def last_s(self) -> Floats:
        return self.hi_s - self.blur_s / 2

    def between(self, since_s: float, until_s: float) -> Events:
        """Those that lie in [since_s, until_s) altogether."""
        keep = slice(
            int(np.searchsorted(self.lo_s, since_s)), int(np.searchsorted(self.hi_s, until_s, side="right"))
        )
        return self.part(keep)

    def part(self, keep: slice) -> Events:
        columns = (self.lo_s, self.hi_s, self.count, self.busy_s, self.end_s, self.blur_s, self.step_s)
        return Events(*(column[keep] for column in columns))


@dataclass(frozen=True, slots=True)
class History:
    """What is known of one model at `now_s`.

    Rows that cannot be are left out and counted in `ignored`: arrivals that are NaN, infinite or negative, and buckets
    that begin after `now_s` (a clock that jumped). A bucket that comes twice is added up.
    """

    model: str
    now_s: float
    since_s: float
    """Since when anything is known."""
    events: Events
    levels: tuple[Buckets, ...]
    """The cleaned buckets, finest first."""
    ignored: int = 0
    _worked_out: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, worked out once for this history: forecasters share parts."""
        if key not in self._worked_out:
            self._worked_out[key] = make()
        found: T = self._worked_out[key]
        return found

    @property
    def arrivals(self) -> float:
        return float(self.events.count.sum())

    def before(self, until_s: float) -> History:
        """What was known at `until_s`: for backtests."""
        return self.once(("before", until_s), lambda: self._before(until_s))

    def _before(self, until_s: float) -> History:
        levels = tuple(_until(level, until_s) for level in self.levels)
        events = self.events.between(-np.inf, until_s)
        return replace(self, now_s=until_s, events=events, levels=levels, _worked_out={})

    def level(self, step_s: float) -> Buckets | None:
        """The finest buckets that are at least `step_s` long."""
        return next((level for level in self.levels if level.step_s >= step_s), None)


def history_of(traffic: Traffic, now_s: float) -> History:
    """Clean and splice. Raises ValueError for a `now_s` that is not a number."""
    if not np.isfinite(now_s):
        raise ValueError(f"now_s is {now_s}; it must be a finite Unix time")
    levels, ignored = [], 0
    for level in sorted(traffic.levels, key=lambda level: level.step_s):
        clean, dropped = _clean(level, now_s)
        levels.append(clean)
        ignored += dropped
    since_s = min((level.start_s for level in levels), default=now_s)
    return History(traffic.model, now_s, min(since_s, now_s), _splice(levels, now_s), tuple(levels), ignored)


def _clean(level: Buckets, now_s: float) -> tuple[Buckets, int]:
    if _is_clean(level, now_s):
        none = np.zeros(len(level.index), np.float32)
        columns = (level.arrivals.astype(np.float32), none, none, level.busy_s.astype(np.float32))
        span = level.step_s, min(level.start_s, now_s), min(level.end_s, now_s)
        return Buckets(*span, level.index.astype(np.int64), *columns, *_silent(level)), 0
    arrivals = np.asarray(level.arrivals, np.float64)
    good = np.isfinite(arrivals) & (arrivals >= 0) & (level.index * level.step_s <= now_s)
    dropped = int(len(arrivals) - good.sum())
    busy = np.nan_to_num(np.asarray(level.busy_s, np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(0)
    good &= (arrivals > 0) | (busy > 0)
    index, where = np.unique(level.index[good], return_inverse=True)
    added = {}
    for name, column in (("arrivals", arrivals), ("busy_s", busy)):
        added[name] = np.bincount(where, column[good], len(index)).astype(np.float32)
    tokens = np.zeros(len(index), np.float32)
    silent = []
    for column in _silent(level):
        least = np.full(len(index), np.iinfo(np.uint16).max, np.uint16)
        np.minimum.at(least, where, column[good])
        silent.append(least)
    clean = Buckets(
        step_s=level.step_s,
        start_s=min(level.start_s, now_s),
        end_s=min(level.end_s, now_s),
        index=index.astype(np.int64),
        arrivals=added["arrivals"],
        input_tokens=tokens,
        output_tokens=tokens,
        busy_s=added["busy_s"],
        lead_s=silent[0],
        trail_s=silent[1],
    )
    return clean, dropped


def _silent(level: Buckets) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """The level's lead_s and trail_s; 0 where they are not known, and where they leave no second for a request."""
    lead_s, trail_s = level.silent_s
    known = lead_s.astype(np.uint32) + trail_s < level.step_s
    if known.all():
        return lead_s, trail_s
    return np.where(known, lead_s, 0).astype(np.uint16), np.where(known, trail_s, 0).astype(np.uint16)


def _is_clean(level: Buckets, now_s: float) -> bool:
    """Whether nothing is to be done to it, as is usual."""
    index, arrivals, busy = level.index, level.arrivals, level.busy_s
    if not len(index):
        return True
    least, most = min(arrivals.min(), busy.min()), max(arrivals.max(), busy.max())
    return bool(
        0 <= least <= most < np.inf
        and index[-1] * level.step_s <= now_s
        and (index[1:] > index[:-1]).all()
        and ((arrivals > 0) | (busy > 0)).all()
    )


def _until(level: Buckets, until_s: float) -> Buckets:
    keep = slice(0, int(np.searchsorted((level.index + 1) * level.step_s, until_s, side="right")))
    lead_s, trail_s = level.silent_s
    return Buckets(
        step_s=level.step_s,
        start_s=min(level.start_s, until_s),
        end_s=min(level.end_s, until_s),
        index=level.index[keep],
        arrivals=level.arrivals[keep],
        input_tokens=level.input_tokens[keep],
        output_tokens=level.output_tokens[keep],
        busy_s=level.busy_s[keep],
        lead_s=lead_s[keep],
        trail_s=trail_s[keep],
    )


def _splice(levels: list[Buckets], now_s: float) -> Events:
    """Finer buckets from the first edge of the next coarser level that they reach, so that none counts twice."""
    parts: list[tuple[Floats, ...]] = []
    upper_s = np.inf
    for i, level in enumerate(levels):
        coarser = levels[i + 1] if i + 1 < len(levels) else None
        lower_s = -np.inf if coarser is None else np.ceil(level.start_s / coarser.step_s) * coarser.step_s
        lo = level.index * level.step_s
        keep = (lo >= lower_s) & (lo < upper_s) & (level.arrivals > 0)
        lead_s, trail_s = (column[keep] for column in level.silent_s)
        end = lo[keep] + level.step_s
        lo = lo[keep] + lead_s
        known = np.maximum(now_s, lo + 1.0)
        hi = np.minimum(end - trail_s, known)
        parts.append(
            (
                lo,
                hi,
                level.arrivals[keep].astype(np.float64),
                level.busy_s[keep].astype(np.float64),
                np.minimum(end, known),
                np.where((lead_s > 0) | (trail_s > 0), 1.0, hi - lo),
                np.full(len(lo), level.step_s),
            )
        )
        upper_s = min(upper_s, lower_s)
    columns = [np.concatenate([part[c] for part in reversed(parts)] or [np.zeros(0)]) for c in range(7)]
    return Events(*columns)


@dataclass(frozen=True, slots=True)
class Recent:
    """What has happened lately, as it is known to whoever asks. Bounded, however much comes."""

    last_s: float
    """When the last arrival was."""
    onsets_s: tuple[float, ...]
    """For each of THETAS_S, when the last arrival came that followed at least so long a silence."""
    rates: tuple[float, ...]
    """Arrivals a second, exponentially weighted with each of TAUS_S, as of `rates_s`. Before the first one it was none,
    so that what was learned of a young model must be divided by 1 - exp(-known_s / tau)."""
    rates_s: float

    def rates_at(self, now_s: float) -> tuple[float, ...]:
        """The same, as of `now_s`, if nothing has come since."""
        gone_s = max(0.0, now_s - self.rates_s)
        return tuple(rate * exp(-gone_s / tau) for rate, tau in zip(self.rates, TAUS_S, strict=True))


SKEW_S = 10.0
"""By so much the clocks of several machines may differ."""
TAUS_S: tuple[float, ...] = (60.0, 300.0, 1200.0, 4800.0, 19200.0)
"""Time constants of the recent rate. A model learns which of them tells most about what comes."""


def arrived(recent: Recent | None, time_s: float, count: float) -> Recent | None:
    """`recent` after `count` arrivals at `time_s`.

    What is no number, and a count that is not positive, changes nothing. A time before the last
    one (a clock that jumped back) counts at the last one.
    """
    if not (isfinite(time_s) and isfinite(count)) or count <= 0:
        return recent
    if recent is None:
        return Recent(
            last_s=time_s,
            onsets_s=(time_s,) * len(THETAS_S),
            rates=tuple(count / tau for tau in TAUS_S),
            rates_s=time_s,
        )
    time_s = max(time_s, recent.last_s)
    gap_s = time_s - recent.last_s
    gone_s = time_s - recent.rates_s
    begun = bisect_right(THETAS_S, gap_s)
    return Recent(
        time_s,
        (time_s,) * begun + recent.onsets_s[begun:] if begun else recent.onsets_s,
        tuple(
            [rate * exp(-gone_s / tau) + count / tau for rate, tau in zip(recent.rates, TAUS_S, strict=True)]
        ),
        time_s,
    )


def by_now(recent: Recent, now_s: float) -> Recent:
    """`recent` where the clock was set back since: what lies ahead came now, and is longer ago at each look."""
    if recent.last_s <= now_s + SKEW_S:
        return recent
    return Recent(now_s, tuple(min(onset, now_s) for onset in recent.onsets_s), recent.rates, now_s)


def recent_of(events: Events, now_s: float) -> Recent | None:
    """What `arrived` would have made of those events, None if there is none. A bucket counts at its middle."""
    if not len(events):
        return None
    times = np.minimum(events.mid_s, now_s)
    return Recent(
        last_s=min(float(events.last_s[-1]), now_s),
        onsets_s=tuple(min(float(onsets[-1]), now_s) for onsets in onset_times(events)),
        rates=tuple(float((events.count * np.exp(-(now_s - times) / tau)).sum() / tau) for tau in TAUS_S),
        rates_s=now_s,
    )


def onset_times(events: Events) -> Floats:
    """For each of THETAS_S and each event, when the burst began that it belongs to: shape (len(THETAS_S), n)."""
    first_s = events.first_s
    gaps = np.append(-np.inf, first_s[1:] - events.last_s[:-1])[: len(first_s)]
    where = np.arange(len(first_s))
    began = np.where(gaps[None, :] >= np.asarray(THETAS_S)[:, None], where[None, :], 0)
    onsets: Floats = first_s[np.maximum.accumulate(began, axis=1)]
    return onsets
