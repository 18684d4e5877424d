"""Decisions made so: plans, rungs and nodes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from autoscaling.core.plan import Plan
from autoscaling.core.types import Decision, Reason, Rung, Window
from autoscaling.live.actuator import (
    ASK_AGAIN_S,
    LOOK_AGAIN_S,
    LOWER_AFTER_S,
    NEW_NODE_S,
    RAISE_AFTER_S,
    Publisher,
    RungKeeper,
    look_again_s,
    plan_of,
)
from autoscaling.live.capacity import CapacityBook
from autoscaling.live.metrics import LiveMetrics
from autoscaling.live.nodes import Node
from autoscaling.live.rungs import RungBook
from tests.controller.lab import GIB, NODE, NOW_S, HandClock, engine, report, setup, spec
from tests.controller.lab import serve_view as view


def decision(
    replicas: int | None = 0, rung: Rung = Rung.TEMPLATE, model: str = "m", reason: Reason = Reason.PREWARM
) -> Decision:
    return Decision(model, NOW_S, replicas, rung, reason, NOW_S + 100, "predictive")


class Now(Executor):
    """Does at once what it is given."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


# Plans


def plan(replicas: int = 0, made_s: float = NOW_S, rung: Rung = Rung.TEMPLATE, until_s: float = 1.0) -> Plan:
    made = Decision("m", made_s, replicas, rung, Reason.DARK, made_s + until_s, "p")
    return plan_of(made_s, {"m": spec()}, [made], expires_s=10, active=True)


def test_a_plan_is_published_when_it_says_something_new_and_before_it_expires() -> None:
    """How long a decision stands changes all the time, and is no news."""
    clock = HandClock()
    put: list[Plan] = []
    publisher = Publisher(put.append, clock, every_s=5)
    assert publisher.publish(plan())
    assert not publisher.publish(plan(until_s=7))
    assert publisher.publish(plan(1))
    assert publisher.publish(plan(1, rung=Rung.PARKED))
    clock.go(5)
    assert publisher.publish(plan(1, made_s=NOW_S + 5, rung=Rung.PARKED))
    assert len(put) == 4


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_a_clock_that_was_set_has_a_plan_published_anew(jump_s: float) -> None:
    """The one before would hold for an hour, or not at all."""
    put: list[Plan] = []
    publisher = Publisher(put.append, HandClock(), every_s=5)
    publisher.publish(plan())
    assert publisher.publish(plan(made_s=NOW_S + jump_s))
    assert put[-1].expires_s == NOW_S + jump_s + 10


def test_a_plan_that_could_not_be_published_is_tried_again() -> None:
    """What it says is not taken for said."""
    fails = True

    def put(_: Plan) -> None:
        if fails:
            raise ConnectionError

    publisher = Publisher(put, HandClock(), every_s=5)
    with pytest.raises(ConnectionError):
        publisher.publish(plan())
    fails = False
    assert publisher.publish(plan())


def test_a_plan_that_is_not_active_has_no_opinion() -> None:
    """And no windows that would wake a model."""
    window = Window(NOW_S, NOW_S + 60, 3)
    specs = {"m": spec(windows=(window,), min_replicas=1)}
    shadow = plan_of(NOW_S, specs, [decision(5)], expires_s=10, active=False).entries["m"]
    assert (shadow.replicas, shadow.spec.windows, shadow.spec.min_replicas) == (None, (), 1)
    active = plan_of(NOW_S, specs, [decision(5)], expires_s=10, active=True).entries["m"]
    assert (active.replicas, active.spec.windows) == (5, (window,))


# Rungs


