"""Asking for nodes: what for, which kind in place of one that does not come, and letting go."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaling.core.types import Decision, Reason, Rung
from autoscaling.live.labels import ACCELERATOR, MARKET
from autoscaling.live.metrics import serve_view
from autoscaling.live.node_launches import FAILING_S, FailedLaunches, is_of
from autoscaling.live.node_waits import NodeWaits, choices, labels_of
from autoscaling.live.nodes import (
    LEASE_KEY,
    LEASE_S,
    REASSERT_S,
    Bundle,
    Node,
    NodeLease,
    NodeRequests,
    bundles,
    fits,
)
from autoscaling.live.observer import fleet_status
from autoscaling.live.plan_store import LEASE_EVERY_S, PlanReader
from tests.controller.lab import NOW_S, HandClock, setup

GPU = Bundle({"GPU": 1.0})
CPU = Bundle({"CPU": 1.0})
PATIENCE_S = 100.0


def decision(replicas: int = 0, rung: Rung = Rung.SERVING, model: str = "m") -> Decision:
    return Decision(model, NOW_S, replicas, rung, Reason.DARK, NOW_S + 1, "p")


def on_gpus(model: str = "n", *kinds: str) -> Any:
    return setup(model, resources={"GPU": 1.0}, accelerator_types=kinds)


# What the cluster must have room for


def test_replicas_alone_ask_for_no_node_ahead() -> None:
    """Serve's own replicas make the autoscaler start nodes."""
    models = {"m": setup(), "n": on_gpus()}
    assert bundles(models, [decision(3), decision(0, Rung.COLD, "n")]) == []


def test_a_node_that_is_wanted_ahead_is_asked_for_with_all_that_runs() -> None:
    """The request is for the whole cluster, what runs included."""
    models = {"m": setup(), "n": on_gpus()}
    wanted = bundles(models, [decision(2), decision(0, Rung.WEIGHTS, "n"), decision(1, model="gone")])
    assert wanted == [CPU, CPU, GPU]


def test_a_node_ahead_is_of_a_kind_that_the_model_can_use() -> None:
    """Or a replica would wait for another beside it."""
    models = {"m": on_gpus("m", "L4"), "n": on_gpus("n", "L4", "A10G")}
    wanted = bundles(models, [decision(0, Rung.TEMPLATE, "m"), decision(0, Rung.TEMPLATE, "n")])
    assert [bundle.labels for bundle in wanted] == [{ACCELERATOR: "L4"}, {ACCELERATOR: "in(L4,A10G)"}]


def test_only_replicas_without_a_place_are_asked_for_elsewhere() -> None:
    """The others stay where they are."""
    models = {"n": on_gpus("n", "L4", "A10G")}
    other = {ACCELERATOR: "A10G"}
    wanted = bundles(models, [decision(3, model="n")], unplaced=lambda _: 1, instead=lambda _: other)
    assert [bundle.labels for bundle in wanted] == [labels_of(models["n"])] * 2 + [other]


@pytest.mark.parametrize(
    ("node", "fit"),
    [
        (Node("a", {"GPU": 1.0}, {ACCELERATOR: "A10G"}), True),
        (Node("a", {"GPU": 1.0, "accelerator_type:L4": 1.0}), True),
        (Node("a", {"GPU": 1.0}, {ACCELERATOR: "H100"}), False),
        (Node("a", {"GPU": 1.0}), False),
    ],
)
def test_a_node_fits_by_its_label_or_its_resource(node: Node, fit: bool) -> None:
    """Ray sets both where it finds the GPU itself; a file may set either."""
    assert fits(node, on_gpus("n", "L4", "A10G")) is fit


# Which kind


class Waiting:
    """A model that may use L4 and A10G, and waits."""

    def __init__(self, *kinds: str) -> None:
        self.clock = HandClock()
        self.waits = NodeWaits({"n": on_gpus("n", *kinds)}, self.clock.monotonic_s, PATIENCE_S)
        self.unplaced = 1
        self.node = False
        self.failing: set[str] = set()

    def look(self, made: Decision) -> dict[str, str] | None:
        self.waits.look(
            [made],
            unplaced=lambda _: self.unplaced,
            has_node=lambda _: self.node,
            failing=self.failing,
        )
        asked = self.waits.asked("n")
        return None if asked is None else dict(asked)


def test_kinds_are_asked_for_one_after_the_other_and_over_again() -> None:
    """Each within the stated time of the one before; there is no state in which nothing is tried any more."""
    waiting = Waiting("L4", "A10G")
    asked = []
    for _ in range(6):
        asked.append(waiting.look(decision(1, model="n")))
        waiting.clock.go(PATIENCE_S)
    kinds = [dict(kind) for kind in choices(on_gpus("n", "L4", "A10G"))]
    assert asked[:4] == [
        None,
        {ACCELERATOR: "A10G"},
        {ACCELERATOR: "L4", MARKET: "on-demand"},
        {ACCELERATOR: "A10G", MARKET: "on-demand"},
    ]
    assert asked[4:] == [kinds[0], kinds[1]]


