"""From a model's traffic to what forecasts it: the best forecaster of each question. Pure; runs in any process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from autoscaling.core.types import Demand, Forecast
from autoscaling.forecast import arrival_choice, demand, demand_model
from autoscaling.forecast.arrivals import (
    MIN_SILENCE_S,
    ArrivalFitted,
    Later,
    Renewal,
    batch_size,
    idle,
    next_arrival,
)
from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.demand import CHEAP, FittedDemand, Kind, steps_of
from autoscaling.forecast.gap_record import (
    EMPTY,
    MOST,
    Record,
    Silence,
    active,
    learn,
    silence_from,
    silences_in,
)
from autoscaling.forecast.hazard import ROUNDS, Deferred, Expansion, Regression
from autoscaling.forecast.history import History, Recent, history_of, recent_of
from autoscaling.forecast.prior import Prior, Share
from autoscaling.forecast.season import FLAT, activity
from autoscaling.forecast.seasonal import mstl
from autoscaling.forecast.service_time import service_time_s
from autoscaling.traffic import Traffic

MIN_DEMAND_ARRIVALS = 100
MIN_DEMAND_BUCKETS = 30
FULL: Mapping[str, Kind] = {**CHEAP, "mstl": mstl}


CHOICE_SHARE = 1.5
CHOICE_MORE = 3
"""The backtest chooses anew when a model has so many times the silences that it then had, and so many more."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a fit may learn from besides the store: to the second, where that keeps minutes. Picklable."""

    fitted: FittedModel | None
    """The fit before."""
    ended: tuple[Silence, ...]
    """Silences since then, oldest first."""
    recent: Recent | None
    arrivals: float = 0.0
    """Requests since then."""


