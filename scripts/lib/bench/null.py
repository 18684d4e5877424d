"""An engine that does nothing, and the Serve applications that are measured before it.

`python -m bench.null SOCKET`: answers chat completions on a Unix socket with `max_tokens` events, `interval_ms` apart.
`python -m bench.null deploy-bare ROOT`: adds the bare application to the cluster of that folder, under /bare.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import httptools

SOCKET = "RELIGHT_BENCH_NULL_ENGINE"  # in the cluster's environment: where the null engine listens
_HEAD = b"HTTP/1.1 200 OK\r\nserver: null\r\n"
EVENT = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":0,"model":"null","choices":'
    b'[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
)
LAST = b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\ndata: [DONE]\n\n'
DOCUMENT = json.dumps(
    {"choices": [{"message": {"role": "assistant", "content": "x" * 400}}], "usage": {"completion_tokens": 1}}
).encode()


class NullEngine(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        body, self._body = self._body, b""
        asked = json.loads(body) if body else {"stream": False}
        if asked.get("stream"):
            self._streaming = asyncio.ensure_future(self._stream(asked))
            return
        head = _HEAD + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(DOCUMENT)
        self._transport.write(head + DOCUMENT)

    async def _stream(self, asked: Mapping[str, Any]) -> None:
        head = _HEAD + b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        self._transport.write(head)
        async for event in events(asked):
            if self._transport.is_closing():
                return
            self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        self._transport.write(b"0\r\n\r\n")


async def events(asked: Mapping[str, Any]) -> AsyncIterator[bytes]:
    """What is streamed, the first at once."""
    tokens, interval_s = int(asked["max_tokens"]), float(asked.get("interval_ms", 0)) / 1000
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    for number in range(tokens):
        # Against the clock, so that late wake-ups do not make the engine slower.
        await asyncio.sleep(max(0.0, began_s + number * interval_s - loop.time()))
        yield EVENT
    yield LAST % tokens


async def serve_null(path: str) -> None:
    """Listen until killed."""
    server = await asyncio.get_running_loop().create_unix_server(NullEngine, path, backlog=1024)
    await server.serve_forever()


# Relight's application, with replicas that hold the null engine


def build(args: dict[str, Any]) -> Any:
    """`deployments.app:build` with replicas that hold the null engine: gateway, leases and proxy are the real ones."""
    import deployments.app
    from deployments.engine.protocol import EngineInfo
    from deployments.model import ModelReplica

    class NullReplica(ModelReplica):
        async def _start_engine(self) -> None:
            path = os.environ[SOCKET]
            info = EngineInfo(
                engine_id="null",
                model=self._spec.model,
                fingerprint=self._spec.fingerprint,
                kind="null",
                state="ready",
                http=path,
                control=path,
            )
            self._engine, self._tunnel.target = info, path

    # Serve names a deployment after its options, not after its class.
    with patch.object(deployments.app, "ModelReplica", NullReplica):
        return deployments.app.build(args)


# A Serve application with nothing in it


async def bare_asgi(scope: Any, receive: Any, send: Any) -> None:
    """The same bytes from memory, in the shape that costs Serve least: an ASGI application."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    asked = json.loads(body)
    stream = asked["stream"]
    kind = b"text/event-stream; charset=utf-8" if stream else b"application/json"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    if stream:
        async for event in events(asked):
            await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b"" if stream else DOCUMENT})


def bare_application() -> Any:
    from ray import serve

    def app() -> Any:  # Serve takes a plain function for one that makes the application
        return bare_asgi

    @serve.deployment(name="Bare", max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0})
    @serve.ingress(app)
    class Bare:
        pass

    return Bare.bind()  # type: ignore[attr-defined]


def trivial(_: dict[str, Any]) -> Any:
    """The least that Ray Serve can serve, to see what Ray itself holds."""
    from ray import serve

    @serve.deployment(name="Trivial", ray_actor_options={"num_cpus": 0})
    class Trivial:
        async def __call__(self, _: Any) -> str:
            return "ok"

    return Trivial.bind()  # type: ignore[attr-defined]


def deploy_bare(root: Path) -> None:
    """Next to what the cluster serves already."""
    from deployments.local.serving import client_env
    from deployments.local.state import Checkout

    checkout = Checkout(root)
    cluster = checkout.load()
    assert cluster is not None
    os.environ.update(client_env(checkout))
    import ray
    from ray import serve

    ray.init(cluster.ray_address, namespace="serve", log_to_driver=False, logging_level="WARNING")
    serve.run(bare_application(), name="bare", route_prefix="/bare")
    ray.shutdown()


if __name__ == "__main__":
    if sys.argv[1] == "deploy-bare":
        deploy_bare(Path(sys.argv[2]))
    else:
        import uvloop

        uvloop.run(serve_null(sys.argv[1]))
