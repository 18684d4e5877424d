"""Requests to engines that are there: what passes, what doesn't, and what the headers tell."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from deployments.gateway import openai
from deployments.gateway.engines import Phase
from deployments.gateway.proxy import HELD_BODY_BYTES
from tests.gateway.lab import CHAT, Lab, make_lab


async def test_body_and_answer_pass_byte_for_byte(lab: Lab) -> None:
    """Odd but valid JSON reaches the engine as it is, and so does the engine's answer the client."""
    lab.model.light()
    lab.engine.script.answer = (200, b"application/json", b'{ "a" : 1.10, "b":"\\u00e9" }\n')
    body = '{"model" :"tiny",  "x": 1e2, "é": "\\u0041", "model": "tiny"}'.encode()
    answer = await lab.client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.content) == (200, lab.engine.script.answer[2])
    assert lab.engine.seen[0].body == body


@pytest.mark.parametrize("path", [*openai.ROUTES, "/v1/something/new"])
async def test_every_route_that_names_a_model_passes(lab: Lab, path: str) -> None:
    """Path and query reach the engine unchanged, on every route that vLLM has."""
    lab.model.light()
    answer = await lab.client.post(f"{path}?x=%20y&z", json={"model": "tiny"})
    assert answer.status_code == 200
    assert lab.engine.seen[0].target == f"{path}?x=%20y&z"


