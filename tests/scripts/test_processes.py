"""What `down` ends, and what it must leave alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deployments.local import processes
from deployments.local.state import MARK

SLEEP = "import time; time.sleep(60)"
STUBBORN = (
    f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); {SLEEP}"
)
# Starts a child without an environment in a session of its own, says its pid, and waits.
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], env={{}}, start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""

Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    started: list[subprocess.Popen[str]] = []

    def start(code: str, run_dir: Path | None = None) -> subprocess.Popen[str]:
        environment = {**os.environ, **({MARK: str(run_dir)} if run_dir else {})}
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def _read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_ends_marked_processes_and_no_others(spawn: Spawn, tmp_path: Path) -> None:
    mine = spawn(SLEEP, tmp_path)
    unmarked = spawn(SLEEP)
    other_checkout = spawn(SLEEP, tmp_path / "other")
    same_beginning = spawn(SLEEP, Path(f"{tmp_path}-2"))

    assert processes.end(tmp_path) == 1

    assert mine.wait(5) == -signal.SIGTERM
    assert all(p.poll() is None for p in (unmarked, other_checkout, same_beginning))


def test_ends_a_child_that_lost_its_mark_and_its_parent(spawn: Spawn, tmp_path: Path) -> None:
    parent = spawn(PARENT, tmp_path)
    child = int(_read_line(parent))

    assert {process.pid for process in processes.ours(tmp_path)} == {parent.pid, child}
    assert processes.end(tmp_path) == 2
    assert not _is_alive(child)


def test_kills_what_ignores_sigterm(spawn: Spawn, tmp_path: Path) -> None:
    stubborn = spawn(STUBBORN, tmp_path)
    assert _read_line(stubborn) == "ready"

    assert processes.end(tmp_path, patience_s=0.3) == 1
    assert stubborn.wait(5) == -signal.SIGKILL


def test_does_not_end_itself_when_run_from_inside_the_cluster(spawn: Spawn, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from deployments.local import processes;"
        f"print(processes.end(Path({str(tmp_path)!r})), flush=True)"
    )
    inside = spawn(code, tmp_path)
    assert _read_line(inside) == "0"
    assert inside.wait(5) == 0


def test_ending_nothing_is_quick_and_harmless(tmp_path: Path) -> None:
    began = time.monotonic()
    assert processes.end(tmp_path) == 0
    assert time.monotonic() - began < 1


def test_names_who_listens_on_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        holder = processes.listener(server.getsockname()[1])
    assert holder is not None
    assert f"process {os.getpid()} (" in holder


def test_names_nobody_for_a_free_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert processes.listener(port) is None


def test_memory_of_a_process_is_counted(tmp_path: Path, spawn: Spawn) -> None:
    spawn(SLEEP, tmp_path)
    deadline = time.monotonic() + 5
    while processes.memory_bytes(processes.ours(tmp_path)) < 2**20 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes.memory_bytes(processes.ours(tmp_path)) >= 2**20
