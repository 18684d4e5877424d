"""A trace through the loop and the virtual cluster: nothing is done where nothing happens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from autoscaling.core.budget import Budget
from autoscaling.core.types import Decision, Spec
from autoscaling.loop import Loop
from autoscaling.sim.adapters import SimCluster, SimSink, SimSpecs
from autoscaling.sim.arrivals import PIECE, Piece, pieces
from autoscaling.sim.clock import VirtualClock
from autoscaling.sim.cluster import Pool, VirtualModel
from autoscaling.sim.forecasts import Foresight, NoForecasts, SimForecasts
from autoscaling.sim.profile import Profile
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
from autoscaling.sim.report import ModelReport, Report, figures, together
from autoscaling.traces import Row, Trace

FORESEES = frozenset({"predictive", "hybrid-histogram"})
"""Policies that look at the forecast."""
EPOCH_S = 6 * 3600.0
"""How often what the fleet's models have in common is pooled."""
GRID = 1e-6
"""Share of a tick within which a moment counts as the tick."""


@dataclass(frozen=True)
class Setup:
    """How a trace is replayed."""

    profile: Profile = field(default_factory=Profile)
    seed: int = 0
    tick_s: float = 1.0
    scale: float = 1.0
    measure_from_s: float = 0.0
    """Seconds from the trace's beginning; what comes before is learned from only."""
    until_s: float | None = None
    """Seconds from the trace's beginning; what comes after is not read. None: all of it."""
    follow: bool = True
    """Serve's policy raises above a decision what requests in progress need, as it does live."""
    origin_s: float | None = None
    keep_decisions: bool = False
    sample_s: float | None = None
    """How long the steps of the reports' timelines are; None: there are none."""


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


class Group:
    """Models that share GPUs or memory, under one loop; or a single one that shares nothing."""

    def __init__(self, specs: Mapping[str, Spec], setup: Setup, forecasts: Foresight, begin_s: float) -> None:
        profile = setup.profile
        self._pool = Pool(profile.gpus, profile.parked_engines)
        self.models = {
            name: VirtualModel(spec, profile, self._pool, seed=setup.seed) for name, spec in specs.items()
        }
        self._tick_s = setup.tick_s
        self._forecasts = forecasts
        self._clock = VirtualClock(begin_s)
        self._taken = dict.fromkeys(specs, 0)
        cluster = SimCluster(self.models, self._pool, follow=setup.follow)
        self.sink = SimSink(keep=setup.keep_decisions)
        self._measured = False
        self._measure_s = begin_s + setup.measure_from_s
        self._sample_s = setup.sample_s
        self._sampled_s = math.inf if setup.sample_s is None else begin_s
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
        )
        for name, model in self.models.items():
            model.begin(begin_s)
            forecasts.watch(name, begin_s, max(start.measured_s()[1] for start in profile.starts.values()))
        self._tick(begin_s)

    @property
    def errors(self) -> Mapping[str, str]:
        return self._loop.errors

    @property
    def unanswered(self) -> bool:
        """A request waits or is in progress."""
        return any(model.unanswered for model in self.models.values())

    @property
    def answers(self) -> bool:
        """The same, and something is still to happen."""
        return self.unanswered and math.isfinite(self._next_s())

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
            tick_s = max(self._grid(next_s), self._clock.now_s() + self._tick_s)
            if not self._measured and tick_s > self._measure_s:
                if self._measure_s > until_s:
                    return
                self._measure()
                continue
            if self._sampled_s < min(tick_s, until_s):
                self._sample(self._sampled_s)
                continue
            if tick_s > until_s or (tick_s == until_s and not inclusive):
                return
            for model in self.models.values():
                model.advance(tick_s)
            self._clock.advance(tick_s)
            self._tick(tick_s)

    def close(self, end_s: float) -> None:
        """Whatever is open is charged until then."""
        if not self._measured:
            self._measure()
        for model in self.models.values():
            model.advance(end_s)
            model.close(end_s)
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
            self.samples[name].append(Sample(now_s, *counted))
        self._sampled_s = now_s + (self._sample_s or math.inf)

    def _next_s(self) -> float:
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
        for name in self.models:
            self._learn(name)
            self._forecasts.fit(name, now_s)
        self._loop.tick(now_s)

    def _learn(self, name: str) -> None:
        queue = self.models[name].queue
        taken, until = self._taken[name], int(queue.n[TAIL])
        if until > taken:
            self._taken[name] = until
            self._forecasts.arrived(name, queue.times[taken:until], abs(queue.work[taken:until]))

    def report(self, name: str, wait_cost: float, price_per_gpu_h: float) -> ModelReport:
        """Of one model."""
        model = self.models[name]
        queue, used = model.queue, model.used
        prewarms = [
            p for p in self.sink.prewarms.values() if p.model == name and p.begun_s >= self._measure_s
        ]
        busy, idle = model.busy_gpu_s, model.idle_gpu_s
        gpu_s = used.starting_s + busy + idle + used.parked_s + used.node_s
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
            "parked_gpu_s": used.parked_s,
            "node_gpu_s": used.node_s,
            "cost": gpu_s / 3600 * price_per_gpu_h,
            "total_cost_gpu_s": gpu_s + wait_cost * waited_s,
            "starts": sum(used.starts.values()),
            "failed_starts": used.failed_starts,
            "cancelled_starts": used.cancelled_starts,
            "prewarms": len(prewarms),
            "prewarm_hits": sum(p.hit_s is not None for p in prewarms),
            "scale_ups": used.scale_ups,
            "scale_downs": used.scale_downs,
        }
        made = figures(sums, queue.histogram, float(queue.f[LONGEST_S]), int(queue.n[IN_TIME]))
        return ModelReport(name, made, dict(used.starts), queue.histogram.copy())