async def test_a_slash_at_the_end_is_no_other_path(lab: Lab) -> None:
    """An engine would redirect to its own name for itself, which no client can resolve."""
    lab.model.light()
    answer = await lab.client.post(f"{CHAT}/?x=1", json={"model": "tiny", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lab.engine.seen[0].target == f"{CHAT}?x=1"
    assert lab.telemetry.requests[0].route == CHAT
    assert [m["id"] for m in (await lab.client.get("/v1/models/")).json()["data"]] == ["tiny", "org/large"]
    assert (await lab.client.get("/health/")).text == "ok"


async def test_an_alias_reaches_the_models_engine(lab: Lab) -> None:
    """The header names the canonical id; the body keeps the alias."""
    lab.model.light()
    answer = await lab.chat(model="small")
    assert answer.headers["x-relight-model"] == "tiny"
    assert json.loads(lab.engine.seen[0].body)["model"] == "small"


async def test_a_form_passes_untouched(lab: Lab) -> None:
    """Audio comes as a form, and the engine gets the same bytes and boundary."""
    lab.model.light()
    request = lab.client.build_request(
        "POST",
        "/v1/audio/transcriptions",
        data={"model": "small"},
        files={"file": ("a.wav", b"RIFF\x00\xff" * 999)},
    )
    answer = await lab.client.send(request)
    assert answer.status_code == 200
    assert lab.engine.seen[0].body == request.read()
    assert lab.engine.seen[0].header(b"content-type") == request.headers["content-type"].encode()


async def test_stored_responses_are_found_by_query_or_header(lab: Lab) -> None:
    """A response's id says nothing of its model, so the request must, beside its body."""
    lab.model.light()
    by_query = await lab.client.get("/v1/responses/resp_1?model=tiny")
    by_header = await lab.client.post("/v1/responses/resp_1/cancel", headers={"X-Relight-Model": "small"})
    neither = await lab.client.get("/v1/responses/resp_1")
    assert [by_query.status_code, by_header.status_code, neither.status_code] == [200, 200, 400]
    assert neither.json()["error"]["param"] == "model"
    assert [(seen.method, seen.target) for seen in lab.engine.seen] == [
        ("GET", "/v1/responses/resp_1?model=tiny"),
        ("POST", "/v1/responses/resp_1/cancel"),
    ]


async def test_background_responses_are_refused(lab: Lab) -> None:
    """Their engine would end with the answer unwritten, since nobody waits for it."""
    asked = {"model": "tiny", "input": "hi"}
    refused = await lab.client.post("/v1/responses", json={**asked, "background": True})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "background"
    lab.model.light()
    for path, body in (
        ("/v1/responses", {**asked, "background": False}),
        ("/v1/embeddings", {**asked, "background": True}),
    ):
        assert (await lab.client.post(path, json=body)).status_code == 200
    assert [seen.target for seen in lab.engine.seen] == ["/v1/responses", "/v1/embeddings"]


async def test_the_only_model_needs_no_name_for_stored_responses() -> None:
    """A fleet of one model knows whose response it is."""
    async with make_lab(models=("tiny",)) as lab:
        lab.model.light()
        assert (await lab.client.get("/v1/responses/resp_1")).status_code == 200


async def test_credentials_and_hop_by_hop_headers_stay_behind(lab: Lab) -> None:
    """The engine sees the client's own headers, a trace context and a request id, and no secrets."""
    lab.model.light()
    sent = {
        "Authorization": "Bearer s3cret",
        "X-Api-Key": "s3cret",
        "Cookie": "a=s3cret",
        "Accept-Encoding": "gzip",
        "Connection": "keep-alive, x-hop",
        "X-Hop": "1",
        "TE": "trailers",
        "X-Custom": "kept",
        "User-Agent": "me/1",
    }
    await lab.chat(headers=sent)
    got = lab.engine.seen[0]
    assert b"s3cret" not in b"".join(value for _, value in got.headers)
    assert got.header(b"x-custom") == b"kept"
    assert got.header(b"user-agent") == b"me/1"
    assert got.header(b"traceparent") is not None
    assert got.header(b"x-request-id") is not None
    for name in (b"accept-encoding", b"x-hop", b"te"):
        assert got.header(name) is None


async def test_the_engines_own_headers_come_back(lab: Lab) -> None:
    """Its headers are kept except those of the connection."""
    lab.model.light()
    lab.engine.script.headers = ((b"x-load", b"\xe9"), (b"keep-alive", b"timeout=5"))
    answer = await lab.chat()
    assert (b"x-load", b"\xe9") in [(k.lower(), v) for k, v in answer.headers.raw]
    assert "keep-alive" not in answer.headers
    assert len(answer.headers.get_list("date")) == 1


@pytest.mark.parametrize(("sent", "kept"), [("req-1:a.b", True), ("a b", False), ("x" * 300, False)])
async def test_a_sane_request_id_is_kept(lab: Lab, sent: str, kept: bool) -> None:
    """The client's id comes back and goes to the engine, unless it could do harm."""
    lab.model.light()
    answer = await lab.chat(headers={"X-Request-Id": sent})
    assert (answer.headers["x-request-id"] == sent) is kept
    assert lab.engine.seen[0].header(b"x-request-id") == answer.headers["x-request-id"].encode()


async def test_a_warm_answer_says_so(lab: Lab) -> None:
    """An engine that was lit before the request came is no cold start of this request."""
    lab.model.light(ready_s=1.0, phases=(Phase("weights", 0.0, 1.0),))
    answer = await lab.chat()
    assert answer.headers["x-relight-cold-start"] == "false"
    assert answer.headers["x-relight-attempts"] == "1"
    assert answer.headers["x-relight-wait-ms"].isdigit()
    assert answer.headers["server-timing"].startswith("queue;dur=")
    assert "weights" not in answer.headers["server-timing"]


async def test_a_cold_answer_tells_its_phases(lab: Lab) -> None:
    """An engine that became ready after the request came is a cold start, with its phases in milliseconds."""
    asking = asyncio.create_task(lab.chat())
    await lab.model.until(lambda: lab.model.waiting == 1)
    lab.model.light(ready_s=2e12, phases=(Phase("schedule", 0.0, 0.5), Phase("weights", 0.5, 2.25)))
    answer = await asking
    assert answer.headers["x-relight-cold-start"] == "true"
    assert answer.headers["server-timing"].endswith("schedule;dur=500.0, weights;dur=2250.0")
    assert lab.telemetry.requests[0].calls[0] == ("wait_ended", lab.engine.cold_start)


async def test_an_engines_error_passes_untouched(lab: Lab) -> None:
    """The engine's own 400 is the client's answer."""
    lab.model.light()
    body = b'{"error": {"message": "too long", "type": "BadRequestError", "param": "messages", "code": 400}}'
    lab.engine.script.answer = (400, b"application/json", body)
    answer = await lab.chat(stream=True)
    assert (answer.status_code, answer.content) == (400, body)
    assert answer.headers["content-type"] == "application/json"


UNSHAPED: list[tuple[str, int, bytes, dict[str, object]]] = [
    (
        "/v1/embeddings",
        404,
        b'{"detail":"Not Found"}',
        {"message": "The model 'tiny' does not serve /v1/embeddings.", "code": "not_found"},
    ),
    (
        "/v1/moderations",
        405,
        b'{"detail":"Method Not Allowed"}',
        {"message": "Method Not Allowed", "code": 405},
    ),
    ("/v1/messages", 404, b'{"detail":"Gone."}', {"message": "Gone.", "type": "Not Found", "code": 404}),
    (CHAT, 422, b'{"detail":[{"loc":["body"]}]}', {"message": '{"detail":[{"loc":["body"]}]}', "code": 422}),
    (CHAT, 400, b'{"object":"error","message":"old","type":"Old"}', {"message": "old", "type": "Old"}),
    (CHAT, 400, b'{"error":"no"}', {"message": "no", "type": "Bad Request", "param": None, "code": 400}),
    (CHAT, 500, b'"broken"', {"message": '"broken"', "type": "Internal Server Error", "code": 500}),
]


@pytest.mark.parametrize(("path", "status", "body", "told"), UNSHAPED)
async def test_an_engines_error_of_another_shape_is_told_in_openais(
    lab: Lab, path: str, status: int, body: bytes, told: dict[str, object]
) -> None:
    """Its status and what it said stay; a route that the model has not is named with the model."""
    lab.model.light()
    lab.engine.script.answer = (status, b"application/json", body)
    answer = await lab.client.post(f"{path}?a=1", json={"model": "small", "stream": True})
    assert answer.status_code == status
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-relight-model"] == "tiny"
    document = answer.json()
    assert document.pop("type", None) == ("error" if path == "/v1/messages" else None)
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert told.items() <= document["error"].items()


@pytest.mark.parametrize(
    ("status", "content_type", "body"),
    [
        (404, b"text/plain", b"Not Found"),
        (400, b"application/json", b"{"),
        (400, b"application/json", b""),
        (200, b"application/json", b'{"detail":"Not Found"}'),
        (404, b"application/json", b'{"error": {"message": "Not Found"}, "detail":"Not Found"}'),
    ],
)
async def test_what_is_no_error_document_or_has_openais_shape_passes_untouched(
    lab: Lab, status: int, content_type: bytes, body: bytes
) -> None:
    """The engine's bytes are the client's."""
    lab.model.light()
    lab.engine.script.answer = (status, content_type, body)
    answer = await lab.chat()
    assert (answer.status_code, answer.content) == (status, body)
    assert answer.headers["content-length"] == str(len(body))


async def test_a_huge_error_is_passed_on_as_it_comes(lab: Lab) -> None:
    """What is not held is not looked into."""
    lab.model.light()
    body = b'{"detail": "' + b"x" * HELD_BODY_BYTES + b'"}'
    lab.engine.script.answer = (400, b"application/json", body)
    answer = await lab.chat()
    assert (answer.status_code, answer.content) == (400, body)


async def test_an_engines_own_failure_has_its_replica_look(lab: Lab) -> None:
    """A 500 passes, and the lease is given back as failed."""
    lab.model.light()
    lab.engine.script.answer = (500, b"application/json", b"{}")
    assert (await lab.chat()).status_code == 500
    await lab.quiet()
    assert lab.model.failed_leases == 1
    assert lab.telemetry.ended() == [(500, "engine_error")]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"{}", {}, 400),
        (b'{"model": 5}', {}, 400),
        (b"", {}, 400),
        (b'{"model": "tine"}', {}, 404),
        (b'{"model": "tiny"}', {"content-type": "text/plain"}, 415),
        (b'{"model": "tiny"}', {"content-encoding": "gzip"}, 415),
        (b'{"model": "tiny"}', {f"x-{number}": "y" for number in range(250)}, 400),
        (b'{"model": "tiny"}', {"x-big": "y" * 60_000}, 400),
    ],
)
async def test_bad_requests_are_refused_in_openais_shape(
    lab: Lab, content: bytes, headers: dict[str, str], status: int
) -> None:
    """Each fault of the client has its status and the four fields of an error, and no engine hears of it."""
    lab.model.light()
    answer = await lab.client.post(
        CHAT, content=content, headers={"content-type": "application/json"} | headers
    )
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    assert not lab.engine.seen
    assert lab.model.acquired == 0


