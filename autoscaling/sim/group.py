"""Models under one loop on the virtual clock: nothing is done where nothing happens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from autoscaling.core.budget import Budget
from autoscaling.core.types import Rung, Spec
from autoscaling.loop import Loop
from autoscaling.sim.adapters import SimCluster, SimSink, SimSpecs
from autoscaling.sim.clock import VirtualClock
from autoscaling.sim.cluster import VirtualModel
from autoscaling.sim.events import GRID
from autoscaling.sim.forecasts import Foresight, NoForecasts
from autoscaling.sim.pool import Pool
from autoscaling.sim.profile import Profile, Start
from autoscaling.sim.queueing import (
    ARRIVED,
    COLD,
    COLD_WAITED_S,
    EPISODES,
    HELD_S,
    IN_FLIGHT_S,
    IN_TIME,
    LONGEST_S,
    REJECTED,
    REQUESTS,
    TAIL,
    WAITED_S,
    Floats,
)
from autoscaling.sim.report import ModelReport, figures

PATIENCE_S = 86400.0
"""How long a replay goes on after the trace with nothing that happens to a request that waits."""
HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one model, in place of the profile's."""

    deadline_s: float
    queue_limit: float

    def applied(self, profile: Profile) -> Profile:
        """The profile with these. Raises ProfileError."""
        return replace(profile, deadline_s=self.deadline_s, queue_limit=self.queue_limit)


@dataclass(frozen=True)
class Setup:
    """How a trace is replayed."""

    profile: Profile = field(default_factory=Profile)
    seed: int = 0
    tick_s: float = 1.0
    scale: float = 1.0
    measure_from_s: float = 0.0
    """Seconds from the first request, to the whole second; what comes before is learned from only."""
    until_s: float | None = None
    """Seconds from the first row; what comes after is not read. None: all of it."""
    follow: bool = True
    """Serve's policy raises above a decision what requests in progress need, as it does live."""
    origin_s: float | None = None
    keep_decisions: bool = False
    sample_s: float | None = None
    """How long the steps of the reports' timelines are; None: there are none."""
    limits: Mapping[str, Limits] = field(default_factory=dict)
    """By model; of others, the profile's."""
    starts: Mapping[str, Mapping[Rung, Start]] = field(default_factory=dict)
    """By model, from the rungs of the profile; of others, the profile's."""

    def profile_of(self, model: str) -> Profile:
        """With its own limits and starts. Raises ProfileError."""
        profile = self.profile
        if (starts := self.starts.get(model)) is not None:
            profile = replace(profile, starts=starts)
        limits = self.limits.get(model)
        return profile if limits is None else limits.applied(profile)


@dataclass(frozen=True, slots=True)
class Sample:
    """Sums of one model up to `now_s`, since it is measured."""

    now_s: float
    held_s: float
    """Replica-seconds, ready or draining."""
    in_flight_s: float
    """Request-seconds."""
    cold_starts: int
    arrivals: int
    """Since the beginning."""
    gpu_s: float = 0.0
    waited_s: float = 0.0


