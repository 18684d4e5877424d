"""The Poisson pattern of `bench prewarm` in the simulator, many times over: one live run has too few requests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from autoscaling.core.types import Spec
from autoscaling.sim.compare import Base, Variant, simulate
from autoscaling.sim.profile import Engine, Profile
from autoscaling.sim.replay import Setup
from autoscaling.traces import Row
from bench.clusters import say
from bench.numbers import table

SERVICE_S = 0.5
KEEP_ALIVES_S = (0, 5, 10, 15, 20, 30, 45, 60)

Times = Callable[[random.Random], list[float]]
Bursts = Callable[[random.Random], Iterator[tuple[int, list[float]]]]


def measure(
    runs: int, *, wait_cost: float, start_s: float, scored_s: float, seed: int, times: Times, bursts: Bursts
) -> list[dict[str, Any]]:
    """Sums over the runs, one row for each policy, in the columns of the live rows; the on/off model runs beside it."""
    profile = Profile(engine=Engine(concurrency=64, service_s=SERVICE_S)).two_states(start_s)
    spec = Spec("", wait_cost=wait_cost, max_replicas=1, target_ongoing_requests=64.0)
    variants = {
        "predictive": Variant("predictive", {}),
        **{f"keep-alive {s}": Variant("keep-alive", {"keep_alive_s": float(s)}) for s in KEEP_ALIVES_S},
    }
    found: dict[str, dict[str, Any]] = {
        name: {
            "pattern": "poisson",
            "policy": name,
            "requests": 0,
            "cold_requests": 0,
            "waited_s": 0.0,
            "gpu_s": 0.0,
        }
        for name in variants
    }
    for run in range(runs):
        rng = random.Random(seed + run)
        rows = [Row(at_s, "poisson") for at_s in times(rng)]
        rows += [Row(at_s, "on-off") for _, burst in bursts(rng) for at_s in burst]
        rows.sort()
        begin_s = rows[0].time_s
        for name, variant in variants.items():
            report = simulate(
                Base(rows, Setup(profile=profile, measure_from_s=scored_s - begin_s), spec=spec), variant
            )
            figures = next(model.figures for model in report.models if model.model == "poisson")
            row = found[name]
            row["requests"] += figures.requests
            row["cold_requests"] += figures.cold_requests
            row["waited_s"] += figures.waited_s
            row["gpu_s"] += figures.gpu_s
        if (run + 1) % 10 == 0:
            say(f"{run + 1} of {runs} runs simulated")
    return list(found.values())


def text(result: Mapping[str, Any]) -> str:
    head = ["policy", "requests", "cold", "waited s", "GPU-s"]
    lines = [
        [row["policy"], row["requests"], row["cold_requests"], row["waited_s"], row["gpu_s"]]
        for row in result["rows"]
    ]
    return f"poisson, {result['options']['simulated']} simulated runs, summed\n{table(head, lines)}\n"
