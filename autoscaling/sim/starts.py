"""Measured start times from a file: what `relight coldstarts --json` prints, or a CSV with a column of times."""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from autoscaling.core.types import Rung
from autoscaling.sim.profile import Profile, ProfileError, Start

COLUMNS: Mapping[str, float] = {"total_s": 1.0, "start_s": 1.0, "duration_s": 1.0, "value": 1e-3}
"""Column of a CSV -> seconds of its unit. `value` is that of GenTD26's latencies."""
LONGEST_S = 86400.0

Starts = Mapping[Rung | None, Sequence[float]]
"""Rung that they began from -> seconds; None where that is not known."""


@dataclass(frozen=True)
class Measured:
    """Start times as they were measured."""

    together: Starts
    """Of all models."""
    by_model: Mapping[str, Starts]
    """Of each model that was named."""

    @classmethod
    def of(cls, starts: Iterable[tuple[str | None, Rung | None, float]]) -> Measured:
        """From (model, rung, seconds) of each; None where that is not known."""
        together: dict[Rung | None, list[float]] = {}
        by_model: dict[str, dict[Rung | None, list[float]]] = {}
        for model, rung, seconds in starts:
            together.setdefault(rung, []).append(seconds)
            if model is not None:
                by_model.setdefault(model, {}).setdefault(rung, []).append(seconds)
        return cls(together, by_model)

    def renamed(self, names: Mapping[str, str]) -> Measured:
        """The same under other names, of those that are called otherwise."""
        named = Measured.of(
            (names.get(model, model), rung, seconds)
            for model, starts in self.by_model.items()
            for rung, delays in starts.items()
            for seconds in delays
        )
        return Measured(self.together, named.by_model)

    def own(self, profile: Profile) -> dict[str, Mapping[Rung, Start]]:
        """By model, the starts of a `profile` that has them of all models `together`, with its own in their place.

        A rung from which the model itself was never seen to start is left as it is.
        """
        if None in self.together:
            return {
                model: {Rung.TEMPLATE: Start(tuple(each for delays in starts.values() for each in delays))}
                for model, starts in self.by_model.items()
            }
        return {
            model: {
                rung: replace(start, delay_s=tuple(starts[rung])) if rung in starts else start
                for rung, start in profile.starts.items()
            }
            for model, starts in self.by_model.items()
        }


def read_starts(path: str | Path) -> Measured:
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
    if not rows:
        raise ProfileError(f"{path}: it holds no start times")
    return Measured.of(
        (row.model, _rung(row.where, row.rung), _seconds(row.where, row.value, row.unit_s)) for row in rows
    )


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


class _Row(NamedTuple):
    where: str
    value: Any
    unit_s: float
    rung: str | None
    model: str | None


def _csv_rows(path: Path, text: str) -> list[_Row]:
    lines = csv.DictReader(text.splitlines())
    column = next((name for name in COLUMNS if name in (lines.fieldnames or ())), None)
    if column is None:
        raise ProfileError(f"{path}: its first line has none of the columns {', '.join(COLUMNS)}")
    return [
        _Row(
            f"{path}:{number}: {column}",
            row[column],
            COLUMNS[column],
            row.get("rung") or None,
            row.get("model") or None,
        )
        for number, row in enumerate(lines, 2)
    ]


def _json_rows(path: Path, text: str) -> list[_Row]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ProfileError(f"{path}: not JSON: {error}") from None
    rows = data.get("cold_starts") if isinstance(data, dict) else data
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "total_s" in row for row in rows):
        raise ProfileError(f"{path}: it is not what `relight coldstarts --json` prints")
    return [
        _Row(
            f"{path}: cold_starts[{i}].total_s", row["total_s"], 1.0, row.get("rung"), _name(row.get("model"))
        )
        for i, row in enumerate(rows)
    ]


def _name(model: object) -> str | None:
    return model if isinstance(model, str) and model else None


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


__all__ = ["COLUMNS", "Measured", "measured", "read_starts"]
