"""Engines without Ray and without vLLM: scripted leases to a real HTTP server over a real unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from deployments.errors import EngineStartFailed
from deployments.gateway.engines import ColdStart, Headers, Phase, Progress
from deployments.gateway.transport import UnixEngineResponse, UnixTransport


class Watched:
    """Lets a test wait for a state instead of for a time."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """Something that a test may wait for has changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, reached: Callable[[], bool]) -> None:
        """Wait until `reached()`; it is asked anew after each `notify`."""
        while not reached():
            await self._changed.wait()


class Server(uvicorn.Server):
    """Uvicorn inside a test: no signal handlers, and a context manager."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stop = asyncio.Event()

    async def main_loop(self) -> None:
        """Until told to stop; uvicorn's own looks every 0.1 s, which adds up over hundreds of tests."""
        await self.on_tick(0)  # writes the Date header
        await self._stop.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which pauses for 0.1 s first and then looks every 0.1 s."""
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        async with asyncio.timeout(self.config.timeout_graceful_shutdown):
            while self.server_state.connections or self.server_state.tasks:  # noqa: ASYNC110 - they have no event
                await asyncio.sleep(0.001)
        for server in self.servers:
            await server.wait_closed()
        await self.lifespan.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to pytest."""
        yield

    @contextlib.asynccontextmanager
    async def running(self, listener: socket.socket) -> AsyncIterator[None]:
        """Serve on `listener`, which already takes connections, until the block ends."""
        serving = asyncio.create_task(self.serve(sockets=[listener]))
        try:
            yield
        finally:
            self._stop.set()
            await serving


@dataclass(slots=True)
class Script:
    """What an engine does with the requests that come."""

    die_before_first_byte: int = 0  # so many requests find the connection reset
    die_after_headers: int = 0  # so many find it reset before the first body byte
    die_after_chunks: int | None = None  # connection reset after so many pieces of a stream or a document
    deaths: int = 1 << 30  # how often `die_after_chunks` happens
    tokens: tuple[str, ...] = ("Hel", "lo", "!")
    answer: tuple[int, bytes, bytes] | None = None  # status, content type, body, instead of vLLM's
    pieces: tuple[bytes, ...] | None = None  # body pieces of a 200, instead of vLLM's
    piece_type: bytes = b"text/event-stream"
    gate: asyncio.Event | None = None  # the answer begins when it is set
    gate_after_chunks: tuple[int, asyncio.Event] | None = None  # the stream goes on when it is set
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(slots=True)
class Seen:
    """A request as the engine got it."""

    method: str
    target: str
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        """The first header of that name in lower case."""
        return next((value for key, value in self.headers if key == name), None)


