"""Engines that die and clients that leave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from deployments.gateway.proxy import HELD_BODY_BYTES
from tests.gateway.lab import CHAT, Lab, make_lab

STREAM = {"model": "tiny", "stream": True}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("death", ["die_before_first_byte", "die_after_headers"])
async def test_a_death_before_the_first_byte_is_retried(death: str, stream: bool) -> None:
    """Another engine answers, the client sees only how many were tried, and the replica is told."""
    async with make_lab(replicas=2) as lab:
        lab.model.light()
        setattr(lab.engine.script, death, 1)
        answer = await lab.chat(stream=stream)
        assert answer.status_code == 200
        assert answer.headers["x-relight-attempts"] == "2"
        assert answer.headers["x-from-engine"] == "0-1"
        await lab.quiet()
        assert lab.model.failed_leases == 1
        assert [call for call in lab.telemetry.requests[0].calls if call[0] == "retried"]


async def test_retries_end(lab: Lab) -> None:
    """After `max_attempts` engines the client gets a 502 that says so."""
    lab.model.light()
    lab.engine.script.die_before_first_byte = 99
    answer = await lab.chat()
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "engine_unreachable"
    assert answer.headers["x-relight-attempts"] == str(lab.fleet.gateway.max_attempts)
    assert len(lab.engine.seen) == lab.fleet.gateway.max_attempts
    await lab.quiet()


async def test_a_retry_waits_for_the_next_engine(lab: Lab) -> None:
    """When the only engine dies, the request goes back to the queue until the model is lit again."""
    lab.model.light()
    gate = lab.engine.script.gate = asyncio.Event()
    asking = asyncio.create_task(lab.chat())
    await lab.engine.until(lambda: len(lab.engine.seen) == 1)
    lab.engine.script.die_after_headers = 1
    lab.model.darken()
    gate.set()
    await lab.telemetry.until(lambda: lab.telemetry.queues["tiny"] == (1, 0))
    lab.model.light()
    answer = await asking
    assert (answer.status_code, answer.headers["x-relight-attempts"]) == (200, "2")


async def test_a_socket_that_is_gone_is_an_unreachable_engine(lab: Lab) -> None:
    """A connection that is refused counts as an attempt and never as a gateway's failure."""
    lab.model.light()
    lab.engine.uds += ".gone"
    answer = await lab.chat()
    assert answer.json()["error"]["code"] == "engine_unreachable"


async def test_a_document_that_breaks_off_is_retried_unseen(lab: Lab) -> None:
    """The client has seen nothing of a held document, so another engine writes it anew."""
    lab.model.light()
    lab.engine.script.die_after_chunks = 1
    lab.engine.script.deaths = 1
    answer = await lab.chat()
    assert answer.json()["choices"][0]["message"]["content"] == "Hello!"
    assert answer.headers["x-relight-attempts"] == "2"


async def test_a_document_that_always_breaks_off_is_a_502(lab: Lab) -> None:
    """The last attempt's reason is the client's answer."""
    lab.model.light()
    lab.engine.script.die_after_chunks = 1
    answer = await lab.chat()
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_interrupted")


async def test_a_large_document_that_breaks_off_breaks_the_connection(lab: Lab) -> None:
    """Nobody can take half a document for a whole one."""
    lab.model.light()
    lab.engine.script.pieces = (b"x" * (HELD_BODY_BYTES + 1), b"never sent")
    lab.engine.script.piece_type = b"application/json"
    lab.engine.script.die_after_chunks = 1
    with pytest.raises(httpx.RemoteProtocolError):
        await lab.chat()
    await lab.quiet()
    assert lab.telemetry.ended() == [(200, "engine_interrupted")]
    assert len(lab.engine.seen) == 1


@pytest.mark.parametrize(
    ("path", "begin", "end"),
    [
        (CHAT, 'data: {"error": ', "data: [DONE]\n\n"),
        ("/v1/completions", 'data: {"error": ', "data: [DONE]\n\n"),
        ("/v1/responses", "event: error\n", "\n\n"),
        ("/v1/messages", "event: error\n", "\n\n"),
    ],
)
async def test_a_stream_that_breaks_off_ends_with_an_error_event(
    lab: Lab, path: str, begin: str, end: str
) -> None:
    """After the first byte nothing is retried; the stream ends well-formed, with the reason."""
    lab.model.light()
    lab.engine.script.die_after_chunks = 2
    answer = await lab.client.post(path, json=STREAM)
    assert answer.status_code == 200
    events = answer.text.split("\n\n")
    assert len(events) > 3
    assert events[2].startswith(begin.strip())
    assert "engine_interrupted" in events[2]
    assert answer.text.endswith(end)
    await lab.quiet()
    assert len(lab.engine.seen) == 1
    assert lab.model.failed_leases == 1
    assert lab.telemetry.ended() == [(200, "engine_interrupted")]


