"""The gateway's own description, and raw abuse, against the running gateway."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from tests.gateway.lab import CHAT, Lab

BOUNDED = settings(
    max_examples=25,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
OURS = {502, 503, 504}


async def test_the_description_holds(lab: Lab) -> None:
    """Cases made from the description are answered as it says, never with a 5xx that isn't ours."""
    for model in lab.engines.models.values():
        model.light()
    document = (await lab.client.get("/openapi.json")).json()
    document["components"]["schemas"]["Request"]["properties"]["model"]["enum"] = [
        "tiny",
        "small",
        "no such model",
    ]
    schema: Any = schemathesis.openapi.from_dict(document)
    statuses: dict[str, set[int]] = {}

    def explore() -> None:
        for result in schema.get_all_operations():
            operation = result.ok()

            @seed(1)
            @BOUNDED
            @given(case=operation.as_strategy())
            def conforms(case: schemathesis.Case[Any]) -> None:
                answer = case.call(base_url=lab.url)
                statuses.setdefault(case.path, set()).add(answer.status_code)
                excluded: Any = [not_a_server_error] if answer.status_code in OURS else []
                case.validate_response(answer, excluded_checks=excluded)

            conforms()

    await asyncio.to_thread(explore)
    assert statuses[CHAT] >= {200, 404}
    assert len(statuses) == len(document["paths"])
    await lab.quiet()


NAMES = st.sampled_from([b"model", b"x-request-id", b"authorization", b"content-type", b"traceparent", b"te"])
HEADERS = st.lists(st.tuples(NAMES | st.binary(max_size=8), st.binary(max_size=30)), max_size=6)
HEADS = st.sampled_from(
    [b"POST /v1/chat/completions HTTP/1.1", b"GET /v1/models/%ff HTTP/1.1", b"POST /v1/a%0d%0ab HTTP/1.1"]
)


async def test_raw_abuse_is_never_a_server_error(lab: Lab) -> None:
    """Any bytes for headers and body get an answer below 500, or a closed connection from the HTTP server."""
    lab.model.light()
    host, port = lab.url.removeprefix("http://").split(":")

    async def send(request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        writer.write_eof()
        try:
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    loop = asyncio.get_running_loop()

    def explore() -> None:
        @seed(1)
        @settings(BOUNDED, max_examples=200)
        @given(HEADS, HEADERS, st.binary(max_size=60) | st.just(b'{"model": "tiny"}'), st.booleans())
        def survives(head: bytes, headers: list[tuple[bytes, bytes]], body: bytes, typed: bool) -> None:
            lines = [head, b"host: x", b"connection: close", b"content-length: %d" % len(body)]
            lines += [b"content-type: application/json"] * typed
            lines += [name + b": " + value for name, value in headers]
            request = b"\r\n".join(lines) + b"\r\n\r\n" + body
            answer = asyncio.run_coroutine_threadsafe(send(request), loop).result(30)
            assert not answer or answer.split(b" ", 2)[1] < b"500", answer

        survives()

    await asyncio.to_thread(explore)
    await lab.quiet()


async def test_any_json_is_answered(lab: Lab) -> None:
    """Whatever JSON a chat request holds, the answer is the engine's or a 4xx of the gateway."""
    lab.model.light()
    values = st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
        max_leaves=5,
    )
    bodies = values | st.fixed_dictionaries({"model": values | st.just("tiny"), "stream": values})
    loop = asyncio.get_running_loop()
    typed = {"content-type": "application/json"}

    def explore() -> None:
        @seed(1)
        @settings(BOUNDED, max_examples=100)
        @given(bodies)
        def is_answered(body: object) -> None:
            asking = lab.client.post(CHAT, content=json.dumps(body), headers=typed)
            status = asyncio.run_coroutine_threadsafe(asking, loop).result(30).status_code
            assert status in (200, 400, 404)

        is_answered()

    await asyncio.to_thread(explore)
    await lab.quiet()
