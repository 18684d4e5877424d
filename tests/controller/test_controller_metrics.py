"""What is seen of models, from reports, Serve's answer and the nodes; and what is unknown."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaling.core.types import Rung
from autoscaling.live.capacity import CapacityBook
from autoscaling.live.metrics import LiveMetrics, serve_view
from autoscaling.live.nodes import Node
from autoscaling.live.records import TrafficRow
from autoscaling.live.rungs import RungBook
from tests.controller.lab import GIB, NODE, HandClock, engine, report, setup
from tests.controller.lab import serve_view as view

GPU_NODE = Node("gpu-1", {"CPU": 16.0, "GPU": 8.0, "accelerator_type:L4": 1.0})


class Place:
    """Metrics of a clock by hand."""

    def __init__(self, *models: Any) -> None:
        self.clock = HandClock()
        self.metrics = LiveMetrics(
            models or (setup(),), RungBook(), CapacityBook(), self.clock, park_budget_bytes=4 * GIB
        )

    def look(self, model: str = "m") -> Any:
        return self.metrics.observe(self.clock.now_s())[model]


def test_before_anything_came_in_all_is_unknown() -> None:
    """Unknown is not zero."""
    seen = Place().look()
    assert (seen.ready, seen.starting, seen.target, seen.queued, seen.in_flight, seen.rung) == (None,) * 6
    assert (seen.last_arrival_s, seen.last_busy_s) == (None, None)


def test_what_came_in_is_put_together() -> None:
    """Gateways' counts are added up, Serve's replicas are those of the model's deployment."""
    place = Place(setup(), setup("other"))
    place.metrics.take_report("g", report("m", "other", queued=1, in_flight=2), [TrafficRow("m", 7, 5)])
    place.metrics.take_report("h", report("m", queued=3, in_flight=4), [TrafficRow("m", 8, 1)])
    place.metrics.take_serve({"model-m": view(2, 1, target=4), "model-other": view()})
    place.metrics.take_nodes([NODE], autoscaler=False)
    seen = place.look()
    assert (seen.ready, seen.starting, seen.target) == (2, 1, 4)
    assert (seen.queued, seen.in_flight, seen.arrivals, seen.last_arrival_s) == (4, 6, 6, 8.0)
    assert seen.rung is Rung.TEMPLATE
    assert place.look().arrivals == 0
    assert place.look("other").ready == 0


def test_what_is_too_old_is_unknown_again() -> None:
    """A gateway that is gone, and a Serve that does not answer."""
    place = Place()
    place.metrics.take_report("g", report("m"), ())
    place.metrics.take_serve({"model-m": view(1)})
    place.metrics.take_nodes([NODE], autoscaler=False)
    place.clock.go(6)
    assert (place.look().ready, place.look().queued) == (None, 0)
    place.clock.go(10)
    assert place.look().queued is None
    place.clock.go(60)
    assert place.look().rung is None


def test_a_deployment_that_serve_does_not_know_is_unknown() -> None:
    """Its controller may be starting."""
    place = Place()
    place.metrics.take_serve({})
    assert place.look().ready is None


def test_after_the_clock_was_set_back_an_idle_model_grows_idle() -> None:
    """From that moment on; what gateways repeat of the time before is no news."""
    place = Place()
    busy_s = place.clock.now_s()
    place.metrics.take_report("g", report("m", last_busy_s=busy_s, last_arrival_s=busy_s), ())
    place.look()
    place.clock.jump(-3600)
    back_s = place.clock.now_s()
    for _ in range(3):
        place.metrics.take_report("g", report("m", last_busy_s=busy_s, last_arrival_s=busy_s), ())
        assert (place.look().last_arrival_s, place.look().last_busy_s) == (back_s, back_s)
        place.clock.go(1)
    place.metrics.take_report("g", report("m", last_busy_s=place.clock.now_s()), ())
    assert place.look().last_busy_s == place.clock.now_s()


def test_the_clocks_of_gateways_may_be_ahead() -> None:
    """What came in the future came now."""
    place = Place()
    ahead_s = place.clock.now_s() + 3
    place.metrics.take_report("g", report("m", last_arrival_s=ahead_s, last_busy_s=ahead_s), ())
    assert (place.look().last_arrival_s, place.look().last_busy_s) == (place.clock.now_s(),) * 2


def test_what_was_known_before_a_restart_is_kept_if_nothing_newer_comes() -> None:
    """When the last request came is in the store."""
    place = Place()
    now_s = place.clock.now_s()
    place.metrics.restore("m", now_s - 100)
    assert place.look().last_arrival_s == now_s - 100
    place.metrics.take_report("g", report("m", last_arrival_s=now_s - 200), ())
    assert place.look().last_arrival_s == now_s - 100


@pytest.mark.parametrize(
    ("engines", "host_rung", "rung"),
    [
        ([], "node", Rung.NODE),
        ([], "weights", Rung.WEIGHTS),
        ([engine()], "template", Rung.TEMPLATE),
        ([engine(held=False)], "template", Rung.PARKED),
        ([engine(state="parked", held=False)], "weights", Rung.PARKED),
        ([engine(state="draining", held=False)], "template", Rung.TEMPLATE),
        ([engine("other", state="parked", held=False)], "template", Rung.TEMPLATE),
    ],
)
def test_how_warm_a_model_is(engines: list[dict[str, Any]], host_rung: str, rung: Rung) -> None:
    """Besides what replicas hold."""
    place = Place()
    place.metrics.take_nodes([NODE], autoscaler=False)
    place.metrics.take_report("g", report("m", engines=engines, rung=host_rung), ())
    assert place.look().rung is rung


