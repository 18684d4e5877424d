"""Requests for a model that is dark: held, bounded, and told how far the wake has come."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import aiohttp
import pytest

from deployments.gateway.engines import Phase
from tests.gateway.lab import CHAT, Lab, make_lab

STREAM = {"model": "tiny", "stream": True}


async def test_a_request_is_held_until_its_model_is_lit(lab: Lab) -> None:
    """The client of a dark model waits and is answered; the queue shows it."""
    asking = asyncio.create_task(lab.chat())
    await lab.telemetry.until(lambda: lab.telemetry.queues.get("tiny") == (1, 0))
    lab.model.light()
    assert (await asking).json()["choices"][0]["message"]["content"] == "Hello!"
    await lab.quiet()
    assert lab.telemetry.ended() == [(200, None)]


async def test_streaming_clients_see_the_wake_as_comments(lab: Lab) -> None:
    """Comments come first, then the engine's own bytes and nothing else."""
    lab.model.lighting("weights", 2.1, 4.0)
    async with lab.client.stream("POST", CHAT, json=STREAM) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-relight-cold-start"] == "true"
        assert answer.headers["x-relight-state"] == "lighting"
        lines = answer.aiter_lines()
        assert await anext(lines) == ": relight lighting phase=weights elapsed=2.1s estimate=4.0s"
        assert await anext(lines) == ""
        lab.model.lighting("warm_up", 3.9, 4.0)
        while "phase=warm_up" not in await anext(lines):
            pass
        lab.model.light(2e12, (Phase("weights", 0, 1),))
        data = [line async for line in lines if line.startswith("data: ")]
    assert "".join(json.loads(line[6:])["choices"][0]["delta"]["content"] for line in data[:-1]) == "Hello!"
    assert data[-1] == "data: [DONE]"


async def test_comments_go_on_until_the_first_byte(lab: Lab) -> None:
    """An engine that is lit but slow to its first token is waited for with comments too."""
    lab.model.lighting()
    gate = lab.engine.script.gate = asyncio.Event()
    async with lab.client.stream("POST", CHAT, json=STREAM) as answer:
        lines = answer.aiter_lines()
        assert "lighting" in await anext(lines)
        lab.model.light()
        await lab.engine.until(lambda: len(lab.engine.seen) == 1)
        while not (await anext(lines)).startswith(": relight waiting"):
            pass
        gate.set()
        assert "data: [DONE]" in [line async for line in lines]


async def test_a_busy_model_gets_no_early_answer(lab: Lab) -> None:
    """Without a wake there is nothing to tell, so the status stays open until the engine's own."""
    asking = asyncio.create_task(lab.chat(stream=True))
    await lab.model.until(lambda: lab.model.waiting == 1)
    lab.engine.script.answer = (400, b"application/json", b"{}")
    lab.model.light()
    assert (await asking).status_code == 400


async def test_documents_get_no_early_answer(lab: Lab) -> None:
    """A client that didn't ask for a stream sees the engine's own status, however long the wake."""
    lab.model.lighting()
    asking = asyncio.create_task(lab.chat())
    await lab.model.until(lambda: lab.model.waiting == 1)
    lab.engine.script.answer = (400, b"application/json", b"{}")
    lab.model.light()
    assert (await asking).status_code == 400


async def test_routes_that_never_stream_get_no_early_answer(lab: Lab) -> None:
    """`stream` in an embeddings request promises no events."""
    lab.model.lighting()
    asking = asyncio.create_task(lab.client.post("/v1/embeddings", json=STREAM))
    await lab.model.until(lambda: lab.model.waiting == 1)
    lab.model.light()
    assert (await asking).json()["object"] == "list"


async def comments_then(lab: Lab, path: str) -> tuple[int, str]:
    """Status and whole body of a stream that was begun with a comment."""
    lab.model.lighting()
    async with lab.client.stream("POST", path, json=STREAM) as answer:
        lines = answer.aiter_lines()
        first = await anext(lines)
        assert first.startswith(": relight")
        lab.model.light()
        return answer.status_code, "\n".join(
            [line async for line in lines if not line.startswith(":")]
        ).strip()


