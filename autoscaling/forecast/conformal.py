"""Quantiles from a point forecast's own past errors: conformal prediction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoscaling.forecast.history import Floats

QUANTILES: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
MIN_GROUP = 60


@dataclass(frozen=True, slots=True)
class Residuals:
    """Quantiles of standardised errors, by horizon and by how much was forecast."""

    edges: Floats
    """Where the groups of forecast means part, shape (groups - 1,)."""
    table: Floats
    """Shape (horizons, groups, len(QUANTILES))."""

    def of(self, means: Floats) -> Floats:
        """For means of shape (horizons,): shape (horizons, len(QUANTILES))."""
        group = np.searchsorted(self.edges, means, side="right")
        return np.asarray(self.table[np.arange(len(means)), group])

    def stretched(self, factor: float) -> Residuals:
        """With bands wider by that factor around the median.

        What makes the band of a backtest hold 90 % (conformalized quantile regression's conformity score: Romano et
        al. 2019, NeurIPS): errors of the past are too small for a future that drifts.
        """
        middle = self.table[..., QUANTILES.index(0.5), None]
        return Residuals(self.edges, middle + factor * (self.table - middle))


def calibrate(errors: Floats, means: Floats, half_life: float, groups: int = 3) -> Residuals:
    """From errors and forecast means of shape (n, horizons), oldest first.

    Split-conformal quantiles (Vovk et al. 2005, with the finite-sample correction), weighted by recency so that they
    follow a drift (Barber et al. 2023, Annals of Statistics 51: "beyond exchangeability"), and taken apart by the
    forecast mean (Mondrian conformal prediction: a quiet hour and a busy one each get their own band). The lower
    quantiles are corrected downwards, the upper ones upwards, but for the highest: it would be the maximum.
    """
    n, horizons = errors.shape
    weight = 0.5 ** (np.arange(n)[::-1] / half_life)
    shares: Floats = np.linspace(0, 1, groups + 1)[1:-1] if n >= groups * MIN_GROUP else np.zeros(0)
    edges = np.unique(np.quantile(means[:, 0], shares)) if len(shares) else np.zeros(0)
    table = np.empty((horizons, len(edges) + 1, len(QUANTILES)))
    for h in range(horizons):
        group = np.searchsorted(edges, means[:, h], side="right")
        everything = weighted_quantiles(errors[:, h], weight)
        for g in range(len(edges) + 1):
            mine = group == g
            few = mine.sum() < MIN_GROUP
            table[h, g] = everything if few else weighted_quantiles(errors[mine, h], weight[mine])
    return Residuals(edges, table)


def weighted_quantiles(values: Floats, weight: Floats) -> Floats:
    """At QUANTILES, shape (len(QUANTILES),), with the correction for the effective number of values."""
    order = np.argsort(values, kind="stable")
    ordered, cumulative = values[order], np.cumsum(weight[order])
    total = cumulative[-1]
    effective = total**2 / (weight**2).sum()
    p = np.asarray(QUANTILES)
    corrected = np.where(
        p < 0.5, p - (1 - p) / effective, np.where((p > 0.5) & (p <= 0.95), p + p / effective, p)
    )
    places = np.searchsorted(cumulative, np.clip(corrected, 0, 1) * total)
    return np.asarray(ordered[np.minimum(places, len(values) - 1)])


def pinball(actual: Floats, quantiles: Floats) -> float:
    """Mean pinball loss over QUANTILES; `quantiles` has one axis more than `actual`, the last."""
    p = np.asarray(QUANTILES)
    off = actual[..., None] - quantiles
    return float(np.maximum(p * off, (p - 1) * off).mean())


def interval_coverage(actual: Floats, quantiles: Floats, low: float = 0.05, high: float = 0.95) -> float:
    """Share of the actual values within the band from quantile `low` to `high`."""
    lower, upper = quantiles[..., QUANTILES.index(low)], quantiles[..., QUANTILES.index(high)]
    return float(((actual >= lower) & (actual <= upper)).mean())
