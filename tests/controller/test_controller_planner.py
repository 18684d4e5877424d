"""The planner as a whole: a real store, a real loop, and a cluster by hand."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from autoscaling.core.types import Forecast, NextArrival, Reason, Rung
from autoscaling.live import planner as planner_module
from autoscaling.live.control import Control
from autoscaling.live.planner import Planner
from autoscaling.live.records import ColdStartRow, Override
from autoscaling.live.rungs import KEPT_STARTS
from tests.controller.lab import NOW_S, HandClock, World, engine, report, serve_view, setup


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def planner(world: World) -> Iterator[Planner]:
    """A controller that has seen a dark model."""
    with world.planner() as planner:
        world.tick(planner)
        world.tick(planner)
        yield planner


def said(planner: Planner, kind: Any, value: Any, model: str | None = "m", **changes: Any) -> Override:
    """Something that a person says now."""
    now_s = planner.now_s()
    override = Override(secrets.token_hex(4), kind, model, value, "test", now_s, **changes)
    planner.store.put_override(override)
    planner.overrides_changed()
    return override


def prewarm(planner: Planner, replicas: int = 1, for_s: float = 60.0, rung: str = "serving") -> Override:
    now_s = planner.now_s()
    value = {"replicas": replicas, "rung": rung, "start_s": now_s, "end_s": now_s + for_s}
    return said(planner, "prewarm", value, until_s=now_s + for_s)


def test_a_controller_knows_whether_anything_can_be_parked(world: World) -> None:
    """And refuses what would be answered as done, and never come about."""
    body = json.dumps({"model": "m", "rung": "parked"}).encode()
    for budget_bytes, wanted in ((1, 200), (0, 422)):
        world.park_budget_bytes = budget_bytes
        with world.planner() as planner:
            token = "a-token-of-a-test-run"
            answer = Control(planner, token).handle(
                "POST", "/relight/v1/prewarms", {}, body, f"Bearer {token}"
            )
            assert answer[0] == wanted, answer


def test_a_dark_model_stays_dark(world: World, planner: Planner) -> None:
    """And the plan says so before it expires, over and over."""
    for _ in range(12):
        world.tick(planner)
    assert {plan.entries["m"].replicas for plan in world.plans[1:]} == {0}
    assert world.plans[-1].expires_s > world.clock.now_s()
    assert planner.health()["ok"], planner.health()
    assert len(world.plans) < 8


def test_what_was_waited_is_what_gateways_counted(world: World, planner: Planner) -> None:
    """Also where the queue is gone before the next tick; and the start for which it was is one."""
    world.tick(planner)
    world.waited_s = 0.08
    world.came(planner, 1)
    world.tick(planner)
    world.running["model-m"] = serve_view(starting=1)
    world.tick(planner)
    (row,) = planner.store.usage("2000-01-01", "2100-01-01")
    assert (row.requests, row.cold_requests, row.cold_starts, row.waited_s) == (1, 1, 1, pytest.approx(0.08))


def test_what_came_in_an_outage_is_not_booked_as_cold(world: World, planner: Planner) -> None:
    """A gateway that nobody heard for an hour tells of requests that a replica may have answered, which is gone now."""
    world.tick(planner)
    now = int(world.clock.now_s())
    rows = [["m", second, 2, 0, 0, 0.0, 0.0] for second in (now - 3600, now - 1800, now - 1)]
    world.reports["g"]["batches"] = [(1, rows)]
    for _ in range(3):
        world.tick(planner)
    (row,) = planner.store.usage("2000-01-01", "2100-01-01")
    assert (row.requests, row.cold_requests) == (6, 2)


def test_before_anything_is_seen_everything_is_held(world: World) -> None:
    """An empty view scales no loaded model down."""
    with world.planner() as planner:
        planner.tick()
        assert world.planned() is None
        assert planner.decisions()["m"].reason is Reason.UNKNOWN_HOLD


def test_a_prewarm_brings_a_replica_and_its_end_lets_it_go(world: World, planner: Planner) -> None:
    """Without a request; and it is accounted for."""
    prewarm(planner)
    world.tick(planner)
    assert world.planned() == 1
    assert planner.decisions()["m"].reason is Reason.MANUAL
    world.running["model-m"] = serve_view(starting=1)
    world.tick(planner)
    world.running["model-m"] = serve_view(1)
    for _ in range(80):
        world.tick(planner)
    assert world.planned() == 0
    (row,) = planner.store.prewarms("m", 0)
    assert (row.reason, row.replicas, row.hit_s) == ("manual", 1, None)
    assert row.ended_s is not None
    assert 55 < row.cost_gpu_s < 85


def test_a_prewarm_that_is_met_has_spared_its_wait(world: World, planner: Planner) -> None:
    """What the request would have waited is the model's own measured start."""
    now_s = world.clock.now_s()
    world.metrics.rungs.add(ColdStartRow("m", "e", now_s - 60, now_s - 64, 4.0, "forked"))
    prewarm(planner)
    world.tick(planner)
    world.running["model-m"] = serve_view(1)
    world.tick(planner)
    world.came(planner, 1)
    world.seen(in_flight=1)
    world.tick(planner)
    (row,) = planner.store.prewarms("m", 0)
    assert row.hit_s is not None
    assert (row.spared_requests, row.spared_wait_s) == (1, pytest.approx(4.0))


