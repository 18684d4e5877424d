"""The simulator's side of `fidelity`, and how far it is from what was seen. Pure."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from autoscaling.core.types import Spec
from autoscaling.sim.profile import Profile
from autoscaling.sim.replay import Setup, replay
from autoscaling.sim.report import Figures, ModelReport
from autoscaling.traces import Row
from bench.clusters import BenchError

END = "end"
"""A model that is always there, and is asked at both ends, so that the trace lasts as long as the traffic."""
BARS = {"cold_starts": 0.0, "wait_p50_s": 0.15, "wait_p95_s": 0.15, "gpu_s": 0.05}
"""How far the simulator may be from what was seen, as a share of that."""
TOLD = (
    "requests",
    "cold_requests",
    *BARS,
    "wait_mean_s",
    "starting_gpu_s",
    "busy_gpu_s",
    "idle_gpu_s",
    "stopping_gpu_s",
)


def simulated(spec: Spec, setup: Setup, rows: Sequence[Row], begin_s: float, span_s: float) -> ModelReport:
    """One replay of a model's requests, from `begin_s` for `span_s`.

    The controller's ticks fall somewhere between two requests, where nobody knows: the seed says where. Raises
    BenchError.
    """
    shift_s = random.Random(setup.seed).random() * setup.tick_s
    end = replace(spec, model=END, policy="keep-alive", params={}, min_replicas=1)
    trace = [
        Row(begin_s, END, exec_s=1e-3),
        *(row._replace(time_s=row.time_s + shift_s) for row in rows),
        Row(begin_s + shift_s + span_s, END, exec_s=1e-3),
    ]
    report = replay(trace, {spec.model: spec, END: end}, setup)
    if report.notes:
        raise BenchError("; ".join(report.notes))
    return next(each for each in report.models if each.model == spec.model)


def middle(figures: Sequence[Figures]) -> dict[str, Any]:
    """Medians over the seeds, and the range of the cold starts."""
    counts = [each.cold_starts for each in figures]
    medians = {name: statistics.median(getattr(each, name) for each in figures) for name in TOLD}
    return medians | {"cold_starts_range": [min(counts), max(counts)]}


def compared(live: Mapping[str, Any], sim: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each figure how far the simulator is off, as a share of what was seen (None: of nothing), its bar, and whether
    that is met."""
    found = {}
    for name, bar in BARS.items():
        off = sim[name] - live[name]
        share = off / live[name] if live[name] else None if off else 0.0
        found[name] = {"off": share, "bar": bar, "met": share is not None and abs(share) <= bar}
    return found


def profile_of(profile: Profile) -> dict[str, Any]:
    """What was measured of it, as `relight simulate --profile` reads it."""
    engine = profile.engine
    return {
        "engine": {
            "concurrency": engine.concurrency,
            "prefill_tokens_per_s": engine.prefill_tokens_per_s,
            "decode_s": engine.decode_s,
            "slowdown": list(engine.slowdown),
        },
        "starts": {rung.name.lower(): list(start.delay_s) for rung, start in profile.starts.items()},
        "base": profile.base.name.lower(),
        "handoff_s": profile.handoff_s,
        "wake_s": profile.wake_s,
        "apply_s": profile.apply_s,
        "stop_s": profile.stop_s,
    }
