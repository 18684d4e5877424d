"""Sparse traffic with the ladder: engines parked in host memory wake in 3 s. What that spares, at no more GPU time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoscaling.core.types import Rung
from autoscaling.sim.compare import Variant
from autoscaling.sim.profile import Start
from bench.clusters import say
from bench.numbers import ratio, table
from bench.policies_sparse import START_S, TWO_STATES, Job, cost, plain, read, run

WAKE_S = 3.0
PARKED_COST = 0.01
"""GPU-seconds for a second of a parked engine's host memory: a hundredth of a GPU's price."""
WAIT_COSTS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
MORE_COSTS = (2.0, 6.0, 20.0, 40.0, 60.0, 200.0, 600.0, 1000.0, 1200.0, 1500.0, 2000.0, 3000.0)
"""For the ladder only. At the highest of the others it spends less than half of what the two states do; and between two
of them its GPU-seconds may triple, so that what is as dear as the two states lies between."""
KEEP_ALIVES_S = (0, 15, 30, 60, 90, 120, 180, 300, 450, 600, 900, 1200, 1800, 3600, 7200, 14400)
BAR = 1 / 3
NEVER_DARK = Variant("keep-alive", {"keep_alive_s": 1e9})
"""Each model stays lit from its first request on, so that only its first start is waited for, by all who come during
it. There is one replica at most: who knows nothing of a model before its first request waits as long, whatever is
paid."""
LADDER = replace(
    TWO_STATES, starts={Rung.TEMPLATE: Start((START_S,)), Rung.PARKED: Start((WAKE_S,), PARKED_COST)}
)


def measure(folder: Path, names: Sequence[str], processes: int | None) -> dict[str, Any]:
    read(folder, names)
    ours = [Variant("predictive", {"wait_cost": each, "park": 1.0}) for each in (*WAIT_COSTS, *MORE_COSTS)]
    jobs = [
        Job(name, profile, variant)
        for name in names
        for profile, variants in ((LADDER, ours), (TWO_STATES, [*two_states(), NEVER_DARK]))
        for variant in variants
    ]
    found: dict[str, list[tuple[Job, dict[str, Any]]]] = {name: [] for name in names}
    for at, (job, report) in enumerate(run(jobs, processes), 1):
        found[job.case].append((job, plain(job, report)))
        say(f"{at} of {len(jobs)}: {job.case}, {job.variant.label}: {report.took_s:.1f} s")
    return {name: judged(points) for name, points in found.items()}


def two_states() -> list[Variant]:
    """What the ladder is held against."""
    found = [Variant("predictive", {"wait_cost": each}) for each in WAIT_COSTS]
    found += [Variant("hybrid-histogram", {"tail_percentile": each}) for each in (99.0, 90.0, 75.0, 50.0)]
    found += [Variant("kpa", {"stable_window_s": each}) for each in (60.0, 300.0, 600.0, 3600.0)]
    found += [Variant("keep-alive", {"keep_alive_s": float(each)}) for each in KEEP_ALIVES_S]
    return found


def judged(points: Sequence[tuple[Job, dict[str, Any]]]) -> dict[str, Any]:
    """For each wait_cost the best two-state policy, and the ladder's run that spends at most as many GPU-seconds."""
    ours = [point for job, point in points if job.profile == LADDER]
    others = [point for job, point in points if job.profile != LADDER and job.variant != NEVER_DARK]
    least = next((point for job, point in points if job.variant == NEVER_DARK), None)
    rows = []
    for wait_cost in WAIT_COSTS:
        best = min(others, key=lambda each: cost(each, wait_cost))
        same = next(each for each in ours if each["settings"]["wait_cost"] == wait_cost)
        mine = min(
            (each for each in ours if each["gpu_s"] <= best["gpu_s"]),
            key=lambda each: float(each["waited_s"]),
            default=None,
        )
        rows.append(
            {
                "wait_cost": wait_cost,
                "best": _label(best),
                "best_gpu_s": best["gpu_s"],
                "best_waited_s": best["waited_s"],
                "ladder_wait_cost": mine and mine["settings"]["wait_cost"],
                "gpu_s": mine and mine["gpu_s"],
                "parked_gpu_s": mine and mine["parked_gpu_s"],
                "waited_s": mine and mine["waited_s"],
                "wait_ratio": mine and ratio(mine["waited_s"], best["waited_s"]),
                "least_ratio": least and ratio(least["waited_s"], best["waited_s"]),
                "cost_ratio": ratio(cost(same, wait_cost), cost(best, wait_cost)),
            }
        )
    return {"rows": rows, "runs": [point for _, point in points]}


def _label(point: Mapping[str, Any]) -> str:
    return Variant(point["policy"], point["settings"]).label


def text(result: Mapping[str, Any]) -> str:
    parts = [
        f"parked: awake in {WAKE_S:g} s, {PARKED_COST:g} GPU-seconds a second for the host memory; dark: {START_S:g} s"
    ]
    columns = (
        *("wait_cost", "best", "best_gpu_s", "best_waited_s", "ladder_wait_cost", "gpu_s", "parked_gpu_s"),
        *("waited_s", "wait_ratio", "least_ratio", "cost_ratio"),
    )
    for name, found in result.items():
        parts.append(f"\n{name}")
        parts.append(
            table(
                (*columns, "bar"),
                [[*(row[column] for column in columns), _met(row)] for row in found["rows"]],
            )
        )
    parts.append(
        "\nbest: the two-state policy with the least GPU-seconds + wait_cost * waiting; next to it the ladder's run"
        " with at most as many GPU-seconds\nand the least waiting, which has to be a third. least_ratio: what is waited"
        " where each model stays lit for ever from its first request\non: the least, whatever the policy. cost_ratio:"
        " GPU-seconds + wait_cost * waiting, the ladder's at this very wait_cost to the best's."
    )
    return "\n".join(parts)


def _met(row: Mapping[str, Any]) -> str:
    return "met" if row["wait_ratio"] is not None and row["wait_ratio"] <= BAR else "missed"
