"""Many policies over one trace, on equal terms, one process for each core."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from numbers import Real

from autoscaling.core.policies import KEEPS, POLICIES, wrong_choice, wrong_keep
from autoscaling.core.policies.following import IDLE
from autoscaling.core.types import Rung, Spec
from autoscaling.sim.forecasts import Foresight
from autoscaling.sim.oracle import Oracle
from autoscaling.sim.peers import Killed, follow, forking, shared
from autoscaling.sim.replay import Setup, SpecOf, replay
from autoscaling.sim.report import Report, priced
from autoscaling.traces import Row, Source, TraceError, until

ORACLE, BEST_FIXED = "oracle", "best-fixed"
EXTRA = {
    ORACLE: "predictive that knows what will come: the bound",
    BEST_FIXED: "keep-alive with the idle time, and parked engines or none, that were cheapest in hindsight",
}
KEEP_ALIVES_S = (0, 5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 450, 600, 900, 1200, 1800, 3600, 7200, 14400)
SPEC_FIELDS = (
    "wait_cost",
    "min_replicas",
    "max_replicas",
    "target_ongoing_requests",
    "keep_alive_s",
    "gpus_per_replica",
    "priority",
    "park",
)
"""Of a spec, what can be set beside a policy's own parameters."""


class SettingError(ValueError):
    """The message names the setting, its value and what would be right."""


@dataclass(frozen=True)
class Variant:
    """One way to decide."""

    policy: str
    settings: Mapping[str, float] = field(default_factory=dict)
    """Parameters of the policy, and fields of specs."""
    name: str = ""
    unsaid: frozenset[str] = frozenset()
    """Settings that its label leaves out, since all share them."""

    @property
    def label(self) -> str:
        """As people see it."""
        said = {name: value for name, value in self.settings.items() if name not in self.unsaid}
        shown = ", ".join(f"{name}={value:g}" for name, value in said.items())
        return self.name or (f"{self.policy} ({shown})" if shown else self.policy)

    def label_of(self, report: Report) -> str:
        """The same with what only its report tells: which keep-alive was the best, and whether without parking."""
        if self.policy == BEST_FIXED and not self.name:
            settings = {**self.settings, "keep_alive_s": report.keep_alive_s}
            if report.park is False:
                settings["park"] = 0.0
            return dataclasses.replace(self, settings=settings).label
        return self.label

    def applied(self, spec: Spec) -> Spec:
        """The spec with what this variant sets."""
        policy = "predictive" if self.policy == ORACLE else self.policy
        fields = {name: value for name, value in self.settings.items() if name in SPEC_FIELDS}
        params = {name: value for name, value in self.settings.items() if name not in SPEC_FIELDS}
        if self.policy == ORACLE:
            # Who knows what comes needs no time to see that less would do.
            params = {"stable_s": 0.0, **params}
        kept = dict(spec.params) if spec.policy == policy else {}
        if "keep_alive_s" in fields and policy in KEEPS:
            # The parameter goes before the field: what is set here would do nothing.
            kept.pop(IDLE.name, None)
        for name in _WHOLE:
            if name in fields:
                fields[name] = int(fields[name])
        if "park" in fields:
            fields["park"] = bool(fields["park"])
        return replace(spec, policy=policy, params={**kept, **params}, **fields)  # type: ignore[arg-type]


def check(variant: Variant) -> None:
    """Raises SettingError."""
    if text := next((name for name, value in variant.settings.items() if not isinstance(value, Real)), None):
        raise SettingError(f"{text}: {variant.settings[text]!r} is not a number")
    policy = {ORACLE: "predictive", BEST_FIXED: "keep-alive"}.get(variant.policy, variant.policy)
    if policy not in POLICIES:
        names = sorted([*POLICIES, *EXTRA])
        raise SettingError(f"policy {variant.policy!r} is unknown; there are {', '.join(names)}")
    own = {name: value for name, value in variant.settings.items() if name not in SPEC_FIELDS}
    if (wrong := wrong_choice(policy, own)) is not None:
        raise SettingError(f"{wrong}; of every policy can be set {', '.join(SPEC_FIELDS)}")
    for name in SPEC_FIELDS:
        value = variant.settings.get(name, 1.0)
        if not math.isfinite(value):
            raise SettingError(f"{name}: {value:g} is not a finite number")
        if value > MOST.get(name, math.inf):
            raise SettingError(f"{name}: {value:g} is above {MOST[name]:g}")
        if name in _WHOLE and value != int(value):
            raise SettingError(f"{name}: {value:g} is not a whole number")
        if name == "park" and value not in (0, 1):
            raise SettingError(f"park: {value:g} is neither 0 nor 1")
        if name in _ABOVE_ZERO and value <= 0:
            raise SettingError(f"{name}: {value:g} must be above 0")
        if value < 0 and name != "priority":
            raise SettingError(f"{name}: {value:g} must not be negative")
    _check_idle(variant, policy)


