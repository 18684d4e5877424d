"""A trace through the loop and the virtual cluster: nothing is done where nothing happens."""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from autoscaling.core.seen import devices
from autoscaling.core.types import Decision, Spec
from autoscaling.sim import compiled
from autoscaling.sim.arrivals import PIECE, Piece, pieces
from autoscaling.sim.events import ARRIVED
from autoscaling.sim.forecasts import Foresight, NoForecasts, SimForecasts
from autoscaling.sim.group import PATIENCE_S, Group, Sample, Setup
from autoscaling.sim.peers import Alone, Peers
from autoscaling.sim.report import ModelReport, Report, together
from autoscaling.traces import Row, Trace, busiest

FORESEES = frozenset({"predictive", "hybrid-histogram"})
"""Policies that look at the forecast."""
EPOCH_S, SHORTEST_EPOCH_S, EPOCH_SHARE = 6 * 3600.0, 600.0, 0.25
"""How often what the fleet's models have in common is pooled: at first more often, when a quarter more is known.

Live it is every half minute."""


THRESHOLDS = (50_000, 20, 100)
"""Of Python's collector while something is replayed."""

SpecOf = Callable[[str], Spec]


def replay(
    trace: Trace | Iterable[Row],
    specs: Mapping[str, Spec] | SpecOf,
    setup: Setup | None = None,
    *,
    policy: str | None = None,
    forecasts: Foresight | None = None,
    progress: Callable[[float], None] | None = None,
    peers: Peers | None = None,
) -> Report:
    """One policy over a trace.

    Args:
        specs: of each model, or a function that gives one for a model's name. Of a mapping, models that are not in the
            trace are simulated too (they may cost without being asked), and such as are not in it are left out.
        policy: what goes instead of the specs' own.
        forecasts: who forecasts; None: the forecasters that the cluster has.
        progress: called now and then with the virtual time, in Unix seconds.
        peers: who replays the other models of the same trace; the report is of all of them.

    Raises:
        TraceError: for a bad row.
        ValueError: for a policy that there is not.
    """
    return Replay(trace, specs, setup or Setup(), policy, forecasts, progress, peers).run()


