"""`scheduled`: replicas by the clock; between the windows only what waiting requests need."""

from __future__ import annotations

from autoscaling.core.policies.base import Context, Param, Proposal
from autoscaling.core.policies.following import TARGET, follow
from autoscaling.core.seen import target

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

    def propose(self, context: Context) -> Proposal:
        idle_s = context.param(IDLE)
        return follow(
            context, target=context.param(TARGET, target(context.spec)), delay_s=idle_s, idle_s=idle_s
        )


__all__ = ["Scheduled"]