@pytest.mark.parametrize(
    ("path", "begin", "end"),
    [
        (CHAT, 'data: {"error": {"message": "no"', "data: [DONE]"),
        ("/v1/completions", 'data: {"error": {"message": "no"', "data: [DONE]"),
        ("/v1/responses", 'event: error\ndata: {"type": "error"', "}}"),
        ("/v1/messages", 'event: error\ndata: {"type": "error", "error": {"message": "no"', "}}"),
    ],
)
async def test_an_engines_error_after_comments_is_an_event(lab: Lab, path: str, begin: str, end: str) -> None:
    """Its error is told in the route's own style, since the status is already 200."""
    body = b'{"error": {"message": "no", "type": "BadRequestError", "param": null, "code": 400}}'
    lab.engine.script.answer = (400, b"application/json", body)
    status, text = await comments_then(lab, path)
    assert status == 200
    assert text.startswith(begin)
    assert text.endswith(end)
    await lab.quiet()
    assert lab.telemetry.ended() == [(200, "400")]


async def test_a_route_that_the_model_has_not_is_named_after_comments(lab: Lab) -> None:
    """As it is where the status is still open."""
    lab.engine.script.answer = (404, b"application/json", b'{"detail":"Not Found"}')
    _, text = await comments_then(lab, CHAT)
    assert f"The model 'tiny' does not serve {CHAT}." in text
    assert '"code": "not_found"' in text


async def test_a_document_after_comments_is_an_event(lab: Lab) -> None:
    """An engine that doesn't stream after all has its document sent as the only event."""
    lab.engine.script.answer = (200, b"application/json", b'{\n"a": 1}')
    assert (await comments_then(lab, CHAT))[1] == 'data: {"a": 1}\n\ndata: [DONE]'


async def test_a_failed_start_is_told_at_once(lab: Lab) -> None:
    """503 with the engine's own reason, and a header that tells dead from cold."""
    asking = asyncio.create_task(lab.chat())
    await lab.model.until(lambda: lab.model.waiting == 1)
    lab.model.fail("CUDA out of memory: tried to allocate 2 GiB")
    answer = await asking
    assert answer.status_code == 503
    assert "CUDA out of memory" in answer.json()["error"]["message"]
    assert answer.headers["x-relight-state"] == "failed"
    assert answer.headers["x-relight-cold-start"] == "true"
    await lab.quiet()


async def test_a_failed_start_after_comments_is_an_event(lab: Lab) -> None:
    """The reason comes as an error event when the status was already sent."""
    lab.model.lighting()
    async with lab.client.stream("POST", CHAT, json=STREAM) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        lab.model.fail("no such file")
        text = "\n".join([line async for line in lines if not line.startswith(":")]).strip()
    assert text.startswith('data: {"error": {"message": "no such file"')
    assert text.endswith("data: [DONE]")


async def test_the_start_deadline_says_what_was_waited_for() -> None:
    """504 with phase, time and estimate while the model is being lit."""
    async with make_lab(limits={"start_deadline_s": 0.05}) as lab:
        lab.model.lighting("weights", 2.1, 4.0)
        answer = await lab.chat()
        assert answer.status_code == 504
        message = answer.json()["error"]["message"]
        assert "phase weights" in message
        assert "estimate 4.0 s" in message
        assert answer.headers["x-relight-state"] == "lighting"
        assert answer.headers["x-relight-cold-start"] == "true"
        assert int(answer.headers["x-relight-wait-ms"]) > 0
        assert answer.headers["retry-after"] == "2"
        assert "It goes on being lit" in message
        await lab.quiet()


