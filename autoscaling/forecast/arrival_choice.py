"""Which forecaster of the next arrival a model gets: the one that gave past silences' ends the highest likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from autoscaling.forecast.arrivals import ArrivalFitted, Poisson, Renewal, idle, silent_from
from autoscaling.forecast.base import Forecaster, NotApplicable
from autoscaling.forecast.history import Floats, History, Recent, onset_times
from autoscaling.forecast.prior import Prior
from autoscaling.forecast.timer import Timer

FORECASTERS: tuple[Forecaster, ...] = (
    Renewal(),
    Renewal("seasonal-renewal", seasonal=True),
    Renewal("recent-renewal", by_gaps=8),
    Timer(),
    Poisson(),
)
LOOK_BACK = 48
FOLDS = 4
SCORE_HALF_LIFE = 16.0
MARGIN = 0.5


@dataclass(frozen=True, slots=True)
class ArrivalScore:
    """Of one forecaster on the same silences as the others."""

    log_score: float
    """Mean log-likelihood of the bucket in which a silence ended; higher is better (Good 1952: proper)."""
    silences: int
    coverage: float
    """Share of the ends within the forecast's 5 % to 95 % quantiles; a bucket across one counts in part."""
    width_s: float
    """Median width of that band, cut at 48 h."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class ArrivalChoice:
    fitted: ArrivalFitted
    scores: dict[str, ArrivalScore]
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Silence:
    """A past silence, as it would have been forecast when it was first known to be one.

    Only then: to score what was forecast earlier on silences alone would leave out the bursts that went on."""

    made_s: float
    recent: Recent
    lo_s: float
    hi_s: float
    """Where the next arrival came, in seconds from made_s."""


def silences_of(history: History, most: int = LOOK_BACK) -> list[Silence]:
    """The latest ones, oldest first."""
    events = history.events
    where = np.flatnonzero(idle(events))[-most:]
    if not len(where):
        return []
    first = max(0, int(where[0]) - 500)
    made_s = silent_from(events)
    onsets = onset_times(events.mid_s[first:])
    return [
        Silence(
            made_s=float(made_s[i]),
            recent=Recent(
                last_s=float(events.mid_s[i]),
                onsets_s=tuple(onsets[:, i - first].tolist()),
                rates=(),
                rates_s=float(made_s[i]),
            ),
            lo_s=float(events.lo_s[i + 1] - made_s[i]),
            hi_s=float(events.hi_s[i + 1] - made_s[i]),
        )
        for i in where
    ]


def choose(
    history: History, prior: Prior, forecasters: Sequence[Forecaster] = FORECASTERS, known: Any = None
) -> ArrivalChoice:
    """Fit each on what was known, score it on the silences that came after, several times over; then fit the best anew.

    The first of `forecasters` must always apply; another is chosen only if it is better by more than MARGIN in sum.
    """
    silences = silences_of(history)
    scores: dict[str, ArrivalScore] = {}
    failures: dict[str, str] = {}
    weight = 0.5 ** (np.arange(len(silences))[::-1] / SCORE_HALF_LIFE)
    totals: dict[str, float] = {}
    for forecaster in forecasters if len(silences) >= 3 else ():
        try:
            results = _rolling(forecaster, history, prior, silences)
        except NotApplicable as reason:
            failures[forecaster.name] = str(reason)
            continue
        except Exception as error:  # noqa: BLE001 - one that fails must not take the others with it; it is told
            failures[forecaster.name] = f"{type(error).__name__}: {error}"
            continue
        use = weight[-len(results) :]
        totals[forecaster.name] = float((results[:, 0] * use).sum())
        scores[forecaster.name] = ArrivalScore(
            log_score=float(results[:, 0].mean()),
            silences=len(results),
            coverage=float(results[:, 1].mean()),
            width_s=float(np.median(results[:, 2])),
        )
    order = sorted(totals, key=lambda name: -totals[name])
    default = forecasters[0].name
    if default in totals and order and totals[order[0]] < totals[default] + MARGIN:
        order.insert(0, default)
    by_name = {forecaster.name: forecaster for forecaster in forecasters}
    for name in [*order, *(forecaster.name for forecaster in forecasters)]:
        try:
            return ArrivalChoice(by_name[name].fit(history, prior), scores, failures)  # type: ignore[arg-type]
        except NotApplicable as reason:
            failures[name] = str(reason)
        except Exception as error:  # noqa: BLE001 - as above
            failures[name] = f"{type(error).__name__}: {error}"
    raise RuntimeError(f"no forecaster of the next arrival could be fitted: {failures}")


def _rolling(forecaster: Forecaster, history: History, prior: Prior, silences: list[Silence]) -> Floats:
    """(log score, covered, width) for each silence after the first two, shape (n - 2, 3)."""
    folds = min(len(silences) - 2, FOLDS)
    edges = np.unique(np.linspace(max(2, len(silences) // 3), len(silences), folds + 1).astype(int))
    results: list[tuple[float, float, float]] = []
    for begin, end in pairwise(edges):
        fitted = forecaster.fit(history.before(silences[begin].made_s), prior)
        results.extend(score(fitted, silence) for silence in silences[begin:end])  # type: ignore[arg-type]
    return np.asarray(results)


LEVELS = np.log([0.95, 0.05])
PROBE_S: Floats = np.geomspace(1.0, 48 * 3600.0, 240)


def score(fitted: ArrivalFitted, silence: Silence) -> tuple[float, float, float]:
    """(log score, share of the end's bucket within the 90 % band by probability, width of the band in seconds)."""
    extra = fitted.extra_times(silence.made_s, silence.recent)
    times = np.unique(np.concatenate([PROBE_S, extra[(extra > 0) & (extra < PROBE_S[-1])]]))
    at = np.asarray([silence.lo_s, silence.hi_s])
    where = np.concatenate([times, at])
    order = np.argsort(where, kind="stable")
    values = np.empty(len(where))
    values[order] = fitted.log_survival(silence.made_s, silence.recent, where[order])
    survival, ends = np.exp(values[: len(times)]), np.exp(values[len(times) :])
    mass = float(ends[0] - ends[1])
    inside = min(ends[0], 0.95) - max(ends[1], 0.05)
    covered = float(np.clip(inside / mass, 0, 1)) if mass > 1e-12 else float(0.05 <= ends[1] <= 0.95)
    band = np.interp([-0.95, -0.05], -survival, times, left=0.0)
    return float(np.log(max(mass, 1e-9))), covered, float(band[1] - band[0])
