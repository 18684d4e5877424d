"""Lines of traces, and the rows that they say. The formats are listed in `autoscaling.traces`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

LATEST_S = 4_102_444_800.0
"""The year 2100: a larger time is in milliseconds or a mistake."""
MOST_IN_WINDOW = 100_000_000
"""Requests of one window, all of which are in memory at once."""
LONGEST_WINDOW_S = 366 * 86400.0
LONGEST_EXEC_S = 10 * 366 * 86400.0
LEAST_CV, MOST_CV = 1e-9, 1e9
MOST_DIGITS = len(str(MOST_IN_WINDOW)) - 1
"""Of a number that is surely no more."""


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


Make = Callable[[Any], Row]
"""From a line, or its cells. Raises ValueError."""


def _requests(header: list[str], window_s: float, model: str) -> Make:
    at, width = {name: i for i, name in enumerate(header)}, len(header)
    t, m = at["timestamp_s"], at["model"]
    tokens_in, tokens_out, worked = at.get("input_tokens"), at.get("output_tokens"), at.get("exec_s")
    names = _Names()

    def make(cells: list[str]) -> Row:
        if len(cells) != width:
            check_width(cells, width)
        time_s, name = _plain_time(cells[t]), names[cells[m]]
        return Row(
            _time(cells[t], "timestamp_s") if time_s is None else time_s,
            name,
            1,
            0.0,
            0 if tokens_in is None else _plain_count(cells[tokens_in], "input_tokens"),
            0 if tokens_out is None else _plain_count(cells[tokens_out], "output_tokens"),
            0.0 if worked is None or not cells[worked] else _worked(cells[worked]),
        )

    return make


def _windows(header: list[str], window_s: float, model: str) -> Make:
    at, width = {name: i for i, name in enumerate(header)}, len(header)
    t, m, n = at["minute"], at["model"], at["count"]
    tokens_in, tokens_out, worked = at.get("input_tokens"), at.get("output_tokens"), at.get("exec_s")
    varies, length = at.get("cv"), at.get("window_s")
    names = _Names()
    minutes = _Minutes()

    def make(cells: list[str]) -> Row:
        if len(cells) != width:
            check_width(cells, width)
        lasts_s = window_s if length is None else _positive(cells[length], "window_s")
        if not 1e-6 <= lasts_s <= LONGEST_WINDOW_S:
            raise ValueError(
                f"window_s must be above 0 and at most {LONGEST_WINDOW_S:.0f}, a year; it is {lasts_s:g}"
            )
        time_s, name = minutes[cells[t]], names[cells[m]]
        return Row(
            time_s,
            name,
            _plain_count(cells[n], "count") if cells[n] else count(cells[n], "count"),
            lasts_s,
            0 if tokens_in is None else _plain_count(cells[tokens_in], "input_tokens"),
            0 if tokens_out is None else _plain_count(cells[tokens_out], "output_tokens"),
            0.0 if worked is None or not cells[worked] else _worked(cells[worked]),
            1.0 if varies is None or not cells[varies] else _cv(cells[varies]),
        )

    return make


class _Names(dict[str, str]):
    """Models that cells name, each looked at once."""

    def __missing__(self, text: str) -> str:
        name = self[text] = model_name(text.strip())
        return name


class _Minutes(dict[str, float]):
    """Seconds of what a column of minutes says, the last one remembered: its rows come together."""

    def __missing__(self, text: str) -> float:
        time_s = _time(text, "minute", 60.0)
        self.clear()
        self[text] = time_s
        return time_s


def _plain_time(text: str) -> float | None:
    """Seconds; None of what must be looked at closer."""
    try:
        time_s = float(text)
    except ValueError:
        return None
    return time_s if 0 <= time_s <= LATEST_S else None


def _plain_count(text: str, name: str) -> int:
    """As `count`, and 0 of nothing."""
    if text.isdecimal() and len(text) <= MOST_DIGITS:
        return int(text)
    return count(text, name) if text else 0


def _azure_llm(header: list[str], window_s: float, model: str) -> Make:
    at, width = {name: i for i, name in enumerate(header)}, len(header)
    t, tokens_in, tokens_out = at["TIMESTAMP"], at["ContextTokens"], at["GeneratedTokens"]

    def make(cells: list[str]) -> Row:
        check_width(cells, width)
        # Seven digits of a second, which datetime does not read.
        text = re.sub(r"(\.\d{6})\d+", r"\1", cells[t])
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(f"TIMESTAMP {cells[t]!r} is no date and time") from None
        return Row(
            (time.replace(tzinfo=UTC) if time.tzinfo is None else time).timestamp(),
            model,
            1,
            0.0,
            count(cells[tokens_in], "ContextTokens"),
            count(cells[tokens_out], "GeneratedTokens"),
        )

    return make


COLUMNS = frozenset(
    {"timestamp_s", "model", "input_tokens", "output_tokens", "exec_s", "minute", "count", "cv", "window_s"}
    | {"TIMESTAMP", "ContextTokens", "GeneratedTokens", "Trigger", "HashFunction"}
)
"""Those that are read, of all CSV formats."""
FORMATS: dict[str, Callable[[list[str], float, str], Make]] = {
    "requests": _requests,
    "windows": _windows,
    "azure-llm": _azure_llm,
}


def mooncake(text: str, model: str) -> Row:
    """A line of Mooncake's. Raises ValueError."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON object") from None
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")
    missing = [name for name in ("timestamp", "input_length", "output_length") if name not in data]
    if missing:
        raise ValueError(f"{missing[0]!r} is missing")
    return Row(
        _time(data["timestamp"], "timestamp", 1e-3),
        model,
        1,
        0.0,
        count(data["input_length"], "input_length"),
        count(data["output_length"], "output_length"),
    )