class Hosts:
    """A node whose host is asked."""

    def __init__(self, **model: Any) -> None:
        self.clock = HandClock()
        self.metrics = LiveMetrics(
            [setup(**model)], RungBook(), CapacityBook(), self.clock, park_budget_bytes=4 * GIB
        )
        self.asked: list[dict[str, Any]] = []
        self.node = NODE
        self.reason: str | None = None
        self.error: Exception | None = None
        self.working = False
        self.keeper = RungKeeper(self.metrics, self._warm, Now(), self.clock, {"park_memory_bytes": 1})
        self.see()

    def _warm(self, node_id: str, message: Any, gpus: int, timeout_s: float) -> dict[str, Any]:
        self.asked.append({"node": node_id, "gpus": gpus, **message})
        if self.error is not None:
            raise self.error
        return {"rung": "weights", "working": self.working, "reason": self.reason}

    def see(self, *engines: Any, rung: str = "weights", available: float = 0.8, **replicas: int) -> None:
        seen = report("m", engines=engines, rung=rung)
        seen["memory"]["available_share"] = available
        self.metrics.take_report("g", seen, ())
        self.metrics.take_serve({"model-m": view(**replicas)})
        self.metrics.take_nodes([self.node], autoscaler=False)
        self.seen = (engines, rung, available, replicas)

    def go(self, made: Decision, seconds: float) -> None:
        """The same decision, second after second."""
        for _ in range(int(seconds)):
            self.clock.go(1)
            engines, rung, available, replicas = self.seen
            self.see(*engines, rung=rung, available=available, **replicas)
            self.keeper.apply([made])


def test_a_model_that_is_colder_than_decided_is_warmed() -> None:
    """After a while, and then not every second."""
    hosts = Hosts()
    hosts.go(decision(rung=Rung.TEMPLATE), RAISE_AFTER_S)
    assert hosts.asked == []
    hosts.go(decision(rung=Rung.TEMPLATE), 20)
    (asked,) = hosts.asked
    assert (asked["node"], asked["rung"], asked["gpus"]) == (NODE.id, "template", 0)
    assert asked["config"] == {"park_memory_bytes": 1}
    hosts.go(decision(rung=Rung.TEMPLATE), 30)
    assert len(hosts.asked) == 2


def test_a_host_that_works_on_it_is_asked_again_soon() -> None:
    """So that what is ready is known soon; ever more seldom, the longer it takes."""
    hosts = Hosts()
    hosts.working = True
    hosts.go(decision(rung=Rung.TEMPLATE), RAISE_AFTER_S + 1 + 3 * LOOK_AGAIN_S)
    assert len(hosts.asked) == 4
    assert [look_again_s(s) for s in (0, 40, 1e6)] == [LOOK_AGAIN_S, 10.0, ASK_AGAIN_S]


def test_the_host_of_a_node_that_just_came_is_asked_at_once() -> None:
    """No replica can have gone from it. One that was there before is asked after a while."""
    hosts = Hosts()
    hosts.go(decision(rung=Rung.WEIGHTS), 1)
    hosts.node = Node("new" + NODE.id, NODE.resources, NODE.labels)
    hosts.go(decision(rung=Rung.TEMPLATE), 1)
    assert [asked["node"] for asked in hosts.asked] == [hosts.node.id]
    hosts.go(decision(rung=Rung.NODE), NEW_NODE_S)
    hosts.go(decision(rung=Rung.TEMPLATE), RAISE_AFTER_S)
    assert len(hosts.asked) == 1


def test_a_model_that_is_warm_enough_is_let_be() -> None:
    """Also one that is warmer, as long as memory is plenty."""
    hosts = Hosts()
    hosts.see(rung="template")
    hosts.go(decision(rung=Rung.TEMPLATE), 300)
    hosts.go(decision(rung=Rung.WEIGHTS), 300)
    assert hosts.asked == []


def test_where_memory_is_scarce_it_is_let_down() -> None:
    """After a minute of decisions that ask for less, and never below its weights."""
    hosts = Hosts()
    hosts.see(rung="template", available=0.1)
    hosts.go(decision(rung=Rung.NODE), LOWER_AFTER_S)
    assert hosts.asked == []
    hosts.go(decision(rung=Rung.NODE), 2)
    assert [asked["rung"] for asked in hosts.asked] == ["weights"]


