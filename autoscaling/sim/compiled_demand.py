"""How much comes, compiled: what `forecast.demand_model` works out on arrays, in loops over a handful of steps."""

from __future__ import annotations

import math

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from autoscaling.core.types import Demand
from autoscaling.forecast.conformal import QUANTILES
from autoscaling.forecast.demand_model import MAX_RATIO, SWING_FLOOR, SWING_TAUS, TAUS, FittedDemand
from autoscaling.forecast.history import Recent
from autoscaling.forecast.service_time import NORMAL

Floats = NDArray[np.float64]
NEVER = 0.0
"""The period of what does not repeat."""
_MOST = math.log(MAX_RATIO)
_COUNT = len(QUANTILES)
_MIDDLE = QUANTILES.index(0.5)
_NORMAL: Floats = np.asarray(NORMAL, np.float64).ravel()


@njit(cache=True)  # type: ignore[untyped-decorator]
def _at(time_s: float, step_s: float, start_s: float, period_s: float, values: Floats) -> float:
    """As `Profile.at`."""
    place = (time_s - start_s) / step_s - 0.5
    last = len(values) - 1
    if period_s == NEVER:
        if place <= 0.0:
            return float(values[0])
        if place >= last:
            return float(values[last])
        low = math.floor(place)
        return float(values[low] + (values[low + 1] - values[low]) * (place - low))
    whole = math.floor(place)
    part = place - whole
    low = int(whole) % (last + 1)
    return float((1 - part) * values[low] + part * values[(low + 1) % (last + 1)])


@njit(cache=True)  # type: ignore[untyped-decorator]
def _ratios(  # noqa: PLR0917 - compiled, which takes no objects
    now_s: float,
    rates: Floats,
    known_s: float,
    step_s: float,
    start_s: float,
    period_s: float,
    values: NDArray[np.float32],
) -> Floats:
    """Of the recent rates to `Smoothed.at`, as `log_ratios`."""
    last = len(values) - 1
    place = (now_s - start_s) / step_s - 0.5
    if period_s == NEVER:
        place = min(max(place, 0.0), float(last))
    whole = math.floor(place)
    part = place - whole
    low, high = int(whole) % (last + 1), int(whole + 1) % (last + 1)
    if period_s == NEVER:
        high = min(int(whole) + 1, last)
    found = np.empty(len(rates))
    for i in range(len(rates)):
        tau_s = TAUS[i]
        expected = np.float64(np.float32(1 - part) * values[low, i] + np.float32(part) * values[high, i])
        rate = rates[i] / -math.expm1(-known_s / tau_s)
        found[i] = min(max(math.log((rate * tau_s + 1) / (expected * tau_s + 1)), -_MOST), _MOST)
    return found


@njit(cache=True)  # type: ignore[untyped-decorator]
def _demand(  # noqa: PLR0917 - as above
    now_s: float,
    steps: int,
    ratios: Floats,
    weights: Floats,
    ahead: Floats,
    step_s: float,
    profile: tuple[float, float, float, Floats],
    edges: Floats,
    table: Floats,
    dispersion: float,
    swing: tuple[int, float, float],
    service_s: float,
) -> Floats:
    """As `FittedDemand.counts` and `demand_of`: rates and requests in progress, shape (2, steps, len(QUANTILES))."""
    horizons = len(ahead)
    first, calm, slope = swing
    apart = 0.0
    for i in range(first, SWING_TAUS - 1):
        apart += (ratios[i + 1] - ratios[i]) ** 2
    wide = max(calm + slope * math.sqrt(apart), SWING_FLOOR)
    at_ahead, errors = np.empty(horizons), np.empty((horizons, _COUNT))
    for h in range(horizons):
        power = weights[h, len(ratios)]
        for i in range(len(ratios)):
            power += ratios[i] * weights[h, i]
        at_ahead[h] = math.exp(min(max(power, -_MOST), _MOST))
        season = (
            _at(now_s + (ahead[h] - 0.5) * step_s, profile[0], profile[1], profile[2], profile[3]) * step_s
        )
        group = np.searchsorted(edges, season * at_ahead[h], side="right")
        errors[h] = table[h, group]
    found = np.empty((2, steps, _COUNT))
    low = 0
    for k in range(steps):
        while low + 1 < horizons and ahead[low + 1] <= k + 1:
            low += 1
        high = min(low + 1, horizons - 1)
        part = 0.0
        if high > low and k + 1 > ahead[low]:
            part = (k + 1 - ahead[low]) / (ahead[high] - ahead[low])
        season = _at(now_s + (k + 0.5) * step_s, profile[0], profile[1], profile[2], profile[3]) * step_s
        mean = season * ((1 - part) * at_ahead[low] + part * at_ahead[high])
        spread = math.sqrt(mean + dispersion * mean**2 + 1 / 12) * wide
        middle = max(mean + ((1 - part) * errors[low, _MIDDLE] + part * errors[high, _MIDDLE]) * spread, 0.0)
        middle = middle / step_s * service_s
        most_rate, most_busy = -math.inf, -math.inf
        for q in range(_COUNT):
            count = mean + ((1 - part) * errors[low, q] + part * errors[high, q]) * spread
            most_rate = max(most_rate, math.ceil(count - 0.5), 0.0)
            found[0, k, q] = most_rate / step_s
            busy = max(count, 0.0) / step_s * service_s
            own = _NORMAL[q] ** 2 * middle
            off = math.sqrt(max((busy - middle) ** 2 - own * (service_s / step_s), 0.0) + own)
            most_busy = max(most_busy, middle + np.sign(_NORMAL[q]) * off, 0.0)
            found[1, k, q] = most_busy
    return found


def predict(fitted: FittedDemand, now_s: float, recent: Recent, steps: int) -> Demand:
    """As `demand_model.predict`."""
    assert fitted.service_s is not None
    smoothed, profile, swing = fitted.smoothed, fitted.model.profile, fitted.swing
    ratios = _ratios(
        now_s,
        np.asarray(recent.rates_at(now_s)),
        max(now_s - fitted.known_since_s, fitted.step_s),
        smoothed.step_s,
        smoothed.start_s,
        smoothed.period_s or NEVER,
        smoothed.values,
    )
    rates, busy = _demand(
        now_s,
        steps,
        ratios,
        fitted.model.weights,
        fitted.ahead,
        fitted.step_s,
        (profile.step_s, profile.start_s, profile.period_s or NEVER, profile.values),
        fitted.residuals.edges,
        fitted.residuals.table,
        fitted.dispersion,
        (swing.first, swing.calm, swing.slope),
        fitted.service_s,
    ).tolist()
    return Demand(now_s, fitted.step_s, QUANTILES, tuple(map(tuple, rates)), tuple(map(tuple, busy)))


__all__ = ["predict"]
