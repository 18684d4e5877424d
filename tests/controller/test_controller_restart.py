"""A controller that starts while its store can't be reached, and what it makes up for afterwards."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoscaling.core.types import Rung, State
from autoscaling.forecast.hazard import ROUNDS
from autoscaling.forecast.service import POOL_S, ForecastService
from autoscaling.live import intake, planner
from autoscaling.live.planner import Planner
from autoscaling.live.store import Store, database
from tests.controller.lab import NOW_S, Forecasts, World, report, serve_view, setup
from tests.fakes.waiting import until


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


def test_a_model_that_comes_back_into_the_fleet_after_days_begins_with_one_replica(tmp_path: Path) -> None:
    """Its load of then says no more than if no controller had looked meanwhile, though one did, after the others."""
    world = World(tmp_path)

    def redeployed(*names: str) -> None:
        world.models = tuple(
            setup(name, policy="kpa", max_replicas=4, target_ongoing_requests=10.0) for name in names
        )
        world.running = {model.deployment: serve_view() for model in world.models}
        world.reports = {"g": report(*names)}

    redeployed("m", "other")
    with world.planner() as controller:
        world.running["model-m"] = serve_view(4)
        world.seen(in_flight=25)
        for _ in range(90):
            world.tick(controller)
        assert controller._active.decisions["m"].replicas == 4
    redeployed("other")
    with world.planner() as controller:
        world.tick(controller)
        world.tick(controller, 3 * 86400.0)
    redeployed("m", "other")
    with world.planner() as controller:
        world.tick(controller)
        world.seen(queued=1)
        world.tick(controller)
        assert controller._active.decisions["m"].replicas == 1


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


MODELS = ("m1", "m2", "m3")


def forecasting(folder: Path) -> World:
    """With the real forecaster, whose processes have all the time they need."""
    folder.mkdir(exist_ok=True)
    world = World(folder, *map(setup, MODELS))

    def make(store: Store, horizon_s: Callable[[str], float]) -> ForecastService:
        def traffic(model: str) -> Any:
            return store.traffic(model, world.clock.now_s())

        return ForecastService(traffic, horizon_s, world.clock, time_budget_s=1e6)

    world.make_forecasts = make
    return world


def import_history(world: World) -> None:
    """Two days of requests, a quarter of an hour apart on average."""
    random = np.random.default_rng(3)
    store = Store.open(world.section["store"], clock=world.clock)
    seconds = {model: NOW_S - np.cumsum(random.gamma(0.6, 1500.0, 200)) for model in MODELS}
    store.import_traffic(
        [(model, float(s), 1, 0, 0, 1.0) for model in MODELS for s in np.floor(seconds[model][::-1])], 1.0
    )
    store.close()


def by_the_fleet(controller: Planner) -> int:
    """How many models were judged by the fleet's regression too."""
    service = controller.forecasts
    assert isinstance(service, ForecastService)
    return sum("fleet" in service.scores(model).get("next_arrival", {}) for model in MODELS)


def fits(controller: Planner) -> int:
    return int(controller.forecasts.health()["fits"])


def test_history_teaches_the_fleet_within_minutes_and_who_is_killed_leaves_it_to_the_next(
    tmp_path: Path,
) -> None:
    """The first fit of each model goes by it then."""
    world = forecasting(tmp_path / "one")
    import_history(world)
    with world.planner() as controller:
        for done in range(len(MODELS), len(MODELS) * ROUNDS + 1, len(MODELS)):
            until(lambda done=done: fits(controller) >= done)  # type: ignore[misc]
            assert by_the_fleet(controller) == 0
            world.clock.go(POOL_S + 1)
        until(lambda: by_the_fleet(controller) == len(MODELS))
        assert fits(controller) == len(MODELS) * (ROUNDS + 1)
        world.tick(controller, planner.LEARNED_EVERY_S)
        assert controller.store.flush()
        # As a process that is killed leaves it.
        shutil.copytree(world.folder, tmp_path / "two")
    after = forecasting(tmp_path / "two")
    after.clock = world.clock
    with after.planner() as controller:
        until(lambda: fits(controller) == len(MODELS))
        until(lambda: by_the_fleet(controller) == len(MODELS))
        assert fits(controller) == len(MODELS)
