"""The seasonal part by statsforecast, for models whose history is long and whose forecasts matter."""

from __future__ import annotations

import numpy as np

from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.history import History
from autoscaling.forecast.profile import DAY_S, Profile

HOUR_S = 3600.0
AHEAD_HOURS = 72
MIN_DAYS = 4


def mstl(history: History) -> Profile:
    """Multiple seasonal-trend decomposition (MSTL: Bandara et al. 2021), of the hours' log counts, 72 hours ahead.

    Daily, and from two weeks on weekly; the rest by simple exponential smoothing. statsforecast is imported here, so
    that nothing else pays for it (2 s).
    """
    days = (history.now_s - history.since_s) / DAY_S
    if days < MIN_DAYS:
        raise NotApplicable(f"less than {MIN_DAYS} days are known")
    from statsforecast.models import MSTL, SimpleExponentialSmoothingOptimized

    last = int(history.now_s // HOUR_S)
    first = max(int(np.ceil(history.since_s / HOUR_S)), last - 28 * 24)
    counts = np.zeros(last - first)
    hours = (history.events.mid_s // HOUR_S).astype(np.int64) - first
    inside = (hours >= 0) & (hours < len(counts))
    np.add.at(counts, hours[inside], history.events.count[inside])
    seasons = [24, 168] if len(counts) >= 2 * 168 else [24]
    model = MSTL(seasons, trend_forecaster=SimpleExponentialSmoothingOptimized())
    logs = np.log1p(counts)
    result = model.forecast(y=logs, h=AHEAD_HOURS, fitted=True)
    # Back from logarithms without the bias: the level that makes the fit as large as what was seen.
    fitted = np.expm1(np.clip(result["fitted"][1:], 0, 20))  # there is no fit of the first hour
    factor = float(np.clip(counts[1:].sum() / max(fitted.sum(), 1e-9), 0.2, 5.0))
    ahead = np.expm1(np.clip(result["mean"], 0, 20))
    values = np.concatenate([counts[-24:], ahead * factor]) / HOUR_S
    if not np.isfinite(values).all():
        raise ValueError("statsforecast's MSTL gave a forecast that is no number")
    return Profile(HOUR_S, np.maximum(values, 1e-9), start_s=(last - 24) * HOUR_S)
