"""Request traces of this and other systems, read row by row: who asked when, and for how much.

Formats, told apart by their first line:

* requests: CSV with `timestamp_s,model` and any of `input_tokens,output_tokens,exec_s`;
* windows: CSV with `minute,model,count` and any of `cv,input_tokens,output_tokens,exec_s,window_s`;
* azure-llm: CSV `TIMESTAMP,ContextTokens,GeneratedTokens` (Azure/AzurePublicDataset, AzureLLMInference…);
* azure-functions: CSV `HashOwner,HashApp,HashFunction,Trigger,1,…,1440` (AzureFunctionsDataset2019, a day a file);
* mooncake: JSON lines `{"timestamp": ms, "input_length", "output_length"}` (kvcache-ai/Mooncake);
* access-log: the Common Log Format, with whatever comes after it.

A name that ends in .gz is unpacked. Unknown columns are passed over.
"""

from __future__ import annotations

import csv
import gzip
import heapq
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TextIO

SHUFFLED_BY = 4096
"""By how many lines an access log may be out of order: a request is written when it ends."""


class TraceError(ValueError):
    """The message names the file, the line, the value and what would be right."""


class Row(NamedTuple):
    """One request, or several somewhere within a window."""

    time_s: float
    """When it came, or when the window began; in the trace's own time."""
    model: str
    requests: int = 1
    window_s: float = 0.0
    """0: a single request."""
    input_tokens: int = 0
    output_tokens: int = 0
    exec_s: float = 0.0
    """How long it was worked on; 0 where the trace does not say. Of a window, and so the tokens: for each request."""
    cv: float = 1.0
    """Coefficient of variation of the gaps within the window; 1 is a Poisson process."""


@dataclass(slots=True)
class Trace:
    """A file that is read anew, from its beginning, by every `rows()`."""

    path: Path
    format: str
    window_s: float = 60.0
    model: str = ""
    """What requests are counted as where the format names no model."""
    skip_bad: bool = False
    bad: int = 0
    """Rows that the last reading skipped."""

    def rows(self) -> Iterator[Row]:
        """In the order of their times. Raises TraceError at the first bad row, unless those are skipped and counted."""
        self.bad = 0
        with _opened(self.path) as file:
            if self.format == "azure-functions":
                yield from sorted(self._parsed(file))
            elif self.format == "access-log":
                yield from _unshuffled(self._parsed(file))
            else:
                yield from self._ordered(self._parsed(file))

    def unordered(self) -> Iterator[Row]:
        """The same, in the order of the file."""
        self.bad = 0
        with _opened(self.path) as file:
            yield from self._parsed(file)

    def _parsed(self, file: TextIO) -> Iterator[Row]:
        line, skip = 0, self.skip_bad
        if self.format in ("mooncake", "access-log"):
            parse = _mooncake if self.format == "mooncake" else _access_log
            for line, text in enumerate(file, 1):
                if text.strip():
                    try:
                        yield parse(text, self.model)
                    except (ValueError, KeyError, TypeError) as error:
                        self._bad(line, text.strip(), error, skip=skip)
            return
        reader = csv.reader(file)
        header = next(reader)
        make = _CSV[self.format](header, self)
        width = len(header)
        while True:
            try:
                cells = next(reader)
                if len(cells) != width:
                    if not cells:
                        continue
                    raise ValueError(f"it has {len(cells)} columns, the header {width}")
                made = make(cells)
            except StopIteration:
                return
            except (ValueError, IndexError, csv.Error) as error:
                self._bad(reader.line_num, ",".join(cells), error, skip=skip)
                continue
            if isinstance(made, list):
                yield from made
            else:
                yield made

    def _ordered(self, rows: Iterable[Row]) -> Iterator[Row]:
        before = -math.inf
        for row in rows:
            if row.time_s < before:
                error = ValueError(
                    f"{row.model} at {row.time_s:g} s comes after a row of {before:g} s; rows must be in the order of "
                    f"their times (`relight trace convert --sort` puts them so)"
                )
                self._bad(None, "", error, skip=self.skip_bad)
                continue
            before = row.time_s
            yield row

    def _bad(self, line: int | None, text: str, error: Exception, *, skip: bool) -> None:
        if skip:
            self.bad += 1
            return
        where = f"{self.path}" if line is None else f"{self.path}:{line}"
        shown = f"{text[:80]!r}: " if text else ""
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise TraceError(f"{where}: {shown}{reason}")


