"""The autoscaling policy that runs inside the Serve controller, one for each model.

Never raises and never blocks: a call only computes. Ray pickles this module by value into the controller, so whatever
the policies of a process share lives elsewhere and is imported when it is used.
"""

from __future__ import annotations

from typing import Any

GRACE_S = 60.0
"""How long a policy that was just made never lets go without a plan. The Serve controller may have been restarted:
handles tell of their requests anew only within seconds, and where the head died with it, Relight's controller, which
knows what was set at run time, is started by the Serve controller in its turn."""


class RelightPolicy:
    """In Ray's API for custom policies: `RelightPolicy(model, spec)(context) -> (replicas, state)`.

    `spec` is the model's as JSON, by which it scales where there is no plan.
    """

    def __init__(self, model: str, spec: str) -> None:
        from autoscaling.live.following import Follower

        self._follower = Follower(model, spec, grace_s=GRACE_S)

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        return self._follower.replicas(ctx), {}
