"""What could be had of the ladder from knowing the past: boosted trees as its forecaster (see `policies_bound`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoscaling.sim.compare import Variant
from bench import policies_bound, policies_ladder, policies_sparse
from bench.clusters import say
from bench.numbers import ratio, table

MORE_COSTS = (2.0, 6.0, 20.0, 25.0, 28.0, 30.0, 32.0, 35.0, 40.0, 60.0, 200.0, 600.0, 1000.0, 2000.0, 3000.0)


def measure(folder: Path, names: Sequence[str], processes: int | None = None) -> dict[str, Any]:
    policies_bound.ready(folder, names)
    result: dict[str, Any] = {}
    costs = sorted({*policies_ladder.WAIT_COSTS, *MORE_COSTS})
    variants = [Variant("predictive", {"wait_cost": each, "park": 1.0}) for each in costs]
    for name in names:
        say(f"{name}: what boosted trees could do on the ladder")
        jobs = [
            policies_sparse.Job(name, policies_sparse.TWO_STATES, variant)
            for variant in policies_ladder.two_states()
        ]
        others = [policies_sparse.plain(job, report) for job, report in policies_sparse.run(jobs, processes)]
        found, scored_s = policies_bound.silences_of(name)
        cut = policies_bound.cells(found)
        result[name] = {}
        for label, learn in policies_bound.LEARNS.items():
            hazards = learn(found, cut, scored_s)
            trees = policies_bound.points(name, found, hazards, policies_ladder.LADDER, variants)
            result[name][label] = judged(list(trees), others)
            say(f"{name}: {label}")
    return result


def judged(
    trees: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> list[dict[str, float | None]]:
    """For each wait_cost, between what the trees' waiting lies at as many GPU-seconds as the best two-state policy
    spends, over that one's waiting: that of the run which spends at most as much, and of the one which spends more."""
    rows = []
    for wait_cost in policies_ladder.WAIT_COSTS:
        best = min(others, key=lambda each: policies_sparse.cost(each, wait_cost))
        within = [each["waited_s"] for each in trees if each["gpu_s"] <= best["gpu_s"]]
        beyond = [each["waited_s"] for each in trees if each["gpu_s"] > best["gpu_s"]]
        rows.append(
            {
                "wait_cost": wait_cost,
                "best_gpu_s": best["gpu_s"],
                "best_waited_s": best["waited_s"],
                "at_most": ratio(min(within), best["waited_s"]) if within else None,
                "at_least": ratio(max(beyond), best["waited_s"]) if beyond else None,
            }
        )
    return rows


def text(result: Mapping[str, Any]) -> str:
    columns = ("wait_cost", "best_gpu_s", "best_waited_s", "at_least", "at_most")
    parts = [
        f"{name}: boosted trees, {label}\n"
        + table(columns, [[row[column] for column in columns] for row in rows])
        for name, found in result.items()
        for label, rows in found.items()
    ]
    parts.append(
        "at_least, at_most: between these the trees' waiting on the ladder lies, over the best two-state policy's, at"
        f" as many GPU-seconds (bar: {policies_ladder.BAR:.3f})."
    )
    return "\n\n".join(parts)


__all__ = ["judged", "measure", "text"]
