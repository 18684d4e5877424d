"""`relight policy`: who decides on each model, and with which numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from autoscaling.commands import options, output
from autoscaling.commands.client import Client, in_path
from autoscaling.commands.failures import UNREACHABLE, WRONG, CommandError

policy_app = typer.Typer(help="Who decides how many replicas a model has, and why.", no_args_is_help=True)
All = Annotated[bool, typer.Option("--all", help="For the whole fleet, in place of a model.")]

_VALUES = (
    "policy",
    "wait_cost",
    "keep_alive_s",
    "min_replicas",
    "max_replicas",
    "target_ongoing_requests",
    "priority",
)


def register(app: typer.Typer) -> None:
    from autoscaling.commands import shadow, validate

    validate.register(policy_app)
    shadow.register(policy_app)
    app.add_typer(policy_app, name="policy")


@policy_app.command("list")
def list_policies(address: options.Address = None, as_json: options.Json = False) -> None:
    """The policies that there are, and the one of each model."""
    from autoscaling.live.api.plain import plain
    from autoscaling.live.catalog import policies

    try:
        answer = Client(address).get("policies")
    except CommandError as error:
        if error.code != UNREACHABLE or address is not None:
            raise
        # What policies there are is known without a cluster.
        answer = {
            "policies": plain(list(policies().values())),
            "models": None,
            "mode": None,
            "error": error.message,
        }
    if as_json:
        options.print_json(answer)
        return
    rows = [(p["name"] + (" (default)" if p["default"] else ""), p["summary"]) for p in answer["policies"]]
    output.table(("policy", "what it does"), rows)
    for row in answer["policies"]:
        params = ", ".join(f"{p['name']} ({_default(p)})" for p in row["params"])
        output.say(f"\n{row['name']}: {params or 'no parameters'}\n  from: {row['source']}", style="dim")
    if answer["models"] is None:
        output.say(f"\n{answer['error']}")
        return
    output.say(f"\nmode: {answer['mode']}")
    _models(answer["models"])


def _default(param: Mapping[str, Any]) -> str:
    def shown(value: float) -> str:
        return output.duration(value) if param["unit"] == "s" else f"{value:g}"

    default = "the model's own" if param["default"] is None else shown(param["default"])
    unit = "" if param["unit"] in ("s", "0 or 1") else f" {param['unit']}"
    return f"{default}; {shown(param['low'])} to {shown(param['high'])}{unit}"


def _models(models: list[Mapping[str, Any]]) -> None:
    def cell(row: Mapping[str, Any], name: str) -> str:
        return f"{_shown(name, row['spec'][name])}{'*' if name in row['overridden'] else ''}"

    columns = ("model", "policy", "wait cost", "keep alive", "replicas", "target", "priority")
    rows = [
        (
            row["model"],
            cell(row, "policy") + (" (+params)" if row["spec"]["params"] else ""),
            cell(row, "wait_cost"),
            cell(row, "keep_alive_s"),
            f"{cell(row, 'min_replicas')} to {cell(row, 'max_replicas')}",
            cell(row, "target_ongoing_requests"),
            cell(row, "priority"),
        )
        for row in models
    ]
    output.table(columns, rows, numbers=("wait cost", "keep alive", "target", "priority"))
    if any(row["overridden"] for row in models):
        output.say("* set at run time", style="dim")


def _shown(name: str, value: object) -> str:
    if name.endswith("_s") and isinstance(value, int | float):
        return output.duration(float(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@policy_app.command()
def show(model: options.Model, address: options.Address = None, as_json: options.Json = False) -> None:
    """How a model is scaled: its policy, its bounds, and what was set at run time."""
    answer = Client(address).get(f"policies/{in_path(model)}")
    if as_json:
        options.print_json(answer)
        return
    base = answer["base"] or {}
    rows = []
    for name in _VALUES:
        was = _shown(name, base.get(name)) if name in answer["overridden"] else ""
        rows.append((name, _shown(name, answer["spec"][name]), was))
    for name, value in answer["spec"]["params"].items():
        was = base.get("params", {}).get(name)
        rows.append((f"param {name}", f"{value:g}", "" if was in (None, value) else f"{was:g}"))
    output.table(("of " + answer["model"], "now", "in the fleet file"), rows)
    for row in answer["overrides"]:
        output.say(f"{row['id']}: {output.override(row)}, by {row['who']} at {output.when(row['made_s'])}")
    for row in answer["windows"]:
        floor = output.floor(row)
        output.say(
            f"{row['source']} {row['id']}: {floor} from {output.when(row['start_s'])} to {output.when(row['end_s'])}"
        )


@policy_app.command("set")
def set_policy(
    *,
    model: Annotated[
        str | None, typer.Argument(help="The model, by its id.", autocompletion=options._models)
    ] = None,
    everything: All = False,
    policy: options.PolicyOption = None,
    param: options.Params = None,
    wait_cost: options.WaitCost = None,
    keep_alive: options.KeepAlive = None,
    min_replicas: options.MinReplicas = None,
    max_replicas: options.MaxReplicas = None,
    target: options.Target = None,
    priority: options.Priority = None,
    file: options.PolicyFile = None,
    for_: options.For = None,
    until: options.Until = None,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """Change how a model is scaled, at once and until it is undone (or --for, --until). Outlives redeploys."""
    said = body_of(policy, param, wait_cost, keep_alive, min_replicas, max_replicas, target, priority)
    body = options.over_policy_file(file, said)
    if not body:
        raise CommandError(
            "Nothing to set: give --policy, --param, --wait-cost, --file or another of the values.", WRONG
        )
    answer = Client(address).put(_path(model, everything), {**body, **options.spans(for_, until)})
    if as_json:
        options.print_json(answer)
    else:
        output.done(answer["override"])


@policy_app.command()
def unset(
    model: Annotated[
        str | None, typer.Argument(help="The model, by its id.", autocompletion=options._models)
    ] = None,
    everything: All = False,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """Take back everything that `policy set` set for a model, or with --all for the whole fleet."""
    answer = Client(address).delete(_path(model, everything))
    if as_json:
        options.print_json(answer)
    else:
        output.undone(answer["undone"])


@policy_app.command()
def explain(model: options.Model, address: options.Address = None, as_json: options.Json = False) -> None:
    """Why a model has the replicas that it has now, in words and with the numbers, and until when."""
    from autoscaling.commands import times

    # Of a clock without a name the cluster can't know; it then says UTC with each time.
    zone = times.zone_name(times.local_zone()) or "UTC"
    answer = Client(address).get(f"explain/{in_path(model)}", timezone=zone)
    if as_json:
        options.print_json(answer)
        return
    for sentence in answer["text"]:
        output.say(sentence)
    numbers = (answer["decision"] or {}).get("numbers") or {}
    if numbers:
        output.say("\nDecided from:", style="dim")
        rows = [(name, "-" if value is None else f"{value:.4g}") for name, value in numbers.items()]
        output.table(("number", "value"), rows, numbers=("value",))


def body_of(  # noqa: PLR0917 - in the order of the options
    policy: str | None,
    param: list[str] | None,
    wait_cost: float | None,
    keep_alive: str | None,
    min_replicas: int | None,
    max_replicas: int | None,
    target: float | None,
    priority: int | None,
) -> dict[str, Any]:
    """What was given on the command line, as the API takes it."""
    return options.given(
        {
            "policy": policy,
            "params": options.params(param),
            "wait_cost": wait_cost,
            # 0 is a duration here: an idle replica goes at once.
            "keep_alive_s": 0.0 if keep_alive == "0" else options.duration(keep_alive, "--keep-alive"),
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "target_ongoing_requests": target,
            "priority": priority,
        }
    )


def _path(model: str | None, everything: bool) -> str:
    if (model is None) != everything:
        raise CommandError("Name one model, or give --all for the whole fleet.", WRONG)
    return "policies" if model is None else f"policies/{in_path(model)}"
