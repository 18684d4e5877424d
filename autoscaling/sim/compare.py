"""Many policies over one trace, on equal terms, one process for each core."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoscaling.core.policies import POLICIES, wrong_choice
from autoscaling.core.types import Spec
from autoscaling.sim.oracle import Oracle
from autoscaling.sim.replay import Setup, replay
from autoscaling.sim.report import Report
from autoscaling.traces import Row, Trace

ORACLE, BEST_FIXED = "oracle", "best-fixed"
EXTRA = {
    ORACLE: "predictive that knows what will come: the bound",
    BEST_FIXED: "keep-alive with the idle time that was cheapest in hindsight",
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

    @property
    def label(self) -> str:
        """As people see it."""
        shown = ", ".join(f"{name}={value:g}" for name, value in self.settings.items())
        return self.name or (f"{self.policy} ({shown})" if shown else self.policy)

    def applied(self, spec: Spec) -> Spec:
        """The spec with what this variant sets."""
        policy = "predictive" if self.policy == ORACLE else self.policy
        fields = {name: value for name, value in self.settings.items() if name in SPEC_FIELDS}
        params = {name: value for name, value in self.settings.items() if name not in SPEC_FIELDS}
        kept = spec.params if spec.policy == policy else {}
        for name in ("min_replicas", "max_replicas", "priority"):
            if name in fields:
                fields[name] = int(fields[name])
        return replace(spec, policy=policy, params={**kept, **params}, **fields)  # type: ignore[arg-type]


def check(variant: Variant) -> None:
    """Raises SettingError."""
    policy = {ORACLE: "predictive", BEST_FIXED: "keep-alive"}.get(variant.policy, variant.policy)
    if policy not in POLICIES:
        names = sorted([*POLICIES, *EXTRA])
        raise SettingError(f"policy {variant.policy!r} is unknown; there are {', '.join(names)}")
    own = {name: value for name, value in variant.settings.items() if name not in SPEC_FIELDS}
    wrong = wrong_choice(policy, own)
    if wrong is not None:
        raise SettingError(f"{wrong}; of every policy can be set {', '.join(SPEC_FIELDS)}")
    for name in SPEC_FIELDS:
        value = variant.settings.get(name, 1.0)
        least = 1 if name == "max_replicas" else 0
        if value < least or (name == "target_ongoing_requests" and value == 0):
            raise SettingError(f"{name}: {value:g} is too small")


@dataclass(frozen=True)
class Base:
    """What all variants have in common. Picklable."""

    trace: Trace | Sequence[Row]
    setup: Setup
    specs: Mapping[str, Spec] | None = None
    """By model; None: `spec` for every model of the trace."""
    spec: Spec = field(default_factory=lambda: Spec("", wait_cost=10.0, max_replicas=64))


def simulate(base: Base, variant: Variant, progress: Callable[[float], None] | None = None) -> Report:
    """One variant. `best-fixed` is tried with every keep-alive, one after the other.

    Raises:
        TraceError, SettingError.
    """
    check(variant)
    if variant.policy == BEST_FIXED:
        reports = [simulate(base, each) for each in fixed(variant)]
        return min(reports, key=lambda report: report.total.total_cost_gpu_s)
    setup = base.setup
    oracle = (
        Oracle(setup.profile.engine.slowdowns(fixed=False), setup.tick_s)
        if variant.policy == ORACLE
        else None
    )
    if base.specs is None:
        plain = variant.applied(base.spec)
        report = replay(
            base.trace, lambda model: replace(plain, model=model), setup, forecasts=oracle, progress=progress
        )
    else:
        specs = {model: variant.applied(spec) for model, spec in base.specs.items()}
        report = replay(base.trace, specs, setup, forecasts=oracle, progress=progress)
    return dataclasses.replace(report, policy=ORACLE) if oracle is not None else report


def as_given(base: Base, settings: Mapping[str, float] | None = None) -> Report:
    """Every model under its own spec's policy, with what is set for all. Raises TraceError, SettingError."""
    assert base.specs is not None
    specs = {}
    for model, spec in base.specs.items():
        variant = Variant(spec.policy, settings or {})
        check(variant)
        specs[model] = variant.applied(spec)
    return replay(base.trace, specs, base.setup)


def rows_of(trace: Trace | Sequence[Row]) -> Iterable[Row]:
    """In the order of time."""
    return trace.rows() if isinstance(trace, Trace) else trace


def sampled(base: Base, step_s: float) -> Base:
    """The same, with timelines in the reports."""
    return replace(base, setup=replace(base.setup, sample_s=step_s))


def fixed(variant: Variant) -> list[Variant]:
    """Of what `best-fixed` is the best."""
    return [
        Variant("keep-alive", {**variant.settings, "keep_alive_s": float(idle_s)}) for idle_s in KEEP_ALIVES_S
    ]


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
        TraceError, SettingError.
    """
    for variant in variants:
        check(variant)
    jobs = [
        (i, base, each)
        for i, variant in enumerate(variants)
        for each in (fixed(variant) if variant.policy == BEST_FIXED else [variant])
    ]
    found: dict[int, Report] = {}
    for count, (i, report) in enumerate(_run(jobs, processes or len(os.sched_getaffinity(0))), 1):
        best = found.get(i)
        if best is None or report.total.total_cost_gpu_s < best.total.total_cost_gpu_s:
            found[i] = report
        if done is not None:
            done(count, len(jobs))
    return [
        dataclasses.replace(found[i], policy=BEST_FIXED) if variant.policy == BEST_FIXED else found[i]
        for i, variant in enumerate(variants)
    ]


def _run(jobs: list[tuple[int, Base, Variant]], processes: int) -> Iterator[tuple[int, Report]]:
    if processes == 1 or len(jobs) == 1:
        yield from map(_job, jobs)
        return
    # Forked: what is imported and compiled is so once. Nothing here has threads that could hold a lock.
    with multiprocessing.get_context("fork").Pool(min(processes, len(jobs))) as pool:
        yield from pool.imap_unordered(_job, jobs)


def _job(job: tuple[int, Base, Variant]) -> tuple[int, Report]:
    i, base, variant = job
    return i, simulate(base, variant)


def swept(policy: str, sweeps: Mapping[str, Sequence[float]], settings: Mapping[str, float]) -> list[Variant]:
    """A variant for each combination of the swept values that the policy knows; itself if it knows none."""
    known = {param.name for param in POLICIES[policy].params} if policy in POLICIES else set()
    variants = [dict(settings)]
    for name, values in sweeps.items():
        if name in known or (name in SPEC_FIELDS and (name != "keep_alive_s" or policy in _KEEPS)):
            variants = [{**each, name: value} for each in variants for value in values]
    return [Variant(policy, each) for each in variants]


_KEEPS = ("keep-alive", "reactive")
"""Policies that hold to the spec's keep_alive_s."""

__all__ = [
    "BEST_FIXED",
    "EXTRA",
    "ORACLE",
    "Base",
    "SettingError",
    "Variant",
    "check",
    "compare",
    "simulate",
    "swept",
]
