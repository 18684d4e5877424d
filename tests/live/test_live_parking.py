"""Engines that wait in memory while their model is dark."""

from __future__ import annotations

import signal

import pytest

from tests.live.lab import Relight, kill, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def parked(relight: Relight) -> int:
    """The pid of the parked engine of `parks`, once it is that."""
    relight.dark("parks", state="parked")
    return int(relight.engine("parks")["pid"])


def test_a_parked_engine_is_adopted(relight: Relight) -> None:
    """A model that went dark is parked: no replica, the process waits, and the next request has it."""
    assert relight.embed("parks").status == 200
    pid = parked(relight)
    assert relight.model("parks")["replicas"] == 0
    assert "parked" in str(relight.request("GET", "/v1/models/parks").json)
    answer = relight.embed("parks")
    assert answer.status == 200
    assert answer.header("x-relight-cold-start") == "true"
    engine = relight.ready_engine("parks")
    assert (engine["pid"], engine["kind"]) == (pid, "adopted")
    start = relight.model("parks")["last_cold_start"]
    assert start["kind"] == "adopted"


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=lambda n: n.name)
def test_a_parked_engine_that_is_past_help_is_replaced(relight: Relight, number: signal.Signals) -> None:
    """Stopped or killed while parked: the next request gets its answer from a new one, and the old one is gone."""
    assert relight.embed("parks").status == 200
    pid = parked(relight)
    (process,) = relight.engines("parks ")
    assert process.pid == pid
    kill(process, number)
    assert relight.embed("parks").status == 200
    assert relight.ready_engine("parks")["pid"] != pid
    until("the old engine to be gone", lambda: pid not in [p.pid for p in relight.engines("parks ")])
