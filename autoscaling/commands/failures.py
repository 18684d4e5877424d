"""How a command ends: the exit codes, and the errors behind them."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
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


ENDING = (signal.SIGTERM, signal.SIGHUP)
"""What service managers, containers and terminals that are closed send: by default it ends a process on the spot."""


@contextmanager
def _unwound() -> Iterator[None]:
    """Whoever is ended from outside takes back what it has begun, as when it is interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only there may handlers be set
        return
    # What is ignored, as under nohup, stays so.
    mine = [each for each in ENDING if signal.getsignal(each) == signal.SIG_DFL]
    for each in mine:
        signal.signal(each, _end)
    try:
        yield
    finally:
        for each in mine:
            signal.signal(each, signal.SIG_DFL)


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Why a standard output takes no more. Commands tell of the other files that they write themselves."""


def _printed() -> None:
    """What was printed is out, or why it is not is known before the command is done."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _forget_output() -> None:
    """What the standard output did not take is not tried again when the process ends."""
    try:
        _printed()
    except OSError:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


class Commands(TyperGroup):
    """The root of the command line: every error of a command becomes one message and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        from deployments.errors import ConfigError

        try:
            with _unwound(), AFTERWARDS:
                found = super().invoke(ctx)
                _printed()
                return found
        except OSError as error:
            if error.errno not in FULL or error.filename is not None:
                raise
            _forget_output()
            typer.echo(f"The standard output can't be written: {error.strerror}", err=True)
            raise typer.Exit(FAILED) from None
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
