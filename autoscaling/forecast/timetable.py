"""Bursts that begin at fixed times of the day: several cron jobs, office hours, runs on some days of the week."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import betaln  # type: ignore[import-untyped]

from autoscaling.forecast.arrivals import HORIZON_S, ArrivalBase, FittedRenewal, Renewal
from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.history import THETAS_S, Floats, History, Recent, clipped, onset_times
from autoscaling.forecast.prior import Prior

DAY_S = 86400.0
THETA = 8
"""Index into THETAS_S: what follows so long a silence (512 s) is the beginning of a burst."""
LOOK_BACK_DAYS = 28
APART_S = 60.0
"""Beginnings of different days that are no further apart, in the time of day, are of the same entry."""
WIDEST_S = 300.0
FEWEST = 3
"""Days on which an entry must have been met."""
CHANCE = 3.0
"""How many times as many days as chance would give an entry, besides two."""
MOST = 24
HALF_LIFE_DAYS = 10.0
ALIKE_DAYS = (0.1, 1.0, 20.0)
"""Pseudo-days of all weekdays together that each weekday's chance may begin with: few where the weekdays differ."""
ENDS = 0.05
"""The chance that an entry is no more, at each day."""
LEAST = 0.05
"""An entry with a smaller chance on all weekdays is over."""
AROUND: Floats = np.asarray([-9.0, -4, -2, -1, 0, 1, 2, 4, 9])
DRAWN = 12
"""Of so many of the next entries the forecast's grid shows the moment sharply."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Times of the day (UTC) at which bursts begin. Shapes (n,), but for `chance`."""

    at_s: Floats
    """Seconds since midnight."""
    spread_s: Floats
    """Scale of the logistic distribution around it."""
    chance: Floats
    """Shape (n, 7): that it is met, by the day's number since 1970 modulo 7."""

    def ahead(self, from_s: float, until_s: float) -> tuple[Floats, Floats, Floats]:
        """Unix times within that span, with their spreads and chances, in no order: shape (m,) each."""
        days = np.arange(np.floor(from_s / DAY_S), np.floor(until_s / DAY_S) + 1)
        times = (days[:, None] * DAY_S + self.at_s).ravel()
        chance = self.chance[:, (days % 7).astype(np.int64)].T.ravel()
        keep = (times >= from_s) & (times <= until_s)
        return times[keep], np.tile(self.spread_s, len(days))[keep], chance[keep]


@dataclass(frozen=True, slots=True)
class FittedTimetable(ArrivalBase):
    """Within a burst the renewal process rules; afterwards the entries, each of which may be left out, and chance."""

    name: str
    entries: Entries
    loose: float
    """Bursts that keep to no entry, in `known_s`; half of one more is thought to have come."""
    known_s: float
    within: FittedRenewal

    def log_survival(self, now_s: float, recent: Recent, times_s: Floats) -> Floats:
        switch = max(0.0, THETAS_S[THETA] - max(0.0, now_s - recent.last_s))
        result = -(self.loose + 0.5) * np.log1p(np.maximum(times_s - switch, 0.0) / self.known_s)
        if switch > 0:
            result = result + self.within.log_survival(now_s, recent, np.minimum(times_s, switch))
        times, spread, chance = self._due(now_s, recent, now_s + float(times_s[-1]))
        if len(times):
            at = now_s + np.concatenate([[0.0], times_s])
            # log(1 - chance * logistic(z)), without the logistic's overflow
            met = 0.5 + 0.5 * np.tanh(clipped((at[:, None] - times) / spread, -60, 60) / 2)
            kept = np.log1p(-np.minimum(chance, 0.999) * met).sum(axis=1)
            result = result + kept[1:] - kept[0]
        return np.asarray(result)

    def extra_times(self, now_s: float, recent: Recent) -> Floats:
        times, spread, _ = self._due(now_s, recent, now_s + HORIZON_S)
        soonest = np.argsort(times)[:DRAWN]
        around = (times[soonest, None] + AROUND * spread[soonest, None]).ravel() - now_s
        return np.append(around, THETAS_S[THETA] - (now_s - recent.last_s))

    def _due(self, now_s: float, recent: Recent, until_s: float) -> tuple[Floats, Floats, Floats]:
        """Entries that are still ahead until then, or late."""
        times, spread, chance = self.entries.ahead(now_s - DAY_S / 2, until_s + WIDEST_S)
        met = times - AROUND[-1] * spread <= recent.onsets_s[THETA]
        # Or while the last burst went on: it would not have been another.
        met |= times + AROUND[-1] * spread <= recent.last_s + THETAS_S[THETA]
        open_ = ~met & (chance > LEAST)
        return times[open_], spread[open_], chance[open_]


