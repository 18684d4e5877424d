"""Makes decisions so: a plan for Serve's policies, rungs through engine hosts, nodes through the autoscaler."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

from autoscaling.core.plan import Entry, Plan, make_plan
from autoscaling.core.types import Decision, Reason, Rung, Spec
from autoscaling.live.metrics import LiveMetrics
from autoscaling.live.node_waits import NodeWaits
from autoscaling.live.nodes import Node, NodeRequests, bundles
from autoscaling.live.rungs import scarcity
from autoscaling.ports import Clock

log = logging.getLogger("ray.serve")

RAISE_AFTER_S = 5.0
"""How long a model must have been colder than decided before its hosts are asked: a replica that goes away parks its
engine by itself."""
LOWER_AFTER_S = 60.0
NEW_NODE_S = 60.0
"""For so long a node counts as one that just came, whose host is asked at once: no replica can have gone from it."""
ASK_AGAIN_S = 30.0
LOOK_AGAIN_S = 2.0
LOOK_SHARE = 0.25
"""A host that works on what it was asked for is asked again after this share of the time that it has taken, and not
before LOOK_AGAIN_S: what is ready is known soon, and a long load is not asked about all the time."""
LONGEST_PAUSE_S = 600.0
ANSWER_TIMEOUT_S = 60.0


class Publisher:
    """Publishes plans: at once when something changed, and again before the last one expires."""

    def __init__(
        self,
        put: Callable[[Plan], None],
        clock: Clock,
        *,
        every_s: float,
    ) -> None:
        self._put = put
        self._clock = clock
        self._every_s = every_s
        self._at_s: float | None = None
        self.plan: Plan | None = None
        """The last one that was published, here or before a restart."""

    def publish(self, plan: Plan) -> bool:
        """Whether a plan was published. Raises what publishing raises; then it is tried again at the next call."""
        steady_s = self._clock.monotonic_s()
        due = self._at_s is None or steady_s - self._at_s >= self._every_s
        # A clock that was set back would leave a plan that holds for too long, or that is not made yet.
        before = self.plan
        jumped = before is not None and not before.made_s <= plan.made_s <= before.expires_s
        if not due and not jumped and before is not None and _same(before.entries, plan.entries):
            return False
        self._put(plan)
        self.plan, self._at_s = plan, steady_s
        return True


def plan_of(
    now_s: float, specs: Mapping[str, Spec], decisions: Sequence[Decision], *, expires_s: float, active: bool
) -> Plan:
    """The decisions as a plan. One that is not active has no opinion, so that Serve's policy scales reactively.

    Without windows too, which that policy would follow.
    """
    plan = make_plan(now_s, specs, decisions, expires_s)
    if active:
        return plan
    entries = {
        model: replace(entry, replicas=None, ceiling=None, spec=replace(entry.spec, windows=()))
        for model, entry in plan.entries.items()
    }
    return replace(plan, entries=entries)


def _same(one: Mapping[str, Entry], other: Mapping[str, Entry]) -> bool:
    """Whether both ask for the same; how long each stands changes all the time."""
    if one.keys() != other.keys():
        return False
    return all(
        (a.replicas, a.rung, a.reason, a.spec, a.ceiling) == (b.replicas, b.rung, b.reason, b.spec, b.ceiling)
        for a, b in ((entry, other[model]) for model, entry in one.items())
    )


@dataclass(slots=True)
class _Ask:
    """One model on one node: what is being asked of its host. Times are monotonic."""

    wanted: Rung
    since_s: float
    next_s: float
    pause_s: float = ASK_AGAIN_S
    running: bool = False
    working_s: float | None = None
    """Since when the host works on it."""


def look_again_s(working_for_s: float) -> float:
    """When to ask a host again that works on what it was asked for, from now."""
    return min(ASK_AGAIN_S, max(LOOK_AGAIN_S, LOOK_SHARE * working_for_s))


class RungKeeper:
    """Brings models to the rungs that were decided, one node each, and lets them down where memory is short.

    Memory that nobody else wants costs nothing, and getting an engine or a template back costs seconds of all cores.
    So a model is let down only where decisions have long asked for less, and the node's memory is scarce.
    """

    def __init__(
        self,
        metrics: LiveMetrics,
        warm: Callable[[str, Mapping[str, Any], int, float], dict[str, Any]],
        executor: Executor,
        clock: Clock,
        host_config: Mapping[str, Any],
    ) -> None:
        self._metrics = metrics
        self._warm = warm
        self._executor = executor
        self._clock = clock
        self._host_config = dict(host_config)
        self._asks: dict[tuple[str, str], _Ask] = {}
        self._came_s: dict[str, float] | None = None
        self._lock = threading.Lock()
        self.failures: dict[str, str] = {}
        """Model -> why it could not be warmed last, of those that are to be warmed."""

    def apply(self, decisions: Sequence[Decision]) -> None:
        """Ask the hosts for what is missing; models without a decision are let be. Returns at once."""
        self._see_nodes()
        with self._lock:
            known = {model for model, _ in self._asks} | self.failures.keys()
        for model in known - {decision.model for decision in decisions}:
            self._forget(model)
        for decision in decisions:
            if decision.replicas or decision.replicas is None or decision.model not in self._metrics.models:
                self._forget(decision.model)
                continue
            nodes = self._metrics.eligible(decision.model)
            present = {node.id: self._metrics.rung_on(decision.model, node.id) for node in nodes}
            for node in nodes[:1]:
                if decision.rung > present[node.id] and self._may_raise(decision, node):
                    new = self._is_new(node.id)
                    self._ask(decision.model, node, decision.rung, 0.0 if new else RAISE_AFTER_S)
                    break
            else:
                lower = [n for n in nodes if decision.rung < present[n.id] and self._is_scarce(n.id)]
                for node in lower:
                    self._ask(decision.model, node, max(decision.rung, Rung.WEIGHTS), LOWER_AFTER_S)
                if not lower:
                    self._forget(decision.model)

    def _see_nodes(self) -> None:
        known = self._metrics.nodes()
        if known is None:
            return
        # Of those that were there at the first look nobody knows when they came.
        new_s = -math.inf if self._came_s is None else self._clock.monotonic_s()
        before = self._came_s or {}
        self._came_s = {node.id: before.get(node.id, new_s) for node in known[0]}

    def _is_new(self, node_id: str) -> bool:
        came_s = (self._came_s or {}).get(node_id, -math.inf)
        return self._clock.monotonic_s() - came_s < NEW_NODE_S

    def _forget(self, model: str) -> None:
        """Nothing is asked for it any more, so that nothing fails either."""
        with self._lock:
            self.failures.pop(model, None)
            for key in [k for k, ask in self._asks.items() if k[0] == model and not ask.running]:
                del self._asks[key]

    def _may_raise(self, decision: Decision, node: Node) -> bool:
        if decision.rung >= Rung.SERVING or decision.rung <= Rung.NODE:
            return False
        if decision.rung < Rung.PARKED:
            return True
        # A replica that goes away, and an engine that is starting, are about to be what is asked for.
        setup = self._metrics.models[decision.model]
        serve = self._metrics.serve()
        replicas = serve.get(setup.deployment) if serve is not None else None
        engines = {
            engine["engine_id"]: engine
            for report in self._metrics.reports().values()
            if report["node"] == node.id
            for engine in report["engines"]
        }.values()
        return (
            setup.can_park
            and replicas is not None
            and not sum(replicas.states.values())
            and not any(engine["model"] == decision.model for engine in engines)
            and self._has_device(decision, node, engines)
        )

    def _has_device(self, decision: Decision, node: Node, engines: Collection[Mapping[str, Any]]) -> bool:
        """Whether an engine that is only to sleep finds devices that nobody uses or waits for.

        It loads on those that Ray grants, for as long as that takes, and what sleeps on them goes. So one that had to
        make way would come back in the way of whoever it made way for, and end what sleeps there by then.
        """
        gpus = self._metrics.models[decision.model].resources.get("GPU", 0.0)
        if not gpus or decision.reason is not Reason.PARK:
            return True
        serve = self._metrics.serve() or {}
        others = [m.deployment for m in self._metrics.models.values() if m.resources.get("GPU")]
        waiting = any(serve[name].starting for name in others if name in serve)
        taken = sum(len(engine["gpu_ids"]) for engine in engines)
        return not waiting and node.gpus - taken >= gpus

    def _is_scarce(self, node_id: str) -> bool:
        memory = [r.get("memory") for r in self._metrics.reports().values() if r["node"] == node_id]
        return any(m is not None and scarcity(m["available_share"]) > 0 for m in memory)

    def _ask(self, model: str, node: Node, wanted: Rung, after_s: float) -> None:
        now_s = self._clock.monotonic_s()
        with self._lock:
            ask = self._asks.get((model, node.id))
            if ask is None or (ask.wanted is not wanted and not ask.running):
                ask = self._asks[model, node.id] = _Ask(wanted, now_s, now_s + after_s)
            if ask.running or now_s < ask.next_s:
                return
            ask.running = True
            ask.next_s = now_s + ask.pause_s
        self._executor.submit(self._ask_host, model, node, wanted, ask)

    def _ask_host(self, model: str, node: Node, wanted: Rung, ask: _Ask) -> None:
        setup = self._metrics.models[model]
        gpus = int(setup.resources.get("GPU", 0)) if wanted is Rung.PARKED else 0
        wait_s = setup.start_deadline_s if gpus else 0.0
        message = {
            "spec": dict(setup.engine),
            "rung": wanted.name.lower(),
            "config": self._host_config,
            # The task that holds the GPUs must last for as long as the engine loads.
            "wait_s": wait_s,
        }
        try:
            answer = self._warm(node.id, message, gpus, ANSWER_TIMEOUT_S + wait_s)
        except Exception as error:  # noqa: BLE001 - whatever keeps a node from answering, the others go on
            self._fails(model, ask, f"node {node.id[:12]}: {error!r}")
            return
        self._metrics.take_warmed(model, node.id, Rung[answer["rung"].upper()], answer.get("reason"))
        if answer.get("reason"):
            self._fails(model, ask, answer["reason"])
            return
        now_s = self._clock.monotonic_s()
        with self._lock:
            ask.running, ask.pause_s = False, ASK_AGAIN_S
            if answer.get("working"):
                ask.working_s = now_s if ask.working_s is None else ask.working_s
                ask.next_s = now_s + look_again_s(now_s - ask.working_s)
            self.failures.pop(model, None)

    def _fails(self, model: str, ask: _Ask, reason: str) -> None:
        with self._lock:
            if self.failures.get(model) != reason:
                log.warning("%s is not warmed: %s", model, reason)
            self.failures[model] = reason
            ask.running = False
            ask.pause_s = min(LONGEST_PAUSE_S, 2 * ask.pause_s)
            ask.next_s = self._clock.monotonic_s() + ask.pause_s


class LiveActuator:
    """`Actuator` over the cluster."""

    def __init__(
        self,
        publisher: Publisher,
        rungs: RungKeeper,
        nodes: NodeRequests,
        waits: NodeWaits,
        metrics: LiveMetrics,
        *,
        clock: Clock,
        mode: Callable[[], str],
        plan_expires_s: float,
    ) -> None:
        self._plan_expires_s = plan_expires_s
        self._publisher = publisher
        self._rungs = rungs
        self._nodes = nodes
        self._waits = waits
        self._metrics = metrics
        self._clock = clock
        self._mode = mode

    def apply(self, now_s: float, specs: Mapping[str, Spec], decisions: Sequence[Decision]) -> None:
        """Publish the plan; in the active mode have rungs and nodes follow it too.

        Raises what publishing raises: policies then act on the plan before, until that expires.
        """
        active = self._mode() == "active"
        plan = plan_of(now_s, specs, decisions, expires_s=self._plan_expires_s, active=active)
        self._publisher.publish(plan)
        self._rungs.apply(decisions if active else ())
        known = self._metrics.nodes()
        if known is not None and known[1]:
            metrics = self._metrics
            unplaced = metrics.unplaced()

            def waiting(model: str) -> int:
                return unplaced.get(model, 0)

            self._waits.look(
                decisions if active else (),
                unplaced=waiting,
                has_node=lambda m: bool(metrics.eligible(m)),
                failing=metrics.launches.failing(),
            )
            wanted = (
                bundles(metrics.models, decisions, unplaced=waiting, instead=self._waits.asked)
                if active
                else []
            )
            self._nodes.ask(self._clock.monotonic_s(), wanted)
