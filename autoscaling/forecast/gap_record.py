"""A model's silences as the regression over the fleet learns from them: each with what was known when it began."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoscaling.forecast.arrivals import MIN_SILENCE_S, idle, silent_from
from autoscaling.forecast.hazard import CELLS_S, DAY_S, ONSETS, Deferred, Expansion, Regression, Rows, expand
from autoscaling.forecast.history import TAUS_S, Events, Floats, History, Recent, onset_times

KEPT = 60
"""Of the latest silences, how many count for a model's own hazard."""
FADE = 0.96
WIDTH = 1.2
NEAR = 12
NEAR_SHARE, NEAR_S = 0.07, 20.0
TYPICAL_FADE = 0.93
MOST = 400
"""Silences that are learned from at once."""
BIN_S = 300.0
DAYS = 7
WIDE_S, CLOSE_S, YESTERDAY_S = 3600.0, (600.0, 900.0), 1800.0
BLURS = 3.0
_FADES: Floats = FADE ** np.arange(KEPT)
_TAUS: Floats = np.asarray(TAUS_S)


@dataclass(frozen=True, slots=True)
class Silence:
    """One, over or not, as it looked when it began."""

    begin_s: float
    """When the last request came."""
    end_s: float
    """When the next one did."""
    known_from_s: float
    """From when on it is known for sure that it was one, and how old it was."""
    rates: tuple[float, ...]
    """Shape (len(TAUS_S),): history.Recent.rates at its beginning."""
    onsets_s: tuple[float, ...]
    """Shape (len(ONSETS),): when the bursts began."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a model's silences were like, at some moment."""

    gaps_s: Floats
    """The latest KEPT, newest first."""
    typical: float
    """Mean logarithm, the latest weighing more."""
    known: int
    active_s: Floats
    """When something came in the last week, by BIN_S, ascending."""

    def after(self, gap_s: float) -> Record:
        """With one more."""
        typical = float(np.log1p(gap_s))
        if self.known:
            share = (1 - TYPICAL_FADE) / (1 - TYPICAL_FADE ** (self.known + 1))
            typical = self.typical + share * (typical - self.typical)
        gaps = np.concatenate([[gap_s], self.gaps_s[: KEPT - 1]])
        return Record(gaps, typical, self.known + 1, self.active_s)


EMPTY = Record(np.zeros(0), 6.0, 0, np.zeros(0))


def record_of(history: History) -> Record:
    """From its buckets."""
    return history.once("gap record", lambda: _record(history))


def _record(history: History) -> Record:
    events = history.events
    if not len(events):
        return EMPTY
    gaps = (events.first_s[1:] - events.last_s[:-1])[idle(events)]
    weight = TYPICAL_FADE ** np.arange(len(gaps))[::-1]
    typical = float((weight * np.log1p(gaps)).sum() / weight.sum()) if len(gaps) else EMPTY.typical
    return Record(gaps[::-1][:KEPT].copy(), typical, len(gaps), active(events, history.now_s))


def active(events: Events, now_s: float) -> Floats:
    first = int(np.searchsorted(events.lo_s, now_s - (DAYS + 1) * DAY_S))
    return np.asarray(np.unique(np.floor(events.mid_s[first:] / BIN_S)) * BIN_S + BIN_S / 2)


def own_hazard(gaps_s: Floats, age_s: Floats) -> Floats:
    """The model's own hazard at each age, from the latest gaps: shape (n, 4).

    log of the share of those gaps that had reached about this age and ended there, by how many that is, the share that
    got so far, and the share of the very last ones that ended there.

    Args:
        gaps_s: shape (KEPT,) at most, newest first; or (n, KEPT), NaN where there were not so many.
        age_s: shape (n,).
    """
    gaps = np.atleast_2d(gaps_s)
    fades = _FADES[: gaps.shape[1]]
    age = age_s[:, None]
    with np.errstate(invalid="ignore"):
        reached = gaps >= age / WIDTH
        ended = (reached & (gaps < age * WIDTH)) @ fades
        risk = reached @ fades
        late = gaps[:, :NEAR]
        near = ((late >= age * (1 - NEAR_SHARE) - NEAR_S) & (late < age * (1 + NEAR_SHARE) + NEAR_S)).sum(1)
    known = (~np.isnan(gaps)) @ fades
    few = np.maximum((~np.isnan(gaps[:, :NEAR])).sum(1), 1)
    n = len(age_s)
    return np.stack(
        [
            np.log((ended + 0.5) / (risk + 2.0)),
            np.log1p(risk),
            (risk + 1.0) / np.broadcast_to(known + 2.0, n),
            near / np.broadcast_to(few, n),
        ],
        axis=1,
    )


def same_time(active_s: Floats, time_s: Floats, before_s: Floats | float) -> Floats:
    """What came at the same time of the days before: shape (n, 3).

    On how many of DAYS within an hour, on how many right then, and how often yesterday (all as log(1 + it)), as far as
    it came before `before_s`.
    """
    return np.asarray(np.log1p(came(active_s, time_s, before_s)))


def _came(active_s: Floats, time_s: Floats, before_s: Floats | float) -> NDArray[np.int64]:
    back = np.arange(1, DAYS + 1) * DAY_S
    at = time_s[:, None] - back
    most = np.broadcast_to(np.asarray(before_s), time_s.shape)[:, None]
    from_s = np.stack([at - WIDE_S, at - CLOSE_S[0]])
    until_s = np.minimum(np.stack([at + WIDE_S, at + CLOSE_S[1]]), most)
    found = np.searchsorted(active_s, until_s) > np.searchsorted(active_s, from_s)
    at = at[:, 0]
    yesterday = np.searchsorted(active_s, np.minimum(at + YESTERDAY_S, most[:, 0])) - np.searchsorted(
        active_s, at - YESTERDAY_S
    )
    return np.stack([*found.sum(axis=2), np.maximum(yesterday, 0)], axis=1)


