"""The life of one proxied request: read, admit, wait for an engine, retry, stream, clean up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qs, quote

from starlette.types import Receive, Scope, Send

from deployments.errors import (
    BodyStalled,
    BodyTooLarge,
    DeadlineExceeded,
    EngineInterrupted,
    EngineStartFailed,
    EngineUnreachable,
    GatewayClosing,
    InvalidRequest,
    MethodNotAllowed,
    RelightError,
)
from deployments.gateway import openai, sse
from deployments.gateway.admission import Admission, retry_after_s
from deployments.gateway.engines import ColdStart, EngineResponse, Engines, Headers, Lease, Progress
from deployments.gateway.observe import (
    Clock,
    GatewayTelemetry,
    NullRequestTelemetry,
    RequestTelemetry,
)
from deployments.gateway.traffic import TrafficCounter

log = logging.getLogger(__name__)
T = TypeVar("T")

# Bodies up to this size are held back whole, so that an engine's death in their middle can be retried unseen.
HELD_BODY_BYTES = 1 << 20
BODY_STALL_S = 60.0
"""For the next piece of a request's body: who sends none for so long is gone, or holds connections on purpose."""
_HUNG_UP = 499


class Limits(Protocol):
    """A model's limits, as `fleet.Limits` has them; seconds."""

    @property
    def max_queued(self) -> int: ...
    @property
    def start_deadline_s(self) -> float: ...
    @property
    def request_deadline_s(self) -> float: ...


class Model(Protocol):
    """A model, as `fleet.Model` has it."""

    @property
    def id(self) -> str: ...
    @property
    def aliases(self) -> Sequence[str]: ...
    @property
    def limits(self) -> Limits: ...


class GatewayConfig(Protocol):
    """The gateway's settings, as `fleet.GatewayConfig` has them; bytes and seconds."""

    @property
    def max_body_bytes(self) -> int: ...
    @property
    def progress_after_s(self) -> float: ...
    @property
    def progress_every_s(self) -> float: ...
    @property
    def max_attempts(self) -> int: ...
    @property
    def cors_origins(self) -> Sequence[str]: ...


class Fleet(Protocol):
    """The fleet, as `fleet.Fleet` has it."""

    @property
    def models(self) -> Sequence[Model]: ...
    @property
    def gateway(self) -> GatewayConfig: ...
    def resolve(self, name: str) -> Model | None: ...


class ClientGone(Exception):
    """The client hung up before its request was complete."""


class _HangUp:
    """Cancels the task inside its block when the client hangs up, and swallows that cancellation alone.

    One task for each request watches `receive`; none for each chunk. Servers report a disconnect after a
    complete answer too, which is no hang-up: `finished` tells.
    """

    def __init__(self, receive: Receive, finished: Callable[[], bool]) -> None:
        self._receive = receive
        self._finished = finished
        self.happened = False

    async def __aenter__(self) -> _HangUp:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._finished():
            self.happened = True
            self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._watcher.cancel()
        await asyncio.wait({self._watcher})
        if not self._watcher.cancelled() and (failure := self._watcher.exception()) is not None:
            log.error("Watching for the client's hang-up failed", exc_info=failure)
        # Whoever else cancelled this task (Serve, at shutdown) still wants it cancelled.
        return self.happened and self._task.uncancel() == 0 and kind is asyncio.CancelledError


@dataclass(slots=True)
class _Answer:
    """An engine that has begun to answer."""

    lease: Lease
    response: EngineResponse
    head: bytes  # body bytes read so far
    rest: AsyncIterator[bytes] | None  # None: `head` is the whole body
    events: bool

    async def close(self, *, engine_failed: bool = False) -> None:
        """Abort what is unfinished, and give the lease back."""
        try:
            if isinstance(self.rest, AsyncGenerator):
                await self.rest.aclose()
            await self.response.close()
        finally:
            await self.lease.release(engine_failed=engine_failed)


