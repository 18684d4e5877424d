"""Imports a file in two readings: the first finds out what is in it, the second brings it into the store."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from autoscaling.live.importer.files import ReportProgress, digest
from autoscaling.live.importer.names import Names
from autoscaling.live.importer.rows import Arrival
from autoscaling.live.importer.sources import SHOWN, Broken, open_source
from autoscaling.live.store import Store
from autoscaling.traffic import LEVELS, LONGEST_WINDOW_S
from deployments.errors import ConfigError

MOST_BROKEN = 0.1
"""A file with a larger share of broken lines is taken for a misunderstanding, and not imported."""
RELATIVE_S = 315_532_800.0
"""Times before 1980 count from the beginning of a trace."""
NAMES_KEPT = 1000

Align = Literal["auto", "none", "end", "day", "week"]
_GRAIN_S = {"end": 1.0, "day": 86400.0, "week": 7 * 86400.0}


@dataclass(frozen=True, slots=True)
class Options:
    """How a file is to be read."""

    names: Names = field(default_factory=Names)
    align: Align = "auto"
    """What is added to the file's times. none: nothing. end: so that it ends now. day, week: the same by whole days or
    weeks, so that hours or days of the week stay what they are. auto: week for times that count from 0, else none."""
    shift_s: float = 0.0
    """Added on top."""
    window_s: float | None = None
    """How long a trace's windows are, where it doesn't say. None: by the file's name (min_, win5_), else a minute."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Of JSON lines: time, model, path, count, input_tokens, output_tokens, duration, method, status -> key."""
    service_s: float | None = None
    """How long a request takes where the file doesn't say. None: its concurrency stays unknown, as 0."""


@dataclass(slots=True)
class Report:
    """What is in a file, and what came of it."""

    path: str
    format: str = ""
    bucket_s: float = 1.0
    """How fine its times are known: 1, or the length of its windows."""
    requests: Counter[str] = field(default_factory=Counter)
    """model -> requests in the file."""
    first_s: float = math.inf
    last_s: float = -math.inf
    """When the first came and the last ended, as imported."""
    shift_s: float = 0.0
    """What was added to the file's times."""
    lines: int = 0
    broken: int = 0
    broken_shown: list[str] = field(default_factory=list)
    """The first broken lines: which, what of them, and what would be right."""
    left_out: Counter[str] = field(default_factory=Counter)
    """name or path -> requests that no model stands for; of at most 1,000 names."""
    has_durations: bool = False
    """Whether the file says how long requests took. If not, concurrency is `Options.service_s` or unknown."""
    refused: int = 0
    """Rows that the store refused: they lie in the future, or are older than anything is kept."""
    imported_before_s: float | None = None
    """When the same was imported, Unix seconds; then nothing was done now."""


