"""What is expected of a model, beside what was, and the replicas that would be planned for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from autoscaling.core.decide import decide
from autoscaling.core.demand import at_quantile
from autoscaling.core.survival import curve_of
from autoscaling.core.types import Demand, Forecast, Observation, Rung, Spec, State
from autoscaling.live.api.plain import plain
from autoscaling.live.api.records import history_of, nice_step
from autoscaling.live.api.request import Request

POINTS = 96
"""Steps of the horizon at most: the policy is asked at each."""
MAX_AHEAD_S = 14 * 86400.0
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
BAND = (0.05, 0.5, 0.95)


def forecast(request: Request) -> dict[str, Any]:
    """GET forecasts/{model}: history, forecast, and the replicas that would be planned, over `ahead_s`.

    `planned` is what the model's policy would decide if everything came as the forecast's median, and no request at
    all where the forecast only tells of the next one.
    """
    model = request.model()
    view, now_s = request.view, request.now_s
    spec = request.models()[model]
    said = view.forecast(model)
    ahead_s = request.number("ahead_s", 0, 0, MAX_AHEAD_S) or default_ahead_s(said)
    last_s = request.number("last_s", 2 * ahead_s, 0, 400 * 86400.0)
    step_s = nice_step(ahead_s / POINTS)
    past_s = nice_step(last_s / (2 * POINTS))
    observation = view.observations().get(model)
    state = view.store.states().get(model, State())
    planned = list(plan_ahead(spec, state, observation, said, now_s, ahead_s, step_s))
    return {
        "model": model,
        "now_s": now_s,
        "ahead_s": ahead_s,
        "step_s": step_s,
        "history": history_of(request, model, now_s - last_s, now_s, past_s),
        "forecast": summary(said, now_s, ahead_s),
        "planned": planned,
    }


def default_ahead_s(said: Forecast | None) -> float:
    """As far as the forecast of demand reaches, or until its next request has most likely come."""
    if said is not None and said.demand is not None:
        return max(60.0, min(MAX_AHEAD_S, len(said.demand.rate_per_s) * said.demand.step_s))
    curve = curve_of(said, said.made_s) if said is not None else None
    if curve is None or said is None:
        return 3600.0
    likely_s = curve.quantile_s(0.9, said.made_s)
    return max(600.0, min(86400.0, 1.5 * ((likely_s or curve.end_s) - said.made_s)))


def summary(said: Forecast | None, now_s: float, ahead_s: float) -> dict[str, Any] | None:
    """The forecast as people read it; None if there is none."""
    if said is None:
        return None
    curve = curve_of(said, now_s)
    arrival = None
    if curve is not None:
        alive = curve.at(now_s)
        arrival = {
            "p_within_ahead": 1.0 - curve.at(now_s + ahead_s) / alive,
            "in_s": {f"{share:g}": _left(curve.quantile_s(share, now_s), now_s) for share in SHARES},
        }
    return {
        "forecaster": said.forecaster,
        "made_s": said.made_s,
        "fitted_s": said.fitted_s,
        "batch_size": said.batch_size,
        "next_arrival": plain(arrival),
        "demand": None if said.demand is None else list(_band(said.demand, now_s, ahead_s)),
        "details": plain(said.details),
    }


def _left(time_s: float | None, now_s: float) -> float | None:
    return None if time_s is None else max(0.0, time_s - now_s)


def _band(demand: Demand, now_s: float, ahead_s: float) -> Iterator[dict[str, Any]]:
    """Steps of the forecast that lie ahead: arrivals a second and requests in progress, at BAND's quantiles."""
    for index, (rates, busy) in enumerate(zip(demand.rate_per_s, demand.concurrency, strict=True)):
        start_s = demand.made_s + index * demand.step_s
        if start_s + demand.step_s > now_s and start_s < now_s + ahead_s:
            yield {
                "start_s": start_s,
                "step_s": demand.step_s,
                "rate_per_s": {f"{q:g}": plain(at_quantile(demand.quantiles, rates, q)) for q in BAND},
                "concurrency": {f"{q:g}": plain(at_quantile(demand.quantiles, busy, q)) for q in BAND},
            }


def plan_ahead(  # noqa: PLR0917 - those of `decide`, and the horizon
    spec: Spec,
    state: State,
    observation: Observation | None,
    said: Forecast | None,
    now_s: float,
    ahead_s: float,
    step_s: float,
) -> Iterator[dict[str, Any]]:
    """The policy asked at each step, as if starts took no time and the forecast's median came."""
    if observation is None or observation.ready is None:
        return
    seen = replace(observation, now_s=now_s, arrivals=0)
    for index in range(math.ceil(ahead_s / step_s)):
        state, decision = decide(spec, state, seen, said)
        yield {
            "start_s": seen.now_s,
            "replicas": decision.replicas,
            "rung": plain(decision.rung),
            "reason": decision.reason.value,
        }
        at_s = now_s + (index + 1) * step_s
        load = _median_load(said.demand if said is not None else None, at_s)
        replicas = decision.replicas if decision.replicas is not None else (seen.target or seen.ready or 0)
        seen = replace(
            seen,
            now_s=at_s,
            ready=replicas,
            starting=0,
            target=replicas,
            queued=0,
            in_flight=load,
            last_busy_s=at_s if load else (seen.last_busy_s if not seen.in_flight else seen.now_s),
            rung=seen.rung if replicas else Rung(min(decision.rung, Rung.PARKED)),
        )


def _median_load(demand: Demand | None, at_s: float) -> int:
    if demand is None:
        return 0
    index = int((at_s - demand.made_s) // demand.step_s)
    if not 0 <= index < len(demand.concurrency):
        return 0
    load = at_quantile(demand.quantiles, demand.concurrency[index], 0.5)
    return round(load) if load is not None else 0
