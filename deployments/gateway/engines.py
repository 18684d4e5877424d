"""The gateway's one seam to the engines: who answers for a model, and how far a dark one has come.

The implementation over Ray Serve is `deployments/gateway/leases.py`; the fake of the tests is `tests/fakes/engines.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a cold start: `start_s` on the wall clock (Unix time), `duration_s` its length.

    Phases overlap: the engine starts beside the replica, not after it.
    """

    name: str  # queue, schedule, replica, fork, config, weights, warm_up, first_token
    start_s: float
    duration_s: float


@dataclass(frozen=True, slots=True)
class ColdStart:
    """How one engine came to serve. `kind` says from which rung of warmth."""

    engine_id: str
    kind: str  # "prebuilt" (model template), "mapped" or "forked" (node template), "adopted" (parked)
    ready_s: float  # Unix time at which the engine answered its health check; 0: not known on the clock as it goes now
    phases: tuple[Phase, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a model that is being lit stands, for clients that wait."""

    phase: str
    elapsed_s: float
    estimate_s: float | None  # median of earlier cold starts of this model; None before the first
    detail: str | None = None  # what it waits for, in words


class EngineResponse(Protocol):
    """An engine's answer: status and headers are there, the body streams."""

    status: int
    headers: Headers

    def chunks(self) -> AsyncIterator[bytes]:
        """Body bytes as they arrive, untouched. Raises `EngineInterrupted` when the engine dies in mid-stream."""
        ...

    async def close(self) -> None:
        """Close the connection; an unfinished generation is aborted in the engine. Idempotent."""
        ...


class Lease(Protocol):
    """The right to send one request to one engine. Serve counts it as one ongoing request until released."""

    engine_id: str
    cold_start: ColdStart  # the start of this engine, however long ago it was

    async def request(self, method: str, target: str, headers: Headers, body: bytes) -> EngineResponse:
        """Send the request; returns at the response's first byte (status line and headers).

        Raises `EngineUnreachable` if the engine dies or refuses before that: the request may be retried elsewhere.
        """
        ...

    async def release(self, *, engine_failed: bool = False) -> None:
        """Give the lease back. Idempotent; never raises. `engine_failed` asks the replica to check its engine."""
        ...


class Engines(Protocol):
    """Hands out leases. Every method may be called concurrently."""

    async def acquire(self, model: str) -> Lease:
        """Wait until an engine of `model` (canonical id) can take one more request. May be cancelled at any await.

        Raises `EngineStartFailed` with the engine's own reason, within seconds of the failure.
        """
        ...

    def progress(self, model: str) -> Progress | None:
        """How far the model's wake has come; None when it is not being lit."""
        ...

    def state(self, model: str) -> str:
        """dark | lighting | parked | ready | draining | failed, as this gateway knows it (may be a second old)."""
        ...

    async def status(self) -> Mapping[str, Any]:
        """The whole fleet as `relight status --json` prints it, from all gateways and nodes."""
        ...

    async def control(
        self, method: str, path: str, query: Mapping[str, str], body: bytes, authorization: str | None
    ) -> tuple[int, dict[str, Any]]:
        """One request to the control API (/relight/v1/...): the controller's HTTP status and JSON document.

        Raises `ControllerUnavailable` while there is no controller that could answer.
        """
        ...

    async def engine_metrics(self) -> Sequence[tuple[str, str]]:
        """(model id, vLLM's Prometheus text) of each engine that this gateway can reach."""
        ...


@dataclass(slots=True)
class GatewayCounts:
    """What a gateway tells the fleet's status about one model."""

    queued: int = 0
    in_flight: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