@dataclass(frozen=True, slots=True)
class Timetable:
    name: str = "timetable"

    def fit(self, history: History, prior: Prior) -> FittedTimetable:
        since_s = max(history.since_s, history.now_s - LOOK_BACK_DAYS * DAY_S)
        known_s = history.now_s - since_s
        if known_s < (FEWEST - 0.5) * DAY_S:
            raise NotApplicable(f"less than {FEWEST} days are known")
        found = _entries(history, since_s)
        if found is None:
            raise NotApplicable("bursts keep to no times of the day")
        entries, loose = found
        return FittedTimetable(self.name, entries, loose, known_s, Renewal().fit(history, prior))


def _entries(history: History, since_s: float) -> tuple[Entries, float] | None:
    """And how many bursts keep to none of them."""
    events = history.events
    first = events.first_s
    begins = (onset_times(events)[THETA] == first) & (first >= since_s)
    onsets, blur = first[begins], events.blur_s[begins]
    days_known = (history.now_s - since_s) / DAY_S
    if len(onsets) < FEWEST:
        return None
    order = np.argsort(onsets % DAY_S)
    at = (onsets % DAY_S)[order]
    # A run of neighbours in the time of day; one across midnight is two, of which each is met on some of the days.
    ends = np.append(np.flatnonzero(np.diff(at) > APART_S), len(at) - 1)
    starts = np.concatenate([[0], ends[:-1] + 1])
    density = len(onsets) / DAY_S
    made: list[tuple[float, float, Floats, int]] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if end - start + 1 < FEWEST:
            continue
        where = order[start : end + 1]
        days = np.unique(np.floor(onsets[where] / DAY_S))
        width_s = float(at[end] - at[start])
        if len(days) < FEWEST or width_s > WIDEST_S:
            continue
        if len(days) < 2 + CHANCE * min(days_known, density * (width_s + APART_S)):
            continue
        middle = float(np.median(at[start : end + 1]))
        sharp = float(np.quantile(np.abs(at[start : end + 1] - middle), 0.8)) * (1 + 2.0 / len(where))
        spread_s = max(0.5, sharp, 0.29 * float(np.median(blur[where]))) * np.sqrt(3) / np.pi
        chance = _chances(days, middle + AROUND[-1] * spread_s, history.now_s)
        if chance.max() > LEAST:
            made.append((middle, spread_s, chance, len(where)))
    if not made:
        return None
    made = sorted(made, key=lambda entry: -entry[3])[:MOST]
    entries = Entries(
        np.asarray([entry[0] for entry in made]),
        np.asarray([entry[1] for entry in made]),
        np.stack([entry[2] for entry in made]),
    )
    return entries, float(len(onsets) - sum(entry[3] for entry in made))


def _chances(met: Floats, over_s: float, now_s: float) -> Floats:
    """By weekday, of an entry that was met on those days (numbers since 1970) and is over `over_s` after midnight.

    A beta-binomial for each day of the week around that of all days, the latest of which weigh more.
    """
    today = np.floor(now_s / DAY_S)
    last = today if now_s - today * DAY_S > over_s else today - 1
    days = np.arange(met[0], met[-1] + 1)
    hit = np.isin(days, met)
    weight = 0.5 ** ((days[-1] - days) / HALF_LIFE_DAYS)
    overall = ((weight * hit).sum() + 0.5) / (weight.sum() + 1.0)
    weekday = (days % 7).astype(np.int64)
    hits, seen = np.bincount(weekday, hit, 7), np.bincount(weekday, minlength=7)
    # Whether the days of the week differ is learned, too: each by its posterior mean, over how much they may differ.
    alike = np.asarray(ALIKE_DAYS)[:, None]
    a, b = alike * overall, alike * (1.0 - overall)
    likelihood = (betaln(a + hits, b + seen - hits) - betaln(a, b)).sum(axis=1)
    odds = np.exp(likelihood - likelihood.max())
    chance = (odds[:, None] * (hits + a) / (seen + alike)).sum(axis=0) / odds.sum()
    missed = np.arange(met[-1] + 1, last + 1)
    if not len(missed):
        return np.asarray(chance)
    # Whether it is no more: what was left out since says so, the more the surer it was.
    there = float(np.prod((1.0 - chance[(missed % 7).astype(np.int64)]) * (1.0 - ENDS)))
    return np.asarray(chance * there / (there + 1.0 - (1.0 - ENDS) ** len(missed)))


__all__ = ["Entries", "FittedTimetable", "Timetable"]
