"""`relight schedule`: have models warm by the clock, again and again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from autoscaling.commands import options, output, times
from autoscaling.commands.client import Client, in_path
from autoscaling.commands.failures import WRONG, CommandError

schedule_app = typer.Typer(help="Have models warm by the clock.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(schedule_app, name="schedule")


@schedule_app.command()
def add(
    *,
    model: Annotated[
        str | None, typer.Argument(help="The model, by its id.", autocompletion=options._models)
    ] = None,
    cron: Annotated[
        str, typer.Option("--cron", help="When it begins: five fields of cron, like '0 9 * * MON-FRI'.")
    ],
    lasting: Annotated[str, typer.Option("--for", help=f"How long each time: {times.DURATIONS}.")],
    timezone: Annotated[
        str | None, typer.Option(help="On whose clock, like Europe/Berlin (default: this machine's).")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="At least so many replicas (default: 1).")] = None,
    rung: options.Rung = "serving",
    until: options.Until = None,
    everything: Annotated[bool, typer.Option("--all", help="For every model, in place of one.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check it and show its next times.")
    ] = False,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """Add a schedule. It may pass midnight; it goes by the wall clock also when that changes to summer time."""
    if (model is None) != everything:
        raise CommandError("Name one model, or give --all for every model.", WRONG)
    zone = timezone or times.zone_name(times.local_zone())
    if zone is None:
        raise CommandError(
            "--timezone: this machine's own can't be told by name (from TZ, /etc/localtime or /etc/timezone), and a "
            "schedule needs one; give one like Europe/Berlin",
            WRONG,
        )
    body = {"cron": cron, "duration_s": options.duration(lasting, "--for"), "timezone": zone, "rung": rung}
    body |= options.given({"model": model, "replicas": replicas, "until_s": options.moment(until, "--until")})
    answer = Client(address).post("schedules", body, dry_run=1 if dry_run else None)
    if as_json:
        options.print_json(answer)
        return
    if answer["schedule"]:
        output.done(answer["schedule"])
    for span in answer["next"]:
        if span["end_s"] is None:
            output.say("It is always in force: each time begins before the one before it has ended.")
        else:
            output.say(f"next: {output.when(span['start_s'])} to {output.when(span['end_s'])}")


@schedule_app.command("list")
def list_schedules(
    model: options.OptionalModel = None, address: options.Address = None, as_json: options.Json = False
) -> None:
    """Schedules set at run time, and the windows of all (the fleet file's too) within two days."""
    answer = Client(address).get("schedules", model=model)
    if as_json:
        options.print_json(answer)
        return
    if answer["schedules"]:
        output.table(
            ("id", "model", "cron", "for", "timezone", "at least", "by", "until"),
            [
                (
                    row["id"],
                    row["model"] or "(all)",
                    row["value"]["cron"],
                    output.duration(row["value"]["duration_s"]),
                    row["value"]["timezone"],
                    output.floor(row["value"]),
                    row["who"],
                    output.when(row["until_s"]),
                )
                for row in answer["schedules"]
            ],
        )
    else:
        output.say("No schedule was set at run time.")
    if answer["windows"]:
        output.say("\nWindows:")
        _spans(answer["windows"])


@schedule_app.command("next")
def next_times(
    model: options.OptionalModel = None,
    count: Annotated[int, typer.Option(help="How many.", min=1, max=100)] = 5,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """When schedules are in force next, or still."""
    answer = Client(address).get("schedules/next", model=model, count=count)
    if as_json:
        options.print_json(answer)
    elif answer["next"]:
        _spans(answer["next"])
    else:
        output.say("Nothing is scheduled.")


@schedule_app.command()
def remove(schedule_id: options.Id, address: options.Address = None, as_json: options.Json = False) -> None:
    """Remove a schedule."""
    answer = Client(address).delete(f"schedules/{in_path(schedule_id)}")
    if as_json:
        options.print_json(answer)
    else:
        output.undone(answer["undone"])


def _spans(rows: Iterable[Mapping[str, Any]]) -> None:
    output.table(
        ("from", "to", "model", "at least", "id"),
        [
            (
                output.when(r["start_s"]),
                "always" if r["end_s"] is None else output.when(r["end_s"]),
                r["model"] or "(all)",
                output.floor(r),
                r["id"],
            )
            for r in rows
        ],
    )
