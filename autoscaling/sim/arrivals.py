"""A trace as requests in virtual time, in pieces of bounded size: whole windows are spread, tokens become work."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoscaling.trace_formats import MOST_IN_WINDOW
from autoscaling.traces import Row, TraceError

Floats = NDArray[np.float64]
ORIGIN_S = 1_767_571_200.0
"""Where a trace's second 0 is put: Monday, 5 January 2026, 00:00 UTC. A trace of Unix times keeps its own."""
UNIX_S = 1e9
"""A trace that begins later than this has Unix times."""
PIECE = 65536
"""Requests in a piece at most, unless one window alone has more."""

Work = Callable[[int, int, float], float]
"""(input_tokens, output_tokens, exec_s) -> seconds alone on a replica."""


@dataclass(frozen=True, slots=True)
class Piece:
    """All requests until `until_s` that earlier pieces did not have."""

    until_s: float
    """Exclusive; infinite for the last."""
    requests: dict[str, tuple[Floats, Floats]]
    """Model -> (Unix seconds in ascending order, seconds of work), shape (n,) each."""


def pieces(  # noqa: PLR0917 - a reading's own settings
    rows: Iterable[Row],
    work: Work,
    seed: int = 0,
    scale: float = 1.0,
    origin_s: float | None = None,
    most: int | None = PIECE,
) -> Iterator[Piece]:
    """Pieces in the order of time. The same rows and seed give the same requests, whoever asks.

    Args:
        scale: share of the requests that come; each is kept or left out by itself. Above 1, windows hold more, and
            single requests are an error.
        most: requests in a piece; None: all in one.
        origin_s: where second 0 is put; None: ORIGIN_S, and 0 for Unix times.
    """
    reading = _Reading(work, seed, scale, origin_s)
    for row in rows:
        if most is not None and reading.count >= most and row.time_s > reading.last_s:
            yield reading.cut(row.time_s)
        reading.take(row)
    yield reading.cut(None)


class _Reading:
    def __init__(self, work: Work, seed: int, scale: float, origin_s: float | None) -> None:
        self.work = work
        self.seed = seed
        self.scale = scale
        self.origin_s = origin_s
        self.last_s = -np.inf
        self.count = 0
        self.single: dict[str, tuple[list[float], list[float]]] = {}
        self.spread: dict[str, list[tuple[Floats, Floats]]] = {}
        self.late: dict[str, tuple[Floats, Floats]] = {}
        self.random: dict[str, np.random.Generator] = {}

    def take(self, row: Row) -> None:
        # Files were looked at when they were read; a list of rows was not.
        if not row.time_s >= self.last_s:
            raise TraceError(
                f"{row.model} at {row.time_s:.10g} s breaks the order of times: the row before it is of "
                f"{self.last_s:.10g} s"
            )
        if row.window_s == 0.0 and row.requests != 1:
            raise TraceError(
                f"{row.model} at {row.time_s:.10g} s: requests: {row.requests} come in no time; with window_s 0 "
                "it must be 1"
            )
        if self.origin_s is None:
            self.origin_s = 0.0 if row.time_s > UNIX_S else ORIGIN_S
        self.last_s = row.time_s
        worked = self.work(row.input_tokens, row.output_tokens, row.exec_s)
        if row.window_s == 0.0:
            if self.scale > 1.0:
                raise TraceError(
                    f"scale: {self.scale:g} is above 1, and the trace has single requests: above 1 only traces of "
                    "windows can hold more"
                )
            if self.scale < 1.0 and self._generator(row.model).random() >= self.scale:
                return
            single = self.single.setdefault(row.model, ([], []))
            single[0].append(row.time_s + self.origin_s)
            single[1].append(worked)
            self.count += 1
            return
        random = self._generator(row.model)
        count = row.requests
        if count * self.scale > MOST_IN_WINDOW:
            raise TraceError(
                f"scale: {self.scale:g} makes more of {count:,} requests of a window than {MOST_IN_WINDOW:,}"
            )
        if self.scale < 1.0:
            count = int(random.binomial(count, self.scale))
        elif self.scale > 1.0:
            count = int(random.poisson(count * self.scale))
        if count:
            times = row.time_s + self.origin_s + within(count, row.window_s, row.cv, random)
            self.spread.setdefault(row.model, []).append((times, np.full(count, worked)))
            self.count += count

    def _generator(self, model: str) -> np.random.Generator:
        random = self.random.get(model)
        if random is None:
            random = self.random[model] = np.random.default_rng([self.seed, zlib.crc32(model.encode())])
        return random

    def cut(self, before_s: float | None) -> Piece:
        """What comes before that moment of the trace's time; the rest, of windows that reach beyond it, waits."""
        until_s = np.inf if before_s is None else before_s + (self.origin_s or 0.0)
        found: dict[str, list[tuple[Floats, Floats]]] = {}
        for model, kept in self.late.items():
            found.setdefault(model, []).append(kept)
        for model, single in self.single.items():
            found.setdefault(model, []).append((np.asarray(single[0]), np.asarray(single[1])))
        for model, parts in self.spread.items():
            found.setdefault(model, []).extend(parts)
        requests: dict[str, tuple[Floats, Floats]] = {}
        self.late, self.single, self.spread, self.count = {}, {}, {}, 0
        for model, parts in found.items():
            times = np.concatenate([part[0] for part in parts])
            works = np.concatenate([part[1] for part in parts])
            if np.any(times[1:] < times[:-1]):
                order = np.argsort(times, kind="stable")
                times, works = times[order], works[order]
            until = len(times) if before_s is None else int(np.searchsorted(times, until_s))
            if until:
                requests[model] = (times[:until], works[:until])
            if until < len(times):
                self.late[model] = (times[until:], works[until:])
        return Piece(float(until_s), requests)


def within(count: int, window_s: float, cv: float, random: np.random.Generator) -> Floats:
    """Seconds into the window of so many requests, ascending: shape (count,).

    With gaps that vary like an exponential's, uniform and independent, as a Poisson process is given its count; else a
    renewal process with gamma gaps, stretched to the window.
    """
    if abs(cv - 1.0) < 1e-9 or cv <= 0 or count == 1:
        return np.sort(random.random(count)) * window_s
    gaps = random.gamma(1.0 / cv**2, 1.0, count + 1)
    total = gaps.sum()
    if total <= 0:
        return np.sort(random.random(count)) * window_s
    return np.asarray(np.cumsum(gaps)[:-1] / total * window_s * (1 - 1e-12))


__all__ = ["ORIGIN_S", "Piece", "pieces", "within"]
