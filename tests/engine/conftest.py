"""Nodes for tests, each in a folder of its own."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from deployments import model as model_module
from deployments.engine import host as host_module
from deployments.engine import models as models_module
from deployments.engine.control import ControlSocket
from tests.engine.lab import Node, until


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """Short, as a unix socket's path has to be."""
    folder = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A model that is used where it is."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the wall clock of host and replica, by so many seconds from the true time."""

    def set_by(seconds: float) -> None:
        clock = SimpleNamespace(time=lambda: time.time() + seconds, monotonic=time.monotonic)
        for module in (host_module, models_module, model_module):
            monkeypatch.setattr(module, "time", clock)

    return set_by


@pytest.fixture
async def node(run_dir: Path) -> AsyncIterator[Node]:
    """A node whose template is there."""
    node = Node(run_dir)
    node.host.models.start_node_template()
    server = await asyncio.start_unix_server(
        ControlSocket(node.host).serve, run_dir / "host.sock", limit=1 << 22
    )
    yield node
    for client in node.clients:
        client.close()
    server.close()
    await node.host.close()
    await until(lambda: not node.host.engines)
    await asyncio.gather(*node.host._tasks, return_exceptions=True)