def _check_idle(variant: Variant, policy: str) -> None:
    for name in SAME:
        if variant.policy == BEST_FIXED and name in variant.settings:
            raise SettingError(f"{name}: best-fixed finds it; set it for keep-alive")
    if (wrong := wrong_keep(policy, variant.settings, variant.settings.get("keep_alive_s"))) is not None:
        raise SettingError(str(wrong))


MOST = {"wait_cost": 1e12, "max_replicas": 1e5, "gpus_per_replica": 1e5}
"""What nobody means, and what follows from it ends in infinite sums, or never."""
_WHOLE = ("min_replicas", "max_replicas", "priority")
_ABOVE_ZERO = ("max_replicas", "target_ongoing_requests", "gpus_per_replica")


@dataclass(frozen=True)
class Base:
    """What all variants have in common. Picklable."""

    trace: Source | Sequence[Row]
    setup: Setup = field(default_factory=Setup)
    specs: Mapping[str, Spec] | None = None
    """By model; None: `spec` for every model of the trace."""
    spec: Spec = field(default_factory=lambda: Spec("", wait_cost=10.0, max_replicas=64))
    prices: Mapping[str, float] = field(default_factory=dict)
    """What a GPU costs an hour, of models that it does not cost what the profile says."""
    notes: tuple[str, ...] = ()
    """What the reader of every report should know."""

    def __post_init__(self) -> None:
        """Raises TypeError for a trace that can't be read again and again."""
        given: object = self.trace
        if isinstance(given, str) or not (isinstance(given, Sequence) or hasattr(given, "rows")):
            raise TypeError(
                f"trace: {type(given).__name__!r} is neither a source (`open_source`) nor a list of rows; what can be "
                "read once only, as `generate` gives it, must be made a list"
            )

    def spec_of(self, model: str) -> Spec:
        """As given, before any variant."""
        return self.spec if self.specs is None else self.specs[model]


def simulate(
    base: Base,
    variant: Variant,
    progress: Callable[[float], None] | None = None,
    *,
    processes: int | None = 1,
) -> Report:
    """One variant. `best-fixed` is tried with every keep-alive, and without parking.

    Args:
        processes: that share the models among them, and come to the same result as one. None: as many as cores.

    Raises:
        TraceError: for a bad row, or a trace of which nothing is scored.
        SettingError.
    """
    check(variant)
    if variant.policy == BEST_FIXED:
        return _best(compare(base, fixed(variant, base), processes=processes))
    setup = base.setup
    oracle = (
        Oracle(setup.profile.engine.slowdowns(), setup.tick_s, acts_s=setup.profile.applies_s)
        if variant.policy == ORACLE
        else None
    )
    specs: Mapping[str, Spec] | SpecOf
    if base.specs is None:
        plain = _bounded(variant.applied(base.spec))
        specs, unheeded = partial(_named, plain), _unheeded(variant.settings, [plain])
    else:
        specs = {model: _bounded(variant.applied(spec)) for model, spec in base.specs.items()}
        unheeded = _unheeded(variant.settings, list(specs.values()))
    report = _replayed(base, specs, processes, oracle, progress)
    if oracle is not None:
        report = dataclasses.replace(report, policy=ORACLE)
    return _finished(dataclasses.replace(report, notes=(*report.notes, *unheeded)), base)


def _unheeded(settings: Mapping[str, float], specs: Sequence[Spec]) -> list[str]:
    """A note of a keep_alive_s that was set, and by which none of the policies goes."""
    heeded = any(holds_to_keep_alive(spec.policy, spec.params) for spec in specs)
    if "keep_alive_s" not in settings or heeded:
        return []
    return [
        f"keep_alive_s={settings['keep_alive_s']:g} changes nothing under "
        f"{', '.join(dict.fromkeys(spec.policy for spec in specs))}: {' and '.join(KEEPS)} go by it, and predictive "
        "with keep_alive_bound=1"
    ]


def _named(plain: Spec, model: str) -> Spec:
    return replace(plain, model=model)


