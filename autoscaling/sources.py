"""What can be replayed: traces, access logs, and the history in Relight's own store."""

from __future__ import annotations

import heapq
import math
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from autoscaling.ports import Clock
from autoscaling.traces import Row, Source, TraceError, busiest, columns_of, open_trace

if TYPE_CHECKING:
    from autoscaling.live.importer.names import Names
    from autoscaling.live.importer.sources import Log
    from autoscaling.live.store import Store
    from autoscaling.sim.starts import Measured
    from autoscaling.traffic import Buckets, Traffic

SHUFFLED_BY = 4096
"""By how many lines a log may be out of order: a request is written when it ends."""
MOST_STARTS = 10_000
NAMES_KEPT = 1000
NAMELESS = ("azure-llm", "mooncake")
"""Formats of traces that name no model."""


def open_source(
    path: str | Path,
    *,
    window_s: float | None = None,
    model: str | None = None,
    mapping: Sequence[tuple[str, str]] = (),
    skip_bad: bool = False,
) -> Source:
    """A trace, an access log (Common, Combined, Envoy's, nginx's) or JSON lines: its first line says which.

    Args:
        window_s: how long a trace's windows are, if its rows don't say so; else by its name (`min_`, `win5_`).
        model: what requests are counted as where the file names no model; else the file's name.
        mapping: of logs: (pattern with * and ?, model) for names and paths; what none matches is `model`, or left out
            if that is None.
        skip_bad: pass over bad rows, and count them.

    Raises:
        TraceError: for a file that can't be read or whose format is not known, or of which one of these says nothing.
        ConfigError: for a mapping that is none.
    """
    from autoscaling.live.importer.files import lines_of
    from autoscaling.live.importer.formats import recognize
    from autoscaling.live.importer.names import Names
    from autoscaling.live.importer.sources import Log
    from deployments.errors import ConfigError

    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise TraceError(f"{path}: is a pipe or a device; it must be a file, as it is read more than once")
    try:
        path.open("rb").close()
        first = next(lines_of(path, "reading"), None)
        format = None if first is None or first[1] is None else recognize(first[1], {})
    except OSError as error:
        raise TraceError(f"{path}: can't be read: {error.strerror}") from None
    except ConfigError as error:
        raise TraceError(error.message) from None
    if format is None:
        trace = open_trace(path, window_s=window_s, model=model, skip_bad=skip_bad)
        columns = set() if first is None else columns_of(first[1] or "")
        if mapping:
            raise TraceError(f"{path}: --map is for names and paths of logs, and this is a trace")
        if model is not None and trace.format not in NAMELESS:
            raise TraceError(
                f"{path}: --model {model!r} is for what names no model, and its rows name theirs"
            )
        if window_s is not None and (trace.format != "windows" or "window_s" in columns):
            why = "its rows say theirs" if "window_s" in columns else f"its format is {trace.format!r}"
            raise TraceError(
                f"{path}: --window {window_s:g} s is for windows whose length is not said; {why}"
            )
        return trace
    if window_s is not None:
        raise TraceError(f"{path}: --window {window_s:g} s is for traces of windows, and this is a log")
    if model is None and not mapping and not format.names_models:
        model = path.name.split(".")[0]
    names = Names(mapping, model)
    return LogSource(Log(path, format), str(path), names, skip_bad=skip_bad)


