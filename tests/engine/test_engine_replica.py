"""A model's replica over a real engine host: what it lends once its engine, or its whole node, is past help."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from deployments import model as model_module
from deployments.engine import host as host_module
from deployments.engine.protocol import EngineSpec
from deployments.model import ModelReplica
from tests.engine.lab import Node, alive, spec, until


@contextlib.asynccontextmanager
async def replica_of(
    node: Node, model: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ModelReplica]:
    """Of a model without GPUs, lit unless it can't be; what Ray tells of its node is made up."""
    context = SimpleNamespace(get_node_id=lambda: node.run_dir.name, get_accelerator_ids=dict)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("RELIGHT_RUN_DIR", str(node.run_dir.parent))
    node.configure(model)
    replica = object.__new__(ModelReplica)
    await replica.__init__(model.to_json(), {"prebuilt": "off"})  # type: ignore[misc]
    yield replica
    await replica.__del__()


@pytest.fixture
async def replica(node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ModelReplica]:
    """One that is lit."""
    async with replica_of(node, spec(weights), monkeypatch) as replica:
        yield replica


class Gateway:
    """One that is lent engines."""

    def __init__(self, replica: ModelReplica) -> None:
        self._replica = replica
        self._asked = 0

    async def lent(self) -> dict[str, Any]:
        """What the replica says first, once it says something."""
        self._asked += 1
        lease = self._replica.lease(f"l{self._asked}")
        answer = await anext(lease)
        await lease.aclose()  # type: ignore[attr-defined]
        return answer

    async def failed(self, engine: dict[str, Any]) -> None:
        """Tell the replica that its engine failed a request."""
        _, channel = await asyncio.open_unix_connection(self._replica._lease_socket)
        message = '{"op": "release", "lease": "l0", "engine_failed": true, "engine_id": "%s"}\n'
        channel.write((message % engine["engine_id"]).encode())
        await channel.drain()
        channel.close()


async def test_an_engine_that_does_not_answer_is_not_lent_again(
    replica: ModelReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs, and its host has not noticed: who asks waits for the next one, which starts when it is gone."""
    monkeypatch.setattr(model_module, "HEALTH_TIMEOUT_S", 0.1)
    gateway = Gateway(replica)
    first = (await gateway.lent())["engine"]
    os.kill(first["pid"], signal.SIGSTOP)
    await gateway.failed(first)
    await until(lambda: replica._engine is None)
    second = (await gateway.lent())["engine"]
    assert second["engine_id"] != first["engine_id"]
    assert not alive(first["pid"])


async def test_an_engine_that_hangs_as_the_connection_to_its_host_ends_is_replaced(
    replica: ModelReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be told then is told when the host is found again."""
    gateway = Gateway(replica)
    first = (await gateway.lent())["engine"]
    os.kill(first["pid"], signal.SIGSTOP)

    async def hangs(*_: object) -> None:
        assert replica._host is not None
        replica._host._writer.close()
        raise TimeoutError

    monkeypatch.setattr(model_module.http, "request", hangs)
    await replica._check_engine(first["engine_id"])
    monkeypatch.undo()
    second = (await gateway.lent())["engine"]
    assert second["engine_id"] != first["engine_id"]
    assert not alive(first["pid"])


async def test_a_replica_ends_whole_as_the_connection_to_its_host_ends(replica: ModelReplica) -> None:
    await Gateway(replica).lent()
    assert replica._host is not None
    replica._host._writer.close()
    await replica.__del__()
    assert replica._engine is None and not replica._lease_socket.exists()


async def test_an_engine_that_went_with_its_host_is_not_lent(
    node: Node, replica: ModelReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that ends takes its host and its engines along, and its replicas end a little later."""
    opened = model_module.HostConnection.open

    async def no_host(*_: object) -> None:
        raise TimeoutError("no engine host")

    monkeypatch.setattr(model_module.HostConnection, "open", no_host)
    gateway = Gateway(replica)
    first = (await gateway.lent())["engine"]
    # Whoever would have told of its end ends as well.
    node.host.engines[first["engine_id"]].watcher = None
    os.kill(first["pid"], signal.SIGKILL)
    await until(lambda: not node.host.engines)
    assert (await gateway.lent())["engine"] == first  # nobody has told
    assert replica._host is not None
    replica._host._reader.feed_eof()
    await until(lambda: replica._engine is None)
    assert replica._tunnel.target is None
    asking = asyncio.create_task(gateway.lent())
    await asyncio.sleep(0.05)
    assert not asking.done()
    monkeypatch.setattr(model_module.HostConnection, "open", opened)
    before_s = time.time()
    answer = await asking
    assert answer["engine"]["engine_id"] != first["engine_id"]
    assert answer["engine"]["ready_s"] >= before_s


async def test_a_clock_that_is_set_back_holds_no_start_back(
    node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch, set_clock: Callable[[float], None]
) -> None:
    """A machine that starts without a network has a wrong clock, and nothing to download from."""
    monkeypatch.setattr(host_module, "FAILURE_STANDS_S", 0.0)
    monkeypatch.setattr(model_module, "RETRY_AFTER_S", 0.0)
    async with replica_of(node, spec(weights.parent / "later"), monkeypatch) as replica:
        gateway = Gateway(replica)
        assert "there is no folder" in (await gateway.lent())["failed"]
        await asyncio.to_thread(weights.rename, weights.parent / "later")
        set_clock(-7200.0)
        assert "engine" in await gateway.lent()


async def test_a_host_that_comes_back_is_told_which_engine_to_end(
    node: Node, replica: ModelReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its predecessor was told of an engine that hangs went with it."""
    monkeypatch.setattr(model_module, "HEALTH_TIMEOUT_S", 0.1)
    gateway = Gateway(replica)
    first = (await gateway.lent())["engine"]
    os.kill(first["pid"], signal.SIGSTOP)
    assert replica._host is not None
    replica._host.send = lambda _: None  # type: ignore[method-assign] # nobody is there to hear it
    await gateway.failed(first)
    await until(lambda: replica._engine is None)
    asking = asyncio.create_task(gateway.lent())
    await asyncio.sleep(0.05)
    assert alive(first["pid"]) and not asking.done()
    replica._host._reader.feed_eof()
    assert (await asking)["engine"]["engine_id"] != first["engine_id"]
    assert not alive(first["pid"])


async def test_a_lease_that_is_taken_too_late_is_lost(
    replica: ModelReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve does not count it any more, so its gateway is told; nothing of it stays."""
    monkeypatch.setattr(model_module, "TAKE_DEADLINE_S", 0.0)
    lease = replica.lease("late")
    await anext(lease)
    with pytest.raises(StopAsyncIteration):
        await anext(lease)
    reader, channel = await asyncio.open_unix_connection(replica._lease_socket)
    channel.write(b'{"op": "take", "lease": "late"}\n')
    assert json.loads(await reader.readline()) == {"op": "lost", "lease": "late"}
    assert not replica._taken
    monkeypatch.setattr(model_module, "TAKE_DEADLINE_S", 20.0)
    lease = replica.lease("in time")
    await anext(lease)
    channel.write(b'{"op": "take", "lease": "in time"}\n{"op": "release", "lease": "in time"}\n')
    with pytest.raises(StopAsyncIteration):
        await anext(lease)
    assert not replica._taken
    channel.close()
