"""`predictive`, the default: replicas by measured capacity and forecast, the last one by expected cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoscaling.core.demand import expected
from autoscaling.core.policies.base import Context, Param, Proposal, rest
from autoscaling.core.policies.idle import BURST, KEEP_ALIVE_BOUND, Idle, idle
from autoscaling.core.series import Series, ceil, peak, peak_until_s, push_peak
from autoscaling.core.types import Reason

STABLE = Param("stable_s", 60, 0, 86400, "s", "How long one replica fewer must have sufficed before it goes.")
PANIC = Param("panic_s", 6, 0, 3600, "s", "For how long a jump in demand is called panic.")
HEADROOM = Param("headroom", 0.8, 0.1, 1, "share", "How full the remaining replicas may be for one to go.")
QUANTILE = Param(
    "demand_quantile", 0.9, 0.01, 0.999, "share", "Which quantile of the forecast demand is prepared for."
)


@dataclass(frozen=True, slots=True)
class _Need:
    """Replicas without which the SLO breaks now or within a start's time, and those below which it is safe to stay."""

    now: int
    roomy: int
    ahead: int
    series: Series
    safe: int
    until_s: float
    foreseen_until_s: float
    """When the forecast's part of it changes."""


class Predictive:
    """Up at once to what the requests in progress need, and to a quantile of what is forecast within a start's time.

    Down when what is left would for `stable_s` have been no fuller than `headroom` of its capacity, and is forecast to
    stay so. Between the two bounds the replicas stay what they are, which is the only hysteresis. Idle, the last
    replica is a matter of expected cost (`core.warmth`).
    """

    name = "predictive"
    source = (
        "Relight: expected cost over a forecast (Puterman 1994, chapter 4), without one the lower envelope of Irani et "
        "al. (ACM TECS 2003, 2-competitive); stabilization window as in Kubernetes' HPA, panic as in Knative's KPA"
    )
    params = (STABLE, PANIC, HEADROOM, QUANTILE, BURST, KEEP_ALIVE_BOUND)

    def propose(self, context: Context) -> Proposal:
        seen = context.seen
        need = self._need(context)
        numbers = {
            "load": float(seen.load),
            "per_replica": seen.per_replica,
            "need_replicas": float(need.now),
            "forecast_replicas": float(need.ahead),
        }
        if seen.load > 0:
            return self._loaded(context, need, numbers)
        if context.floor > 0:
            # Nothing to weigh: the floor keeps it lit. What it adds is said by whoever applies it.
            replicas = self._between(context, max(context.floor, need.ahead), need)
            if replicas <= context.floor:
                return Proposal(
                    0, rest(context)[0], Reason.DARK, need.foreseen_until_s, numbers, series=need.series
                )
            return Proposal(
                replicas, seen.rung, self._above(replicas, need), need.until_s, numbers, series=need.series
            )
        return self._idle(context, need, numbers)

    def _loaded(self, context: Context, need: _Need, numbers: dict[str, float]) -> Proposal:
        seen, memory = context.seen, context.state.values
        values: dict[str, float] = {}
        low = max(need.now, need.ahead)
        replicas = self._between(context, low, need)
        panic_s = memory.get("panic_until_s", -math.inf)
        if need.now > context.before > 0 and need.now > peak(context.state.series):
            panic_s = seen.now_s + context.param(PANIC)
        until_s = need.until_s
        in_panic = seen.now_s < panic_s
        if in_panic:
            values["panic_until_s"] = panic_s
            until_s = min(until_s, panic_s)
        if seen.ready == 0:
            reason = Reason.WAKE
        elif need.ahead > need.now and replicas == need.ahead:
            reason = Reason.FORECAST_DEMAND
        elif in_panic and replicas <= max(need.now, peak(need.series)):
            reason = Reason.PANIC
        elif replicas > need.roomy:
            reason = Reason.SCALE_DOWN_DELAY
        else:
            reason = Reason.DEMAND
        return Proposal(replicas, seen.rung, reason, until_s, numbers, values, need.series)

    def _idle(self, context: Context, need: _Need, numbers: dict[str, float]) -> Proposal:
        choice: Idle = idle(context)
        numbers |= choice.numbers
        until_s = min(need.until_s, choice.until_s)
        if not choice.lit:
            return Proposal(
                0, choice.rung, choice.reason, choice.until_s, numbers, choice.values, need.series
            )
        replicas = self._between(context, max(1, need.ahead), need)
        reason = choice.reason if replicas == 1 else self._above(replicas, need)
        return Proposal(replicas, choice.rung, reason, until_s, numbers, choice.values, need.series)

    @staticmethod
    def _above(replicas: int, need: _Need) -> Reason:
        return Reason.FORECAST_DEMAND if replicas <= need.ahead else Reason.SCALE_DOWN_DELAY

    @staticmethod
    def _between(context: Context, low: int, need: _Need) -> int:
        """What there is, moved only as far as the bounds ask."""
        return min(max(context.before, low), max(low, need.safe))

    def _need(self, context: Context) -> _Need:
        seen = context.seen
        now_s, full = seen.now_s, seen.per_replica
        stable_s = context.param(STABLE)
        roomy = full * context.param(HEADROOM)
        need, fitting = ceil(seen.load / full), ceil(seen.load / roomy)
        before = context.state.series or ((now_s, float(context.before)),)
        series = push_peak(before, now_s, fitting, stable_s)
        until_s = peak_until_s(series, stable_s)
        ahead = 0
        foreseen_s = math.inf
        safe = int(peak(series))
        demand = context.forecast.demand if context.forecast is not None else None
        quantile = context.param(QUANTILE)
        soon = expected(demand, quantile, now_s, seen.lead_s)
        later = expected(demand, quantile, now_s, seen.lead_s + stable_s)
        if soon is not None and later is not None:
            ahead = ceil(soon.concurrency / full)
            safe = max(safe, ceil(later.concurrency / roomy))
            foreseen_s = min(soon.until_s, later.until_s)
        return _Need(need, fitting, ahead, series, safe, min(until_s, foreseen_s), foreseen_s)


__all__ = ["Predictive"]