@dataclass(frozen=True, slots=True)
class _Part:
    """What one process has to report. Picklable."""

    models: list[ModelReport]
    specs: list[Spec]
    errors: list[str]
    stuck: list[str]
    """Models with requests that were never answered."""
    working: list[str]
    """Models with requests in progress, which the end cut off."""
    large: list[str]
    """Models that were asked and of which no replica fits."""
    timeline: dict[str, tuple[Sample, ...]]
    failures: Mapping[str, str]
    fits: int


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
        peers: Peers | None = None,
    ) -> None:
        self._trace = trace
        self._peers = peers or Alone()
        self._order: dict[str, int] = {}
        self._owner: dict[str, int] = {}
        self._asked = [0] * self._peers.count
        self._given = specs
        self._setup = setup
        self._policy = policy
        self._progress = progress
        self.groups: dict[str, Group] = {}
        self._specs: dict[str, Spec] = {}
        self._one = setup.profile.gpus is not None or setup.profile.parked_engines is not None
        self._left_out: Counter[str] = Counter()
        self._forecasts = forecasts or SimForecasts()

    def run(self) -> Report:
        # The matrices are small: BLAS would only have its other threads wait for each other, busily.
        with threadpool_limits(1, user_api="blas"), _collecting_seldom():
            return self._replayed()

    def _replayed(self) -> Report:
        began_s = time.perf_counter()
        compiled.install()
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
            begin_s = 0.0
            self._begin(begin_s)
        end_s = math.ceil(max(begin_s, last_s))
        while True:
            for group in self.groups.values():
                group.run(end_s, inclusive=True)
            groups = self.groups.values()
            mine = (
                any(group.answers for group in groups),
                max((each.works_s for each in groups), default=-math.inf),
            )
            answers, works_s = map(max, zip(*self._peers.gather(mine), strict=True))
            if not answers:
                break
            # Minute by minute, but over the days of what takes days.
            end_s += 60 * int(max(1, (works_s - PATIENCE_S - end_s) // 60))
        for group in self.groups.values():
            group.close(end_s)
        return self._report(begin_s, end_s, time.perf_counter() - began_s)

    def _epochs(self, whole: Iterator[Piece]) -> Iterator[Piece]:
        """Pieces that are no longer than an epoch, if forecasts are made: the fleet's models then meet at its end."""
        begin_s: float | None = None

        def following(moment_s: float) -> float:
            assert begin_s is not None
            return moment_s + min(EPOCH_S, max(SHORTEST_EPOCH_S, EPOCH_SHARE * (moment_s - begin_s)))

        for piece in whole:
            if not piece.requests or not self._foresees:
                yield piece
                continue
            first_s = min(float(times[0]) for times, _ in piece.requests.values())
            last_s = max(float(times[-1]) for times, _ in piece.requests.values())
            begin_s = first_s if begin_s is None else begin_s
            edge_s = math.ceil(following(first_s))
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
                edge_s = math.ceil(following(edge_s))
            yield Piece(piece.until_s, rest)

    @property
    def _foresees(self) -> bool:
        return self._forecasts.pools and (self._policy is None or self._policy in FORESEES)

    def _begin(self, begin_s: float) -> None:
        if not callable(self._given):
            for name in self._given:
                if self._owner_of(name) == self._peers.index:
                    self._specs[name] = self._spec(name)
            if self._one:
                self.groups[""] = self._group(self._specs, begin_s)
            else:
                for name, spec in self._specs.items():
                    self.groups[name] = self._group({name: spec}, begin_s)

    def _owner_of(self, name: str) -> int:
        """Whose model it is. A new one goes where least has been asked; those that share something stay together.

        All processes read the whole trace, so that they find the same.
        """
        owner = self._owner.get(name)
        if owner is None:
            owner = 0 if self._one else min(range(self._peers.count), key=self._asked.__getitem__)
            self._owner[name] = owner
            self._order[name] = len(self._order)
            self._asked[owner] += 1  # one that is never asked has its ticks too
        return owner

    def _spec(self, name: str) -> Spec:
        spec = self._given(name) if callable(self._given) else self._given[name]
        return spec if self._policy is None else replace(spec, policy=self._policy)

    def _group(self, specs: Mapping[str, Spec], begin_s: float) -> Group:
        foresee = any(spec.policy in FORESEES for spec in specs.values())
        return Group(specs, self._setup, self._forecasts if foresee else NoForecasts(), begin_s)

    def _add(self, piece: Piece, begin_s: float) -> None:
        for name, (times, work) in piece.requests.items():
            if not callable(self._given) and name not in self._given:
                self._left_out[name] += len(times)
                continue
            owner = self._owner_of(name)
            self._asked[owner] += len(times)
            if owner != self._peers.index:
                continue
            if name not in self._specs:
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
        if self._foresees:
            self._forecasts.pool(self._peers, until_s)
        if self._progress is not None:
            self._progress(until_s)

    def _report(self, begin_s: float, end_s: float, took_s: float) -> Report:
        setup = self._setup
        parts = self._peers.gather(self._part())
        place = self._order.__getitem__
        models = sorted((each for part in parts for each in part.models), key=lambda each: place(each.model))
        specs = [spec for part in parts for spec in part.specs]
        costs = {spec.wait_cost for spec in specs}
        kept = {spec.keep_alive_s for spec in specs}
        park = {spec.park for spec in specs}
        policies = {spec.policy for spec in specs}
        params = {tuple(sorted(spec.params.items())) for spec in specs}
        notes = sorted({error for part in parts for error in part.errors})
        stuck = sorted((name for part in parts for name in part.stuck), key=place)
        if stuck:
            notes.append(
                "requests were never answered, for no start was to end within a day; each counts as having waited "
                f"until the end, and a day at least: {', '.join(stuck[:5])}"
            )
        working = sorted((name for part in parts for name in part.working), key=place)
        if working:
            notes.append(f"requests were still in progress at the end: {', '.join(working[:5])}")
        large = sorted({name for part in parts for name in part.large}, key=place)
        if large:
            gpus = {spec.model: devices(spec) for spec in specs}
            takes = ", ".join(f"{name} takes {gpus[name]:g}" for name in large[:5])
            notes.append(f"no replica fits into {setup.profile.gpus:g} GPUs: {takes}")
        if self._left_out:
            count, named = self._left_out.total(), len(self._left_out)
            notes.append(
                f"left out, as the fleet does not have their models: {count:,} of the requests, of "
                f"{named:,} {'model' if named == 1 else 'models'}: {busiest(self._left_out)}"
            )
        failures = {model: error for part in parts for model, error in part.failures.items()}
        notes += [f"no forecast for {model}: {failures[model]}" for model in sorted(failures, key=place)]
        return Report(
            policy=policies.pop() if len(policies) == 1 else "mixed" if policies else "",
            params=dict(params.pop()) if len(params) == 1 else {},
            trace=str(self._trace.path) if isinstance(self._trace, Trace) else "",
            seed=setup.seed,
            wait_cost=costs.pop() if len(costs) == 1 else math.nan,
            keep_alive_s=kept.pop() if len(kept) == 1 else math.nan,
            park=park.pop() if len(park) == 1 else None,
            measured_from_s=begin_s + setup.measure_from_s,
            until_s=end_s,
            total=together(models),
            models=tuple(models),
            timeline={name: samples for part in parts for name, samples in part.timeline.items()},
            took_s=took_s,
            fits=sum(part.fits for part in parts),
            skipped_rows=self._trace.bad if isinstance(self._trace, Trace) else 0,
            notes=tuple(notes),
        )

    def _part(self) -> _Part:
        price = self._setup.profile.price_per_gpu_h
        groups = self.groups
        models = {name: model for group in groups.values() for name, model in group.models.items()}
        return _Part(
            models=[
                group.report(name, self._specs[name].wait_cost, price)
                for group in groups.values()
                for name in group.models
            ],
            specs=list(self._specs.values()),
            errors=[f"{what}: {error}" for group in groups.values() for what, error in group.errors.items()],
            stuck=[name for name, model in models.items() if model.queue.queued],
            working=[name for name, model in models.items() if model.queue.in_flight],
            large=[name for name, model in models.items() if not model.fits and model.queue.n[ARRIVED]],
            timeline={
                name: tuple(samples) for group in groups.values() for name, samples in group.samples.items()
            },
            failures=self._forecasts.failures,
            fits=self._forecasts.fits,
        )

    @property
    def decisions(self) -> list[Decision]:
        """All that were made, if they were kept."""
        return [decision for group in self.groups.values() for decision in group.sink.decisions]


@contextmanager
def _collecting_seldom() -> Iterator[None]:
    """Fewer collections of garbage than by Python's own rule, which goes through all that is imported again and again.

    Next to nothing that a replay makes is in cycles.
    """
    before = gc.get_threshold()
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _until(rows: Iterable[Row], until_s: float) -> Iterator[Row]:
    """Those that begin within so many seconds of the first."""
    first_s: float | None = None
    for row in rows:
        if first_s is None:
            first_s = row.time_s
        if row.time_s >= first_s + until_s:
            return
        yield row


__all__ = ["Group", "Replay", "Sample", "Setup", "replay"]
