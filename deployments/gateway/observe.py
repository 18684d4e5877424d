"""What the gateway asks of those who watch it, and of the clock; with implementations that watch nothing."""

from __future__ import annotations

import math
import time
from typing import NamedTuple, Protocol

from deployments.gateway.engines import ColdStart, Headers

STEP_S = 1.0
"""By more than this the wall clock was set, or the machine slept; less may be a stall between two readings."""
NODES_DIFFER_S = 5.0
"""A moment that is no further ahead may be one of another node, whose clock is not quite ours."""


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


class Moment(NamedTuple):
    """A moment on both clocks. Moments are ordered by the steady one."""

    monotonic_s: float
    unix_s: float


class Moments:
    """Tells which Unix times can be compared: the wall clock is set now and then, and goes on while the machine sleeps.

    To be asked often: what comes after such a step, but before it was seen, is taken for older.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        now = self.now()
        self._ahead_s = now.unix_s - now.monotonic_s
        self._even_since_s = -math.inf  # monotonic

    def now(self) -> Moment:
        return Moment(self._clock.monotonic_s(), self._clock.time_s())

    def look(self) -> Moment:
        """See whether the wall clock has made a step."""
        now = self.now()
        ahead_s = now.unix_s - now.monotonic_s
        if abs(ahead_s - self._ahead_s) > STEP_S:
            self._ahead_s, self._even_since_s = ahead_s, now.monotonic_s
        return now

    def comparable(self, *unix_s: float) -> bool:
        """Whether all of these are since the last step that was seen, so that their differences are what has passed."""
        now = self.look()
        even_since_s = self._even_since_s + self._ahead_s
        return all(even_since_s <= each_s <= now.unix_s + NODES_DIFFER_S for each_s in unix_s)


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
