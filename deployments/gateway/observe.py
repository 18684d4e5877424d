"""What the gateway asks of those who watch it, and of the clock; with implementations that watch nothing."""

from __future__ import annotations

import time
from typing import Protocol

from deployments.gateway.engines import ColdStart, Headers


class Clock(Protocol):
    """Where the gateway reads the time, so that tests can say what time it is."""

    def time_s(self) -> float:
        """Unix time in seconds: for comparing with an engine's `ready_s`, which another process wrote."""
        ...

    def monotonic_s(self) -> float:
        """Seconds on a clock that never goes back: for durations."""
        ...


class SystemClock:
    """The machine's clock."""

    def time_s(self) -> float:
        """Unix time in seconds."""
        return time.time()

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary moment."""
        return time.monotonic()


class RequestTelemetry(Protocol):
    """One request as its watcher sees it. No method raises; each is cheap enough for the request's path."""

    def inject(self, headers: Headers) -> Headers:
        """The headers for the engine, with this request's trace context added."""
        ...

    def wait_ended(self, seconds: float, cold_start: ColdStart | None) -> None:
        """An engine was found after `seconds`; `cold_start` only if it was lit in the meantime."""
        ...

    def retried(self, reason: str) -> None:
        """An engine failed before the client saw a byte; another is asked. `reason`: error code."""
        ...

    def first_byte(self) -> None:
        """The engine's first body byte goes to the client."""
        ...

    def ended(self, status: int, error: str | None) -> None:
        """Called once, last. `status`: HTTP (499: the client hung up); `error`: an error code or None."""
        ...


class GatewayTelemetry(Protocol):
    """The watcher of the whole gateway."""

    def request(self, route: str, model_id: str, headers: Headers) -> RequestTelemetry:
        """A request has named a model of the fleet. `route` is a template, so that its values are few."""
        ...

    def queue(self, model_id: str, queued: int, in_flight: int) -> None:
        """The number of requests that wait for an engine, and that an engine is answering, has changed."""
        ...

    def prometheus(self) -> bytes | None:
        """The process's metrics in Prometheus' text format; None when they aren't collected."""
        ...


class NullRequestTelemetry:
    """Watches nothing."""

    def inject(self, headers: Headers) -> Headers:
        """The same headers."""
        return headers

    def wait_ended(self, seconds: float, cold_start: ColdStart | None) -> None:
        """Nothing."""

    def retried(self, reason: str) -> None:
        """Nothing."""

    def first_byte(self) -> None:
        """Nothing."""

    def ended(self, status: int, error: str | None) -> None:
        """Nothing."""


class NullTelemetry:
    """Watches nothing."""

    def request(self, route: str, model_id: str, headers: Headers) -> RequestTelemetry:
        """A watcher that watches nothing."""
        return NullRequestTelemetry()

    def queue(self, model_id: str, queued: int, in_flight: int) -> None:
        """Nothing."""

    def prometheus(self) -> bytes | None:
        """None."""
        return None
