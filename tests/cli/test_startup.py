"""Completion, and what a command must not import before it needs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Cluster
from tests.control.lab import ORG, SMALL

ROOT = Path(__file__).parents[2]
HEAVY = (
    "ray",
    "torch",
    "vllm",
    "numpy",
    "sqlalchemy",
    "httpx",
    "plotext",
    "yaml",
    "cronsim",
    "autoscaling.core.types",
)


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        ([], (*HEAVY, "pydantic", "rich")),
        (["--help"], (*HEAVY, "pydantic")),
        (["--version"], (*HEAVY, "pydantic", "rich")),
        # Typer itself imports pydantic before it enters a group.
        (["policy", "--help"], HEAVY),
    ],
)
def test_nothing_heavy_is_imported_for_help(arguments: list[str], heavy: tuple[str, ...]) -> None:
    """`relight --help` is typed often; a quick start is a matter of what is imported."""
    code = (
        "import sys, autoscaling.cli\n"
        f"sys.argv = ['relight', *{arguments}]\n"
        f"{'autoscaling.cli.app(standalone_mode=False)' if arguments else ''}\n"
        f"print('HEAVY', [m for m in {heavy} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "HEAVY []"


def complete(cluster: Cluster, line: str) -> list[str]:
    """What bash is told for that line, by the mechanism that it uses itself."""
    words = line.split(" ")
    result = cluster.run(_RELIGHT_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    return result.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("relight policy explain ", [SMALL, ORG]),
        ("relight policy explain smol", [SMALL]),
        ("relight policy set smollm2-135m --policy k", ["keep-alive", "kpa"]),
        ("relight policy shadow start ray", ["ray-default"]),
        ("relight forecast org", [ORG]),
        ("relight mode s", ["shadow"]),
        ("relight pol", ["policy"]),
        ("relight prewarm u", ["undo"]),
        ("relight prewarm start smol", [SMALL]),
        ("relight prewarm smol", [SMALL]),
        ("relight history sm", [SMALL]),
    ],
)
def test_completion(cluster: Cluster, line: str, expected: list[str]) -> None:
    assert complete(cluster, line) == expected


def test_completion_completes_ids_of_what_is_in_force(cluster: Cluster) -> None:
    made = cluster.json("policy", "set", SMALL, "--wait-cost", "1")["override"]
    assert complete(cluster, "relight undo pol") == [made["id"]]


def test_completion_without_a_cluster_is_silent(cluster: Cluster) -> None:
    cluster.environ["RELIGHT_ADDRESS"] = "http://127.0.0.1:9"
    assert complete(cluster, "relight policy explain ") == []
