"""A controller that starts while its store can't be reached, and what it makes up for afterwards."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from autoscaling.core.types import Rung, State
from autoscaling.live import intake, planner
from autoscaling.live.planner import Planner
from autoscaling.live.store import database
from tests.controller.lab import Forecasts, World, serve_view, setup


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


# What the forecaster learned of the fleet

LEARNED = State("fleet", {"round": 7.0}, histogram=(0.5, 1.5))


def learn(world: World, state: State = LEARNED) -> None:
    """A controller's life, in which its forecaster comes to know that."""
    with world.planner() as controller:
        world.forecasts.learned = state
        world.tick(controller, planner.LEARNED_EVERY_S + 1)
        controller.store.flush()
    world.forecasts = Forecasts()


def test_what_the_fleet_had_learned_outlives_the_controller(tmp_path: Path) -> None:
    """Before the first fit. And who has learned nothing yet, or can't forecast, takes nothing away."""
    world = World(tmp_path, setup())
    with world.planner():
        assert world.forecasts.restored == []
    learn(world)
    for _ in range(2):
        with world.planner() as controller:
            assert world.forecasts.restored == [LEARNED]
            world.tick(controller, planner.LEARNED_EVERY_S + 1)
        world.forecasts = Forecasts()
    made = world.make_forecasts
    world.make_forecasts = lambda store, horizon_s: planner.NoForecasts("there is no numpy")
    with world.planner() as controller:
        world.tick(controller, planner.LEARNED_EVERY_S + 1)
    world.make_forecasts = made
    with world.planner():
        assert world.forecasts.restored == [LEARNED]


def test_what_the_fleet_has_learned_is_written_once_a_minute_at_most(tmp_path: Path) -> None:
    world = World(tmp_path, setup())
    with world.planner() as controller:
        world.forecasts.learned = LEARNED
        world.tick(controller, planner.LEARNED_EVERY_S - 1)
        assert planner.FLEET_KEY not in controller.store.states()
        world.tick(controller)
        assert controller.store.states()[planner.FLEET_KEY] == LEARNED


def test_what_the_fleet_had_learned_is_made_up_for_and_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the store is away its successor learns little, and must not take that for what is kept."""
    monkeypatch.setattr(planner, "STORE_WAIT_S", 0.0)
    world = World(tmp_path, setup())
    learn(world)
    with locked(tmp_path) as other, world.planner() as controller:
        world.forecasts.learned = State("fleet", {"round": 1.0})
        world.tick(controller, planner.LEARNED_EVERY_S + 1)
        assert world.forecasts.restored == []
        other.execute("ROLLBACK")
        assert controller.store.flush()
        world.tick(controller)
        assert world.forecasts.restored == [LEARNED]
        assert controller.store.states()[planner.FLEET_KEY] == LEARNED
