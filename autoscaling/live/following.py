"""What one policy inside Serve does at each of its calls: follow the plan, else the load."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from autoscaling.core.codec import from_json
from autoscaling.core.plan import follow
from autoscaling.core.types import Observation, Spec, State
from autoscaling.live.plan_store import PlanReader, PolicyHealth, shared_reader

SETTLED = 1e-3
"""A mean of requests below this is none: Serve's means come from sums of floats."""


class Follower:
    """One model's. Cheap, never raises, reads no clock but Serve's."""

    def __init__(
        self,
        model: str,
        spec: str,
        *,
        grace_s: float,
        reader: Callable[[], PlanReader] = shared_reader,
    ) -> None:
        self._model = model
        self._grace_s = grace_s
        self._state = State()
        self._begun_s: float | None = None
        self.health = PolicyHealth()
        self._reader = reader()
        self._reader.health[model] = self.health
        self._spec: Spec | None = None
        try:
            self._spec = from_json(Spec, spec)
        except ValueError as error:
            self._fails(error)

    def _fails(self, error: BaseException) -> None:
        self.health.errors += 1
        self.health.last_error = repr(error)

    def replicas(self, ctx: Any) -> int:
        """How many there should be. Whatever goes wrong holds what there is."""
        try:
            return self._replicas(ctx)
        except Exception as error:  # noqa: BLE001 - an error here would stop every application that Serve runs
            self._fails(error)
            self.health.following = "held"
            return int(ctx.target_num_replicas)

    def _replicas(self, ctx: Any) -> int:
        now_s = float(ctx.current_time)
        observation = self._observe(ctx, now_s)
        begun_s = self._begun_s = now_s if self._begun_s is None else min(self._begun_s, now_s)
        known = self._reader.known
        entry = known.plan.entry(self._model, now_s) if known.plan is not None else None
        if entry is not None:
            # What the plan knew of overrides and schedules holds for as long as nobody says more.
            self._spec = entry.spec
        if self._spec is None:
            return int(ctx.target_num_replicas)
        self._state, decision = follow(self._spec, self._state, observation, entry, now_s)
        planned = entry is not None and entry.replicas is not None
        self.health.following = "plan" if planned else "reactive"
        held = int(ctx.target_num_replicas)
        wanted = held if decision.replicas is None else decision.replicas
        if not planned and wanted < held and now_s - begun_s < self._grace_s:
            self.health.following = "grace"
            return held
        return wanted

    @staticmethod
    def _observe(ctx: Any, now_s: float) -> Observation:
        """What Serve knows. Since when the model is idle, the state that is followed with remembers."""
        requests = _count(ctx.total_num_requests)
        queued = min(requests, _count(ctx.total_queued_requests))
        ready, target = int(ctx.current_num_replicas), int(ctx.target_num_replicas)
        return Observation(
            now_s=now_s,
            ready=ready,
            starting=max(0, target - ready),
            target=target,
            queued=queued,
            in_flight=requests - queued,
        )


def _count(mean: float | None) -> int:
    return math.ceil(max(0.0, (mean or 0.0) - SETTLED))
