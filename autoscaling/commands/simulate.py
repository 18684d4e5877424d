"""`relight simulate` and `compare`: policies on a trace, on a virtual clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoscaling.commands import options, output, replaying
from autoscaling.commands.failures import WRONG, CommandError

if TYPE_CHECKING:
    from autoscaling.sim.compare import Variant
    from autoscaling.sim.report import Report

MOST_MODELS = 20
STEPS_S = (60, 90, 120, 180, 240, 300, 360, 450, 600, 720, 900, 1200, 1800)
"""Of timelines: what divides an hour, so that each step is of one hour."""


def register(app: typer.Typer) -> None:
    from autoscaling.commands import tuning

    app.command("simulate")(simulate)
    app.command("compare")(compare)
    tuning.register(app)


def _policies(incomplete: str) -> list[str]:
    from autoscaling.core.policies import POLICIES
    from autoscaling.sim.compare import EXTRA

    return [name for name in (*POLICIES, *EXTRA) if name.startswith(incomplete)]


Schema = Annotated[
    bool, typer.Option("--schema", help="Print the JSON schema of what --json writes, and do nothing else.")
]


def simulate(
    *,
    trace: replaying.TraceFile = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            help="One of `relight policy list`, oracle or best-fixed. Default: the fleet's own, else predictive.",
            autocompletion=_policies,
        ),
    ] = None,
    set_: replaying.Settings = None,
    fleet: replaying.Fleet = None,
    measure_from: replaying.MeasureFrom = None,
    until: replaying.Until = None,
    seed: replaying.Seed = 0,
    out: replaying.Out = None,
    profile: replaying.ProfileFile = None,
    cold_start: replaying.ColdStart = None,
    scale: replaying.Scale = 1.0,
    window: replaying.WindowLength = None,
    model: replaying.ModelName = None,
    mapping: replaying.Mapping = None,
    skip_bad: replaying.SkipBad = False,
    from_store: replaying.FromStore = None,
    gpu: replaying.Gpu = None,
    price: replaying.Prices = None,
    jobs: replaying.Jobs = None,
    schema: Schema = False,
) -> None:
    """Replay a trace under one policy: what it costs, and how long users wait. Nothing real is started.

    Example: relight simulate last-month.csv.gz --policy predictive --measure-from 10d
    """
    from autoscaling.commands.setups import Given, base_of
    from autoscaling.sim import compare as sim
    from autoscaling.sim.schema import report_schema

    if schema:
        options.print_json(report_schema())
        return
    replaying.writable({"--json": out}, replaying.inputs(trace, from_store, fleet, profile, cold_start))
    settings = replaying.settings(set_)
    source = replaying.source_of(
        trace, from_store, window=window, model=model, mapping=mapping, skip_bad=skip_bad
    )
    given = Given(fleet, profile, cold_start, gpu, tuple(price or ()), seed, scale, measure_from, until)
    with replaying.wrong(), replaying.progress("simulating"):
        base = base_of(source, given)
        if policy is None and base.specs is not None:
            report = sim.as_given(base, settings, processes=jobs)
        else:
            report = sim.simulate(base, sim.Variant(policy or "predictive", settings), processes=jobs)
    if str(out) != "-":
        # Before what may fail.
        _show(report)
    if out is not None:
        replaying.write_json(out, report.to_plain())


def _show(report: Report) -> None:
    models = sorted(report.models, key=lambda each: -each.figures.total_cost_gpu_s)
    rows = [(each.model, each.figures) for each in models[:MOST_MODELS]] if len(models) > 1 else []
    replaying.figures_table("model", [*rows, ("all", report.total)])
    total = report.total
    output.say(
        f"{report.policy}. GPU-seconds: {total.busy_gpu_s:,.0f} busy, {total.idle_gpu_s:,.0f} idle, "
        f"{total.starting_gpu_s:,.0f} starting, {total.stopping_gpu_s:,.0f} stopping, "
        f"{total.parked_gpu_s:,.0f} for parked memory, {total.node_gpu_s:,.0f} for idle nodes. "
        f"Waited in all: {total.waited_s:,.0f} s, "
        f"{total.cold_waited_s:,.0f} s of it by {output.count(total.cold_requests, 'cold request')}. "
        f"Rejected: {total.rejected:,}. Took {report.took_s:.1f} s.",
        style="dim",
    )
    output.say(replaying.reckoned(report), style="dim")
    if report.policy == "best-fixed":
        park = "" if report.park is not False else ", park = 0"
        output.say(f"best-fixed is keep_alive_s = {report.keep_alive_s:g}{park}.", style="dim")
    if len(models) > MOST_MODELS:
        output.say(f"The {MOST_MODELS} costliest of {len(models)} models; --json has all.", style="dim")
    replaying.said([report])


def compare(
    *,
    trace: replaying.TraceFile = None,
    policies: Annotated[
        str,
        typer.Option(help="Names, with commas between them; oracle and best-fixed too."),
    ] = "predictive,keep-alive,reactive,hybrid-histogram,kpa,ray-default,best-fixed,oracle",
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="NAME=A,B,C: each value, for the policies that know the name. May be repeated."),
    ] = None,
    set_: replaying.Settings = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write an HTML file with plots, which needs no network.")
    ] = None,
    jobs: replaying.Jobs = None,
    fleet: replaying.Fleet = None,
    measure_from: replaying.MeasureFrom = None,
    until: replaying.Until = None,
    seed: replaying.Seed = 0,
    out: replaying.Out = None,
    profile: replaying.ProfileFile = None,
    cold_start: replaying.ColdStart = None,
    scale: replaying.Scale = 1.0,
    window: replaying.WindowLength = None,
    model: replaying.ModelName = None,
    mapping: replaying.Mapping = None,
    skip_bad: replaying.SkipBad = False,
    from_store: replaying.FromStore = None,
    gpu: replaying.Gpu = None,
    price: replaying.Prices = None,
    schema: Schema = False,
) -> None:
    """Replay a trace under several policies, on equal terms and in parallel.

    Example: relight compare last-month.csv.gz --policies predictive,keep-alive --sweep keep_alive_s=30,60,300
    """
    from autoscaling.commands.setups import Given, base_of
    from autoscaling.sim import compare as sim
    from autoscaling.sim.schema import comparison_schema
    from autoscaling.sim.shape import describe
    from autoscaling.traces import until as cut

    if schema:
        options.print_json(comparison_schema())
        return
    replaying.writable(
        {"--json": out, "--report": report},
        replaying.inputs(trace, from_store, fleet, profile, cold_start),
    )
    variants = _variants(policies, sweep, replaying.settings(set_))
    source = replaying.source_of(
        trace, from_store, window=window, model=model, mapping=mapping, skip_bad=skip_bad
    )
    given = Given(fleet, profile, cold_start, gpu, tuple(price or ()), seed, scale, measure_from, until)
    with replaying.wrong(), replaying.progress("simulating") as done:
        base, shape = base_of(source, given), None
        for variant in variants:
            sim.check(variant)
        if report is not None:
            shape = describe(cut(sim.rows_of(base.trace), base.setup.until_s), seed, scale)
            base = sim.sampled(base, _step_s(shape.ends_s - shape.begins_s))
        reports = sim.compare(base, variants, processes=jobs, done=done)
    found = [(variant.label_of(each), each) for variant, each in zip(variants, reports, strict=True)]
    shown = str(out) != "-"
    if shown:
        # Before what may fail.
        replaying.figures_table("policy", [(label, each.total) for label, each in found])
        output.say(
            f"total = GPU-seconds + wait_cost * seconds of waiting. {replaying.reckoned(reports[0])}",
            style="dim",
        )
        replaying.said(reports)
    if out is not None:
        replaying.write_json(out, [{"label": label, **each.to_plain()} for label, each in found])
    if report is not None and shape is not None:
        from autoscaling.sim.html import document

        replaying.write(report, document(found, shape, f"Policies on {source.name}"))
        if shown:
            output.say(f"Plots: {report}", style="dim")


def _step_s(lasts_s: float) -> float:
    """So long that a timeline is as long as a line has points, and an hour at most."""
    from autoscaling.sim.plots import MOST_STEPS

    return next((float(step_s) for step_s in STEPS_S if lasts_s <= step_s * MOST_STEPS), 3600.0)


def _variants(policies: str, sweep: Sequence[str] | None, given: dict[str, float]) -> list[Variant]:
    from autoscaling.sim.compare import swept

    sweeps: dict[str, list[float]] = {}
    for text in sweep or ():
        name, sign, listed = text.partition("=")
        try:
            values = [float(value) for value in listed.split(",")]
        except ValueError:
            values = [math.nan]
        if not sign or not name or not all(map(math.isfinite, values)):
            raise CommandError(f"--sweep: {text!r} is not NAME=A,B,C, like keep_alive_s=30,60,300", WRONG)
        sweeps.setdefault(name, []).extend(values)
    sweeps = {name: list(dict.fromkeys(values)) for name, values in sweeps.items()}
    names = [name.strip() for name in policies.split(",") if name.strip()]
    if not names:
        raise CommandError("--policies: name at least one", WRONG)
    found = [variant for name in dict.fromkeys(names) for variant in swept(name, sweeps, given)]
    unused = [name for name in sweeps if not any(name in variant.settings for variant in found)]
    if unused:
        raise CommandError(f"--sweep: none of {policies} has {unused[0]!r}", WRONG)
    return found


__all__ = ["register"]
