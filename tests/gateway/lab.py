"""A gateway on a loopback port, in the test's own process, before scripted engines."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from deployments.fleet import Fleet
from deployments.gateway.app import Gateway, build_gateway
from deployments.gateway.engines import ColdStart, Headers
from deployments.gateway.observe import NullRequestTelemetry, NullTelemetry, RequestTelemetry
from tests.fakes.engines import FakeEngine, FakeEngines, FakeModel, Server, Watched, fake_engines

CHAT = "/v1/chat/completions"


class Recorder(NullRequestTelemetry):
    """Keeps what the gateway tells of one request."""

    def __init__(self, owner: RecordingTelemetry, route: str, model_id: str) -> None:
        self.owner = owner
        self.route = route
        self.model_id = model_id
        self.calls: list[tuple[Any, ...]] = []

    def inject(self, headers: Headers) -> Headers:
        """Adds a trace context that the engine's server can be asked for."""
        return [*headers, (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]

    def wait_ended(self, seconds: float, cold_start: ColdStart | None) -> None:
        """Kept without the time."""
        self.calls.append(("wait_ended", cold_start))

    def retried(self, reason: str) -> None:
        """Kept."""
        self.calls.append(("retried", reason))

    def first_byte(self) -> None:
        """Kept."""
        self.calls.append(("first_byte",))

    def ended(self, status: int, error: str | None) -> None:
        """Kept; tells those who wait."""
        self.calls.append(("ended", status, error))
        self.owner.notify()


class RecordingTelemetry(NullTelemetry, Watched):
    """Keeps what the gateway tells."""

    def __init__(self) -> None:
        Watched.__init__(self)
        self.requests: list[Recorder] = []
        self.queues: dict[str, tuple[int, int]] = {}
        self.page: bytes | None = None

    def request(self, route: str, model_id: str, headers: Headers) -> RequestTelemetry:
        """A new recorder."""
        self.requests.append(Recorder(self, route, model_id))
        return self.requests[-1]

    def queue(self, model_id: str, queued: int, in_flight: int) -> None:
        """Kept; tells those who wait."""
        self.queues[model_id] = (queued, in_flight)
        self.notify()

    def prometheus(self) -> bytes | None:
        """As the test said."""
        return self.page

    def ended(self) -> list[tuple[Any, ...]]:
        """(status, error) of every request that is over."""
        return [call[1:] for request in self.requests for call in request.calls if call[0] == "ended"]


@dataclass(slots=True)
class Lab:
    """Everything a test of the gateway touches."""

    fleet: Fleet
    engines: FakeEngines
    telemetry: RecordingTelemetry
    gateway: Gateway
    url: str
    client: httpx.AsyncClient

    @property
    def model(self) -> FakeModel:
        """The first model, `tiny`."""
        return self.engines.models["tiny"]

    @property
    def engine(self) -> FakeEngine:
        """The first engine of the first model."""
        return self.model.engines[0]

    async def chat(self, *, stream: bool = False, headers: Any = None, **fields: Any) -> httpx.Response:
        """One chat request; the whole answer."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": stream, **fields}
        return await self.client.post(CHAT, json=body, headers=headers)

    async def quiet(self) -> None:
        """Until no request waits or runs, and every lease was given back."""
        await self.telemetry.until(lambda: set(self.telemetry.queues.values()) <= {(0, 0)})
        await self.telemetry.until(lambda: len(self.telemetry.ended()) == len(self.telemetry.requests))
        await self.model.until(lambda: self.model.leased == 0 and self.model.waiting == 0)


@contextlib.asynccontextmanager
async def make_lab(
    *, replicas: int = 1, models: tuple[str, ...] = ("tiny", "org/large"), limits: Any = None, **gateway: Any
) -> AsyncIterator[Lab]:
    """A lab; `limits` are those of every model, `gateway` the fleet file's section."""
    fleet = Fleet.model_validate(
        {
            "models": [
                {
                    "id": id_,
                    "source": "org/weights",
                    "aliases": ["small"] if id_ == "tiny" else [],
                    "limits": limits or {},
                }
                for id_ in models
            ],
            "gateway": {"progress_after_s": 0, "progress_every_s": 0.01, **gateway},
        }
    )
    telemetry = RecordingTelemetry()
    async with fake_engines(*models, replicas=replicas) as engines:
        app = build_gateway(fleet, engines, telemetry)
        listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = Server(
            uvicorn.Config(app, log_level="error", lifespan="on", backlog=4096, timeout_graceful_shutdown=10)
        )
        async with server.running(listener), httpx.AsyncClient(base_url=url, timeout=60) as client:
            yield Lab(fleet, engines, telemetry, app, url, client)
        running = [task for task in asyncio.all_tasks() if "deployments/gateway" in repr(task.get_coro())]
        assert not running, "the gateway left tasks behind"