came: Callable[[Floats, Floats, Floats | float], NDArray[np.int64]] = _came
"""The numbers of `same_time`. The simulator exchanges it for its own."""


def silence_from(recent: Recent, end_s: float) -> Silence:
    """The one that began with the last arrival, known to the second."""
    return Silence(
        recent.last_s,
        end_s,
        recent.last_s + MIN_SILENCE_S,
        recent.rates_at(recent.last_s) if recent.rates_s <= recent.last_s else _back(recent),
        tuple(recent.onsets_s[i] for i in ONSETS),
    )


def _back(recent: Recent) -> tuple[float, ...]:
    """The rates as of the last arrival, where they are told as of later."""
    later = recent.rates_s - recent.last_s
    return tuple(
        float(rate * np.exp(min(later / tau, 50.0))) for rate, tau in zip(recent.rates, TAUS_S, strict=True)
    )


def silences_in(history: History, most: int = MOST) -> list[Silence]:
    """From its buckets: the latest ones that are over, oldest first.

    Where a bucket is long, the silence's age is known only later on; what came before counts as not seen, which is
    right for hazards (left truncation).
    """
    events = history.events
    where = np.flatnonzero(idle(events))[-most:]
    if not len(where):
        return []
    first, last, blur = events.first_s, events.last_s, events.blur_s
    from_s = silent_from(events)
    rates = rates_at(events, where)
    onsets = onset_times(events)[list(ONSETS)]
    return [
        Silence(
            float(last[i]),
            float(first[i + 1]),
            max(float(from_s[i]), float(last[i] + BLURS * blur[i])) if blur[i] > 1.0 else float(from_s[i]),
            tuple(rate.tolist()),
            tuple(onsets[:, i].tolist()),
        )
        for i, rate in zip(where, rates, strict=True)
    ]


def rates_at(events: Events, where: Sequence[int] | Floats) -> Floats:
    """history.Recent.rates as of right after those events (indices, ascending): shape (n, len(TAUS_S))."""
    mid, last, count = events.mid_s, events.last_s, events.count
    found = np.zeros((len(where), len(TAUS_S)))
    if not len(where):
        return found
    rate = np.zeros(len(TAUS_S))
    done, at_s = int(np.searchsorted(mid, mid[where[0]] - 10 * TAUS_S[-1])), -np.inf
    for row, i in enumerate(where):
        now_s = last[i]
        part = np.exp((mid[done : i + 1, None] - now_s) / _TAUS) * count[done : i + 1, None]
        rate = rate * np.exp((at_s - now_s) / _TAUS) + part.sum(axis=0) / _TAUS
        found[row] = rate
        done, at_s = int(i) + 1, float(now_s)
    return found


def learn(
    silences: Sequence[Silence],
    record: Record,
    since_s: float,
    until_s: float,
    regression: Regression,
) -> tuple[Expansion, Record]:
    """What those silences, oldest first, say between those moments; and `record` as it is after them.

    `record` is what was known before the first of them; one that ends after `until_s` is not over.
    """
    known: list[Record] = []
    for silence in silences:
        known.append(record)
        if silence.end_s <= until_s:
            record = record.after(silence.end_s - silence.begin_s)
    active_s = record.active_s

    def expanded() -> Expansion:
        return _expanded(silences, known, active_s, since_s, until_s, regression)

    return Deferred(expanded, until_s, regression.round), record


def _expanded(  # noqa: PLR0917 - what `learn` was given
    silences: Sequence[Silence],
    records: Sequence[Record],
    active_s: Floats,
    since_s: float,
    until_s: float,
    regression: Regression,
) -> Expansion:
    """`records`: what was known before each of the silences."""
    gaps = np.full((len(silences), KEPT), np.nan)
    typical, known = np.empty(len(silences)), np.empty(len(silences))
    for i, record in enumerate(records):
        gaps[i, : len(record.gaps_s)] = record.gaps_s
        typical[i], known[i] = record.typical, record.known
    begin = np.asarray([silence.begin_s for silence in silences])
    end = np.asarray([silence.end_s for silence in silences])
    first = np.maximum(np.asarray([silence.known_from_s for silence in silences]), since_s) - begin
    last = np.minimum(end, until_s) - begin
    lo = np.maximum(CELLS_S[:-1], first[:, None])
    hi = np.minimum(CELLS_S[1:], last[:, None])
    at, cell = np.nonzero(hi > lo)
    lo, hi = lo[at, cell], hi[at, cell]
    over = end <= until_s
    ended = (over[at] & (hi >= last[at]) & (last[at] <= CELLS_S[-1])).astype(np.float64)
    whole = np.minimum(CELLS_S[cell + 1], np.maximum(hi, 1.25 * lo))
    age = (lo + whole) / 2
    onsets = np.asarray([silence.onsets_s for silence in silences]).reshape(len(silences), len(ONSETS))
    rates = np.asarray([silence.rates for silence in silences]).reshape(len(silences), len(TAUS_S))
    time_s = begin[at] + age
    rows = Rows(
        counts=rates[at] * _TAUS * np.exp(-age[:, None] / _TAUS),
        onsets_s=time_s[:, None] - onsets[at],
        age_s=age,
        time_s=time_s,
        own=own_hazard(gaps[at], age),
        typical=typical[at],
        known=known[at],
        # Nothing that came after the silence began: it would tell how it ended.
        day=same_time(active_s, time_s, begin[at]),
    )
    return expand(rows, ended, hi - lo, regression, until_s, begin_s=begin[at] + lo)
