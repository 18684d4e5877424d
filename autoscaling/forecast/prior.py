"""What a fleet's models have in common, so that one whose own history is thin is not judged on it alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from autoscaling.forecast.gaps import default_prior
from autoscaling.forecast.hazard import NOTHING, Expansion, Regression
from autoscaling.forecast.history import Floats
from autoscaling.forecast.season import HOURS


@dataclass(frozen=True, slots=True)
class Share:
    """What one model adds to the pool. Weighs at most as much as any other, however much traffic it has."""

    gaps: Floats
    """Probability mass by age bin, shape (gaps.BINS + 1,)."""
    gap_count: float
    season: Floats
    """Activity by hour of the week, shape (HOURS,)."""
    service_s: float | None
    hazard: Expansion | None = None
    odds: Mapping[str, float] = field(default_factory=dict)
    """How likely each forecaster of the next arrival is the right one for it, summing to 1; empty: none was judged."""


@dataclass(frozen=True, slots=True)
class Prior:
    """Means over the fleet; `models` says over how many."""

    gaps: Floats
    season: Floats | None = None
    service_s: float | None = None
    models: int = 0
    hazard: Regression = NOTHING
    odds: Mapping[str, float] = field(default_factory=dict)
    """Over how many models each forecaster of the next arrival is the right one: expected numbers."""


NO_FLEET = Prior(default_prior())


def pooled(shares: Iterable[Share], before: Prior = NO_FLEET) -> Prior:
    """The mean over the models (a mixture, which the single model's posterior mean shrinks to: empirical Bayes).

    A model with few gaps weighs less, and the default distribution weighs as one model, so that a fleet of two is not
    taken for the world. The regression goes a step on from `before`'s; without any model, that is what is known.
    """
    shares = list(shares)
    if not shares:
        return before
    hazards = [share.hazard for share in shares if share.hazard is not None]
    latest_s = max((hazard.until_s for hazard in hazards), default=0.0)
    weights = np.asarray([share.gap_count / (share.gap_count + 10.0) for share in shares])
    gaps = default_prior() + sum(w * share.gaps for w, share in zip(weights, shares, strict=True))
    active = [share.season / share.season.mean() for share in shares if share.season.sum() >= 10]
    season = (5 * np.ones(HOURS) + sum(active)) / (5 + len(active)) if active else None
    odds: Counter[str] = Counter()
    for share in shares:
        odds.update(share.odds)
    services = [share.service_s for share in shares if share.service_s is not None]
    return Prior(
        gaps=gaps / gaps.sum(),
        season=season,
        service_s=float(np.median(services)) if services else None,
        models=len(shares),
        hazard=before.hazard.next(hazard.faded(latest_s) for hazard in hazards),
        odds=dict(odds),
    )
