"""The fleet is changed while it serves."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.live.conftest import changed, scaling
from tests.live.lab import Relight, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

LONG = {
    "model": "chat",
    "prompt": "Once upon a time",
    "max_tokens": 300,
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


@contextlib.contextmanager
def generating(relight: Relight) -> Iterator[None]:
    """A long answer that has begun; at the end of the block it is waited for, and its tokens are counted."""
    counted: list[int] = []
    begun = threading.Event()

    def read() -> None:
        with relight.stream(LONG) as response:
            counted.append(tokens_until_done(response, begun))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert begun.wait(90)
        yield
    finally:
        reader.join(200)
    assert counted == [LONG["max_tokens"]]


def test_generations_outlive_their_model_their_gateway_and_their_version(
    relight: Relight, fleet: dict[str, Any]
) -> None:
    """One whose model leaves the fleet comes to its end, and so does one of whose model another version comes.

    Other arguments mean another engine: the old one finishes, the new one answers. What else is in the fleet stays as
    it is, a parked engine too. One test, since the fleet's own version builds a template again; the other is left to
    plain starts, by the name of its loader.
    """
    assert relight.embed("parks").status == 200
    relight.dark("parks", state="parked")
    (parked,) = relight.engines("parks ")
    try:
        with generating(relight):
            without = {**fleet, "models": [m for m in fleet["models"] if m["id"] != "chat"]}
            relight.up(without)
            assert relight.complete("chat").status == 404
        until("the engine of a model that left to be gone", lambda: not relight.engines("chat "))
        until("its template to be gone", lambda: not relight.processes("relight-model-template chat"))
        chat = next(m for m in fleet["models"] if m["id"] == "chat")
        other = {**chat["engine"], "max_model_len": 1024, "load_format": "hf"}
        relight.up(changed(fleet, "chat", engine=other, scaling=scaling()))
        with generating(relight):
            old = relight.ready_engine("chat")["engine_id"]
            answer = relight.complete("chat", max_tokens=1100)
            assert answer.status == 400
            assert "1024" in answer.json["error"]["message"]
            relight.up(fleet)
            answer = relight.complete("chat", max_tokens=2100)
            assert answer.status == 400
            assert "2048" in answer.json["error"]["message"]
            assert relight.model("chat")["last_cold_start"]["engine_id"] != old
        assert [engine.pid for engine in relight.engines("parks ")] == [parked.pid]
    except BaseException:
        relight.up(fleet)
        raise