class Group:
    """Models that share GPUs or memory, under one loop; or a single one that shares nothing."""

    def __init__(self, specs: Mapping[str, Spec], setup: Setup, forecasts: Foresight, begin_s: float) -> None:
        profile = setup.profile
        self._pool = Pool(profile.gpus, profile.parked_engines)
        self.models = {
            name: VirtualModel(spec, setup.profile_of(name), self._pool, seed=setup.seed)
            for name, spec in specs.items()
        }
        self._tick_s = float(setup.tick_s)
        self._forecasts = forecasts
        self._clock = VirtualClock(begin_s)
        self._taken = dict.fromkeys(specs, 0)
        self._foresees = not isinstance(forecasts, NoForecasts)
        cluster = SimCluster(self.models, self._pool, follow=setup.follow)
        self._measured = False
        self._measure_s = begin_s + setup.measure_from_s
        self.sink = SimSink(since_s=self._measure_s, keep=setup.keep_decisions)
        self._sample_s = setup.sample_s
        self._sampled_s = math.inf if setup.sample_s is None else begin_s
        self._owed_s = math.inf
        self._rides = (
            len(specs) == 1
            and profile.gpus is None
            and profile.parked_engines is None
            and self._tick_s.is_integer()
        )
        self.samples: dict[str, list[Sample]] = {name: [] for name in specs}
        self._loop = Loop(
            SimSpecs(specs),
            cluster,
            forecasts,
            cluster,
            self.sink,
            Budget(gpus=profile.gpus),
            accounts=self.sink,
            jump_s=math.inf,
            reforecast_s=0.0,
            usage=False,
        )
        for name, model in self.models.items():
            model.begin(begin_s)
            lead_s = max(start.measured_s()[1] for start in model.profile.starts.values())
            # Where there is one replica or none, how much comes decides nothing.
            forecasts.watch(name, begin_s, lead_s if specs[name].max_replicas > 1 else 0.0)
        if self._measure_s <= begin_s:
            # What the first tick starts counts, too.
            self._measure()
        self._tick(begin_s)

    @property
    def errors(self) -> Mapping[str, str]:
        return self._loop.errors

    @property
    def unanswered(self) -> bool:
        """A request waits or is in progress."""
        return any(model.unanswered for model in self.models.values())

    @property
    def works_s(self) -> float:
        """Until when requests are worked on at the least; -inf if none is in progress, or ends never."""
        ends_s = (model.queue.works_s() for model in self.models.values())
        return max((each for each in ends_s if each < math.inf), default=-math.inf)

    @property
    def answers(self) -> bool:
        """The same, and it may yet be answered: what is in progress will be, however long it takes.

        A policy's own timers may begin a start, or end a replica whose GPUs another waits for; but some are always
        due, so that they count for as long only as something happened to a request.
        """
        now_s = self._clock.now_s()
        return self.works_s > -math.inf or (
            self.unanswered
            and self._due_s() < now_s + PATIENCE_S
            and any(model.answers(now_s, PATIENCE_S) for model in self.models.values())
        )

    def feed(self, name: str, times: Floats, work: Floats) -> None:
        """More requests of one model."""
        self._learn(name)
        self._forecasts.coming(name, times, work)
        self.models[name].feed(times, work)
        self._taken[name] = int(self.models[name].queue.n[TAIL])

    def run(self, until_s: float, *, inclusive: bool = False) -> None:
        """Tick by tick, where something happens, up to that moment."""
        while True:
            next_s = self._next_s()
            tick_s = min(self._owed_s, max(self._grid(next_s), self._clock.now_s() + self._tick_s))
            # Before what is measured is set to zero, or the sums would be of another span.
            next_s = tick_s if self._measured else min(tick_s, self._measure_s)
            # To look at a moment is to advance to it: what happens before then is not forgotten by the next tick.
            if self._sampled_s < min(next_s, until_s):
                self._owed_s = tick_s
                self._sample(self._sampled_s)
                continue
            if not self._measured and tick_s >= self._measure_s:
                if self._measure_s > until_s:
                    return
                self._owed_s = tick_s
                self._measure()
                continue
            if self._rides and self._owed_s == math.inf and self._ride(until_s):
                continue
            if tick_s > until_s or (tick_s == until_s and not inclusive):
                return
            for model in self.models.values():
                model.advance(tick_s)
            self._owed_s = math.inf
            self._clock.advance(tick_s)
            self._tick(tick_s)

    def _ride(self, until_s: float) -> bool:
        """Over ticks at which the loop would do nothing, as it says itself; whether there were any.

        Up to none at which a forecaster might learn: what comes may ask for that.
        """
        (name, model), *_ = self.models.items()
        stands = self._loop.stands_for(name) if model.steady else None
        if stands is None:
            return False
        if self.sink.keeps:
            # What is said of silences is to be kept too, and of the requests that end them.
            if model.load == 0:
                return False
            stands = stands._replace(silence_s=0.0)
        now_s = self._clock.now_s()
        known_s = self._grid(min(self._loop.next_s(), self._loop.looks_s(), self._forecasts.next_s(name)))
        before_s = min(
            until_s,
            known_s,
            self._sampled_s,
            now_s + self._forecasts.settles_s + self._tick_s,
            self._forecasts.demand_until_s(name),
        )
        if not self._measured:
            before_s = min(before_s, self._measure_s)
        rode = model.ride(now_s, before_s, self._tick_s, stands)
        if not len(rode):
            return False
        ticks = rode.tolist()
        self._clock.advance(ticks[-1])
        decides = not stands.least <= model.load <= stands.most
        if self._foresees:
            queue = model.queue
            first, until = self._taken[name], int(queue.n[TAIL])
            times = queue.times[first:until]
            for tick_s, last in zip(ticks, times.searchsorted(rode, "right").tolist(), strict=True):
                self._learn(name, first + last)
                if tick_s < ticks[-1] or not decides:
                    # What it would have said then, it says for some seconds.
                    self._forecasts.forecast(name, tick_s)
        if decides:
            self._tick(ticks[-1])
        return True

    def close(self, end_s: float) -> None:
        """Whatever is open is charged until then."""
        if not self._measured:
            self._measure()
        for model in self.models.values():
            model.advance(end_s)
            model.close(end_s, PATIENCE_S)
        if self._sample_s is not None:
            self._sample(end_s)

    def _measure(self) -> None:
        self._measured = True
        # A request at the very moment counts.
        before_s = math.nextafter(self._measure_s, -math.inf)
        for model in self.models.values():
            if before_s > model.now_s:
                model.advance(before_s)
            model.measure(self._measure_s)

    def _sample(self, now_s: float) -> None:
        for name, model in self.models.items():
            if now_s > model.now_s:
                model.advance(now_s)
            f, n = model.queue.f, model.queue.n
            counted = (float(f[HELD_S]), float(f[IN_FLIGHT_S]), int(n[EPISODES]), int(n[ARRIVED]))
            self.samples[name].append(Sample(now_s, *counted, _gpu_s(model), float(f[WAITED_S])))
        self._sampled_s = _next_sample_s(now_s, self._sample_s)

    def _next_s(self) -> float:
        return min(self._due_s(), self._loop.looks_s())

    def _due_s(self) -> float:
        """When something happens next, but for a look at what the next forecast says."""
        next_s = self._loop.next_s()
        for name, model in self.models.items():
            if model.moved:
                return self._clock.now_s()
            next_s = min(next_s, model.next_s(), self._forecasts.next_s(name))
        return next_s

    def _grid(self, time_s: float) -> float:
        """The first tick at or after that moment."""
        if not math.isfinite(time_s):
            return time_s
        return math.ceil(time_s / self._tick_s - GRID) * self._tick_s

    def _tick(self, now_s: float) -> None:
        if self._foresees:
            for name in self.models:
                self._learn(name)
                self._forecasts.fit(name, now_s)
        self._loop.tick(now_s)

    def _learn(self, name: str, until: int | None = None) -> None:
        """Of what has come, or of as much of it."""
        if not self._foresees:
            return
        queue = self.models[name].queue
        taken = self._taken[name]
        until = int(queue.n[TAIL]) if until is None else until
        if until > taken:
            self._taken[name] = until
            self._forecasts.arrived(name, queue.times[taken:until], abs(queue.work[taken:until]))

    def report(self, name: str, wait_cost: float, price_per_gpu_h: float) -> ModelReport:
        """Of one model."""
        model = self.models[name]
        queue, used = model.queue, model.used
        busy, idle = model.busy_gpu_s, model.idle_gpu_s
        gpu_s = _gpu_s(model)
        waited_s = float(queue.f[WAITED_S])
        sums = {
            "requests": int(queue.n[REQUESTS]),
            "cold_requests": int(queue.n[COLD]),
            "cold_starts": int(queue.n[EPISODES]),
            "rejected": int(queue.n[REJECTED]),
            "waited_s": waited_s,
            "cold_waited_s": float(queue.f[COLD_WAITED_S]),
            "gpu_s": gpu_s,
            "starting_gpu_s": used.starting_s,
            "busy_gpu_s": busy,
            "idle_gpu_s": idle,
            "stopping_gpu_s": used.stopping_s,
            "parked_gpu_s": used.parked_s,
            "node_gpu_s": used.node_s,
            "cost": gpu_s / 3600 * price_per_gpu_h,
            "total_cost_gpu_s": gpu_s + wait_cost * waited_s,
            "starts": sum(used.starts.values()),
            "failed_starts": used.failed_starts,
            "cancelled_starts": used.cancelled_starts,
            "prewarms": self.sink.prewarms[name],
            "prewarm_hits": self.sink.hits[name],
            "scale_ups": used.scale_ups,
            "scale_downs": used.scale_downs,
        }
        made = figures(sums, queue.histogram, float(queue.f[LONGEST_S]), int(queue.n[IN_TIME]))
        return ModelReport(name, made, dict(used.starts), wait_histogram=queue.histogram.copy())


def _next_sample_s(now_s: float, step_s: float | None) -> float:
    """Where steps divide an hour they begin with it: a request on the very hour is of the one that begins."""
    if step_s is None:
        return math.inf
    if HOUR_S % step_s:
        return now_s + step_s
    next_s = (math.floor(now_s / step_s) + 1) * step_s
    just_before_s = math.nextafter(next_s, -math.inf)
    return just_before_s if just_before_s > now_s else math.nextafter(next_s + step_s, -math.inf)


def _gpu_s(model: VirtualModel) -> float:
    used = model.used
    held_s = model.busy_gpu_s + model.idle_gpu_s
    return used.starting_s + held_s + used.stopping_s + used.parked_s + used.node_s


__all__ = ["Group", "Limits", "Sample", "Setup"]
