"""What a line of a file says, and what is wrong with one that says nothing."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime

MAX_DURATION_S = 86400.0
_ISO_DIGITS = re.compile(r"(\.\d{6})\d+")
_CAREFUL = 80
"""Characters of a value that an error shows."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, or the requests of one window."""

    time_s: float
    name: str
    """The model, or the path of the request, as the file says it."""
    count: int = 1
    """0 for a window in which nothing came: that is known, too."""
    input_tokens: int = 0
    output_tokens: int = 0
    duration_s: float | None = None
    """None where the file doesn't say."""


class LineError(Exception):
    """One line that can't be read."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        shown = repr(value)
        if len(shown) > _CAREFUL:
            shown = shown[:_CAREFUL] + "…"
        super().__init__(f"{field} is {shown}. Expected {expected}.")


def number(field: str, value: object, *, least: float = 0.0, most: float = 2.0**40) -> float:
    """A finite number within bounds, from text or a number."""
    expected = f"a number from {least:g} to {most:g}"
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise LineError(field, value, expected)
    try:
        read = float(value)
    except ValueError:
        raise LineError(field, value, expected) from None
    if not math.isfinite(read) or not least <= read <= most:
        raise LineError(field, value, expected)
    return read


def count(field: str, value: object) -> int:
    """A whole number that is not negative."""
    read = number(field, value)
    if read != int(read):
        raise LineError(field, value, "a whole number")
    return int(read)


def duration(field: str, value: object) -> float:
    return number(field, value, most=MAX_DURATION_S)


def moment(field: str, value: object) -> float:
    """Unix seconds, from seconds, milli-, micro- or nanoseconds (told apart by size), or ISO 8601 (UTC by default)."""
    expected = "Unix time or ISO 8601"
    if isinstance(value, str):
        try:
            at = datetime.fromisoformat(_ISO_DIGITS.sub(r"\1", value.strip()))
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                raise LineError(field, value, expected) from None
        else:
            return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < 0
    ):
        raise LineError(field, value, expected)
    # 1e11 seconds are the year 5138, 1e11 milliseconds 1973: no log is from either.
    for scale in (1.0, 1e3, 1e6, 1e9):
        if value / scale < 1e11:
            return value / scale
    raise LineError(field, value, expected)


def name(field: str, value: object) -> str:
    """A model's name or a path."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise LineError(field, value, "a name of printable characters")
    return value.strip()
