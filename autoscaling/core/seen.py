"""One model's observation after every doubt: whoever holds a `Seen` has finite, sensible numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from autoscaling.core.types import Observation, Rung, RungProfile, Spec


@dataclass(slots=True)
class Seen:
    """What policies decide from, and never change. Replicas and requests are counts over the whole model.

    Not frozen, as are the other values that one decision makes for itself: that takes three times as long to make.
    """

    now_s: float
    ready: int
    starting: int
    present: int
    """Replicas that there are to be, as Serve was last told; where that is unknown, those that are there."""
    queued: int
    in_flight: int
    arrivals: int
    last_arrival_s: float | None
    idle_since_s: float | None
    """Since when no request is queued or in flight; None while one is."""
    rung: Rung
    """Where a start would begin."""
    prices: Mapping[Rung, RungProfile]
    """Lowest first. Holds SERVING, or nothing at all."""
    per_replica: float
    """Requests in progress that one replica carries within the SLO: measured, else the spec's target."""

    @property
    def load(self) -> int:
        return self.queued + self.in_flight

    @property
    def idle_s(self) -> float:
        """How long it has been idle; 0 while it is not."""
        return 0.0 if self.idle_since_s is None else max(0.0, self.now_s - self.idle_since_s)

    @property
    def lead_s(self) -> float:
        """How long a start may take from where it would begin: the upper quantile. 0 where nothing is known."""
        profile = self.prices.get(self.rung)
        return 0.0 if profile is None else profile.delay_high_s


def see(spec: Spec, observation: Observation, idle_since_s: float | None) -> Seen | None:
    """None if anything that decides is unknown: not given, not finite, negative.

    `idle_since_s` is since when the model was idle by an earlier observation; it counts where this one does not say.
    """
    now_s = observation.now_s
    if not (
        math.isfinite(now_s)
        and known(observation.ready)
        and known(observation.queued)
        and known(observation.in_flight)
    ):
        return None
    ready, queued, in_flight = int(observation.ready), int(observation.queued), int(observation.in_flight)  # type: ignore[arg-type]
    starting = int(observation.starting) if known(observation.starting) else 0  # type: ignore[arg-type]
    prices = priced(spec, observation.rungs)
    idle: float | None = None
    if queued + in_flight == 0:
        idle = _past(observation.last_busy_s, now_s)
        if idle is None:
            idle = _past(idle_since_s, now_s)
        if idle is None:
            idle = now_s
    return Seen(
        now_s,
        ready,
        starting,
        int(observation.target) if known(observation.target) else ready + starting,  # type: ignore[arg-type]
        queued,
        in_flight,
        int(observation.arrivals) if known(observation.arrivals) else 0,  # type: ignore[arg-type]
        _past(observation.last_arrival_s, now_s),
        idle,
        begins(observation.rung, prices),
        prices,
        per_replica(spec, observation),
    )


def known(value: float | None) -> bool:
    """A count that can be decided from."""
    # Not NaN either, which is not less than anything.
    return value is not None and 0 <= value < math.inf


def per_replica(spec: Spec, observation: Observation) -> float:
    """Requests in progress that one replica carries: measured, else the spec's target; always above 0."""
    capacity = observation.capacity
    if capacity is not None and math.isfinite(capacity.concurrency) and capacity.concurrency > 0:
        return capacity.concurrency
    return target(spec)


def target(spec: Spec) -> float:
    """The spec's requests for each replica, 1 where it says nothing sensible."""
    wanted = spec.target_ongoing_requests
    return wanted if math.isfinite(wanted) and wanted > 0 else 1.0


def charge(spec: Spec) -> float:
    """GPUs that one replica is charged as: one without GPUs counts as one."""
    gpus = spec.gpus_per_replica
    return gpus if math.isfinite(gpus) and gpus > 0 else 1.0


def devices(spec: Spec) -> float:
    """GPUs that one replica holds."""
    return max(0.0, spec.gpus_per_replica) if math.isfinite(spec.gpus_per_replica) else 1.0


def priced(spec: Spec, rungs: tuple[RungProfile, ...]) -> Mapping[Rung, RungProfile]:
    """Those rungs whose price and delay can be reckoned with. Empty unless one below SERVING is among them.

    A replica that seems to cost nothing costs what its spec charges: else it would never be worth ending.
    """
    charged = charge(spec)
    # Mostly it is the very object that was asked for at the decision before.
    known = _KNOWN.get(id(rungs))
    if known is not None and known[0] is rungs and known[1] == charged:
        return known[2]
    prices = _priced(rungs, charged)
    if len(_KNOWN) >= MOST_KNOWN:
        _KNOWN.clear()
    _KNOWN[id(rungs)] = rungs, charged, prices
    return prices


@lru_cache(maxsize=4096)
def _priced(rungs: tuple[RungProfile, ...], charged: float) -> Mapping[Rung, RungProfile]:
    prices: dict[Rung, RungProfile] = {}
    for profile in sorted(rungs, key=lambda each: each.rung):
        numbers = (profile.delay_s, profile.delay_high_s, profile.cost_per_s)
        if all(math.isfinite(number) and number >= 0 for number in numbers):
            prices[profile.rung] = profile
    if not any(rung < Rung.SERVING for rung in prices):
        return NO_PRICES
    serving = prices.pop(Rung.SERVING, None)
    cost_per_s = serving.cost_per_s if serving is not None and serving.cost_per_s > 0 else charged
    prices[Rung.SERVING] = RungProfile(Rung.SERVING, 0.0, 0.0, cost_per_s)
    return MappingProxyType(prices)


NO_PRICES: Mapping[Rung, RungProfile] = MappingProxyType({})
MOST_KNOWN = 4096
_KNOWN: dict[int, tuple[tuple[RungProfile, ...], float, Mapping[Rung, RungProfile]]] = {}
"""By identity: the rungs, what a replica is charged, and what follows."""


def begins(rung: Rung | None, prices: Mapping[Rung, RungProfile]) -> Rung:
    """Where a start would begin: as seen, else the highest rung below PARKED that costs nothing. Never SERVING."""
    if rung is not None and rung < Rung.SERVING:
        return Rung(rung)
    below = [each for each in prices if each < Rung.SERVING]
    if rung is None:
        free = [each for each in below if each < Rung.PARKED and prices[each].cost_per_s == 0]
        return (free or below or [Rung.COLD])[-1 if free else 0]
    return below[-1] if below else Rung.PARKED


def _past(time_s: float | None, now_s: float) -> float | None:
    return time_s if time_s is not None and -math.inf < time_s <= now_s else None


__all__ = ["Seen", "begins", "charge", "devices", "known", "per_replica", "priced", "see", "target"]
