"""What all models may have together. Pure clamps over their decisions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from autoscaling.core.seen import charge, known, per_replica
from autoscaling.core.series import ceil
from autoscaling.core.types import Decision, Observation, Reason, Spec


@dataclass(frozen=True, slots=True)
class Budget:
    """None: no bound."""

    gpus: float | None = None
    """GPUs that all replicas together may hold, each as its spec charges it."""
    gpu_s_per_day: float | None = None
    """GPU-seconds that may be spent in one UTC day."""


def clamp(
    budget: Budget,
    specs: Mapping[str, Spec],
    observations: Mapping[str, Observation],
    decisions: Mapping[str, Decision],
    spent_gpu_s: float = 0.0,
) -> dict[str, Decision]:
    """The same decisions, with the replicas that the budget has no room for taken away and recorded in `clamps`.

    When the day's spend is reached, models without requests go to zero, and the others keep what they have (one, if
    they have none: a request is never turned away because its model is dark).

    GPUs go first to what cannot be moved (replicas that are held because something is unknown), then to replicas that
    requests need now, then to those that are kept or prewarmed. Within each: higher priority first, then what is there
    before what would be started, then every model's first replica before any model's second, then by name.
    """
    result = dict(decisions)
    if budget.gpu_s_per_day is not None and spent_gpu_s >= budget.gpu_s_per_day:
        for model, decision in decisions.items():
            observation = observations.get(model)
            if decision.replicas and observation is not None and model in specs:
                loaded = _needed(specs[model], observation, decision.replicas) > 0
                most = max(1, _present(observation)) if loaded else 0
                result[model] = _cut(decision, most, Reason.SPEND_LIMIT)
    if budget.gpus is not None:
        _fit(budget.gpus, specs, observations, result)
    return result


def _fit(
    gpus: float,
    specs: Mapping[str, Spec],
    observations: Mapping[str, Observation],
    decisions: dict[str, Decision],
) -> None:
    left = gpus
    wanted = 0.0
    for model, decision in decisions.items():
        each = charge(specs[model]) if model in specs else 1.0
        if decision.replicas is None:
            observation = observations.get(model)
            left -= each * (_present(observation) if observation is not None else 0)
        else:
            wanted += each * decision.replicas
    if wanted <= left + 1e-9:
        return
    units: list[tuple[bool, int, bool, int, str]] = []
    for model, decision in decisions.items():
        if not decision.replicas or model not in specs:
            continue
        observation = observations.get(model)
        present = 0 if observation is None else _present(observation)
        needed = 0 if observation is None else _needed(specs[model], observation, decision.replicas)
        priority = specs[model].priority
        units += [(i >= needed, -priority, i >= present, i, model) for i in range(decision.replicas)]
    granted: dict[str, int] = {}
    short: set[str] = set()
    for _, _, _, _, model in sorted(units):
        each = charge(specs[model])
        # A model's later replicas come after its earlier ones in each order, so that one refusal ends its turn.
        if model not in short and each <= left + 1e-9:
            left -= each
            granted[model] = granted.get(model, 0) + 1
        else:
            short.add(model)
    for model in short:
        decisions[model] = _cut(decisions[model], granted.get(model, 0), Reason.GPU_BUDGET)


def _cut(decision: Decision, most: int, reason: Reason) -> Decision:
    if decision.replicas is None or decision.replicas <= most:
        return decision
    numbers = {**decision.numbers, "wanted_replicas": float(decision.replicas)}
    return replace(decision, replicas=most, clamps=(*decision.clamps, reason), numbers=numbers)


def _present(observation: Observation) -> int:
    if known(observation.target):
        return int(observation.target)  # type: ignore[arg-type]
    counts = [count for count in (observation.ready, observation.starting) if known(count)]
    return int(math.fsum(counts))  # type: ignore[arg-type]


def _needed(spec: Spec, observation: Observation, replicas: int) -> int:
    """Replicas of those decided that the requests of this moment need."""
    counts = [count for count in (observation.queued, observation.in_flight) if known(count)]
    return min(replicas, ceil(math.fsum(counts) / per_replica(spec, observation)))  # type: ignore[arg-type]


__all__ = ["Budget", "clamp"]
