"""Lines of a file, plain or gzip, in bounded memory and with progress."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from deployments.errors import ConfigError

MAX_LINE = 1 << 20
_EVERY = 20_000
"""Lines between two reports of progress."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one reading of a file is. Each import reads it twice."""

    stage: str
    """reading, then importing."""
    done_bytes: int
    total_bytes: int
    """0 where the share can't be told."""
    lines: int


ReportProgress = Callable[[Progress], None]


def digest(path: Path) -> str:
    """SHA-256 of the file as it lies there. Raises ConfigError if it can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error


def lines_of(
    path: Path, stage: str, report: ReportProgress | None = None
) -> Iterator[tuple[int, str | None]]:
    """(number of the line from 1, its text without its end) of lines that are not empty; None for one over MAX_LINE.

    Raises:
        ConfigError: the file can't be read, or ends in the middle of its compressed data.
    """
    try:
        with path.open("rb") as file:
            total = path.stat().st_size
            is_gzip = file.peek(2)[:2] == b"\x1f\x8b"
            text: IO[bytes] = gzip.GzipFile(fileobj=file) if is_gzip else file  # type: ignore[assignment]
            number = 0
            for number, line in enumerate(_bounded(text), 1):
                if report is not None and number % _EVERY == 0:
                    report(Progress(stage, file.tell(), total, number))
                decoded = None if line is None else line.decode("utf-8", "replace").strip("\r\n\ufeff ")
                if decoded != "":
                    yield number, decoded
            if report is not None:
                report(Progress(stage, total, total, number))
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error


def _bounded(file: Any) -> Iterator[bytes | None]:
    while line := file.readline(MAX_LINE):
        if len(line) < MAX_LINE or line.endswith(b"\n"):
            yield line
            continue
        yield None
        while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
            pass