SpecOf = Callable[[str], Spec]


def replay(
    trace: Trace | Iterable[Row],
    specs: Mapping[str, Spec] | SpecOf,
    setup: Setup | None = None,
    *,
    policy: str | None = None,
    forecasts: Foresight | None = None,
    progress: Callable[[float], None] | None = None,
) -> Report:
    """One policy over a trace.

    Args:
        specs: of each model, or a function that gives one for a model's name. Of a mapping, models that are not in the
            trace are simulated too (they may cost without being asked), and such as are not in it are left out.
        policy: what goes instead of the specs' own.
        forecasts: who forecasts; None: the forecasters that the cluster has.
        progress: called now and then with the virtual time, in Unix seconds.

    Raises:
        TraceError: for a bad row.
        ValueError: for a policy that there is not.
    """
    return Replay(trace, specs, setup or Setup(), policy, forecasts, progress).run()


class Replay:
    """One replay. Its groups are there to be looked at afterwards."""

    def __init__(  # noqa: PLR0917 - what `replay` was given
        self,
        trace: Trace | Iterable[Row],
        specs: Mapping[str, Spec] | SpecOf,
        setup: Setup,
        policy: str | None = None,
        forecasts: Foresight | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self._trace = trace
        self._given = specs
        self._setup = setup
        self._policy = policy
        self._progress = progress
        self.groups: dict[str, Group] = {}
        self._specs: dict[str, Spec] = {}
        self._one = setup.profile.gpus is not None or setup.profile.parked_engines is not None
        self._left_out: set[str] = set()
        self._forecasts = forecasts or SimForecasts()

    def run(self) -> Report:
        began_s = time.perf_counter()
        setup = self._setup
        rows = self._trace.rows() if isinstance(self._trace, Trace) else iter(self._trace)
        if setup.until_s is not None:
            rows = _until(rows, setup.until_s)
        begin_s: float | None = None
        last_s = -math.inf
        engine = setup.profile.engine
        most = PIECE if self._forecasts.pools else None
        whole = pieces(rows, engine.work_s, setup.seed, setup.scale, setup.origin_s, most)
        for piece in self._epochs(whole):
            if begin_s is None:
                firsts = [float(times[0]) for times, _ in piece.requests.values()]
                begin_s = math.floor(min(firsts, default=0.0))
                self._begin(begin_s)
            self._add(piece, begin_s)
            last_s = max([last_s, *(float(times[-1]) for times, _ in piece.requests.values())])
            if math.isfinite(piece.until_s):
                self._run(piece.until_s)
        if begin_s is None:
            begin_s = last_s = 0.0
            self._begin(begin_s)
        end_s = math.ceil(last_s)
        while True:
            for group in self.groups.values():
                group.run(end_s, inclusive=True)
            if not any(group.answers for group in self.groups.values()):
                break
            end_s += 60
        for group in self.groups.values():
            group.close(end_s)
        return self._report(begin_s, end_s, time.perf_counter() - began_s)

    def _epochs(self, whole: Iterator[Piece]) -> Iterator[Piece]:
        """Pieces that are no longer than an epoch, if forecasts are made: the fleet's models then meet at its end."""
        for piece in whole:
            if not piece.requests or not self._foresees:
                yield piece
                continue
            first_s = min(float(times[0]) for times, _ in piece.requests.values())
            last_s = max(float(times[-1]) for times, _ in piece.requests.values())
            edge_s = (math.floor(first_s / EPOCH_S) + 1) * EPOCH_S
            rest = piece.requests
            while edge_s <= last_s and edge_s < piece.until_s:
                now, later = {}, {}
                for model, (times, work) in rest.items():
                    until = int(times.searchsorted(edge_s))
                    if until:
                        now[model] = (times[:until], work[:until])
                    if until < len(times):
                        later[model] = (times[until:], work[until:])
                yield Piece(edge_s, now)
                rest = later
                edge_s += EPOCH_S
            yield Piece(piece.until_s, rest)

    @property
    def _foresees(self) -> bool:
        return self._forecasts.pools and (self._policy is None or self._policy in FORESEES)

    def _begin(self, begin_s: float) -> None:
        if not callable(self._given):
            for name in self._given:
                self._specs[name] = self._spec(name)
            if self._one:
                self.groups[""] = self._group(self._specs, begin_s)
            else:
                for name, spec in self._specs.items():
                    self.groups[name] = self._group({name: spec}, begin_s)

    def _spec(self, name: str) -> Spec:
        spec = self._given(name) if callable(self._given) else self._given[name]
        return spec if self._policy is None else replace(spec, policy=self._policy)

    def _group(self, specs: Mapping[str, Spec], begin_s: float) -> Group:
        foresee = any(spec.policy in FORESEES for spec in specs.values())
        return Group(specs, self._setup, self._forecasts if foresee else NoForecasts(), begin_s)

    def _add(self, piece: Piece, begin_s: float) -> None:
        for name, (times, work) in piece.requests.items():
            if name not in self._specs:
                if not callable(self._given):
                    self._left_out.add(name)
                    continue
                if self._one:
                    raise ValueError(
                        "models that share GPUs or memory must be named before the replay: give specs by name"
                    )
                self._specs[name] = self._spec(name)
                self.groups[name] = self._group({name: self._specs[name]}, begin_s)
            self.groups["" if self._one else name].feed(name, times, work)

    def _run(self, until_s: float) -> None:
        for group in self.groups.values():
            group.run(until_s)
        if self._forecasts.fits:
            self._forecasts.pool()
        if self._progress is not None:
            self._progress(until_s)

    def _report(self, begin_s: float, end_s: float, took_s: float) -> Report:
        setup = self._setup
        models = tuple(
            group.report(name, self._specs[name].wait_cost, setup.profile.price_per_gpu_h)
            for group in self.groups.values()
            for name in group.models
        )
        policies = {spec.policy for spec in self._specs.values()}
        costs = {spec.wait_cost for spec in self._specs.values()}
        kept = {spec.keep_alive_s for spec in self._specs.values()}
        params = {tuple(sorted(spec.params.items())) for spec in self._specs.values()}
        notes = [f"{what}: {error}" for group in self.groups.values() for what, error in group.errors.items()]
        stuck = [name for name, group in self.groups.items() if group.unanswered]
        if stuck:
            notes.append(
                f"requests were never answered, for nothing was going to start: {', '.join(stuck[:5])}"
            )
        if self._left_out:
            notes.append(f"{len(self._left_out)} models of the trace are not in the fleet and were left out")
        notes += [f"no forecast for {model}: {e}" for model, e in self._forecasts.failures.items()]
        return Report(
            policy=policies.pop() if len(policies) == 1 else "mixed" if policies else "",
            params=dict(params.pop()) if len(params) == 1 else {},
            trace=str(self._trace.path) if isinstance(self._trace, Trace) else "",
            seed=setup.seed,
            wait_cost=costs.pop() if len(costs) == 1 else math.nan,
            keep_alive_s=kept.pop() if len(kept) == 1 else math.nan,
            measured_from_s=begin_s + setup.measure_from_s,
            until_s=end_s,
            total=together(models),
            models=models,
            timeline={
                name: tuple(samples)
                for group in self.groups.values()
                for name, samples in group.samples.items()
            },
            took_s=took_s,
            fits=self._forecasts.fits,
            skipped_rows=self._trace.bad if isinstance(self._trace, Trace) else 0,
            notes=tuple(notes),
        )

    @property
    def decisions(self) -> list[Decision]:
        """All that were made, if they were kept."""
        return [decision for group in self.groups.values() for decision in group.sink.decisions]


def _until(rows: Iterable[Row], until_s: float) -> Iterator[Row]:
    """Those that begin within so many seconds of the first."""
    first_s: float | None = None
    for row in rows:
        if first_s is None:
            first_s = row.time_s
        if row.time_s >= first_s + until_s:
            return
        yield row


__all__ = ["Group", "Replay", "Setup", "replay"]
