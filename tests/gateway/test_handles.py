"""What a Serve handle tells of who waits, with Ray's own metrics of a handle and a stand-in for Serve's controller."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private import autoscaling_metrics_codec, router
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve._private.config import DeploymentConfig
from ray.serve.config import AutoscalingConfig
from ray.util import metrics

from deployments.gateway.handles import sample_when_pushed


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
    tags = ("deployment", "application", "handle", "actor_id", "route")
    gauges = [metrics.Gauge(f"relight_test_{name}", tag_keys=tags[:4]) for name in ("queued", "running")]
    return router.RouterMetricsManager(
        DeploymentID("m", "app"),
        "h1",
        "a1",
        DeploymentHandleSource.REPLICA,
        told,  # type: ignore[arg-type]
        metrics.Counter("relight_test_requests", tag_keys=tags),
        *gauges,
        asyncio.get_running_loop(),
    )


async def test_who_waits_first_is_told_of_at_once() -> None:
    told = Told()
    manager = _manager(told)
    manager._deployment_config = DeploymentConfig(
        autoscaling_config=AutoscalingConfig(min_replicas=0, look_back_period_s=1.0, metrics_interval_s=0.2)
    )
    sample_when_pushed(Handle(manager))
    # As the timer does, before anybody waits.
    manager._add_autoscaling_metrics_point()
    with manager.wrap_queued_request(is_retry=False, num_curr_replicas=0):
        assert told.waiting()[-1] == 1
    await manager.shutdown()


def test_a_handle_without_that_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ray.serve"):
        sample_when_pushed(Handle(object()))
    assert "with the next sample only" in caplog.text