def open_trace(
    path: str | Path, *, window_s: float | None = None, model: str | None = None, skip_bad: bool = False
) -> Trace:
    """Look at the first line and say what the file is.

    Args:
        window_s: how long the windows are; else by the file's name (`min_`, `win5_`), else a minute.
        model: what requests are counted as where the format names no model; else the file's name.

    Raises:
        TraceError: for a file that can't be read or whose format is not known.
    """
    path = Path(path)
    try:
        with _opened(path) as file:
            first = file.readline().strip()
    except (OSError, UnicodeDecodeError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TraceError(f"{path}: can't be read: {reason}") from error
    return Trace(
        path=path,
        format=_format(path, first),
        window_s=_window_s(path) if window_s is None else window_s,
        model=path.name.split(".")[0] if model is None else model,
        skip_bad=skip_bad,
    )


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            yield file
    else:
        with path.open(encoding="utf-8", newline="") as file:
            yield file


def _format(path: Path, first: str) -> str:
    columns = {column.strip() for column in first.split(",")}
    if {"timestamp_s", "model"} <= columns:
        return "requests"
    if {"minute", "model", "count"} <= columns:
        return "windows"
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
        return "azure-llm"
    if {"HashFunction", "Trigger", "1440"} <= columns:
        return "azure-functions"
    if first.startswith("{") and '"timestamp"' in first and '"input_length"' in first:
        return "mooncake"
    if _LOG.match(first):
        return "access-log"
    raise TraceError(
        f"{path}: {first[:80]!r} is the first line of no known format; it must be a CSV header with "
        "timestamp_s,model or minute,model,count, or that of Azure's, Mooncake's or an access log"
    )


def _window_s(path: Path) -> float:
    found = re.match(r"win(\d+)_", path.name)
    return float(found.group(1)) * 60 if found else 60.0


Make = Callable[[list[str]], Row | list[Row]]


def _requests(header: list[str], trace: Trace) -> Make:
    at = {name.strip(): i for i, name in enumerate(header)}
    t, m = at["timestamp_s"], at["model"]
    tokens_in, tokens_out, worked = at.get("input_tokens"), at.get("output_tokens"), at.get("exec_s")

    def make(cells: list[str]) -> Row:
        return Row(
            _number(cells[t], "timestamp_s"),
            cells[m],
            1,
            0.0,
            _count(cells, tokens_in, "input_tokens"),
            _count(cells, tokens_out, "output_tokens"),
            0.0 if worked is None or not cells[worked] else _positive(cells[worked], "exec_s"),
        )

    return make


def _windows(header: list[str], trace: Trace) -> Make:
    at = {name.strip(): i for i, name in enumerate(header)}
    t, m, n = at["minute"], at["model"], at["count"]
    tokens_in, tokens_out, worked = at.get("input_tokens"), at.get("output_tokens"), at.get("exec_s")
    varies, length = at.get("cv"), at.get("window_s")

    def make(cells: list[str]) -> Row:
        return Row(
            _number(cells[t], "minute") * 60,
            cells[m],
            _count(cells, n, "count"),
            trace.window_s if length is None else _positive(cells[length], "window_s"),
            _count(cells, tokens_in, "input_tokens"),
            _count(cells, tokens_out, "output_tokens"),
            0.0 if worked is None or not cells[worked] else _positive(cells[worked], "exec_s"),
            1.0 if varies is None or not cells[varies] else _positive(cells[varies], "cv"),
        )

    return make


def _azure_llm(header: list[str], trace: Trace) -> Make:
    at = {name.strip(): i for i, name in enumerate(header)}
    t, tokens_in, tokens_out = at["TIMESTAMP"], at["ContextTokens"], at["GeneratedTokens"]

    def make(cells: list[str]) -> Row:
        # Seven digits of a second, which datetime does not read.
        text = re.sub(r"(\.\d{6})\d+", r"\1", cells[t])
        time = datetime.fromisoformat(text)
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time
        return Row(
            time.timestamp(),
            trace.model,
            1,
            0.0,
            _count(cells, tokens_in, "ContextTokens"),
            _count(cells, tokens_out, "GeneratedTokens"),
        )

    return make


def _azure_functions(header: list[str], trace: Trace) -> Make:
    first = header.index("1")
    trigger, function = header.index("Trigger"), header.index("HashFunction")
    day = re.search(r"\.d(\d+)\.", trace.path.name)
    began_s = (int(day.group(1)) - 1) * 86400.0 if day else 0.0

    def make(cells: list[str]) -> list[Row]:
        model = f"{cells[trigger]}/{cells[function][:8]}"
        return [
            Row(began_s + 60.0 * i, model, _count(cells, first + i, f"minute {i + 1}"), 60.0)
            for i, cell in enumerate(cells[first:])
            if cell != "0"
        ]

    return make


_CSV: dict[str, Callable[[list[str], Trace], Make]] = {
    "requests": _requests,
    "windows": _windows,
    "azure-llm": _azure_llm,
    "azure-functions": _azure_functions,
}


def _mooncake(text: str, model: str) -> Row:
    data = json.loads(text)
    time_s = _number(data["timestamp"], "timestamp") / 1000
    return Row(time_s, model, 1, 0.0, int(data["input_length"]), int(data["output_length"]))


_LOG = re.compile(r'\S+ \S+ \S+ \[(?P<time>[^\]]+)\] "(?P<method>[A-Z]+) \S+')


def _access_log(text: str, model: str) -> Row:
    found = _LOG.match(text)
    if found is None:
        raise ValueError("it is no line of an access log")
    time = datetime.strptime(found["time"], "%d/%b/%Y:%H:%M:%S %z")
    return Row(time.timestamp(), model, 1)


def _unshuffled(rows: Iterable[Row]) -> Iterator[Row]:
    waiting: list[Row] = []
    for row in rows:
        if len(waiting) < SHUFFLED_BY:
            heapq.heappush(waiting, row)
        else:
            yield heapq.heappushpop(waiting, row)
    while waiting:
        yield heapq.heappop(waiting)


def _number(text: str | float, name: str) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise ValueError(f"{name} {text!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} {text!r} is not finite")
    return value


def _positive(text: str, name: str) -> float:
    value = _number(text, name)
    if value < 0:
        raise ValueError(f"{name} {text!r} is negative")
    return value


def _count(cells: list[str], where: int | None, name: str) -> int:
    if where is None:
        return 0
    text = cells[where]
    if not text:
        return 0
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise ValueError(f"{name} {text!r} is not a whole number from 0")
    return value


__all__ = ["Row", "Trace", "TraceError", "open_trace"]
