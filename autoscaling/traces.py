"""Request traces of this and other systems, read row by row: who asked when, and for how much.

Formats, told apart by their first line:

* requests: CSV with `timestamp_s,model` and any of `input_tokens,output_tokens,exec_s`;
* windows: CSV with `minute,model,count` and any of `cv,input_tokens,output_tokens,exec_s,window_s`;
* azure-llm: CSV `TIMESTAMP,ContextTokens,GeneratedTokens` (Azure/AzurePublicDataset, AzureLLMInference…);
* azure-functions: CSV `HashOwner,HashApp,HashFunction,Trigger,1,…,1440` (AzureFunctionsDataset2019, a day a file);
* mooncake: JSON lines `{"timestamp": ms, "input_length", "output_length"}` (kvcache-ai/Mooncake).

Times count from 0 or are Unix seconds. Gzip is unpacked. Unknown columns are passed over.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO

from autoscaling.trace_formats import COLUMNS, FORMATS, Make, Row, check_width, count, model_name, mooncake

_LATE = "breaks the order of times (`relight trace convert --sort` restores it): the row before it is of"


class TraceError(ValueError):
    """The message names the file, the line, the value and what would be right."""


class Source(Protocol):
    """Requests that can be read again and again, each time from their beginning."""

    @property
    def bad(self) -> int:
        """Rows that the last reading skipped."""
        ...

    @property
    def name(self) -> str:
        """As reports call it."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What else the reader should know of the last reading."""
        ...

    def rows(self) -> Iterator[Row]:
        """In the order of their times. Raises TraceError."""
        ...


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

    @property
    def name(self) -> str:
        """The file's."""
        return str(self.path)

    @property
    def notes(self) -> Sequence[str]:
        """None."""
        return ()

    def rows(self) -> Iterator[Row]:
        """In the order of their times. Raises TraceError at the first bad row, unless those are skipped and counted."""
        return self._read(ordered=True)

    def unordered(self) -> Iterator[Row]:
        """The same, in the order of the file."""
        return self._read(ordered=False)

    def _read(self, *, ordered: bool) -> Iterator[Row]:
        self.bad = 0
        with _opened(self.path) as file:
            if self.format == "azure-functions":
                yield from self._functions(file)
                return
            reader: _Reader
            make: Make
            if self.format == "mooncake":
                reader, make = _Lines(file), partial(mooncake, model=self.model)
            else:
                reader = csv.reader(file)
                make = FORMATS[self.format](_header(self.path, reader), self.window_s, self.model)
            before_s = -math.inf
            # Everything in one frame, for it is done for each of many million rows.
            while True:
                read: Any = ""
                try:
                    read = next(reader)
                    if not read:
                        continue
                    row = make(read)
                    if ordered and row.time_s < before_s:
                        raise ValueError(f"{row.model} at {row.time_s:.10g} s {_LATE} {before_s:.10g} s")
                except StopIteration:
                    return
                except (ValueError, csv.Error) as error:
                    self._bad(reader.line_num, read, error)
                    continue
                before_s = row.time_s
                yield row

    def _functions(self, file: TextIO) -> Iterator[Row]:
        """A line is a function's whole day, so all of it is read first: 8 bytes for each minute with requests."""
        reader = csv.reader(file)
        header = _header(self.path, reader)
        first, minutes = header.index("1"), len(header) - header.index("1")
        trigger, function = header.index("Trigger"), header.index("HashFunction")
        day = re.search(r"\.d(\d+)\.", self.path.name)
        began_s = (int(day.group(1)) - 1) * 86400.0 if day else 0.0
        models: list[str] = []
        found = [array("I") for _ in range(minutes)]
        while True:
            cells: list[str] = []
            try:
                cells = next(reader)
                if not cells:
                    continue
                check_width(cells, len(header))
                counts = [
                    count(cell, f"minute {i}") if cell != "0" else 0
                    for i, cell in enumerate(cells[first:], 1)
                ]
                models.append(model_name(f"{cells[trigger]}/{cells[function][:8]}"))
            except StopIteration:
                break
            except (ValueError, csv.Error) as error:
                self._bad(reader.line_num, cells, error)
                continue
            for minute, requests in enumerate(counts):
                if requests:
                    found[minute].extend((len(models) - 1, requests))
        for minute, pairs in enumerate(found):
            for at in range(0, len(pairs), 2):
                yield Row(began_s + 60.0 * minute, models[pairs[at]], pairs[at + 1], 60.0)

    def _bad(self, line: int, read: str | list[str], error: Exception) -> None:
        if self.skip_bad:
            self.bad += 1
            return
        text = (read if isinstance(read, str) else ",".join(read))[:80]
        shown = f"{text!r}: " if text else ""
        raise TraceError(f"{self.path}:{line}: {shown}{error}") from None


