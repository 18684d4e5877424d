"""What could be had on dense traffic from knowing the past: boosted trees as the forecaster of the next window.

A replica that is asked for takes a cold start to come. So in each window of a trace, until one cold start after its
beginning, there is what was decided before anything of it was known; after that, in this bound, exactly what is needed,
which no policy knows either. What is decided before is a quantile of the next window's requests by LightGBM (Ke et al.
2017), times a margin; both are the best in hindsight. Replicas are whole, and each one's start is charged, as in the
dense part: who is let go for less time than a start takes saves nothing. A request counts as late where, as a fluid, it
would wait longer than the SLO; that requests come by chance within a window, and that a queue takes time to empty, is
left out. Learned on the scored part itself, no forecaster of this kind that learns from the past alone does better.
"""

from __future__ import annotations

import math
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
OWN_WINDOW_S = 30.0
"""Of a trace that has none: both starts are multiples of it."""
LAST = 12
"""Windows before, that are looked at."""
QUANTILES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
MARGINS: Floats = np.geomspace(0.5, 3.0, 300)
TREES = 150
SETTINGS: Mapping[str, Any] = {
    "objective": "quantile",
    "num_leaves": 7,
    "min_data_in_leaf": 15,
    "learning_rate": 0.05,
    "lambda_l2": 1.0,
    "seed": 0,
    # There is little to learn from, and threads that wait for each other take minutes where others work, too.
    "num_threads": 1,
    "verbose": -1,
}


def windows(rows: Sequence[Row]) -> tuple[Floats, float]:
    """Requests in each window, shape (n,), and how long one is: OWN_WINDOW_S where the trace has single requests."""
    window_s = rows[0].window_s or OWN_WINDOW_S
    where = np.floor(np.asarray([row.time_s for row in rows]) / window_s + 1e-6).astype(np.int64)
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


def held(capacity: Floats, come: Floats, window_s: float, cold_s: float) -> float:
    """Mean replicas that are ready or starting, where each window first has that capacity, and one cold start after it
    began what comes: in the unit of both, replicas.

    What is needed at one moment is held from one cold start before it on: it starts then, or is not let go.
    """
    step_s = math.gcd(round(window_s), round(cold_s))
    slots, first = round(window_s / step_s), round(min(cold_s, window_s) / step_s)
    ready = np.repeat(come[:, None], slots, axis=1)
    ready[:, :first] = capacity[:, None]
    ahead = round(cold_s / step_s)
    flat = np.concatenate([ready.ravel(), np.zeros(ahead)])
    return float(np.lib.stride_tricks.sliding_window_view(flat, ahead + 1).max(axis=1).mean())


def least(  # noqa: PLR0917 - a trace, and what is learned and scored of it
    counts: Floats,
    window_s: float,
    cold_s: float,
    learn: slice,
    scored: slice,
    replica: float,
    attainment: float = policies_dense.ATTAINMENT,
) -> float:
    """GPU-seconds over the work that all requests are, at the attainment of the dense part.

    A replica carries so many requests a window.
    """
    import lightgbm

    ahead = max(1, round(cold_s / window_s))
    known = known_before(counts, window_s, ahead)
    last = np.concatenate([counts[:ahead], counts[:-ahead]])
    change = np.log(counts / last)
    data = lightgbm.Dataset(known[learn], change[learn], free_raw_data=False)
    come = counts[scored]
    needed = np.ceil(come / replica)
    best = np.inf
    for quantile in QUANTILES:
        model = lightgbm.train({**SETTINGS, "alpha": quantile}, data, TREES)
        foretold = last[scored] * np.exp(np.asarray(model.predict(known[scored])))
        for margin in MARGINS:
            replicas = np.ceil(foretold * margin / replica)
            if late(come, replicas * replica, window_s, cold_s) <= 1 - attainment:
                best = min(best, held(replicas, needed, window_s, cold_s) * replica / float(come.mean()))
                break
    return best


def measure(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Of those cases of the dense part. Of a trace that is too short for its attainment: at what all attain there."""
    result = []
    for case in policies_dense.CASES:
        if case.name not in names:
            continue
        say(f"{case.name}: what boosted trees could do")
        rows = [
            row
            for row in open_trace(folder / case.file).rows()
            if case.model is None or row.model == case.model
        ]
        first_s = rows[0].time_s
        counts, window_s = windows([row._replace(time_s=row.time_s - first_s) for row in rows])
        begin = int(case.learn_s // window_s)
        end = min(int(case.until_s // window_s), len(counts))
        scored, before = slice(begin, end), slice(LAST, begin)
        if case.replicas is None:
            replica = case.concurrency / case.service_s * window_s
        else:
            replica = policies_dense.busiest(counts) / case.replicas
        for cold_s in policies_dense.COLD_S:
            wanted = policies_dense.ATTAINMENT
            if case.replicas is None:
                wanted = policies_dense.attained(policies_dense.prepare(case, folder), cold_s)
            result.append(
                {
                    "case": case.name,
                    "cold_s": cold_s,
                    "window_s": window_s,
                    "attainment": wanted,
                    "learned_before": least(counts, window_s, cold_s, before, scored, replica, wanted),
                    "learned_on_what_is_scored": least(
                        counts, window_s, cold_s, scored, scored, replica, wanted
                    ),
                }
            )
    return result


def text(result: Sequence[Mapping[str, Any]]) -> str:
    head = [
        "GPU-seconds over the work, at the SLO",
        "cold s",
        "window s",
        "at",
        "learned before",
        "on what is scored",
    ]
    rows = [
        [
            each["case"],
            each["cold_s"],
            each["window_s"],
            each["attainment"],
            each["learned_before"],
            each["learned_on_what_is_scored"],
        ]
        for each in result
    ]
    return table(head, rows) + (
        "\nBoosted trees, the best of their quantiles and margins in hindsight, and one cold start after a window began"
        " exactly what it needs; whole replicas, their starts charged.\n"
        "To be held against the multiples of the work in the dense part."
    )


__all__ = ["held", "known_before", "late", "least", "measure", "text", "windows"]
