"""A forecaster of the next arrival, corrected by how often its past quantiles held."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoscaling.core.types import Forecast
from autoscaling.forecast.arrivals import MIN_SILENCE_S, ArrivalFitted, next_arrival
from autoscaling.forecast.history import Floats, Recent

SHAPES = np.geomspace(0.4, 2.5, 15)
PRIOR_SD = 0.25
"""Standard deviation of log a and log b before anything was seen: mostly, leave it as it is."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """S' = (1 - (1 - S)^a)^b, S being the survival since the silence began.

    The chances that a forecaster gave to what then came should be uniform (Dawid 1984); what they are instead is
    undone by the distribution function of Kumaraswamy (1980), a beta distribution in closed form (recalibration:
    Kuleshov et al. 2018, ICML). b scales the hazard, a how much of it comes early.
    """

    inner: ArrivalFitted
    a: float
    b: float

    @property
    def name(self) -> str:
        return self.inner.name

    def log_survival(self, now_s: float, recent: Recent, times_s: Floats) -> Floats:
        """Before a silence can be told from a burst that goes on there is nothing to correct."""
        begins_s = recent.last_s + MIN_SILENCE_S
        if now_s >= begins_s:
            gone_s = now_s - begins_s
            inner = self.inner.log_survival(begins_s, recent, np.concatenate([[gone_s], gone_s + times_s]))
            values = corrected(np.minimum(inner, 0.0), self.a, self.b)
            return np.asarray(values[1:] - values[0])
        until_s = begins_s - now_s
        split = int(np.searchsorted(times_s, until_s))
        values = self.inner.log_survival(
            now_s, recent, np.concatenate([times_s[:split], [until_s], times_s[split:]])
        )
        late = values[split] + corrected(np.minimum(values[split + 1 :] - values[split], 0.0), self.a, self.b)
        return np.concatenate([values[:split], late])

    def extra_times(self, now_s: float, recent: Recent) -> Floats:
        return self.inner.extra_times(now_s, recent)

    def forecast(self, now_s: float, recent: Recent | None) -> Forecast:
        if recent is None:
            return Forecast(now_s, self.name)
        return Forecast(now_s, self.name, next_arrival=next_arrival(self, now_s, recent))


def corrected(log_survival: Floats, a: float | Floats, b: float | Floats) -> Floats:
    """log S' from log S, exact also where S is near 0 or 1."""
    log_cdf = np.log(np.maximum(-np.expm1(np.minimum(log_survival, 0.0)), 1e-300))
    far = log_survival < -20.0
    near = np.log(np.maximum(-np.expm1(np.minimum(a * log_cdf, -1e-15)), 1e-300))
    return np.asarray(b * np.where(far, np.log(a) + log_survival, near))


def learn(ends: Floats, weight: Floats) -> tuple[float, float]:
    """(a, b) from the log survivals at both ends of the bucket in which each silence ended, as forecast: shape (n, 2).

    The most likely ones under independent log-normal priors around 1, on a grid.
    """
    a, b = (grid.ravel() for grid in np.meshgrid(SHAPES, SHAPES))
    survival = np.exp(corrected(ends[None, :, :], a[:, None, None], b[:, None, None]))
    likelihood = np.log(np.maximum(survival[..., 0] - survival[..., 1], 1e-9)) @ weight
    best = int(np.argmax(likelihood - (np.log(a) ** 2 + np.log(b) ** 2) / (2 * PRIOR_SD**2)))
    return float(a[best]), float(b[best])
