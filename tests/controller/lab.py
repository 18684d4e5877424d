"""A cluster in values: a clock that goes on when told to, reports as gateways make them, and what was done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autoscaling.core.plan import Plan
from autoscaling.core.types import Forecast, Rung, Spec, State
from autoscaling.live.capacity import CapacityBook
from autoscaling.live.metrics import LiveMetrics, ServeView
from autoscaling.live.nodes import Bundle, Node, NodeRequests
from autoscaling.live.planner import Planner
from autoscaling.live.rungs import RungBook
from autoscaling.live.setup import ControllerSetup, ModelSetup

NOW_S = 1_700_000_000.0
NODE = Node("node-1", {"CPU": 4.0})
GIB = 2**30


class HandClock:
    """`autoscaling.ports.Clock` by hand. `jump` sets the wall clock alone."""

    def __init__(self, now_s: float = NOW_S) -> None:
        self._now_s = now_s
        self._monotonic_s = 100.0

    def now_s(self) -> float:
        return self._now_s

    def monotonic_s(self) -> float:
        return self._monotonic_s

    def go(self, seconds: float) -> None:
        self._now_s += seconds
        self._monotonic_s += seconds

    def jump(self, seconds: float) -> None:
        self._now_s += seconds


def spec(model: str = "m", **changes: Any) -> Spec:
    """Keep-alive of ten seconds."""
    return Spec(model, **{"policy": "keep-alive", "keep_alive_s": 10.0, "wait_cost": 10.0, **changes})


def setup(model: str = "m", **changes: Any) -> ModelSetup:
    """A model that takes one CPU. What `Spec` has goes into its spec."""
    of_spec = {k: changes.pop(k) for k in list(changes) if k in Spec.__dataclass_fields__}
    values: dict[str, Any] = {
        "aliases": (),
        "deployment": f"model-{model}",
        "spec": spec(model, **of_spec),
        "resources": {"CPU": 1.0},
        "engine": {"model": model},
        "can_park": True,
    }
    return ModelSetup(id=model, **{**values, **changes})


def engine(model: str = "m", **changes: Any) -> dict[str, Any]:
    """As an engine host tells of one."""
    values = {
        "engine_id": f"{model}-1",
        "model": model,
        "kind": "prebuilt",
        "state": "ready",
        "held": True,
        "requested_s": NOW_S,
        "ready_s": NOW_S + 1,
        "memory_bytes": 0,
        "gpu_ids": [],
        "phases": [],
    }
    return {**values, **changes}


def report(
    *models: str,
    engines: Sequence[Mapping[str, Any]] = (),
    rung: str = "template",
    batches: Sequence[Any] = (),
    **seen: Any,
) -> dict[str, Any]:
    """A gateway's; `seen` is of every model."""
    each = {
        "queued": 0,
        "in_flight": 0,
        "last_cold_start": None,
        "failure": None,
        "seen_ready": False,
        "last_arrival_s": None,
        "last_busy_s": None,
        "untold": 0,
        **seen,
    }
    return {
        "node": NODE.id,
        "host_up": True,
        "engines": list(engines),
        "remote": [],
        "host_models": [{"model": model, "rung": rung} for model in models],
        "memory": {"total_bytes": 16 * GIB, "available_share": 0.8},
        "models": {model: dict(each) for model in models},
        "source": "gateway-1",
        "batches": list(batches),
        "dropped_rows": 0,
        "starts": [],
        "engine_counters": {},
    }


def serve_view(
    running: int = 0, starting: int = 0, target: int | None = None, stopping: int = 0
) -> ServeView:
    """A deployment with such replicas."""
    states = {"RUNNING": running, "STARTING": starting, "STOPPING": stopping}
    states = {state: count for state, count in states.items() if count}
    return ServeView(running, starting, running + starting if target is None else target, states)


