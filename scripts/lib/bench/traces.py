"""Traces of real systems as the traffic that the store would have kept."""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoscaling.traffic import LEVELS, Buckets, Traffic

Floats = NDArray[np.float64]
START_S = 1_767_571_200.0
"""Where a trace's second 0 is put: Monday, 5 January 2026, 00:00 UTC."""


@dataclass(frozen=True)
class Trace:
    """One model's arrivals: `count[i]` in [time_s[i], time_s[i] + step_s)."""

    model: str
    step_s: float
    time_s: Floats
    count: Floats
    busy_s: Floats


def load(path: Path) -> list[Trace]:
    """The models of one file, as ../shared/traces/README.md describes it; raises ValueError for another kind."""
    kinds = {"req": 1.0, "min": 60.0, "win5": 300.0, "win10": 600.0}
    step_s = kinds.get(path.name.partition("_")[0])
    if step_s is None:
        raise ValueError(f"{path.name}: not a trace; the name must begin with one of {', '.join(kinds)}")
    rows: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            if step_s == 1.0:
                rows[row["model"]].append((float(row["timestamp_s"]), 1.0, float(row.get("exec_s") or 0.0)))
            else:
                rows[row["model"]].append((float(row["minute"]) * 60, float(row["count"]), 0.0))
    traces = []
    for model, found in sorted(rows.items()):
        table = np.asarray(sorted(found))
        traces.append(Trace(model, step_s, table[:, 0] + START_S, table[:, 1], table[:, 2]))
    return traces


def exact(trace: Trace, since_s: float, now_s: float) -> Traffic:
    """All of it in the trace's own step: what happened, for judging what was forecast."""
    keep = (trace.time_s >= since_s) & (trace.time_s + trace.step_s <= now_s)
    rows = (trace.time_s[keep], trace.count[keep], trace.busy_s[keep])
    return Traffic(trace.model, now_s, (_buckets(rows, trace.step_s, trace.step_s, since_s, now_s),))


def traffic(trace: Trace, since_s: float, now_s: float) -> Traffic:
    """What the store would know at `now_s`, in the store's levels; in the trace's own where it is coarser."""
    keep = (trace.time_s >= since_s) & (trace.time_s + trace.step_s <= now_s)
    times, count, busy = trace.time_s[keep], trace.count[keep], trace.busy_s[keep]
    levels = [(step, kept) for step, kept in LEVELS if step > trace.step_s]
    levels.insert(0, (trace.step_s, dict(LEVELS).get(trace.step_s, 28 * 86400.0)))
    return Traffic(
        trace.model,
        now_s,
        tuple(
            _buckets((times, count, busy), trace.step_s, step, max(since_s, now_s - kept), now_s)
            for step, kept in levels
        ),
    )


def _buckets(
    rows: tuple[Floats, Floats, Floats], trace_step: float, step: float, since_s: float, now_s: float
) -> Buckets:
    """In steps of `step`, of rows that each cover `trace_step`."""
    times, count, busy = rows
    keep = times >= np.floor(since_s / step) * step
    index, where = np.unique((times[keep] // step).astype(np.int64), return_inverse=True)
    zeros = np.zeros(len(index), np.float32)
    known = np.floor(times[keep])
    first, last = known[np.diff(where, prepend=-1) > 0], known[np.diff(where, append=-1) != 0] + trace_step
    return Buckets(
        step_s=step,
        start_s=since_s,
        end_s=now_s,
        index=index,
        arrivals=np.bincount(where, count[keep], len(index)).astype(np.float32),
        input_tokens=zeros,
        output_tokens=zeros,
        busy_s=np.bincount(where, busy[keep], len(index)).astype(np.float32),
        # Windows don't tell in which of their seconds a request came.
        lead_s=(first - index * step).astype(np.uint16) if trace_step == 1.0 else None,
        trail_s=((index + 1) * step - last).astype(np.uint16) if trace_step == 1.0 else None,
    )
