"""`keep-alive`: what was started stays for a fixed idle time."""

from __future__ import annotations

from autoscaling.core.policies.base import Context, Proposal
from autoscaling.core.policies.following import IDLE, TARGET, follow, per_replica
from autoscaling.core.types import Observation, Spec


class KeepAlive:
    name = "keep-alive"
    source = (
        "A fixed idle time for each replica, as AWS Lambda (Wang et al., Peeking Behind the Curtains of Serverless "
        "Platforms, ATC'18), Modal (scaledown_window) and RunPod (idle timeout) have it"
    )
    params = (TARGET, IDLE)

    def at_once(self, spec: Spec, observation: Observation) -> float:
        return per_replica(spec)

    def propose(self, context: Context) -> Proposal:
        idle_s = context.param(IDLE, context.spec.keep_alive_s)
        return follow(context, delay_s=idle_s, idle_s=idle_s)


__all__ = ["KeepAlive"]