@pytest.mark.parametrize("replicas", [None, 1])
def test_with_replicas_no_rung_is_touched(replicas: int | None) -> None:
    """They are on their way, or it is not known whether they are."""
    hosts = Hosts()
    hosts.go(decision(replicas, rung=Rung.PARKED), 60)
    assert hosts.asked == []


def test_no_engine_is_started_beside_one_that_will_be_parked() -> None:
    """A replica that stops parks its own; one that is gone leaves room for a warm start."""
    hosts = Hosts()
    hosts.see(rung="template", stopping=1)
    hosts.go(decision(rung=Rung.PARKED), 60)
    hosts.see(engine(state="draining"), rung="template")
    hosts.go(decision(rung=Rung.PARKED), 60)
    assert hosts.asked == []
    hosts.see(rung="template")
    hosts.go(decision(rung=Rung.PARKED), 20)
    assert [asked["rung"] for asked in hosts.asked] == ["parked"]


def test_an_engine_on_gpus_is_parked_by_a_task_that_holds_them() -> None:
    """For as long as it loads."""
    hosts = Hosts(resources={"GPU": 2.0}, engine={"model": "m", "start_deadline_s": 300.0})
    hosts.node = Node(NODE.id, {"CPU": 4.0, "GPU": 2.0})
    hosts.see(rung="template")
    hosts.go(decision(rung=Rung.PARKED), 20)
    (asked,) = hosts.asked
    assert (asked["rung"], asked["gpus"], asked["wait_s"]) == ("parked", 2, 300.0)
    hosts.see(rung="weights")
    hosts.go(decision(rung=Rung.TEMPLATE), 60)
    assert [asked["gpus"] for asked in hosts.asked[1:]] == [0, 0]


@pytest.mark.parametrize("state", ["ready", "parked"])
def test_what_only_rests_takes_no_device_from_anybody(state: str) -> None:
    """It made way for an engine that serves or sleeps there: loading it again would end that one, or make it wait."""
    hosts = Hosts(resources={"GPU": 1.0})
    hosts.node = Node(NODE.id, {"CPU": 4.0, "GPU": 1.0})
    rests = decision(rung=Rung.PARKED, reason=Reason.PARK)
    hosts.see(engine("other", state=state, held=state == "ready", gpu_ids=["0"]), rung="template")
    hosts.go(rests, 60)
    assert hosts.asked == []
    hosts.go(decision(rung=Rung.PARKED), 20)
    assert [asked["gpus"] for asked in hosts.asked] == [1]
    hosts.asked.clear()
    hosts.see(rung="template")
    hosts.go(rests, 60)
    assert hosts.asked


@pytest.mark.parametrize("kind", ["reason", "error"])
def test_what_can_t_be_warmed_is_told_and_tried_ever_more_seldom(kind: str) -> None:
    """A host's own reason, or a node that does not answer."""
    hosts = Hosts()
    if kind == "reason":
        hosts.reason = "no room"
    else:
        hosts.error = ConnectionError("no room")
    hosts.go(decision(rung=Rung.TEMPLATE), 1000)
    assert 3 <= len(hosts.asked) <= 6
    assert "no room" in hosts.keeper.failures["m"]


@pytest.mark.parametrize("by", ["replica", "rung", "warmed", "node", "mode"])
def test_what_could_not_be_warmed_is_told_until_it_is_not_to_be_warmed_any_more(by: str) -> None:
    """It serves, or is warm enough, or has no node, or nobody acts on what is decided."""
    hosts = Hosts()
    hosts.reason = "no room"
    hosts.go(decision(rung=Rung.TEMPLATE), 60)
    assert hosts.keeper.failures
    made = [decision(1 if by == "replica" else 0, rung=Rung.WEIGHTS if by == "rung" else Rung.TEMPLATE)]
    if by == "warmed":
        hosts.see(rung="template")
    elif by == "node":
        hosts.metrics.take_nodes([], autoscaler=False)
    hosts.keeper.apply(made if by != "mode" else ())
    assert hosts.keeper.failures == {}