def test_who_has_found_a_place_begins_anew() -> None:
    """The next wait is for the first kind again."""
    waiting = Waiting("L4", "A10G")
    waiting.look(decision(1, model="n"))
    waiting.clock.go(PATIENCE_S)
    assert waiting.look(decision(1, model="n")) is not None
    waiting.unplaced = 0
    assert waiting.look(decision(1, model="n")) is None
    waiting.unplaced = 1
    assert waiting.look(decision(1, model="n")) is None


def test_a_node_ahead_of_replicas_is_waited_for_as_well() -> None:
    """Until one is up on which the model could run."""
    waiting = Waiting("L4", "A10G")
    waiting.unplaced = 0
    waiting.look(decision(0, Rung.TEMPLATE, "n"))
    waiting.clock.go(PATIENCE_S)
    assert waiting.look(decision(0, Rung.TEMPLATE, "n")) == {ACCELERATOR: "A10G"}
    waiting.node = True
    assert waiting.look(decision(0, Rung.TEMPLATE, "n")) is None
    assert waiting.waits.texts() == {}


def test_people_are_told_what_is_waited_for_and_what_comes_next() -> None:
    """In the status, unless the model has failed for another reason."""
    waiting = Waiting("L4", "A10G")
    waiting.look(decision(1, model="n"))
    assert waiting.waits.texts() == {}, "a replica that was just made"
    waiting.clock.go(30)
    assert waiting.waits.texts()["n"] == "waits for a node (L4 or A10G) for 30 s; asks for A10G at 100 s"
    waiting.clock.go(PATIENCE_S)
    waiting.look(decision(1, model="n"))
    text = waiting.waits.texts()["n"]
    assert text == "no node came (L4) for 130 s; asking for A10G, for L4 on demand at 200 s"
    models = [{"id": "n", "aliases": [], "deployment": "d"}]
    status = fleet_status(models, [], {}, {}, node_waits=waiting.waits.texts())
    assert status["models"][0]["reason"] == text


def test_a_kind_that_the_cloud_refuses_is_given_up_at_once() -> None:
    """Also the one after it; and where all are refused, each is asked for as long as any that does not come."""
    waiting = Waiting("L4", "A10G")
    assert waiting.look(decision(1, model="n")) is None
    waiting.failing = {"l4-spot"}
    assert waiting.look(decision(1, model="n")) == {ACCELERATOR: "A10G"}
    waiting.clock.go(30)
    text = waiting.waits.texts()["n"]
    assert text == "no node came (L4: launch failed) for 30 s; asking for A10G, for L4 on demand at 100 s"
    assert waiting.look(decision(1, model="n")) == {ACCELERATOR: "A10G"}
    waiting.failing = {"l4-spot", "a10gx4-spot"}
    assert waiting.look(decision(1, model="n")) == {ACCELERATOR: "L4", MARKET: "on-demand"}
    waiting.failing |= {"l4-ondemand", "a10g-ondemand"}
    assert waiting.look(decision(1, model="n")) == {ACCELERATOR: "L4", MARKET: "on-demand"}
    waiting.clock.go(PATIENCE_S)
    assert waiting.look(decision(1, model="n")) == {ACCELERATOR: "A10G", MARKET: "on-demand"}


def test_the_order_of_the_fleet_file_holds_also_where_ray_tried_another_first() -> None:
    """Ray takes what its priorities say."""
    waiting = Waiting("L4", "A10G")
    waiting.failing = {"a10g-ondemand"}
    assert waiting.look(decision(1, model="n")) == {ACCELERATOR: "L4"}
    waiting.clock.go(3)
    assert waiting.waits.texts()["n"].startswith("no node came (A10G: launch failed) for 3 s; asking for L4,")


def test_what_others_are_refused_is_no_reason() -> None:
    waiting = Waiting("L4", "A10G")
    waiting.failing = {"h100-spot", "cpu-spot"}
    assert waiting.look(decision(1, model="n")) is None


@pytest.mark.parametrize(
    ("name", "kind", "so"),
    [
        ("l4-spot", {ACCELERATOR: "L4"}, True),
        ("l4-spot", {ACCELERATOR: "L4", MARKET: "on-demand"}, False),
        ("l4-ondemand", {ACCELERATOR: "L4", MARKET: "on-demand"}, True),
        ("a100x8-spot", {ACCELERATOR: "A100"}, True),
        ("l40s-spot", {ACCELERATOR: "L4"}, False),
        ("a10g-spot", {ACCELERATOR: "A10"}, False),
        ("cpu-spot", {}, True),
        ("l4-spot", {}, False),
        ("my-machines", {ACCELERATOR: "L4"}, False),
    ],
)
def test_a_node_types_name_tells_its_kind(name: str, kind: dict[str, str], so: bool) -> None:
    assert is_of(name, kind) is so


