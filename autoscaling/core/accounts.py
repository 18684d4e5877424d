"""What models cost and what their prewarms were worth, from successive observations and decisions. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache

from autoscaling.core.seen import begins, charge, known, per_replica, priced
from autoscaling.core.types import Decision, Observation, Reason, Rung, RungProfile, Spec

LONGEST_S = 60.0
"""Of a longer time between two observations nobody knows what went on: nothing is charged for it."""
DAY_S = 86400.0
AHEAD = frozenset({Reason.PREWARM, Reason.FORECAST_DEMAND, Reason.SCHEDULE, Reason.MANUAL})
"""Reasons to start something that no request has asked for yet."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one model used since the observation before, within one UTC day."""

    model: str
    day: str
    """YYYY-MM-DD."""
    gpu_s: Mapping[str, float] = field(default_factory=dict)
    """GPU-seconds by rung name."""
    requests: int = 0
    cold_requests: int = 0
    """Those that came while no engine answered, as far as that is known."""
    waited_s: float = 0.0
    """Request-seconds in the queue."""
    cold_starts: int = 0
    """Starts from zero that a request had to wait for."""


@dataclass(frozen=True, slots=True)
class Prewarm:
    """One prewarm as it goes on."""

    id: str
    model: str
    begun_s: float
    reason: Reason
    replicas: int
    """Those beyond what there was; 0 for a prewarm of a rung."""
    rung: Rung
    base: int
    """Replicas that there were."""
    delay_s: float
    """What a start takes from where this one began: the median."""
    ready_s: float | None = None
    hit_s: float | None = None
    ended_s: float | None = None
    """When it was hit, or given up."""
    cost_gpu_s: float = 0.0
    spared_requests: int = 0
    spared_wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Account:
    """What must be remembered of one model."""

    observation: Observation | None = None
    prewarm: Prewarm | None = None
    arrivals: int = 0
    """Requests that came since that observation, while the replicas were unknown, and are not booked yet."""
    late: int = 0
    """Those of them that were told late."""
    waited_s: float = 0.0
    """What was waited meanwhile, likewise."""
    asked_s: float | None = None
    """When somebody asked last of a model without a replica: an engine may answer before its replica is seen."""


@dataclass(frozen=True, slots=True)
class Booking:
    """What one step added: usage to be added up, and the prewarms that changed, to be written over."""

    usage: tuple[Usage, ...] = ()
    prewarms: tuple[Prewarm, ...] = ()

    @property
    def gpu_s(self) -> float:
        return math.fsum(value for usage in self.usage for value in usage.gpu_s.values())


NO_ACCOUNT, NOTHING = Account(), Booking()


def book(
    account: Account, spec: Spec, observation: Observation, decision: Decision | None, *, used: bool = True
) -> tuple[Account, Booking]:
    """From the observation before to this one, and what was then decided.

    What was seen before is taken to have held until now; nothing is charged to a time that is not later. Of an
    observation without its replicas only the requests count: they are booked with the next one. `used`: whether anybody
    asks for the usage; without it only prewarms are followed.
    """
    before, prewarm = account.observation, account.prewarm
    if not (math.isfinite(observation.now_s) and known(observation.ready)):
        if not used and prewarm is None:
            return account, NOTHING
        return _owed(account, observation), NOTHING
    if account.arrivals or account.waited_s:
        owed = _owed(account, observation)
        waited_s = None if observation.waited_s is None else owed.waited_s
        observation = replace(observation, arrivals=owed.arrivals, late=owed.late, waited_s=waited_s)
    asked_s = _asked_s(account, observation)
    # Of what was before the first observation nothing but its requests is known.
    usage = _usage(spec, account, observation) if used else ()
    if before is not None and observation.now_s < before.now_s:
        # The clock went back: what is open can't be measured any more, and ends here.
        ended = (
            ()
            if prewarm is None or prewarm.ended_s is not None
            else (replace(prewarm, ended_s=prewarm.begun_s),)
        )
        return Account(observation, None), Booking(usage, ended) if usage or ended else NOTHING
    if prewarm is None and not used and (decision is None or decision.reason not in AHEAD):
        # The observation before counts only where something is counted from it on.
        return NO_ACCOUNT, NOTHING
    after = prewarm
    if after is not None and before is not None:
        after = _went_on(after, spec, before, observation, decision)
    if decision is not None and (after is None or after.ended_s is not None):
        begun = _begun(spec, observation, decision)
        if begun is not None:
            changed = (after,) if after is not None and after != prewarm else ()
            return Account(observation, begun, asked_s=asked_s), Booking(usage, (*changed, begun))
    changed = (after,) if after is not None and after != prewarm else ()
    if after is not None and _over(after, observation.now_s):
        after = None
    return Account(observation, after, asked_s=asked_s), Booking(usage, changed)


