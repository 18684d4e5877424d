"""A Serve handle that tells at once of who waits."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger("ray.serve")


def sample_when_pushed(handle: Any) -> None:
    """Have everything that a handle pushes to the Serve controller end with the requests of that moment.

    A handle pushes as soon as somebody waits for a deployment without replicas, so that a start begins at once. But Ray
    2.60 pushes what a timer sampled before (`RouterMetricsManager._get_metrics_report`), in which nobody waits yet: a
    start began at the next sample that was followed by a push, up to two periods later. Which of both timers comes
    first is another matter in each handle.

    Where Ray has none of this any more, the handle is left as it is, and the log says so.
    """
    handle.options()  # A handle has a router from then on, which those that come from it share.
    try:
        manager = handle._router._asyncio_router._metrics_manager
        sample, push = manager._add_autoscaling_metrics_point, manager.push_autoscaling_metrics_to_controller
    except AttributeError as error:
        log.warning("a wake will be told of with the next sample only: %s", error)
        return

    def sampled_push() -> None:
        sample()
        push()

    manager.push_autoscaling_metrics_to_controller = sampled_push


__all__ = ["sample_when_pushed"]