def test_demand_is_carried_and_a_loaded_model_is_kept(world: World) -> None:
    """By requests in progress over the target."""
    world = World(world.folder, setup(max_replicas=4, target_ongoing_requests=2.0))
    with world.planner() as planner:
        world.running["model-m"] = serve_view(1)
        world.seen(in_flight=5)
        for _ in range(30):
            world.tick(planner)
        assert world.planned() == 3


def test_a_policy_that_is_set_changes_what_is_done(world: World, planner: Planner) -> None:
    """From the next tick on, and until it is undone."""
    override = said(planner, "policy", {"policy": "fixed", "params": {"replicas": 1}})
    world.tick(planner)
    assert (world.planned(), planner.decisions()["m"].policy) == (1, "fixed")
    planner.store.undo_override(override.id, "test", planner.now_s())
    planner.overrides_changed()
    for _ in range(15):
        world.tick(planner)
    assert (world.planned(), planner.decisions()["m"].policy) == (0, "keep-alive")


@pytest.mark.parametrize("mode", ["shadow", "off"])
def test_a_mode_that_changes_nothing(world: World, planner: Planner, mode: str) -> None:
    """The plan has no opinion, so that Serve scales by the load; decisions are kept apart, or not at all."""
    prewarm(planner)
    said(planner, "mode", {"mode": mode}, model=None)
    before = len(planner.store.decisions(None, 0, math.inf))
    for _ in range(3):
        world.tick(planner)
    assert (planner.mode(), world.planned()) == (mode, None)
    assert len(planner.store.decisions(None, 0, math.inf)) == before
    kept = planner.store.decisions(None, 0, math.inf, source="shadow")
    assert bool(kept) == (mode == "shadow")
    assert planner.store.prewarms("m", 0) == []
    said(planner, "mode", {"mode": "active"}, model=None)
    world.tick(planner)
    assert world.planned() == 1


def test_a_decision_that_only_stands_for_longer_is_published_and_is_no_row(tmp_path: Path) -> None:
    """Nor in the mode `shadow`, nor of a shadow policy: a busy model would push the others out of the store."""
    world = World(tmp_path, setup(keep_alive_s=60.0))
    world.running["model-m"] = serve_view(1)
    with world.planner() as planner:
        said(planner, "shadow", {"name": "s", "policy": "reactive"}, model=None)
        until_s = set()
        for second in range(120):
            if second == 60:
                said(planner, "mode", {"mode": "shadow"}, model=None)
            # A request that is over between two looks: the idle time begins anew.
            if second % 3 == 0:
                world.reports["g"] = deepcopy(world.reports["g"])
                world.seen(last_busy_s=planner.now_s())
            world.tick(planner)
            until_s.add(planner.decisions()["m"].until_s)
        assert len(until_s) > 15
        assert len({plan.entries["m"].until_s for plan in world.plans}) > 10
        world.seen(in_flight=3)
        world.tick(planner)
        for source in ("active", "shadow", "shadow:s"):
            rows = planner.store.decisions("m", 0, math.inf, source=source)
            told = [tuple(row[name] for name in ("replicas", "rung", "reason", "clamps")) for row in rows]
            assert 0 < len(told) < 5, (source, told)
            assert all(one != other for one, other in pairwise(told))
            # The last one's numbers are those of its change.
            assert (rows[-1]["reason"] == "demand") == (source != "active")


