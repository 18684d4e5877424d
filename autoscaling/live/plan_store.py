"""The plan on its way from the controller to the policies inside Serve: through the internal KV of Ray's GCS.

The KV is there as long as the cluster is, whoever of the two is killed. Policies must not block the Serve controller,
so one daemon thread of its process reads for all of them.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autoscaling.core.plan import BrokenPlan, Plan, from_json, to_json
from autoscaling.live.clock import SystemClock
from autoscaling.ports import Clock

log = logging.getLogger("ray.serve")

NAMESPACE = b"relight"
PLAN_KEY = b"plan"
SEEN_KEY = b"policies"
READ_EVERY_S = 0.5
TELL_EVERY_S = 5.0
LEASE_EVERY_S = 5.0


def kv_put(key: bytes, value: bytes) -> None:
    """Needs a connection to Ray; raises what Ray raises while the GCS is away."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key, value, overwrite=True, namespace=NAMESPACE)


def kv_get(key: bytes) -> bytes | None:
    """None if there is none."""
    from ray.experimental.internal_kv import _internal_kv_get

    value: bytes | None = _internal_kv_get(key, namespace=NAMESPACE)
    return value


def publish(plan: Plan) -> None:
    """Put a plan where policies find it. Raises what Ray raises."""
    kv_put(PLAN_KEY, to_json(plan).encode())


@dataclass(slots=True)
class Known:
    """What the thread has read."""

    plan: Plan | None = None
    read: bool = False
    """Whether the KV was read at all: only then is "no plan" known, and not merely not yet seen."""
    errors: int = 0
    last_error: str | None = None


@dataclass(slots=True)
class PolicyHealth:
    """One policy's own account, for people."""

    errors: int = 0
    last_error: str | None = None
    following: str = ""
    """What it acts on: plan, reactive, grace."""

    def to_json(self) -> dict[str, Any]:
        return {"errors": self.errors, "last_error": self.last_error, "following": self.following}


class PlanReader:
    """Reads the plan over and over, in a daemon thread; tells back how the policies of this process fare."""

    def __init__(
        self,
        *,
        get: Callable[[bytes], bytes | None] = kv_get,
        put: Callable[[bytes, bytes], None] = kv_put,
        clock: Clock | None = None,
        beside: Callable[[], None] = lambda: None,
    ) -> None:
        """`beside` is called every LEASE_EVERY_S; what it raises is logged."""
        self._beside = beside
        self._beside_s = -LEASE_EVERY_S
        self._beside_error: str | None = None
        self._get = get
        self._put = put
        self._clock = clock or SystemClock()
        self._text: bytes | None = None
        self._told: Any = None
        self._told_s = -TELL_EVERY_S
        self._thread: threading.Thread | None = None
        self.known = Known()
        """Replaced as a whole, so that a reader on another thread always has one that fits together."""
        self.health: dict[str, PolicyHealth] = {}

    def start(self) -> None:
        """Begin, unless it has begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="relight-plan-reader", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        wait = threading.Event()  # never set: a sleep that does not hold up the process's end
        while True:
            self.read_once()
            self.tell_once()
            self.look_beside()
            wait.wait(READ_EVERY_S)

    def read_once(self) -> None:
        """Read the KV now. Never raises; what can't be read leaves the plan that was read before, which expires."""
        before = self.known
        try:
            text = self._get(PLAN_KEY)
            if text == self._text and before.read:
                return
            plan = None if text is None else from_json(text)
        except Exception as error:  # noqa: BLE001 - the thread must live, whatever Ray or a newer controller gives it
            self.known = Known(before.plan, before.read, before.errors + 1, repr(error))
            return
        self._text = text
        if isinstance(plan, BrokenPlan):
            self.known = Known(before.plan, True, before.errors + 1, plan.message)
            return
        self.known = Known(plan, True, before.errors, before.last_error)

    def tell_once(self) -> None:
        """Put how policies fare into the KV, when that is new, seldom enough to cost nothing."""
        now_s = self._clock.monotonic_s()
        if now_s - self._told_s < TELL_EVERY_S:
            return
        policies = {model: health.to_json() for model, health in dict(self.health).items()}
        seen = {
            "reader": {"errors": self.known.errors, "last_error": self.known.last_error},
            "policies": policies,
        }
        if seen == self._told:
            return
        try:
            self._put(SEEN_KEY, json.dumps(seen).encode())
        except Exception as error:  # noqa: BLE001 - as above
            log.debug("policies' health could not be told: %r", error)
            return
        self._told, self._told_s = seen, now_s

    def look_beside(self) -> None:
        """Do what else this process does for the controller, if it is time. Never raises."""
        now_s = self._clock.monotonic_s()
        if now_s - self._beside_s < LEASE_EVERY_S:
            return
        self._beside_s = now_s
        try:
            self._beside()
            self._beside_error = None
        except Exception as error:  # noqa: BLE001 - as above; it is called again
            if repr(error) != self._beside_error:  # once, not every few seconds
                self._beside_error = repr(error)
                log.warning("nodes that nobody wants any more can't be let go: %r", error)


_shared: PlanReader | None = None
_lock = threading.Lock()


def shared_reader() -> PlanReader:
    """The process's one reader, started."""
    global _shared  # noqa: PLW0603 - one thread for all policies of the process
    from autoscaling.live.nodes import NodeLease

    with _lock:
        if _shared is None:
            _shared = PlanReader(beside=NodeLease(SystemClock()).look)
            _shared.start()
        return _shared


def policies_health() -> Mapping[str, Any] | None:
    """What the policies' process told last; None if it never did. Needs a connection to Ray."""
    text = kv_get(SEEN_KEY)
    found: Mapping[str, Any] | None = None if text is None else json.loads(text)
    return found
