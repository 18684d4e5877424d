"""What could be had from knowing the past: boosted trees as the forecaster, learned before, or on what is scored.

For each silence, the hazard of its end (piecewise exponential over its age: Friedman 1982) is a Poisson regression by
LightGBM (Ke et al. 2017) over what was known when it began and over what the rest of the fleet has done since, with
many more shapes than Relight's own regression has.
A replica that is lit wherever the hazard is above a threshold is the best that such a forecaster can do at equal idle
time. Learned on the scored part itself, no forecaster of this kind that learns from the past alone does better; that it
fits chance too makes the bound a generous one. Starts cost nothing here, and take no time.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscaling.sim import arrivals
from bench import clusters, policies_sparse
from bench.clusters import say
from bench.numbers import table

Floats = NDArray[np.float64]
DAY_S = 86400.0
END_S = 2 * DAY_S
EDGES_S: Floats = np.concatenate([np.arange(0.0, 60.0, 5.0), np.geomspace(60.0, END_S, 60)])
KEEP_ALIVES_S = (30.0, 60.0, 120.0, 300.0, 900.0, 3600.0, 7200.0)
WINDOWS_S = (60.0, 300.0, 900.0, 3600.0, 14400.0, DAY_S, 3 * DAY_S)
FLEET_S = (60.0, 300.0, 1800.0, 7200.0)
"""Over which times the whole fleet's requests are counted, at each moment of a silence."""
RELEARN_S = DAY_S
KEPT = 60
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


def silences(requests: Mapping[str, tuple[Floats, Floats]]) -> Silences:
    """From arrivals and seconds of work by model, each worked on at once."""
    everything = np.sort(np.concatenate([times for times, _ in requests.values()]))
    rows: list[tuple[float, float, float, bool]] = []
    known: list[list[float]] = []
    of_model: list[Floats] = []
    for number, (times, work) in enumerate(requests.values()):
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
    return Silences(begin_s, last_s, length_s, over.astype(bool), np.asarray(known, np.float64), of_model)


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
    begin_s = found.begin_s[at] + EDGES_S[cell]
    age_s = (EDGES_S[cell] + EDGES_S[cell + 1]) / 2
    since_s = age_s + (found.begin_s - found.last_s)[at]
    everything = np.sort(np.concatenate(list({id(times): times for times in found.arrivals}.values())))
    lately = [
        np.searchsorted(everything, begin_s) - np.searchsorted(everything, begin_s - back_s)
        for back_s in FLEET_S
    ]
    day = same_time(found, at, found.begin_s[at] + age_s)
    known = (found.known[at], np.log1p(age_s)[:, None], np.log1p(since_s)[:, None], day, np.stack(lately, 1))
    return Cells(at, begin_s, exposure_s, ended, np.log(0.5 / (age_s + 30.0)), np.concatenate(known, axis=1))


def learned_before(found: Silences, cut: Cells, scored_s: float) -> Floats:
    """log hazards of the cells of silences after `scored_s`, learned anew each RELEARN_S from what came before."""
    hazard = np.full(len(cut.of), -np.inf)
    begin_s = found.begin_s[cut.of]
    ends_s = cut.begin_s + cut.exposure_s
    span_s = float(begin_s.max()) - scored_s
    steps = max(1, math.ceil(span_s / RELEARN_S))
    for from_s in scored_s + span_s / steps * np.arange(steps):
        now = begin_s >= from_s
        hazard[now] = _learned(cut, ends_s < from_s)[now]
    return hazard


def learned_on_it(found: Silences, cut: Cells, scored_s: float) -> Floats:
    """The same, learned from the very cells: what nobody can know."""
    return _learned(cut, found.begin_s[cut.of] >= scored_s)


def _learned(cut: Cells, learn: NDArray[np.bool_]) -> Floats:
    import lightgbm

    rates = cut.ended[learn] / cut.exposure_s[learn]
    data = lightgbm.Dataset(
        cut.known[learn], rates, weight=cut.exposure_s[learn], init_score=cut.offset[learn]
    )
    model = lightgbm.train(dict(SETTINGS), data, TREES)
    return np.asarray(model.predict(cut.known, raw_score=True) + cut.offset)


def cold_ratios(found: Silences, cut: Cells, hazard: Floats, scored_s: float) -> list[float]:
    """Cold starts over those of each fixed keep-alive, at its idle time, of silences that begin after `scored_s`."""
    idle_s, cold = _front(found, cut, hazard, scored_s)
    result = []
    for keep_s in KEEP_ALIVES_S:
        fixed_idle_s, fixed = _fixed(found, scored_s, keep_s)
        result.append(float(np.interp(fixed_idle_s, idle_s, cold)) / fixed)
    return result


