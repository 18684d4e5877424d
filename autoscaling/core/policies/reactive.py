"""`reactive`: requests in progress over a target."""

from __future__ import annotations

from autoscaling.core.policies.base import Context, Param, Proposal
from autoscaling.core.policies.following import IDLE, TARGET, follow, per_replica
from autoscaling.core.types import Observation, Spec

DELAY = Param(
    "downscale_delay_s", 30, 0, 86400, "s", "How long fewer replicas must have sufficed before any goes."
)


class Reactive:
    name = "reactive"
    source = (
        "Kubernetes HorizontalPodAutoscaler: ceil(load / target) with a stabilization window for scaling down "
        "(kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale)"
    )
    params = (TARGET, DELAY, IDLE)

    def at_once(self, spec: Spec, observation: Observation) -> float:
        return per_replica(spec)

    def propose(self, context: Context) -> Proposal:
        return follow(
            context,
            delay_s=context.param(DELAY),
            idle_s=context.param(IDLE, context.spec.keep_alive_s),
        )


__all__ = ["Reactive"]
