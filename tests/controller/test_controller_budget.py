"""A budget against demand: Serve's policy sees requests before the controller does, and asks for replicas at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autoscaling.core.plan import follow
from autoscaling.core.types import Observation, State
from deployments.fleet import parse_fleet
from deployments.scaling import scaling_spec
from tests.controller.lab import World, serve_view, setup


def replicas_under_load(tmp_path: Path, running: int, load: int, **section: Any) -> list[int]:
    """What Serve is told to have, second by second, once so many requests are in progress; replicas are up at once."""
    world = World(tmp_path, setup(max_replicas=10, target_ongoing_requests=2.0), **section)
    told: list[int] = []
    with world.planner() as planner:
        world.running["model-m"] = serve_view(running)
        world.seen(in_flight=2 * running)
        for _ in range(5):
            world.tick(planner)
        state, target = State(), running
        for _ in range(12):
            for _ in range(2):
                now_s = world.clock.now_s()
                entry = world.plans[-1].entry("m", now_s)
                assert entry is not None
                seen = Observation(now_s, target, 0, target, queued=0, in_flight=load)
                state, decision = follow(entry.spec, state, seen, entry, now_s)
                assert decision.replicas is not None
                target = decision.replicas
            told.append(target)
            world.running["model-m"] = serve_view(target)
            world.seen(in_flight=load)
            world.tick(planner)
    return told


@pytest.mark.parametrize(
    ("section", "running"),
    [({"spend_gpu_s_per_day": 2.0}, 1), ({"gpu_budget": 2.0}, 2)],
    ids=["the day's spend", "GPUs"],
)
def test_demand_does_not_go_above_a_budget(tmp_path: Path, section: dict[str, float], running: int) -> None:
    """Neither for a moment, before the controller has seen it, nor in the end."""
    assert replicas_under_load(tmp_path, running, 20, **section) == [running] * 12
    assert replicas_under_load(tmp_path / "free", running, 20)[-1] == 10


def test_a_model_without_gpus_takes_none_of_the_budget(tmp_path: Path) -> None:
    """It is lit while another holds all of it."""
    fleet = parse_fleet(
        {
            "models": [
                {"id": "chat", "source": "o/c", "resources": {"gpus": 1}},
                {"id": "embed", "source": "o/e"},
            ]
        }
    )
    models = [
        setup(model.id, gpus_per_replica=scaling_spec(model).gpus_per_replica) for model in fleet.models
    ]
    world = World(tmp_path, *models, gpu_budget=1.0)
    with world.planner() as planner:
        world.running["model-chat"] = serve_view(1)
        world.seen("chat", in_flight=1)
        world.seen("embed", queued=1)
        world.tick(planner)
        world.tick(planner)
        assert {model: decision.replicas for model, decision in planner.decisions().items()} == {
            "chat": 1,
            "embed": 1,
        }
        assert world.plans[-1].entries["embed"].ceiling is None


def test_a_model_whose_budget_others_hold_has_no_room_until_they_are_done(tmp_path: Path) -> None:
    """Gateways and people are told, the latter only where a request waits."""
    models = [setup(model, gpus_per_replica=1.0) for model in ("one", "other")]
    world = World(tmp_path, *models, gpu_budget=1.0)
    with world.planner() as planner:
        assert planner.no_room()[0] == {}
        world.running["model-one"] = serve_view(1)
        world.seen("one", in_flight=1)
        world.tick(planner)
        assert list(planner.no_room()[0]) == ["other"]
        world.seen("other", queued=1)
        world.tick(planner)
        assert planner.no_room()[0] == {
            "other": "waits for GPUs: others hold those of controller.gpu_budget (1)"
        }
        world.seen("one", in_flight=0)
        world.tick(planner)
        assert list(planner.no_room()[0]) == ["one"]
        assert planner.no_room()[1] == pytest.approx(10.0)
        # Gateways hold requests for no longer than a plan holds, whatever the clock is set to.
        world.clock.jump(-3600)
        assert planner.no_room()[1] == pytest.approx(10.0)
        world.clock.jump(3600)
        world.clock.go(60)
        assert planner.no_room()[0] == {}


def test_a_model_that_is_always_busy_makes_room_in_its_turn(tmp_path: Path) -> None:
    """Gateways hold its requests then, those in progress end, and it comes back in the next turn."""
    models = [setup(model, gpus_per_replica=1.0) for model in ("one", "other")]
    world = World(tmp_path, *models, gpu_budget=1.0)
    with world.planner() as planner:
        world.running["model-one"] = serve_view(1)
        waits, serves = "other", "one"
        for _ in range(3):
            begun_s = world.clock.now_s()
            while list(planner.no_room()[0]) != [serves]:
                world.seen(serves, in_flight=1)
                world.seen(waits, queued=1)
                world.tick(planner)
                assert world.clock.now_s() < begun_s + 600
            assert world.clock.now_s() > begun_s + 55
            assert world.plans[-1].entries[serves].replicas == 0
            assert world.plans[-1].entries[waits].replicas == 1
            world.running[f"model-{serves}"] = serve_view(0)
            # One that is late is waited for.
            for _ in range(70):
                world.seen(serves, queued=1)
                world.seen(waits, queued=1)
                world.tick(planner)
                assert list(planner.no_room()[0]) == [serves]
            world.running[f"model-{waits}"] = serve_view(1)
            waits, serves = serves, waits


def test_a_budget_that_is_not_set_leaves_room(tmp_path: Path) -> None:
    """Nobody is held."""
    world = World(tmp_path, setup("one", gpus_per_replica=1.0))
    with world.planner() as planner:
        world.seen("one", queued=1)
        world.tick(planner)
        assert planner.no_room()[0] == {}


def test_who_holds_requests_goes_on_over_a_restart_until_something_is_known(tmp_path: Path) -> None:
    """The first decisions of a controller that has not heard of Serve yet are no news."""
    world = World(
        tmp_path, *(setup(model, gpus_per_replica=1.0) for model in ("one", "other")), gpu_budget=1.0
    )
    with world.planner() as planner:
        world.running["model-one"] = serve_view(1)
        world.seen("one", in_flight=1)
        world.seen("other", queued=1)
        world.tick(planner)
        assert list(planner.no_room()[0]) == ["other"]
    with world.planner() as planner:
        planner.take_report("g", world.reports["g"])
        world.clock.go(0.1)
        planner.tick()
        assert list(planner.no_room()[0]) == ["other"]
        world.seen("one", in_flight=0)
        world.tick(planner)
        world.tick(planner)
        assert list(planner.no_room()[0]) == ["one"]
