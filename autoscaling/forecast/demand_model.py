"""What forecasts how much comes: a seasonal profile, scaled by the recent rates, with quantiles of its own errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autoscaling.core.types import Demand, Forecast
from autoscaling.forecast.conformal import QUANTILES, Residuals
from autoscaling.forecast.history import TAUS_S, Floats, Recent
from autoscaling.forecast.profile import Profile
from autoscaling.forecast.service_time import NORMAL

STEP_S = 60.0
AHEAD = (1, 2, 3, 5, 8, 13, 21, 34, 60)
"""Steps ahead at which the errors are measured; between them the quantiles are interpolated."""
MAX_RATIO = 100.0
TAUS: Floats = np.asarray(TAUS_S)
SWING_TAUS = 4
"""The longest of TAUS_S tells the time of day more than a jump."""
SWING_FLOOR = 0.2


@dataclass(frozen=True, slots=True)
class Model:
    """log mean = log profile + weights @ [log(recent rate / the profile's own recent mean) for each of TAUS_S, 1].

    A count of one smooths both sides of each ratio.
    """

    profile: Profile
    weights: Floats
    """A row for each horizon, shape (horizons, len(TAUS_S) + 1)."""


@dataclass(frozen=True, slots=True)
class Swing:
    """How much wider than usual the errors are, by how far the recent rates are apart.

    Who jumped lately will jump again: what GARCH has from the last errors (Bollerslev 1986, Journal of Econometrics
    31), from what is known at any moment anyway.
    """

    first: int = 0
    """Index into TAUS_S of the shortest that the steps can tell."""
    calm: float = 1.0
    slope: float = 0.0

    def of(self, ratios: Floats) -> Floats:
        """From log ratios of shape (..., len(TAUS_S)), shape (...,)."""
        return np.asarray(np.maximum(self.calm + self.slope * self.apart(ratios), SWING_FLOOR))

    def apart(self, ratios: Floats) -> Floats:
        """How far the recent rates are from each other, in logarithms: shapes as above."""
        steps = np.diff(ratios[..., self.first : SWING_TAUS], axis=-1)
        return np.asarray(np.sqrt((steps**2).sum(axis=-1)))


@dataclass(frozen=True, slots=True)
class Smoothed:
    """A profile as an average over the past, exponentially weighted with each of TAUS_S: what recent rates are compared
    to. In single precision, since one is kept for each model."""

    step_s: float
    start_s: float
    period_s: float | None
    values: Floats
    """Shape (steps, len(TAUS_S))."""

    @staticmethod
    def of(profile: Profile) -> Smoothed:
        values = np.stack([profile.smoothed(tau_s).values for tau_s in TAUS_S], axis=1)
        return Smoothed(profile.step_s, profile.start_s, profile.period_s, values.astype(np.float32))

    def at(self, now_s: float) -> Floats:
        """As Profile.at, at one moment: shape (len(TAUS_S),)."""
        last = len(self.values) - 1
        place = (now_s - self.start_s) / self.step_s - 0.5
        if self.period_s is None:
            place = min(max(place, 0.0), float(last))
        whole = math.floor(place)
        part = place - whole
        low, high = whole % (last + 1), (whole + 1) % (last + 1)
        if self.period_s is None:
            high = min(whole + 1, last)
        return np.asarray((1 - part) * self.values[low] + part * self.values[high], np.float64)


@dataclass(frozen=True, slots=True)
class FittedDemand:
    name: str
    model: Model
    step_s: float
    ahead: Floats
    dispersion: float
    residuals: Residuals
    swing: Swing
    known_since_s: float
    service_s: float | None
    smoothed: Smoothed

    def counts(self, now_s: float, recent: Recent, steps: int) -> Floats:
        """Quantiles of the arrivals in each step as a continuous variable (the count plus a uniform one in ±1/2, which
        makes the quantiles of counts exact: Machado and Santos Silva 2005, JASA 100): shape (steps, len(QUANTILES))."""
        rates = np.asarray(recent.rates_at(now_s))
        rates = rates / -np.expm1(-max(now_s - self.known_since_s, self.step_s) / TAUS)
        ratios = log_ratios(rates, self.smoothed.at(now_s))
        at_ahead = factors(ratios, self.model.weights)
        ahead = np.arange(1, steps + 1)
        place = np.clip(np.interp(ahead, self.ahead, np.arange(len(self.ahead))), 0, None)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, len(self.ahead) - 1)
        part = place - low
        times_s = now_s + (np.concatenate([ahead, self.ahead]) - 0.5) * self.step_s
        season = self.model.profile.at(times_s) * self.step_s
        errors = self.residuals.of(season[steps:] * at_ahead)
        errors = (1 - part)[:, None] * errors[low] + part[:, None] * errors[high]
        mean = (season[:steps] * ((1 - part) * at_ahead[low] + part * at_ahead[high]))[:, None]
        return np.asarray(mean + errors * spread(mean, self.dispersion) * self.swing.of(ratios))

    def forecast(self, now_s: float, recent: Recent | None, horizon_s: float | None = None) -> Forecast:
        if recent is None or self.service_s is None:
            return Forecast(now_s, self.name)
        steps = len(AHEAD) if horizon_s is None else steps_of(horizon_s, self.step_s)
        return Forecast(now_s, self.name, demand=predict(self, now_s, recent, steps))


def _predict(fitted: FittedDemand, now_s: float, recent: Recent, steps: int) -> Demand:
    """Demand from `now_s` on, for so many steps. The service time must be known."""
    assert fitted.service_s is not None
    return demand_of(now_s, fitted.step_s, fitted.counts(now_s, recent, steps), fitted.service_s)


predict: Callable[[FittedDemand, float, Recent, int], Demand] = _predict
"""The simulator exchanges it for the same, compiled."""


def steps_of(horizon_s: float, step_s: float) -> int:
    """Enough to see a prewarm's lead time and as much again; at least five."""
    return min(max(math.ceil(2 * horizon_s / step_s), 5), AHEAD[-1])


def log_ratios(rates: Floats, expected: Floats, taus: Floats = TAUS) -> Floats:
    """Recent rates over the profile's, both a second, with a count of one on both sides: shape as given."""
    most = np.log(MAX_RATIO)
    return np.asarray(np.clip(np.log((rates * taus + 1) / (expected * taus + 1)), -most, most))


def factors(ratios: Floats, weights: Floats) -> Floats:
    """What the profile is multiplied by: from (..., len(TAUS_S)) and (horizons, len(TAUS_S) + 1), (..., horizons)."""
    most = np.log(MAX_RATIO)
    return np.asarray(np.exp(np.clip(ratios @ weights[:, :-1].T + weights[:, -1], -most, most)))


def spread(mean: Floats, dispersion: float) -> Floats:
    """The standard deviation of a negative binomial count, plus what rounding adds."""
    return np.asarray(np.sqrt(mean + dispersion * mean**2 + 1 / 12))


def demand_of(now_s: float, step_s: float, counts: Floats, service_s: float) -> Demand:
    """Whole counts become rates; with the mean service time they become requests in progress (Little's law).

    At an instant, M/G/inf holds a Poisson number around that. A step's own Poisson spread is taken out before, or it
    would count twice; what is left of the step's and that of the instant are added as those of independent variables
    are, quantile by quantile.
    """
    whole = np.maximum(np.ceil(counts - 0.5), 0.0)
    rates = np.maximum.accumulate(whole, axis=1) / step_s
    busy = np.maximum(counts, 0.0) / step_s * service_s
    middle = busy[:, QUANTILES.index(0.5)][:, None]
    of_step = NORMAL**2 * middle * (service_s / step_s)
    off = np.sqrt(np.maximum((busy - middle) ** 2 - of_step, 0.0) + NORMAL**2 * middle)
    concurrency = np.maximum.accumulate(np.maximum(middle + np.sign(NORMAL) * off, 0.0), axis=1)
    return Demand(
        now_s,
        step_s,
        QUANTILES,
        tuple(map(tuple, rates.tolist())),
        tuple(map(tuple, concurrency.tolist())),
    )


__all__ = [
    "AHEAD",
    "STEP_S",
    "TAUS",
    "FittedDemand",
    "Model",
    "Smoothed",
    "Swing",
    "demand_of",
    "factors",
    "log_ratios",
    "predict",
    "spread",
    "steps_of",
]
