"""What the simulator decides is what the cluster would: the same observations, through both sides' adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from autoscaling.core.codec import from_plain, to_plain
from autoscaling.core.types import Decision, Forecast, Observation, Rung, Spec, State
from autoscaling.live.capacity import CapacityBook
from autoscaling.live.metrics import LiveMetrics, ServeView
from autoscaling.live.nodes import Node
from autoscaling.live.records import ColdStartRow, TrafficRow
from autoscaling.live.rungs import RungBook
from autoscaling.live.setup import ModelSetup
from autoscaling.loop import Loop
from autoscaling.sim import group
from autoscaling.sim import replay as sim
from autoscaling.sim.clock import VirtualClock
from autoscaling.sim.forecasts import SimForecasts
from autoscaling.sim.profile import Engine, Profile, Start
from autoscaling.traces import Row

GIB = float(1 << 30)
DELAYS = {
    Rung.NODE: tuple(np.linspace(50, 80, 32)),
    Rung.WEIGHTS: tuple(np.linspace(18, 30, 32)),
    Rung.TEMPLATE: tuple(np.linspace(3.5, 5.5, 32)),
    Rung.PARKED: tuple(np.linspace(0.9, 1.4, 32)),
}
PROFILE = Profile(
    engine=Engine(concurrency=4, service_s=0.0),
    starts={rung: Start(delays) for rung, delays in DELAYS.items()},
    base=Rung.TEMPLATE,
    slo_s=1.0,
)
MODELS = ("sparse", "busy", "timer")


def rows() -> Iterator[Row]:
    """A model that is seldom asked, one with bursts beyond a replica, one like clockwork."""
    random = np.random.default_rng(7)
    found = [(float(t), "sparse", 20.0) for t in np.cumsum(random.exponential(400, 18))]
    for burst in np.cumsum(random.exponential(900, 8)):
        found += [(float(burst + t), "busy", 9.0) for t in np.cumsum(random.exponential(1.5, 40))]
    found += [(300.0 * k + 1.0, "timer", 2.0) for k in range(24)]
    for time_s, model, exec_s in sorted(found):
        if time_s < 7200:
            yield Row(time_s, model, exec_s=exec_s)


def spec(model: str, policy: str) -> Spec:
    return Spec(
        model, policy=policy, wait_cost=10.0, max_replicas=6, target_ongoing_requests=3.0, keep_alive_s=90
    )


class Tape:
    """Everything that the loop was told and decided, as JSON: what a recording of a cluster is."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.forecasts: dict[tuple[str, float], Forecast | None] = {}
        self._now: dict[str, Any] = {}

    def saw(self, now_s: float, observations: Mapping[str, Observation]) -> None:
        self._now = {
            "now_s": now_s,
            "observations": {name: to_plain(seen) for name, seen in observations.items()},
        }

    def decided(self, decisions: Sequence[Decision], after: Mapping[str, Observation]) -> None:
        made = [to_plain(each) for each in decisions]
        then = {name: to_plain(seen) for name, seen in after.items()}
        self.lines.append(json.dumps({**self._now, "decisions": made, "after": then}))

    def read(self) -> Iterator[Moment]:
        for line in self.lines:
            data = json.loads(line)
            yield Moment(
                data["now_s"],
                {name: from_plain(Observation, seen) for name, seen in data["observations"].items()},
                {each["model"]: from_plain(Decision, each) for each in data["decisions"]},
                {name: from_plain(Observation, seen) for name, seen in data["after"].items()},
            )


class Moment(NamedTuple):
    now_s: float
    seen: dict[str, Observation]
    decided: dict[str, Decision]
    after: dict[str, Observation]
    """What would have been seen once the decisions had had their effect."""


def record(policy: str, monkeypatch: pytest.MonkeyPatch, profile: Profile = PROFILE) -> Tape:
    """The simulator's run, all three models under one loop."""
    tape = Tape()

    class Taped(group.SimCluster):
        def observe(self, now_s: float) -> Mapping[str, Observation]:
            seen = super().observe(now_s)
            tape.saw(now_s, seen)
            return seen

        def apply(self, now_s: float, specs: Mapping[str, Spec], decisions: Sequence[Decision]) -> None:
            super().apply(now_s, specs, decisions)
            tape.decided(decisions, super().observe(now_s))

    class TapedForecasts(SimForecasts):
        def forecast(self, model: str, now_s: float) -> Forecast | None:
            made = super().forecast(model, now_s)
            tape.forecasts[model, now_s] = made
            return made

    monkeypatch.setattr(group, "SimCluster", Taped)
    # A budget that never binds puts the models under one loop.
    setup = sim.Setup(profile=replace(profile, gpus=100.0))
    specs = {model: spec(model, policy) for model in MODELS}
    sim.replay(list(rows()), specs, setup, forecasts=TapedForecasts())
    return tape


