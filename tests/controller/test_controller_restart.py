"""A controller that starts while its store can't be reached, and what it makes up for afterwards."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from autoscaling.core.types import Rung
from autoscaling.live import intake, planner
from autoscaling.live.planner import Planner
from autoscaling.live.store import database
from tests.controller.lab import World, serve_view, setup


@contextmanager
def locked(folder: Path) -> Iterator[sqlite3.Connection]:
    """The store's file, which another process writes."""
    other = sqlite3.connect(folder / "relight.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield other
    finally:
        other.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A locked file is told at once."""
    monkeypatch.setattr(database, "LOCK_WAIT_S", 0.05)


def spent(controller: Planner) -> float:
    return controller._active.spent_gpu_s


def start_s(world: World) -> float:
    """What a start from the template is expected to take."""
    (profile,) = world.metrics.rungs.profiles("m", {Rung.TEMPLATE: 0.0})
    return profile.delay_s


def work(world: World) -> tuple[float, float]:
    """A controller's life with some spend, requests and a start of nine seconds; (its spend, that start's time)."""
    with world.planner() as controller:
        world.running["model-m"] = serve_view(1)
        world.seen(in_flight=1)
        for _ in range(20):
            world.tick(controller)
        world.came(controller, 7)
        began_s = world.clock.now_s() - 9
        start = {"model": "m", "engine_id": "e", "begun_s": began_s, "ready_s": began_s + 9, "total_s": 9.0}
        controller._take_start({**start, "kind": "prebuilt", "phases": [], "prewarmed": False}, "n")
        controller.store.flush()
        return spent(controller), start_s(world)


def arrivals(controller: Planner) -> float:
    controller.store.flush()
    now_s = controller.now_s()
    return sum(each["arrivals"] for each in controller.store.history("m", now_s - 7200, now_s, 60))


def test_a_start_waits_for_its_store(tmp_path: Path) -> None:
    """It goes on as if nothing had been."""
    world = World(tmp_path, setup())
    before, took_s = work(world)
    with locked(tmp_path) as other:
        threading.Timer(0.5, lambda: other.execute("ROLLBACK")).start()
        with world.planner() as controller:
            assert spent(controller) == pytest.approx(before)
            assert start_s(world) == took_s
            assert "restore" not in controller.health()["errors"]


def test_what_could_not_be_read_at_the_start_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The day's spend with what was spent since, the measured starts, and no batch counts twice."""
    monkeypatch.setattr(planner, "STORE_WAIT_S", 0.0)
    world = World(tmp_path, setup())
    before, took_s = work(world)
    sent = [(world.batch, [["m", int(world.clock.now_s()) - 1, 7, 0, 0, 0.0, 0.0]])]
    world.reports["g"]["batches"] = sent
    with locked(tmp_path) as other, world.planner() as controller:
        world.tick(controller)
        assert "restore" in controller.health()["errors"]
        assert spent(controller) < before
        other.execute("ROLLBACK")
        assert controller.store.flush()
        world.tick(controller)
        world.tick(controller)
        assert spent(controller) == pytest.approx(before + 2, abs=1.01)
        assert start_s(world) == took_s
        assert controller.health()["errors"] == {}
        assert arrivals(controller) == 7


def test_a_store_that_stays_away_does_not_keep_traffic_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a minute counts are taken all the same: forecasts live of them."""
    monkeypatch.setattr(planner, "STORE_WAIT_S", 0.0)
    world = World(tmp_path, setup())
    work(world)
    with locked(tmp_path), world.planner() as controller:
        world.tick(controller)
        assert world.came(controller, 3) == 0
        world.reports["g"]["batches"] = [
            (world.batch, [["m", int(world.clock.now_s()) - 1, 3, 0, 0, 0.0, 0.0]])
        ]
        world.clock.go(intake.WAIT_S)
        world.tick(controller)
        assert controller._active.observations["m"].arrivals == 3


@pytest.mark.parametrize(("away_s", "lit"), [(20.0, 3), (3 * 86400.0, 1)])
def test_after_days_one_request_lights_one_replica(tmp_path: Path, away_s: float, lit: int) -> None:
    """The load of before a weekend says nothing of Monday; that of before a kill does."""
    world = World(tmp_path, setup(policy="predictive", max_replicas=4, target_ongoing_requests=10.0))
    with world.planner() as controller:
        world.running["model-m"] = serve_view(3)
        world.seen(in_flight=25)
        for _ in range(90):
            world.tick(controller)
        assert controller._active.decisions["m"].replicas == 3
    world.clock.go(away_s)
    with world.planner() as controller:
        world.running["model-m"] = serve_view(0)
        world.seen(queued=1, in_flight=0)
        for _ in range(5):
            world.tick(controller)
        assert controller._active.decisions["m"].replicas == lit
