"""A node's engine host with a template that forks tiny HTTP servers: a real process tree, without torch."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployments.engine.client import HostConnection, acquire
from deployments.engine.host import Host
from deployments.engine.protocol import EngineInfo, EngineSpec

STUB = "tests.engine.stub_template"


async def until(look: Callable[[], Any], patience_s: float = 20.0) -> Any:
    """What `look` returns once it is true."""
    deadline_s = time.monotonic() + patience_s
    while not (found := look()):
        assert time.monotonic() < deadline_s, "waited in vain"
        await asyncio.sleep(0.01)
    return found


def alive(pid: int | None) -> bool:
    """Whether the process runs; one that waits to be reaped does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def spec(weights: Path, model: str = "tiny", **changes: Any) -> EngineSpec:
    """A model of the stub."""
    environment = tuple((k, str(v)) for k, v in changes.pop("env", {}).items())
    return EngineSpec(model, (model,), str(weights), env=environment, **changes)


class Node:
    """A host in this process, with a stub for a template, and clients of it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.host = Host(run_dir, STUB)
        self.clients: list[HostConnection] = []

    def configure(self, *specs: EngineSpec, **config: Any) -> None:
        """What a gateway tells."""
        self.host.configure({"prebuilt": "off", **config}, list(specs))

    async def client(self) -> HostConnection:
        client = HostConnection(*await asyncio.open_unix_connection(self.run_dir / "host.sock"))
        self.clients.append(client)
        return client

    async def lit(self, model: EngineSpec) -> tuple[HostConnection, EngineInfo]:
        """A replica of the model with its engine."""
        client = await self.client()
        return client, await acquire(client, model, [], time.time())

    async def released(self, client: HostConnection, *, park: bool = True) -> None:
        """The replica is done with its engine."""
        assert (await client.ask({"op": "release", "park": park}))["event"] == "released"
