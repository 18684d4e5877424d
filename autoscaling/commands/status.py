"""`relight status`: what every model is doing, as the gateway tells it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoscaling.commands.client import checked_address, default_address
from autoscaling.commands.failures import UNREACHABLE

if TYPE_CHECKING:
    from rich.console import RenderableType

_PATH = "/relight/v1/status"
_STYLES = {
    "ready": "green",
    "lighting": "yellow",
    "parked": "cyan",
    "draining": "magenta",
    "failed": "bold red",
    "dark": "dim",
}


class Unreachable(Exception):
    pass


def register(app: typer.Typer) -> None:
    app.command("status")(status)


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it, once a second.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for programs instead of a table.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            help="The gateway's address (default: RELIGHT_ADDRESS, else this machine's cluster).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what every model is doing: dark, lighting, parked, ready, draining or failed."""
    from autoscaling.commands.output import console

    base = checked_address(address or default_address())
    try:
        if watch:
            _watch(base, as_json)
        else:
            answer = fetch(base)
            if as_json:
                typer.echo(json.dumps(answer, indent=2))
            else:
                console().print(render(answer))
    except Unreachable as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(UNREACHABLE) from None


def fetch(base: str, timeout_s: float = 5.0) -> dict[str, Any]:
    import http.client
    import urllib.error

    from deployments.local.http import get_json

    try:
        answer = get_json(base + _PATH, timeout_s=timeout_s)
    except urllib.error.HTTPError as error:
        raise Unreachable(f"{base} answers, but not as Relight does: HTTP {error.code} for {_PATH}") from None
    except OSError:
        raise Unreachable(f"Nothing answers at {base}; scripts/up starts it.") from None
    except http.client.HTTPException:
        raise Unreachable(f"{base} answers, but not as Relight does: no HTTP") from None
    except ValueError:
        raise Unreachable(f"{base} answers, but not as Relight does: no JSON at {_PATH}") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("models"), list):
        raise Unreachable(f"{base} answers, but not as Relight does: no models at {_PATH}")
    return answer


def _watch(base: str, as_json: bool) -> None:
    """Only the first answer must be good: a gateway that restarts should not end the watch."""
    from rich.live import Live
    from rich.text import Text

    from autoscaling.commands.output import console

    answer = fetch(base)
    try:
        if as_json:
            while True:  # one line each, for programs that read as it comes
                typer.echo(json.dumps(answer))
                answer = _next(base)
        with Live(render(answer), console=console(), auto_refresh=False, screen=False) as live:
            while True:
                time.sleep(1)
                try:
                    live.update(render(fetch(base)), refresh=True)
                except Unreachable as error:
                    live.update(Text(str(error), style="red"), refresh=True)
    except KeyboardInterrupt:
        pass


def _next(base: str) -> dict[str, Any]:
    """The next good answer. What is wrong meanwhile is said once, on the standard error."""
    said = ""
    while True:
        time.sleep(1)
        try:
            return fetch(base)
        except Unreachable as error:
            if str(error) != said:
                said = str(error)
                typer.echo(said, err=True)


def render(answer: Mapping[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    table.add_column("state")
    for column in ("replicas", "in flight", "queued"):
        table.add_column(column, justify="right")
    table.add_column("last cold start", overflow="fold")
    table.add_column("why", overflow="fold")
    for model in answer["models"]:
        state = str(model.get("state", "?"))
        # Text, not str: a name may hold square brackets, which rich would read as markup.
        table.add_row(
            Text(", ".join([str(model.get("id", "?")), *map(str, model.get("aliases") or [])])),
            Text(state, style=_STYLES.get(state, "")),
            *(str(model.get(count, "-")) for count in ("replicas", "in_flight", "queued")),
            Text(_cold_start(model.get("last_cold_start"))),
            Text(str(model.get("reason") or "")),
        )
    nodes = len(answer.get("nodes") or [])
    gateways = answer.get("gateways", "?")
    foot = Text(f"{nodes} {_plural('node', nodes)}, {gateways} {_plural('gateway', gateways)}", style="dim")
    ailing = [Text(f"controller: {text}", style="yellow") for text in _ailing(answer.get("controller") or {})]
    return Group(table, foot, *ailing)


def _ailing(health: Mapping[str, Any]) -> list[str]:
    """What the controller says is wrong with it; nothing while all is well."""
    if health.get("ok", True):
        return []
    parts = {part: (health.get(part) or {}).get("error") for part in ("store", "forecaster")}
    said = {**parts, **(health.get("errors") or {})}
    return [f"{what}: {why}" for what, why in said.items() if why] or ["it is not well; --json tells more"]


def _plural(word: str, count: object) -> str:
    return word if count == 1 else f"{word}s"


def _cold_start(start: Mapping[str, Any] | None) -> str:
    """`2.31 s cold: place 0.90, load 1.20`: the phases in their order, without those that took no time."""
    if not start:
        return ""
    phases = sorted(start.get("phases") or [], key=lambda phase: float(phase.get("start_s", 0)))
    lasted = [(str(phase["name"]), float(phase["duration_s"])) for phase in phases]
    shown = [f"{name} {seconds:.2f}" for name, seconds in lasted if seconds >= 0.005]
    text = f"{float(start.get('total_s', 0)):.2f} s {start.get('kind', '')}".strip()
    return f"{text}: {', '.join(shown)}" if shown else text