class World:
    """The live side's adapters, told what gateways, hosts and Serve would have told of the recorded moments."""

    def __init__(self, policy: str, begin_s: float, **options: float) -> None:
        self.clock = VirtualClock(begin_s)
        rungs = RungBook()
        for model in MODELS:
            for rung, delays in DELAYS.items():
                for i, delay_s in enumerate(delays):
                    rungs.add(
                        ColdStartRow(
                            model,
                            f"{rung.name}{i}",
                            begin_s - i,
                            begin_s - i - delay_s,
                            delay_s,
                            "forked",
                            rung=rung,
                        )
                    )
        setups = [
            ModelSetup(
                id=model,
                aliases=(),
                deployment=f"model-{model}",
                spec=spec(model, policy),
                can_park=True,
            )
            for model in MODELS
        ]
        self.metrics = LiveMetrics(setups, rungs, CapacityBook(), self.clock, park_budget_bytes=1 << 40)
        self.tape: dict[tuple[str, float], Forecast | None] = {}
        self.made: dict[str, Decision] = {}
        self.news: list[tuple[float, Decision]] = []
        self.loop = Loop(self, self.metrics, self, self, self, **options)  # type: ignore[arg-type]
        self._specs = {model: spec(model, policy) for model in MODELS}

    def specs(self, now_s: float) -> Mapping[str, Spec]:
        return self._specs

    def forecast(self, model: str, now_s: float) -> Forecast | None:
        times = [time_s for name, time_s in self.tape if name == model and time_s <= now_s]
        return self.tape[model, max(times)] if times else None

    def apply(self, now_s: float, specs: Mapping[str, Spec], decisions: Sequence[Decision]) -> None:
        self.made = {each.model: each for each in decisions}

    def record(
        self,
        now_s: float,
        observations: Mapping[str, Observation],
        decisions: Sequence[Decision],
        states: Mapping[str, State],
    ) -> None:
        self.news += [(now_s, each) for each in decisions]

    def tick(self, now_s: float, seen: Mapping[str, Observation]) -> None:
        self.clock.advance(now_s)
        report = {
            "node": "n1",
            "models": {
                name: {
                    "queued": each.queued,
                    "in_flight": each.in_flight,
                    "last_arrival_s": each.last_arrival_s,
                    "last_busy_s": each.last_busy_s,
                }
                for name, each in seen.items()
            },
            "host_models": [{"model": name, "rung": "template"} for name in seen],
            "engines": [
                {"model": name, "state": "parked", "held": False, "memory_bytes": GIB}
                for name, each in seen.items()
                if each.rung == Rung.PARKED
            ],
            "memory": {"total_bytes": 64 * GIB, "available_share": 0.9},
        }
        traffic = [
            TrafficRow(name, math.floor(each.last_arrival_s or 0.0), arrivals=each.arrivals)
            for name, each in seen.items()
            if each.arrivals
        ]
        self.metrics.take_report("g1", report, traffic)
        self.metrics.take_serve(
            {
                f"model-{name}": ServeView(each.ready or 0, each.starting or 0, each.target or 0, {})
                for name, each in seen.items()
            }
        )
        self.metrics.take_nodes([Node("n1", {"CPU": 64.0, "GPU": 8.0})], autoscaler=False)
        self.loop.tick(now_s)


def said(decision: Decision) -> tuple[Any, ...]:
    return decision.replicas, decision.rung, decision.reason, decision.clamps, decision.until_s


@pytest.mark.parametrize(
    "policy", ["predictive", "keep-alive", "hybrid-histogram", "kpa", "ray-default", "reactive"]
)
def test_both_sides_decide_the_same(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tape = record(policy, monkeypatch)
    moments = list(tape.read())
    assert len(moments) > 200
    world = World(policy, moments[0][0], jump_s=math.inf, reforecast_s=0.0)
    world.tape = tape.forecasts
    reasons = set()
    for now_s, seen, decided, _ in moments:
        world.tick(now_s, seen)
        assert not world.loop.errors
        for model in MODELS:
            assert world.loop.observations[model] == replace(
                seen[model], capacity=world.loop.observations[model].capacity
            )
            assert said(world.made[model]) == said(decided[model]), (model, now_s - moments[0][0])
            reasons.add(decided[model].reason)
    assert len(reasons) >= 4


@pytest.mark.parametrize("policy", ["predictive", "keep-alive", "kpa"])
def test_ticks_that_are_skipped_would_have_decided_nothing(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tape = record(policy, monkeypatch)
    moments = list(tape.read())
    world = World(policy, moments[0][0])
    world.tape = tape.forecasts
    skipped = 0
    for (now_s, seen, decided, after), following in zip(moments, [*moments[1:], None], strict=True):
        world.tick(now_s, seen)
        # But for until when it stands: that ends with the forecast, which is asked for at other moments.
        assert {m: said(world.made[m])[:4] for m in MODELS} == {m: said(decided[m])[:4] for m in MODELS}
        if following is None:
            break
        idle_s = now_s + 1.0
        while idle_s < following[0]:
            news = len(world.news)
            still = {
                name: replace(
                    each,
                    now_s=idle_s,
                    arrivals=0,
                    last_busy_s=idle_s if each.queued or each.in_flight else each.last_busy_s,
                )
                for name, each in after.items()
            }
            world.tick(idle_s, still)
            assert {m: said(world.made[m])[:2] for m in MODELS} == {m: said(decided[m])[:2] for m in MODELS}
            skipped += len(world.news) == news
            idle_s += 1.0
    assert skipped > 2000