async def test_an_unknown_model_names_the_nearest(lab: Lab) -> None:
    """A typing error is answered with what was meant."""
    answer = await lab.chat(model="org/lagre")
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "'org/large'" in answer.json()["error"]["message"]


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("factor", [1.5, 3])
async def test_a_large_body_gets_413(declared: bool, factor: float) -> None:
    """Over the bound, whether or not the length was declared, and however far over."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(int(10 * factor)):
            yield b" " * 1000

    async with make_lab(max_body_bytes=10_000) as lab:
        body = b" " * int(10_000 * factor) if declared else pieces()
        try:
            answer = await lab.client.post(CHAT, content=body, headers={"content-type": "application/json"})
        except httpx.WriteError:
            assert factor > 2
            return
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


async def test_anthropics_route_has_anthropics_errors(lab: Lab) -> None:
    """Errors on /v1/messages have the `type` that its clients look for, and OpenAI's fields below."""
    answer = await lab.client.post("/v1/messages", json={"model": "none"})
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/nope", 404),
        ("POST", "/sleep", 404),
        ("POST", "/v1/load_lora_adapter", 404),
        ("POST", "/v1/load_lora_adapter/", 404),
        ("POST", "/v1/%2e%2e/sleep", 404),
        ("GET", CHAT, 405),
        ("HEAD", CHAT, 405),
        ("OPTIONS", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("DELETE", "/v1/responses/x", 405),
        ("PATCH", "/v1/anything", 405),
    ],
)
async def test_unknown_routes_and_methods(lab: Lab, method: str, path: str, status: int) -> None:
    """404 and 405 have OpenAI's shape, and 405 says what is allowed."""
    answer = await lab.client.request(method, path)
    assert answer.status_code == status
    if method != "HEAD":
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    if status == 405:
        assert answer.headers["allow"]


