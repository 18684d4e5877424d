"""An HTTP client that costs little and takes times: one connection, one request at a time, bytes as they come.

It is the same for every system that is measured, and `closed_loop` says how much of a core it took itself.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httptools

# vLLM's first event has the role and an empty content: that is not a token yet.
_FIRST_TOKEN = re.compile(rb'"(?:content|text)":\s*"[^"]')
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
_TAIL_BYTES = 1024


@dataclass(frozen=True)
class Target:
    """Where a system listens: a TCP port of loopback, or a Unix socket."""

    port: int = 0
    uds: str = ""


@dataclass(slots=True)
class Timing:
    """One request. Times are of time.time(), so that they compare with what other processes noted."""

    sent_s: float
    status: int = 0
    head_s: float = 0.0
    first_s: float = 0.0  # the first token; 0 if none came
    last_s: float = 0.0  # the last bytes that were not the end
    done_s: float = 0.0
    reads: int = 0
    body_bytes: int = 0
    tokens: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    error: bytes = b""

    @property
    def first_token_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def total_s(self) -> float:
        return self.done_s - self.sent_s


class RequestFailed(Exception):
    """The system that is measured did not answer as it should."""


class Connection(asyncio.Protocol):
    """One keep-alive connection."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Timing] | None = None

    @classmethod
    async def open(cls, target: Target) -> Connection:
        loop = asyncio.get_running_loop()
        if target.uds:
            _, connection = await loop.create_unix_connection(cls, target.uds)
        else:
            _, connection = await loop.create_connection(cls, "127.0.0.1", target.port)
        return connection

    def post(self, request: bytes) -> asyncio.Future[Timing]:
        """Send a whole request (see `chat`); the future is its timing."""
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._before_first = b""
        self._tail = b""
        self._timing = Timing(time.time())
        self._transport.write(request)
        return self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._timing.reads += 1
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._done is not None and not self._done.done():
            self._done.set_exception(
                RequestFailed(f"the connection closed in the middle of an answer: {exc}")
            )

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self._timing.headers[name.decode("latin1").lower()] = value.decode("latin1")

    def on_headers_complete(self) -> None:
        self._timing.status = self._parser.get_status_code()
        self._timing.head_s = time.time()

    def on_body(self, data: bytes) -> None:
        timing = self._timing
        now_s = time.time()
        timing.body_bytes += len(data)
        if not timing.first_s:
            self._before_first = (self._before_first + data)[-65536:]
            if _FIRST_TOKEN.search(self._before_first):
                timing.first_s = now_s
        if b"data: [DONE]" not in data:
            timing.last_s = now_s
        self._tail = (self._tail + data)[-_TAIL_BYTES:]

    def on_message_complete(self) -> None:
        timing = self._timing
        timing.done_s = time.time()
        if found := _USAGE.findall(self._tail):
            timing.tokens = int(found[-1])
        if timing.status != 200 or not timing.first_s:
            timing.error = self._tail
        if not self._parser.should_keep_alive():
            self.close()
            self.closed = True
        if self._done is not None and not self._done.done():
            self._done.set_result(timing)


def chat(model: str, prompt: str, max_tokens: int, path: str = "/v1/chat/completions") -> bytes:
    """A streaming chat completion of exactly `max_tokens` tokens, as the bytes of a whole request."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }
    return request(path, json.dumps(body).encode())


def request(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


async def one(target: Target, data: bytes, timeout_s: float) -> Timing:
    """One request on a connection of its own. Raises RequestFailed for any answer that is not a stream of tokens."""
    connection = await Connection.open(target)
    try:
        timing = await asyncio.wait_for(connection.post(data), timeout_s)
    except TimeoutError:
        raise RequestFailed(f"no answer within {timeout_s:.0f} s") from None
    finally:
        connection.close()
    check(timing)
    return timing


def check(timing: Timing) -> None:
    if timing.error or timing.status != 200:
        raise RequestFailed(f"status {timing.status}: {timing.error[:500]!r}")


@dataclass(frozen=True)
class Load:
    """What a closed loop did."""

    timings: list[Timing]
    wall_s: float
    client_cpu_s: float


async def closed_loop(target: Target, requests: Sequence[bytes], concurrency: int) -> Load:
    """Send all `requests`, `concurrency` at a time, the next as soon as one is answered."""
    pending = iter(requests)
    timings: list[Timing] = []

    async def worker() -> None:
        connection = await Connection.open(target)
        try:
            for data in pending:
                if connection.closed:
                    connection = await Connection.open(target)
                timing = await connection.post(data)
                check(timing)
                timings.append(timing)
        finally:
            connection.close()

    cpu_s, began_s = time.process_time(), time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return Load(timings, time.perf_counter() - began_s, time.process_time() - cpu_s)
