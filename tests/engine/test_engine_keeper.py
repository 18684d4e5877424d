"""An engine's life is that of its holders: the keeper alone, in a process of its own."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ENGINE = """
import os, socket, subprocess, sys, threading
from deployments.engine.keeper import Keeper
os.setsid()
child = subprocess.Popen(["sleep", "60"])
control = socket.socket(fileno=int(sys.argv[1]))
Keeper(control, "e1", grace_s=float(sys.argv[2]), first_grace_s=float(sys.argv[3])).start()
print(child.pid, flush=True)
threading.Event().wait()
"""
LONG_S = 60.0
SHORT_S = 0.2


class Kept:
    """A process with a keeper, and a child of it."""

    def __init__(self, path: Path, grace_s: float, first_grace_s: float) -> None:
        self.path = str(path)
        with socket.socket(socket.AF_UNIX) as control:
            control.bind(self.path)
            control.listen(4)
            self.process = subprocess.Popen(
                [sys.executable, "-c", ENGINE, str(control.fileno()), str(grace_s), str(first_grace_s)],
                pass_fds=[control.fileno()],
                stdout=subprocess.PIPE,
                cwd=Path(__file__).resolve().parents[2],
            )
        assert self.process.stdout is not None
        self.child = os.pidfd_open(int(self.process.stdout.readline()))

    def holder(self) -> socket.socket:
        """Another holder, greeted."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        assert json.loads(connection.recv(4096)) == {"engine_id": "e1", "pid": self.process.pid}
        return connection

    def ends(self) -> bool:
        """Whether it ends with its child, soon."""
        self.process.wait(20)
        return bool(select.select([self.child], [], [], 20)[0])

    @property
    def lives(self) -> bool:
        return self.process.poll() is None


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as name:
        yield Path(name)


def test_it_ends_when_no_holder_ever_comes(folder: Path) -> None:
    """With its children, after the first grace."""
    assert Kept(folder / "c", LONG_S, SHORT_S).ends()


def test_it_ends_when_its_last_holder_goes(folder: Path) -> None:
    """Not with the first of two."""
    kept = Kept(folder / "c", SHORT_S, LONG_S)
    first, second = kept.holder(), kept.holder()
    first.close()
    # The keeper has seen that, for it greets the next one after it.
    kept.holder().close()
    assert kept.lives
    second.close()
    assert kept.ends()


def test_it_lives_on_when_a_holder_comes_within_the_grace(folder: Path) -> None:
    """As after the death of the host."""
    kept = Kept(folder / "c", 2.0, LONG_S)
    kept.holder().close()
    again = kept.holder()
    deadline_s = time.monotonic() + 2.5
    while time.monotonic() < deadline_s:
        assert kept.lives
        select.select([kept.child], [], [], 0.5)
    again.send(b"what a holder says is of no account")
    kept.holder().close()
    assert kept.lives
    again.close()
    assert kept.ends()
