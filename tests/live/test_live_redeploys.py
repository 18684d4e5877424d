"""The fleet is changed while it serves."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from tests.live.conftest import changed, scaling
from tests.live.lab import Relight, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LONG = {
    "model": "chat",
    "prompt": "Once upon a time",
    "max_tokens": 400,
    "ignore_eos": True,
    "temperature": 0,
    "stream_options": {"include_usage": True},
}


def tokens_until_done(response: Any, begun: threading.Event) -> int:
    """How many tokens there were in a stream that came to its end."""
    tokens = 0
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            assert "error" not in event, line
            tokens = max(tokens, (event.get("usage") or {}).get("completion_tokens", 0))
            begun.set()
        if line.startswith(b"data: [DONE]"):
            return tokens
    raise AssertionError("the stream broke off")


def test_a_generation_outlives_its_model_and_its_gateway(relight: Relight, fleet: dict[str, Any]) -> None:
    """A model that leaves the fleet finishes what it generates; what is parked beyond the new budget is ended."""
    assert relight.embed("parks").status == 200
    relight.dark("parks", state="parked")
    counted: list[int] = []
    begun = threading.Event()

    def read() -> None:
        with relight.stream(LONG) as response:
            counted.append(tokens_until_done(response, begun))

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(90)
    try:
        without = {**fleet, "models": [m for m in fleet["models"] if m["id"] != "chat"]}
        relight.up({**without, "engine_host": {"park_memory_bytes": 0}})
        assert relight.complete("chat").status == 404
        reader.join(200)
        assert counted == [LONG["max_tokens"]]
        until("the engine of a model that left to be gone", lambda: not relight.engines("chat "))
        until("the parked engine to be ended", lambda: not relight.engines("parks "))
        until("its template to be gone", lambda: not relight.processes("relight-model-template chat"))
    finally:
        reader.join()
        relight.up(fleet)


def test_a_generation_outlives_a_new_version_of_its_model(relight: Relight, fleet: dict[str, Any]) -> None:
    """Other arguments mean another engine: the old one finishes, the new one answers."""
    counted: list[int] = []
    begun = threading.Event()

    def read() -> None:
        with relight.stream(LONG) as response:
            counted.append(tokens_until_done(response, begun))

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(90)
    old = relight.ready_engine("chat")["engine_id"]
    chat = next(m for m in fleet["models"] if m["id"] == "chat")
    other = changed(fleet, "chat", engine={**chat["engine"], "max_model_len": 1024}, scaling=scaling())
    try:
        relight.up(other)
        answer = relight.complete("chat", max_tokens=1100)
        assert answer.status == 400
        assert "1024" in answer.json["error"]["message"]
        assert relight.model("chat")["last_cold_start"]["engine_id"] != old
        reader.join(200)
        assert counted == [LONG["max_tokens"]]
    finally:
        reader.join()
        relight.up(fleet)
