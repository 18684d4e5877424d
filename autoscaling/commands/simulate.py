"""`relight simulate`, `compare` and `tune`: policies on a trace, on a virtual clock."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoscaling.commands import options, output, replaying
from autoscaling.commands.failures import WRONG, CommandError

if TYPE_CHECKING:
    from autoscaling.sim.compare import Variant

MOST_MODELS = 20
SAMPLES = 400


def register(app: typer.Typer) -> None:
    app.command("simulate")(simulate)
    app.command("compare")(compare)
    app.command("tune")(tune)


def _policies(incomplete: str) -> list[str]:
    from autoscaling.core.policies import POLICIES
    from autoscaling.sim.compare import EXTRA

    return [name for name in (*POLICIES, *EXTRA) if name.startswith(incomplete)]


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
    fleet: replaying.Fleet = None,
    set_: replaying.Settings = None,
    measure_from: replaying.MeasureFrom = None,
    seed: replaying.Seed = 0,
    out: replaying.Out = None,
    profile: replaying.ProfileFile = None,
    cold_start: replaying.ColdStart = None,
    scale: replaying.Scale = 1.0,
    window: replaying.WindowLength = None,
    model: replaying.ModelName = None,
    skip_bad: replaying.SkipBad = False,
    from_store: replaying.FromStore = None,
    gpu: replaying.Gpu = None,
) -> None:
    """Replay a trace under one policy: what it costs, and how long users wait. Nothing real is started.

    Example: relight simulate last-month.csv.gz --policy predictive --measure-from 10d
    """
    from autoscaling.sim import compare as sim
    from autoscaling.sim.compare import Variant

    rows = replaying.trace_of(trace, from_store, window=window, model=model, skip_bad=skip_bad)
    base = replaying.base_of(
        rows, fleet, profile, cold_start, gpu, seed=seed, scale=scale, measure_from=measure_from
    )
    given = replaying.settings(set_)
    with replaying.wrong(), replaying.progress("simulating"):
        if policy is None and base.specs is not None:
            report = sim.as_given(base, given)
        else:
            report = sim.simulate(base, Variant(policy or "predictive", given))
    if out is not None:
        _write(out, report.to_plain())
        if str(out) == "-":
            return
    models = sorted(report.models, key=lambda each: -each.figures.total_cost_gpu_s)
    rows_shown = [(each.model, each.figures) for each in models[:MOST_MODELS]] if len(models) > 1 else []
    replaying.figures_table("model", [*rows_shown, ("all", report.total)])
    total = report.total
    output.say(
        f"GPU-seconds: {total.busy_gpu_s:,.0f} busy, {total.idle_gpu_s:,.0f} idle, "
        f"{total.starting_gpu_s:,.0f} starting, "
        f"{total.parked_gpu_s:,.0f} for parked memory, {total.node_gpu_s:,.0f} for idle nodes. Waited in all: "
        f"{total.waited_s:,.0f} s, {total.cold_waited_s:,.0f} of it for cold starts. Rejected: {total.rejected:,}. "
        f"{report.took_s:.1f} s.",
        style="dim",
    )
    if len(models) > MOST_MODELS:
        output.say(f"The {MOST_MODELS} costliest of {len(models)} models; --json has all.", style="dim")
    replaying.said(report)


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
    jobs: Annotated[int | None, typer.Option(help="Processes (default: one a core).", min=1)] = None,
    fleet: replaying.Fleet = None,
    measure_from: replaying.MeasureFrom = None,
    seed: replaying.Seed = 0,
    out: replaying.Out = None,
    profile: replaying.ProfileFile = None,
    cold_start: replaying.ColdStart = None,
    scale: replaying.Scale = 1.0,
    window: replaying.WindowLength = None,
    model: replaying.ModelName = None,
    skip_bad: replaying.SkipBad = False,
    from_store: replaying.FromStore = None,
    gpu: replaying.Gpu = None,
) -> None:
    """Replay a trace under several policies, on equal terms and in parallel.

    Example: relight compare last-month.csv.gz --policies predictive,keep-alive --sweep keep_alive_s=30,60,300
    """
    from autoscaling.sim import compare as sim
    from autoscaling.sim.shape import describe

    rows = replaying.trace_of(trace, from_store, window=window, model=model, skip_bad=skip_bad)
    base = replaying.base_of(
        rows, fleet, profile, cold_start, gpu, seed=seed, scale=scale, measure_from=measure_from
    )
    variants = _variants(policies, sweep, replaying.settings(set_))
    with replaying.wrong():
        shape = None
        if report is not None:
            shape = describe(sim.rows_of(base.trace), seed, scale)
            base = sim.sampled(base, max(60.0, (shape.ends_s - shape.begins_s) / SAMPLES))
        with replaying.progress("simulating") as done:
            reports = sim.compare(base, variants, processes=jobs, done=done)
    found = [(variant.label, each) for variant, each in zip(variants, reports, strict=True)]
    if report is not None and shape is not None:
        from autoscaling.sim.html import document

        report.write_text(document(found, shape, f"Policies on {trace or from_store}"), encoding="utf-8")
    if out is not None:
        _write(out, [{"label": label, **each.to_plain()} for label, each in found])
        if str(out) == "-":
            return
    replaying.figures_table("policy", [(label, each.total) for label, each in found])
    best = [each for label, each in found if each.policy == sim.BEST_FIXED]
    for each in best:
        output.say(f"best-fixed is keep_alive_s = {each.keep_alive_s:g}.", style="dim")
    output.say("total = GPU-seconds + wait_cost * seconds of waiting.", style="dim")
    if report is not None:
        output.say(f"Plots: {report}", style="dim")
    replaying.said(found[0][1])


def _variants(policies: str, sweep: Sequence[str] | None, given: dict[str, float]) -> list[Variant]:
    from autoscaling.sim.compare import swept

    sweeps: dict[str, list[float]] = {}
    for text in sweep or ():
        name, sign, values = text.partition("=")
        try:
            sweeps[name] = [float(value) for value in values.split(",")]
        except ValueError:
            sign = ""
        if not sign or not name:
            raise CommandError(f"--sweep: {text!r} is not NAME=A,B,C, like keep_alive_s=30,60,300", WRONG)
    names = [name.strip() for name in policies.split(",") if name.strip()]
    if not names:
        raise CommandError("--policies: name at least one", WRONG)
    found = [variant for name in names for variant in swept(name, sweeps, given)]
    unused = [name for name in sweeps if not any(name in variant.settings for variant in found)]
    if unused:
        raise CommandError(f"--sweep: none of {policies} has {unused[0]!r}", WRONG)
    return found


def tune(
    *,
    trace: replaying.TraceFile = None,
    learn_until: Annotated[
        str,
        typer.Option(
            help="Search on the trace until then, score on the rest: a duration from its beginning."
        ),
    ],
    policy: Annotated[
        str, typer.Option("--policy", help="One of `relight policy list`.", autocompletion=_policies)
    ] = "predictive",
    objective: Annotated[
        str, typer.Option(help="total_cost_gpu_s, gpu_s, waited_s or cold_starts: the less the better.")
    ] = "total_cost_gpu_s",
    least_slo: Annotated[
        float | None,
        typer.Option("--slo", help="At least this share of the requests must keep to the SLO.", min=0, max=1),
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help="Which to search, with commas (default: all).")
    ] = None,
    trials: Annotated[int, typer.Option(help="How many settings to try.", min=1)] = 40,
    write: Annotated[Path | None, typer.Option("--out", help="Write the policy file there.")] = None,
    set_: replaying.Settings = None,
    fleet: replaying.Fleet = None,
    seed: replaying.Seed = 0,
    profile: replaying.ProfileFile = None,
    cold_start: replaying.ColdStart = None,
    scale: replaying.Scale = 1.0,
    window: replaying.WindowLength = None,
    model: replaying.ModelName = None,
    skip_bad: replaying.SkipBad = False,
    from_store: replaying.FromStore = None,
    gpu: replaying.Gpu = None,
) -> None:
    """Find a policy's parameters on the first part of a trace, and score them on the rest.

    Example: relight tune last-month.csv.gz --learn-until 10d --policy keep-alive --out policy.json
    """
    from autoscaling.sim import tune as tuning

    rows = replaying.trace_of(trace, from_store, window=window, model=model, skip_bad=skip_bad)
    base = replaying.base_of(rows, fleet, profile, cold_start, gpu, seed=seed, scale=scale, measure_from=None)
    until_s = options.duration(learn_until, "--learn-until")
    assert until_s is not None
    with replaying.wrong(), replaying.progress("tuning") as done:
        tuned = tuning.tune(
            base,
            policy,
            until_s,
            measure=objective,
            least_slo=least_slo,
            trials=trials,
            names=[name.strip() for name in parameters.split(",")] if parameters else None,
            fixed=replaying.settings(set_),
            done=done,
        )
    found = tuned.to_plain()
    if write is not None:
        write.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    replaying.figures_table(
        "on the rest", [(tuned.variant.label, tuned.scored.total), ("defaults", tuned.scored_default.total)]
    )
    output.say(
        f"{objective}: {100 * tuned.saving:+.1f} % saved on what was not learned from, 90 % interval "
        f"{100 * tuned.saving_low:+.1f} to {100 * tuned.saving_high:+.1f} % over models."
    )
    if tuned.saving_low <= 0:
        output.say("That is no more than chance may give: keep the defaults.", style="yellow")
    elif write is None:
        output.say(json.dumps(found, indent=2))


def _write(path: Path, data: Any) -> None:
    text = json.dumps(data, indent=2, allow_nan=False)
    if str(path) == "-":
        typer.echo(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")