def cost_ratios(found: Silences, cut: Cells, hazard: Floats, scored_s: float, busy_s: float) -> list[float]:
    """GPU-seconds + wait_cost * waiting over those of the best fixed keep-alive, for each of WAIT_COSTS.

    The threshold is the one that is best in hindsight, too.
    """
    idle_s, cold = _front(found, cut, hazard, scored_s)
    fixed = [_fixed(found, scored_s, keep_s) for keep_s in policies_sparse.KEEP_ALIVES_S]
    result = []
    for wait_cost in policies_sparse.WAIT_COSTS:
        each = policies_sparse.START_S * (1 + wait_cost)
        best = min(fixed_idle_s + fixed_cold * each for fixed_idle_s, fixed_cold in fixed)
        result.append((busy_s + float((idle_s + cold * each).min())) / (busy_s + best))
    return result


def _front(found: Silences, cut: Cells, hazard: Floats, scored_s: float) -> tuple[Floats, Floats]:
    """Idle seconds, ascending, and cold starts, of a replica that is lit above each threshold of the hazard."""
    scored = found.begin_s >= scored_s
    mine = scored[cut.of]
    order = np.argsort(-hazard[mine], kind="stable")
    idle_s = np.concatenate([[0.0], np.cumsum(cut.exposure_s[mine][order])])
    hits = np.concatenate([[0.0], np.cumsum(cut.ended[mine][order])])
    return idle_s, scored.sum() - hits


def _fixed(found: Silences, scored_s: float, keep_s: float) -> tuple[float, int]:
    """Idle seconds and cold starts of a fixed keep-alive."""
    scored = found.begin_s >= scored_s
    lengths = found.length_s[scored]
    met = int((found.over[scored] & (lengths <= keep_s)).sum())
    return float(np.minimum(lengths, keep_s).sum()), int(scored.sum()) - met


def measure(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    if importlib.util.find_spec("lightgbm") is None:
        raise clusters.BenchError(
            "the bound needs lightgbm, which `scripts/test` installs with what tests need"
        )
    policies_sparse.read(folder, names)
    result = {}
    for name in names:
        say(f"{name}: what boosted trees could do")
        rows = policies_sparse.rows_of(name)
        work = policies_sparse.TWO_STATES.engine.work_s
        (piece,) = arrivals.pieces(rows, work, most=None)
        first_s = min(float(times[0]) for times, _ in piece.requests.values())
        found = silences(piece.requests)
        scored_s = first_s + policies_sparse.CASES[name].measure_from_s
        busy_s = sum(float(work[times >= scored_s].sum()) for times, work in piece.requests.values())
        cut = cells(found)
        result[name] = {"silences": int((found.begin_s >= scored_s).sum())}
        for label, learn in (
            ("learned_before", learned_before),
            ("learned_on_what_is_scored", learned_on_it),
        ):
            hazard = learn(found, cut, scored_s)
            result[name][label] = {
                "cold_ratios": cold_ratios(found, cut, hazard, scored_s),
                "cost_ratios": cost_ratios(found, cut, hazard, scored_s, busy_s),
            }
    return result


def text(result: Mapping[str, Any]) -> str:
    labels = (("learned_before", "learned before"), ("learned_on_what_is_scored", "on what is scored"))
    parts = []
    for key, says, columns in (
        (
            "cold_ratios",
            f"cold starts over fixed keep-alive's, at its idle time (bar: {policies_sparse.COLD_BAR:g})",
            [f"{keep_s:g} s" for keep_s in KEEP_ALIVES_S],
        ),
        (
            "cost_ratios",
            f"cost over the best fixed keep-alive's (bar: {policies_sparse.COST_BAR:g})",
            [f"wait_cost {wait_cost:g}" for wait_cost in policies_sparse.WAIT_COSTS],
        ),
    ):
        rows = [
            [f"{name}: boosted trees, {label}", found["silences"], *found[which][key]]
            for name, found in result.items()
            for which, label in labels
        ]
        parts.append(table([says, "silences", *columns], rows))
    parts.append("What was learned on what is scored bounds what can be learned.")
    return "\n\n".join(parts)


__all__ = ["cells", "cold_ratios", "cost_ratios", "measure", "silences", "text"]
