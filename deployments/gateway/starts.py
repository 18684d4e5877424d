"""The cold starts that a gateway has seen: the last of each model, phase by phase, and how long they took."""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from deployments.engine.protocol import EngineInfo
from deployments.gateway.engines import ColdStart, EngineResponse, Headers, Phase
from deployments.gateway.observe import Clock, Moment, Moments, SystemClock
from deployments.gateway.openai import header
from deployments.gateway.sse import is_event_stream

KEPT_STARTS = 256
KEPT_DURATIONS = 32
KEPT_ENGINES = 4096
"""More than live at a time: an engine is asked long after its start has fallen out of those that are kept."""


class StartLog:
    """Bounded. One start is known by its engine and the time at which that was ready: a parked one starts again."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._moments = Moments(clock or SystemClock())
        self._starts: OrderedDict[tuple[str, float], dict[str, Any]] = OrderedDict()
        self._ready_s: OrderedDict[str, float] = OrderedDict()
        """Engine -> when it was ready, by its start that was noted last. Also of those that are no longer kept."""
        self._by_engine: dict[str, tuple[str, float]] = {}
        self._last: dict[str, dict[str, Any]] = {}
        self._durations_s: dict[str, deque[float]] = {}
        self._told: dict[
            tuple[str, float], bool
        ] = {}  # starts that are ours to tell -> the controller has it

    def now(self) -> Moment:
        """See also whether the clock was set; to be asked often."""
        return self._moments.look()

    def since(self, arrived_s: float, *unix_s: float) -> bool:
        """Whether all of these came after `arrived_s`, and not on a clock that was set meanwhile."""
        return arrived_s < min(unix_s) and self._moments.comparable(arrived_s, *unix_s)

    def cold_start(self, info: EngineInfo, phases: Sequence[Phase] = ()) -> ColdStart:
        """The start of an engine; `phases` are those before the engine was asked for.

        Where the clock was set meanwhile, or the machine slept, there is no saying when it was and how long it took.
        """
        ready_s = info.ready_s or 0.0
        of_engine = (Phase(name, start_s, duration_s) for name, start_s, duration_s in info.phases)
        whole = (*phases, *of_engine)
        if not self._moments.comparable(info.requested_s, ready_s):
            ready_s, whole = 0.0, ()
        return ColdStart(engine_id=info.engine_id, kind=info.kind, ready_s=ready_s, phases=whole)

    def note(
        self, info: EngineInfo, phases: Sequence[Phase] = (), *, waiting_since_s: float | None = None
    ) -> None:
        """An engine is ready. Said again with more phases (Serve's part is known only later), it adds those.

        `waiting_since_s` is since when the longest waiting request waits. If it came after the engine was ready, this
        gateway does not know how the start began, and leaves it to the controller to tell of it. A start in which the
        clock was set, or the machine slept, is none to learn from, and left out.
        """
        if info.ready_s is None:
            return
        key = (info.engine_id, info.ready_s)
        begun_s = min([info.requested_s, *(p.start_s for p in phases)])
        if key not in self._starts and self._ready_s.get(info.engine_id) != info.ready_s:
            if not self._moments.comparable(begun_s, info.ready_s):
                return
            seen = self.cold_start(info, phases)
            self._starts[key] = self._last[info.model] = {
                "model": info.model,
                "kind": seen.kind,
                "engine_id": seen.engine_id,
                "begun_s": begun_s,
                "ready_s": seen.ready_s,
                "total_s": round(info.ready_s - begun_s, 4),
                "prewarmed": waiting_since_s is not None and waiting_since_s > begun_s,
                "phases": [_row(p) for p in seen.phases],
            }
            if waiting_since_s is None or waiting_since_s < info.ready_s:
                self._told[key] = False
            self._by_engine[info.engine_id] = key
            durations_s = self._durations_s.setdefault(info.model, deque(maxlen=KEPT_DURATIONS))
            durations_s.append(info.ready_s - begun_s)
            if len(self._starts) > KEPT_STARTS:
                old, _ = self._starts.popitem(last=False)
                self._told.pop(old, None)
                if self._by_engine.get(old[0]) == old:
                    del self._by_engine[old[0]]
            self._ready_s[info.engine_id] = info.ready_s
            if len(self._ready_s) > KEPT_ENGINES:
                self._ready_s.popitem(last=False)
            return
        if info.engine_id in self._ready_s:
            self._ready_s.move_to_end(info.engine_id)
        if (start := self._starts.get(key)) is None:
            return
        rows = start["phases"]
        added = [_row(p) for p in phases if not any(r["name"] == p.name for r in rows)]
        rows[:0] = added
        if added:
            self._changed(key)

    def _changed(self, key: tuple[str, float]) -> None:
        if key in self._told:
            self._told[key] = False

    def untold(self) -> list[dict[str, Any]]:
        """Starts that the controller does not have, or not with all of their phases."""
        rows = (self._starts[key] for key, told in self._told.items() if not told)
        return [{**row, "phases": list(row["phases"])} for row in rows]

    def told(self, starts: Sequence[Mapping[str, Any]]) -> None:
        """The controller has these."""
        for start in starts:
            key = (start["engine_id"], start["ready_s"])
            if self._starts.get(key) == start:
                self._told[key] = True

    def last(self, model: str) -> dict[str, Any] | None:
        """The model's last start: kind, engine_id, ready_s, total_s, phases."""
        return self._last.get(model)

    def estimate_s(self, model: str) -> float | None:
        """Median of the model's starts; None before the first."""
        durations_s = self._durations_s.get(model)
        return statistics.median(durations_s) if durations_s else None

    def timed(self, engine_id: str, asked: Moment, response: EngineResponse) -> EngineResponse:
        """The same response; the first of an engine's start tells when its first token came.

        Unless it is not streamed: its first byte comes with its last token, which says nothing of the start.
        """
        key = self._by_engine.get(engine_id)
        start = self._starts.get(key) if key else None
        if start is None or any(p["name"] == "first_token" for p in start["phases"]):
            return response
        assert key is not None
        if not is_event_stream(header(response.headers, b"content-type")):
            # Nor does a later one tell of the start.
            del self._by_engine[engine_id]
            return response

        def first_token() -> None:
            if not any(p["name"] == "first_token" for p in start["phases"]):
                took_s = self._moments.now().monotonic_s - asked.monotonic_s
                start["phases"].append(_row(Phase("first_token", asked.unix_s, took_s)))
                self._changed(key)

        return _Timed(response, first_token)


class _Timed:
    """A response that says when its first bytes come."""

    def __init__(self, response: EngineResponse, on_first: Callable[[], None]) -> None:
        self.status = response.status
        self.headers: Headers = response.headers
        self._response = response
        self._on_first = on_first

    async def chunks(self) -> AsyncIterator[bytes]:
        first = True
        async for chunk in self._response.chunks():
            if first:
                first = False
                self._on_first()
            yield chunk

    async def close(self) -> None:
        await self._response.close()


def _row(phase: Phase) -> dict[str, Any]:
    return {"name": phase.name, "start_s": phase.start_s, "duration_s": round(phase.duration_s, 4)}