async def test_half_an_event_is_not_glued_to_the_error(lab: Lab) -> None:
    """The beginning of an event whose engine died is not passed on."""
    lab.model.light()
    lab.engine.script.pieces = (b'data: {"a": 1}\n\ndata: {"b', b'": 2}\n\n')
    lab.engine.script.die_after_chunks = 1
    events = (await lab.chat(stream=True)).text.split("\n\n")
    assert events[0] == 'data: {"a": 1}'
    assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "engine_interrupted"


async def hang_up(lab: Lab, *, stream: bool, after_first_line: bool) -> None:
    """One chat request whose client leaves."""
    body = {"model": "tiny", "stream": stream}
    if after_first_line:
        async with lab.client.stream("POST", CHAT, json=body) as answer:
            await anext(answer.aiter_lines())
        return
    asking = asyncio.create_task(lab.client.post(CHAT, json=body))
    await lab.model.until(lambda: lab.model.waiting == 1 or bool(lab.engine.seen))
    asking.cancel()
    await asyncio.wait({asking})


@pytest.mark.parametrize("stream", [True, False])
async def test_hanging_up_while_waiting_leaves_the_queue(lab: Lab, stream: bool) -> None:
    """The place in the queue is free again, and no engine is asked."""
    await hang_up(lab, stream=stream, after_first_line=False)
    await lab.quiet()
    assert lab.telemetry.ended() == [(499, "client_gone")]
    assert lab.model.acquired == 0


async def test_hanging_up_during_comments_leaves_the_queue(lab: Lab) -> None:
    """A client that has had enough of comments leaves nothing behind."""
    lab.model.lighting()
    await hang_up(lab, stream=True, after_first_line=True)
    await lab.quiet()
    assert lab.telemetry.ended() == [(499, "client_gone")]


@pytest.mark.parametrize("stream", [True, False])
async def test_hanging_up_before_the_first_byte_aborts(lab: Lab, stream: bool) -> None:
    """An engine that works on its answer is told that nobody listens."""
    lab.model.light()
    lab.engine.script.gate = asyncio.Event()
    asking = asyncio.create_task(lab.chat(stream=stream))
    await lab.engine.until(lambda: len(lab.engine.seen) == 1)
    asking.cancel()
    await lab.engine.until(lambda: lab.engine.aborted == 1)
    await lab.quiet()
    assert lab.model.failed_leases == 0


async def test_hanging_up_in_mid_stream_aborts(lab: Lab) -> None:
    """The generation is aborted and the lease is given back."""
    lab.model.light()
    lab.engine.script.gate_after_chunks = (1, asyncio.Event())
    await hang_up(lab, stream=True, after_first_line=True)
    await lab.engine.until(lambda: lab.engine.aborted == 1)
    await lab.quiet()
    assert lab.telemetry.ended() == [(499, "client_gone")]
    assert lab.model.failed_leases == 0


async def test_a_lease_that_comes_as_the_client_leaves_is_given_back(lab: Lab) -> None:
    """Light and hang-up in the same moment: whichever is first, no lease is lost."""
    for _ in range(20):
        lab.model.darken()
        asking = asyncio.create_task(lab.chat())
        await lab.model.until(lambda: lab.model.waiting == 1)
        asking.cancel()
        lab.model.light()
        await asyncio.wait({asking})
        await lab.quiet()
    assert lab.model.leased == 0


async def scope_call(lab: Lab, until: asyncio.Event, sent: list[Any] | None = None) -> None:
    """One request by ASGI itself, for what servers do to applications."""
    body = json.dumps(STREAM).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, object]:
        if messages:
            return messages.pop()
        return await asyncio.Event().wait()  # type: ignore[return-value]  # never

    async def send(message: object) -> None:
        until.set()
        if sent is not None:
            sent.append(message)

    await lab.gateway(scope, receive, send)


