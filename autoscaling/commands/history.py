"""`relight history`: traffic that was, and traffic from elsewhere taken in."""

from __future__ import annotations

from typing import Annotated

import typer

from autoscaling.commands import options, output, times
from autoscaling.commands.client import Client
from autoscaling.commands.failures import WithDefault

history_app = typer.Typer(
    cls=WithDefault,
    help="Traffic of a model: `relight history MODEL`; `import` takes it in from a trace or an access log.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    from autoscaling.commands import importing

    importing.register(history_app)
    app.add_typer(history_app, name="history")


@history_app.command("show")
def show(
    *,
    model: options.Model,
    since: options.Since = "24h",
    step: Annotated[
        str | None,
        typer.Option(help=f"How long each row is: {times.DURATIONS} (default: some hundred rows)."),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw it.")] = False,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """Requests, tokens and waiting over time. The word `show` may be left out."""
    answer = Client(address).get(
        "history", model=model, since_s=options.since(since), step_s=options.duration(step, "--step")
    )
    if as_json:
        options.print_json(answer)
        return
    points = answer["points"]
    if not points:
        output.say(f"Nothing is known of {answer['model']} since {output.when(answer['since_s'])}.")
        return
    if plot:
        from autoscaling.commands.plot import Line
        from autoscaling.commands.plot import plot as draw

        rates = [60 * row["arrivals"] / row["step_s"] for row in points]
        line = Line("requests a minute", [row["start_s"] for row in points], rates)
        typer.echo(draw(answer["model"], [line], width=min(120, output.console().width)))
        return
    rows = [
        (
            output.when(row["start_s"]),
            f"{row['arrivals']:g}",
            f"{row['input_tokens']:g}",
            f"{row['output_tokens']:g}",
            f"{row['busy_s'] / row['step_s']:.2f}",
            output.duration(row["waited_s"]),
        )
        for row in points
        if row["arrivals"] or row["busy_s"] or row["waited_s"]
    ]
    columns = ("from", "requests", "input tokens", "output tokens", "in progress", "waited")
    output.table(columns, rows, numbers=columns[1:])
    quiet = len(points) - len(rows)
    step_s = points[-1]["step_s"]
    output.say(f"steps of {output.duration(step_s)}; {quiet} quiet ones left out", style="dim")
