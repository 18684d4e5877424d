"""`relight decisions` and `relight coldstarts`: what was decided, and what starting took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from autoscaling.commands import options, output
from autoscaling.commands.client import Client


def register(app: typer.Typer) -> None:
    app.command("decisions")(decisions)
    app.command("coldstarts")(cold_starts)


def decisions(
    *,
    model: options.OptionalModel = None,
    since: options.Since = "1h",
    source: Annotated[
        str | None, typer.Option(help="shadow:NAME for a shadow policy's (default: the controller's own).")
    ] = None,
    limit: options.Limit = 100,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """What was decided, when and why; the newest last. A decision that only stands for longer is not told again."""
    answer = Client(address).get(
        "decisions", model=model, since_s=options.since(since), source=source, limit=limit
    )
    if as_json:
        options.print_json(answer)
        return
    if not answer["decisions"]:
        output.say(f"Nothing was decided since {output.when(answer['since_s'])}.")
        return
    rows = []
    for row in answer["decisions"]:
        reason = " ".join([str(row["reason"]), *(f"+{clamp}" for clamp in row["clamps"])])
        stands = "-" if row["until_s"] is None else output.duration(row["until_s"] - row["made_s"])
        replicas = "held" if row["replicas"] is None else row["replicas"]
        rows.append(
            (
                output.when(row["made_s"]),
                row["model"],
                replicas,
                str(row["rung"]).lower(),
                reason,
                row["policy"],
                stands,
            )
        )
    columns = ("at", "model", "replicas", "rung", "why", "policy", "stands for")
    output.table(columns, rows, numbers=("replicas", "stands for"))


def cold_starts(
    model: options.OptionalModel = None,
    since: options.Since = "7d",
    limit: options.Limit = 30,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """Starts of engines with their phases, and whether somebody waited; the newest last."""
    answer = Client(address).get("coldstarts", model=model, since_s=options.since(since), limit=limit)
    if as_json:
        options.print_json(answer)
        return
    if not answer["cold_starts"]:
        output.say(f"No engine was started since {output.when(answer['since_s'])}.")
        return
    output.table(
        ("ready", "model", "took", "kind", "from", "waited for", "phases"),
        [
            (
                output.when(row["ready_s"]),
                row["model"],
                output.duration(row["total_s"]),
                row["kind"],
                row["rung"],
                "no (prewarmed)" if row["prewarmed"] else "yes",
                _phases(row),
            )
            for row in answer["cold_starts"]
        ],
        numbers=("took",),
    )


def _phases(row: Mapping[str, Any]) -> str:
    phases = sorted(row["phases"], key=lambda phase: float(phase.get("start_s", 0)))
    lasted = [(phase["name"], float(phase["duration_s"])) for phase in phases]
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in lasted if seconds >= 0.005)
