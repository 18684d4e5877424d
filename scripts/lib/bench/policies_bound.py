"""What could be had from knowing the past: boosted trees as the forecaster, learned before, or on what is scored.

For each silence, the hazard of its end (piecewise exponential over its age: Friedman 1982) is a Poisson regression by
LightGBM (Ke et al. 2017) over what was known when it began, with many more shapes than Relight's own regression has.
What they foretell goes into the policy `predictive` in place of its own forecasts, in the same simulator.
Learned on the scored part itself, no forecaster of this kind that learns from the past alone does better by much; that
it fits chance too makes the bound a generous one.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscaling.core.types import Forecast, NextArrival, Spec
from autoscaling.sim import arrivals
from autoscaling.sim.compare import Variant
from autoscaling.sim.forecasts import NoForecasts
from autoscaling.sim.profile import Profile
from autoscaling.sim.replay import Setup, replay
from bench import clusters, policies_sparse
from bench.clusters import say
from bench.numbers import table

Floats = NDArray[np.float64]
DAY_S = 86400.0
END_S = 2 * DAY_S
EDGES_S: Floats = np.concatenate([np.arange(0.0, 60.0, 5.0), np.geomspace(60.0, END_S, 60)])
WINDOWS_S = (60.0, 300.0, 900.0, 3600.0, 14400.0, DAY_S, 3 * DAY_S)
RELEARN_S = DAY_S
KEPT = 60
BURST_S, APART_S = 5.0, 30.0
"""Over which time the requests are counted that come with the one that ends a silence, and what parts bursts."""
AT_ONCE = 4000
TREES = 200
SETTINGS: Mapping[str, Any] = {
    "objective": "poisson",
    "num_leaves": 15,
    "learning_rate": 0.05,
    "min_data_in_leaf": 200,
    "feature_fraction": 0.6,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "seed": 0,
    "verbose": -1,
}


@dataclass(frozen=True)
class Silences:
    """Of all models, from a replica's last answer to the next request, shape (n,) each; `known`: (n, features)."""

    begin_s: Floats
    last_s: Floats
    """When the last request came, before them."""
    length_s: Floats
    """Cut at END_S."""
    over: NDArray[np.bool_]
    known: Floats
    arrivals: Sequence[Floats]
    """Of each silence's model, shape (requests,)."""
    model: Sequence[str]


def silences(requests: Mapping[str, tuple[Floats, Floats]]) -> Silences:
    """From arrivals and seconds of work by model, each worked on at once."""
    everything = np.sort(np.concatenate([times for times, _ in requests.values()]))
    rows: list[tuple[float, float, float, bool]] = []
    known: list[list[float]] = []
    of_model: list[Floats] = []
    names: list[str] = []
    for number, (name, (times, work)) in enumerate(requests.items()):
        done = np.maximum.accumulate(times + work)
        following = np.append(times[1:], np.inf)
        gaps = np.diff(times, prepend=np.nan)
        lately = np.stack(
            [np.arange(len(times)) - np.searchsorted(times, times - window) + 1 for window in WINDOWS_S]
        )
        past: list[float] = []
        for i in np.flatnonzero(following > done):
            gap_s = float(following[i] - done[i])
            rows.append((float(done[i]), float(times[i]), min(gap_s, END_S), gap_s < END_S))
            of_model.append(times)
            names.append(name)
            newest = np.asarray(past[-KEPT:] or [np.nan])
            hour_s = times[i] % DAY_S
            known.append(
                [
                    float(work[i]),
                    *lately[:, i],
                    *(gaps[i - k] if i >= k else np.nan for k in range(5)),
                    len(past),
                    *np.quantile(newest, (0.1, 0.25, 0.5, 0.75, 0.9)),
                    *(
                        np.searchsorted(everything, times[i]) - np.searchsorted(everything, times[i] - back)
                        for back in (300.0, 3600.0)
                    ),
                    hour_s,
                    times[i] // DAY_S % 7,
                    times[i] - times[0],
                    number,
                ]
            )
            if np.isfinite(gap_s):
                past.append(gap_s)
    begin_s, last_s, length_s, over = (np.asarray(column) for column in zip(*rows, strict=True))
    return Silences(
        begin_s, last_s, length_s, over.astype(bool), np.asarray(known, np.float64), of_model, names
    )


def same_time(found: Silences, at: NDArray[np.int64], time_s: Floats) -> Floats:
    """At how many of the last seven days something came within so many seconds of that time of day: shape (n, 3).

    Within an hour, within ten minutes, and how much came within half an hour of it yesterday.
    """
    result = np.zeros((len(at), 3))
    bounds = np.flatnonzero(np.diff(at, prepend=-1))
    for first, last in zip(bounds, np.append(bounds[1:], len(at)), strict=True):
        i = at[first]
        times, now_s = found.arrivals[i], found.begin_s[i]
        then_s = time_s[first:last, None] - DAY_S * np.arange(1, 8)
        for column, within_s in enumerate((3600.0, 600.0)):
            until = np.searchsorted(times, np.minimum(then_s + within_s, now_s))
            result[first:last, column] = (until > np.searchsorted(times, then_s - within_s)).sum(axis=1)
        yesterday = then_s[:, 0]
        until = np.searchsorted(times, np.minimum(yesterday + 1800.0, now_s))
        result[first:last, 2] = np.maximum(until - np.searchsorted(times, yesterday - 1800.0), 0)
    return result


