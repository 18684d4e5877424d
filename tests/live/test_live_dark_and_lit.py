"""From zero replicas to an answer and back, on a real cluster."""

from __future__ import annotations

import pytest

from tests.live.lab import Relight, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def nothing_is_held(relight: Relight) -> bool:
    """Whether Ray has all that it has to give; its own head keeps a thousandth of a marker of its own."""
    found = relight.ray("resources")
    total, available = found["total"], found["available"]
    kinds = [kind for kind in total if kind in ("CPU", "GPU", "memory", "far")]
    return all(available.get(kind) == total[kind] for kind in kinds)


def test_a_dark_model_answers_goes_dark_and_answers_again(relight: Relight) -> None:
    """The first request finds nothing and gets the real answer; at zero nothing of the model is left; then again."""
    relight.dark("chat")
    until("all resources to be free", lambda: nothing_is_held(relight))
    engines = []
    for _ in range(2):
        answer = relight.complete("chat")
        assert answer.status == 200, answer
        assert answer.json["choices"][0]["text"].startswith(" Paris.")
        assert answer.header("x-relight-cold-start") == "true"
        assert answer.header("x-relight-model") == "chat"
        assert answer.header("x-relight-attempts") == "1"
        assert float(answer.header("x-relight-wait-ms") or 0) > 0
        assert "fork;dur=" in (answer.header("server-timing") or "")

        warm = relight.complete("talk")
        assert warm.json["choices"] == answer.json["choices"]
        assert warm.header("x-relight-cold-start") == "false"
        engines.append(relight.ready_engine("chat")["engine_id"])

        relight.dark("chat")
        until("all resources to be free", lambda: nothing_is_held(relight))
    assert engines[0] != engines[1]


def test_the_status_tells_of_the_last_cold_start(relight: Relight) -> None:
    """Kind, engine and phases of a start stand in the status after the model is dark again."""
    relight.dark("embed")
    answer = relight.embed("embed")
    assert answer.status == 200, answer
    assert len(answer.json["data"][0]["embedding"]) == 384
    engine_id = relight.ready_engine("embed")["engine_id"]
    relight.dark("embed")
    start = relight.model("embed")["last_cold_start"]
    assert start["engine_id"] == engine_id
    assert start["kind"] in ("forked", "prebuilt")
    assert {"fork", "warm_up"} <= {phase["name"] for phase in start["phases"]}
    assert start["total_s"] > 0


def test_a_stream_through_a_cold_start_shows_it_as_comments(relight: Relight) -> None:
    """A streaming client sees the wake as comments, then the engine's events to the end."""
    relight.dark("chat")
    body = {"model": "chat", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    with relight.stream(body) as response:
        assert response.status == 200
        events = response.read().split(b"\n\n")
    assert events[0].startswith(b": ")
    assert [e for e in events if e.startswith(b"data: {")]
    assert events[-2:] == [b"data: [DONE]", b""]


def test_the_list_of_models_tells_who_is_dark(relight: Relight) -> None:
    """Every model of the fleet is listed, lit or not, and asking for the list lights none."""
    relight.dark("embed")
    before = relight.engines()
    listed = relight.request("GET", "/v1/models").json["data"]
    assert [m["id"] for m in listed][:2] == ["chat", "embed"]
    assert "dark" in str(next(m for m in listed if m["id"] == "embed"))
    one = relight.request("GET", "/v1/models/embed").json
    assert one["id"] == "embed"
    assert {p.pid for p in relight.engines()} <= {p.pid for p in before}