def test_a_launch_that_fails_counts_for_a_while() -> None:
    """From when it is seen; of failures that were there at the first look nobody knows how old they are."""
    clock = HandClock()
    launches = FailedLaunches(clock.monotonic_s)
    launches.take({"l4-spot": 1000.0})
    assert launches.failing() == frozenset()
    launches.take({"l4-spot": 1001.0, "h100-spot": 1001.0})
    clock.go(FAILING_S - 1)
    launches.take({"l4-spot": 1001.0, "h100-spot": 1029.0})
    assert launches.failing() == {"l4-spot", "h100-spot"}
    clock.go(2)
    assert launches.failing() == {"h100-spot"}


def test_a_model_without_gpus_is_tried_off_the_spot_market() -> None:
    """There is nothing else to try."""
    assert choices(setup()) == [{}, {MARKET: "on-demand"}]


def test_serve_tells_which_replicas_have_no_node() -> None:
    """Those that start and were given none."""
    replicas = [
        {"state": "STARTING", "node_id": None},
        {"state": "STARTING", "node_id": "a"},
        {"state": "RUNNING", "node_id": "a"},
    ]
    details = {
        "applications": {"x": {"deployments": {"d": {"replicas": replicas, "target_num_replicas": 3}}}}
    }
    assert serve_view(details)["d"].unplaced == 1


# The lease


class Cluster:
    """The KV, and what the autoscaler was asked for."""

    def __init__(self) -> None:
        self.kv: dict[bytes, bytes] = {}
        self.asked: list[list[Bundle]] = []
        self.clock = HandClock()
        self.lease = NodeLease(
            self.clock, get=self.kv.get, put=self.kv.__setitem__, request=self.asked.append
        )

    def requests(self) -> NodeRequests:
        return NodeRequests(self.asked.append, get=self.kv.get, put=self.kv.__setitem__)

    def goes_on(self, seconds: float, nodes: NodeRequests | None, wanted: list[Bundle]) -> None:
        for _ in range(int(seconds)):
            self.clock.go(1)
            if nodes is not None:
                nodes.ask(self.clock.monotonic_s(), wanted)
            self.lease.look()


def test_requests_for_nodes_are_said_when_they_change_and_again_and_again() -> None:
    """And taken back once; what nobody of ours asked for is not taken back."""
    cluster = Cluster()
    nodes = cluster.requests()
    nodes.ask(0, [])
    assert cluster.asked == []
    nodes.ask(1, [GPU])
    nodes.ask(2, [GPU])
    assert cluster.asked == [[GPU]]
    nodes.ask(1 + REASSERT_S, [GPU])
    assert len(cluster.asked) == 2
    nodes.ask(2 + REASSERT_S, [])
    nodes.ask(3 + REASSERT_S, [])
    nodes.ask(3 * REASSERT_S, [])
    assert cluster.asked[2:] == [[]]


def test_nodes_of_a_controller_that_was_killed_for_good_are_let_go() -> None:
    """Once, after the lease's time; not while it lives."""
    cluster = Cluster()
    cluster.goes_on(3 * LEASE_S, cluster.requests(), [GPU])
    assert [] not in cluster.asked
    cluster.goes_on(LEASE_S + REASSERT_S, None, [])
    assert cluster.asked.count([]) == 1
    cluster.goes_on(3 * LEASE_S, None, [])
    assert cluster.asked[-1] == []
    assert cluster.asked.count([]) == 1


def test_a_successor_takes_back_what_it_does_not_want() -> None:
    """It has asked for nothing itself."""
    cluster = Cluster()
    cluster.goes_on(5, cluster.requests(), [GPU])
    cluster.goes_on(5, cluster.requests(), [])
    assert cluster.asked == [[GPU], []]


def test_a_successor_that_wants_the_same_says_it_again() -> None:
    """So that the lease goes on."""
    cluster = Cluster()
    cluster.goes_on(5, cluster.requests(), [GPU])
    cluster.goes_on(3 * LEASE_S, cluster.requests(), [GPU])
    assert [] not in cluster.asked


def test_what_could_not_be_asked_is_asked_again_and_is_under_a_lease() -> None:
    """The GCS may have taken it all the same."""
    cluster = Cluster()

    def fails(_: list[Bundle]) -> None:
        raise ConnectionError

    nodes = NodeRequests(fails, get=cluster.kv.get, put=cluster.kv.__setitem__)
    for at_s in (1, 2):
        with pytest.raises(ConnectionError):
            nodes.ask(at_s, [GPU])
    assert cluster.kv[LEASE_KEY]


def test_the_lease_is_looked_at_by_serves_controller() -> None:
    """Every few seconds, and what fails there keeps no policy from its plan."""
    clock = HandClock()
    looked = []

    def look() -> None:
        looked.append(clock.monotonic_s())
        raise ConnectionError

    reader = PlanReader(get=lambda _: None, put=lambda _, __: None, clock=clock, beside=look)
    for _ in range(10):
        reader.look_beside()
        clock.go(LEASE_EVERY_S / 2)
    assert len(looked) == 5
