"""The controller on a real cluster: it prewarms, is told what to do, and may be killed."""

from __future__ import annotations

import time
from typing import Any

import psutil
import pytest

from tests.live.lab import Relight, kill, until
from tests.live.test_live_kills import CLIENTS, Load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CONTROLLER = "ray::ServeReplica:default:controller"
SERVE = "ray::ServeController"


def arrivals(relight: Relight, model: str) -> int:
    """Requests that the controller has ever been told of."""
    history = relight.control("GET", f"history?model={model}&since=86400&step_s=3600")
    return int(sum(point["arrivals"] for point in history["points"]))


def decisions(relight: Relight, model: str, since_s: float) -> list[Any]:
    """Those that were made since then (Unix time)."""
    found = relight.control("GET", f"decisions?model={model}&since=600")["decisions"]
    return [each for each in found if each["made_s"] >= since_s]


def is_well(relight: Relight) -> bool:
    """Whether the controller decides, and nothing has failed."""
    health = relight.status()["controller"]
    assert health["ok"], health
    return True


def test_a_prewarm_brings_a_replica_without_a_request(relight: Relight) -> None:
    """And lets it go when it is undone; the start counts as one that nobody waited for."""
    relight.dark("embed")
    until("the controller to be well", lambda: is_well(relight))
    came = arrivals(relight, "embed")
    made = relight.control("POST", "prewarms", {"model": "embed", "for_s": 30})["prewarm"]
    engine = relight.ready_engine("embed")
    until("its replica to run", lambda: relight.model("embed")["replicas"] == 1)
    assert relight.embed("embed").header("x-relight-cold-start") == "false"
    until("the request to be counted", lambda: arrivals(relight, "embed") == came + 1)
    starts = until(
        "the start to be recorded",
        lambda: (
            [
                s
                for s in relight.control("GET", "coldstarts?model=embed&since=600")["cold_starts"]
                if s["engine_id"] == engine["engine_id"]
            ]
            or None
        ),
    )
    assert [start["prewarmed"] for start in starts] == [True]
    outcome = relight.control("GET", "prewarms?model=embed")["outcomes"][-1]
    assert outcome["reason"] == "manual"
    assert outcome["hit_s"] is not None
    relight.control("DELETE", f"prewarms/{made['id']}")
    relight.dark("embed")


def test_a_policy_that_is_set_changes_what_is_done(relight: Relight) -> None:
    """A fixed replica comes without a request, and goes when the policy is unset."""
    relight.dark("embed")
    relight.control("PUT", "policies/embed", {"policy": "fixed", "params": {"replicas": 1}})
    try:
        relight.ready_engine("embed")
        assert relight.control("GET", "explain/embed")["decision"]["reason"] == "fixed"
    finally:
        relight.control("DELETE", "policies/embed")
    relight.dark("embed")


def test_killed_controllers_cost_no_request_no_replica_and_no_history(relight: Relight) -> None:
    """Relight's and then Serve's, under load: the same engine serves on, and every request is in the history."""
    relight.templates_ready("chat")
    relight.dark("chat")
    came = arrivals(relight, "chat")
    load = Load(relight)
    with load.running():
        until("the load to be served", lambda: load.whole_since(0) >= CLIENTS, patience_s=120)
        engine = relight.ready_engine("chat")["engine_id"]
        loaded_s = time.time()
        for title in (CONTROLLER, SERVE):
            process = relight.process(title)
            kill(process)
            served = load.whole_since(0)
            until(
                f"another {title}",
                lambda title=title, pid=process.pid: any(p.pid != pid for p in relight.processes(title)),
            )
            until("it to be well", lambda: is_well(relight))
            until("service to go on", lambda served=served: load.whole_since(0) >= served + 2 * CLIENTS)
        assert relight.ready_engine("chat")["engine_id"] == engine
        planned = [d["replicas"] for d in decisions(relight, "chat", loaded_s)]
        assert 0 not in planned, planned
    bad = [outcome for outcome in load.outcomes if outcome.kind != "whole"]
    assert not bad, bad
    until("every request to be counted", lambda: arrivals(relight, "chat") == came + len(load.outcomes))
    relight.dark("chat")


def test_at_rest_the_controller_costs_next_to_nothing(relight: Relight) -> None:
    """It looks every second; a tick of a quiet fleet takes a few milliseconds, in its own words."""
    relight.dark("chat", "embed")
    process = psutil.Process(relight.process(CONTROLLER).pid)
    began = process.cpu_times()
    ticked_s = relight.status()["controller"]["last_tick_s"]
    until("ten ticks", lambda: relight.status()["controller"]["last_tick_s"] >= ticked_s + 10, every_s=2.0)
    ended = process.cpu_times()
    used_s = ended.user + ended.system - began.user - began.system
    assert used_s < 0.8, used_s


def test_no_call_is_logged(relight: Relight) -> None:
    """A lease for each request and a report each second would fill the disk; what Serve says else is there."""
    assert relight.complete("chat").status == 200
    relight.dark("chat")
    folder = relight.checkout.run_dir / "ray" / "session_latest" / "logs"
    logs = [*folder.glob("worker-*.err"), *(folder / "serve").glob("replica_*.log")]
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    assert any("Finished initializing replica" in line for line in lines)
    called = [line for line in lines if " -- CALL " in line and "default_gateway" not in line]
    assert not called, called[:5]


def test_serves_handles_are_what_they_are_taken_for(relight: Relight) -> None:
    """Else a start that goes through Serve would begin later, and the gateway's log says so."""
    folder = relight.checkout.run_dir / "ray" / "session_latest" / "logs" / "serve"
    logs = [log.read_text(errors="replace") for log in folder.glob("replica_default_gateway_*.log")]
    assert any("the gateway listens on" in log for log in logs)
    assert not any("with the next sample only" in log for log in logs)
