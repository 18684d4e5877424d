"""How sure a saving is: what would it have been with other models, and at other times?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscaling.sim.report import Report

RESAMPLES = 4000
QUANTILES = (0.05, 0.95)


@dataclass(frozen=True)
class Saving:
    """Of one report against another."""

    share: float
    """Of the other's measure; negative if it is lost."""
    low: float
    high: float
    """A 90 % interval."""
    models: int
    """That were resampled; 1: none."""
    spans: int
    """Of time, that were resampled; 1: none."""


def saving_of(
    report: Report, other: Report, measure: str, wait_costs: Mapping[str, float], seed: int = 0
) -> Saving:
    """What `report` saves of `other`'s measure, of reports that have timelines of the same steps.

    Models and spans of time are both drawn anew with replacement, each by itself (the pigeonhole bootstrap: Owen 2007,
    Annals of Applied Statistics 1), since models share their days and days their models.

    Args:
        measure: gpu_s, waited_s, cold_starts or total_cost_gpu_s.
        wait_costs: of each model; for total_cost_gpu_s.
    """
    ours = _table(report, measure, wait_costs)
    theirs = _table(other, measure, wait_costs)
    models = sorted(ours.keys() | theirs.keys())
    steps = sorted({step for table in (ours, theirs) for row in table.values() for step in row})
    if not models or not steps:
        return Saving(0.0, 0.0, 0.0, 1, 1)
    one, two = (
        np.asarray([[table.get(model, {}).get(step, 0.0) for step in steps] for model in models])
        for table in (ours, theirs)
    )
    random = np.random.default_rng(seed)
    shares = _shares(one, two, _drawn(random, len(models)), _drawn(random, len(steps)))
    share = float(1 - one.sum() / two.sum()) if two.sum() > 0 else 0.0
    if not len(shares):
        return Saving(share, share, share, 1, 1)
    low, high = np.quantile(shares, QUANTILES)
    return Saving(share, float(low), float(high), len(models), len(steps))


def _drawn(random: np.random.Generator, count: int) -> NDArray[np.float64]:
    """How often each is drawn: shape (RESAMPLES, count)."""
    return random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)


def _shares(
    one: NDArray[np.float64],
    two: NDArray[np.float64],
    models: NDArray[np.float64],
    steps: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Of each resample in which there is anything to save."""
    ours = np.einsum("rm,mt,rt->r", models, one, steps, optimize=True)
    theirs = np.einsum("rm,mt,rt->r", models, two, steps, optimize=True)
    some = theirs > 0
    return np.asarray(1 - ours[some] / theirs[some])


def _table(report: Report, measure: str, wait_costs: Mapping[str, float]) -> dict[str, dict[float, float]]:
    """Model -> step's beginning -> the measure of what is scored."""
    return {
        model: _by_step(samples, measure, wait_costs.get(model, 0.0), report.measured_from_s)
        for model, samples in report.timeline.items()
    }


def _by_step(samples: Any, measure: str, wait_cost: float, from_s: float) -> dict[float, float]:
    def value(sample: Any) -> float:
        if measure == "total_cost_gpu_s":
            return float(sample.gpu_s + wait_cost * sample.waited_s)
        return float(getattr(sample, measure))

    found = {}
    for before, after in pairwise(samples):
        if after.now_s > from_s:
            # Sums begin anew where it is begun to measure.
            base = value(before) if before.now_s >= from_s else 0.0
            found[before.now_s] = value(after) - base
    return found


__all__ = ["Saving", "saving_of"]
