"""What came, exactly: per model and second, kept until the controller has said that it has them.

Seconds that are over go into numbered batches. A batch is sent with every report until it is acknowledged; the
controller takes each number of a gateway once, so that nothing is lost and nothing counts twice.
"""

from __future__ import annotations

import math
import re
import secrets
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from json import JSONDecoder
from typing import Any

from deployments.gateway.observe import Clock

KEPT_ROWS = 20_000
"""Rows that wait for the controller at most; the oldest go first. Five hours of one busy model."""

_USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')
_DECODER = JSONDecoder()
# An answer's usage is at its end; a document of embeddings may be megabytes.
_USAGE_WITHIN_BYTES = 4096

Row = list[Any]
"""[model, Unix second, arrivals, input tokens, output tokens, request-seconds in progress, request-seconds waiting]."""


def read_usage(body: bytes) -> tuple[int, int] | None:
    """(input tokens, output tokens) from the end of an answer, a document or a stream; None if it doesn't tell.

    Takes OpenAI's names (prompt_tokens, completion_tokens) and those of Responses and Messages (input_tokens,
    output_tokens). Inside a generated text the quotes would be escaped, so that no text can pose as usage.
    """
    tail = body[-_USAGE_WITHIN_BYTES:]
    ends = [found.end() for found in _USAGE.finditer(tail)]
    if not ends:
        return None
    try:
        usage, _ = _DECODER.raw_decode(tail[ends[-1] :].decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    counts = [
        next((usage[name] for name in names if type(usage.get(name)) is int and usage[name] >= 0), None)
        for names in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))
    ]
    return None if counts == [None, None] else (counts[0] or 0, counts[1] or 0)


@dataclass(slots=True)
class _Now:
    """One model at this moment."""

    queued: int = 0
    in_flight: int = 0
    since_s: float = 0.0  # monotonic: up to here the request-seconds are booked
    last_arrival_s: float | None = None  # Unix times
    last_busy_s: float | None = None
    untold: int = 0  # answers that did not tell their tokens, ever
    rows: dict[int, Row] = field(default_factory=dict)


class TrafficCounter:
    """Counts for one gateway. Runs on its event loop; every call is cheap enough for a request's path."""

    def __init__(self, models: Iterable[str], clock: Clock) -> None:
        self._clock = clock
        self.source = secrets.token_hex(8)
        """Names this counter: its batches are numbered from 1."""
        self._models = {model: _Now() for model in models}
        self._pending: deque[tuple[int, list[Row]]] = deque()
        self._pending_rows = 0
        self._open_rows = 0  # those that are in no batch yet
        self._sequence = 0
        self._closed = False
        self.dropped = 0
        """Rows that the controller never got."""

    def arrived(self, model: str) -> None:
        """A request named the model; whether there is room for it comes after."""
        now_s = self._clock.time_s()
        now = self._models[model]
        now.last_arrival_s = now_s
        self._row(model, now, int(now_s))[2] += 1

    def queue(self, model: str, queued: int, in_flight: int) -> None:
        """From now on so many wait, and so many are in progress."""
        now = self._models[model]
        self._settle(model, now)
        now.queued, now.in_flight = queued, in_flight

    def answered(self, model: str, end: bytes) -> None:
        """A request was answered; `end` is at least the end of the answer's body."""
        now = self._models[model]
        usage = read_usage(end)
        if usage is None:
            now.untold += 1
            return
        row = self._row(model, now, int(self._clock.time_s()))
        row[3] += usage[0]
        row[4] += usage[1]

    def _row(self, model: str, now: _Now, second: int) -> Row:
        row = now.rows.get(second)
        if row is None:
            row = now.rows[second] = [model, second, 0, 0, 0, 0.0, 0.0]
            self._open_rows += 1
            if self._open_rows > KEPT_ROWS:
                fullest = max(self._models.values(), key=lambda each: len(each.rows)).rows
                del fullest[next(iter(fullest))]
                self._open_rows -= 1
                self.dropped += 1
        return row

    def _settle(self, model: str, now: _Now) -> None:
        """Book the request-seconds since the last change, split at the seconds' ends.

        The length is that of the monotonic clock, so that a clock that is set doesn't make hours of load.
        """
        monotonic_s, end_s = self._clock.monotonic_s(), self._clock.time_s()
        length_s, now.since_s = monotonic_s - now.since_s, monotonic_s
        if not (now.queued or now.in_flight):
            return
        now.last_busy_s = end_s
        at_s = end_s - length_s
        while at_s < end_s:
            second = math.floor(at_s)
            until_s = min(end_s, second + 1.0)
            row = self._row(model, now, second)
            row[5] += now.in_flight * (until_s - at_s)
            row[6] += now.queued * (until_s - at_s)
            at_s = until_s

    # What the reports need

    def activity(self, model: str) -> dict[str, Any]:
        """When a request last came and when one was last there (Unix times), and how many answers told no tokens."""
        now = self._models[model]
        busy_s = self._clock.time_s() if now.queued or now.in_flight else now.last_busy_s
        return {"last_arrival_s": now.last_arrival_s, "last_busy_s": busy_s, "untold": now.untold}

    def batches(self) -> list[tuple[int, list[Row]]]:
        """Every batch that is not acknowledged, (number, rows), with the seconds that are over by now.

        Once the counter is closed, also with what there is of the present one.
        """
        over = math.inf if self._closed else int(self._clock.time_s())
        rows = []
        for model, now in self._models.items():
            if now.queued or now.in_flight:
                self._settle(model, now)
            for second in [s for s in now.rows if s < over]:
                rows.append(now.rows.pop(second))
        self._open_rows -= len(rows)
        if rows:
            self._sequence += 1
            self._pending.append((self._sequence, rows))
            self._pending_rows += len(rows)
            while self._pending_rows > KEPT_ROWS and len(self._pending) > 1:
                _, lost = self._pending.popleft()
                self._pending_rows -= len(lost)
                self.dropped += len(lost)
        return list(self._pending)

    def close(self) -> None:
        """Hardly anything comes any more: what does is not kept back until its second is over."""
        self._closed = True

    def acknowledge(self, sequence: int) -> None:
        """The controller keeps the batches up to this number."""
        while self._pending and self._pending[0][0] <= sequence:
            self._pending_rows -= len(self._pending.popleft()[1])
