"""What kind of traffic a trace is: how bursty, how seasonal, how often and for how long models are idle."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscaling.sim.arrivals import pieces
from autoscaling.sim.queueing import Floats
from autoscaling.traces import Row

IDLE_EDGES_S = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400, 172800)
WAKES_AFTER_S = (60.0, 300.0, 900.0, 1800.0, 3600.0)


@dataclass(frozen=True, slots=True)
class ModelShape:
    model: str
    requests: int
    per_day: float
    """NaN, as what follows, where there is nothing to tell it from: of a trace that is one moment. null in JSON."""
    gap_cv: float
    """Coefficient of variation of the gaps between requests: 0 a timer, 1 a Poisson process, more is bursty. NaN of a
    single request."""
    median_gap_s: float
    """To within 2 %; NaN of a single request."""
    daily: float
    """How much of the hourly counts' variance the hour of the day explains, 0 to 1."""
    active_hours: float
    """Share of the hours in which anything came."""
    wakes: tuple[int, ...]
    """Requests that came after at least each of WAKES_AFTER_S of silence: cold starts of so long a keep-alive, if
    requests took no time."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a whole trace."""

    requests: int
    begins_s: float
    ends_s: float
    """Unix seconds, as the simulator puts it."""
    models: tuple[ModelShape, ...]
    idle_histogram: tuple[tuple[float, ...], tuple[int, ...]] = ((), ())
    """(lower edges in seconds, idle times)."""

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        plain = dataclasses.asdict(self)
        for model in plain["models"]:
            for name in ("per_day", "gap_cv", "median_gap_s"):
                model[name] = None if math.isnan(model[name]) else model[name]
        plain["wakes_after_s"] = list(WAKES_AFTER_S)
        return plain


_CELLS = 600


@dataclass(slots=True)
class _Model:
    requests: int = 0
    first_s: float = math.inf
    last_s: float = -math.inf
    gaps: int = 0
    sum: float = 0.0
    squares: float = 0.0
    cells: NDArray[np.int32] = field(default_factory=lambda: np.zeros(_CELLS + 1, np.int32))
    idle: Floats = field(default_factory=lambda: np.zeros(len(IDLE_EDGES_S)))
    wakes: Floats = field(default_factory=lambda: np.zeros(len(WAKES_AFTER_S)))
    hours: dict[int, int] = field(default_factory=dict)


_EDGES_S = np.geomspace(1e-3, 1e7, _CELLS)


def describe(rows: Iterable[Row], seed: int = 0, scale: float = 1.0) -> Shape:
    """In one pass, in bounded memory (an entry for each model and hour). Windows are spread as the simulator does."""
    models: dict[str, _Model] = {}
    for piece in pieces(rows, lambda tokens_in, tokens_out, exec_s: exec_s, seed, scale):
        for name, (times, _) in piece.requests.items():
            _add(models.setdefault(name, _Model()), times)
    begins_s = min((each.first_s for each in models.values()), default=0.0)
    ends_s = max((each.last_s for each in models.values()), default=0.0)
    idle = sum((each.idle for each in models.values()), np.zeros(len(IDLE_EDGES_S)))
    return Shape(
        requests=sum(each.requests for each in models.values()),
        begins_s=begins_s,
        ends_s=ends_s,
        models=tuple(_shape(name, each, begins_s, ends_s) for name, each in sorted(models.items())),
        idle_histogram=(tuple(map(float, IDLE_EDGES_S)), tuple(int(count) for count in idle)),
    )


def _add(model: _Model, times: Floats) -> None:
    gaps = np.diff(times, prepend=model.last_s) if model.requests else np.diff(times)
    model.requests += len(times)
    model.first_s = min(model.first_s, float(times[0]))
    model.last_s = float(times[-1])
    model.gaps += len(gaps)
    model.sum += float(gaps.sum())
    model.squares += float((gaps**2).sum())
    model.cells += np.bincount(np.searchsorted(_EDGES_S, gaps, side="right"), minlength=_CELLS + 1)
    places = np.searchsorted(np.asarray(IDLE_EDGES_S), gaps, side="right") - 1
    model.idle += np.bincount(places[places >= 0], minlength=len(IDLE_EDGES_S))
    for i, after_s in enumerate(WAKES_AFTER_S):
        model.wakes[i] += int((gaps >= after_s).sum())
    hours, counts = np.unique((times // 3600).astype(np.int64), return_counts=True)
    for hour, count in zip(hours.tolist(), counts.tolist(), strict=True):
        model.hours[hour] = model.hours.get(hour, 0) + count


def _shape(name: str, model: _Model, begins_s: float, ends_s: float) -> ModelShape:
    days = max(ends_s - begins_s, 1.0) / 86400 if ends_s > begins_s else math.nan
    mean = model.sum / model.gaps if model.gaps else math.nan
    spread = math.sqrt(max(0.0, model.squares / model.gaps - mean**2)) if model.gaps else math.nan
    first, last = int(begins_s // 3600), int(ends_s // 3600)
    counts = np.zeros(last - first + 1)
    for hour, count in model.hours.items():
        counts[hour - first] = count
    return ModelShape(
        model=name,
        requests=model.requests,
        per_day=model.requests / days,
        gap_cv=spread / mean if mean != 0 else 0.0,
        median_gap_s=_median_s(model),
        daily=_daily(counts, first),
        active_hours=len(model.hours) / len(counts),
        wakes=tuple(int(count) for count in model.wakes),
    )


def _median_s(model: _Model) -> float:
    """By the middles of cells, 0 for the first; of an even number the mean of the middle two. NaN without gaps."""
    if not model.gaps:
        return math.nan
    middle = np.asarray([(model.gaps + 1) // 2, model.gaps // 2 + 1])
    cells = np.searchsorted(np.cumsum(model.cells), middle)
    return float(np.where(cells == 0, 0.0, _EDGES_S[cells - 1] * math.sqrt(_EDGES_S[1] / _EDGES_S[0])).mean())


def _daily(counts: Floats, first: int) -> float:
    """Share of the variance between hours of the day, corrected for what chance alone explains; 0 below two days."""
    if len(counts) < 48 or counts.var() == 0:
        return 0.0
    hours = (np.arange(len(counts)) + first) % 24
    days = np.bincount(hours, minlength=24)
    means = np.bincount(hours, counts, 24) / days
    explained = float(((means[hours] - counts.mean()) ** 2).sum() / ((counts - counts.mean()) ** 2).sum())
    chance = 23 / (len(counts) - 1)
    return max(0.0, (explained - chance) / (1 - chance))


__all__ = ["WAKES_AFTER_S", "ModelShape", "Shape", "describe"]
