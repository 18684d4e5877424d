"""What is seen of every model, from what gateways report, what Serve says and which nodes there are.

Reports, Serve's answer and the list of nodes come in from other threads whenever they come; `observe` puts together
what is known by then, and says None where that is too old or was never there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoscaling.core.accounts import LONGEST_S
from autoscaling.core.seen import charge
from autoscaling.core.types import Observation, Rung, Spec
from autoscaling.live.capacity import CapacityBook
from autoscaling.live.node_launches import FailedLaunches
from autoscaling.live.nodes import Node, fits
from autoscaling.live.records import ColdStartRow, TrafficRow
from autoscaling.live.rungs import RungBook, memory_cost_per_s, rung_of_start
from autoscaling.live.setup import ModelSetup
from autoscaling.ports import Clock

REPORT_STALE_S = 15.0
"""A gateway reports every five seconds at least."""
SERVE_STALE_S = 5.0
NODES_STALE_S = 60.0
ASSUMED_ENGINE_BYTES = 1 << 30
"""What a parked engine or a template is taken to hold until one was weighed."""

_RUNNING = ("RUNNING", "PENDING_MIGRATION")
_STARTING = ("STARTING", "UPDATING", "RECOVERING")


@dataclass(frozen=True, slots=True)
class ServeView:
    """One deployment as Serve tells of it."""

    running: int
    starting: int
    target: int
    states: Mapping[str, int]
    """Replica state -> count."""
    unplaced: int = 0
    """Of those that are starting: on no node yet."""


def serve_view(details: Mapping[str, Any]) -> dict[str, ServeView]:
    """Deployment -> its replicas, from the Serve controller's `get_serve_instance_details`."""
    found: dict[str, ServeView] = {}
    for application in details.get("applications", {}).values():
        for name, deployment in application.get("deployments", {}).items():
            states: dict[str, int] = {}
            unplaced = 0
            for replica in deployment.get("replicas", ()):
                state = str(getattr(replica["state"], "value", replica["state"]))
                states[state] = states.get(state, 0) + 1
                unplaced += state in _STARTING and replica.get("node_id") is None
            found[name] = ServeView(
                running=sum(states.get(state, 0) for state in _RUNNING),
                starting=sum(states.get(state, 0) for state in _STARTING),
                target=int(deployment["target_num_replicas"]),
                states=states,
                unplaced=unplaced,
            )
    return found


@dataclass(slots=True)
class _Since:
    """What one model did, over the reports so far."""

    arrivals: int = 0  # since the last observation
    late: int = 0  # those of them that came longer ago than anything is concluded from
    waited_s: float = 0.0  # likewise
    last_arrival_s: float | None = None
    last_busy_s: float | None = None


class _View:
    """One gateway's report, looked into once: fleets have a thousand models, and every tick asks for each."""

    def __init__(self, at_s: float, report: Mapping[str, Any]) -> None:
        self.at_s = at_s  # monotonic
        self.report = report
        self.node: str = report["node"]
        self.memory: Mapping[str, float] | None = report.get("memory")
        self.rungs: dict[str, Rung] = {}
        for entry in report["host_models"]:
            rung = Rung[entry["rung"].upper()]
            self.rungs[entry["model"]] = max(rung, self.rungs.get(entry["model"], Rung.NODE))
        self.weights_bytes: dict[str, float] = {}
        self.answering: set[str] = set()
        for engine in report["engines"]:
            model = engine["model"]
            weight = max(engine["memory_bytes"], self.weights_bytes.get(model, 0))
            self.weights_bytes[model] = weight
            if engine["state"] == "ready":
                self.answering.add(model)
            if engine["state"] in ("parked", "ready") and not engine["held"]:
                self.rungs[model] = Rung.PARKED


@dataclass(slots=True)
class _Nodes:
    alive: Sequence[Node] = ()
    autoscaler: bool = False
    at_s: float | None = None  # monotonic


@dataclass(slots=True)
class Warmed:
    """What a host without a gateway said last of a model."""

    rung: Rung
    reason: str | None = None