class FakeEngine(Watched):
    """A server that speaks as much of vLLM's HTTP surface as a gateway can tell apart."""

    def __init__(self, engine_id: str, uds: Path, script: Script | None = None) -> None:
        super().__init__()
        self.engine_id = engine_id
        self.uds = str(uds)
        self.script = script or Script()
        self.seen: list[Seen] = []
        self.aborted = 0  # requests whose client went away before their end
        self.answered = 0
        self.pieces_sent = 0
        self.cold_start = ColdStart(engine_id, "forked", 0.0)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[FakeEngine]:
        """Serve on the engine's socket until the block ends."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.uds)
        listener.listen(2048)
        server = Server(
            uvicorn.Config(
                self._app, log_level="error", lifespan="off", interface="asgi3", timeout_graceful_shutdown=1
            )
        )
        async with server.running(listener):
            yield self

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        target = scope["raw_path"].decode() + ("?" + scope["query_string"].decode()) * bool(
            scope["query_string"]
        )
        self.seen.append(Seen(scope["method"], target, list(scope["headers"]), body))
        self.notify()
        working = asyncio.create_task(self._work(scope, body, send))
        leaving = asyncio.create_task(self._left(receive))
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not working.done():
            working.cancel()
            self.aborted += 1
            self.notify()
        await asyncio.wait({working, leaving})
        if not working.cancelled():
            working.result()

    @staticmethod
    async def _left(receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _work(self, scope: Scope, body: bytes, send: Send) -> None:
        script = self.script
        transport = send.__self__.transport  # type: ignore[attr-defined]  # a death is a reset
        if script.die_before_first_byte > 0:
            script.die_before_first_byte -= 1
            transport.abort()
            return
        if script.gate is not None:
            await script.gate.wait()
        status, content_type, pieces = self._answer(scope, body)
        headers = [
            (b"content-type", content_type),
            (b"x-from-engine", self.engine_id.encode()),
            *script.headers,
        ]
        if len(pieces) == 1:
            headers.append((b"content-length", str(len(pieces[0])).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if script.die_after_headers > 0:
            script.die_after_headers -= 1
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            transport.abort()
            return
        dies = script.die_after_chunks is not None and script.deaths > 0
        for count, piece in enumerate(pieces):
            if dies and count == script.die_after_chunks:
                script.deaths -= 1
                transport.close()  # what was sent before still arrives
                return
            if script.gate_after_chunks is not None and count == script.gate_after_chunks[0]:
                await script.gate_after_chunks[1].wait()
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            self.pieces_sent += 1
            self.notify()
        await send({"type": "http.response.body", "body": b""})
        self.answered += 1
        self.notify()

    def _answer(self, scope: Scope, body: bytes) -> tuple[int, bytes, Sequence[bytes]]:
        script = self.script
        if script.answer is not None:
            return script.answer[0], script.answer[1], [script.answer[2]]
        if script.pieces is not None:
            return 200, script.piece_type, script.pieces
        try:
            asked = json.loads(body)
        except ValueError:
            asked = {}
        if not isinstance(asked, dict):
            asked = {}
        stream = asked.get("stream") is True
        document, events = vllm_answer(scope["path"], asked, script.tokens)
        if stream and events:
            return 200, b"text/event-stream; charset=utf-8", events
        data = json.dumps(document).encode()
        # A document that dies half-way needs two halves.
        return 200, b"application/json", [data] if script.die_after_chunks is None else [data[:9], data[9:]]


def vllm_answer(path: str, asked: Mapping[str, Any], tokens: Sequence[str]) -> tuple[Any, list[bytes]]:
    """(document, events) as vLLM would answer; no events where it doesn't stream."""
    text = "".join(tokens)
    base: dict[str, Any] = {"id": "x-1", "created": 1, "model": asked.get("model", "m")}
    count = len(tokens)
    usage: Any = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": 1 + count}

    def data(*documents: Any) -> list[bytes]:
        return [b"data: " + json.dumps(item).encode() + b"\n\n" for item in documents] + [b"data: [DONE]\n\n"]

    def named(*documents: Any) -> list[bytes]:
        return [f"event: {item['type']}\ndata: {json.dumps(item)}\n\n".encode() for item in documents]

    if path == "/v1/chat/completions":
        message: dict[str, Any] = {"role": "assistant", "content": text}
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "message": message}
        chunk: dict[str, Any] = {**base, "object": "chat.completion.chunk"}
        delta: dict[str, Any] = {"index": 0, "finish_reason": None}
        deltas: list[Any] = [{**delta, "delta": {"content": token}} for token in tokens]
        return (
            {**base, "object": "chat.completion", "choices": [choice], "usage": usage},
            data(*({**chunk, "choices": [delta]} for delta in deltas)),
        )
    if path == "/v1/completions":
        choices = [[{"index": 0, "text": token, "finish_reason": "stop"}] for token in tokens]
        return (
            {
                **base,
                "object": "text_completion",
                "choices": [{"index": 0, "text": text, "finish_reason": "stop"}],
            },
            data(*({**base, "object": "text_completion", "choices": choice} for choice in choices)),
        )
    if path == "/v1/embeddings":
        entry: dict[str, Any] = {"object": "embedding", "index": 0, "embedding": [0.5, -0.5]}
        return {**base, "object": "list", "data": [entry], "usage": usage}, []
    if path.startswith("/v1/responses"):
        content = {"type": "output_text", "text": text, "annotations": []}
        output = {
            "id": "msg",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [content],
        }
        response = {
            **base,
            "object": "response",
            "created_at": 1,
            "status": "completed",
            "output": [output],
            "parallel_tool_calls": False,
            "tool_choice": "auto",
            "tools": [],
        }
        place = {"item_id": "msg", "output_index": 0, "content_index": 0, "logprobs": []}
        deltas = [
            {"type": "response.output_text.delta", "delta": token, "sequence_number": number, **place}
            for number, token in enumerate(tokens)
        ]
        done = {"type": "response.completed", "response": response, "sequence_number": len(tokens)}
        return response, named(*deltas, done)
    if path == "/v1/messages":
        message = {
            "id": "msg",
            "type": "message",
            "role": "assistant",
            "model": base["model"],
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 1, "output_tokens": len(tokens)},
        }
        return message, named(
            {"type": "message_start", "message": {**message, "content": []}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            *(
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": t}}
                for t in tokens
            ),
            {"type": "content_block_stop", "index": 0},
            {"type": "message_stop"},
        )
    return {**base, "path": path}, []


class FakeLease:
    """A lease to one fake engine."""

    def __init__(self, model: FakeModel, engine: FakeEngine) -> None:
        self._model = model
        self._engine = engine
        self._released = False
        self.engine_id = engine.engine_id
        self.cold_start = engine.cold_start

    async def request(self, method: str, target: str, headers: Headers, body: bytes) -> UnixEngineResponse:
        """Through the real transport."""
        return await self._model.transport(self._engine).request(method, target, headers, body)

    async def release(self, *, engine_failed: bool = False) -> None:
        """Count the lease as given back, when `release_gate` lets it."""
        if not self._released and self._model.release_gate is not None:
            self._model.releasing += 1
            self._model.notify()
            await self._model.release_gate.wait()
        if not self._released:
            self._released = True
            self._model.leased -= 1
            self._model.failed_leases += engine_failed
            self._model.notify()


class FakeModel(Watched):
    """One model's engines, dark until `light` is called unless it starts lit."""

    def __init__(self, id_: str, engines: Sequence[FakeEngine]) -> None:
        super().__init__()
        self.id = id_
        self.engines = list(engines)
        self._rotation = itertools.cycle(self.engines)
        self._lit = False
        self._failure: str | None = None
        self._transports: dict[str, UnixTransport] = {}
        self.progress: Progress | None = None
        self.state = "dark"
        self.waiting = 0
        self.leased = 0
        self.acquired = 0
        self.failed_leases = 0
        self.releasing = 0
        self.release_gate: asyncio.Event | None = None
        self.on_acquire: Callable[[], Awaitable[None]] | None = None

    def transport(self, engine: FakeEngine) -> UnixTransport:
        """The pool of connections to one engine."""
        if engine.engine_id not in self._transports:
            self._transports[engine.engine_id] = UnixTransport(engine.uds)
        return self._transports[engine.engine_id]

    def light(self, ready_s: float = 0.0, phases: tuple[Phase, ...] = ()) -> None:
        """The engines are ready, since `ready_s` (Unix time)."""
        for engine in self.engines:
            engine.cold_start = ColdStart(engine.engine_id, "forked", ready_s, phases)
        self._lit, self._failure, self.progress, self.state = True, None, None, "ready"
        self.notify()

    def lighting(
        self, phase: str = "weights", elapsed_s: float = 2.1, estimate_s: float | None = 4.0
    ) -> None:
        """The engines are on their way."""
        self.progress, self.state = Progress(phase, elapsed_s, estimate_s), "lighting"
        self.notify()

    def fail(self, reason: str) -> None:
        """The engines can't start."""
        self._lit, self._failure, self.progress, self.state = False, reason, None, "failed"
        self.notify()

    def darken(self) -> None:
        """No engine is left."""
        self._lit, self.state = False, "dark"
        self.notify()

    async def acquire(self) -> FakeLease:
        """Wait for `light` or `fail`."""
        self.waiting += 1
        self.notify()
        try:
            if self.on_acquire is not None:
                await self.on_acquire()
            await self.until(lambda: self._lit or self._failure is not None)
        finally:
            self.waiting -= 1
            self.notify()
        if self._failure is not None:
            raise EngineStartFailed(self._failure)
        self.leased += 1
        self.acquired += 1
        self.notify()
        return FakeLease(self, next(self._rotation))

    async def close(self) -> None:
        """Close the connections."""
        for transport in self._transports.values():
            await transport.close()


@dataclass(slots=True)
class FakeEngines:
    """`Engines` over fake models."""

    models: dict[str, FakeModel]
    metrics: list[tuple[str, str]] = field(default_factory=list)
    controlled: list[tuple[Any, ...]] = field(default_factory=list)
    control_status: int = 418

    async def acquire(self, model: str) -> FakeLease:
        """Wait until the model is lit."""
        return await self.models[model].acquire()

    def progress(self, model: str) -> Progress | None:
        """As the test said."""
        return self.models[model].progress

    def state(self, model: str) -> str:
        """As the test said."""
        return self.models[model].state

    async def status(self) -> Mapping[str, Any]:
        """The states alone."""
        return {"models": [{"id": model.id, "state": model.state} for model in self.models.values()]}

    async def control(
        self, method: str, path: str, query: Mapping[str, str], body: bytes, authorization: str | None
    ) -> tuple[int, dict[str, Any]]:
        """Keeps what was asked, and answers `control_status`."""
        self.controlled.append((method, path, dict(query), body, authorization))
        return self.control_status, {"answer": len(self.controlled)}

    async def engine_metrics(self) -> Sequence[tuple[str, str]]:
        """As the test said."""
        return self.metrics


@contextlib.asynccontextmanager
async def fake_engines(*ids: str, replicas: int = 1) -> AsyncIterator[FakeEngines]:
    """Dark models of those ids, with the servers of their engines already listening."""
    async with contextlib.AsyncExitStack() as stack:
        # Not pytest's own folder: a unix socket's path may have 107 bytes.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rl")))
        models: dict[str, FakeModel] = {}
        for number, id_ in enumerate(ids):
            engines = [
                FakeEngine(f"{number}-{copy}", folder / f"{number}-{copy}.sock") for copy in range(replicas)
            ]
            for engine in engines:
                await stack.enter_async_context(engine.running())
            models[id_] = FakeModel(id_, engines)
            stack.push_async_callback(models[id_].close)
        yield FakeEngines(models)