def test_a_shadow_policy_decides_beside_the_active_one(world: World, planner: Planner) -> None:
    """Its decisions and what it would have cost stand under its own name."""
    said(planner, "shadow", {"name": "always", "policy": "fixed", "params": {"replicas": 1}}, model=None)
    for _ in range(30):
        world.tick(planner)
    assert world.planned() == 0
    assert planner.shadow_decisions()["always"]["m"].replicas == 1
    usage = {row.source: row for row in planner.store.usage("2000-01-01", "2100-01-01")}
    assert usage["shadow:always"].gpu_s["serving"] == pytest.approx(29, abs=2)
    assert "active" not in usage
    decided = planner.store.decisions("m", 0, math.inf, source="shadow:always")
    assert decided[-1]["replicas"] == 1


def test_a_shadow_is_compared_with_what_the_active_policy_used_since_it_began(
    world: World, planner: Planner
) -> None:
    """What was used before it began, even on the same day, is not held against the active policy."""
    said(planner, "policy", {"policy": "fixed", "params": {"replicas": 1}})
    world.running = {setup.deployment: serve_view(1) for setup in world.models}
    for _ in range(30):
        world.tick(planner)
    said(planner, "shadow", {"name": "late", "policy": "fixed", "params": {"replicas": 0}}, model=None)
    for _ in range(10):
        world.came(planner, 2)
        world.tick(planner)
    usage = {row.source: row for row in planner.store.usage("2000-01-01", "2100-01-01")}
    assert usage["active"].gpu_s["serving"] == pytest.approx(38, abs=3)
    assert usage["beside:late"].gpu_s["serving"] == pytest.approx(9, abs=2)
    # Those of the tick at which the shadow began came before it.
    assert usage["active"].requests == 20
    assert usage["beside:late"].requests == usage["shadow:late"].requests == 18


def test_a_shadow_of_the_fleet_file_is_there_from_the_start(tmp_path: Path) -> None:
    """As if somebody had said it."""
    world = World(tmp_path, shadow={"name": "s", "policy": "fixed", "params": {}, "wait_cost": None})
    with world.planner() as planner:
        world.tick(planner)
        world.tick(planner)
        assert planner.shadow_decisions()["s"]["m"].policy == "fixed"


def test_a_forecast_of_a_request_prewarms(tmp_path: Path) -> None:
    """In time for it, and not at once."""
    world = World(tmp_path, setup(policy="predictive"))
    with world.planner() as planner:
        world.tick(planner)
        now_s = planner.now_s()
        comes = NextArrival(now_s, (0.0, 40.0, 42.0, 120.0), (1.0, 1.0, 0.01, 0.0))
        world.forecasts.says["m"] = Forecast(now_s, "test", comes)
        begun_s = None
        for _ in range(40):
            world.tick(planner)
            if world.planned() and begun_s is None:
                begun_s = planner.now_s()
                assert planner.decisions()["m"].reason is Reason.PREWARM
        assert begun_s is not None
        assert 20 < begun_s - now_s <= 40


# Its end, and its successor


def test_a_successor_goes_on_from_the_store(world: World) -> None:
    """The plan is published again before anything is seen; overrides hold; the prewarm is booked once."""
    with world.planner() as planner:
        world.tick(planner)
        prewarm(planner)
        said(planner, "policy", {"wait_cost": 77.0})
        world.tick(planner)
        world.running["model-m"] = serve_view(1)
        world.tick(planner)
        assert world.planned() == 1
        planner.store.flush()
    world.clock.go(3)
    world.plans.clear()
    with world.planner() as planner:
        assert world.planned() == 1
        planner.tick()
        assert world.planned() in (1, None)
        world.tick(planner)
        world.tick(planner)
        assert world.planned() == 1
        assert planner.models()["m"].wait_cost == 77.0
        world.came(planner, 1)
        world.seen(in_flight=1)
        world.tick(planner)
        (row,) = planner.store.prewarms("m", 0)
        assert row.hit_s is not None
        assert row.spared_requests == 1
        assert row.cost_gpu_s > 0


