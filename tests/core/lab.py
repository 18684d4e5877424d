"""What the core's tests build their cases of: prices, forecasts, observations, and a cluster made of arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from autoscaling.core.decide import decide
from autoscaling.core.types import (
    Decision,
    Demand,
    Forecast,
    NextArrival,
    Observation,
    Rung,
    RungProfile,
    Spec,
    State,
)

T0 = 1_700_000_000.0
RUNGS = (
    RungProfile(Rung.WEIGHTS, 40.0, 50.0, 0.0, 9),
    RungProfile(Rung.TEMPLATE, 4.0, 5.0, 0.0, 9),
    RungProfile(Rung.PARKED, 1.0, 1.5, 0.02, 9),
    RungProfile(Rung.SERVING, 0.0, 0.0, 1.0),
)
TWO = (RUNGS[1], RUNGS[3])
"""Dark or lit."""


def spec(policy: str = "predictive", **changes: Any) -> Spec:
    return replace(
        Spec("m", policy=policy, wait_cost=10.0, max_replicas=8, target_ongoing_requests=10.0), **changes
    )


def seen(now_s: float = T0, **changes: Any) -> Observation:
    """Idle since `now_s`, at zero, with a template."""
    base = Observation(
        now_s=now_s,
        ready=0,
        starting=0,
        target=0,
        queued=0,
        in_flight=0,
        arrivals=0,
        last_arrival_s=now_s,
        last_busy_s=now_s,
        rung=Rung.TEMPLATE,
        rungs=RUNGS,
    )
    return replace(base, **changes)


def lit(now_s: float = T0, replicas: int = 1, **changes: Any) -> Observation:
    return seen(now_s, ready=replicas, target=replicas, **changes)


def later(observation: Observation, now_s: float) -> Observation:
    """The same, with nothing happening until then."""
    return replace(observation, now_s=now_s, arrivals=0)


def poisson(rate_per_s: float, made_s: float = T0, horizon_s: float = 7200.0) -> Forecast:
    times = [horizon_s * (i / 60) ** 2 for i in range(61)]
    return Forecast(
        made_s,
        "poisson",
        NextArrival(made_s, tuple(times), tuple(math.exp(-rate_per_s * time_s) for time_s in times)),
    )


def timer(at_s: float, made_s: float = T0, *, width_s: float = 0.2, horizon_s: float = 7200.0) -> Forecast:
    """The next request comes within `width_s` after `at_s`, surely."""
    at = at_s - made_s
    return Forecast(
        made_s, "timer", NextArrival(made_s, (0.0, at, at + width_s, horizon_s), (1.0, 1.0, 0.0, 0.0))
    )


def never(made_s: float = T0, horizon_s: float = 7200.0) -> Forecast:
    return Forecast(made_s, "never", NextArrival(made_s, (0.0, horizon_s), (1.0, 1.0)))


def demand(*levels: float, step_s: float = 60.0, made_s: float = T0, spread: float = 0.5) -> Demand:
    """Quantiles 0.5 and 0.9 of the concurrency: each level, and by `spread` more."""
    rows = tuple((level, level * (1 + spread)) for level in levels)
    return Demand(made_s, step_s, (0.5, 0.9), rows, rows)


def said(decision: Decision) -> tuple[Any, ...]:
    """What a decision is; its numbers and when it was made are commentary."""
    return decision.replicas, decision.rung, decision.reason, decision.clamps


@dataclass
class Cluster:
    """Replicas become ready `start_s` after they were asked for; a load is served or queued by what is ready."""

    spec: Spec
    start_s: float = 5.0
    now_s: float = T0
    ready: int = 0
    starts: tuple[float, ...] = ()
    """When each replica on its way will be ready."""
    target: int = 0
    rung: Rung = Rung.TEMPLATE
    state: State = field(default_factory=State)
    last_busy_s: float | None = None
    last_arrival_s: float | None = None
    decision: Decision | None = None
    lag_s: float = 0.0
    """How much later a decision reaches the cluster."""
    on_the_way: list[tuple[float, Decision]] = field(default_factory=list)

    def observe(self, load: int = 0, arrivals: int = 0) -> Observation:
        while self.on_the_way and self.on_the_way[0][0] <= self.now_s:
            self._carry_out(self.on_the_way.pop(0)[1])
        done = [time_s for time_s in self.starts if time_s <= self.now_s]
        self.ready += len(done)
        self.starts = tuple(time_s for time_s in self.starts if time_s > self.now_s)
        carried = min(load, int(self.ready * self.spec.target_ongoing_requests))
        if load:
            self.last_busy_s = self.now_s
        if arrivals:
            self.last_arrival_s = self.now_s
        return Observation(
            now_s=self.now_s,
            ready=self.ready,
            starting=len(self.starts),
            target=self.target,
            queued=load - carried,
            in_flight=carried,
            arrivals=arrivals,
            last_arrival_s=self.last_arrival_s,
            last_busy_s=self.last_busy_s,
            rung=self.rung,
            rungs=RUNGS,
        )

    def act(self, decision: Decision) -> None:
        self.decision = decision
        if self.lag_s:
            self.on_the_way.append((self.now_s + self.lag_s, decision))
        else:
            self._carry_out(decision)

    def _carry_out(self, decision: Decision) -> None:
        if decision.replicas is None:
            return
        self.target = decision.replicas
        missing = self.target - self.ready - len(self.starts)
        if missing > 0:
            self.starts += (self.now_s + self.start_s,) * missing
        while self.ready + len(self.starts) > self.target:
            if self.starts:
                self.starts = self.starts[:-1]
            else:
                self.ready -= 1
        if self.target == 0:
            self.rung = decision.rung

    def step(self, load: int = 0, arrivals: int = 0, forecast: Forecast | None = None) -> Decision:
        observation = self.observe(load, arrivals)
        self.state, decision = decide(self.spec, self.state, observation, forecast)
        self.act(decision)
        return decision

    def run(
        self,
        seconds: float,
        load: Callable[[float], int] | int = 0,
        forecast: Callable[[float], Forecast | None] | Forecast | None = None,
        every_s: float = 1.0,
    ) -> list[Decision]:
        """A decision each `every_s`. `load` and `forecast` may depend on the seconds since the beginning."""
        began_s = self.now_s
        decisions = []
        before = 0
        while self.now_s < began_s + seconds:
            at = self.now_s - began_s
            carried = load(at) if callable(load) else load
            foreseen = forecast(at) if callable(forecast) else forecast
            decisions.append(self.step(carried, max(0, carried - before), foreseen))
            before = carried
            self.now_s += every_s
        return decisions
