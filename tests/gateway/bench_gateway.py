"""What the gateway costs: processor time for each request and each streamed chunk, before a null engine.

    python -m tests.gateway.bench_gateway [--streams 32] [--tokens 200] [--interval-ms 20] [--requests 2000]

Three processes: a null engine on a unix socket, the gateway on a loopback port, and this one, the client. The
numbers are the gateway's own processor time, which depends less than a clock on what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil  # type: ignore[import-untyped]
import uvicorn
from starlette.types import Receive, Scope, Send

from deployments.fleet import Fleet
from deployments.gateway.app import build_gateway
from deployments.gateway.engines import ColdStart, Headers, Progress
from deployments.gateway.observe import NullTelemetry
from deployments.gateway.transport import UnixEngineResponse, UnixTransport
from tests.gateway.lab import CHAT

_DOCUMENT = json.dumps({"choices": [{"message": {"content": "x" * 400}}]}).encode()
_EVENT = (
    b'data: {"choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}'
    + b" " * 120
    + b"\n\n"
)


async def null_engine(scope: Scope, receive: Receive, send: Send) -> None:
    """`tokens` events, one each `interval_s`, or one document."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    asked = json.loads(body)
    kind = b"text/event-stream" if asked["stream"] else b"application/json"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    if not asked["stream"]:
        await send({"type": "http.response.body", "body": _DOCUMENT})
        return
    for _ in range(asked["tokens"]):
        await asyncio.sleep(asked["interval_s"])
        await send({"type": "http.response.body", "body": _EVENT, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


class _Lease:
    engine_id = "null"
    cold_start = ColdStart("null", "forked", 0.0)

    def __init__(self, transport: UnixTransport) -> None:
        self._transport = transport

    async def request(self, method: str, target: str, headers: Headers, body: bytes) -> UnixEngineResponse:
        return await self._transport.request(method, target, headers, body)

    async def release(self, *, engine_failed: bool = False) -> None:
        """Nothing."""


class _Engines:
    def __init__(self, uds: str) -> None:
        self._uds = uds
        self._lease: _Lease | None = None

    async def acquire(self, model: str) -> _Lease:
        if self._lease is None:
            self._lease = _Lease(UnixTransport(self._uds))
        return self._lease

    def progress(self, model: str) -> Progress | None:
        return None

    def state(self, model: str) -> str:
        return "ready"

    async def status(self) -> Mapping[str, Any]:
        return {}

    async def engine_metrics(self) -> Sequence[tuple[str, str]]:
        return []


def serve_engine(uds: str) -> None:
    """The engine's process."""
    uvicorn.run(null_engine, uds=uds, log_level="error", interface="asgi3")


def serve_gateway(uds: str, port: int) -> None:
    """The gateway's process."""
    fleet = Fleet.model_validate({"models": [{"id": "null", "source": "org/null"}]})
    uvicorn.run(
        build_gateway(fleet, _Engines(uds), NullTelemetry()), port=port, log_level="error", access_log=False
    )


async def _until_up(session: aiohttp.ClientSession, url: str) -> None:
    while True:
        try:
            async with session.post(f"{url}{CHAT}", json={"model": "null", "stream": False}) as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.1)


async def _measure(options: argparse.Namespace, url: str, gateway: psutil.Process) -> None:
    def used_s() -> float:
        times = gateway.cpu_times()
        return float(times.user + times.system)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await _until_up(session, url)

        async def ask(**fields: Any) -> None:
            async with session.post(f"{url}{CHAT}", json={"model": "null", **fields}) as answer:
                async for _ in answer.content.iter_any():
                    pass

        async def some(count: int) -> None:
            for _ in range(count):
                await ask(stream=False)

        await some(200)
        cpu_s, began_s = used_s(), time.perf_counter()
        await asyncio.gather(*(some(options.requests // 8) for _ in range(8)))
        spent_s = used_s() - cpu_s
        took_s = time.perf_counter() - began_s
        each_us = spent_s / options.requests * 1e6
        print(f"documents: {each_us:.0f} us of CPU each, {options.requests / took_s:.0f}/s")

        fields = {"stream": True, "tokens": options.tokens, "interval_s": options.interval_ms / 1e3}
        cpu_s, began_s = used_s(), time.perf_counter()
        await asyncio.gather(*(ask(**fields) for _ in range(options.streams)))
        spent_s = used_s() - cpu_s
        took_s = time.perf_counter() - began_s
        chunks = options.streams * options.tokens
        print(
            f"streams: {spent_s / chunks * 1e6:.1f} us of CPU each chunk, {chunks / took_s:.0f} chunks/s, "
            f"{spent_s / took_s:.0%} of a core"
        )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--interval-ms", type=float, default=20)
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="rl") as folder:
        uds = str(Path(folder) / "e")
        engine = spawn.Process(target=serve_engine, args=(uds,))
        gateway = spawn.Process(target=serve_gateway, args=(uds, port))
        engine.start()
        gateway.start()
        try:
            asyncio.run(_measure(options, f"http://127.0.0.1:{port}", psutil.Process(gateway.pid)))
        finally:
            gateway.terminate()
            engine.terminate()


if __name__ == "__main__":
    main()
