"""How commands print: tables without boxes, times on the local clock."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from autoscaling.commands import times
from autoscaling.live.api.words import count, duration, gpu_s, moment

if TYPE_CHECKING:
    from rich.console import Console


UNBOUNDED = 10_000


def console() -> Console:
    """The standard output. Where it is no terminal and COLUMNS says nothing, no line is broken: programs read lines."""
    from rich.console import Console

    shown = Console(soft_wrap=False, highlight=False)
    if not shown.is_terminal and not os.environ.get("COLUMNS"):
        shown.width = UNBOUNDED
    return shown


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[str] = ()) -> None:
    """`numbers` are the columns that are right-aligned. An id stays in one piece, to be copied."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in numbers else "left"
        shown.add_column(column, justify=justify, overflow="fold", no_wrap=column == "id")
    for row in rows:
        # Text, not str: a name may hold square brackets, which rich would read as markup.
        shown.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    console().print(shown)


def say(text: str, style: str = "") -> None:
    from rich.text import Text

    console().print(Text(text, style=style))


def when(time_s: float | None) -> str:
    if time_s is None:
        return "-"
    now = times.now()
    return moment(time_s, now.timestamp(), times.local_zone())


def lasting(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


def floor(value: Mapping[str, Any]) -> str:
    """`2 replicas`, or the rung that is asked for."""
    return count(value["replicas"], "replica") if value["rung"] == "serving" else str(value["rung"])


def override(row: Mapping[str, Any]) -> str:
    """What was said: `wait_cost 5 for m until 18:00:00`, `2 replicas of m from 09:00:00 to 17:00:00`."""
    value, of = row["value"], row["model"] or "the whole fleet"
    until = f" until {when(row['until_s'])}" if row.get("until_s") is not None else ""
    if row["kind"] == "prewarm":
        return f"at least {floor(value)} of {of} from {when(value['start_s'])} to {when(value['end_s'])}"
    if row["kind"] == "schedule":
        lasts = (
            f"for {duration(value['duration_s'])} from {value['cron']!r} on the clock of {value['timezone']}"
        )
        return f"at least {floor(value)} of {of} {lasts}{until}"
    said = ", ".join(f"{name} {_value(name, item)}" for name, item in value.items())
    return f"{said}{until}" if row["kind"] == "mode" else f"{said} for {of}{until}"


def done(row: Mapping[str, Any]) -> None:
    """What was set, and how it is taken back."""
    say(f"{row['kind']}: {override(row)}")
    say(f"`relight undo {row['id']}` takes it back.", style="dim")


def undone(rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        say(f"undone: {row['kind']} {row['id']}: {override(row)}")


def _value(name: str, value: object) -> str:
    if name.endswith("_s") and isinstance(value, int | float):
        return duration(float(value))
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key} {item:g}" for key, item in value.items()) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


__all__ = [
    "console",
    "count",
    "done",
    "duration",
    "floor",
    "gpu_s",
    "lasting",
    "moment",
    "override",
    "say",
    "table",
    "undone",
    "when",
]