@dataclass(slots=True)
class LogSource:
    """An access log or JSON lines. POST requests that were served count; of JSON lines, what does not say, too."""

    log: Log
    name: str
    names: Names
    skip_bad: bool = False
    bad: int = 0
    left_out: int = 0
    """Requests that no model stands for, of the last reading."""
    left_out_names: Counter[str] = field(default_factory=Counter)
    """Names and paths of these; of the first NAMES_KEPT that differ."""

    @property
    def notes(self) -> Sequence[str]:
        """That requests were left out, and which."""
        if not self.left_out:
            return ()
        return (
            f"left out, as no --map and no --model stands for them: {self.left_out:,} of the requests: "
            f"{busiest(self.left_out_names)}",
        )

    def rows(self) -> Iterator[Row]:
        """In the order of their times."""
        before_s = -math.inf
        for row in unshuffled(self.unordered()):
            if row.time_s < before_s:
                raise TraceError(
                    f"{self.name}: a request of {row.model} is more than {SHUFFLED_BY} lines after its time; "
                    "`relight trace convert --sort` puts them in order"
                )
            before_s = row.time_s
            yield row

    def unordered(self) -> Iterator[Row]:
        """In the order of the file. Raises TraceError."""
        from autoscaling.live.importer.sources import Broken
        from deployments.errors import ConfigError

        broken = Broken()
        self.left_out = 0
        self.left_out_names.clear()
        reading = self.log.arrivals("reading", None, broken)
        while True:
            try:
                arrival = next(reading, None)
            except ConfigError as error:
                raise TraceError(error.message) from None
            self.bad = broken.count
            if broken.count and not self.skip_bad:
                raise TraceError(f"{self.name}: {broken.shown[0]}")
            if arrival is None:
                return
            model = self.names.model_of(arrival.name, names_models=self.log.names_models)
            if model is None or not arrival.count:
                self.left_out += arrival.count
                known = arrival.name in self.left_out_names or len(self.left_out_names) < NAMES_KEPT
                if known and arrival.count:
                    self.left_out_names[arrival.name] += arrival.count
                continue
            each_in, each_out = (
                round(tokens / arrival.count) for tokens in (arrival.input_tokens, arrival.output_tokens)
            )
            for _ in range(arrival.count):
                yield Row(arrival.time_s, model, 1, 0.0, each_in, each_out, arrival.duration_s or 0.0)


def unshuffled(rows: Iterator[Row]) -> Iterator[Row]:
    """In the order of time, if none is more than SHUFFLED_BY places late."""
    waiting: list[Row] = []
    for row in rows:
        if len(waiting) < SHUFFLED_BY:
            heapq.heappush(waiting, row)
        else:
            yield heapq.heappushpop(waiting, row)
    while waiting:
        yield heapq.heappop(waiting)


def _clock() -> Clock:
    from autoscaling.live.clock import SystemClock

    return SystemClock()


