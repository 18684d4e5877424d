"""What could be had from knowing the past: boosted trees as the forecaster, learned before, or on what is scored.

For each silence, the hazard of its end (piecewise exponential over its age: Friedman 1982) is a Poisson regression by
LightGBM (Ke et al. 2017) over what was known when it began, with many more shapes than Relight's own regression has.
A replica that is lit wherever the hazard is above a threshold is the best that such a forecaster can do at equal idle
time. Learned on the scored part itself, no forecaster of this kind that learns from the past alone does better; that it
fits chance too makes the bound a generous one. Starts cost nothing here, and take no time.
"""

from __future__ import annotations

import importlib.util
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


def ratios(found: Silences, scored_s: float, *, cheats: bool) -> list[float]:
    """Cold starts over those of each fixed keep-alive, at its idle time, of silences that begin after `scored_s`."""
    import lightgbm

    scored = found.begin_s >= scored_s
    left_s = found.length_s[:, None] - EDGES_S[:-1]
    at, cell = np.nonzero(left_s > 0)
    exposure_s = np.minimum(left_s[at, cell], np.diff(EDGES_S)[cell])
    ended = (found.over[at] & (found.length_s[at] <= EDGES_S[cell + 1])).astype(np.float64)
    age_s = (EDGES_S[cell] + EDGES_S[cell + 1]) / 2
    since_s = age_s + (found.begin_s - found.last_s)[at]
    day = same_time(found, at, found.begin_s[at] + age_s)
    x = np.concatenate([found.known[at], np.log1p(age_s)[:, None], np.log1p(since_s)[:, None], day], axis=1)
    offset = np.log(0.5 / (age_s + 30.0))
    learned = scored[at] if cheats else ~scored[at]
    data = lightgbm.Dataset(
        x[learned], (ended / exposure_s)[learned], weight=exposure_s[learned], init_score=offset[learned]
    )
    model = lightgbm.train(dict(SETTINGS), data, TREES)
    hazard = model.predict(x[scored[at]], raw_score=True) + offset[scored[at]]
    order = np.argsort(-hazard, kind="stable")
    idle_s = np.cumsum(exposure_s[scored[at]][order])
    hits = np.cumsum(ended[scored[at]][order])
    count, lengths = int(scored.sum()), found.length_s[scored]
    over = found.over[scored]
    result = []
    for keep_s in KEEP_ALIVES_S:
        fixed = count - int((over & (lengths <= keep_s)).sum())
        result.append((count - float(np.interp(np.minimum(lengths, keep_s).sum(), idle_s, hits))) / fixed)
    return result


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
        result[name] = {
            "silences": int((found.begin_s >= scored_s).sum()),
            "learned_before": ratios(found, scored_s, cheats=False),
            "learned_on_what_is_scored": ratios(found, scored_s, cheats=True),
        }
    return result


def text(result: Mapping[str, Any]) -> str:
    head = ["cold starts over fixed keep-alive's, at its idle time", "silences"]
    head += [f"{keep_s:g} s" for keep_s in KEEP_ALIVES_S]
    rows = []
    for name, found in result.items():
        for label, key in (
            ("learned before", "learned_before"),
            ("on what is scored", "learned_on_what_is_scored"),
        ):
            rows.append([f"{name}: boosted trees, {label}", found["silences"], *found[key]])
    return (
        table(head, rows)
        + f"\nThe bar is {policies_sparse.COLD_BAR:g}. What was learned on what is scored bounds what can be learned."
    )


__all__ = ["measure", "ratios", "silences", "text"]
