"""What a gateway tells the controller, once a second while something happens, and seldom while nothing does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from deployments.gateway.scrape import engine_counters
from deployments.gateway.starts import StartLog
from deployments.gateway.traffic import TrafficCounter

log = logging.getLogger("ray.serve")

REPORT_EVERY_S = 1.0
REPORT_SOONEST_S = 0.1
"""Between two reports, however many requests want to know anew whether their models may be lit."""
REPORT_AT_LEAST_EVERY_S = 5.0
READ_ENGINES_EVERY_S = 5.0
SEND_TIMEOUT_S = 5.0
LAST_REPORTS_S = 5.0
"""For what is untold when the gateway ends; the controller may be replaced at the same moment."""
LAST_REPORTS_EVERY_S = 0.3


class Known(Protocol):
    """What the gateway knows of engines."""

    starts: StartLog

    @property
    def models(self) -> Sequence[str]: ...
    def view(self) -> dict[str, Any]: ...
    def model_view(self, model: str) -> dict[str, Any]: ...
    async def read_asked_engines(self, busy: Container[str]) -> list[tuple[str, str, str]]: ...
    def withdraw(self, model: str) -> None:
        """Ask Serve no more for leases on this model: it may have no replica."""


class Reports:
    """Sends the gateway's view, its counts until they are acknowledged, and what engines tell of themselves."""

    def __init__(
        self,
        known: Known,
        controller: Any,
        traffic: TrafficCounter,
        counts: Callable[[], Mapping[str, tuple[int, int]]],
    ) -> None:
        self._known = known
        self._controller = controller
        self._traffic = traffic
        self._counts = counts
        self._id = secrets.token_hex(4)
        self._engines: dict[str, dict[str, Any]] = {}
        self.node_waits: Mapping[str, str] = {}
        """Model -> which node it waits for, as the controller told last."""
        self.no_room: Mapping[str, str] = {}
        """Model that may have no replica now -> why, as the controller told last."""
        self._told = asyncio.Condition()
        self._ask = asyncio.Event()
        self._no_room_until_s = -math.inf
        self._held = 0
        """Requests that wait for room."""
        self._sending = asyncio.Lock()

    def report(self) -> dict[str, Any]:
        """The view and the counts as they are now."""
        counts = self._counts()
        models = {}
        for model in self._known.models:
            queued, in_flight = counts.get(model, (0, 0))
            models[model] = {
                "queued": queued,
                "in_flight": in_flight,
                **self._known.model_view(model),
                **self._traffic.activity(model),
            }
        return {
            **self._known.view(),
            "models": models,
            "source": self._traffic.source,
            "batches": self._traffic.batches(),
            "dropped_rows": self._traffic.dropped,
            "starts": self._known.starts.untold(),
            "engine_counters": dict(self._engines),
        }

    async def run(self) -> None:
        """Report for ever."""
        last: Any = None
        last_s = 0.0
        while True:
            self._ask.clear()
            try:
                report = self.report()
                waits = bool(self.node_waits or self._held)
                if (
                    report != last
                    or report["batches"]
                    or waits
                    or time.monotonic() - last_s > REPORT_AT_LEAST_EVERY_S
                ):
                    await self.send()
                    last, last_s = report, time.monotonic()
            except Exception:
                log.exception("a report to the controller failed")
            await asyncio.sleep(REPORT_SOONEST_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ask.wait(), REPORT_EVERY_S - REPORT_SOONEST_S)

    async def room(self, model: str) -> float:
        """Return once the model may have a replica, as far as is known: at once (0), unless the controller said no;
        then, when there was room for it, in Unix seconds.

        It is asked anew then, since it may have changed its mind.
        """
        if model not in self.no_room:
            return 0.0
        self._ask.set()
        self._held += 1
        try:
            async with self._told:
                await self._told.wait_for(lambda: model not in self.no_room)
        finally:
            self._held -= 1
        return time.time()

    async def send(self) -> None:
        """Report now. What does not arrive is sent again with the next report."""
        async with self._sending:
            report = self.report()
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    answer = await self._controller.report.remote(self._id, report)
            except (RayError, RayServeException, TimeoutError) as error:
                self.node_waits = {}
                await self._hear_of_room(None)
                log.warning("the controller did not take the report: %r", error)
                return
            self.node_waits = answer.get("node_waits", {})
            await self._hear_of_room(answer.get("no_room"), answer.get("no_room_s", 0.0))
            if not answer["taken"]:
                # By a controller that does not decide yet, or no more.
                return
            self._traffic.acknowledge(answer["sequence"])
            self._known.starts.told(report["starts"])
            for engine_id in report["engine_counters"]:
                self._engines.pop(engine_id, None)

    async def close(self) -> None:
        """Tell what is untold, that of the open second too, until the controller has it, or `LAST_REPORTS_S` are over.

        To be called when requests are no longer counted. Raises nothing.
        """
        self._traffic.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_REPORTS_S):
                while self._traffic.batches() or self._known.starts.untold():
                    try:
                        await self.send()
                    except Exception:
                        log.exception("a last report to the controller failed")
                    await asyncio.sleep(LAST_REPORTS_EVERY_S)
        if rows := sum(len(rows) for _, rows in self._traffic.batches()):
            log.warning("the controller has not said that it keeps the last %d rows of traffic", rows)

    async def _hear_of_room(self, no_room: Mapping[str, str] | None, holds_s: float = 0.0) -> None:
        """None: there is no news. What was told last then holds as long as the plan that it came from."""
        now_s = time.monotonic()
        if no_room is not None:
            self._no_room_until_s = now_s + holds_s
        elif now_s < self._no_room_until_s:
            no_room = self.no_room
        else:
            no_room = {}
        async with self._told:
            self.no_room = no_room
            self._told.notify_all()
        for model in no_room:
            self._known.withdraw(model)

    async def read_engines(self) -> None:
        """Read the metrics of engines that work, for ever; one that nobody asks is left alone."""
        while True:
            await asyncio.sleep(READ_ENGINES_EVERY_S)
            try:
                busy = {model for model, (_, in_flight) in self._counts().items() if in_flight}
                for engine_id, model, page in await self._known.read_asked_engines(busy):
                    self._engines[engine_id] = {"model": model, "at_s": time.time(), **engine_counters(page)}
            except Exception:
                log.exception("reading the engines' metrics failed")
