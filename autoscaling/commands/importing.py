"""`relight history import`: traffic from a trace or an access log, so that a new installation is not blind."""

from __future__ import annotations

import secrets
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoscaling.commands import options, output, times
from autoscaling.commands.client import Client
from autoscaling.commands.failures import WRONG, CommandError
from deployments.errors import ConfigError

if TYPE_CHECKING:
    from autoscaling.live.importer import Import
    from autoscaling.live.importer.importer import Align

CHUNK_ROWS = 20_000
"""Rows of one request: some two megabytes."""
NAMED = 5


def register(history_app: typer.Typer) -> None:
    history_app.command("import")(import_file)


def import_file(
    *,
    file: Annotated[Path, typer.Argument(help="A trace or an access log; .gz is unpacked.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="What all of it is counted as.", autocompletion=options._models),
    ] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            help="NAME=MODEL: what a name or path of the file (* and ? match) stands for. May be repeated.",
        ),
    ] = None,
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Leave out rows of models that the fleet has not.")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out lines that can't be read.")] = False,
    ends: Annotated[
        str | None, typer.Option(help=f"Move the file's times so that it ends then: {times.PAST_TIMES}.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also if this file was imported before.")] = False,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """Add the traffic of a file to the history that forecasts are made from.

    Formats: CSV with timestamp_s,model or minute,model,count (and tokens); Azure's LLM and Functions traces; Mooncake's
    JSON lines; access logs in Common, Combined or Envoy's format or as JSON lines. The same file is added once. Times
    that count from 0 are moved by whole weeks, so that the file ends now and hours stay hours. Windows that are longer
    than two hours don't say when requests come, and are refused.
    """
    if model is not None and mapping:
        raise CommandError("--model and --map: give one of them", WRONG)
    ends_s = options.past(ends, "--ends")
    client = Client(address)
    fleet = {row["model"] for row in client.get("policies")["models"]}
    patterns = _patterns(mapping)
    _in_fleet([model] if model is not None else [meant for _, meant in patterns], fleet)
    found = _read(file, fleet, patterns, model, ends_s)
    report = found.report
    if report.broken and not skip_bad:
        raise CommandError(
            f"{file}: {output.count(report.broken, 'line')} can't be read; --skip-bad leaves them out. The first: "
            f"{' '.join(report.broken_shown)}",
            WRONG,
        )
    if report.left_out and not skip_unknown:
        listed = ", ".join(name for name, _ in report.left_out.most_common(NAMED))
        raise CommandError(
            f"The fleet has no model {listed}; it has {', '.join(sorted(fleet))}. --model counts all as one, --map "
            "NAME=MODEL names them, --skip-unknown leaves them out.",
            WRONG,
        )
    # By what is in it, so that an import that was interrupted goes on where it was.
    source = f"file:{found.identity[:24]}" + (f":{secrets.token_hex(4)}" if again else "")
    added = rows = 0
    try:
        buckets = iter(found)
        while chunk := list(islice(buckets, CHUNK_ROWS)):
            body = {"bucket_s": report.bucket_s, "rows": chunk, "source": f"{source}:{rows}"}
            added += client.post("import", body)["rows"]
            rows += len(chunk)
    except ConfigError as error:
        raise CommandError(error.message, WRONG) from None
    answer = {
        "file": str(file),
        "format": report.format,
        "requests": report.requests.total(),
        "models": dict(sorted(report.requests.items())),
        "left_out": dict(report.left_out.most_common()),
        "from_s": report.first_s,
        "until_s": report.last_s,
        "bucket_s": report.bucket_s,
        "rows": rows,
        "added": added,
        "bad": report.broken,
    }
    if as_json:
        options.print_json(answer)
        return
    span = f"{output.when(report.first_s)} to {output.when(report.last_s)}"
    models = output.count(len(report.requests), "model")
    output.say(f"{file}: {report.requests.total()} requests of {models}, {span}")
    if report.broken:
        output.say(f"{output.count(report.broken, 'line')} could not be read and left out.")
    if added:
        output.say(f"Added {output.count(added, 'row')} of {output.duration(report.bucket_s)}.")
    elif rows:
        output.say("Nothing was added: this file was imported before (--again adds it once more).")
    if 0 < added < rows:
        output.say(f"{rows - added} rows were in before, or are older than what is kept.")


def _read(
    file: Path, fleet: set[str], patterns: list[tuple[str, str]], model: str | None, ends_s: float | None
) -> Import:
    from autoscaling.live.importer import Import, Names, Options

    # A name of the fleet stands for itself, unless it is said to stand for another.
    names = Names([*patterns, *((name, name) for name in sorted(fleet) if model is None)], model)
    align: Align = "auto" if ends_s is None else "end"
    try:
        now_s = times.now().timestamp() if ends_s is None else ends_s
        return Import(file, Options(names=names, align=align), now_s)
    except ConfigError as error:
        raise CommandError(error.message, WRONG) from None


def _patterns(mapping: list[str] | None) -> list[tuple[str, str]]:
    found = []
    for text in mapping or ():
        name, sign, model = text.rpartition("=")
        if not sign or not name or not model:
            raise CommandError(f"--map: {text!r} is not NAME=MODEL", WRONG)
        found.append((name, model))
    return found


def _in_fleet(models: list[str], fleet: set[str]) -> None:
    unknown = sorted(set(models) - fleet)
    if unknown:
        raise CommandError(f"The fleet has no model {unknown[0]}; it has {', '.join(sorted(fleet))}.", WRONG)


__all__ = ["import_file", "register"]