class LiveMetrics:
    """`MetricsSource` over the cluster. Thread-safe."""

    def __init__(
        self,
        models: Iterable[ModelSetup],
        rungs: RungBook,
        capacity: CapacityBook,
        clock: Clock,
        *,
        park_budget_bytes: int = 0,
    ) -> None:
        self.models = {model.id: model for model in models}
        self.in_force: Mapping[str, Spec] = {model: setup.spec for model, setup in self.models.items()}
        """How models are scaled now: what overrides change of a target or a price counts in what is seen."""
        self.rungs = rungs
        self.capacity = capacity
        self.launches = FailedLaunches(clock.monotonic_s)
        self._clock = clock
        self._park_budget_bytes = park_budget_bytes
        self._lock = threading.Lock()
        self._views: dict[str, _View] = {}
        self._since = {model: _Since() for model in self.models}
        self._serve: tuple[float, Mapping[str, ServeView]] | None = None  # until when it holds
        self._nodes = _Nodes()
        self._eligible: dict[str, list[Node]] = {}
        self._warmed: dict[tuple[str, str], Warmed] = {}

    # What comes in

    def restore(self, model: str, last_arrival_s: float | None, last_busy_s: float | None = None) -> None:
        """What was known before a restart. A model was last busy when its last request came, or later."""
        with self._lock:
            since = self._since[model]
            since.last_arrival_s = _later(since.last_arrival_s, last_arrival_s)
            since.last_busy_s = _later(since.last_busy_s, _later(last_arrival_s, last_busy_s))

    def take_report(self, gateway: str, report: Mapping[str, Any], rows: Sequence[TrafficRow]) -> None:
        """A gateway's view, replacing its last; `rows` are the counts in it that are new."""
        now_s = self._clock.now_s()
        with self._lock:
            before = self._views.get(gateway)
            told = {} if before is None else before.report["models"]
            self._views[gateway] = _View(self._clock.monotonic_s(), report)
            for row in rows:
                if (since := self._since.get(row.model)) is not None:
                    since.arrivals += row.arrivals
                    since.late += row.arrivals if row.second < now_s - LONGEST_S else 0
                    since.waited_s += row.waited_s
                    if row.arrivals:
                        since.last_arrival_s = _later(since.last_arrival_s, _past(float(row.second), now_s))
            for model, seen in report["models"].items():
                if (since := self._since.get(model)) is None:
                    continue
                last = told.get(model, {})
                # Only what is new: after a clock was set back, what a gateway repeats stays ahead of it for as long
                # as it was set back.
                if (time_s := seen.get("last_arrival_s")) != last.get("last_arrival_s"):
                    since.last_arrival_s = _later(since.last_arrival_s, _past(time_s, now_s))
                if (time_s := seen.get("last_busy_s")) != last.get("last_busy_s"):
                    since.last_busy_s = _later(since.last_busy_s, _past(time_s, now_s))

    def take_serve(self, deployments: Mapping[str, ServeView], holds_s: float = SERVE_STALE_S) -> None:
        """Serve's answer, and for how long it will do without the next."""
        with self._lock:
            self._serve = (self._clock.monotonic_s() + holds_s, deployments)

    def take_nodes(self, nodes: Sequence[Node], *, autoscaler: bool) -> None:
        """The nodes that are alive, and whether others can be had."""
        with self._lock:
            if list(nodes) != list(self._nodes.alive) or not self._eligible:
                self._eligible = {
                    model: [node for node in nodes if fits(node, setup)]
                    for model, setup in self.models.items()
                }
            self._nodes = _Nodes(nodes, autoscaler, self._clock.monotonic_s())
            alive = {node.id for node in nodes}
            self._warmed = {key: warmed for key, warmed in self._warmed.items() if key[1] in alive}

    def take_warmed(self, model: str, node_id: str, rung: Rung, reason: str | None) -> None:
        """An engine host's answer to being asked to warm."""
        with self._lock:
            self._warmed[model, node_id] = Warmed(rung, reason)

    def take_start(self, row: ColdStartRow) -> None:
        """A start that was measured, of a model that there is."""
        self.rungs.add(row, self.models[row.model].start_deadline_s)

    # What is known

    def reports(self) -> dict[str, Mapping[str, Any]]:
        """Gateway -> its last report, of those that still report."""
        with self._lock:
            return {gateway: view.report for gateway, view in self._fresh_views().items()}

    def serve(self) -> Mapping[str, ServeView] | None:
        """None if Serve has not answered lately."""
        with self._lock:
            return self._fresh_serve()

    def unplaced(self) -> dict[str, int]:
        """Model -> replicas that wait for a node with room, where there are any; empty if Serve has not answered."""
        serve = self.serve() or {}
        found = {m.id: serve[m.deployment].unplaced for m in self.models.values() if m.deployment in serve}
        return {model: count for model, count in found.items() if count}

    def nodes(self) -> tuple[Sequence[Node], bool] | None:
        """(alive nodes, whether there is an autoscaler); None if that is not known."""
        with self._lock:
            return self._fresh_nodes()

    def eligible(self, model: str) -> list[Node]:
        """Nodes that could run the model's replica, the warmest first, then in a stable order."""
        with self._lock:
            if self._fresh_nodes() is None:
                return []
            found = self._eligible[model]
            views = self._by_node()
            rungs = {node.id: self._rung_on(model, node.id, views) for node in found}
            return sorted(found, key=lambda node: (-rungs[node.id], node.id))

    def rung_on(self, model: str, node_id: str) -> Rung:
        """How warm the model is on a node besides its replicas, as far as is known."""
        with self._lock:
            return self._rung_on(model, node_id, self._by_node())

    def observe(self, now_s: float) -> dict[str, Observation]:
        """Every model. Arrivals are those since the call before."""
        with self._lock:
            seen = _Seen(
                list(self._fresh_views().values()), self._by_node(), self._fresh_serve(), self._fresh_nodes()
            )
            return {model: self._observe(setup, now_s, seen) for model, setup in self.models.items()}

    def _observe(self, setup: ModelSetup, now_s: float, cluster: _Seen) -> Observation:
        model = setup.id
        since = self._since[model]
        arrivals, since.arrivals = since.arrivals, 0
        late, since.late = since.late, 0
        waited_s, since.waited_s = since.waited_s, 0.0
        # For good: what lies in the future was now when the clock was set back, and is longer ago at each look.
        since.last_arrival_s = _past(since.last_arrival_s, now_s)
        since.last_busy_s = _past(since.last_busy_s, now_s)
        seen = [v.report["models"][model] for v in cluster.views if model in v.report["models"]]
        replicas = cluster.serve.get(setup.deployment) if cluster.serve is not None else None
        eligible = self._eligible[model] if cluster.nodes is not None else []
        rung: Rung | None = None
        if cluster.nodes is not None:
            rungs = (self._rung_on(model, node.id, cluster.by_node) for node in eligible)
            rung = max(rungs, default=Rung.COLD)
        return Observation(
            now_s=now_s,
            ready=replicas.running if replicas else None,
            starting=replicas.starting if replicas else None,
            target=replicas.target if replicas else None,
            queued=sum(each["queued"] for each in seen) if seen else None,
            in_flight=sum(each["in_flight"] for each in seen) if seen else None,
            arrivals=arrivals,
            last_arrival_s=since.last_arrival_s,
            last_busy_s=since.last_busy_s,
            rung=rung,
            rungs=self.rungs.profiles(model, self._costs(setup, eligible, cluster)),
            capacity=self.capacity.capacity(
                model,
                target=self._spec(model).target_ongoing_requests,
                inter_token_slo_s=setup.inter_token_slo_s,
            ),
            waited_s=waited_s,
            answering=any(model in view.answering for view in cluster.views),
            late=late,
        )

    def _costs(self, setup: ModelSetup, eligible: Sequence[Node], cluster: _Seen) -> dict[Rung, float]:
        """GPU-seconds a second of each rung on which the model can be held here."""
        autoscaler = cluster.nodes is not None and cluster.nodes[1]
        spec = self._spec(setup.id)
        serving = charge(spec)
        costs = {Rung.NODE: 0.0, Rung.WEIGHTS: 0.0, Rung.TEMPLATE: 0.0, Rung.SERVING: serving}
        total_bytes, available = _memory(cluster.by_node, eligible)
        weighed = (view.weights_bytes.get(setup.id, 0) for view in cluster.views)
        engine_bytes = max(weighed, default=0) or ASSUMED_ENGINE_BYTES
        held = memory_cost_per_s(engine_bytes, total_bytes, available)
        if autoscaler:
            # A node that nothing else needs is kept for this model alone, with all of its GPUs.
            node = max([serving, *(node.gpus for node in eligible)])
            costs |= {Rung.COLD: 0.0, Rung.NODE: node, Rung.WEIGHTS: node, Rung.TEMPLATE: node}
        if setup.own_template:
            costs[Rung.TEMPLATE] += held
        if setup.can_park and spec.park and self.parks:
            costs[Rung.PARKED] = costs[Rung.TEMPLATE] + held
        return costs

    @property
    def parks(self) -> bool:
        """Whether nodes have host memory for parked engines."""
        return self._park_budget_bytes > 0

    def _spec(self, model: str) -> Spec:
        return self.in_force.get(model) or self.models[model].spec

    def _rung_on(self, model: str, node_id: str, views: Mapping[str, _View]) -> Rung:
        view = views.get(node_id)
        if view is not None:
            return view.rungs.get(model, Rung.NODE)
        warmed = self._warmed.get((model, node_id))
        return Rung.NODE if warmed is None else warmed.rung

    def own_template(self, model: str) -> bool:
        """Whether the model can have a template of its own."""
        return self.models[model].own_template

    def start_rung(self, model: str, kind: str, phases: Iterable[Mapping[str, Any]]) -> Rung:
        """Where a start began."""
        return rung_of_start(kind, phases, own_template=self.models[model].own_template)

    def _fresh_views(self) -> dict[str, _View]:
        oldest_s = self._clock.monotonic_s() - REPORT_STALE_S
        self._views = {gateway: view for gateway, view in self._views.items() if view.at_s >= oldest_s}
        return self._views

    def _by_node(self) -> dict[str, _View]:
        """Of each node that has a gateway, one of its views."""
        return {view.node: view for view in self._fresh_views().values()}

    def _fresh_serve(self) -> Mapping[str, ServeView] | None:
        if self._serve is None or self._clock.monotonic_s() > self._serve[0]:
            return None
        return self._serve[1]

    def _fresh_nodes(self) -> tuple[Sequence[Node], bool] | None:
        at_s = self._nodes.at_s
        if at_s is None or self._clock.monotonic_s() - at_s > NODES_STALE_S:
            return None
        return self._nodes.alive, self._nodes.autoscaler


@dataclass(frozen=True, slots=True)
class _Seen:
    """The cluster at one tick."""

    views: Sequence[_View]
    by_node: Mapping[str, _View]
    serve: Mapping[str, ServeView] | None
    nodes: tuple[Sequence[Node], bool] | None


def _memory(by_node: Mapping[str, _View], eligible: Sequence[Node]) -> tuple[float | None, float | None]:
    """(bytes, available share) of the eligible node that has the most left."""
    known = [view.memory for node in eligible if (view := by_node.get(node.id)) and view.memory]
    if not known:
        return None, None
    best = max(known, key=lambda memory: float(memory["available_share"]))
    return best["total_bytes"], best["available_share"]


def _later(one_s: float | None, other_s: float | None) -> float | None:
    return max((time_s for time_s in (one_s, other_s) if time_s is not None), default=None)


def _past(time_s: float | None, now_s: float) -> float | None:
    """Clocks of several machines differ: what came from a little ahead came now."""
    return None if time_s is None else min(time_s, now_s)
