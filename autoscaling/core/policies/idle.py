"""One replica or none, while nothing is asked: the expected-cost choice, remembered for as long as it stands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autoscaling.core import warmth
from autoscaling.core.policies.base import Context, Param, rest
from autoscaling.core.survival import curve_of
from autoscaling.core.types import Forecast, Reason, Rung

BURST = Param(
    "burst_s", 5, 0, 600, "s", "Over which time the requests come that the forecast's batch counts."
)
KEEP_ALIVE_BOUND = Param(
    "keep_alive_bound", 0, 0, 1, "0 or 1", "1: an idle replica is never kept for longer than keep_alive_s."
)

_KEY = "choice_key"
_CHOICE = ("choice_lit", "choice_rung", "choice_until_s")
_NUMBER = "choice."


@dataclass(slots=True)
class Idle:
    lit: bool
    rung: Rung
    reason: Reason
    until_s: float
    numbers: Mapping[str, float]
    values: Mapping[str, float]
    """What must be remembered for the next decision."""


def idle(context: Context) -> Idle:
    """Keep, park, go dark, start or stay dark."""
    seen, memory = context.seen, context.state.values
    since_s = seen.idle_since_s if seen.idle_since_s is not None else seen.now_s
    values: dict[str, float] = {}
    ready = seen.ready > 0 and seen.present > 0
    # Between a decision and its effect nothing is there yet, but the start counts from the decision.
    starting = not ready and seen.present > 0
    left_s = None
    begun_s = None
    if starting:
        begun_s = memory.get("start_s", seen.now_s)
        lead_s = memory.get("start_lead_s", seen.lead_s)
        values |= {"start_s": begun_s, "start_lead_s": lead_s}
        # One that is late is not given up for that: a tenth of its time is always thought to be left.
        left_s = max(lead_s / 10, begun_s + lead_s - seen.now_s)
    prewarmed = memory.get("prewarmed_for_s") == since_s
    choice = _choice(context, since_s, left_s, begun_s, values, ready=ready)
    lit, until_s, rung = choice.lit, choice.until_s, choice.rung
    if ready and prewarmed and "start_s" in memory:
        # Ready before it was to be: what it was started for is still ahead. To park it until then would be flapping.
        due_s = memory["start_s"] + memory["start_lead_s"]
        if seen.now_s < due_s:
            values |= {"start_s": memory["start_s"], "start_lead_s": memory["start_lead_s"]}
            lit, until_s = True, until_s if lit else due_s
    if context.param(KEEP_ALIVE_BOUND) >= 0.5 and lit and (ready or starting) and not prewarmed:
        ends_s = since_s + context.spec.keep_alive_s
        if seen.now_s >= ends_s:
            lit, until_s = False, math.inf
            rung = rest(context)[0]
        else:
            until_s = min(until_s, ends_s)
    if lit:
        if not ready and not starting:
            prewarmed = True
            values |= {
                "start_s": memory.get("start_s", seen.now_s),
                "start_lead_s": memory.get("start_lead_s", seen.lead_s),
            }
        if prewarmed:
            values["prewarmed_for_s"] = since_s
        reason = Reason.PREWARM if prewarmed and not ready else Reason.KEEP_ALIVE
        return Idle(True, seen.rung, reason, until_s, choice.numbers, values)
    if rung == Rung.PARKED:
        reason = Reason.PARK
    elif seen.present > 0 or rung < seen.rung:
        reason = Reason.GO_DARK
    else:
        reason = Reason.DARK
    return Idle(False, rung, reason, until_s, choice.numbers, values)


def _choice(
    context: Context,
    since_s: float,
    left_s: float | None,
    begun_s: float | None,
    values: dict[str, float],
    *,
    ready: bool,
) -> warmth.Choice:
    seen, spec, memory = context.seen, context.spec, context.state.values
    rungs = seen.prices
    if not spec.park and Rung.PARKED in rungs:
        rungs = {rung: profile for rung, profile in rungs.items() if rung != Rung.PARKED}
    lit = ready or left_s is not None
    if len(rungs) < 2:
        # No prices: the spec's fixed idle time.
        ends_s = since_s + spec.keep_alive_s
        if lit and seen.now_s < ends_s:
            return warmth.Choice(True, Rung.SERVING, ends_s, {"keep_alive_s": spec.keep_alive_s})
        return warmth.Choice(False, rest(context)[0], math.inf)
    forecast = context.forecast
    batch_size = 1.0
    if forecast is not None and math.isfinite(forecast.batch_size):
        batch_size = max(1.0, forecast.batch_size)
    wait_cost = spec.wait_cost if math.isfinite(spec.wait_cost) and spec.wait_cost >= 0 else 1.0
    prices = warmth.Prices(rungs, wait_cost, batch_size, context.param(BURST))
    level = Rung.SERVING if ready else seen.rung
    key = _key(forecast, prices, level, since_s, begun_s)
    until_s = memory.get("choice_until_s")
    # The same question has the same answer until the answer itself says that it ends, or the forecast does. So a later
    # forecast of the same fit, or a grid that begins a second later, changes nothing.
    if memory.get(_KEY) == key and until_s is not None and seen.now_s < memory.get("choice_holds_s", until_s):
        values |= {name: value for name, value in memory.items() if name.startswith("choice")}
        numbers = {name[len(_NUMBER) :]: value for name, value in memory.items() if name.startswith(_NUMBER)}
        return warmth.Choice(bool(memory["choice_lit"]), Rung(int(memory["choice_rung"])), until_s, numbers)
    curve = curve_of(forecast, seen.now_s)
    if curve is None:
        return warmth.without_forecast(since_s, seen.now_s, prices, level, lit=lit)
    choice = warmth.choose(seen.now_s, curve, prices, level, left_s)
    values |= {
        _KEY: key,
        "choice_lit": float(choice.lit),
        "choice_rung": float(choice.rung),
        "choice_until_s": choice.until_s,
        "choice_holds_s": min(choice.until_s, curve.end_s),
    }
    values |= {_NUMBER + name: value for name, value in choice.numbers.items()}
    return choice


def _key(
    forecast: Forecast | None,
    prices: warmth.Prices,
    level: Rung,
    since_s: float,
    begun_s: float | None,
) -> float:
    """A number that differs for different questions. Hashes of numbers are the same in every process."""
    said: tuple[float, ...] = ()
    if forecast is not None:
        if forecast.fitted_s is not None:
            said = (1.0, forecast.fitted_s)
        else:
            nxt, demand = forecast.next_arrival, forecast.demand
            said = (2.0, forecast.made_s)
            if nxt is not None:
                said = (3.0, nxt.made_s, *nxt.survival)
            elif demand is not None:
                said = (4.0, demand.made_s, *(value for row in demand.rate_per_s for value in row))
    asked = (
        *said,
        prices.batch_size,
        prices.burst_s,
        prices.wait_cost,
        float(level),
        since_s,
        -1.0 if begun_s is None else begun_s,
        *(
            number
            for profile in prices.rungs.values()
            for number in (float(profile.rung), profile.delay_s, profile.delay_high_s, profile.cost_per_s)
        ),
    )
    return float(hash(asked) % (1 << 52))


__all__ = ["BURST", "KEEP_ALIVE_BOUND", "Idle", "idle"]