def as_given(base: Base, settings: Mapping[str, float] | None = None, *, processes: int | None = 1) -> Report:
    """Every model under its own spec's policy, with what is set for all. Raises TraceError, SettingError."""
    specs = {}
    for model, spec in (base.specs or {}).items():
        variant = Variant(spec.policy, settings or {})
        check(variant)
        specs[model] = _bounded(variant.applied(spec))
    report = _replayed(base, specs, processes)
    unheeded = _unheeded(settings or {}, list(specs.values()))
    return _finished(dataclasses.replace(report, notes=(*report.notes, *unheeded)), base)


def _replayed(
    base: Base,
    specs: Mapping[str, Spec] | SpecOf,
    processes: int | None,
    forecasts: Foresight | None = None,
    progress: Callable[[float], None] | None = None,
) -> Report:
    processes = processes or len(os.sched_getaffinity(0))
    if processes > 1:
        processes = min(processes, _apart(base))
    return shared(
        lambda peers: replay(
            rows_of(base.trace), specs, base.setup, forecasts=forecasts, progress=progress, peers=peers
        ),
        processes,
    )


LOOKED_AT = 10_000


def _apart(base: Base) -> int:
    """How many models have nothing to do with each other, as far as the beginning of the trace shows."""
    if base.setup.profile.gpus is not None or base.setup.profile.parked_engines is not None:
        return 1
    models: set[str] = set()
    for row in islice(rows_of(base.trace), LOOKED_AT):
        models.add(row.model)
    return max(1, len(models))


def _bounded(spec: Spec) -> Spec:
    of = f" of {spec.model}" if spec.model else ""
    for name, most in MOST.items():
        value = getattr(spec, name)
        if value > most:
            raise SettingError(f"{name}{of}: {value:g} is above {most:g}")
    if spec.min_replicas > spec.max_replicas:
        raise SettingError(
            f"min_replicas{of}: {spec.min_replicas} is above max_replicas, {spec.max_replicas}"
        )
    return spec


def _best(reports: Iterable[Report]) -> Report:
    report = min(reports, key=lambda each: (each.total.total_cost_gpu_s, each.keep_alive_s))
    return dataclasses.replace(report, policy=BEST_FIXED)


def _finished(report: Report, base: Base) -> Report:
    """With what the replay itself is not told."""
    setup, source = base.setup, base.trace
    if report.total.requests == 0:
        raise TraceError(f"{name_of(source)}: {_why_nothing(report, base)}")
    return priced(
        dataclasses.replace(
            report,
            trace="" if isinstance(source, Sequence) else source.name,
            skipped_rows=0 if isinstance(source, Sequence) else source.bad,
            notes=(*report.notes, *notes_of(source), *base.notes),
            scale=setup.scale,
            slo_s=setup.profile.slo_s,
            price_per_gpu_h=setup.profile.price_per_gpu_h,
        ),
        base.prices,
    )


def _why_nothing(report: Report, base: Base) -> str:
    first = next(iter(rows_of(base.trace)), None)
    if first is None:
        return "; ".join(["it holds no requests", *notes_of(base.trace)])
    if not any(row.requests for row in until(rows_of(base.trace), base.setup.until_s)):
        return "it holds no requests: every count is 0"
    if base.specs is not None and not any(row.model in base.specs for row in rows_of(base.trace)):
        return f"none of its models is in the fleet, which has {', '.join(base.specs)}; its first is {first.model!r}"
    if base.setup.measure_from_s > 0:
        lasts_s = report.until_s - (report.measured_from_s - base.setup.measure_from_s)
        return (
            f"nothing comes {base.setup.measure_from_s:,.0f} s after its beginning; it lasts {lasts_s:,.0f} s"
        )
    return f"no requests are left of it at a scale of {base.setup.scale:g}"


def rows_of(trace: Source | Sequence[Row]) -> Iterable[Row]:
    """In the order of time."""
    return trace if isinstance(trace, Sequence) else trace.rows()


def notes_of(trace: Source | Sequence[Row]) -> Sequence[str]:
    """Of its last reading."""
    return () if isinstance(trace, Sequence) else trace.notes


def name_of(trace: Source | Sequence[Row]) -> str:
    """As people see it."""
    return "the trace" if isinstance(trace, Sequence) else trace.name


def sampled(base: Base, step_s: float) -> Base:
    """The same, with timelines in the reports. Steps that divide an hour begin with it."""
    return replace(base, setup=replace(base.setup, sample_s=step_s))


