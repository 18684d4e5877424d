"""The `relight` command line: parse, call, print. What a command does lives in the module that it calls.

Exit codes are those of `autoscaling.commands.failures`. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoscaling.commands import (
    accounts,
    cluster,
    forecast,
    history,
    mode,
    nodes,
    policy,
    prewarm,
    record,
    schedule,
    simulate,
    status,
    trace,
)
from autoscaling.commands.failures import EXIT_CODES, Commands

if TYPE_CHECKING:
    from deployments.fleet import Fleet

app = typer.Typer(
    name="relight",
    cls=Commands,
    help="Serverless GPU inference on your own Ray cluster.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
)
fleet_app = typer.Typer(help="Check and describe fleet files.", no_args_is_help=True)
status.register(app)
cluster.register(app)
app.add_typer(fleet_app, name="fleet")
for command in (policy, prewarm, schedule, forecast, history, record, accounts, mode, nodes, simulate, trace):
    command.register(app)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]


def main() -> None:
    """Entry point. What goes wrong in a command becomes one message and an exit code in `Commands`."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"relight {version('relight')}")
        raise typer.Exit


@app.callback()
def relight(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Keep models dark at zero replicas, and light them before, or seconds after, somebody asks."""


@fleet_app.command("validate")
def fleet_validate(
    file: Annotated[Path, typer.Argument(help="The fleet file.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Check a fleet file and list its models; with --json all that it says, every default filled in."""
    from deployments.fleet import load_fleet

    fleet = load_fleet(file)
    if as_json:
        typer.echo(fleet.model_dump_json(indent=2))
    else:
        _print_fleet(fleet, str(file))


@fleet_app.command("schema")
def fleet_schema() -> None:
    """Print the JSON schema of fleet files, for editors."""
    from deployments.fleet import fleet_json_schema

    typer.echo(json.dumps(fleet_json_schema(), indent=2))


def _print_fleet(fleet: Fleet, title: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from autoscaling.commands.output import console

    table = Table(title=Text(title), title_justify="left")
    for column in ("model", "aliases", "source", "gpus", "replicas", "keep alive"):
        table.add_column(column, overflow="fold", justify="right" if column == "gpus" else "left")
    for model in fleet.models:
        scaling = model.scaling
        cells = (
            model.id,
            ", ".join(model.aliases),
            model.source,
            " ".join([str(model.resources.gpus), *model.resources.accelerator_types]),
            f"{scaling.min_replicas} to {scaling.max_replicas}",
            f"{scaling.keep_alive_s:g} s",
        )
        # Text, because a name in square brackets would be read as markup.
        table.add_row(*(Text(cell) for cell in cells))
    console().print(table)


if __name__ == "__main__":
    main()