class Forecasts:
    """Says what it is told to say."""

    def __init__(self) -> None:
        self.says: dict[str, Forecast] = {}
        self.arrivals: list[tuple[str, float, int]] = []
        self.learned: State | None = None
        self.restored: list[State] = []

    def start(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def watch(self, models: Sequence[str]) -> None:
        """Nothing."""

    def restore(self, state: State) -> None:
        self.restored.append(state)

    def kept(self) -> State | None:
        return self.learned

    def arrived(self, model: str, time_s: float, count: int) -> None:
        self.arrivals.append((model, time_s, count))

    def forecast(self, model: str, now_s: float) -> Forecast | None:
        return self.says.get(model)

    def health(self) -> Mapping[str, Any]:
        return {"ok": True}


class World:
    """A planner with a real store in a file, and everything around it by hand."""

    def __init__(self, folder: Path, *models: ModelSetup, **section: Any) -> None:
        self.folder = folder
        self.models = models or (setup(),)
        self.section = {"store": f"sqlite:///{folder / 'relight.db'}", **section}
        self.clock = HandClock()
        self.plans: list[Plan] = []
        self.publish: Callable[[Plan], None] = self.plans.append
        self.warmed: list[tuple[str, Mapping[str, Any]]] = []
        self.requests: list[list[Bundle]] = []
        self.kv: dict[bytes, bytes] = {}
        self.forecasts = Forecasts()
        self.make_forecasts: Callable[..., Any] = lambda store, horizon_s: self.forecasts
        self.running: dict[str, ServeView] = {m.deployment: serve_view() for m in self.models}
        self.reports: dict[str, dict[str, Any]] = {"g": report(*(m.id for m in self.models))}
        self.waited_s = 0.0
        self.batch = 0
        self.park_budget_bytes = 4 * GIB

    @contextmanager
    def planner(self) -> Iterator[Planner]:
        """A controller's life: what it must know at its start comes from the store alone."""
        self.metrics = LiveMetrics(
            self.models, RungBook(), CapacityBook(), self.clock, park_budget_bytes=self.park_budget_bytes
        )
        planner = Planner(
            ControllerSetup(models=tuple(self.models), **self.section),
            self.metrics,
            self.clock,
            publish=self._publish,
            warm=self._warm,
            forecasts=self.make_forecasts,
            nodes=NodeRequests(self.requests.append, get=self.kv.get, put=self.kv.__setitem__),
        )
        try:
            yield planner
        finally:
            planner.close()

    def _publish(self, plan: Plan) -> None:
        self.publish(plan)  # which a test may have changed

    def _warm(self, node_id: str, message: Mapping[str, Any], gpus: int, timeout_s: float) -> dict[str, Any]:
        self.warmed.append((node_id, message))
        return {"rung": message["rung"], "working": False, "reason": None}

    def seen(self, model: str = "m", **seen: Any) -> None:
        """What the gateway reports of a model from now on."""
        self.reports["g"]["models"][model].update(seen)

    def came(self, planner: Planner, count: int, model: str = "m") -> int:
        """So many requests came in the second that is over; returns what the gateway need not send again."""
        self.batch += 1
        second = int(self.clock.now_s()) - 1
        row = [model, second, count, 0, 0, 0.0, self.waited_s]
        self.seen(model, last_arrival_s=float(second))
        self.reports["g"]["batches"] = [(self.batch, [row])]
        sequence = planner.take_report("g", self.reports["g"])
        self.reports["g"]["batches"] = []
        return sequence

    def tick(self, planner: Planner, seconds: float = 1.0) -> None:
        """One second goes by: reports and Serve's answer come in, then the controller ticks."""
        self.clock.go(seconds)
        for gateway, each in self.reports.items():
            planner.take_report(gateway, each)
        self.metrics.take_serve(self.running)
        self.metrics.take_nodes([NODE], autoscaler=False)
        planner.tick()

    def planned(self, model: str = "m") -> int | None:
        """Replicas that the last plan says."""
        return self.plans[-1].entries[model].replicas


__all__ = [
    "GIB",
    "NODE",
    "NOW_S",
    "Forecasts",
    "HandClock",
    "Rung",
    "World",
    "engine",
    "report",
    "setup",
    "spec",
]
