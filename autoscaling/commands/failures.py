"""How a command ends: the exit codes, and the errors behind them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import typer
from typer.core import TyperGroup

DONE = 0
FAILED = 1
WRONG = 2
UNREACHABLE = 3
UNAUTHORISED = 4

EXIT_CODES = (
    "Exit codes: 0 done; 1 it failed or was refused; 2 the command line, a value or a file is wrong; "
    "3 no cluster answers; 4 the token is missing or wrong."
)


AFTERWARDS = ExitStack()
"""What is called when the command ends, however it ends."""


class CommandError(Exception):
    """What ends a command: one message for people, and the exit code for scripts."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class Commands(TyperGroup):
    """The root of the command line: every error of a command becomes one message and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        from deployments.errors import ConfigError

        try:
            with AFTERWARDS:
                return super().invoke(ctx)
        except CommandError as error:
            typer.echo(error.message, err=True)
            raise typer.Exit(error.code) from None
        except ConfigError as error:
            typer.echo(error.message, err=True)
            raise typer.Exit(WRONG) from None


class WithDefault(TyperGroup):
    """A group in which what is no subcommand begins the arguments of the first one: `prewarm MODEL`, `prewarm list`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Subcommands, and what the first one takes in their place."""
        found: list[Any] = super().shell_complete(ctx, incomplete)
        first = next(iter(self.commands.values()))
        argument = next((param for param in first.params if param.param_type_name == "argument"), None)
        if argument is not None:
            found += argument.shell_complete(ctx, incomplete)
        return found