@pytest.mark.parametrize(
    ("engines", "answering"),
    [
        ([], False),
        ([engine()], True),
        ([engine(held=False)], True),
        ([engine(state="starting", held=False), engine(state="parked", held=False)], False),
        ([engine("other")], False),
    ],
)
def test_whether_an_engine_answers(engines: list[dict[str, Any]], answering: bool) -> None:
    """Also one that was lit beside its replica, which is not there yet."""
    place = Place()
    place.metrics.take_report("g", report("m", engines=engines), ())
    assert place.look().answering is answering


def test_a_model_that_no_node_could_run_is_cold() -> None:
    """By its resources, and by its kinds of accelerators."""
    place = Place(setup(resources={"CPU": 1.0, "GPU": 2.0}, accelerator_types=("A100", "L4")))
    place.metrics.take_nodes([NODE], autoscaler=True)
    assert place.look().rung is Rung.COLD
    assert place.metrics.eligible("m") == []
    place.metrics.take_nodes([NODE, GPU_NODE], autoscaler=True)
    assert place.look().rung is Rung.NODE
    assert place.metrics.eligible("m") == [GPU_NODE]


def test_nodes_without_a_gateway_are_known_by_what_their_hosts_answered() -> None:
    """And the warmest comes first."""
    place = Place()
    nodes = [Node(name, {"CPU": 2.0}) for name in ("a", "b")]
    place.metrics.take_nodes(nodes, autoscaler=False)
    place.metrics.take_warmed("m", "b", Rung.WEIGHTS, None)
    assert [node.id for node in place.metrics.eligible("m")] == ["b", "a"]
    assert place.look().rung is Rung.WEIGHTS


def test_what_hosts_of_nodes_answered_that_are_gone_is_forgotten() -> None:
    """Nodes come and go under other names; one that comes back begins anew."""
    place = Place()
    nodes = [Node(name, {"CPU": 2.0}) for name in ("a", "b")]
    place.metrics.take_nodes(nodes, autoscaler=False)
    for node in nodes:
        place.metrics.take_warmed("m", node.id, Rung.WEIGHTS, None)
    place.metrics.take_nodes(nodes[:1], autoscaler=False)
    place.metrics.take_nodes(nodes, autoscaler=False)
    assert [place.metrics.rung_on("m", node.id) for node in nodes] == [Rung.WEIGHTS, Rung.NODE]


def prices(place: Place) -> dict[Rung, float]:
    return {profile.rung: profile.cost_per_s for profile in place.look().rungs}


def test_rungs_are_those_that_can_be_held_here() -> None:
    """No parking without a budget; no rung below a node where nothing starts nodes."""
    place = Place()
    place.metrics.take_nodes([NODE], autoscaler=False)
    place.metrics.take_report("g", report("m"), ())
    assert prices(place) == {
        Rung.NODE: 0,
        Rung.WEIGHTS: 0,
        Rung.TEMPLATE: 0,
        Rung.PARKED: 0,
        Rung.SERVING: 1,
    }
    place = Place(setup(park=False))
    assert Rung.PARKED not in prices(place)
    place = Place(setup(can_park=False))
    assert Rung.PARKED not in prices(place)


def test_memory_has_its_price_where_it_is_scarce() -> None:
    """Of the engine's weighed size."""
    place = Place()
    place.metrics.take_nodes([NODE], autoscaler=False)
    seen = report("m", engines=[engine(memory_bytes=4 * GIB)])
    place.metrics.take_report("g", {**seen, "memory": {"total_bytes": 16 * GIB, "available_share": 0.1}}, ())
    found = prices(place)
    assert found[Rung.TEMPLATE] == pytest.approx(0.0125)
    assert found[Rung.PARKED] == pytest.approx(0.025)


def test_a_node_that_is_kept_for_a_model_costs_its_gpus() -> None:
    """Where an autoscaler would end it."""
    place = Place(setup(resources={"GPU": 2.0}, gpus_per_replica=2.0, own_template=False))
    place.metrics.take_nodes([GPU_NODE], autoscaler=True)
    found = prices(place)
    assert (found[Rung.COLD], found[Rung.NODE], found[Rung.SERVING]) == (0, 8, 2)


def test_serves_details_are_read() -> None:
    """States as names or as enums; a deployment without replicas too."""
    deployment = {
        "target_num_replicas": 3,
        "replicas": [{"state": "RUNNING"}, {"state": "STARTING"}, {"state": "STOPPING"}],
    }
    details = {
        "applications": {
            "default": {
                "deployments": {"model-m": deployment, "x": {"target_num_replicas": 0, "replicas": []}}
            }
        }
    }
    found = serve_view(details)
    assert (found["model-m"].running, found["model-m"].starting, found["model-m"].target) == (1, 1, 3)
    assert found["model-m"].states == {"RUNNING": 1, "STARTING": 1, "STOPPING": 1}
    assert (found["x"].running, found["x"].target) == (0, 0)