class _Exchange:
    """One request and the answer to it, as far as it has come."""

    def __init__(self, proxy: Proxy, route: openai.Route, scope: Scope, send: Send) -> None:
        self.proxy = proxy
        self.clock = proxy.clock
        self.route = route
        self.headers: Headers = scope["headers"]
        self.arrived_monotonic_s = self.clock.monotonic_s()
        self.request_id = openai.request_id(self.headers)
        self.method: str = scope["method"]
        self.query: bytes = scope.get("query_string", b"")
        self.target = ""
        self.body = b""
        self.model: Model | None = None
        self.stream = False
        self.telemetry: RequestTelemetry = NullRequestTelemetry()
        self.timeout_s: float | None = None
        self.waited_s = 0.0
        self.given_up_at: Progress | None = None  # how far the wake was when this request stopped waiting
        self.attempts = 0
        self.cold_start: ColdStart | None = None  # set when the engine was lit while this request waited
        self.in_vain = False  # it waited for a start that failed
        self.status = 0  # what the client has been told; 0: nothing yet
        self.error: str | None = None
        self.events = False
        self.finished = False  # the last byte was handed to the server
        self.send = send

    @property
    def started(self) -> bool:
        return self.status != 0

    @property
    def path(self) -> str:
        """As the engine was asked for it, without the query."""
        return self.target.partition("?")[0]

    def elapsed_s(self) -> float:
        return self.clock.monotonic_s() - self.arrived_monotonic_s

    def own_headers(self, *, lighting: bool = False) -> list[tuple[bytes, bytes]]:
        """What the gateway tells of this request in headers. `lighting`: the engine isn't there yet."""
        headers = [(b"x-request-id", self.request_id.encode("ascii"))]
        if self.model is None:
            return headers
        wait_s = self.elapsed_s() if lighting else self.waited_s
        cold = lighting or self.in_vain or self.given_up_at is not None or self.cold_start is not None
        return [
            *headers,
            (b"x-relight-model", openai.header_value(self.model.id)),
            (b"x-relight-cold-start", b"true" if cold else b"false"),
            (b"x-relight-wait-ms", str(round(wait_s * 1e3)).encode("ascii")),
            (b"x-relight-attempts", str(self.attempts).encode("ascii")),
            (b"server-timing", openai.server_timing(wait_s, self.cold_start)),
        ]

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, body: bytes, *, more: bool = True) -> None:
        self.finished = not more
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    async def fail(self, error: RelightError, *, state: str | None = None) -> None:
        """Tell the client in the way that is still open: a response, an event, or a broken body."""
        self.error = error.code or error.type
        if not self.started:
            document = openai.error_document(openai.error_fields(error), self.route.style)
            body = json.dumps(document).encode()
            headers = [
                *self.own_headers(),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode("ascii")),
            ]
            if error.retry_after_s is not None:
                seconds = max(1, math.ceil(error.retry_after_s))
                headers.append((b"retry-after", str(seconds).encode("ascii")))
            if state is not None:
                headers.append((b"x-relight-state", openai.header_value(state)))
            if isinstance(error, MethodNotAllowed):
                headers.append((b"allow", ", ".join(self.route.methods).encode("ascii")))
            if isinstance(error, BodyStalled):
                headers.append((b"connection", b"close"))  # or the rest, should it come, would be waited for
            await self.start(error.status, headers)
            await self.write(body, more=False)
        elif self.events:
            await self.write(sse.error_event(self.route.style, openai.error_fields(error)), more=False)
        else:
            # The body stays incomplete, so that the server breaks the connection and nobody takes it for
            # whole.
            log.warning("%s: %s", self.request_id, error.message)


