"""`relight history import`: traffic from a trace or an access log, so that a new installation is not blind."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoscaling.commands import options, output, times
from autoscaling.commands.client import Client
from autoscaling.commands.failures import WRONG, CommandError

if TYPE_CHECKING:
    from autoscaling.traces import Trace

CHUNK_ROWS = 20_000
"""Rows of one request: some two megabytes."""
DATES_FROM_S = 1e9
"""A trace whose times are below this (2001) counts from its own beginning, not from 1970."""
NAMED = 5

Bucket = tuple[str, float, int, int, int, float]


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
        typer.Option("--map", help="NAME=MODEL: the file's name for a model of the fleet. May be repeated."),
    ] = None,
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Leave out rows of models that the fleet has not.")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out lines that can't be read.")] = False,
    ends: Annotated[
        str | None, typer.Option(help=f"Move the file's times so that it ends then: {times.TIMES}.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also if this file was imported before.")] = False,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """Add the traffic of a file to the history that forecasts are made from.

    Formats: CSV with timestamp_s,model or minute,model,count (and tokens); Azure's LLM and Functions traces; Mooncake's
    JSON lines; access logs. The same file is added once.
    """
    from autoscaling.traces import TraceError, open_trace

    if model is not None and mapping:
        raise CommandError("--model and --map: give one of them", WRONG)
    ends_s = options.moment(ends, "--ends")
    client = Client(address)
    fleet = {row["model"] for row in client.get("policies")["models"]}
    names = _names(mapping)
    try:
        trace = open_trace(file, model=model, skip_bad=skip_bad)
        found = _survey(trace)
        known = _known(found.models, fleet, model, names, skip_unknown=skip_unknown)
        shift_s = _shift_s(file, found, ends_s)
        bucket_s = found.bucket_s
        source = _source(file, model, names, again=again)
        added = rows = 0
        buckets = _buckets(trace, known, shift_s, bucket_s)
        while chunk := list(islice(buckets, CHUNK_ROWS)):
            body = {"bucket_s": bucket_s, "rows": chunk, "source": f"{source}:{rows}"}
            added += client.post("import", body)["rows"]
            rows += len(chunk)
    except TraceError as error:
        raise CommandError(str(error), WRONG) from None
    answer = {
        "file": str(file),
        "format": trace.format,
        "requests": found.requests,
        "models": {name: known[name] for name in sorted(known)},
        "from_s": found.first_s + shift_s,
        "until_s": found.last_s + shift_s,
        "bucket_s": bucket_s,
        "rows": rows,
        "added": added,
        "bad": trace.bad,
    }
    if as_json:
        options.print_json(answer)
        return
    span = f"{output.when(found.first_s + shift_s)} to {output.when(found.last_s + shift_s)}"
    output.say(f"{file}: {found.requests} requests of {output.count(len(known), 'model')}, {span}")
    if trace.bad:
        output.say(f"{output.count(trace.bad, 'line')} could not be read and left out.")
    if added:
        output.say(f"Added {output.count(added, 'row')} of {output.duration(bucket_s)}.")
    elif rows:
        output.say("Nothing was added: this file was imported before (--again adds it once more).")
    if 0 < added < rows:
        output.say(f"{rows - added} rows were in before, or are older than what is kept.")


class _Survey:
    """What a first reading tells of a trace."""

    def __init__(self) -> None:
        self.models: dict[str, int] = {}
        self.first_s = float("inf")
        self.last_s = float("-inf")
        self.requests = 0
        self.bucket_s = 1.0


def _survey(trace: Trace) -> _Survey:
    found = _Survey()
    for row in trace.rows():
        found.models[row.model] = found.models.get(row.model, 0) + row.requests
        found.first_s = min(found.first_s, row.time_s)
        found.last_s = max(found.last_s, row.time_s + row.window_s)
        found.requests += row.requests
        found.bucket_s = max(found.bucket_s, row.window_s)
    if not found.models:
        raise CommandError(f"{trace.path}: there is no request in it", WRONG)
    return found


def _names(mapping: list[str] | None) -> dict[str, str]:
    found = {}
    for text in mapping or ():
        name, sign, model = text.rpartition("=")
        if not sign or not name or not model:
            raise CommandError(f"--map: {text!r} is not NAME=MODEL", WRONG)
        found[name] = model
    return found


def _known(
    seen: Mapping[str, int],
    fleet: set[str],
    model: str | None,
    names: Mapping[str, str],
    *,
    skip_unknown: bool,
) -> dict[str, str]:
    """The file's names that are counted -> the fleet's."""
    wanted = {name: model or names.get(name, name) for name in seen}
    unknown = sorted(name for name, target in wanted.items() if target not in fleet)
    if unknown and not skip_unknown:
        listed = ", ".join(wanted[name] for name in unknown[:NAMED]) + (
            " ..." if len(unknown) > NAMED else ""
        )
        raise CommandError(
            f"The fleet has no model {listed}; it has {', '.join(sorted(fleet))}. --model counts all as one, --map "
            "NAME=MODEL names them, --skip-unknown leaves them out.",
            WRONG,
        )
    known = {name: target for name, target in wanted.items() if target in fleet}
    if not known:
        raise CommandError("Nothing is left: the fleet has none of the file's models", WRONG)
    return known


def _shift_s(file: Path, found: _Survey, ends_s: float | None) -> float:
    if ends_s is not None:
        # By whole buckets, so that the file's own stay apart.
        return (ends_s - found.last_s) // found.bucket_s * found.bucket_s
    if found.first_s < DATES_FROM_S:
        raise CommandError(
            f"{file}: its times are no dates (they begin at {found.first_s:g} s); --ends now moves them so that it "
            "ends now, --ends with another time elsewhere",
            WRONG,
        )
    return 0.0


def _buckets(trace: Trace, known: Mapping[str, str], shift_s: float, bucket_s: float) -> Iterator[Bucket]:
    """The rows added up by model and bucket. Rows come in the order of time, so that few are open at once."""
    open_: dict[str, list[float]] = {}
    at_s = float("-inf")

    def closed() -> Iterator[Bucket]:
        for name, (arrivals, inputs, outputs, busy_s) in sorted(open_.items()):
            yield name, at_s, int(arrivals), int(inputs), int(outputs), busy_s
        open_.clear()

    for row in trace.rows():
        if (target := known.get(row.model)) is None:
            continue
        bucket = (row.time_s + shift_s) // bucket_s * bucket_s
        if bucket != at_s:
            yield from closed()
            at_s = bucket
        amounts = open_.setdefault(target, [0.0, 0.0, 0.0, 0.0])
        for column, each in enumerate((1, row.input_tokens, row.output_tokens, row.exec_s)):
            amounts[column] += row.requests * each
    yield from closed()


def _source(file: Path, model: str | None, names: Mapping[str, str], *, again: bool) -> str:
    """A name for the file by what is in it, so that an import that was interrupted goes on where it was."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")
    digest.update(repr((model, sorted(names.items()))).encode())
    return f"file:{digest.hexdigest()[:24]}" + (f":{secrets.token_hex(4)}" if again else "")


__all__ = ["import_file", "register"]