def _owed(account: Account, observation: Observation) -> Account:
    """With what came and was waited since, which is booked with the next observation."""
    came, waited_s = _count(observation.arrivals), observation.waited_s or 0.0
    if not (came or waited_s):
        return account
    return replace(
        account,
        arrivals=account.arrivals + came,
        late=account.late + observation.late,
        waited_s=account.waited_s + waited_s,
    )


def _asked_s(account: Account, observation: Observation) -> float | None:
    if _count(observation.ready) + _count(observation.starting):
        return None
    asks = _count(observation.arrivals) > 0 or _load(observation) > 0
    return observation.now_s if asks else account.asked_s


def unmet(prewarm: Prewarm, spec: Spec, observation: Observation) -> float | None:
    """The most requests in progress that change nothing of a prewarm, however many come and end; None where each that
    comes must be looked at."""
    if prewarm.base == 0:
        return None
    return math.inf if prewarm.ended_s is not None else prewarm.base * per_replica(spec, observation)


def _usage(spec: Spec, account: Account, now: Observation) -> tuple[Usage, ...]:
    before, prewarm = account.observation or now, account.prewarm
    span_s = now.now_s - before.now_s
    charged_s = span_s if 0 < span_s <= LONGEST_S else 0.0
    prices = priced(spec, before.rungs)
    rates: dict[str, float] = {}
    replicas = _count(before.ready) + _count(before.starting)
    if replicas:
        rates[Rung.SERVING.name.lower()] = replicas * _serving_cost(spec, prices)
    if before.rung is not None and before.rung in prices and before.rung < Rung.SERVING:
        cost = prices[before.rung].cost_per_s
        if cost > 0:
            rates[before.rung.name.lower()] = cost
    requests = _count(now.arrivals)
    was_dark = _count(before.ready) == 0 and not before.answering
    started = replicas == 0 and _count(now.ready) + _count(now.starting) > 0
    lately = account.asked_s is not None and 0 <= now.now_s - account.asked_s <= LONGEST_S
    asked = requests > 0 or _load(now) > 0 or lately
    unforeseen = prewarm is None or prewarm.ended_s is not None
    counted = {
        "requests": requests,
        "cold_requests": max(0, requests - now.late) if was_dark else 0,
        "cold_starts": int(started and asked and unforeseen),
    }
    # What gateways counted goes before what was seen of their queues at two moments.
    waiting = _count(before.queued) if now.waited_s is None else 0
    waited_s = now.waited_s or 0.0
    if not ((rates or waiting) and charged_s) and not waited_s and not any(counted.values()):
        return ()
    rows: list[Usage] = []
    at_s = now.now_s - charged_s
    while True:
        day = math.floor(at_s / DAY_S)
        end_s = min(now.now_s, (day + 1) * DAY_S)
        last = end_s >= now.now_s
        part_s = end_s - at_s
        gpu_s = {rung: rate * part_s for rung, rate in rates.items()} if part_s > 0 else {}
        # Counts belong to when they were seen.
        part_waited_s = waiting * part_s + (waited_s if last else 0.0)
        rows.append(
            Usage(spec.model, day_of(at_s), gpu_s, waited_s=part_waited_s, **(counted if last else {}))
        )
        if last:
            return tuple(rows)
        at_s = end_s


def _begun(spec: Spec, observation: Observation, decision: Decision) -> Prewarm | None:
    if decision.reason not in AHEAD or decision.replicas is None:
        return None
    present = max(_count(observation.target), _count(observation.ready) + _count(observation.starting))
    if present == 0 and _load(observation) > 0:
        # A request waits for it: that is a cold start, whatever else wanted it.
        return None
    prices = priced(spec, observation.rungs)
    start = begins(observation.rung, prices)
    profile = prices.get(start)
    extra = decision.replicas - present
    rung = Rung.SERVING
    if extra <= 0:
        if decision.replicas > 0 or observation.rung is None or decision.rung <= observation.rung:
            return None
        extra, rung = 0, decision.rung
    return Prewarm(
        id=f"{spec.model}@{observation.now_s:.3f}",
        model=spec.model,
        begun_s=observation.now_s,
        reason=decision.reason,
        replicas=extra,
        rung=rung,
        base=present,
        # What was never measured is not claimed to have been spared.
        delay_s=profile.delay_s if profile is not None and profile.starts else 0.0,
    )