async def test_streams_pass_byte_for_byte(lab: Lab) -> None:
    """Comments, odd line ends and events cut into pieces reach the client as the engine wrote them."""
    lab.model.light()
    pieces = (b": hi\n\nda", b"ta: 1\n", b"\ndata: 2\r\n\r\n", b"data: 3\n\n", b"data: [DONE]\n\n", b"tail")
    lab.engine.script.pieces = pieces
    answer = await lab.chat(stream=True)
    assert answer.content == b"".join(pieces)
    assert answer.headers["content-type"] == "text/event-stream"


async def test_events_are_not_held_back(lab: Lab) -> None:
    """An event is with the client before the engine has written the next."""
    lab.model.light()
    go_on = asyncio.Event()
    lab.engine.script.gate_after_chunks = (1, go_on)
    async with lab.client.stream("POST", CHAT, json={"model": "tiny", "stream": True}) as answer:
        lines = answer.aiter_lines()
        assert "Hel" in await anext(lines)
        go_on.set()
        assert "[DONE]" in [line.removeprefix("data: ") async for line in lines]


async def test_large_documents_are_not_held_whole(lab: Lab) -> None:
    """A document over the bound begins to flow before its end."""
    lab.model.light()
    go_on = asyncio.Event()
    lab.engine.script.pieces = (b"x" * (2 << 20), b"end")
    lab.engine.script.piece_type = b"application/json"
    lab.engine.script.gate_after_chunks = (1, go_on)
    async with lab.client.stream("POST", CHAT, json={"model": "tiny"}) as answer:
        chunks = answer.aiter_bytes()
        size = len(await anext(chunks))
        go_on.set()
        async for chunk in chunks:
            size += len(chunk)
    assert size == (2 << 20) + 3


async def test_an_empty_answer_is_an_answer(lab: Lab) -> None:
    """A 204 without a body passes."""
    lab.model.light()
    lab.engine.script.answer = (204, b"application/json", b"")
    assert (await lab.chat()).status_code == 204
