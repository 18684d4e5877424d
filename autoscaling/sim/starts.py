"""Measured start times from a file: what `relight coldstarts --json` prints, or a CSV with a column of times."""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoscaling.core.types import Rung
from autoscaling.sim.profile import Profile, ProfileError, Start

COLUMNS: Mapping[str, float] = {"total_s": 1.0, "start_s": 1.0, "duration_s": 1.0, "value": 1e-3}
"""Column of a CSV -> seconds of its unit. `value` is that of GenTD26's latencies."""
LONGEST_S = 86400.0

Starts = Mapping[Rung | None, Sequence[float]]
"""Rung that they began from -> seconds; None where that is not known."""


def read_starts(path: str | Path) -> dict[Rung | None, list[float]]:
    """Gzip is unpacked. Raises ProfileError."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except OSError as error:
        raise ProfileError(f"{path}: can't be read: {error.strerror or error}") from None
    except (EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: can't be read: {error}") from None
    rows = _json_rows(path, text) if text.lstrip().startswith(("{", "[")) else _csv_rows(path, text)
    found: dict[Rung | None, list[float]] = {}
    for where, value, unit_s, rung in rows:
        found.setdefault(_rung(where, rung), []).append(_seconds(where, value, unit_s))
    if not found:
        raise ProfileError(f"{path}: it holds no start times")
    return found


def measured(profile: Profile, starts: Starts) -> Profile:
    """With these start times, one of which is drawn for each start; a rung costs what it did.

    Without rungs, a model is dark or lit. Rungs that were not measured are not there.
    """
    if None in starts:
        together = [each for delays in starts.values() for each in delays]
        return replace(profile, starts={Rung.TEMPLATE: Start(tuple(together))}, base=Rung.TEMPLATE)
    made: dict[Rung, Start] = {}
    for rung, delays in starts.items():
        if rung is not None and rung != Rung.SERVING:
            known = profile.starts.get(rung)
            made[rung] = Start(tuple(delays), known.cost_per_s if known is not None else 0.0)
    if not made:
        raise ProfileError("none of the measured starts began below serving")
    lowest = min(made)
    return replace(profile, starts=made, base=profile.base if lowest <= profile.base else lowest)


def _csv_rows(path: Path, text: str) -> list[tuple[str, Any, float, str | None]]:
    lines = csv.DictReader(text.splitlines())
    column = next((name for name in COLUMNS if name in (lines.fieldnames or ())), None)
    if column is None:
        raise ProfileError(f"{path}: its first line has none of the columns {', '.join(COLUMNS)}")
    return [
        (f"{path}:{number}: {column}", row[column], COLUMNS[column], row.get("rung") or None)
        for number, row in enumerate(lines, 2)
    ]


def _json_rows(path: Path, text: str) -> list[tuple[str, Any, float, str | None]]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ProfileError(f"{path}: not JSON: {error}") from None
    rows = data.get("cold_starts") if isinstance(data, dict) else data
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "total_s" in row for row in rows):
        raise ProfileError(f"{path}: it is not what `relight coldstarts --json` prints")
    return [
        (f"{path}: cold_starts[{i}].total_s", row["total_s"], 1.0, row.get("rung"))
        for i, row in enumerate(rows)
    ]


def _seconds(where: str, value: Any, unit_s: float) -> float:
    try:
        seconds = float(value) * unit_s
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds <= LONGEST_S:
        raise ProfileError(f"{where}: {value!r} is not a time from 0 to a day")
    return seconds


def _rung(where: str, name: str | None) -> Rung | None:
    if name is None:
        return None
    found = {each.name.lower(): each for each in Rung}.get(name)
    if found is None:
        raise ProfileError(
            f"{where}: rung {name!r} is none of {', '.join(each.name.lower() for each in Rung)}"
        )
    return found


__all__ = ["COLUMNS", "measured", "read_starts"]
