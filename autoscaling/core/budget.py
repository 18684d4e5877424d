"""What all models may have together. Pure clamps over their decisions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from autoscaling.core.seen import devices, known, per_replica
from autoscaling.core.series import need_of
from autoscaling.core.turns import Turns, keeping_place
from autoscaling.core.types import Decision, Observation, Reason, Rung, Spec

ASKED_FOR = frozenset({Reason.SCHEDULE, Reason.MANUAL, Reason.MIN_REPLICAS, Reason.FIXED})
"""Reasons by which people hold replicas."""


@dataclass(frozen=True, slots=True)
class Budget:
    """None: no bound."""

    gpus: float | None = None
    """GPUs that all replicas together may hold."""
    gpu_s_per_day: float | None = None
    """GPU-seconds that may be spent in one UTC day."""


def clamp(
    budget: Budget,
    specs: Mapping[str, Spec],
    observations: Mapping[str, Observation],
    decisions: Mapping[str, Decision],
    spent_gpu_s: float = 0.0,
    *,
    before: Mapping[str, Decision] | None = None,
) -> dict[str, Decision]:
    """The same decisions, with the replicas that the budget has no room for taken away and recorded in `clamps`, and
    with the `ceiling` to which requests alone may raise them until the next ones, those of models that are held because
    something is unknown as well. `before`: what this gave last.

    When the day's spend is reached, models without requests go to zero, and the others keep what they have (one, if
    they have none: a request is never turned away because its model is dark).

    GPUs go first to what cannot be moved (replicas that are held because something is unknown), then to replicas that
    requests need now, then to those that people asked for (minimums, schedules, manual prewarms), then to those that
    are kept or lit for what may come. Within each: higher priority first, then what is there before what would be
    started, then every model's first replica before any model's second, then by name; but of those that requests need,
    every model's first before any second, whichever is there: a busy model's second would else hold for as long as that
    is busy what another's requests wait for. And they take turns (`core.turns`): who has waited for its first for long
    enough comes before those of its priority that have had theirs, who waited longest first; who has served longest
    goes.
    """
    result = dict(decisions)
    if budget.gpu_s_per_day is not None and spent_gpu_s >= budget.gpu_s_per_day:
        for model, decision in decisions.items():
            observation = observations.get(model)
            if observation is None or model not in specs:
                continue
            most = max(1, _kept(observation, before, model))
            loaded = _needed(specs[model], observation, decision.replicas or 0) > 0
            cut = _cut(decision, most if loaded else 0, Reason.SPEND_LIMIT)
            result[model] = replace(cut, ceiling=most)
    if budget.gpus is not None:
        left = _fit(budget.gpus, specs, observations, result, before or {})
        for model, last in (before or {}).items():
            if model in result:
                result[model] = keeping_place(result[model], observations.get(model), last)
        for model, decision in result.items():
            each = devices(specs[model]) if model in specs else 0.0
            if each > 0:
                held = decision.replicas
                if held is None:
                    observation = observations.get(model)
                    held = 0 if observation is None else _present(observation)
                # What is left may go to any one of them: which, nobody knows before the next decisions.
                most = held + max(0, math.floor(left / each + 1e-9))
                most = most if decision.ceiling is None else min(most, decision.ceiling)
                result[model] = replace(decision, ceiling=most)
    return result


def _fit(
    gpus: float,
    specs: Mapping[str, Spec],
    observations: Mapping[str, Observation],
    decisions: dict[str, Decision],
    before: Mapping[str, Decision],
) -> float:
    """Of the decisions, what fits; how many GPUs are left over."""
    left = gpus
    wanted = 0.0
    for model, decision in decisions.items():
        each = devices(specs[model]) if model in specs else 1.0
        if decision.replicas is None:
            observation = observations.get(model)
            left -= each * (_present(observation) if observation is not None else 0)
        else:
            wanted += each * decision.replicas
    if wanted <= left + 1e-9:
        return left - wanted
    needs = {
        model: _needed(specs[model], observations[model], decision.replicas)
        for model, decision in decisions.items()
        if decision.replicas and model in specs and model in observations
    }
    asking = [model for model, needed in needs.items() if needed and devices(specs[model]) > 0]
    turns = Turns.of(asking, specs, observations, before)
    units: list[tuple[bool, bool, int, bool, float, bool, float, int, str]] = []
    for model, decision in decisions.items():
        if not decision.replicas or model not in specs:
            continue
        observation = observations.get(model)
        present = 0 if observation is None else _kept(observation, before, model)
        needed = needs.get(model, 0)
        asked = _asked(specs[model], decision)
        priority = specs[model].priority
        place, served = turns.place(model), -turns.served(model) if needed else 0.0
        units += [
            (
                *(i >= needed, i >= max(needed, asked), -priority, 0 < i < needed),
                *((math.inf, i >= present, 0.0) if i else (place, present == 0, served)),
                *(i, model),
            )
            for i in range(decision.replicas)
        ]
    granted: dict[str, int] = {}
    short: set[str] = set()
    for *_, model in sorted(units):
        each = devices(specs[model])
        # A model's later replicas come after its earlier ones in each order, so that one refusal ends its turn.
        if each == 0 or (model not in short and each <= left + 1e-9):
            left -= each
            granted[model] = granted.get(model, 0) + 1
        else:
            short.add(model)
    for model in short:
        decisions[model] = _cut(decisions[model], granted.get(model, 0), Reason.GPU_BUDGET)
    for model in asking:
        decisions[model] = turns.noted(decisions[model])
    return left


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


def _kept(observation: Observation, before: Mapping[str, Decision] | None, model: str) -> int:
    """Of the replicas that are there, those that are the model's to keep: not what requests raised above the ceiling,
    before those who raise had been told of it."""
    last = None if before is None else before.get(model)
    present = _present(observation)
    return present if last is None or last.ceiling is None else min(last.ceiling, present)


def _asked(spec: Spec, decision: Decision) -> int:
    """Replicas of those decided that people asked for."""
    if decision.reason in ASKED_FOR:
        return decision.replicas or 0
    now_s = decision.made_s
    windows = (w for w in spec.windows if w.rung is Rung.SERVING and w.start_s <= now_s < w.end_s)
    return max([spec.min_replicas, *(window.replicas for window in windows)])


def _needed(spec: Spec, observation: Observation, replicas: int) -> int:
    """Replicas of those decided that the requests of this moment need."""
    counts = [count for count in (observation.queued, observation.in_flight) if known(count)]
    return min(replicas, need_of(int(math.fsum(counts)), per_replica(spec, observation)))  # type: ignore[arg-type]


__all__ = ["Budget", "clamp"]
