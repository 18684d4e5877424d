"""Who of several controllers decides: the one that came last.

While the application is redeployed the old controller and the new one run at once for some seconds. Both would publish
plans, book usage and count what gateways tell. So who begins claims the cluster in the GCS's KV; who finds another's
claim stops, writes what it holds, and says so; and the new one waits for that, unless the old one is gone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from autoscaling.live.plan_store import kv_get, kv_put
from autoscaling.ports import Clock

log = logging.getLogger("ray.serve")

OWNER_KEY = b"owner"
RELEASED_KEY = b"released"
ALIVE_S = 3.0
"""A claim that was renewed longer ago is that of one who was killed, if it is renewed every second."""
LOST_S = 15.0
"""After so long without a renewal an older controller goes on: the one that had claimed it failed to start."""
PATIENCE_S = 5.0
LOOK_EVERY_S = 0.1


class Ownership:
    """One controller's side. `name` is its own and no other's; `renew_s` is how often it will call `holds`."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        *,
        renew_s: float = 1.0,
        get: Callable[[bytes], bytes | None] = kv_get,
        put: Callable[[bytes, bytes], None] = kv_put,
    ) -> None:
        self._name = name
        self._clock = clock
        self._get = get
        self._put = put
        self._alive_s, self._lost_s = ALIVE_S * max(1.0, renew_s), LOST_S * max(1.0, renew_s)
        self._released = False

    def claim(self, wait: Callable[[float], object]) -> None:
        """Become the owner, and wait until the one before has let go. Raises what Ray raises.

        `wait` sleeps for so many seconds; it is true when there is no sense in waiting any longer.
        """
        before, at_s = self._read()
        self._renew()
        if before is None or before == self._name or not 0 <= self._clock.now_s() - at_s < self._alive_s:
            return
        deadline_s = self._clock.monotonic_s() + PATIENCE_S
        while self._clock.monotonic_s() < deadline_s:
            if self._get(RELEASED_KEY) == before.encode() or wait(LOOK_EVERY_S):
                return
        log.warning("the controller before this one did not let go within %.0f s", PATIENCE_S)

    def holds(self, let_go: Callable[[], object]) -> bool:
        """Whether this one decides now; renews its claim. `let_go` writes what is held, once, when another has come.

        While the KV can't be asked, it goes on as before: nobody can have come.
        """
        try:
            owner, at_s = self._read()
            if owner in (None, self._name) or abs(self._clock.now_s() - at_s) > self._lost_s:
                self._renew()
                self._released = False
                return True
            if not self._released:
                let_go()
                self.release()
        except Exception as error:  # noqa: BLE001 - whatever Ray raises while the GCS restarts
            log.debug("the owner could not be asked: %r", error)
            return not self._released
        return False

    def release(self) -> None:
        """Say that all that was held is written. Raises what Ray raises."""
        self._put(RELEASED_KEY, self._name.encode())
        self._released = True

    def _read(self) -> tuple[str | None, float]:
        text = self._get(OWNER_KEY)
        if text is None:
            return None, 0.0
        claim = json.loads(text)
        return str(claim["name"]), float(claim["at_s"])

    def _renew(self) -> None:
        self._put(OWNER_KEY, json.dumps({"name": self._name, "at_s": self._clock.now_s()}).encode())