class Import:
    """A file that was looked through. Iterating gives the rows for `Store.import_traffic`, read anew each time.

    A request's time in progress is cut at seconds (the last hours) or minutes, so that each bucket gets its part.
    """

    def __init__(
        self, path: Path, options: Options, now_s: float, progress: ReportProgress | None = None
    ) -> None:
        """Reads the file for the first time.

        Raises:
            ConfigError: the file can't be read, is of no known format, has too many broken lines, has no request of a
                model, windows too long for the history, or lies in another time.
        """
        self.given = 0
        """Rows of the last iteration."""
        self._path = path
        self._options = options
        self._progress = progress
        self._digest = digest(path)
        self._source = open_source(path, options.fields, options.window_s)
        self.report = self._look_through()
        _align(self.report, options, now_s)
        names = options.names
        told = [self._digest, sorted(self.report.requests), names.patterns, names.model]
        self.identity = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        """The same for the same content, read into the same models."""

    def __iter__(self) -> Iterator[tuple[str, float, int, int, int, float]]:
        """(model, time_s, arrivals, input_tokens, output_tokens, busy_s).

        Raises:
            ConfigError: at the end, if the file was changed since it was looked through.
        """
        self.given = 0
        fine_from_s = self.report.last_s - 2 * LEVELS[0][1]
        windows = self._source.window_s > 0
        for arrival in self._source.arrivals("importing", self._progress, Broken()):
            model = self._model(arrival)
            if model is None:
                continue
            lasted_s = (
                arrival.duration_s if arrival.duration_s is not None else self._options.service_s or 0.0
            )
            at_s = arrival.time_s + self.report.shift_s
            counts = (arrival.count, arrival.input_tokens, arrival.output_tokens)
            piece_s = LEVELS[0 if at_s >= fine_from_s else 1][0]
            pieces = [(at_s, lasted_s)] if windows else _pieces(at_s, lasted_s, piece_s)
            for start_s, busy_s in pieces:
                self.given += 1
                yield model, start_s, *counts, busy_s * arrival.count
                counts = (0, 0, 0)
        if digest(self._path) != self._digest:
            raise ConfigError(f"{self._path}: was changed while it was read. Nothing was imported.")

    def _model(self, arrival: Arrival) -> str | None:
        return self._options.names.model_of(arrival.name, names_models=self._source.names_models)

    def _look_through(self) -> Report:
        source, names = self._source, self._options.names
        if not source.names_models and not names.patterns and names.model is None:
            raise ConfigError(
                f"{self._path}: an access log names no models. Say which path is which model (map), or one model for "
                "all (model)."
            )
        report = Report(str(self._path), source.kind)
        broken = Broken()
        last_start_s = 0.0
        for arrival in source.arrivals("reading", self._progress, broken):
            model = self._model(arrival)
            if model is None:
                if arrival.name in report.left_out or len(report.left_out) < NAMES_KEPT:
                    report.left_out[arrival.name] += arrival.count
                continue
            report.requests[model] += arrival.count
            report.first_s = min(report.first_s, arrival.time_s)
            last_start_s = max(last_start_s, arrival.time_s)
            report.last_s = max(report.last_s, arrival.time_s + (arrival.duration_s or 0.0))
            report.has_durations |= arrival.duration_s is not None
        if source.window_s:
            report.bucket_s = source.window_s
            if source.windows_differ:
                # As those of a store's own history, which lie within its buckets: none is spread over several.
                report.bucket_s = next((s for s, _ in LEVELS if s >= source.window_s), source.window_s)
            report.last_s = last_start_s + source.window_s
            if source.window_s > LONGEST_WINDOW_S:
                raise ConfigError(
                    f"{self._path}: it has windows of {source.window_s:g} s. Expected {LONGEST_WINDOW_S:g} s (two "
                    "hours) at most: longer ones don't say when requests come. Nothing was imported."
                )
        report.lines, report.broken, report.broken_shown = source.lines, broken.count, broken.shown
        if report.broken > MOST_BROKEN * report.lines:
            raise ConfigError(
                f"{self._path}: {report.broken} of {report.lines} lines can't be read, so nothing was imported. "
                f"The first: {' '.join(broken.shown)}"
            )
        if not report.requests.total():
            raise ConfigError(_nothing(report))
        return report


def import_file(
    store: Store, path: Path, options: Options, now_s: float, progress: ReportProgress | None = None
) -> Report:
    """Brings the requests of a trace or a log into the history: all of them, or, when anything fails, none.

    The same file, read into the same models, is not imported twice.

    Raises:
        ConfigError: as `Import`.
        StoreUnavailable: the store can't be written now.
    """
    found = Import(path, options, now_s, progress)
    report = found.report
    report.imported_before_s = store.imported(found.identity)
    if report.imported_before_s is None:
        taken = store.import_traffic(found, report.bucket_s, source=found.identity)
        report.refused = found.given - taken
    return report


def _pieces(start_s: float, lasted_s: float, piece_s: float) -> Iterator[tuple[float, float]]:
    """Cuts a span at multiples of `piece_s`: (start, length) of each piece; one without length for an instant."""
    end_s = start_s + lasted_s
    while True:
        cut_s = (math.floor(start_s / piece_s) + 1) * piece_s
        yield start_s, max(0.0, min(cut_s, end_s) - start_s)
        if cut_s >= end_s:
            return
        start_s = cut_s


def _align(report: Report, options: Options, now_s: float) -> None:
    align = options.align
    if align == "auto":
        align = "week" if report.last_s < RELATIVE_S else "none"
    report.shift_s = options.shift_s
    if align != "none":
        # Windows must stay windows: they begin at multiples of their length.
        grain_s = max(_GRAIN_S[align], report.bucket_s)
        report.shift_s += math.floor((now_s - report.last_s) / grain_s) * grain_s
    report.first_s += report.shift_s
    report.last_s += report.shift_s
    kept_s = LEVELS[-1][1]
    if report.first_s > now_s or report.last_s < now_s - kept_s:
        where = "the future" if report.first_s > now_s else f"more than {kept_s / 86400:.0f} days ago"
        raise ConfigError(
            f"{report.path}: its requests are from {_date(report.first_s)} to {_date(report.last_s)}, and that is "
            f"{where}. Align its end with now (align: end, day or week), or shift it."
        )


def _nothing(report: Report) -> str:
    if report.left_out:
        names = ", ".join(f"{name} ({number})" for name, number in report.left_out.most_common(SHOWN))
        return f"{report.path}: no name in it stands for a model. It has {names}. Map them to models."
    return f"{report.path}: there is no request in it. Of an access log, only POST requests that were served count."


def _date(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M")
