"""The distribution of the time between arrivals, from gaps that are known only to within their buckets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from autoscaling.forecast.history import Floats

RATIO = 1.025
MAX_AGE_S = 64 * 86400.0
EDGES_S: Floats = np.concatenate(
    [[0.0], RATIO ** np.arange(0, int(np.ceil(np.log(MAX_AGE_S) / np.log(RATIO))) + 1)]
)
"""Ages, ascending; bin k is [EDGES_S[k], EDGES_S[k+1]). 2.5 % wide, from one second on."""
BINS = len(EDGES_S) - 1
BANDWIDTHS = (1.0, 3.0, 8.0, 20.0)
"""Standard deviations of the smoothing kernel in bins: 2.5 % to 50 % of the age."""
EM_STEPS = 6
_LOG_RATIO = np.log(RATIO)
WIDE_BINS = 6


@dataclass(frozen=True, slots=True)
class GapSample:
    """Gaps, each known to lie in [lo_s, hi_s) and weighing `weight`. Arrays of shape (n,)."""

    lo_s: Floats
    hi_s: Floats
    weight: Floats


def default_mass() -> Floats:
    """Of a fleet that knows nothing yet: a Lomax distribution, whose hazard falls as 1/(age + 30 s).

    Heavy tails with a falling hazard are what idle times of serverless functions look like (Shahrad et al. 2020, ATC).
    """
    survival = (1 + EDGES_S / 30.0) ** -0.5
    return np.append(-np.diff(survival), survival[-1])


def default_prior() -> Floats:
    mass = default_mass()
    return np.asarray(mass / mass.sum())


def _gap_mass(sample: GapSample, prior: Floats, strength: float, open_s: float | None) -> Floats:
    """Probability mass by age bin, shape (BINS + 1,); the last is "longer than MAX_AGE_S".

    Self-consistent for interval-censored gaps (Turnbull 1976, JRSS B 38), smoothed at each step (EMS: Silverman et al.
    1990, JRSS B 52), with `strength` pseudo-gaps distributed as `prior` (same shape, sums to 1). `open_s` is the
    present silence: a gap of at least that. The smoothing's width is the one that best predicts each gap from the
    others.
    """
    exact, rows_lo, rows_hi, rows_weight = _arrange(sample, open_s)
    kernel = _kernel(BANDWIDTHS[_best_bandwidth(exact, prior, strength)])
    pseudo = strength * prior
    seed = _smooth(exact, kernel) + pseudo
    mass = seed / np.add.reduce(seed)
    cumulative = np.zeros(BINS + 2)
    for _ in range(EM_STEPS if len(rows_lo) else 0):
        mass.cumsum(out=cumulative[1:])
        inside = np.maximum(cumulative[rows_hi] - cumulative[rows_lo], 1e-12)
        each = rows_weight / inside
        steps = np.zeros(BINS + 2)
        np.add.at(steps, rows_lo, each)
        np.add.at(steps, rows_hi, -each)
        spread = mass * steps.cumsum()[: BINS + 1]
        total = _smooth(exact + spread, kernel) + pseudo
        mass = total / np.add.reduce(total)
    return np.asarray(mass)


gap_mass: Callable[[GapSample, Floats, float, float | None], Floats] = _gap_mass
"""The simulator exchanges it for the same, compiled."""


def log_survival(mass: Floats) -> Floats:
    """log P(gap > EDGES_S[k]), shape (BINS + 1,)."""
    beyond = np.cumsum(mass[::-1])[::-1]
    return np.asarray(np.log(np.maximum(beyond, 1e-12)))


def bin_of(ages_s: Floats) -> NDArrayInt:
    """The bin of each age, BINS for what is longer than all."""
    bins = np.floor(np.log(np.maximum(ages_s, 1e-9)) / _LOG_RATIO).astype(np.int64) + 1
    return np.where(ages_s < 1.0, 0, np.minimum(bins, BINS))


NDArrayInt = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def _arrange(sample: GapSample, open_s: float | None) -> tuple[Floats, NDArrayInt, NDArrayInt, Floats]:
    """Gaps known to within a few bins as a histogram; the others as ranges of bins, equal ones merged."""
    lo, hi = bin_of(sample.lo_s), bin_of(sample.hi_s)
    wide = hi - lo > WIDE_BINS
    middle = bin_of(np.sqrt(np.maximum(sample.lo_s, 0.5) * np.maximum(sample.hi_s, 0.5)))
    exact = np.bincount(middle[~wide], sample.weight[~wide], BINS + 1)
    key = (lo[wide] // 2) * (BINS + 2) + (hi[wide] // 2)
    unique, where = np.unique(key, return_inverse=True)
    weight = np.bincount(where, sample.weight[wide], len(unique))
    rows_lo = (unique // (BINS + 2)) * 2
    rows_hi = np.minimum((unique % (BINS + 2)) * 2 + 1, BINS + 1)
    if open_s is not None and open_s > 0:
        rows_lo = np.append(rows_lo, min(int(bin_of(np.asarray([open_s]))[0]), BINS))
        rows_hi = np.append(rows_hi, BINS + 1)
        weight = np.append(weight, 1.0)
    return exact, rows_lo.astype(np.int64), rows_hi.astype(np.int64), weight


@cache
def _kernel(bandwidth: float) -> Floats:
    reach = int(np.ceil(3 * bandwidth))
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / bandwidth) ** 2)
    return np.asarray(kernel / kernel.sum())


def _smooth(mass: Floats, kernel: Floats) -> Floats:
    """All but the first bin (what comes within a second) and the last."""
    reach = len(kernel) // 2
    padded = np.zeros(len(mass) - 2 + 2 * reach)
    padded[reach:-reach] = mass[1:-1]
    inner = np.convolve(padded, kernel, mode="valid")
    total = np.add.reduce(inner)
    lost = np.add.reduce(mass[1:-1]) - total
    smooth = np.empty(len(mass))
    smooth[0], smooth[-1] = mass[0], mass[-1]
    np.add(inner, lost * (inner / max(total, 1e-12)), out=smooth[1:-1])
    return smooth


_FIRST = int(bin_of(np.asarray([5.0]))[0])


def _best_bandwidth(exact: Floats, prior: Floats, strength: float) -> int:
    """By the leave-one-out likelihood of the gaps of five seconds and more, the ones that decide about warmth."""
    counts = exact.copy()
    if np.add.reduce(counts[_FIRST:-1]) >= 3:
        counts[:_FIRST] = 0
    counts[0] = counts[-1] = 0
    if np.add.reduce(counts) < 3:
        return len(BANDWIDTHS) - 2
    where = np.flatnonzero(counts)
    scores = []
    for bandwidth in BANDWIDTHS:
        kernel = _kernel(bandwidth)
        one = np.minimum(counts[where], 1.0)
        others = _smooth(counts, kernel)[where] - kernel[len(kernel) // 2] * one + strength * prior[where]
        scores.append(float((counts[where] * np.log(np.maximum(others, 1e-12))).sum()))
    return int(np.argmax(scores))
