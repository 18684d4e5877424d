"""What could be had on dense traffic from knowing the past: boosted trees as the forecaster of the next window.

A replica that is asked for takes a cold start to come. So in each window of a trace, until one cold start after its
beginning, there is what was decided before anything of it was known; after that, in this bound, exactly what is needed,
which no policy knows either. What is decided before is a quantile of the next window's requests by LightGBM (Ke et al.
2017), times a margin; both are the best in hindsight. A request counts as late where, as a fluid, it would wait longer
than the SLO; that a queue then takes time to empty is left out. Learned on the scored part itself, no forecaster of
this kind that learns from the past alone does better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscaling.traces import Row, open_trace
from bench import policies_dense
from bench.clusters import say
from bench.numbers import table

Floats = NDArray[np.float64]
DAY_S = 86400.0
LAST = 12
"""Windows before, that are looked at."""
QUANTILES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
MARGINS: Floats = np.geomspace(0.8, 3.0, 200)
TREES = 150
SETTINGS: Mapping[str, Any] = {
    "objective": "quantile",
    "num_leaves": 7,
    "min_data_in_leaf": 15,
    "learning_rate": 0.05,
    "lambda_l2": 1.0,
    "seed": 0,
    "verbose": -1,
}


def windows(rows: Sequence[Row]) -> tuple[Floats, float]:
    """Requests in each window, shape (n,), and how long one is."""
    window_s = rows[0].window_s
    where = np.asarray([row.time_s / window_s for row in rows]).round().astype(np.int64)
    counts = np.bincount(where, [row.requests for row in rows]).astype(np.float64)
    return np.maximum(counts, 1.0), window_s


def known_before(counts: Floats, window_s: float, ahead: int = 1) -> Floats:
    """What is known of each window when the one begins that comes so many minus one before it.

    Logarithms, relative to the last one that is known: shape (n, features).
    """
    logs = np.log(counts)
    day = round(DAY_S / window_s)

    def back(by: int) -> Floats:
        return np.asarray(np.concatenate([np.full(by, np.nan), logs])[: len(logs)])

    last = back(ahead)
    at = np.arange(len(logs))
    columns = [back(ahead + k) - last for k in range(1, LAST)]
    columns += [back(day * days + off) - last for days, off in ((1, -1), (1, 0), (1, 1), (2, 0), (7, 0))]
    return np.stack([*columns, last, at % day, at // day % 7], axis=1)


def late(counts: Floats, capacity: Floats, window_s: float, cold_s: float) -> float:
    """Share of all requests that wait longer than the SLO: those that come when what waits takes longer than that."""
    reach_s = min(cold_s, window_s)
    over = np.maximum(counts - capacity, 1e-9)
    begins_s = policies_dense.SLO_S * capacity / over
    share = np.where(counts > capacity, np.maximum(reach_s - begins_s, 0.0) / window_s, 0.0)
    return float((counts * share).sum() / counts.sum())


def least(counts: Floats, window_s: float, cold_s: float, learn: slice, scored: slice) -> float:
    """GPU-seconds over the work that all requests are, at the attainment of the dense part."""
    import lightgbm

    ahead = max(1, round(cold_s / window_s))
    known = known_before(counts, window_s, ahead)
    last = np.concatenate([counts[:ahead], counts[:-ahead]])
    change = np.log(counts / last)
    data = lightgbm.Dataset(known[learn], change[learn], free_raw_data=False)
    come = counts[scored]
    reach = min(1.0, cold_s / window_s)
    best = np.inf
    for quantile in QUANTILES:
        model = lightgbm.train({**SETTINGS, "alpha": quantile}, data, TREES)
        foretold = last[scored] * np.exp(np.asarray(model.predict(known[scored])))
        for margin in MARGINS:
            capacity = foretold * margin
            if late(come, capacity, window_s, cold_s) <= 1 - policies_dense.ATTAINMENT:
                held = reach * capacity + (1 - reach) * come
                best = min(best, float(held.sum() / come.sum()))
                break
    return best


def measure(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Of those cases of the dense part that have windows and a week to learn from."""
    result = []
    for case in policies_dense.CASES:
        if case.name not in names or case.replicas is None:
            continue
        say(f"{case.name}: what boosted trees could do")
        rows = [
            row
            for row in open_trace(folder / case.file).rows()
            if case.model is None or row.model == case.model
        ]
        first_s = rows[0].time_s
        counts, window_s = windows([row._replace(time_s=row.time_s - first_s) for row in rows])
        begin, end = int(case.learn_s // window_s), int(case.until_s // window_s)
        scored, before = slice(begin, end), slice(LAST, begin)
        for cold_s in policies_dense.COLD_S:
            result.append(
                {
                    "case": case.name,
                    "cold_s": cold_s,
                    "window_s": window_s,
                    "learned_before": least(counts, window_s, cold_s, before, scored),
                    "learned_on_what_is_scored": least(counts, window_s, cold_s, scored, scored),
                }
            )
    return result


def text(result: Sequence[Mapping[str, Any]]) -> str:
    head = [
        "GPU-seconds over the work, at the SLO",
        "cold s",
        "window s",
        "learned before",
        "on what is scored",
    ]
    rows = [
        [
            each["case"],
            each["cold_s"],
            each["window_s"],
            each["learned_before"],
            each["learned_on_what_is_scored"],
        ]
        for each in result
    ]
    return table(head, rows) + (
        "\nBoosted trees, the best of their quantiles and margins in hindsight, and one cold start after a window began"
        " exactly what it needs.\nTo be held against the multiples of the work in the dense part."
    )


__all__ = ["known_before", "late", "least", "measure", "text", "windows"]
