"""The simulator's commands on files of a few lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from autoscaling.cli import app

TWO_STATES = ("--cold-start", "30s")


def run(*arguments: object) -> Any:
    """The result of `relight ARGUMENTS`."""
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})


def says(*arguments: object) -> str:
    """What it prints; it must be done."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def report(*arguments: object) -> Any:
    """What `--json -` prints."""
    return json.loads(says(*arguments, "--json", "-"))


def fails(*arguments: object) -> str:
    """What it says on stderr, where a value or a file is wrong; stdout is empty."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return str(result.stderr)


def requests(folder: Path, times: Iterable[float], model: str = "m", exec_s: float = 5.0) -> Path:
    """A trace of single requests."""
    file = folder / f"{model}.csv"
    rows = "".join(f"{time_s:g},{model},{exec_s:g}\n" for time_s in times)
    file.write_text("timestamp_s,model,exec_s\n" + rows)
    return file
