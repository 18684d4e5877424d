"""`relight up` and `relight down`: the checkout's own scripts, from wherever one is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import typer

_PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def register(app: typer.Typer) -> None:
    # Their options are those of the scripts, which also work before this command is installed.
    app.command("up", context_settings=_PASS_THROUGH, help="Start Ray and the fleet on this machine.")(_up)
    app.command("down", context_settings=_PASS_THROUGH, help="End what `relight up` started.")(_down)


def _up(context: typer.Context) -> None:
    _run_script("up", context.args)


def _down(context: typer.Context) -> None:
    _run_script("down", context.args)


def _run_script(verb: str, arguments: list[str]) -> NoReturn:
    script = Path(__file__).resolve().parents[2] / "scripts" / verb
    if not script.is_file():
        typer.echo(f"relight {verb} works in a checkout of Relight, and {script} is not there.", err=True)
        raise typer.Exit(1)
    os.execv(script, [str(script), *arguments])