def _went_on(
    prewarm: Prewarm, spec: Spec, before: Observation, now: Observation, decision: Decision | None
) -> Prewarm:
    now_s = now.now_s
    if prewarm.ended_s is None:
        prewarm = replace(prewarm, cost_gpu_s=prewarm.cost_gpu_s + _cost(prewarm, spec, before, now_s))
        if prewarm.ready_s is None and _is_ready(prewarm, now):
            prewarm = replace(prewarm, ready_s=now_s)
        hits = _hits(prewarm, spec, now)
        if hits:
            prewarm = replace(prewarm, hit_s=now_s, ended_s=now_s)
            return _spared(prewarm, now_s, hits)
        if decision is not None and _given_up(prewarm, decision, now_s):
            return replace(prewarm, ended_s=now_s)
        return prewarm
    # Those that come in the time that the start would have taken are spared what would be left of it.
    if prewarm.hit_s is not None and prewarm.base == 0 and _count(now.arrivals):
        return _spared(prewarm, now_s, _count(now.arrivals))
    return prewarm


def _spared(prewarm: Prewarm, now_s: float, requests: int) -> Prewarm:
    """Each would have waited for the rest of a start that begins with the first; what still starts is waited for."""
    hit_s = now_s if prewarm.hit_s is None else prewarm.hit_s
    otherwise_s = max(0.0, hit_s + prewarm.delay_s - now_s)
    still_s = 0.0 if prewarm.ready_s is not None else max(0.0, prewarm.begun_s + prewarm.delay_s - now_s)
    each_s = max(0.0, otherwise_s - still_s)
    if each_s == 0:
        return prewarm
    return replace(
        prewarm,
        spared_requests=prewarm.spared_requests + requests,
        spared_wait_s=prewarm.spared_wait_s + requests * each_s,
    )


def _hits(prewarm: Prewarm, spec: Spec, now: Observation) -> int:
    """Requests that meet it: from zero the first ones, beyond that those that the base could not carry."""
    if prewarm.base == 0:
        return max(_count(now.arrivals), _load(now))
    return max(0, math.ceil(_load(now) - prewarm.base * per_replica(spec, now)))


def _is_ready(prewarm: Prewarm, now: Observation) -> bool:
    if prewarm.rung < Rung.SERVING:
        return now.rung is not None and now.rung >= prewarm.rung
    return _count(now.ready) >= prewarm.base + prewarm.replicas


def _given_up(prewarm: Prewarm, decision: Decision, now_s: float) -> bool:
    if decision.replicas is None or now_s == prewarm.begun_s:
        return False
    if prewarm.rung < Rung.SERVING:
        return decision.replicas == 0 and decision.rung < prewarm.rung
    return decision.replicas <= prewarm.base


def _cost(prewarm: Prewarm, spec: Spec, before: Observation, now_s: float) -> float:
    span_s = now_s - before.now_s
    if span_s <= 0 or span_s > LONGEST_S:
        return 0.0
    prices = priced(spec, before.rungs)
    if prewarm.rung < Rung.SERVING:
        held = before.rung is not None and before.rung >= prewarm.rung and prewarm.rung in prices
        return prices[prewarm.rung].cost_per_s * span_s if held else 0.0
    extra = _count(before.ready) + _count(before.starting) - prewarm.base
    return max(0, min(prewarm.replicas, extra)) * _serving_cost(spec, prices) * span_s


def _over(prewarm: Prewarm, now_s: float) -> bool:
    if prewarm.ended_s is None:
        return False
    return prewarm.hit_s is None or now_s >= prewarm.hit_s + prewarm.delay_s


def _serving_cost(spec: Spec, prices: Mapping[Rung, RungProfile]) -> float:
    profile = prices.get(Rung.SERVING)
    if profile is not None:
        return profile.cost_per_s
    return charge(spec)


def _load(observation: Observation) -> int:
    return _count(observation.queued) + _count(observation.in_flight)


def _count(value: int | None) -> int:
    return int(value) if known(value) else 0  # type: ignore[arg-type]


def day_of(time_s: float) -> str:
    """The UTC day of a Unix time, YYYY-MM-DD."""
    return _day(math.floor(time_s / DAY_S))


@lru_cache(maxsize=64)
def _day(number: int) -> str:
    return datetime.fromtimestamp(number * DAY_S, UTC).strftime("%Y-%m-%d")


__all__ = [
    "AHEAD",
    "NOTHING",
    "NO_ACCOUNT",
    "Account",
    "Booking",
    "Prewarm",
    "Usage",
    "book",
    "day_of",
    "unmet",
]
