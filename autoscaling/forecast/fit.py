"""From a model's traffic to what forecasts it: the best forecaster of each question. Pure; runs in any process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autoscaling.core.types import Forecast
from autoscaling.forecast import arrival_choice, demand
from autoscaling.forecast.arrivals import ArrivalFitted, Renewal, batch_size, idle, next_arrival
from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.demand import CHEAP, FittedDemand, Kind, demand_of, steps_of
from autoscaling.forecast.history import History, Recent, history_of, recent_of
from autoscaling.forecast.prior import Prior, Share
from autoscaling.forecast.season import FLAT, activity
from autoscaling.forecast.seasonal import mstl
from autoscaling.forecast.service_time import service_time_s
from autoscaling.traffic import Traffic

MIN_DEMAND_ARRIVALS = 100
MIN_DEMAND_BUCKETS = 30
FULL: Mapping[str, Kind] = {**CHEAP, "mstl": mstl}


@dataclass(frozen=True, slots=True)
class Job:
    """One fit. Picklable."""

    traffic: Traffic
    now_s: float
    horizon_s: float
    """How far ahead demand is asked for: the model's cold start."""
    prior: Prior


@dataclass(frozen=True, slots=True)
class FittedModel:
    """What forecasts one model. Picklable, some ten kilobytes."""

    name: str
    made_s: float
    """As of when it was learned."""
    horizon_s: float
    arrivals: ArrivalFitted
    demand: FittedDemand | None
    batch_size: float
    recent: Recent
    """As the history told it, for who has nothing newer."""
    known_arrivals: float
    known_silences: int
    share: Share
    scores: Mapping[str, Any]
    details: Mapping[str, Any] = field(default_factory=dict)

    def forecast(self, now_s: float, recent: Recent | None = None) -> Forecast:
        recent = self.recent if recent is None else recent
        shown = None
        if self.demand is not None and self.demand.service_s is not None:
            counts = self.demand.counts(now_s, recent, steps_of(self.horizon_s, self.demand.step_s))
            shown = demand_of(now_s, self.demand.step_s, counts, self.demand.service_s)
        return Forecast(
            made_s=now_s,
            forecaster=self.name,
            next_arrival=next_arrival(self.arrivals, now_s, recent),
            demand=shown,
            batch_size=self.batch_size,
            details=self.details,
            fitted_s=self.made_s,
        )


def fit_full(job: Job) -> FittedModel | None:
    """Everything, statsforecast's seasonal part among it: some tenths of a second for a busy model."""
    return _fit(job, FULL)


def fit_standard(job: Job) -> FittedModel | None:
    """All but statsforecast: some ten milliseconds."""
    return _fit(job, CHEAP)


def fit_simple(job: Job) -> FittedModel | None:
    """The idle-time distribution only, without a backtest: a millisecond. What is left when the others fail."""
    history = history_of(job.traffic, job.now_s)
    if not len(history.events):
        return None
    return _assemble(job, history, Renewal().fit(history, job.prior), None, ({}, {"effort": "simple"}))


def _fit(job: Job, kinds: Mapping[str, Kind]) -> FittedModel | None:
    """None where no request is known."""
    history = history_of(job.traffic, job.now_s)
    if not len(history.events):
        return None
    choice = arrival_choice.choose(history, job.prior)
    scores: dict[str, Any] = {"next_arrival": choice.scores}
    details: dict[str, Any] = {}
    if choice.failures:
        details["next_arrival_without"] = choice.failures
    fitted = None
    reason = _too_thin(history)
    if reason is None:
        service_s = service_time_s(history) or job.prior.service_s
        if service_s is None:
            details["demand"] = "rates only: no request's time in progress was ever reported"
        try:
            found = demand.choose(history, job.horizon_s, service_s, kinds)
            fitted = found.fitted
            scores["demand"] = found.scores
            if found.failures:
                details["demand_without"] = found.failures
        except NotApplicable as error:
            reason = str(error)
    if reason is not None:
        details["demand"] = reason
    return _assemble(job, history, choice.fitted, fitted, (scores, details))


def _too_thin(history: History) -> str | None:
    level = history.level(demand.STEP_S)
    recent = 0.0 if level is None else float(level.arrivals.sum())
    buckets = 0 if level is None else len(level.index)
    if recent < MIN_DEMAND_ARRIVALS or buckets < MIN_DEMAND_BUCKETS:
        return f"too sparse: {recent:.0f} arrivals in {buckets} steps of the last days"
    return None


def _assemble(
    job: Job,
    history: History,
    arrivals: ArrivalFitted,
    fitted: FittedDemand | None,
    told: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> FittedModel:
    scores, reasons = told
    recent = recent_of(history.events, job.now_s)
    assert recent is not None
    silences = int(idle(history.events).sum())
    active, _ = activity(history)
    own = Renewal().mass(history, job.prior, FLAT)
    details: dict[str, Any] = {
        "known_days": round((job.now_s - history.since_s) / 86400.0, 2),
        "silences": silences,
        "fleet_models": job.prior.models,
        **reasons,
    }
    if history.ignored:
        details["ignored_rows"] = history.ignored
    if silences < 3:
        details["next_arrival"] = "too few silences to compare forecasters: mostly the fleet's idle times"
    return FittedModel(
        name=arrivals.name if fitted is None else f"{arrivals.name}+{fitted.name}",
        made_s=job.now_s,
        horizon_s=job.horizon_s,
        arrivals=arrivals,
        demand=fitted,
        batch_size=batch_size(history),
        recent=recent,
        known_arrivals=history.arrivals,
        known_silences=silences,
        share=Share(
            gaps=own.astype(np.float32),
            gap_count=float(silences),
            season=active.astype(np.float32),
            service_s=service_time_s(history),
        ),
        scores=scores,
        details=details,
    )