class _Reader(Protocol):
    @property
    def line_num(self) -> int: ...
    def __next__(self) -> Any: ...


class _Lines:
    """Lines with their numbers, as `csv.reader` numbers its own."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.line_num = 0

    def __next__(self) -> str:
        line = next(self._file)
        self.line_num += 1
        return line.strip()


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
    with _opened(path) as file:
        first = file.readline().strip()
        empty = not first and not file.readline()
    if empty:
        raise TraceError(f"{path}: is empty; it must be a trace")
    if not first[:1000].replace("\t", " ").isprintable():
        raise TraceError(f"{path}: can't be read: its first line is not text")
    return Trace(
        path=path,
        format=_format(path, first),
        window_s=_window_s(path) if window_s is None else window_s,
        model=path.name.split(".")[0] if model is None else model,
        skip_bad=skip_bad,
    )


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    # What is no UTF-8 makes its own line bad, not the whole file.
    how = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rt", **how) if packed else path.open(**how) as file:  # type: ignore[call-overload]
            yield file
    except EOFError:
        raise TraceError(f"{path}: ends in the middle of its compressed data; is it cut off?") from None
    except zlib.error as error:
        raise TraceError(f"{path}: its compressed data is damaged: {error}") from None
    except OSError as error:
        raise TraceError(f"{path}: can't be read: {error.strerror or error}") from None


def _header(path: Path, reader: _Reader) -> list[str]:
    found = [name.strip() for name in next(reader)]
    for name in COLUMNS.intersection(found):
        if found.count(name) > 1:
            raise TraceError(f"{path}:1: there are {found.count(name)} columns {name!r}, and may be one")
    return found


def _format(path: Path, first: str) -> str:
    columns = columns_of(first)
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
    raise TraceError(
        f"{path}: {first[:80]!r} is the first line of no known format; it must be a CSV header with "
        "timestamp_s,model or minute,model,count, or that of Azure's or Mooncake's traces"
    )


def columns_of(line: str) -> set[str]:
    """The names in a header; none in what is no CSV."""
    try:
        return {name.strip() for name in next(csv.reader([line]), ())}
    except csv.Error:
        return set()


def _window_s(path: Path) -> float:
    found = re.match(r"win(\d+)_", path.name)
    return float(found.group(1)) * 60 if found else 60.0


def until(rows: Iterable[Row], until_s: float | None) -> Iterator[Row]:
    """Those that begin within so many seconds of the first; None: all."""
    end_s = math.inf
    for row in rows:
        if end_s == math.inf and until_s is not None:
            end_s = row.time_s + until_s
        if row.time_s >= end_s:
            return
        yield row


NAMED = 5


def busiest(requests: Counter[str]) -> str:
    """`a (30), b (2)`: the names of the most requests, with how many each has, and how many names there are beside."""
    named = ", ".join(f"{name} ({count:,})" for name, count in requests.most_common(NAMED))
    return f"{named} and {len(requests) - NAMED:,} more" if len(requests) > NAMED else named


__all__ = ["Row", "Source", "Trace", "TraceError", "busiest", "columns_of", "open_trace", "until"]
