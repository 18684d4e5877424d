"""Jobs at fixed times of the day, simulated: how long their runs wait, and what it cost to have their models lit.

Each is a model of its own, asked once a run, learned from nothing for two weeks and scored on the two after them;
starts take 30 s. Beside `predictive`: the fixed keep-alives of a minute and of a day, which is lit always.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np

from autoscaling.core.types import Spec
from autoscaling.sim.compare import Base, Variant, simulate
from autoscaling.sim.profile import Engine, Profile
from autoscaling.sim.replay import Setup
from autoscaling.traces import Row
from bench.numbers import table

DAY_S, DAYS, LEARN_DAYS = 86400.0, 28, 14
MONDAY_S = 4 * DAY_S
"""A Monday's midnight, in Unix time: what the regularities of a week count from."""
START_S, WORK_S = 30.0, 5.0
WEEKDAYS = frozenset(range(5))
EACH_DAY = frozenset(range(7))
PATTERNS: Mapping[str, tuple[tuple[float, ...], frozenset[int]]] = {
    "02:00": ((2,), EACH_DAY),
    "09:00, 17:00": ((9, 17), EACH_DAY),
    "09:00, 17:00, weekdays": ((9, 17), WEEKDAYS),
    "08:30, 12:00, 18:00": ((8.5, 12, 18), EACH_DAY),
    "08:30, 12:00, 18:00, weekdays": ((8.5, 12, 18), WEEKDAYS),
    "every 3 h from 06:00 to 21:00": (tuple(range(6, 22, 3)), EACH_DAY),
    "hourly from 09:00 to 17:00, weekdays": (tuple(range(9, 18)), WEEKDAYS),
}
"""Hours of the day, and days of the week (0 is Monday)."""
VARIANTS = {
    "predictive": Variant("predictive", {}),
    "keep-alive, 60 s": Variant("keep-alive", {"keep_alive_s": 60.0}),
    "keep-alive, 1 d": Variant("keep-alive", {"keep_alive_s": DAY_S}),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wait-cost", type=float, default=10.0, help="default: 10")
    parser.add_argument(
        "--jitter-s", default="0,5,20,60", help="standard deviations of the runs' times (default: 0,5,20,60)"
    )
    parser.add_argument("--seed", type=int, default=0)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for jitter_s in map(float, options.jitter_s.split(",")):
        trace = traffic(jitter_s, options.seed)
        for name, variant in VARIANTS.items():
            profile = Profile(engine=Engine(concurrency=1)).two_states(START_S)
            spec = Spec("", wait_cost=options.wait_cost, max_replicas=1, target_ongoing_requests=1.0)
            setup = Setup(profile=profile, measure_from_s=MONDAY_S + LEARN_DAYS * DAY_S - trace[0].time_s)
            report = simulate(Base(trace, setup, spec=spec), variant)
            for model in report.models:
                figures = model.figures
                rows.append(
                    {
                        "jobs": model.model,
                        "jitter_s": jitter_s,
                        "policy": name,
                        "runs": figures.requests,
                        "waited_s_per_run": figures.waited_s / max(1, figures.requests),
                        "gpu_s_per_run": figures.gpu_s / max(1, figures.requests),
                    }
                )
    return {"rows": rows}


def traffic(jitter_s: float, seed: int) -> list[Row]:
    """All patterns, in order of time."""
    random = np.random.default_rng(seed)
    rows = [
        Row(
            float(MONDAY_S + day * DAY_S + hour * 3600 + random.normal(0, jitter_s)),
            name,
            exec_s=WORK_S,
        )
        for name, (hours, days) in PATTERNS.items()
        for day in range(DAYS)
        if day % 7 in days
        for hour in hours
    ]
    return sorted(rows, key=lambda row: row.time_s)


def text(result: Mapping[str, Any]) -> str:
    by: dict[tuple[str, float], dict[str, Any]] = {}
    for row in result["rows"]:
        by.setdefault((row["jobs"], row["jitter_s"]), {})[row["policy"]] = row
    head = ["jobs", "jitter s", "runs"]
    head += [f"{figure}, {name}" for figure in ("waits s", "GPU-s") for name in VARIANTS]
    lines = [
        [
            jobs,
            jitter_s,
            found["predictive"]["runs"],
            *(found[name]["waited_s_per_run"] for name in VARIANTS),
            *(found[name]["gpu_s_per_run"] for name in VARIANTS),
        ]
        for (jobs, jitter_s), found in sorted(by.items(), key=lambda each: (each[0][1], each[0][0]))
    ]
    scored = f"a run's mean on days {LEARN_DAYS + 1} to {DAYS}; starts of {START_S:g} s, {WORK_S:g} s of work"
    return f"{scored}\n{table(head, lines)}\n"
