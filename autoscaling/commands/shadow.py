"""`relight policy shadow`: try a policy on live traffic without acting on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from autoscaling.commands import options, output
from autoscaling.commands.client import Client, in_path
from autoscaling.commands.policy import body_of

shadow_app = typer.Typer(
    help="Let a policy decide beside the active one, change nothing, and see what it would cost.",
    no_args_is_help=True,
)
Name = Annotated[str, typer.Option("--name", help="Under which its decisions and costs are kept.")]


def register(policy_app: typer.Typer) -> None:
    policy_app.add_typer(shadow_app, name="shadow")


@shadow_app.command("start")
def start(
    *,
    policy: options.PolicyArgument,
    model: Annotated[
        str | None, typer.Option("--model", help="Only for this model.", autocompletion=options._models)
    ] = None,
    name: Name = "shadow",
    param: options.Params = None,
    wait_cost: options.WaitCost = None,
    keep_alive: options.KeepAlive = None,
    min_replicas: options.MinReplicas = None,
    max_replicas: options.MaxReplicas = None,
    target: options.Target = None,
    for_: options.For = None,
    until: options.Until = None,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """Begin, or replace the shadow policy of the same name."""
    body = body_of(policy, param, wait_cost, keep_alive, min_replicas, max_replicas, target, None)
    body |= options.given({"model": model, "name": name}) | options.spans(for_, until)
    answer = Client(address).put("shadow", body)
    if as_json:
        options.print_json(answer)
    else:
        output.done(answer["override"])


@shadow_app.command("show")
def show(address: options.Address = None, as_json: options.Json = False) -> None:
    """What the shadow policies would do now, and what they would have cost and spared."""
    answer = Client(address).get("shadow")
    if as_json:
        options.print_json(answer)
        return
    if not answer["shadows"]:
        output.say("There is no shadow policy. `relight policy shadow start POLICY` begins one.")
    for shadow in answer["shadows"]:
        _show(shadow, answer["active"])


def _show(shadow: Mapping[str, Any], active: Mapping[str, Any]) -> None:
    override, comparison = shadow["override"], shadow["comparison"]
    said = f": {output.override(override)}" if override else ""
    output.say(f"{shadow['name']}{said}", style="bold")
    rows = []
    for model, decision in shadow["decisions"].items():
        now = active.get(model) or {}
        rows.append((model, _decision(now), _decision(decision)))
    if rows:
        output.table(("model", "active", "shadow"), rows)
    mine, theirs = comparison["shadow"], comparison["active"]
    output.say(f"Since {output.when(comparison['since_s'])}:")
    output.table(
        ("", "GPU time", "waiting", "cold starts"),
        [
            (who, output.gpu_s(row["gpu_s"]), output.lasting(row["waited_s"]), row["cold_starts"])
            for who, row in (("active", theirs), ("shadow", mine))
        ],
        numbers=("GPU time", "waiting", "cold starts"),
    )
    cost, wait = comparison["gpu_s_difference"], comparison["waited_s_difference"]
    output.say(
        f"The shadow would use {output.gpu_s(abs(cost))} {'more' if cost > 0 else 'less'}, and requests would wait "
        f"{output.duration(abs(wait))} {'more' if wait > 0 else 'less'} in all."
    )
    if not comparison["same_span"]:
        output.say("The active policy counts from midnight UTC of the first day.", style="dim")


def _decision(decision: Mapping[str, Any]) -> str:
    if not decision:
        return "-"
    replicas = decision["replicas"]
    return f"{'held' if replicas is None else replicas} ({decision['reason']})"


@shadow_app.command("stop")
def stop(
    name: Annotated[str, typer.Argument(help="The shadow policy's name.")] = "shadow",
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """End a shadow policy. What it decided stays on record."""
    answer = Client(address).delete(f"shadow/{in_path(name)}")
    if as_json:
        options.print_json(answer)
    else:
        output.undone(answer["undone"])
