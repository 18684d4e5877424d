"""`relight tune`: a policy's parameters, found on one part of a trace and scored on the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoscaling.commands import options, output, replaying, times
from autoscaling.commands.failures import WRONG, CommandError

if TYPE_CHECKING:
    from autoscaling.sim.tune import Tuned


def register(app: typer.Typer) -> None:
    app.command("tune")(tune)


def tune(
    *,
    trace: replaying.TraceFile = None,
    policy: Annotated[
        str,
        typer.Option(
            "--policy", help="One of `relight policy list`.", autocompletion=options.complete_policies
        ),
    ] = "predictive",
    objective: Annotated[
        str, typer.Option(help="total_cost_gpu_s, gpu_s, waited_s or cold_starts: the less the better.")
    ] = "total_cost_gpu_s",
    least_slo: Annotated[
        float | None,
        typer.Option("--slo", help="At least this share of the requests must keep to the SLO.", min=0, max=1),
    ] = None,
    learn_until: Annotated[
        str | None,
        typer.Option(
            help=f"Search before, score after: so long from its beginning (default: two thirds), {times.DURATIONS}."
        ),
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help="Which to search, with commas (default: all).")
    ] = None,
    trials: Annotated[int, typer.Option(help="How many settings to try.", min=1)] = 40,
    write: Annotated[
        Path | None,
        typer.Option("--out", help="Write the policy file there: for `relight policy set MODEL --file`."),
    ] = None,
    jobs: replaying.Jobs = None,
    set_: replaying.Settings = None,
    fleet: replaying.Fleet = None,
    measure_from: replaying.MeasureFrom = None,
    until: replaying.Until = None,
    seed: replaying.Seed = 0,
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
) -> None:
    """Find a policy's parameters on the first part of a trace, and score them on the rest.

    Example: relight tune last-month.csv.gz --learn-until 10d --policy keep-alive --out policy.json
    """
    from autoscaling.commands.setups import Given, base_of
    from autoscaling.sim import tune as tuning

    replaying.writable({"--out": write}, replaying.inputs(trace, from_store, fleet, profile, cold_start))
    settings = replaying.settings(set_)
    names = None if parameters is None else [name.strip() for name in parameters.split(",") if name.strip()]
    if names == []:
        raise CommandError("--parameters: name at least one", WRONG)
    until_s = options.duration(learn_until, "--learn-until")
    source = replaying.source_of(
        trace, from_store, window=window, model=model, mapping=mapping, skip_bad=skip_bad
    )
    given = Given(fleet, profile, cold_start, gpu, tuple(price or ()), seed, scale, measure_from, until)
    with replaying.wrong(), replaying.progress("tuning") as done:
        tuned = tuning.tune(
            base_of(source, given),
            policy,
            until_s,
            measure=objective,
            least_slo=least_slo,
            trials=trials,
            names=names,
            fixed=settings,
            processes=jobs,
            done=done,
        )
    if str(write) != "-":
        # Before what may fail.
        _show(tuned, write)
    if write is not None:
        replaying.write_json(write, tuned.to_plain())


def _show(tuned: Tuned, written: Path | None) -> None:
    found = [(tuned.variant.label, tuned.scored.total)] if tuned.is_found else []
    replaying.figures_table("on the rest", [*found, ("as it was", tuned.scored_default.total)])
    output.say(replaying.reckoned(tuned.scored_default), style="dim")
    if tuned.is_found:
        output.say(
            f"{tuned.measure}: {100 * tuned.saving:+.1f} % saved on what was not learned from; with 90 % confidence "
            f"{100 * tuned.saving_low:+.1f} to {100 * tuned.saving_high:+.1f} %, from {tuned.resampled}."
        )
    if tuned.verdict is not None:
        output.say(tuned.verdict, style="yellow")
    if written is None:
        output.say(json.dumps(tuned.policy_file(), indent=2))
    elif tuned.is_found:
        output.say(
            f"Use it live: relight policy set MODEL --file {written} (or --all); `relight policy validate` checks it.",
            style="dim",
        )
    replaying.said([tuned.scored])


__all__ = ["register"]
