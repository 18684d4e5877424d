"""`relight mode`, `relight undo` and `relight overrides`: whether the controller acts, and what people told it."""

from __future__ import annotations

from typing import Annotated

import typer

from autoscaling.commands import options, output
from autoscaling.commands.client import Client, in_path
from autoscaling.commands.failures import WRONG, CommandError

_MODES = ("active", "shadow", "off")


def register(app: typer.Typer) -> None:
    app.command("mode")(mode)
    app.command("undo")(undo)
    app.command("overrides")(overrides)


def _complete(incomplete: str) -> list[str]:
    return [name for name in _MODES if name.startswith(incomplete)]


def mode(
    wanted: Annotated[
        str | None,
        typer.Argument(metavar="[active|shadow|off]", help="The mode to set.", autocompletion=_complete),
    ] = None,
    for_: options.For = None,
    until: options.Until = None,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """Show or set the controller's mode.

    active: it decides and acts. shadow: it decides and records, and models scale by the requests in progress. off: it
    only looks.
    """
    if wanted is None and (for_ or until):
        raise CommandError(f"--for and --until: name the mode that is to hold, {', '.join(_MODES)}", WRONG)
    client = Client(address)
    if wanted is None:
        answer = client.get("mode")
    else:
        answer = client.put("mode", {"mode": wanted, **options.spans(for_, until)})
    if as_json:
        options.print_json(answer)
    elif wanted is not None:
        output.done(answer["override"])
    else:
        override = answer["override"]
        by = f", set by {override['who']} at {output.when(override['made_s'])}" if override else ""
        output.say(f"{answer['mode']}{by}")


def undo(override_id: options.Id, address: options.Address = None, as_json: options.Json = False) -> None:
    """Take back what was set at run time: a policy, a prewarm, a schedule, a mode or a shadow policy."""
    answer = Client(address).delete(f"overrides/{in_path(override_id)}")
    if as_json:
        options.print_json(answer)
    else:
        output.undone(answer["undone"])


def overrides(
    history: Annotated[bool, typer.Option("--history", help="Those that are over, too.")] = False,
    limit: options.Limit = 50,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """What was set at run time: by whom, when, and until when."""
    answer = Client(address).get("overrides", history=1 if history else None, limit=limit)
    if as_json:
        options.print_json(answer)
        return
    if not answer["overrides"]:
        output.say("Nothing was set at run time.")
        return
    rows = []
    for row in answer["overrides"]:
        state = "in force" if row["in_force"] else "over"
        if row["under"] is not None:
            state = f"not while {row['under']} is"
        if row["undone_s"] is not None:
            state = f"undone by {row['undone_by']} at {output.when(row['undone_s'])}"
        rows.append(
            (row["id"], row["kind"], output.override(row), row["who"], output.when(row["made_s"]), state)
        )
    output.table(("id", "kind", "what", "by", "at", "state"), rows)
