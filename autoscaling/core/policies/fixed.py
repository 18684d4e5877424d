"""`fixed`: always as many."""

from __future__ import annotations

import math

from autoscaling.core.policies.base import Context, Param, Proposal, rest
from autoscaling.core.types import MAX_REPLICAS, Observation, Reason, Spec

REPLICAS = Param("replicas", 1, 0, MAX_REPLICAS, "replicas", "How many, whatever comes.")


class Fixed:
    name = "fixed"
    source = "A dedicated deployment (kubernetes.io/docs/concepts/workloads/controllers/deployment)"
    params = (REPLICAS,)

    def at_once(self, spec: Spec, observation: Observation) -> float:
        return math.inf

    def propose(self, context: Context) -> Proposal:
        replicas = round(context.param(REPLICAS))
        rung = context.seen.rung if replicas else rest(context)[0]
        return Proposal(replicas, rung, Reason.FIXED, math.inf)


__all__ = ["Fixed"]