@dataclass(frozen=True)
class Cells:
    """The silences, cut at EDGES_S: what is known at each cell's beginning, and whether a request ends it."""

    of: NDArray[np.int64]
    """Which silence, shape (n,)."""
    begin_s: Floats
    exposure_s: Floats
    ended: Floats
    offset: Floats
    """log hazard that everything is learned as a factor of."""
    known: Floats
    """Shape (n, features)."""


def cells(found: Silences) -> Cells:
    left_s = found.length_s[:, None] - EDGES_S[:-1]
    at, cell = np.nonzero(left_s > 0)
    exposure_s = np.minimum(left_s[at, cell], np.diff(EDGES_S)[cell])
    ended = (found.over[at] & (found.length_s[at] <= EDGES_S[cell + 1])).astype(np.float64)
    return Cells(at, found.begin_s[at] + EDGES_S[cell], exposure_s, ended, *_features(found, at, cell))


def _features(found: Silences, at: NDArray[np.int64], cell: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """(offset, known) of cells, as Cells has them: nothing in it is of later than the silence's beginning."""
    age_s = (EDGES_S[cell] + EDGES_S[cell + 1]) / 2
    since_s = age_s + (found.begin_s - found.last_s)[at]
    day = same_time(found, at, found.begin_s[at] + age_s)
    known = (found.known[at], np.log1p(age_s)[:, None], np.log1p(since_s)[:, None], day)
    return np.log(0.5 / (age_s + 30.0)), np.concatenate(known, axis=1)


Learn = Callable[[Silences, Cells, float], Floats]


def learned_before(found: Silences, cut: Cells, scored_s: float) -> Floats:
    """Hazards per second, shape (silences, cells), of those after `scored_s`: learned anew each RELEARN_S from what
    came before. NaN of the others."""
    hazards = np.full((len(found.begin_s), len(EDGES_S) - 1), np.nan)
    ends_s = cut.begin_s + cut.exposure_s
    span_s = float(found.begin_s.max()) - scored_s
    steps = max(1, math.ceil(span_s / RELEARN_S))
    froms_s = scored_s + span_s / steps * np.arange(steps)
    for from_s, until_s in zip(froms_s, [*froms_s[1:], np.inf], strict=True):
        where = np.flatnonzero((found.begin_s >= from_s) & (found.begin_s < until_s))
        hazards[where] = _learned(found, cut, ends_s < from_s, where)
    return hazards


def learned_on_it(found: Silences, cut: Cells, scored_s: float) -> Floats:
    """The same, learned from the very silences: what nobody can know."""
    hazards = np.full((len(found.begin_s), len(EDGES_S) - 1), np.nan)
    where = np.flatnonzero(found.begin_s >= scored_s)
    hazards[where] = _learned(found, cut, found.begin_s[cut.of] >= scored_s, where)
    return hazards


def _learned(found: Silences, cut: Cells, learn: NDArray[np.bool_], where: NDArray[np.int64]) -> Floats:
    """What is learned from those cells, as hazards of the silences `where`, over all ages."""
    import lightgbm

    rates = cut.ended[learn] / cut.exposure_s[learn]
    data = lightgbm.Dataset(
        cut.known[learn], rates, weight=cut.exposure_s[learn], init_score=cut.offset[learn]
    )
    model = lightgbm.train(dict(SETTINGS), data, TREES)
    count = len(EDGES_S) - 1
    hazards = np.empty((len(where), count))
    for first in range(0, len(where), AT_ONCE):
        some = where[first : first + AT_ONCE]
        offset, known = _features(found, np.repeat(some, count), np.tile(np.arange(count), len(some)))
        hazards[first : first + AT_ONCE] = np.exp(model.predict(known, raw_score=True) + offset).reshape(
            -1, count
        )
    return hazards


BEFORE, ON_IT = "learned before", "learned on what is scored"
LEARNS: Mapping[str, Learn] = {BEFORE: learned_before, ON_IT: learned_on_it}


class Foretold(NoForecasts):
    """`Foresight` by hazards that were worked out before; where there are none, it forecasts nothing."""

    def __init__(self, found: Silences, hazards: Floats) -> None:
        super().__init__()
        # So it is told of all that comes before anything happens.
        self.pools = False
        gone = np.cumsum(hazards * np.diff(EDGES_S), axis=1)
        self._gone = np.concatenate([np.zeros((len(gone), 1)), gone], axis=1)
        self._begin_s = found.begin_s
        self._times: dict[str, Floats] = {}
        self._batch: dict[str, float] = {}
        self._where = {
            (model, float(last_s)): i
            for i, (model, last_s) in enumerate(zip(found.model, found.last_s, strict=True))
            if not np.isnan(hazards[i, 0])
        }

    def coming(self, model: str, times: Floats, work: Floats) -> None:
        """All that will ever come; of what is to come, only the mean batch is used."""
        self._times[model] = times
        firsts = np.flatnonzero(np.diff(times, prepend=-np.inf) > APART_S)
        until = np.searchsorted(times, times[firsts] + BURST_S)
        self._batch[model] = float((until - firsts).mean())

    def forecast(self, model: str, now_s: float) -> Forecast | None:
        times = self._times.get(model)
        at = 0 if times is None else int(np.searchsorted(times, now_s, side="right"))
        if times is None or not at:
            return None
        last_s = float(times[at - 1])
        where = self._where.get((model, last_s))
        if where is None:
            return None
        age_s = now_s - float(self._begin_s[where])
        if age_s >= EDGES_S[-1] - 1.0:
            return None
        begun_s = max(0.0, age_s)
        ages = np.concatenate([[begun_s], EDGES_S[np.searchsorted(EDGES_S, begun_s + 1e-3) :]])
        gone = np.interp(ages, EDGES_S, self._gone[where])
        times_s = ages - age_s
        if age_s < 0:
            times_s, gone = np.insert(times_s, 0, 0.0), np.insert(gone, 0, 0.0)
        survival = np.exp(gone[0] - gone)
        next_arrival = NextArrival(now_s, tuple(times_s.tolist()), tuple(survival.tolist()))
        return Forecast(now_s, "trees", next_arrival, batch_size=self._batch[model], fitted_s=last_s)


def points(
    name: str,
    found: Silences,
    hazards: Floats,
    profile: Profile = policies_sparse.TWO_STATES,
    variants: Iterable[Variant] = (),
) -> Iterator[dict[str, Any]]:
    """What `predictive` makes of those hazards, as policies_sparse tells it: for those variants of it, or for each of
    policies_sparse.WAIT_COSTS."""
    setup = Setup(profile=profile, measure_from_s=policies_sparse.CASES[name].measure_from_s)
    costs = (Variant("predictive", {"wait_cost": wait_cost}) for wait_cost in policies_sparse.WAIT_COSTS)
    for variant in variants or costs:
        spec = variant.applied(Spec("", max_replicas=1, target_ongoing_requests=64.0))

        def of(model: str, spec: Spec = spec) -> Spec:
            return replace(spec, model=model)

        rows = policies_sparse.rows_of(name)
        report = replay(rows, of, setup, forecasts=Foretold(found, hazards))
        yield policies_sparse.plain(policies_sparse.Job(name, setup.profile, variant), report)


def silences_of(name: str) -> tuple[Silences, float]:
    """Of a trace that was read, at the simulator's times; and from when on they are scored."""
    work = policies_sparse.TWO_STATES.engine.work_s
    (piece,) = arrivals.pieces(policies_sparse.rows_of(name), work, most=None)
    first_s = min(float(times[0]) for times, _ in piece.requests.values())
    return silences(piece.requests), first_s + policies_sparse.CASES[name].measure_from_s


def ready(folder: Path, names: Sequence[str]) -> None:
    """The traces are read. Raises BenchError where there is nothing to learn with."""
    if importlib.util.find_spec("lightgbm") is None:
        raise clusters.BenchError(
            "the bound needs lightgbm, which `scripts/test` installs with what tests need"
        )
    policies_sparse.read(folder, names)


def measure(folder: Path, names: Sequence[str], processes: int | None = None) -> dict[str, Any]:
    ready(folder, names)
    result: dict[str, Any] = {}
    for name in names:
        say(f"{name}: what boosted trees could do")
        fixed = [
            policies_sparse.Job(name, policies_sparse.TWO_STATES, variant)
            for variant in policies_sparse.variants(("keep-alive",))
        ]
        compared = [
            policies_sparse.plain(job, report) for job, report in policies_sparse.run(fixed, processes)
        ]
        found, scored_s = silences_of(name)
        cut = cells(found)
        result[name] = {"silences": int((found.begin_s >= scored_s).sum())}
        for label, learn in LEARNS.items():
            hazards = learn(found, cut, scored_s)
            judged = policies_sparse.judged(name, [*compared, *points(name, found, hazards)])
            result[name][label] = judged["rows"]
            say(f"{name}: {label}")
    return result


def text(result: Mapping[str, Any]) -> str:
    parts = []
    for column, bar, says in (
        ("cold_ratio", policies_sparse.COLD_BAR, "cold starts over fixed keep-alive's, at its idle time"),
        ("cost_ratio", policies_sparse.COST_BAR, "cost over the best fixed keep-alive's"),
    ):
        rows = [
            [f"{name}: boosted trees, {label}", found["silences"], *(row[column] for row in found[label])]
            for name, found in result.items()
            for label in (BEFORE, ON_IT)
        ]
        costs = [f"wait_cost {wait_cost:g}" for wait_cost in policies_sparse.WAIT_COSTS]
        parts.append(table([f"{says} (bar: {bar:g})", "silences", *costs], rows))
    parts.append("What was learned on what is scored bounds what can be learned.")
    return "\n\n".join(parts)


__all__ = ["LEARNS", "Foretold", "cells", "measure", "points", "ready", "silences", "silences_of"]
