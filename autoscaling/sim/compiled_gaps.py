"""The distribution of gaps compiled: what `forecast.gaps` works out on arrays, in loops."""

from __future__ import annotations

import math

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from autoscaling.forecast import gaps
from autoscaling.forecast.gaps import BANDWIDTHS, BINS, EDGES_S, EM_STEPS, RATIO, WIDE_BINS, GapSample

Floats = NDArray[np.float64]
_LOG_RATIO = math.log(RATIO)
_LAST_S = float(EDGES_S[-1])
_FIRST = gaps._FIRST
_KERNELS = tuple(gaps._kernel(bandwidth) for bandwidth in BANDWIDTHS)
_WIDEST = max(len(kernel) for kernel in _KERNELS)
_MIDDLING = len(BANDWIDTHS) - 2


@njit(cache=True)  # type: ignore[untyped-decorator]
def _bin(age_s: float) -> int:
    """As `gaps.bin_of`."""
    # Whatever is no age must be no index either: nothing checks it here.
    if not age_s >= 1.0:
        return 0
    if age_s >= _LAST_S:
        return BINS
    return min(math.floor(math.log(age_s) / _LOG_RATIO) + 1, BINS)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _smooth(mass: Floats, kernel: Floats, padded: Floats, smooth: Floats) -> None:
    """As `gaps._smooth`, into `smooth`, by way of `padded`.

    Weight by weight, so that the long loop is the inner one, over neighbours in memory; only as far as there is mass.
    """
    reach = len(kernel) // 2
    last = len(mass) - 1
    smooth[:] = 0.0
    first, end = 1, last
    while first < end and mass[first] == 0.0:
        first += 1
    while end > first and mass[end - 1] == 0.0:
        end -= 1
    # Places of `padded` are those of `mass` from `low` on, less `reach`.
    low, high = max(1, first - reach), min(last, end + reach)
    padded[: high - low + 2 * reach] = 0.0
    before = 0.0
    for i in range(first, end):
        before += mass[i]
        padded[i - low + reach] = mass[i]
    for k in range(len(kernel)):
        weight = kernel[k]
        for j in range(high - low):
            smooth[low + j] += weight * padded[j + k]
    total = 0.0
    for j in range(low, high):
        total += smooth[j]
    share = 1.0 + (before - total) / max(total, 1e-12)
    for j in range(low, high):
        smooth[j] *= share
    smooth[0], smooth[last] = mass[0], mass[last]


@njit(cache=True)  # type: ignore[untyped-decorator]
def _best(  # noqa: PLR0917 - compiled, which takes no objects
    exact: Floats,
    prior: Floats,
    strength: float,
    kernels: tuple[Floats, ...],
    counts: Floats,
    padded: Floats,
    smooth: Floats,
) -> int:
    """As `gaps._best_bandwidth`."""
    counts[:] = exact
    counts[0] = counts[BINS] = 0.0
    late = 0.0
    for i in range(_FIRST, BINS):
        late += counts[i]
    if late >= 3:
        counts[:_FIRST] = 0.0
    if counts.sum() < 3:
        return _MIDDLING
    best, most = 0, -math.inf
    for k in range(len(kernels)):
        kernel = kernels[k]
        _smooth(counts, kernel, padded, smooth)
        middle = kernel[len(kernel) // 2]
        score = 0.0
        for i in range(len(counts)):
            if counts[i] != 0.0:
                others = smooth[i] - middle * min(counts[i], 1.0) + strength * prior[i]
                score += counts[i] * math.log(max(others, 1e-12))
        if score > most:
            best, most = k, score
    return best


@njit(cache=True)  # type: ignore[untyped-decorator]
def _mass(  # noqa: PLR0917 - as above
    lo_s: Floats,
    hi_s: Floats,
    weight: Floats,
    prior: Floats,
    strength: float,
    open_s: float,
    kernels: tuple[Floats, ...],
) -> Floats:
    """As `gaps._gap_mass`, no present silence being 0."""
    exact = np.zeros(BINS + 1)
    rows = np.empty((2, len(lo_s) + 1), np.int64)
    heavy = np.empty(len(lo_s) + 1)
    wide = 0
    for i in range(len(lo_s)):
        lo, hi = _bin(lo_s[i]), _bin(hi_s[i])
        if hi - lo > WIDE_BINS:
            rows[0, wide], rows[1, wide] = lo // 2 * 2, min(hi // 2 * 2 + 1, BINS + 1)
            heavy[wide] = weight[i]
            wide += 1
        else:
            exact[_bin(math.sqrt(max(lo_s[i], 0.5) * max(hi_s[i], 0.5)))] += weight[i]
    if open_s > 0:
        rows[0, wide], rows[1, wide] = min(_bin(open_s), BINS), BINS + 1
        heavy[wide] = 1.0
        wide += 1
    smooth, work, padded = np.empty(BINS + 1), np.empty(BINS + 1), np.empty(BINS + 1 + _WIDEST)
    kernel = kernels[_best(exact, prior, strength, kernels, work, padded, smooth)]
    _smooth(exact, kernel, padded, smooth)
    mass = smooth + strength * prior
    mass /= mass.sum()
    cumulative, steps = np.zeros(BINS + 2), np.empty(BINS + 2)
    for _ in range(EM_STEPS if wide else 0):
        for k in range(BINS + 1):
            cumulative[k + 1] = cumulative[k] + mass[k]
        steps[:] = 0.0
        for i in range(wide):
            lo, hi = rows[0, i], rows[1, i]
            each = heavy[i] / max(cumulative[hi] - cumulative[lo], 1e-12)
            steps[lo] += each
            steps[hi] -= each
        height = 0.0
        for k in range(BINS + 1):
            height += steps[k]
            work[k] = exact[k] + mass[k] * height
        _smooth(work, kernel, padded, smooth)
        for k in range(BINS + 1):
            mass[k] = smooth[k] + strength * prior[k]
        mass /= mass.sum()
    return mass


def gap_mass(sample: GapSample, prior: Floats, strength: float, open_s: float | None) -> Floats:
    """As `gaps.gap_mass`."""
    found: Floats = _mass(
        np.ascontiguousarray(sample.lo_s, np.float64),
        np.ascontiguousarray(sample.hi_s, np.float64),
        np.ascontiguousarray(sample.weight, np.float64),
        prior,
        strength,
        open_s or 0.0,
        _KERNELS,
    )
    return found


__all__ = ["gap_mass"]
