"""A policy that decides beside the one in force, in a world where it is obeyed: what would it have cost?

It sees the requests that really came. Replicas, rungs and waiting are those that its own decisions would have made, by
the measured times of the model's starts: a replica that it starts is there after the median start from the rung that it
kept, and requests that came meanwhile wait for it. A request that is answered is taken to hold a replica for as long as
it does in truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoscaling.core.types import Decision, Observation, Rung, Spec


@dataclass(slots=True)
class _Imagined:
    """One model in that world."""

    ready: int = 0
    starting: list[float] = field(default_factory=list)  # when each will be there
    rung: Rung = Rung.WEIGHTS
    waiting: int = 0
    last_busy_s: float | None = None
    known: bool = False
    looked_s: float = -math.inf


class ShadowWorld:
    """`MetricsSource` and `Actuator` for a shadow policy's loop."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._models: dict[str, _Imagined] = {}
        self._real: Mapping[str, Observation] = {}
        self.specs_of: Callable[[float], Mapping[str, Spec]] = lambda _now_s: {}
        """Set to how the shadow would scale: it is also the loop's `SpecSource`."""

    def specs(self, now_s: float) -> Mapping[str, Spec]:
        """As the shadow would have them."""
        return self.specs_of(now_s)

    def saw(self, observations: Mapping[str, Observation]) -> None:
        """What the active loop's tick saw."""
        self._real = observations

    def observe(self, now_s: float) -> dict[str, Observation]:
        """The real requests, with this world's replicas."""
        return {model: self._observe(model, real, now_s) for model, real in self._real.items()}

    def _observe(self, model: str, real: Observation, now_s: float) -> Observation:
        # What came before its first look is no part of what it is compared by.
        arrivals = real.arrivals if model in self._models else 0
        world = self._models.setdefault(model, _Imagined())
        if real.ready is None or real.queued is None or real.in_flight is None:
            return replace(real, ready=None, arrivals=arrivals, waited_s=None)
        if not world.known:
            # It begins with what there is, as if it had been obeyed only from now on.
            world.known = True
            world.ready, world.rung = real.ready, real.rung or Rung.WEIGHTS
            world.starting = [now_s + _delay_s(real, world.rung)] * (real.starting or 0)
        # A clock that is set back makes no start longer.
        back_s, world.looked_s = max(0.0, world.looked_s - now_s), now_s
        world.starting = [at_s - back_s for at_s in world.starting]
        there = [at_s for at_s in world.starting if at_s <= now_s]
        world.starting = [at_s for at_s in world.starting if at_s > now_s]
        world.ready += len(there)
        if world.ready:
            # Who waited here is answered now, and is not there any more in truth.
            load = real.queued + real.in_flight
            queued, in_flight = 0, max(load, world.waiting)
            world.waiting = 0
        else:
            world.waiting += real.arrivals or 0
            queued, in_flight = world.waiting, 0
        if queued or in_flight:
            world.last_busy_s = now_s
        return replace(
            real,
            ready=world.ready,
            starting=len(world.starting),
            target=world.ready + len(world.starting),
            queued=queued,
            in_flight=in_flight,
            arrivals=arrivals,
            waited_s=None,
            last_busy_s=_latest(world.last_busy_s, None if queued else real.last_busy_s, now_s),
            rung=world.rung,
        )

    def apply(self, now_s: float, specs: Mapping[str, Spec], decisions: Sequence[Decision]) -> None:
        """Obey: start what is missing, end what is too much, the last first."""
        for decision in decisions:
            world, real = self._models.get(decision.model), self._real.get(decision.model)
            if world is None or real is None or decision.replicas is None:
                continue
            missing = decision.replicas - world.ready - len(world.starting)
            if missing > 0:
                world.starting += [now_s + _delay_s(real, world.rung)] * missing
            while missing < 0 and world.starting:
                world.starting.pop()
                missing += 1
            world.ready += min(0, missing)
            if not decision.replicas:
                held = [profile.rung for profile in real.rungs if profile.rung < Rung.SERVING]
                world.rung = max((r for r in held if r <= decision.rung), default=Rung.WEIGHTS)


def _delay_s(real: Observation, rung: Rung) -> float:
    below = [profile for profile in real.rungs if profile.rung <= rung]
    return below[-1].delay_s if below else 0.0


def _latest(one_s: float | None, other_s: float | None, now_s: float) -> float | None:
    times = [time_s for time_s in (one_s, other_s) if time_s is not None]
    return min(now_s, max(times)) if times else None