class Proxy:
    """Carries requests from clients to engines."""

    def __init__(
        self,
        fleet: Fleet,
        engines: Engines,
        telemetry: GatewayTelemetry,
        clock: Clock,
        traffic: TrafficCounter,
    ) -> None:
        self.fleet = fleet
        self.engines = engines
        self.telemetry = telemetry
        self.clock = clock
        self.traffic = traffic
        self._names = [name for model in fleet.models for name in (model.id, *model.aliases)]
        self._queues = {model.id: Admission(model.limits.max_queued) for model in fleet.models}
        self.closing = False  # who is cancelled from now on has not hung up: the gateway's time is over

    def counts(self) -> dict[str, Admission]:
        """The queue of each model, by id."""
        return dict(self._queues)

    async def __call__(self, route: openai.Route, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Never raises, except what cancels it."""
        x = _Exchange(self, route, scope, send)
        try:
            try:
                await self._read(x, scope, receive)
                await self._serve(x, receive)
            except RelightError as error:
                state = self.engines.state(x.model.id) if x.model is not None else None
                if x.given_up_at is not None:
                    state = "lighting"  # as the message says, though nobody may wait for it any longer
                with contextlib.suppress(OSError):
                    await x.fail(error, state=state)
            except (ClientGone, OSError):  # OSError: what a server raises on a send to nobody
                x.status = _HUNG_UP
            except Exception:
                log.exception("Request %s failed in the gateway", x.request_id)
                with contextlib.suppress(OSError):
                    await x.fail(
                        RelightError(f"The gateway failed; its log tells more under {x.request_id}.")
                    )
        except asyncio.CancelledError:
            if self.closing:
                ends = "The gateway that held this request is being replaced; send it again."
                with contextlib.suppress(OSError):
                    await x.fail(GatewayClosing(ends, retry_after_s=1))
            else:
                x.status = _HUNG_UP
            raise
        finally:
            if x.status == _HUNG_UP:
                x.error = "client_gone"
            x.telemetry.ended(x.status or 500, x.error)

    # ------------------------------------------------------------------------------------------ what is asked

    async def _read(self, x: _Exchange, scope: Scope, receive: Receive) -> None:
        try:
            if x.method not in x.route.methods:
                allowed = ", ".join(x.route.methods)
                raise MethodNotAllowed(f"This route takes {allowed}, not {x.method[:20]}.")
            openai.check_headers(x.headers)
            x.target = target(scope)
            x.body = await read_body(receive, x.headers, self.fleet.gateway.max_body_bytes)
            if x.route.names_model:
                content_type = openai.header(x.headers, b"content-type")
                encoding = openai.header(x.headers, b"content-encoding")
                asked = openai.read_body(x.route, content_type, encoding, x.body)
                name, x.stream = asked.model, asked.stream
            else:
                name = self._model_beside_body(x)
                x.stream = _query(x, "stream").lower() in ("true", "1")
            x.stream = x.stream and x.route.streams
            x.model = self.fleet.resolve(name)
            if x.model is None:
                raise openai.model_not_found(name, self._names)
        finally:
            model_id = x.model.id if x.model is not None else ""
            x.telemetry = self.telemetry.request(x.route.template, model_id, x.headers)
        limits = x.model.limits
        x.timeout_s = limits.request_deadline_s
        client_s = openai.client_timeout_s(openai.header(x.headers, b"x-request-timeout-seconds"))
        if client_s is not None:
            # Serve's proxy reads this header too and cuts at that very second, with no word of why.
            x.timeout_s = min(x.timeout_s, client_s - min(0.5, client_s / 10))

    def _model_beside_body(self, x: _Exchange) -> str:
        named = openai.header(x.headers, b"x-relight-model").decode("utf-8", "replace")
        if name := named or _query(x, "model"):
            return name
        if len(self.fleet.models) == 1:
            return self.fleet.models[0].id
        raise InvalidRequest(
            "You must name the model that made the response: ?model=... or the header X-Relight-Model.",
            param="model",
        )

    # ---------------------------------------------------------------------------------------------- the queue

    def _queue(self, model: Model, state: Admission) -> None:
        self._queues[model.id] = state
        self.traffic.queue(model.id, state.queued, state.in_flight)
        self.telemetry.queue(model.id, state.queued, state.in_flight)

    async def _serve(self, x: _Exchange, receive: Receive) -> None:
        assert x.model is not None
        model = x.model
        self.traffic.arrived(model.id)
        self._queue(model, self._queues[model.id].arrive(model.id, self.engines.progress(model.id)))
        place = _Place(self, model)
        try:
            async with _HangUp(receive, lambda: x.finished) as hang_up:
                await self._converse(x, model, place)
            if hang_up.happened:
                raise ClientGone
        finally:
            place.leave()

    async def _converse(self, x: _Exchange, model: Model, place: _Place) -> None:
        opening = asyncio.create_task(self._open_in_time(x, model, place))
        try:
            await self._hold(x, model, opening)
        except BaseException:
            await _abandon(opening, _Answer.close)
            raise
        answer = opening.result()
        # The engine itself may be past help when it answers so; its replica looks after it.
        failed = answer.response.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        if failed:
            x.error = "engine_error"
        end = b""
        try:
            end = await self._deliver(x, answer)
        except EngineInterrupted:
            failed = True
            raise
        finally:
            if answer.response.status == HTTPStatus.OK:
                self.traffic.answered(model.id, end)
            await _to_the_end(answer.close(engine_failed=failed))

    async def _hold(self, x: _Exchange, model: Model, opening: asyncio.Task[_Answer]) -> None:
        """Wait until an engine answers. Streaming clients see the wake go on as comments."""
        if not x.stream:
            await asyncio.wait({opening})
            return
        gateway = self.fleet.gateway
        delay_s = max(0.0, gateway.progress_after_s - x.elapsed_s())
        while not (await asyncio.wait({opening}, timeout=delay_s))[0]:
            delay_s = gateway.progress_every_s
            progress = self.engines.progress(model.id)
            if not x.started:
                if progress is None:
                    continue  # busy, not dark: its status is worth more to the client than a comment
                x.events = True
                headers = [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-store"),
                    (b"x-accel-buffering", b"no"),
                    (b"x-relight-state", b"lighting"),
                ]
                await x.start(200, x.own_headers(lighting=True) + headers)
            await x.write(sse.comment(progress, x.elapsed_s()))

    # --------------------------------------------------------------------------------------------- the engine

    async def _open_in_time(self, x: _Exchange, model: Model, place: _Place) -> _Answer:
        assert x.timeout_s is not None
        left_s = max(0.0, x.timeout_s - x.elapsed_s())
        try:
            async with asyncio.timeout(left_s):
                return await self._open(x, model, place)
        except TimeoutError:
            raise self._too_late(x, model, place) from None

    def _too_late(self, x: _Exchange, model: Model, place: _Place) -> DeadlineExceeded:
        progress = x.given_up_at
        held = f"{x.elapsed_s():.1f} s"
        if place.held:
            return DeadlineExceeded(f"The engine of {model.id!r} did not begin to answer; held for {held}.")
        if progress is None:
            return DeadlineExceeded(
                f"No engine of {model.id!r} had room; held for {held}. "
                f"The model is {self.engines.state(model.id)}.",
                retry_after_s=retry_after_s(progress),
            )
        estimate = "unknown" if progress.estimate_s is None else f"{progress.estimate_s:.1f} s"
        if progress.phase == "gpu_budget":
            return DeadlineExceeded(
                f"{model.id!r} {progress.detail or 'waits for GPUs'}; held for {held}. Try again.",
                retry_after_s=retry_after_s(progress),
            )
        return DeadlineExceeded(
            f"{model.id!r} is still being lit: phase {progress.phase}"
            f"{f' ({progress.detail})' if progress.detail else ''}, {progress.elapsed_s:.1f} s so far, "
            f"estimate {estimate}; held for {held}. It goes on being lit: try again.",
            retry_after_s=retry_after_s(progress),
        )

    async def _open(self, x: _Exchange, model: Model, place: _Place) -> _Answer:
        """Find an engine that begins to answer. What fails unseen by the client is tried elsewhere."""
        while True:
            x.attempts += 1
            try:
                lease = await self._lease(x, model, place)
                try:
                    return await self._ask(x, lease)
                except (EngineUnreachable, EngineInterrupted):
                    await _to_the_end(lease.release(engine_failed=True))
                    raise
                except BaseException:
                    await _to_the_end(lease.release())
                    raise
            except (EngineUnreachable, EngineInterrupted) as error:
                log.info("%s: attempt %d: %s", x.request_id, x.attempts, error.message)
                if x.attempts >= self.fleet.gateway.max_attempts:
                    error.message = f"{error.message} (attempt {x.attempts}, the last)"
                    raise
                x.telemetry.retried(error.code or "")
                place.requeue()

    async def _lease(self, x: _Exchange, model: Model, place: _Place) -> Lease:
        began_s = self.clock.monotonic_s()
        # The deadline is for the waits together: time in which an engine worked on the request doesn't count.
        left_s = max(0.0, model.limits.start_deadline_s - x.waited_s)
        # A task, so that a deadline is met here while the engines still know that somebody waits.
        acquiring = asyncio.create_task(self.engines.acquire(model.id))
        try:
            await asyncio.wait({acquiring}, timeout=left_s)
            if not acquiring.done():
                raise TimeoutError
            lease = acquiring.result()
        except BaseException as error:
            x.in_vain = isinstance(error, EngineStartFailed)
            if not acquiring.done():
                x.given_up_at = self.engines.progress(model.id)
            await _abandon(acquiring, _release)
            raise
        finally:
            x.waited_s += self.clock.monotonic_s() - began_s
        place.lease()
        # On the clock as it goes now: it may have been set while the request waited.
        arrived_s = self.clock.time_s() - x.elapsed_s()
        cold_start = lease.cold_start if lease.cold_start.ready_s > arrived_s else None
        x.cold_start = cold_start or x.cold_start
        x.telemetry.wait_ended(self.clock.monotonic_s() - began_s, cold_start)
        return lease

    async def _ask(self, x: _Exchange, lease: Lease) -> _Answer:
        headers = x.telemetry.inject(openai.to_engine(x.headers, x.request_id))
        response = await lease.request(x.method, x.target, headers, x.body)
        try:
            content_type = openai.header(response.headers, b"content-type")
            events = sse.is_event_stream(content_type)
            chunks = response.chunks()
            if events or not _is_held(content_type, response.headers):
                # Headers alone tell the client nothing: until the first bytes, another engine can still take
                # over.
                head = await anext(chunks, None)
                return _Answer(lease, response, head or b"", None if head is None else chunks, events)
            held: list[bytes] = []
            size = 0
            async for chunk in chunks:
                held.append(chunk)
                size += len(chunk)
                if size > HELD_BODY_BYTES:
                    return _Answer(lease, response, b"".join(held), chunks, events)
            return _Answer(lease, response, b"".join(held), None, events)
        except BaseException:
            await _to_the_end(response.close())
            raise

    # --------------------------------------------------------------------------------------------- the answer

    async def _deliver(self, x: _Exchange, answer: _Answer) -> bytes:
        """Pass the answer on; returns the end of its body."""
        response = answer.response
        if x.started:
            if not answer.events or response.status != HTTPStatus.OK:
                return await self._deliver_as_event(x, answer)
        else:
            headers = openai.to_client(response.headers) + x.own_headers()
            if response.status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
                pass  # these have no body, and HTTP forbids them a length
            elif answer.rest is None:
                answer.head = self._in_shape(x, answer)
                headers.append((b"content-length", str(len(answer.head)).encode("ascii")))
            elif length := openai.header(response.headers, b"content-length"):
                headers.append((b"content-length", length))
            x.events = answer.events
            await x.start(response.status, headers)
        x.telemetry.first_byte()
        if answer.rest is None:
            await x.write(answer.head, more=False)
            return answer.head
        if answer.events:
            return await self._deliver_events(x, answer.head, answer.rest)
        last, end = b"", answer.head
        await x.write(answer.head)
        async for chunk in answer.rest:
            last, end = end, chunk
            await x.write(chunk)
        await x.write(b"", more=False)
        return last + end

    @staticmethod
    def _in_shape(x: _Exchange, answer: _Answer) -> bytes:
        """The held body; an error that has not OpenAI's shape (a server's own 404) is given it."""
        status, body = answer.response.status, answer.head
        content_type = openai.header(answer.response.headers, b"content-type")
        if status < HTTPStatus.BAD_REQUEST or not _is_json(content_type):
            return body
        assert x.model is not None
        return openai.reshaped_error(status, body, x.model.id, x.path, x.route.style) or body

    @staticmethod
    async def _deliver_events(x: _Exchange, head: bytes, rest: AsyncIterator[bytes]) -> bytes:
        whole, tail = sse.split_events(head)
        if whole:
            await x.write(whole)
        send = x.send
        # A stream's usage is in one of its last events; assigning names is all that a chunk may cost.
        third, second, last = b"", b"", head
        async for chunk in rest:
            third, second, last = second, last, chunk
            if not tail and chunk.endswith(b"\n\n"):  # almost always: vLLM writes event by event
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                continue
            whole, tail = sse.split_events(tail + chunk)
            if whole:
                await x.write(whole)
        await x.write(tail, more=False)
        return third + second + last

    @staticmethod
    async def _deliver_as_event(x: _Exchange, answer: _Answer) -> bytes:
        """The client was promised events, and the engine answered with a document: an error, as a rule."""
        body = answer.head
        if answer.rest is not None:
            async for chunk in answer.rest:
                body += chunk
                if len(body) > HELD_BODY_BYTES:
                    break
        x.telemetry.first_byte()
        if answer.response.status < HTTPStatus.BAD_REQUEST:
            with contextlib.suppress(ValueError, RecursionError):
                await x.write(sse.data_event(json.loads(body)), more=False)
                return body
        assert x.model is not None
        fields = openai.engine_error_fields(answer.response.status, body, x.model.id, x.path)
        x.error = str(fields["code"])
        await x.write(sse.error_event(x.route.style, fields), more=False)
        return body


class _Place:
    """One request's place in its model's queue, left exactly once."""

    def __init__(self, proxy: Proxy, model: Model) -> None:
        self._proxy = proxy
        self._model = model
        self.held = False  # a lease is held

    def _set(self, state: Admission) -> None:
        self._proxy._queue(self._model, state)

    @property
    def _state(self) -> Admission:
        return self._proxy._queues[self._model.id]

    def lease(self) -> None:
        self.held = True
        self._set(self._state.lease())

    def requeue(self) -> None:
        if self.held:
            self.held = False
            self._set(self._state.requeue())

    def leave(self) -> None:
        self._set(self._state.finish() if self.held else self._state.give_up())


def _release(lease: Lease) -> Coroutine[Any, Any, None]:
    return lease.release()


async def _abandon(task: asyncio.Task[T], undo: Callable[[T], Coroutine[Any, Any, None]]) -> None:
    """Stop a task and wait until it has cleaned up; `undo` what it got at the same moment."""
    task.cancel()

    async def settle() -> None:
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None:
            await undo(task.result())

    await _to_the_end(settle())


async def _to_the_end(cleanup: Coroutine[Any, Any, None]) -> None:
    """Await a cleanup that a cancellation can't cut short, lest a lease be lost; then be cancelled.

    A request may well be cancelled twice: by its client's hang-up, and by Serve for the same reason.
    """
    task = asyncio.create_task(cleanup)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


def _query(x: _Exchange, name: str) -> str:
    """The last value of a query parameter; empty when it's absent."""
    return parse_qs(x.query.decode("latin-1"), encoding="utf-8").get(name, [""])[-1]


