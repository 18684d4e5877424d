"""`kpa`: Knative's autoscaler with its stable and its panic window."""

from __future__ import annotations

import math

from autoscaling.core.policies.base import Context, Param, Proposal, rest
from autoscaling.core.policies.following import TARGET, per_replica
from autoscaling.core.series import ceil, mean, mean_until_s, push_step
from autoscaling.core.types import Observation, Reason, Spec

STABLE = Param("stable_window_s", 60, 6, 3600, "s", "The window whose mean decides.")
PANIC = Param("panic_window_share", 0.1, 0.01, 1, "share", "The panic window, as a share of the stable one.")
THRESHOLD = Param(
    "panic_threshold",
    2,
    1.1,
    10,
    "ratio",
    "Panic begins when the panic window needs so many times what is ready.",
)
UTILIZATION = Param("target_utilization", 0.7, 0.01, 1, "share", "The share of the target that is aimed at.")
UP = Param("max_scale_up_rate", 1000, 1.01, 1e6, "ratio", "At most so many times what is ready.")
DOWN = Param("max_scale_down_rate", 2, 1.01, 1e6, "ratio", "At least what is ready divided by this.")
GRACE = Param(
    "scale_to_zero_grace_s", 30, 0, 3600, "s", "How long the last replica outlives the decision to end it."
)


class Kpa:
    """Windows are averages of a step function in continuous time, where Knative averages one-second buckets."""

    name = "kpa"
    source = (
        "Knative Serving, pkg/autoscaler/scaling/autoscaler.go and "
        "knative.dev/docs/serving/autoscaling/kpa-specific (defaults of config-autoscaler)"
    )
    params = (TARGET, STABLE, PANIC, THRESHOLD, UTILIZATION, UP, DOWN, GRACE)

    def at_once(self, spec: Spec, observation: Observation) -> float:
        return math.inf

    def propose(self, context: Context) -> Proposal:
        seen, memory = context.seen, context.state.values
        now_s = seen.now_s
        stable_s = context.param(STABLE)
        panic_s = stable_s * context.param(PANIC)
        unit = per_replica(context.spec) * context.param(UTILIZATION)
        series = push_step(context.state.series, now_s, float(seen.load), stable_s)
        stable, panic = mean(series, now_s, stable_s), mean(series, now_s, panic_s)
        ready = max(1, seen.ready)
        most, least = math.ceil(context.param(UP) * ready), math.floor(ready / context.param(DOWN))
        stable_need = min(max(ceil(stable / unit), least), most)
        raw_panic_need = ceil(panic / unit)
        panic_need = min(max(raw_panic_need, least), most)
        until_s = min(
            mean_until_s(series, now_s, stable_s, 1 / unit), mean_until_s(series, now_s, panic_s, 1 / unit)
        )
        values: dict[str, float] = {}
        over = raw_panic_need / ready >= context.param(THRESHOLD)
        # While it was over the threshold, the panic was renewed at every moment.
        renewed_s = now_s if over or memory.get("over") else memory.get("panic_s")
        replicas, reason = stable_need, Reason.DEMAND
        if renewed_s is not None and renewed_s + stable_s > now_s:
            replicas = max(stable_need, panic_need, int(memory.get("panic_most", 0)))
            values |= {"panic_s": renewed_s, "panic_most": float(replicas), "over": float(over)}
            reason = Reason.PANIC
            if not over:
                until_s = min(until_s, renewed_s + stable_s)
        elif seen.load == 0 and replicas > 0:
            reason = Reason.KEEP_ALIVE
        elif replicas > ceil(seen.load / unit):
            reason = Reason.SCALE_DOWN_DELAY
        numbers = {
            "load": float(seen.load),
            "stable_mean": stable,
            "panic_mean": panic,
            "target": unit,
            "ready_replicas": float(seen.ready),
        }
        if seen.load > 0 and seen.ready == 0:
            replicas, reason = max(1, replicas), Reason.WAKE
        if replicas == 0:
            if seen.load > 0:
                replicas = 1
            elif context.before > 0 or seen.present > 0 or "zero_s" in memory:
                zero_s = memory.get("zero_s", now_s)
                values["zero_s"] = zero_s
                ends_s = zero_s + context.param(GRACE)
                if now_s < ends_s and (context.before > 0 or seen.present > 0):
                    replicas, reason, until_s = 1, Reason.KEEP_ALIVE, min(until_s, ends_s)
        if replicas == 0:
            rung, reason = rest(context)
            return Proposal(0, rung, reason, until_s, numbers, values, series)
        return Proposal(replicas, seen.rung, reason, until_s, numbers, values, series)


__all__ = ["Kpa"]
