"""`predictive`, the default: replicas by measured capacity and forecast, the last one by expected cost."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import NamedTuple

from autoscaling.core.demand import expected, service_s
from autoscaling.core.policies.base import Context, Param, Proposal, rest
from autoscaling.core.policies.idle import BURST, KEEP_ALIVE_BOUND, Idle, idle
from autoscaling.core.seen import Seen, charge, per_replica
from autoscaling.core.series import Series, alike, ceil, need_of, peak, peak_until_s, push_peak
from autoscaling.core.types import Demand, Observation, Reason, Rung, Spec

STABLE = Param(
    "stable_s",
    None,
    0,
    86400,
    "s",
    "How long one replica fewer must have sufficed before it goes; default: what a start takes, at least a minute.",
)
PANIC = Param("panic_s", 6, 0, 3600, "s", "For how long a jump in demand is called panic.")
HEADROOM = Param(
    "headroom",
    0.8,
    0.1,
    1,
    "share",
    "How full the remaining replicas may be for one to go, where no forecast says how much will come.",
)
QUANTILE = Param(
    "demand_quantile",
    None,
    0.01,
    0.9999,
    "share",
    "Which quantile of the forecast demand is prepared for; default: from wait_cost.",
)
STABLE_S = 60.0
QUANTILE_BOUNDS = (0.5, 0.999)
SURE = 1.0
"""Standard deviations of a Poisson number by which more requests in progress are more than chance."""
MOST_SURGE = 1.5


@dataclass(slots=True)
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
    loads: tuple[int, int] | None
    """The least and the most requests in progress that need as much; of none, that need what one does."""


class Predictive:
    """Up to a quantile of what is forecast for when a start would be ready, and to what the requests in progress need.

    The quantile is a newsvendor's: one more replica costs its price a second, and spares as many requests as it holds
    their waiting whenever there are too many, so that its price / (wait_cost * capacity) is the chance of too many that
    is worth leaving. Requests that wait now but will be through before a start is ready need none.

    Down when nothing within a start's time is forecast to need the replica, and nothing has for `stable_s`: by default
    as long as a start takes, which is then no more than twice what knowing the future would cost. Without a forecast,
    when what is left would have been no fuller than `headroom`. Between the two bounds the replicas stay what they are,
    which is the only hysteresis. Idle, the last replica is a matter of expected cost (`core.warmth`).
    """

    name = "predictive"
    source = (
        "Relight: expected cost over a forecast (Puterman 1994, chapter 4), without one the lower envelope of Irani et "
        "al. (ACM TECS 2003, 2-competitive); under load the newsvendor's quantile (Arrow, Harris, Marschak 1951), "
        "stabilization window as in Kubernetes' HPA, panic as in Knative's KPA"
    )
    params = (STABLE, PANIC, HEADROOM, QUANTILE, BURST, KEEP_ALIVE_BOUND)

    def at_once(self, spec: Spec, observation: Observation) -> float:
        return per_replica(spec, observation)

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
        return Proposal(replicas, seen.rung, reason, until_s, numbers, values, need.series, loads=need.loads)

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
        if replicas == 1 and need.safe <= 1:
            # What falls out of the window would not have kept more than this one.
            until_s = min(choice.until_s, need.foreseen_until_s)
        # With a request in progress no more are needed than without: one is lit anyway.
        stands = context.seen.ready == replicas and choice.reason is Reason.KEEP_ALIVE
        loads = need.loads if stands else None
        return Proposal(
            replicas, choice.rung, reason, until_s, numbers, choice.values, need.series, loads=loads
        )

    @staticmethod
    def _above(replicas: int, need: _Need) -> Reason:
        return Reason.FORECAST_DEMAND if replicas <= need.ahead else Reason.SCALE_DOWN_DELAY

    @staticmethod
    def _between(context: Context, low: int, need: _Need) -> int:
        """What there is, moved only as far as the bounds ask."""
        return min(max(context.before, low), max(low, need.safe))

    def _need(self, context: Context) -> _Need:
        seen = context.seen
        now_s, full, lead_s = seen.now_s, seen.per_replica, seen.lead_s
        stable_s = context.param(STABLE, max(STABLE_S, lead_s))
        # A replica that holds few requests can't be a little less than full.
        fuller = max(full * context.param(HEADROOM), min(full, 1.0))
        demand = context.forecast.demand if context.forecast is not None else None
        foreseen = None if demand is None else _foreseen(context, demand)
        found = _needs(seen.load, seen, foreseen, fuller)
        foreseen_s = math.inf if foreseen is None else foreseen.until_s
        fitting = max(found.roomy, found.ahead)
        before = context.state.series or ((now_s, float(context.before)),)
        series = push_peak(before, now_s, fitting, stable_s)
        safe = max(int(peak(series)), found.keep)
        until_s = min(peak_until_s(series, stable_s), foreseen_s)
        loads: tuple[int, int] | None = None
        if foreseen is not None:
            loads = _alike(seen, foreseen, fuller, found)
        elif demand is None:
            loads = alike(max(1, seen.load), full, fuller)
        return _Need(found.now, fitting, found.ahead, series, safe, until_s, foreseen_s, loads)


class _Replicas(NamedTuple):
    """Of a number of requests in progress. More requests never need less of any."""

    now: int
    roomy: int
    """That they would fit into with room."""
    ahead: int
    """Forecast to be needed when a start would be ready."""
    keep: int
    """Forecast to be needed at some moment until then."""


class _Foreseen(NamedTuple):
    """Requests in progress as the forecast has them, whatever there are now."""

    here: float
    soon: float
    """The most of the quantile that is prepared for, until a start would be ready."""
    then: float
    """The same, at that moment."""
    middle: float
    """The median of that moment."""
    held_s: float | None
    """How long a request holds its place."""
    until_s: float


def _foreseen(context: Context, demand: Demand) -> _Foreseen | None:
    seen = context.seen
    now_s, lead_s = seen.now_s, seen.lead_s
    quantile = context.param(QUANTILE, newsvendor(context))
    here = expected(demand, 0.5, now_s, 0.0)
    soon = expected(demand, quantile, now_s, lead_s)
    then = expected(demand, quantile, now_s + lead_s, 0.0)
    middle = expected(demand, 0.5, now_s + lead_s, 0.0)
    if not (here and soon and then and middle):
        return None
    until_s = min(here.until_s, soon.until_s, then.until_s - lead_s)
    return _Foreseen(
        here.concurrency,
        soon.concurrency,
        then.concurrency,
        middle.concurrency,
        service_s(demand, now_s),
        until_s,
    )


def _needs(load: int, seen: Seen, foreseen: _Foreseen | None, fuller: float) -> _Replicas:
    """What so many requests in progress need; `fuller`: how many a replica holds with room for more."""
    full = seen.per_replica
    need = need_of(load, full)
    if foreseen is None:
        return _Replicas(need, need_of(load, fuller), 0, 0)
    more = surge(load, foreseen.here)
    left = remaining(load, seen, more * foreseen.middle, foreseen.held_s)
    need = min(need, max(1, ceil(left / full)))
    return _Replicas(need, need, ceil(more * foreseen.then / full), ceil(more * foreseen.soon / full))


def _alike(seen: Seen, foreseen: _Foreseen, fuller: float, found: _Replicas) -> tuple[int, int]:
    """The least, 1 if not more, and the most requests in progress that need as much, by the forecast as well."""
    load = seen.load
    if load == 0:
        load, found = 1, _needs(1, seen, foreseen, fuller)

    def as_much(other: int) -> bool:
        return _needs(other, seen, foreseen, fuller) == found

    least, most = alike(load, seen.per_replica)
    # What is needed never falls with the load: between two that need the same all do.
    if not as_much(least):
        least += bisect.bisect_left(range(least, load), True, key=as_much)
    if not as_much(most):
        most = load + bisect.bisect_left(
            range(load + 1, most + 1), True, key=lambda other: not as_much(other)
        )
    return least, most


def newsvendor(context: Context) -> float:
    """The quantile of demand beyond which one more replica costs more than the waiting that it spares."""
    seen, spec = context.seen, context.spec
    serving = seen.prices.get(Rung.SERVING)
    price = charge(spec) if serving is None else serving.cost_per_s
    spared = spec.wait_cost * seen.per_replica
    low, high = QUANTILE_BOUNDS
    return min(high, max(low, 1.0 - price / spared)) if spared > 0 else low


def surge(load: int, expected_load: float) -> float:
    """How many times as many requests are in progress as were forecast for now, as far as that can't be chance; at
    least 1.

    The recent rates that a forecast goes by take a minute to see a jump, the requests in progress less than their own
    time. When replicas are short they say too much: hence no more than MOST_SURGE.
    """
    if expected_load <= 0:
        return 1.0
    sure = load - SURE * math.sqrt(load)
    return min(MOST_SURGE, max(1.0, sure / expected_load))


def remaining(load: int, seen: Seen, expected_load: float, held_s: float | None) -> float:
    """Of so many requests in progress, and those that come, how many are in progress when a start that begins now would
    be ready: at least one, if there is one now.

    What is too much for the replicas that are ready goes as fast as these are faster than what comes. What can't be
    chance counts whole, whatever was forecast.
    """
    if load <= 0:
        return 0.0
    room = seen.ready * seen.per_replica
    gone = 0.0 if held_s is None else max(0.0, room - expected_load) * seen.lead_s / held_s
    left = expected_load + max(0.0, load - room - gone)
    return max(1.0, left, load - SURE * math.sqrt(load))


__all__ = ["Predictive"]
