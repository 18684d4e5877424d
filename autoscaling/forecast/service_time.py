"""How long a request holds a replica, and the normal quantiles that go with QUANTILES."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from autoscaling.forecast.conformal import QUANTILES
from autoscaling.forecast.history import Floats, History

NORMAL: Floats = np.asarray([NormalDist().inv_cdf(q) for q in QUANTILES])
HALF_LIFE_S = 86400.0


def service_time_s(history: History) -> float | None:
    """Mean request-seconds in progress for each arrival, recent ones weighing more; None where none was reported.

    Only the time from the first report on counts, so that imported traffic without it does not pass for instant.
    """
    level = history.level(300.0)
    if level is None:
        return None
    reported = np.flatnonzero(level.busy_s > 0)
    if not len(reported):
        return None
    since = slice(int(reported[0]), None)
    weight = 0.5 ** ((history.now_s - level.index[since] * level.step_s) / HALF_LIFE_S)
    arrivals = float((weight * level.arrivals[since]).sum())
    return float((weight * level.busy_s[since]).sum()) / arrivals if arrivals > 0 else None
