"""From the fleet file to what decides. Imports no Ray, so that commands can use it."""

from __future__ import annotations

from autoscaling.core.types import Spec
from deployments.fleet import Model


def scaling_spec(model: Model) -> Spec:
    """How the model is to be scaled, as the fleet file says, without its schedules."""
    scaling, gpus = model.scaling, model.resources.gpus
    return Spec(
        model=model.id,
        policy=scaling.policy,
        params=dict(scaling.params),
        wait_cost=scaling.wait_cost,
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        target_ongoing_requests=scaling.target_ongoing_requests,
        keep_alive_s=scaling.keep_alive_s,
        gpus_per_replica=float(gpus),
        priority=scaling.priority,
        park=scaling.park,
    )