@pytest.mark.parametrize("lit", [True, False])
async def test_being_cancelled_cleans_up_and_stays_cancelled(lab: Lab, lit: bool) -> None:
    """When Serve cancels a request's task, work is aborted, the lease returned, the task cancelled."""
    begun = asyncio.Event()
    if lit:
        lab.model.light()
        lab.engine.script.gate_after_chunks = (1, asyncio.Event())
    task = asyncio.create_task(scope_call(lab, begun))
    if lit:
        await begun.wait()
    else:
        await lab.model.until(lambda: lab.model.waiting == 1)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    await lab.quiet()
    assert lab.telemetry.ended() == [(499, "client_gone")]
    if lit:
        await lab.engine.until(lambda: lab.engine.aborted == 1)


@pytest.mark.parametrize("lit", [True, False])
async def test_who_is_cancelled_because_the_gateway_ends_is_told(lab: Lab, lit: bool) -> None:
    """Also in the middle of a stream."""
    begun, sent = asyncio.Event(), list[Any]()
    if lit:
        lab.model.light()
        lab.engine.script.gate_after_chunks = (1, asyncio.Event())
    task = asyncio.create_task(scope_call(lab, begun, sent))
    if lit:
        await begun.wait()
    else:
        await lab.model.until(lambda: lab.model.waiting == 1)
    lab.gateway.close()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    await lab.quiet()
    body = b"".join(message.get("body", b"") for message in sent)
    assert b'"code": "gateway_closing"' in body or b'"code":"gateway_closing"' in body, body
    assert sent[-1] == {"type": "http.response.body", "body": sent[-1]["body"], "more_body": False}
    assert lab.telemetry.ended() == [(200 if lit else 503, "gateway_closing")]
    if not lit:
        assert (b"retry-after", b"1") in sent[0]["headers"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_disconnect_after_the_last_byte_is_no_hang_up(lab: Lab, stream: bool) -> None:
    """Servers report one after a complete answer, maybe before the lease has been given back."""
    lab.model.light()
    gate = lab.model.release_gate = asyncio.Event()
    answer = await lab.chat(stream=stream)
    await lab.model.until(lambda: lab.model.releasing == 1)
    await lab.client.aclose()
    gate.set()
    await lab.quiet()
    assert answer.status_code == 200
    assert lab.telemetry.ended() == [(200, None)]


@pytest.mark.parametrize("lit_late", [True, False])
async def test_being_cancelled_twice_loses_no_lease(lab: Lab, lit_late: bool) -> None:
    """A second cancellation, while the lease is being given back, doesn't keep it from being given back."""
    begun = asyncio.Event()
    lab.model.light()
    gate = lab.model.release_gate = asyncio.Event()
    if lit_late:
        lab.engine.script.gate = asyncio.Event()  # still before the first byte
    else:
        lab.engine.script.gate_after_chunks = (1, asyncio.Event())
    task = asyncio.create_task(scope_call(lab, begun))
    await lab.engine.until(lambda: len(lab.engine.seen) == 1)
    if not lit_late:
        await begun.wait()
    task.cancel()
    await lab.model.until(lambda: lab.model.releasing == 1)
    task.cancel()
    gate.set()
    await asyncio.wait({task})
    assert task.cancelled()
    await lab.quiet()


async def test_a_fault_of_the_gateway_is_a_500_with_its_traceback_in_the_log(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody foresaw is answered in OpenAI's shape, logged, and leaves nothing behind."""

    async def broken() -> None:
        raise LookupError("unforeseen")

    lab.model.on_acquire = broken
    answer = await lab.chat()
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "unforeseen" not in answer.text
    assert "LookupError: unforeseen" in caplog.text
    await lab.quiet()


@pytest.mark.parametrize(
    "said",
    [
        {"error": {"message": "1 validation error", "type": "Bad Request", "param": None, "code": 400}},
        {"type": "error", "error": {"type": "BadRequestError", "message": "1 validation error"}},
    ],
)
async def test_an_engines_error_has_the_shape_of_its_route(lab: Lab, said: dict[str, Any]) -> None:
    """Anthropic's clients look for the outer `type`, OpenAI's for the error alone."""
    lab.model.light()
    lab.engine.script.answer = (400, b"application/json", json.dumps(said).encode())
    for path, outer in (("/v1/messages", {"type", "error"}), (CHAT, set(said))):
        answer = await lab.client.post(path, json={"model": "tiny"})
        assert answer.status_code == 400
        document = answer.json()
        assert set(document) == outer and document.get("type", "error") == "error"
        assert document["error"]["message"] == "1 validation error"
