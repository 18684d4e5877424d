"""The engine host that starts with its node: which raylets are found, and with which environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deployments import node_start
from deployments.node_start import Raylet, raylets

NODE = "a1b2c3d4e5f6" + "0" * 44


def test_raylets_are_known_by_their_command_line() -> None:
    processes = [
        (1, ["/venv/ray/core/src/ray/raylet/raylet", "--raylet_socket_name=/tmp/r", f"--node_id={NODE}"]),
        (2, ["python", "raylet", f"--node_id={NODE}"]),
        (3, ["/venv/ray/core/src/ray/raylet/raylet", "--raylet_socket_name=/tmp/r"]),
        (4, []),
        (5, ["ray::IDLE", f"--node-id={NODE}"]),
    ]
    assert raylets(processes) == [Raylet(1, NODE)]


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like a raylet, whose environment names a run directory."""
    command = ["raylet", "-c", "import sys; print(1, flush=True); sys.stdin.read()", f"--node_id={NODE}"]
    environ = {**os.environ, "RELIGHT_RUN_DIR": str(tmp_path), "RELIGHT_CACHE": "/elsewhere"}
    with subprocess.Popen(
        command, executable=sys.executable, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_the_host_has_the_raylets_environment(
    raylet: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Path, int | None, str | None]] = []

    async def ensure(run_dir: Path, raylet_pid: int | None) -> None:
        started.append((run_dir, raylet_pid, os.environ.get("RELIGHT_CACHE")))

    monkeypatch.setattr(node_start, "ensure_host", ensure)
    # Other Rays may run on this machine.
    mine = psutil.Process(raylet.pid).cmdline()
    monkeypatch.setattr(node_start, "_processes", lambda: [(raylet.pid, mine)])
    before = dict(os.environ)
    try:
        assert node_start.start(0) == [Raylet(raylet.pid, NODE)]
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert started == [(tmp_path / NODE[-12:], raylet.pid, "/elsewhere")]


def test_own_processes_are_looked_at(raylet: subprocess.Popen[bytes]) -> None:
    assert Raylet(raylet.pid, NODE) in raylets(node_start._processes())


def test_a_node_without_ray_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(node_start, "_processes", list)
    assert node_start.main(["--wait-s", "0"]) == 1
    assert "no raylet within 0 s; start Ray first" in capsys.readouterr().err
