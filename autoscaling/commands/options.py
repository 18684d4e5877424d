"""Options and arguments that many commands share, their completion, and how values become numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from autoscaling.commands import times
from autoscaling.commands.failures import WRONG, CommandError

COMPLETION_TIMEOUT_S = 1.0


def _models(incomplete: str) -> list[str]:
    """The models of the cluster; none where none answers, since a shell has no place for errors."""
    from autoscaling.commands.client import Client

    try:
        found = Client(timeout_s=COMPLETION_TIMEOUT_S).get("policies")["models"]
    except CommandError:
        return []
    return [str(row["model"]) for row in found if str(row["model"]).startswith(incomplete)]


def complete_policies(incomplete: str) -> list[tuple[str, str]]:
    from autoscaling.live.catalog import policies

    return [(name, info.summary) for name, info in policies().items() if name.startswith(incomplete)]


def _rungs(incomplete: str) -> list[str]:
    return [rung for rung in RUNGS if rung.startswith(incomplete)]


def _ids(incomplete: str) -> list[str]:
    from autoscaling.commands.client import Client

    try:
        found = Client(timeout_s=COMPLETION_TIMEOUT_S).get("overrides")["overrides"]
    except CommandError:
        return []
    return [str(row["id"]) for row in found if str(row["id"]).startswith(incomplete)]


def finite(param: typer.CallbackParam, value: float | None) -> float | None:
    """The callback of options that are numbers: no infinity, and nothing that is no number. Raises CommandError."""
    if value is not None and not math.isfinite(value):
        raise CommandError(f"{param.opts[0]}: '{value}' is not right; expected a finite number", WRONG)
    return value


RUNGS = ("weights", "template", "parked", "serving")
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")]
Address = Annotated[
    str | None,
    typer.Option(help="The gateway's address (default: RELIGHT_ADDRESS, else this machine's cluster)."),
]
Model = Annotated[str, typer.Argument(help="The model, by its id.", autocompletion=_models)]
OptionalModel = Annotated[
    str | None, typer.Argument(help="The model, by its id; all if left out.", autocompletion=_models)
]
PolicyOption = Annotated[
    str | None,
    typer.Option("--policy", help="One of `relight policy list`.", autocompletion=complete_policies),
]
PolicyArgument = Annotated[
    str, typer.Argument(help="One of `relight policy list`.", autocompletion=complete_policies)
]
Params = Annotated[
    list[str] | None,
    typer.Option("--param", help="A parameter of the policy: NAME=NUMBER. May be repeated."),
]
PolicyFile = Annotated[
    Path | None,
    typer.Option(
        "--file", help="A policy file, as `relight tune --out` writes it; what else is given goes before it."
    ),
]
WaitCost = Annotated[
    float | None,
    typer.Option(
        help="GPU-seconds worth paying to spare one request one second of waiting.", callback=finite
    ),
]
KeepAlive = Annotated[str | None, typer.Option(help=f"How long an idle replica is kept: {times.DURATIONS}.")]
MinReplicas = Annotated[int | None, typer.Option(help="Never fewer replicas.")]
MaxReplicas = Annotated[int | None, typer.Option(help="Never more replicas.")]
Target = Annotated[float | None, typer.Option(help="Requests in progress for each replica.", callback=finite)]
Priority = Annotated[int | None, typer.Option(help="A higher one keeps its replicas when GPUs are short.")]
For = Annotated[str | None, typer.Option("--for", help=f"For how long: {times.DURATIONS}.")]
Until = Annotated[str | None, typer.Option("--until", help=f"Until when: {times.TIMES}.")]
Since = Annotated[
    str, typer.Option("--since", help=f"From when: a duration back ({times.DURATIONS}) or a time.")
]
Limit = Annotated[int, typer.Option(help="How many rows at most: the newest.", min=1, max=10_000)]
Rung = Annotated[str, typer.Option(help=f"How warm: {', '.join(RUNGS)}.", autocompletion=_rungs)]
Id = Annotated[str, typer.Argument(help="The id, as the lists show it.", autocompletion=_ids)]


def print_json(answer: object) -> None:
    typer.echo(json.dumps(answer, indent=2))


@contextmanager
def _named(option: str) -> Iterator[None]:
    """A time that can't be read is told of with its option. Raises CommandError."""
    try:
        yield
    except times.TimeError as error:
        raise CommandError(f"{option}: {error}", WRONG) from None


def duration(text: str | None, option: str, *, zero: bool = False) -> float | None:
    """Seconds; 0 only if `zero`. Raises CommandError."""
    with _named(option):
        return None if text is None else times.parse_duration(text, zero=zero)


def moment(text: str | None, option: str) -> float | None:
    """Unix seconds. Raises CommandError."""
    with _named(option):
        return None if text is None else times.parse_time(text, times.now())


def past(text: str | None, option: str) -> float | None:
    """Unix seconds of a time that was. Raises CommandError."""
    with _named(option):
        return None if text is None else times.parse_past(text, times.now())


def since(text: str) -> float:
    """Unix seconds. Raises CommandError."""
    with _named("--since"):
        return times.parse_since(text, times.now())


def params(given: list[str] | None) -> dict[str, float] | None:
    """`["stable_s=30"]` as numbers. Raises CommandError."""
    if not given:
        return None
    found = {}
    for text in given:
        name, sign, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        name = name.strip()
        if not sign or not name or not math.isfinite(number):
            raise CommandError(f"--param: {text!r} is not NAME=NUMBER, like stable_s=30", WRONG)
        if name in found:
            raise CommandError(f"--param: {name} is given twice", WRONG)
        found[name] = number
    return found


def policy_file(path: Path | None) -> dict[str, Any]:
    """What a policy file says, without the evidence for it. Raises CommandError, ConfigError."""
    if path is None:
        return {}
    from deployments.config_text import read_json

    try:
        text = path.read_text(encoding="utf-8")
        found = read_json(text, f"--file: {path}", parse_float=_finite, parse_constant=_finite)
    except OSError as error:
        raise CommandError(f"--file: {path} can't be read: {error.strerror}", WRONG) from None
    except (ValueError, RecursionError) as error:
        raise CommandError(f"--file: {path} is not JSON: {error}", WRONG) from None
    if not isinstance(found, dict) or "policy" not in found:
        raise CommandError(f"--file: {path} is no policy file: it must be an object with a policy", WRONG)
    if not isinstance(found.get("params") or {}, dict):
        raise CommandError(f"--file: {path} is no policy file: its params must be an object", WRONG)
    found.pop("evidence", None)
    return found


def _finite(text: str) -> float:
    """A number of a file. ValueError for NaN and Infinity, which Python's JSON has, and what is too large."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def over_policy_file(path: Path | None, said: Mapping[str, Any]) -> dict[str, Any]:
    """What was said, and of a policy file the rest: parameters one by one, but none where another policy was said."""
    filed = policy_file(path)
    params = filed.pop("params", None) or {}
    if said.get("policy") not in (None, filed.get("policy")):
        params = {}
    params = {**params, **said.get("params", {})}
    return {**filed, **said, **({"params": params} if params else {})}


def spans(for_: str | None, until: str | None) -> dict[str, Any]:
    """--for and --until as the API takes them. Raises CommandError."""
    if for_ is not None and until is not None:
        raise CommandError("--for and --until: give one of them", WRONG)
    return given({"for_s": duration(for_, "--for"), "until_s": moment(until, "--until")})


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what was not said."""
    return {name: value for name, value in values.items() if value is not None}