def fixed(variant: Variant, base: Base) -> list[Variant]:
    """Of what `best-fixed` is the best: keep-alives, with the engines parked that are, and with none.

    A fixed policy parks an engine for as long as its model is dark, and pays for it, however seldom that is asked.
    """
    ways: list[Mapping[str, float]] = [variant.settings]
    if "park" not in variant.settings and _parks(base):
        ways.append({**variant.settings, "park": 0.0})
    return [
        Variant("keep-alive", {**way, "keep_alive_s": float(idle_s)})
        for way in ways
        for idle_s in KEEP_ALIVES_S
    ]


def _parks(base: Base) -> bool:
    profile = base.setup.profile
    specs = [base.spec] if base.specs is None else base.specs.values()
    return (
        Rung.PARKED in profile.starts
        and profile.base != Rung.PARKED
        and profile.parked_engines != 0
        and any(spec.park for spec in specs)
    )


def compare(
    base: Base,
    variants: Sequence[Variant],
    *,
    processes: int | None = None,
    done: Callable[[int, int], None] | None = None,
) -> list[Report]:
    """A report for each variant, in their order.

    Args:
        processes: None: as many as cores; 1 stays in this one.
        done: called with (how many, of how many) are through.

    Raises:
        TraceError, SettingError, Killed.
    """
    for variant in variants:
        check(variant)
    jobs = [
        (i, base, each)
        for i, variant in enumerate(variants)
        for each in (fixed(variant, base) if variant.policy == BEST_FIXED else [variant])
    ]
    found: dict[int, list[Report]] = {}
    for count, (i, report) in enumerate(_run(jobs, processes or len(os.sched_getaffinity(0))), 1):
        found.setdefault(i, []).append(report)
        if done is not None:
            done(count, len(jobs))
    return [
        _best(found[i]) if variant.policy == BEST_FIXED else found[i][0] for i, variant in enumerate(variants)
    ]


def _run(jobs: list[tuple[int, Base, Variant]], processes: int) -> Iterator[tuple[int, Report]]:
    if processes == 1 or len(jobs) == 1:
        for i, base, variant in jobs:
            yield i, simulate(base, variant, processes=processes)
        return
    # Forked: what is imported and compiled is so once. Nothing here has threads that could hold a lock.
    before = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        min(processes, len(jobs)), multiprocessing.get_context("fork"), initializer=follow
    )
    try:
        with forking():
            submitted = [pool.submit(_job, job) for job in jobs]
        for done in as_completed(submitted):
            yield done.result()
    except BrokenProcessPool:
        raise Killed from None
    finally:
        # Whoever is interrupted does not wait for what is being replayed.
        for child in multiprocessing.active_children():
            if child not in before:
                child.terminate()
        pool.shutdown(cancel_futures=True)


def _job(job: tuple[int, Base, Variant]) -> tuple[int, Report]:
    i, base, variant = job
    return i, simulate(base, variant)


def swept(policy: str, sweeps: Mapping[str, Sequence[float]], settings: Mapping[str, float]) -> list[Variant]:
    """A variant for each combination of the swept values that the policy knows; itself if it knows none."""
    known = {param.name for param in POLICIES[policy].params} if policy in POLICIES else set()
    bounds = [*sweeps.get("keep_alive_bound", ()), settings.get("keep_alive_bound", 0.0)]
    keeps = any(holds_to_keep_alive(policy, {"keep_alive_bound": bound}) for bound in bounds)
    variants = [dict(settings)]
    for name, values in sweeps.items():
        if name in known or (name in SPEC_FIELDS and (name != "keep_alive_s" or keeps)):
            variants = [{**each, name: value} for each in variants for value in values]
    return [Variant(policy, each, unsaid=frozenset(settings) - frozenset(sweeps)) for each in variants]


def holds_to_keep_alive(policy: str, params: Mapping[str, float]) -> bool:
    """Whether it goes by the spec's keep_alive_s."""
    return policy in KEEPS or (policy == "predictive" and params.get("keep_alive_bound", 0.0) >= 0.5)


SAME = {"keep_alive_s": IDLE.name, IDLE.name: "keep_alive_s"}
"""What says the same to them as another: only one of them can be set."""

__all__ = [
    "BEST_FIXED",
    "EXTRA",
    "KEEPS",
    "ORACLE",
    "SAME",
    "Base",
    "SettingError",
    "Variant",
    "check",
    "compare",
    "simulate",
    "swept",
]
