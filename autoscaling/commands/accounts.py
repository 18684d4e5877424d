"""`relight accounts`: what models cost, what prewarms were worth, and what a dedicated GPU would have cost."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from autoscaling.commands import options, output
from autoscaling.commands.client import Client


def register(app: typer.Typer) -> None:
    app.command("accounts")(accounts)


def accounts(
    *,
    model: options.OptionalModel = None,
    since: options.Since = "6d",
    source: Annotated[str, typer.Option(help="active, or shadow:NAME for a shadow policy's.")] = "active",
    by_day: Annotated[bool, typer.Option("--by-day", help="A row for each model and day (UTC).")] = False,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """GPU-seconds by model and rung, waiting, prewarms and their worth, beside what dedicated GPUs would have cost."""
    day = datetime.fromtimestamp(options.since(since), UTC).date().isoformat()
    answer = Client(address).get("accounts", model=model, since_day=day, source=source)
    if as_json:
        options.print_json(answer)
        return
    output.say(f"{answer['since_day']} to {answer['until_day']} (UTC)")
    if not answer["models"]:
        output.say("Nothing was used.")
        return
    rungs = sorted({rung for row in answer["models"] for rung in row["gpu_s_by_rung"]})
    rows = []
    for row in answer["models"]:
        if by_day:
            rows += [(row["model"], day["day"], *_cells(day, rungs)) for day in row["days"]]
        else:
            rows.append((row["model"], *_cells(row, rungs), output.gpu_s(row["dedicated_gpu_s"])))
    columns = ["GPU time", *rungs, "requests", "met it dark", "cold starts", "waited"]
    if not by_day:
        columns.append("dedicated")
        rows.append(
            ("all", *_cells(answer["total"], rungs), output.gpu_s(answer["total"]["dedicated_gpu_s"]))
        )
    output.table(("model", *(("day",) if by_day else ()), *columns), rows, numbers=columns)
    _prewarms(answer)
    spent, dedicated = answer["total"]["gpu_s"], answer["total"]["dedicated_gpu_s"]
    if dedicated > 0 and source == "active":
        output.say(
            f"\nDedicated GPUs, one replica of each model, would have cost {output.gpu_s(dedicated)}: "
            f"{spent / dedicated:.1%} of that was used."
        )


def _cells(row: Mapping[str, Any], rungs: list[str]) -> tuple[object, ...]:
    return (
        output.gpu_s(row["gpu_s"]),
        *(output.gpu_s(row["gpu_s_by_rung"].get(rung, 0.0)) for rung in rungs),
        row["requests"],
        row["cold_requests"],
        row["cold_starts"],
        output.duration(row["waited_s"]),
    )


def _prewarms(answer: Mapping[str, Any]) -> None:
    found = [(row["model"], row["prewarms"]) for row in answer["models"] if row["prewarms"]["count"]]
    if not found:
        return
    output.say("\nPrewarms:")
    output.table(
        ("model", "prewarms", "met", "in vain", "open", "cost", "spared requests", "spared waiting"),
        [
            (
                model,
                row["count"],
                row["hits"],
                row["missed"],
                row["open"],
                output.gpu_s(row["cost_gpu_s"]),
                row["spared_requests"],
                output.duration(row["spared_wait_s"]),
            )
            for model, row in found
        ],
        numbers=("prewarms", "met", "in vain", "open", "cost", "spared requests", "spared waiting"),
    )
