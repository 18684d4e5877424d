"""`relight forecast`: what is expected of a model, beside what was, and the replicas that are planned for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from autoscaling.commands import options, output, times
from autoscaling.commands.client import Client, in_path


def register(app: typer.Typer) -> None:
    app.command("forecast")(forecast)


def forecast(
    *,
    model: options.Model,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw history, forecast and planned replicas.")
    ] = False,
    ahead: Annotated[
        str | None,
        typer.Option(help=f"How far ahead: {times.DURATIONS} (default: what the forecast is about)."),
    ] = None,
    back: Annotated[str | None, typer.Option(help="How far back (default: twice as far).")] = None,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """What is expected of a model: its next request, its demand, and what its policy would do about that."""
    answer = Client(address).get(
        f"forecasts/{in_path(model)}",
        ahead_s=options.duration(ahead, "--ahead"),
        last_s=options.duration(back, "--back"),
    )
    if as_json:
        options.print_json(answer)
        return
    said = answer["forecast"]
    if said is None:
        output.say(f"There is no forecast of {answer['model']} yet: too little is known of its traffic.")
    else:
        _say(answer, said)
    if plot:
        _plot(answer)
    else:
        _planned(answer)


def _say(answer: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    age = output.duration(answer["now_s"] - said["made_s"])
    output.say(f"{answer['model']}: by the forecaster {said['forecaster']}, {age} ago")
    arrival = said["next_arrival"]
    if arrival is not None:
        chance = f"{100 * arrival['p_within_ahead']:.0f} %"
        output.say(f"A request within {output.duration(answer['ahead_s'])}: {chance} likely.")
        rows = [(f"{100 * float(share):.0f} %", _in(seconds)) for share, seconds in arrival["in_s"].items()]
        output.table(("chance", "that the next request comes within"), rows)
    if said["demand"]:
        peak = max(said["demand"], key=lambda row: row["rate_per_s"]["0.5"] or 0.0)
        rate = peak["rate_per_s"]
        output.say(
            f"Most is expected at {output.when(peak['start_s'])}: {60 * rate['0.5']:.3g} requests a minute "
            f"(9 of 10 times between {60 * rate['0.05']:.3g} and {60 * rate['0.95']:.3g})."
        )
    for name, value in said["details"].items():
        output.say(f"{name}: {value}", style="dim")


def _in(seconds: float | None) -> str:
    return "(later than the forecast reaches)" if seconds is None else output.duration(seconds)


def _planned(answer: Mapping[str, Any]) -> None:
    rows, before = [], None
    for row in answer["planned"]:
        now = row["replicas"], row["rung"]
        if now != before:
            held = "held" if row["replicas"] is None else row["replicas"]
            rows.append((output.when(row["start_s"]), held, row["rung"], row["reason"]))
        before = now
    if rows:
        output.say("\nPlanned, if what comes is the forecast's median:")
        output.table(("from", "replicas", "rung", "why"), rows, numbers=("replicas",))


def _plot(answer: Mapping[str, Any]) -> None:
    from autoscaling.commands.plot import Band, Line, plot, steps

    now_s = answer["now_s"]
    points = answer["history"]["points"]
    past = Line(
        "history",
        [row["start_s"] for row in points],
        [60 * row["arrivals"] / row["step_s"] for row in points],
    )
    demand = (answer["forecast"] or {}).get("demand") or []
    starts = [row["start_s"] for row in demand]

    def at(quantile: str) -> list[float]:
        return [60 * (row["rate_per_s"][quantile] or 0.0) for row in demand]

    lines = [past, Line("median", starts, at("0.5"))]
    bands = [Band("90 % band", starts, at("0.05"), at("0.95"))] if demand else []
    width = min(120, output.console().width)
    if past.times_s or demand:
        typer.echo(plot("requests a minute", lines, bands, now_s=now_s, width=width))
    planned = [row for row in answer["planned"] if row["replicas"] is not None]
    if planned:
        line = Line("planned", [r["start_s"] for r in planned], [float(r["replicas"]) for r in planned])
        line = steps(line, now_s + answer["ahead_s"])
        typer.echo(plot("planned replicas", [line], width=width, height=9, whole=True))
