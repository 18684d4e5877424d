"""What a model is doing, from what gateways and Serve say."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaling.live.observer import fleet_status, model_state

NOTHING = {"failure": None, "seen_ready": False, "queued": 0, "in_flight": 0, "last_cold_start": None}


@pytest.mark.parametrize(
    ("engines", "replicas", "seen", "state"),
    [
        ([], {}, {}, "dark"),
        ([], {}, {"queued": 1}, "lighting"),
        ([], {"STARTING": 1}, {}, "lighting"),
        (["starting"], {}, {}, "lighting"),
        (["starting"], {"RUNNING": 1}, {}, "lighting"),
        (["ready"], {}, {}, "ready"),
        (["ready"], {"RUNNING": 1}, {}, "ready"),
        (["ready", "draining"], {"RUNNING": 1, "STOPPING": 1}, {}, "ready"),
        ([], {"RUNNING": 1}, {"seen_ready": True}, "ready"),
        ([], {}, {"seen_ready": True}, "dark"),
        (["draining"], {}, {}, "draining"),
        ([], {"STOPPING": 1}, {"queued": 1}, "draining"),
        (["parked"], {}, {}, "parked"),
        (["parked"], {}, {"queued": 1}, "lighting"),
        ([], {}, {"failure": "torn"}, "failed"),
        (["starting"], {"RUNNING": 1}, {"failure": "torn"}, "failed"),
        (["ready"], {}, {"failure": "torn"}, "ready"),
    ],
)
def test_state(engines: list[str], replicas: dict[str, int], seen: dict[str, Any], state: str) -> None:
    """The most awake wins, but a failure is not hidden."""
    assert model_state([{"state": s} for s in engines], replicas, [{**NOTHING, **seen}]) == state


def report(node: str, *engines: str, remote: Any = (), **seen: Any) -> dict[str, Any]:
    """A gateway's report of one model."""
    return {
        "node": node,
        "host_up": True,
        "engines": [{"engine_id": e, "model": "m", "state": "ready"} for e in engines],
        "remote": [(n, {"engine_id": e, "model": "m", "state": "ready"}) for n, e in remote],
        "host_models": [],
        "models": {"m": {**NOTHING, **seen}},
    }


def test_the_views_of_gateways_are_put_together() -> None:
    """Counts add up, a node is told once, and a node without a gateway has the engines that others were lent."""
    reports = [
        report("n1", "e1", remote=[("n2", "e2"), ("n3", "e3")], queued=2),
        report("n1", "e1", remote=[("n3", "e3")], queued=1, in_flight=4),
        report("n2", "e2"),
    ]
    models = [{"id": "m", "aliases": ["a"], "deployment": "model-m"}]
    status = fleet_status(models, reports, {"model-m": {"RUNNING": 3}}, {})
    (row,) = status["models"]
    assert (row["state"], row["replicas"], row["queued"], row["in_flight"]) == ("ready", 3, 3, 4)
    assert {n["id"]: [e["engine_id"] for e in n["engines"]] for n in status["nodes"]} == {
        "n1": ["e1"],
        "n2": ["e2"],
        "n3": ["e3"],
    }
    assert status["gateways"] == 3


@pytest.mark.parametrize(("queued", "told"), [(0, None), (1, "others hold the GPUs")])
def test_a_budget_that_has_no_room_is_told_of_those_who_want_it(queued: int, told: str | None) -> None:
    """A model that nobody asks for waits for nothing."""
    models = [{"id": "m", "aliases": [], "deployment": "model-m"}]
    reports = [report("n1", queued=queued)]
    status = fleet_status(models, reports, {}, {}, no_room={"m": "others hold the GPUs"})
    assert status["models"][0]["reason"] == told


def test_before_any_gateway_has_reported() -> None:
    """Every model is there, and dark."""
    models = [{"id": "m", "aliases": [], "deployment": "model-m"}]
    (row,) = fleet_status(models, [], {}, {})["models"]
    assert (row["state"], row["replicas"], row["reason"]) == ("dark", 0, None)
