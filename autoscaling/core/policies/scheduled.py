"""`scheduled`: replicas by the clock; between the windows only what waiting requests need."""

from __future__ import annotations

from autoscaling.core.policies.base import Context, Param, Proposal
from autoscaling.core.policies.following import TARGET, follow, per_replica
from autoscaling.core.types import Observation, Spec

IDLE = Param(
    "idle_s", 0, 0, 30 * 86400, "s", "How long a replica outlives its last request outside the windows."
)


class Scheduled:
    """The windows themselves are floors under every policy; this one adds nothing to them while nothing is asked."""

    name = "scheduled"
    source = (
        "AWS Lambda provisioned concurrency with Application Auto Scaling's scheduled actions "
        "(docs.aws.amazon.com/lambda/latest/dg/provisioned-concurrency.html)"
    )
    params = (TARGET, IDLE)

    def at_once(self, spec: Spec, observation: Observation) -> float:
        return per_replica(spec)

    def propose(self, context: Context) -> Proposal:
        idle_s = context.param(IDLE)
        return follow(context, delay_s=idle_s, idle_s=idle_s)


__all__ = ["Scheduled"]