async def test_a_model_that_waits_for_the_budget_is_not_said_to_go_on() -> None:
    """Nothing is being lit, and nobody can say for how long."""
    async with make_lab(limits={"start_deadline_s": 0.05}) as lab:
        lab.model.lighting("gpu_budget", 2.1, None)
        answer = await lab.chat()
        assert answer.status_code == 504
        message = answer.json()["error"]["message"]
        assert "waits for GPUs" in message
        assert "lit" not in message
        assert answer.headers["retry-after"] == "5"
        await lab.quiet()


async def test_a_full_engine_is_told_from_a_dark_one() -> None:
    """504 for want of room says the model's state instead of a phase."""
    async with make_lab(limits={"start_deadline_s": 0.05}) as lab:
        answer = await lab.chat()
        assert "had room" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["x-relight-cold-start"] == "false"


async def test_the_clients_own_timeout_counts_if_smaller(lab: Lab) -> None:
    """X-Request-Timeout-Seconds bounds the wait, and ends before a proxy that reads it cuts."""
    answer = await lab.chat(headers={"X-Request-Timeout-Seconds": "0.05"})
    assert answer.status_code == 504
    await lab.quiet()


async def test_a_slow_first_byte_meets_the_request_deadline() -> None:
    """An engine that took the request and says nothing is given up too, and its generation aborted."""
    async with make_lab(limits={"request_deadline_s": 1}) as lab:
        lab.model.light()
        lab.engine.script.gate = asyncio.Event()
        answer = await lab.chat()
        assert answer.status_code == 504
        assert "did not begin to answer" in answer.json()["error"]["message"]
        await lab.engine.until(lambda: lab.engine.aborted == 1)
        await lab.quiet()


async def test_a_deadline_after_comments_is_an_event() -> None:
    """The stream ends with an error event."""
    async with make_lab(limits={"start_deadline_s": 0.2}) as lab:
        lab.model.lighting()
        answer = await lab.chat(stream=True)
        assert answer.status_code == 200
        assert '"code": "deadline_exceeded"' in answer.text
        assert answer.text.endswith("data: [DONE]\n\n")


async def test_a_full_queue_turns_away_with_a_time() -> None:
    """429 and Retry-After; those who wait are answered."""
    async with make_lab(limits={"max_queued": 2}) as lab:
        lab.model.lighting("weights", 1.0, 7.5)
        waiting = [asyncio.create_task(lab.chat()) for _ in range(2)]
        await lab.model.until(lambda: lab.model.waiting == 2)
        answer = await lab.chat()
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "7"
        assert answer.json()["error"]["code"] == "queue_full"
        assert answer.headers["x-relight-state"] == "lighting"
        other = asyncio.create_task(lab.chat(model="org/large"))
        await lab.engines.models["org/large"].until(lambda: lab.engines.models["org/large"].waiting == 1)
        lab.model.light()
        lab.engines.models["org/large"].light()
        assert [(await task).status_code for task in [*waiting, other]] == [200, 200, 200]
        await lab.quiet()


async def test_a_thousand_at_once_are_each_answered_or_turned_away() -> None:
    """Of 1,000 requests to a dark model, 600 wait and get their own answer, 400 get 429, none is lost."""
    async with (
        make_lab(replicas=2, limits={"max_queued": 600}) as lab,
        aiohttp.ClientSession(lab.url, connector=aiohttp.TCPConnector(limit=0)) as session,
    ):

        async def ask(number: int) -> tuple[int, bool]:
            headers = {"X-Request-Id": f"n{number}"}
            async with session.post(CHAT, json={"model": "tiny"}, headers=headers) as answer:
                await answer.read()
                return answer.status, answer.headers["x-request-id"] == f"n{number}"

        asking = [asyncio.create_task(ask(number)) for number in range(1000)]
        await lab.telemetry.until(lambda: len(lab.telemetry.ended()) == 400)
        await lab.model.until(lambda: lab.model.waiting == 600)
        lab.model.light()
        answers = await asyncio.gather(*asking)
        assert Counter(status for status, _ in answers) == {200: 600, 429: 400}
        assert all(own for _, own in answers)
        assert sum(len(engine.seen) for engine in lab.model.engines) == 600
        await lab.quiet()