@pytest.mark.parametrize("ago_s", [600, 2 * 3600, 3 * 86400, 40 * 86400])
def test_a_successor_knows_the_second_of_the_last_request(world: World, ago_s: int) -> None:
    """However coarse the level is that still has it."""
    came_s = int(NOW_S) // 3600 * 3600 - ago_s - 1
    with world.planner() as planner:
        planner.store.import_traffic([("m", float(at_s), 1, 0, 0, 0.0) for at_s in (came_s - 9, came_s)], 1.0)
    with world.planner() as planner:
        planner.tick()
        assert planner.observations()["m"].last_arrival_s == came_s


def test_a_successor_knows_when_a_long_request_ended(tmp_path: Path) -> None:
    """Though its gateways are new, too, and it came ten minutes before."""
    world = World(tmp_path, setup(keep_alive_s=60.0))
    world.running["model-m"] = serve_view(1)
    with world.planner() as planner:
        world.came(planner, 1)
        world.seen(in_flight=1)
        for _ in range(600):
            world.tick(planner)
        world.seen(in_flight=0)
        world.tick(planner)
        ended_s = planner.now_s()
        planner.store.flush()
    world.reports = {"new": report("m", source="new")}
    world.clock.go(5)
    with world.planner() as planner:
        world.tick(planner)
        seen = planner.observations()["m"]
        assert (seen.last_arrival_s, seen.last_busy_s) == (NOW_S - 1, ended_s)
        assert (world.planned(), planner.decisions()["m"].until_s) == (1, ended_s + 60)


