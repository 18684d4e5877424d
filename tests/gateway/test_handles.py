"""What a Serve handle tells of who asks, with Ray's own metrics of a handle and a stand-in for Serve's controller."""

from __future__ import annotations

import asyncio
import logging
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private import autoscaling_metrics_codec, router
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.config import AutoscalingConfig
from ray.util import metrics

from deployments.gateway.handles import HEARTBEAT_S, push_metrics_in_time

LOOK_BACK_S = 1.0
REPLICA = ReplicaID("r1", DeploymentID("m", "app"))


class Handle:
    """A Serve handle with a router."""

    def __init__(self, manager: object) -> None:
        self._router: Any = None
        self._made = SimpleNamespace(_asyncio_router=SimpleNamespace(_metrics_manager=manager))

    def options(self) -> Handle:
        self._router = self._made
        return self


class Told:
    """Keeps what is pushed to the Serve controller."""

    def __init__(self) -> None:
        self.payloads: list[Any] = []
        self.record_autoscaling_metrics_from_handle = self

    def remote(self, payload: Any) -> None:
        self.payloads.append(payload)

    def waiting(self) -> list[float]:
        """How many waited, by the samples of the last push."""
        found: list[float] = autoscaling_metrics_codec.decode(self.payloads[-1])["q_val"].tolist()
        return found


def _manager(told: Told) -> router.RouterMetricsManager:
    """Of a handle that Serve has told of the deployment's settings, without its timers."""
    tags = ("deployment", "application", "handle", "actor_id", "route")
    gauges = [metrics.Gauge(f"relight_test_{name}", tag_keys=tags[:4]) for name in ("queued", "running")]
    manager = router.RouterMetricsManager(
        DeploymentID("m", "app"),
        "h1",
        "a1",
        DeploymentHandleSource.REPLICA,
        told,  # type: ignore[arg-type]
        metrics.Counter("relight_test_requests", tag_keys=tags),
        *gauges,
        asyncio.get_running_loop(),
    )
    manager._deployment_config = DeploymentConfig(
        autoscaling_config=AutoscalingConfig(
            min_replicas=0, look_back_period_s=LOOK_BACK_S, metrics_interval_s=0.2
        )
    )
    return manager


async def test_who_waits_first_is_told_of_at_once() -> None:
    told = Told()
    manager = _manager(told)
    push_metrics_in_time(Handle(manager), LOOK_BACK_S)
    # As the timer does, before anybody waits.
    manager._add_autoscaling_metrics_point()
    with manager.wrap_queued_request(is_retry=False, num_curr_replicas=0):
        assert told.waiting()[-1] == 1
    await manager.shutdown()


async def test_that_nobody_asks_is_told_seldom_and_only_once_the_report_says_so() -> None:
    told, times_s = Told(), [100.0]
    manager = _manager(told)
    push_metrics_in_time(Handle(manager), LOOK_BACK_S, lambda: times_s[-1])

    def pushed(ticks: int) -> list[int]:
        """At which of so many fifths of a second, which is how often the timer pushes."""
        found = []
        for tick in range(ticks):
            before = len(told.payloads)
            manager.push_autoscaling_metrics_to_controller()
            found += [tick] * (len(told.payloads) - before)
            times_s.append(times_s[-1] + 0.2)
        return found

    assert pushed(10) == [*range(10)]
    # Serve forgets a handle of which it has not heard for 10 s.
    assert HEARTBEAT_S < 10
    seldom = pushed(100)
    assert len(seldom) == 4
    assert {later - one for one, later in pairwise(seldom)} == {25}
    manager.inc_num_queued_requests()
    assert pushed(3) == [0, 1, 2]
    # A request is queued, then in progress at a replica.
    manager.inc_num_running_requests_for_replica(REPLICA)
    manager.dec_num_queued_requests()
    assert pushed(20) == [*range(20)]
    manager.dec_num_running_requests_for_replica(REPLICA)
    # Two seconds from the push before.
    assert pushed(20) == [*range(9)]
    await manager.shutdown()


async def test_a_timer_that_was_there_before_pushes_no_oftener() -> None:
    manager = _manager(Told())
    manager.metrics_pusher.register_or_update_task(
        manager.PUSH_METRICS_TO_CONTROLLER_TASK_NAME, manager.push_autoscaling_metrics_to_controller, 3600.0
    )
    push_metrics_in_time(Handle(manager), LOOK_BACK_S)
    (timer,) = manager.metrics_pusher._tasks.values()
    assert timer.task_func == manager.push_autoscaling_metrics_to_controller
    await manager.shutdown()


def test_a_handle_without_that_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ray.serve"):
        push_metrics_in_time(Handle(object()), LOOK_BACK_S)
    assert "with the next sample only" in caplog.text