@dataclass(frozen=True, slots=True)
class Job:
    """One fit. Picklable."""

    traffic: Traffic
    now_s: float
    horizon_s: float
    """How far ahead demand is asked for: the model's cold start. 0: not at all."""
    prior: Prior
    seen: Seen | None = None
    bands: bool = True
    """Whether the scores tell of the forecasts' bands, which only people look at (see `arrival_choice.choose`)."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What one model adds to the fleet's regression. Picklable."""

    record: Record
    """What its silences were like."""
    hazard: Expansion
    silences: tuple[Silence, ...]
    """All that it is made of, while the regression still comes from nowhere; then they are forgotten."""
    began: Record
    """What was known before the first of them."""


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
    learned: Learned
    chosen_at: int
    """How many silences were known when the backtest chose."""
    scores: Mapping[str, Any]
    details: Mapping[str, Any] = field(default_factory=dict)

    def forecast(
        self,
        now_s: float,
        recent: Recent | None = None,
        *,
        later: bool = False,
        demand: Demand | None = None,
    ) -> Forecast:
        """`later`: when the next request comes is worked out only when somebody looks at it. `demand`: one that this
        fit made lately, which still holds."""
        recent = self.recent if recent is None else recent
        shown = demand
        if shown is None and self.demand is not None and self.demand.service_s is not None:
            steps = steps_of(self.horizon_s, self.demand.step_s)
            shown = demand_model.predict(self.demand, now_s, recent, steps)
        return Forecast(
            made_s=now_s,
            forecaster=self.name,
            next_arrival=(Later if later else next_arrival)(self.arrivals, now_s, recent),
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
    learned = _learned(job, history)
    fitted = Renewal().fit(history, job.prior)
    return _assemble(
        job, history, fitted, None, told=({}, {"effort": "simple"}), learned=learned, chosen=_Chosen(0, {})
    )


def _fit(job: Job, kinds: Mapping[str, Kind]) -> FittedModel | None:
    """None where no request is known."""
    history = history_of(job.traffic, job.now_s)
    if not len(history.events):
        return None
    learned = _learned(job, history)
    arrivals, scores, details, chosen = _next_arrival(job, history, learned.record)
    fitted = None
    reason = _too_thin(history) if job.horizon_s > 0 else "not asked for"
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
    return _assemble(job, history, arrivals, fitted, told=(scores, details), learned=learned, chosen=chosen)


def _learned(job: Job, history: History) -> Learned:
    seen, now_s, regression = job.seen, job.now_s, job.prior.hazard
    known = active(history.events, now_s)
    before = seen.fitted.learned if seen is not None and seen.fitted is not None else None
    if before is None or seen is None:
        silences, began = silences_in(history), EMPTY
        recent = recent_of(history.events, now_s)
    else:
        silences, began = [*before.silences, *seen.ended][-MOST:], before.began
        recent = seen.recent
    again = before is None or bool(before.silences) or before.hazard.round < ROUNDS
    record, since_s = (began, -np.inf) if again or before is None else (before.record, before.hazard.until_s)
    open_ = [] if recent is None else [silence_from(recent, np.inf)]
    record = replace(record, active_s=known)
    hazard, record = learn([*silences, *open_], record, since_s, now_s, regression)
    if not again and before is not None:
        new, old = hazard, before.hazard
        hazard = Deferred(
            lambda: new.plus(old.faded(now_s)), max(new.until_s, old.until_s), max(new.round, old.round)
        )
    kept = () if regression.round >= ROUNDS else tuple(silences)
    return Learned(record, hazard, kept, began)


def share_at(fitted: FittedModel, recent: Recent | None, now_s: float, regression: Regression) -> Share:
    """What the model adds to the pool by now: its fit's share, and that nothing has come since.

    Without that, a silence would count only once it is over, and the longest ones for years not at all: the fleet
    would seem to ask far more after a long silence than it does.
    """
    learned = fitted.learned
    before = learned.hazard
    recent = fitted.recent if recent is None else recent
    if now_s <= max(before.until_s, recent.last_s + MIN_SILENCE_S):
        # Nothing has gone by in silence.
        return fitted.share
    open_ = silence_from(recent, np.inf)
    since, _ = learn([open_], learned.record, before.until_s, now_s, regression)
    hazard = replace(before.faded(now_s).plus(since), round=before.round)
    return replace(fitted.share, hazard=hazard)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """By the backtest."""

    at: int
    """How many silences were known."""
    odds: Mapping[str, float]


def _next_arrival(
    job: Job, history: History, record: Record
) -> tuple[ArrivalFitted, dict[str, Any], dict[str, Any], _Chosen]:
    """The best forecaster, what the backtest said, details, and when it did: again when there is more to judge by."""
    silences = int(idle(history.events).sum())
    before = job.seen.fitted if job.seen is not None else None
    fitted: ArrivalFitted | None = None
    scores: dict[str, Any] = {}
    details: dict[str, Any] = {}
    chosen = _Chosen(silences, {})
    if before is not None and silences <= CHOICE_SHARE * before.chosen_at + CHOICE_MORE:
        known = before.scores.get("next_arrival", {})
        fitted = arrival_choice.again(before.arrivals, known, history, job.prior)
        if fitted is not None:
            scores["next_arrival"] = known
            details = {k: v for k, v in before.details.items() if k == "next_arrival_without"}
            chosen = _Chosen(before.chosen_at, before.share.odds)
    if fitted is None:
        choice = arrival_choice.choose(history, job.prior, bands=job.bands)
        fitted = choice.fitted
        scores["next_arrival"] = choice.scores
        chosen = _Chosen(silences, choice.odds)
        if choice.failures:
            details["next_arrival_without"] = choice.failures
    return arrival_choice.with_record(fitted, record), scores, details, chosen


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
    *,
    told: tuple[Mapping[str, Any], Mapping[str, Any]],
    learned: Learned,
    chosen: _Chosen,
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
            hazard=learned.hazard,
            odds=chosen.odds,
        ),
        learned=learned,
        chosen_at=chosen.at,
        scores=scores,
        details=details,
    )