@dataclass(slots=True)
class StoredSource:
    """All traffic that a store knows, as windows: of a second in its last hour, longer ones before.

    As it is when this is made: what comes meanwhile would be another trace to the next policy that is replayed on it.
    It is read in a copy, since a store repairs, prunes and completes what it opens.
    """

    url: str
    clock: Clock = field(default_factory=_clock)
    bad: int = 0
    models: tuple[str, ...] = field(default=(), init=False)
    _known: list[Traffic] = field(default_factory=list, init=False)
    _starts: Measured | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Raises TraceError for a store that is not there or knows no traffic; ConfigError for what is no URL."""
        from autoscaling.sim.starts import Measured

        now_s = self.clock.now_s()
        with self._opened() as store:
            self.models = tuple(store.models_with_traffic())
            self._known = [store.traffic(name, now_s) for name in self.models]
            health = store.health()
            error = health["error"] or next(iter(health["notices"]), None)
            if error is not None:
                raise TraceError(f"{self.name}: can't be read: {error}")
            starts = store.cold_starts(None, 0.0, MOST_STARTS)
            if starts:
                self._starts = Measured.of((row.model, row.rung, row.total_s) for row in starts)
        if not self.models:
            raise TraceError(f"{self.name}: it holds no traffic")

    @property
    def name(self) -> str:
        """The URL, without what is secret in it."""
        from autoscaling.live.store.database import shown_text

        return shown_text(self.url)

    @contextmanager
    def _opened(self) -> Iterator[Store]:
        from sqlalchemy.exc import SQLAlchemyError

        from autoscaling.live.store import Store
        from autoscaling.live.store.database import copied, copied_history, parse_url

        _, path = parse_url(self.url)
        # SQLite would make a new one.
        if path is not None and not path.is_file():
            raise TraceError(f"{self.name}: there is no such file")
        with ExitStack() as stack:
            copy = Path(stack.enter_context(TemporaryDirectory(prefix="relight-"))) / "store.db"
            try:
                whole = copied(path, copy) if path is not None else copied_history(self.url, copy, self.clock)
            except (sqlite3.Error, SQLAlchemyError, OSError) as error:
                said = " ".join(str(getattr(error, "orig", None) or error).split())
                raise TraceError(f"{self.name}: can't be read: {said}") from None
            if not whole:
                raise TraceError(f"{self.name}: it is no store of Relight's")
            store = Store.open(f"sqlite:///{copy}", clock=self.clock)
            stack.callback(store.close)
            yield store

    @property
    def notes(self) -> Sequence[str]:
        """None."""
        return ()

    def starts(self) -> Measured | None:
        """The newest starts that were measured; None: there are none."""
        return self._starts

    def rows(self) -> Iterator[Row]:
        """In the order of their times."""
        yield from heapq.merge(*map(_windows, self._known))


def _windows(traffic: Traffic) -> Iterator[Row]:
    """Buckets as windows, each from the finest level that knows of it."""
    coarsest = traffic.levels[-1]
    arrivals = float(coarsest.arrivals.sum())
    # A long request is in progress in buckets after its own, so no bucket knows how long its requests took.
    exec_s = float(coarsest.busy_s.sum()) / arrivals if arrivals else 0.0
    begins = [*(_begins_s(*pair) for pair in pairwise(traffic.levels)), -math.inf]
    ends = [math.inf, *begins]
    for level, begins_s, ends_s in reversed(list(zip(traffic.levels, begins, ends, strict=False))):
        lead_s, trail_s = (column.tolist() for column in level.silent_s)
        for i, at in enumerate((level.index * level.step_s).tolist()):
            count = int(level.arrivals[i])
            if count and begins_s <= at < ends_s:
                each_in = round(float(level.input_tokens[i]) / count)
                each_out = round(float(level.output_tokens[i]) / count)
                within_s = level.step_s - lead_s[i] - trail_s[i]
                for from_s, part, window_s in _spread(at + lead_s[i], count, within_s, level.step_s):
                    yield Row(from_s, traffic.model, part, window_s, each_in, each_out, exec_s)


def _spread(from_s: float, count: int, within_s: float, step_s: float) -> Iterator[tuple[float, int, float]]:
    """(begin, requests, length) of the windows of a bucket's requests: its first and its last second, and between."""
    if count == 1 or within_s == step_s or within_s <= 2.0:
        yield from_s, count, within_s
        return
    yield from_s, 1, 1.0
    if count > 2:
        yield from_s + 1.0, count - 2, within_s - 2.0
    yield from_s + within_s - 1.0, 1, 1.0


def _begins_s(fine: Buckets, coarse: Buckets) -> float:
    """From when on the finer level tells all: a bucket of the coarser one is told by one of them only."""
    if fine.start_s < coarse.start_s + coarse.step_s:
        return -math.inf
    return math.ceil(fine.start_s / coarse.step_s) * coarse.step_s


@dataclass(slots=True)
class Renamed:
    """The same requests under other names."""

    source: Source
    names: Mapping[str, str]
    """Of those that are called otherwise."""

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name

    @property
    def bad(self) -> int:
        """The source's."""
        return self.source.bad

    @property
    def notes(self) -> Sequence[str]:
        """The source's."""
        return self.source.notes

    def rows(self) -> Iterator[Row]:
        """In the order of their times."""
        for row in self.source.rows():
            renamed = self.names.get(row.model)
            yield row if renamed is None else row._replace(model=renamed)


__all__ = ["LogSource", "Renamed", "StoredSource", "open_source"]