def _is_held(content_type: bytes, headers: Headers) -> bool:
    """Whether a body is a document, to be sent whole, and not a stream of some kind."""
    length = openai.header(headers, b"content-length")
    if length.isdigit():
        return int(length) <= HELD_BODY_BYTES
    return _is_json(content_type)


def _is_json(content_type: bytes) -> bool:
    return content_type.split(b";", 1)[0].strip().lower() == b"application/json"


def path_of(scope: Scope) -> str:
    """The decoded path below the place where the gateway is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path[len(root) :] if root and (path == root or path.startswith(f"{root}/")) else path


def target(scope: Scope) -> str:
    """Path and query for the engine, percent-encoded. Safe for a request line whatever the client sent."""
    path = quote(path_of(scope), safe="/:@!$&'()*+,;=-._~")
    query = quote(scope.get("query_string", b""), safe="/:@!$&'()*+,;=-._~?%[]")
    return f"{path}?{query}" if query else path


async def read_body(receive: Receive, headers: Headers, max_bytes: int) -> bytes:
    """The request's body. Raises `BodyTooLarge`; a client that isn't far over the bound is heard out first. Raises
    `BodyStalled` where it does not go on.

    (A server that answers and closes before a client has written everything resets the connection, and the
    client never reads the answer.)
    """
    declared = openai.header(headers, b"content-length")
    if declared.isdigit() and int(declared) > 2 * max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    size = 0
    while True:
        try:
            async with asyncio.timeout(BODY_STALL_S):
                message = await receive()
        except TimeoutError:
            raise BodyStalled(
                f"The body ended after {size} bytes; {BODY_STALL_S:.0f} s later it was given up."
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            parts.clear()
            if size > 2 * max_bytes:
                raise _too_large(max_bytes)
        else:
            parts.append(part)
        if not message.get("more_body", False):
            break
    if size > max_bytes:
        raise _too_large(max_bytes)
    return b"".join(parts)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than the {max_bytes} bytes that this gateway takes.")