def check_width(cells: list[str], width: int) -> None:
    """Raises ValueError."""
    if len(cells) != width:
        raise ValueError(f"it has {len(cells)} columns, the header {width}")


def _time(text: str | float, name: str, unit_s: float = 1.0) -> float:
    """Seconds."""
    time_s = _number(text, name) * unit_s
    if not 0 <= time_s <= LATEST_S:
        raise ValueError(
            f"{name} {text!r} is "
            + ("negative" if time_s < 0 else "beyond the year 2100; in which unit is it?")
        )
    return time_s


def model_name(text: str) -> str:
    """Raises ValueError."""
    # Bytes that are no UTF-8 are not printable either.
    if not text or not text.isprintable():
        raise ValueError(f"model {text!r} is not a name of printable characters")
    return text


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


def _worked(text: str) -> float:
    value = _positive(text, "exec_s")
    if value > LONGEST_EXEC_S:
        raise ValueError(
            f"exec_s {text!r} is more than {LONGEST_EXEC_S:.0f}, ten years; in which unit is it?"
        )
    return value


def _cv(text: str) -> float:
    value = _positive(text, "cv")
    if value and not LEAST_CV <= value <= MOST_CV:
        raise ValueError(f"cv {text!r} is neither 0 nor a number from {LEAST_CV:g} to {MOST_CV:g}")
    return value


def count(text: str | float, name: str) -> int:
    """Raises ValueError, with `name` in its message."""
    try:
        # Programs that know only floating-point numbers write 12.0.
        value = int(text) if isinstance(text, str) and text.isdecimal() else float(text)
    except (TypeError, ValueError):
        value = -1
    if isinstance(text, bool) or not 0 <= value <= MOST_IN_WINDOW or value != int(value):
        raise ValueError(f"{name} {text!r} is not a whole number from 0 to {MOST_IN_WINDOW:,}")
    return int(value)


__all__ = ["COLUMNS", "FORMATS", "Make", "Row", "check_width", "count", "model_name", "mooncake"]