def test_a_last_request_whose_second_is_not_known_is_not_taken_for_one_of_the_future(world: World) -> None:
    with world.planner() as planner:
        planner.store.import_traffic([("m", NOW_S // 3600 * 3600, 1, 0, 0, 0.0)], 3600.0)
    with world.planner() as planner:
        planner.tick()
        assert planner.observations()["m"].last_arrival_s == planner.now_s()


def test_a_plan_that_expired_meanwhile_is_not_published_again(world: World) -> None:
    """Nobody may act on it."""
    with world.planner() as planner:
        prewarm(planner, for_s=5)
        world.tick(planner)
        assert world.plans
        planner.store.flush()
    world.clock.go(60)
    world.plans.clear()
    with world.planner():
        assert world.plans == []


def test_measured_starts_and_capacity_outlive_the_controller(world: World) -> None:
    """Lead times are not learned anew."""
    with world.planner() as planner:
        world.reports["g"]["starts"] = [
            {
                "model": "m",
                "engine_id": "e",
                "kind": "prebuilt",
                "begun_s": NOW_S,
                "ready_s": NOW_S + 7,
                "total_s": 7.0,
                "prewarmed": False,
                "phases": [],
            }
        ]
        world.tick(planner)
        planner.store.flush()
    world.reports["g"]["starts"] = []
    with world.planner() as planner:
        world.tick(planner)
        profiles = {p.rung: p for p in planner.observations()["m"].rungs}
        assert (profiles[Rung.TEMPLATE].delay_s, profiles[Rung.TEMPLATE].starts) == (7.0, 1)


def test_models_are_watched_once_the_clock_is_set(tmp_path: Path) -> None:
    """A machine that begins at 1970 knows of no silence since then, and of the one since NTP told it the time."""
    world = World(tmp_path)
    world.clock = HandClock(30.0)
    with world.planner() as controller:
        world.tick(controller)
        assert controller.store.watched_since_s("m") is None
        world.clock.jump(NOW_S)
        world.tick(controller)
        assert controller.store.watched_since_s("m") == int(world.clock.now_s())


def test_a_start_in_which_the_machine_slept_is_not_learned_from(world: World) -> None:
    """It is on record, and neither this controller nor the next expects another to take so long."""
    slept_s = 8 * 3600.0 + 4.0
    told = {"model": "m", "engine_id": "m-1", "kind": "prebuilt", "phases": [], "prewarmed": False}
    times = {"begun_s": world.clock.now_s(), "ready_s": world.clock.now_s() + slept_s, "total_s": slept_s}
    world.clock.jump(slept_s)
    world.reports["g"]["starts"] = [told | times]
    for _ in range(2):
        with world.planner() as controller:
            world.tick(controller)
            assert {p.starts for p in controller.observations()["m"].rungs} == {0}
            assert [row.total_s for row in controller.store.cold_starts("m", 0)] == [slept_s]
        world.reports["g"]["starts"] = []


def test_a_model_that_starts_often_pushes_out_no_other_models_starts(tmp_path: Path) -> None:
    """A successor knows of the rare one what was measured, however much came between."""
    world = World(tmp_path, setup("often"), setup("rare"))
    with world.planner() as planner:
        planner.store.add_cold_start(
            ColdStartRow("rare", "r", NOW_S - 86400, NOW_S - 86495, 95.0, "forked", rung=Rung.WEIGHTS)
        )
        for number in range(10_000):
            ready_s = NOW_S - 10_000 + number
            planner.store.add_cold_start(
                ColdStartRow("often", f"o{number}", ready_s, ready_s - 3, 3.0, "forked", rung=Rung.WEIGHTS)
            )
    with world.planner():
        for model, delay_s, starts in (("often", 3.0, KEPT_STARTS), ("rare", 95.0, 1)):
            (profile,) = world.metrics.rungs.profiles(model, {Rung.WEIGHTS: 0.0})
            assert (profile.delay_s, profile.starts) == (delay_s, starts)


def test_starts_of_engines_that_are_gone_are_forgotten(world: World, planner: Planner) -> None:
    """Not while their gateway is only silent: what somebody waited for would be told again as a prewarm's."""
    began_s = planner.now_s()
    engines = [engine(engine_id=f"e{i}", requested_s=began_s, ready_s=began_s + 2) for i in range(3)]
    told = {"begun_s": began_s, "ready_s": began_s + 2, "total_s": 2.0, "prewarmed": False, "phases": []}
    starts = [{**told, "model": "m", "engine_id": e["engine_id"], "kind": "prebuilt"} for e in engines]
    world.reports["g"] |= {"engines": engines, "starts": starts}
    world.tick(planner)
    reports, world.reports = {"g": world.reports["g"] | {"starts": []}}, {}
    for _ in range(30):
        world.tick(planner)
    world.reports = reports
    for _ in range(10):
        world.tick(planner)
    assert [row.prewarmed for row in planner.store.cold_starts("m", 0)] == [False] * 3
    world.reports["g"]["engines"] = engines[:1]
    for _ in range(3):
        world.tick(planner, planner_module.KNOWN_FOR_S / 2)
    assert [engine_id for engine_id, _ in planner._known_starts] == ["e0"]


def test_a_start_that_nobody_waited_for_is_found_in_the_reports(world: World, planner: Planner) -> None:
    """A prewarm's: from the decision to the engine being ready, the replica's own start included."""
    prewarm(planner)
    world.tick(planner)
    begun_s = planner.now_s()
    ready = engine(requested_s=begun_s + 2, ready_s=begun_s + 3)
    world.reports["g"]["engines"] = [ready]
    world.running["model-m"] = serve_view(1)
    for _ in range(10):
        world.tick(planner)
    (row,) = planner.store.cold_starts("m", 0)
    assert (row.prewarmed, row.total_s, row.rung) == (True, pytest.approx(3.0), Rung.TEMPLATE)
    for _ in range(10):
        world.tick(planner)
    assert len(planner.store.cold_starts("m", 0)) == 1


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_such_a_start_is_found_after_the_clock_was_set(world: World, planner: Planner, jump_s: float) -> None:
    """And only that: of one that was ready before this controller began, the one before it told."""
    old = engine(engine_id="m-0", requested_s=NOW_S - 604, ready_s=NOW_S - 600)
    world.reports["g"]["engines"] = [old]
    world.tick(planner)
    world.clock.jump(jump_s)
    begun_s = planner.now_s()
    world.reports["g"]["engines"] = [old, engine(requested_s=begun_s + 1, ready_s=begun_s + 3)]
    for _ in range(12):
        world.tick(planner)
    assert [row.engine_id for row in planner.store.cold_starts("m", 0)] == ["m-1"]


def test_no_request_is_lost_or_counted_twice_by_a_kill(world: World) -> None:
    """What was not acknowledged is sent again to the successor."""
    with world.planner() as planner:
        world.tick(planner)
        assert world.came(planner, 3) == 0
        lost = world.reports["g"] | {
            "batches": [(1, [["m", int(world.clock.now_s()) - 1, 3, 0, 0, 0.0, 0.0]])]
        }
        planner.store.flush()
    with world.planner() as planner:
        planner.take_report("g", lost)
        world.tick(planner)
        world.came(planner, 2)
        now_s = planner.now_s()
        history = planner.store.history("m", now_s - 600, now_s + 1, 60)
        assert sum(point["arrivals"] for point in history) == 5
        assert [arrived[2] for arrived in world.forecasts.arrivals] == [3, 2]


# Whatever fails


def test_a_store_that_can_t_be_used_is_said_and_done_without(tmp_path: Path) -> None:
    """A wrong URL: it decides, from this process's memory, and leaves nothing behind."""
    world = World(tmp_path, store="mysql://nowhere/x")
    with world.planner() as planner:
        world.tick(planner)
        prewarm(planner)
        world.tick(planner)
        assert world.planned() == 1
        health = planner.health()
        assert not health["ok"]
        assert "mysql" in health["store"]["error"]
        folder = planner._temporary
        assert folder is not None
        assert folder.is_dir()
    assert not folder.exists()


def test_a_database_that_is_away_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a full disk: what comes is kept in memory, decisions go on, and it is said."""
    monkeypatch.setattr(planner_module, "STORE_WAIT_S", 1.0)
    (tmp_path / "file").write_text("in the way")
    world = World(tmp_path, store=f"sqlite:///{tmp_path / 'file' / 'relight.db'}")
    with world.planner() as planner:
        world.running["model-m"] = serve_view(1)
        world.seen(in_flight=3)
        for _ in range(30):
            world.tick(planner)
        assert world.planned() == 1
        assert not planner.health()["store"]["ok"]
        world.seen(in_flight=0, last_busy_s=planner.now_s())
        for _ in range(20):
            world.tick(planner)
        assert world.planned() == 0


def test_a_forecaster_that_can_t_start_is_said_and_done_without(world: World) -> None:
    """A library that is missing, say."""

    def missing(*_: Any) -> Any:
        raise ImportError("no statsforecast")

    world.make_forecasts = missing
    with world.planner() as planner:
        world.tick(planner)
        world.came(planner, 1)
        world.seen(queued=1)
        world.tick(planner)
        assert world.planned() == 1
        assert "no statsforecast" in planner.health()["forecaster"]["error"]
        assert not planner.health()["ok"]


def test_a_forecaster_that_raises_is_said_and_done_without(world: World, planner: Planner) -> None:
    """The model is scaled by what is seen."""

    def raises(model: str, now_s: float) -> Forecast | None:
        raise RuntimeError("broken")

    world.forecasts.forecast = raises  # type: ignore[method-assign]
    world.came(planner, 1)
    world.seen(queued=1)
    world.tick(planner)
    assert world.planned() == 1
    assert "broken" in str(planner.health()["errors"])


def test_a_policy_that_raises_holds_its_model_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What there is stays; the error is in the health until it works again."""
    world = World(tmp_path, setup(policy="no-such-policy"), setup("other"))
    with world.planner() as planner:
        world.running["model-m"] = serve_view(2)
        world.seen("other", queued=1)
        world.tick(planner)
        world.tick(planner)
        assert (world.planned(), world.planned("other")) == (None, 1)
        assert "no-such-policy" in str(planner.health()["errors"])


def test_a_part_of_the_tick_that_fails_keeps_no_other_from_its_work(
    world: World, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is said until it works again."""

    def raises(*_: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(Planner, "_find_prewarmed", raises)
        patched.setattr(Planner, "_tick_shadows", raises)
        prewarm(planner)
        world.tick(planner)
        assert world.planned() == 1
        assert {"starts", "shadows"} <= planner.health()["errors"].keys()
    world.tick(planner)
    assert planner.health()["errors"] == {}


def test_a_plan_that_can_t_be_published_is_tried_at_every_tick(world: World, planner: Planner) -> None:
    """The GCS is away: policies act on the last plan until it expires."""

    def away(_: Any) -> None:
        raise ConnectionError("the GCS is away")

    publish, world.publish = world.publish, away
    prewarm(planner)
    world.tick(planner)
    assert "GCS" in str(planner.health()["errors"])
    world.publish = publish
    world.tick(planner)
    assert world.planned() == 1
    assert planner.health()["ok"], planner.health()


@pytest.mark.parametrize("jump_s", [-86400.0, -5.0, 30.0, 86400.0])
def test_a_clock_that_is_set_scales_no_loaded_model_down_and_no_idle_one_up(
    tmp_path: Path, jump_s: float
) -> None:
    """Forwards or back, by little or by much."""
    world = World(tmp_path, setup(), setup("idle"))
    with world.planner() as planner:
        world.running["model-m"] = serve_view(1)
        world.seen(in_flight=1)
        for _ in range(10):
            world.tick(planner)
        assert (world.planned(), world.planned("idle")) == (1, 0)
        world.clock.jump(jump_s)
        for _ in range(20):
            world.tick(planner)
            assert world.planned() in (1, None)
            assert world.planned("idle") in (0, None)
            assert world.plans[-1].expires_s <= planner.now_s() + 10
        assert (world.planned(), world.planned("idle")) == (1, 0)


def test_an_override_that_is_not_understood_is_said_and_left_out(world: World, planner: Planner) -> None:
    """One that another release wrote; until it is undone."""
    override = said(planner, "policy", {"policy": "from-the-future"})
    world.tick(planner)
    assert planner.models()["m"].policy == "keep-alive"
    assert "from-the-future" in str(planner.health()["errors"])
    planner.store.undo_override(override.id, "test", planner.now_s())
    planner.overrides_changed()
    world.tick(planner)
    assert planner.health()["ok"], planner.health()


@pytest.mark.parametrize("end", ["prewarm", "mode"])
def test_what_could_not_be_warmed_is_said_while_it_is_to_be(
    world: World, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for ever after its prewarm is over, and not in a mode that warms nothing."""
    answer = {"rung": "weights", "working": False, "reason": "no room"}
    monkeypatch.setattr(world, "_warm", lambda *_: answer)
    world.reports["g"]["host_models"] = [{"model": "m", "rung": "weights"}]
    with world.planner() as planner:
        world.tick(planner)
        asked = prewarm(planner, rung="template", replicas=0, for_s=3600)
        for _ in range(500):
            world.tick(planner)
            if planner.health()["errors"]:
                break
            time.sleep(0.01)  # hosts are asked by other threads
        assert planner.health()["errors"] == {"warm m": "no room"}
        if end == "prewarm":
            planner.store.undo_override(asked.id, "test", planner.now_s())
            planner.overrides_changed()
        else:
            said(planner, "mode", {"mode": "off"}, model=None)
        world.tick(planner)
        assert planner.health()["ok"], planner.health()


def test_specs_are_read_anew_when_an_override_ends(world: World, planner: Planner) -> None:
    """Not only every few seconds."""
    said(planner, "policy", {"wait_cost": 5.0}, until_s=planner.now_s() + 2.5)
    world.tick(planner)
    assert planner.models()["m"].wait_cost == 5.0
    world.tick(planner)
    assert planner.models()["m"].wait_cost == 5.0
    world.tick(planner)
    assert planner.models()["m"].wait_cost == 10.0


def test_the_horizon_is_the_models_longest_start(world: World, planner: Planner) -> None:
    """A minute at least."""
    assert planner.horizon_s("m") == max(p.delay_high_s for p in planner.observations()["m"].rungs)
    assert planner.horizon_s("unknown") == planner_module.LEAST_HORIZON_S


def test_a_rung_that_is_asked_for_is_brought_about(world: World, planner: Planner) -> None:
    """By the node's engine host."""
    world.reports["g"]["host_models"] = [{"model": "m", "rung": "weights"}]
    prewarm(planner, rung="template", replicas=0, for_s=300)
    for _ in range(15):
        world.tick(planner)
    assert world.planned() == 0
    assert [(node, message["rung"]) for node, message in world.warmed][:1] == [("node-1", "template")]
    assert world.requests == []
