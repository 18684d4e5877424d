"""What a Serve handle tells the Serve controller of who asks, and when."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger("ray.serve")

HEARTBEAT_S = 5.0
"""How often a handle that nobody asks says so. Serve forgets one of which it has not heard for 10 s."""


def push_metrics_in_time(
    handle: Any, look_back_s: float, now_s: Callable[[], float] = time.monotonic
) -> None:
    """Have a handle tell at once of who waits, and seldom that nobody does.

    A handle pushes a report as soon as somebody waits for a deployment without replicas, so that a start begins then.
    But Ray 2.60 reports what a timer sampled before (`RouterMetricsManager._get_metrics_report`), in which nobody waits
    yet: a start began at the next sample that was followed by a push, up to two periods later. Which of both timers
    comes first is another matter in each handle. Here a sample comes before each push.

    And each handle pushes every period, whether or not anything has changed, which a fleet of dark models does for
    nothing. Here one that nobody has asked for twice as long as Serve looks back, so that its report holds zeros only,
    pushes every `HEARTBEAT_S` until somebody does.

    `look_back_s` is the deployment's `look_back_period_s`. Where Ray has none of this any more, the handle is left as
    it is, and the log says so.
    """
    handle.options()  # A handle has a router from then on, which those that come from it share.

    def asked() -> bool:
        return bool(manager.num_queued_requests) or any([*manager.num_requests_sent_to_replicas.values()])

    try:
        manager = handle._router._asyncio_router._metrics_manager
        sample, push = manager._add_autoscaling_metrics_point, manager.push_autoscaling_metrics_to_controller
        name, timers = manager.PUSH_METRICS_TO_CONTROLLER_TASK_NAME, manager.metrics_pusher._tasks
        asked()
    except AttributeError as error:
        log.warning("a wake will be told of with the next sample only: %s", error)
        return
    asked_s = told_s = now_s()

    def push_in_time() -> None:
        nonlocal asked_s, told_s
        time_s = now_s()
        if asked():
            asked_s = time_s
        if time_s < asked_s + 2 * look_back_s or time_s >= told_s + HEARTBEAT_S:
            told_s = time_s
            sample()
            push()

    manager.push_autoscaling_metrics_to_controller = push_in_time
    if (timer := timers.get(name)) is not None:
        # It took the other one when Serve told of the deployment's settings, just before.
        timer.task_func = push_in_time


__all__ = ["HEARTBEAT_S", "push_metrics_in_time"]
