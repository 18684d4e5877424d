"""`relight prewarm`: have a model warm at a time, whatever the policy thinks."""

from __future__ import annotations

from typing import Annotated

import typer

from autoscaling.commands import options, output, times
from autoscaling.commands.client import Client, in_path
from autoscaling.commands.failures import WithDefault

prewarm_app = typer.Typer(
    cls=WithDefault,
    help="Warm a model: `relight prewarm MODEL` now, or --at a time; `list` and `undo` them.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    app.add_typer(prewarm_app, name="prewarm")


@prewarm_app.command("start")
def start(
    *,
    model: options.Model,
    replicas: Annotated[int | None, typer.Option(help="At least so many replicas (default: 1).")] = None,
    rung: options.Rung = "serving",
    for_: Annotated[str, typer.Option("--for", help=f"For how long: {times.DURATIONS}.")] = "15m",
    at: Annotated[
        str | None, typer.Option("--at", help=f"Ready when: {times.TIMES}; now if left out.")
    ] = None,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """Warm a model now, or so that it is ready --at a time. The word `start` may be left out."""
    body = {"model": model, "rung": rung, "for_s": options.duration(for_, "--for")}
    body |= options.given({"replicas": replicas, "start_s": options.moment(at, "--at")})
    answer = Client(address).post("prewarms", body)
    if as_json:
        options.print_json(answer)
    else:
        output.done(answer["prewarm"])


@prewarm_app.command("list")
def list_prewarms(
    model: options.OptionalModel = None,
    since: options.Since = "24h",
    limit: options.Limit = 20,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """Prewarms that were asked for, and what became of all, the controller's own too."""
    answer = Client(address).get("prewarms", model=model, since_s=options.since(since), limit=limit)
    if as_json:
        options.print_json(answer)
        return
    if answer["prewarms"]:
        output.table(
            ("id", "model", "at least", "from", "to", "by"),
            [
                (
                    row["id"],
                    row["model"],
                    output.floor(row["value"]),
                    output.when(row["value"]["start_s"]),
                    output.when(row["value"]["end_s"]),
                    row["who"],
                )
                for row in answer["prewarms"]
            ],
        )
    else:
        output.say("Nobody has asked for a prewarm that is not over.")
    if answer["outcomes"]:
        output.say("\nWhat became of prewarms:")
        output.table(
            ("begun", "model", "why", "what", "cost", "met by a request", "spared"),
            [
                (
                    output.when(row["begun_s"]),
                    row["model"],
                    row["reason"],
                    output.floor(row),
                    output.gpu_s(row["cost_gpu_s"]),
                    _met(row["begun_s"], row["hit_s"], row["ended_s"]),
                    f"{output.count(row['spared_requests'], 'request')} {output.duration(row['spared_wait_s'])}",
                )
                for row in answer["outcomes"]
            ],
            numbers=("cost", "spared"),
        )


def _met(begun_s: float, hit_s: float | None, ended_s: float | None) -> str:
    if hit_s is not None:
        return f"after {output.duration(hit_s - begun_s)}"
    return "not yet" if ended_s is None else "no"


@prewarm_app.command("undo")
def undo(prewarm_id: options.Id, address: options.Address = None, as_json: options.Json = False) -> None:
    """Take a prewarm back."""
    answer = Client(address).delete(f"prewarms/{in_path(prewarm_id)}")
    if as_json:
        options.print_json(answer)
    else:
        output.undone(answer["undone"])
