"""Where arrivals come from: logs, which are read here, and traces, which `autoscaling.traces` reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from autoscaling.live.importer.files import Progress, ReportProgress, lines_of
from autoscaling.live.importer.formats import Format, recognize
from autoscaling.live.importer.rows import Arrival, LineError
from autoscaling.traces import Row, Trace, TraceError, open_trace
from deployments.errors import ConfigError

SHOWN = 5
_EVERY = 20_000


@dataclass(slots=True)
class Broken:
    """Lines that can't be read, of one reading."""

    count: int = 0
    shown: list[str] = field(default_factory=list)
    """The first ones: which, what of them, and what would be right."""

    def add(self, said: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(said)


class Log:
    """An access log or JSON lines."""

    window_s = 0.0
    windows_differ = False

    def __init__(self, path: Path, format: Format) -> None:
        self.kind = format.kind
        self.names_models = format.names_models
        self.lines = 0
        """Of the last reading, without empty ones."""
        self._path = path
        self._parse = format.parse

    def arrivals(self, stage: str, report: ReportProgress | None, broken: Broken) -> Iterator[Arrival]:
        """All of it, once."""
        self.lines = 0
        for number, line in lines_of(self._path, stage, report):
            self.lines += 1
            try:
                if line is None:
                    raise LineError("the line", "...", "one of at most a million bytes")
                arrival = self._parse(line)
            except LineError as error:
                broken.add(f"line {number}: {error}")
                continue
            if arrival is not None:
                yield arrival


class Traced:
    """A trace: of requests, or of windows."""

    names_models = True

    def __init__(self, trace: Trace) -> None:
        self.kind = trace.format
        self.lines = 0
        self.window_s = 0.0
        """The longest window that was met; 0: its rows are single requests."""
        self.windows_differ = False
        self._trace = trace

    def arrivals(self, stage: str, report: ReportProgress | None, broken: Broken) -> Iterator[Arrival]:
        """All of it, once."""
        self.lines = 0
        self._trace.skip_bad = False
        rows = self._trace.rows()
        while True:
            try:
                row = next(rows, None)
            except TraceError as error:
                # It tells of the first bad row only by giving up; so begin again, and skip what was given.
                broken.shown.append(str(error))
                self._trace.skip_bad = True
                rows = self._trace.rows()
                for _ in range(self.lines):
                    next(rows)
                continue
            except OSError as error:
                raise ConfigError(f"{self._trace.path}: can't be read: {error}") from error
            if row is None:
                break
            self.lines += 1
            self.windows_differ |= self.lines > 1 and row.window_s != self.window_s
            self.window_s = max(self.window_s, row.window_s)
            if report is not None and self.lines % _EVERY == 0:
                report(Progress(stage, 0, 0, self.lines))
            yield _arrival(row)
        broken.count = self._trace.bad
        self.lines += broken.count


def _arrival(row: Row) -> Arrival:
    return Arrival(
        time_s=row.time_s,
        name=row.model,
        count=row.requests,
        input_tokens=row.requests * row.input_tokens,
        output_tokens=row.requests * row.output_tokens,
        duration_s=row.exec_s or None,
    )


def open_source(path: Path, fields: Mapping[str, str], window_s: float | None) -> Log | Traced:
    """Finds out what a file is, by its first line that is not empty.

    Args:
        window_s: of a trace of windows: how long they are, where the file doesn't say.

    Raises:
        ConfigError: it can't be read, is empty, or is nothing that is known.
    """
    first = next(lines_of(path, "reading"), None)
    if first is None:
        raise ConfigError(f"{path}: is empty. Expected a trace or an access log.")
    format = recognize(first[1] or "", fields)
    if format is not None:
        return Log(path, format)
    try:
        trace = open_trace(path, window_s=window_s)
    except TraceError as error:
        raise ConfigError(
            f"{error}; or JSON lines, or an access log in Common, Combined or Envoy's format"
        ) from error
    return Traced(trace)
