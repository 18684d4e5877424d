"""A controller as the control API sees it: a real store on SQLite, and everything else as the test says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoscaling.core.plan import Plan
from autoscaling.core.types import (
    Decision,
    Demand,
    Forecast,
    NextArrival,
    Observation,
    Reason,
    Rung,
    RungProfile,
    Spec,
)
from autoscaling.live import overrides
from autoscaling.live.control import Control
from autoscaling.live.store import Store

TOKEN = "a-token-of-a-test-run"
NOW_S = 1_795_500_000.0
"""2026-11-24 06:00 UTC, a Tuesday."""
SMALL = "smollm2-135m"
ORG = "org/llama-3.1"
RUNGS = (
    RungProfile(Rung.TEMPLATE, 1.8, 2.4, 0.0, starts=12),
    RungProfile(Rung.PARKED, 0.4, 0.5, 0.01, starts=3),
    RungProfile(Rung.SERVING, 0.0, 0.0, 1.0),
)


class Clock:
    def __init__(self, now_s: float = NOW_S) -> None:
        self.time_s = now_s

    def now_s(self) -> float:
        return self.time_s

    def monotonic_s(self) -> float:
        return self.time_s


class View:
    """A `ControllerView`: reads overrides as the controller does, decides nothing."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self.store = store
        self.clock = clock
        self.base: dict[str, Spec] = {
            SMALL: Spec(SMALL, wait_cost=10.0, max_replicas=4),
            ORG: Spec(
                ORG, policy="reactive", wait_cost=10.0, min_replicas=1, max_replicas=2, gpus_per_replica=2.0
            ),
        }
        self.schedules: dict[str, list[dict[str, Any]]] = {}
        self.seen: dict[str, Observation] = {}
        self.decided: dict[str, Decision] = {}
        self.shadowed: dict[str, dict[str, Decision]] = {}
        self.forecasts: dict[str, Forecast] = {}
        self.fleet_mode = "active"
        self.park_memory_bytes = 1 << 30
        self.changes = 0

    def now_s(self) -> float:
        return self.clock.now_s()

    def models(self) -> Mapping[str, Spec]:
        now_s = self.now_s()
        return overrides.apply(self.base, self.store.overrides(now_s), self.schedules, now_s, 2 * 86400.0)

    def base_models(self) -> Mapping[str, Spec]:
        return self.base

    def fleet_schedules(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        return self.schedules

    def aliases(self) -> Mapping[str, str]:
        return {"smol": SMALL}

    def mode(self) -> str:
        return overrides.mode(self.store.overrides(self.now_s()), self.fleet_mode, self.now_s())

    def parks(self) -> bool:
        return self.park_memory_bytes > 0

    def observations(self) -> Mapping[str, Observation]:
        return self.seen

    def decisions(self) -> Mapping[str, Decision]:
        return self.decided

    def shadow_decisions(self) -> Mapping[str, Mapping[str, Decision]]:
        return self.shadowed

    def forecast(self, model: str) -> Forecast | None:
        return self.forecasts.get(model)

    def plan(self) -> Plan | None:
        return None

    def health(self) -> Mapping[str, Any]:
        return {
            "ok": True,
            "store": self.store.health(),
            "last_tick_s": self.now_s(),
            "tick_ms": 1.5,
            "errors": {},
        }

    def overrides_changed(self) -> None:
        self.changes += 1


class Lab:
    """A control API to call, with its view and its store."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.store = Store.open(f"sqlite:///{folder / 'relight.db'}", clock=self.clock)
        self.view = View(self.store, self.clock)
        self.control = Control(self.view, TOKEN)

    def call(
        self, method: str, path: str, body: object = None, **query: object
    ) -> tuple[int, dict[str, Any]]:
        """Status and document of one call with the token; `path` is below /relight/v1/."""
        status, document = self.control.handle(
            method,
            f"/relight/v1/{path}",
            {"who": "ann@lab", **{name: str(value) for name, value in query.items()}},
            b"" if body is None else json.dumps(body).encode(),
            f"Bearer {TOKEN}",
        )
        json.dumps(document, allow_nan=False)
        return status, document

    def ok(self, method: str, path: str, body: object = None, **query: object) -> dict[str, Any]:
        status, document = self.call(method, path, body, **query)
        assert status == 200, document
        return document

    def refused(
        self, method: str, path: str, body: object = None, **query: object
    ) -> tuple[int, dict[str, Any]]:
        """Status and the error's fields."""
        status, document = self.call(method, path, body, **query)
        assert status != 200, document
        assert set(document) == {"error"}
        assert set(document["error"]) == {"message", "field", "value", "expected"}
        return status, document["error"]

    def idle(self, model: str = SMALL, **changes: Any) -> None:
        """The model is lit, idle, and kept for what may come."""
        now_s = self.clock.now_s()
        self.view.seen[model] = Observation(
            now_s,
            ready=1,
            starting=0,
            target=1,
            queued=0,
            in_flight=0,
            arrivals=0,
            last_arrival_s=now_s - 50,
            last_busy_s=now_s - 40,
            rung=Rung.TEMPLATE,
            rungs=RUNGS,
        )
        decision = Decision(
            model,
            now_s,
            1,
            Rung.TEMPLATE,
            Reason.KEEP_ALIVE,
            now_s + 200,
            "predictive",
            {
                "p_arrival_in_lead": 0.125,
                "lead_s": 2.4,
                "keep_cost_gpu_s": 20.5,
                "dark_cost_gpu_s": 31.25,
            },
        )
        self.view.decided[model] = replace(decision, **changes)

    def sparse(self, model: str = SMALL) -> None:
        """A forecast of the next request."""
        now_s = self.clock.now_s()
        self.view.forecasts[model] = Forecast(
            now_s - 5,
            "gaps",
            next_arrival=NextArrival(now_s - 5, (0.0, 600.0, 1200.0, 3600.0), (1.0, 0.5, 0.2, 0.01)),
            batch_size=2.0,
            details={"score": 0.25},
        )

    def dense(self, model: str = SMALL) -> None:
        """A forecast of demand: forty requests in progress now, none in half an hour."""
        now_s = self.clock.now_s()
        steps = range(60)
        self.view.forecasts[model] = Forecast(
            now_s,
            "seasonal",
            demand=Demand(
                now_s,
                60.0,
                (0.05, 0.5, 0.95),
                tuple((0.5, 1.0, 2.0) if i < 30 else (0.0, 0.0, 0.0) for i in steps),
                tuple((30.0, 40.0, 60.0) if i < 30 else (0.0, 0.0, 0.0) for i in steps),
            ),
        )
