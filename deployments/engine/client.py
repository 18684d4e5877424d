"""How replicas and gateways reach their node's engine host. Imports neither torch nor vLLM nor Ray."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from deployments.engine.protocol import EngineInfo, EngineSpec, check_place, encode, set_private
from deployments.errors import EngineStartFailed

HOST_START_DEADLINE_S = 30.0
# Ray's own; and the key that vLLM's engines would ask the gateway for, which has none to give.
_NOT_INHERITED = ("RAY_", "VLLM_API_KEY")


async def ensure_host(run_dir: Path, raylet_pid: int | None) -> None:
    """Start this node's engine host unless it runs.

    Raises TimeoutError if it does not come up, PermissionError where its folder may be exchanged by another user.
    """
    check_place(run_dir)
    deadline_s = time.monotonic() + HOST_START_DEADLINE_S
    started = False
    while True:
        try:
            _, writer = await asyncio.open_unix_connection(run_dir / "host.sock")
            writer.close()
            return
        except OSError:
            if not started or not _host_is_up(run_dir):
                await asyncio.to_thread(_spawn_host, run_dir, raylet_pid)
                started = True
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"no engine host in {run_dir}, see {run_dir / 'host.log'}") from None
            await asyncio.sleep(0.02)


def _host_is_up(run_dir: Path) -> bool:
    """Whether somebody holds the host's lock. It is taken as the host's first act."""
    with (run_dir / "host.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    # It may not have come that far yet: give it the time of an interpreter's start.
    return time.time() - (run_dir / "host.spawned").stat().st_mtime < 3.0


def _spawn_host(run_dir: Path, raylet_pid: int | None) -> None:
    set_private(run_dir)
    (run_dir / "host.spawned").touch()
    command = [sys.executable, "-m", "deployments.engine.host", "--run-dir", str(run_dir)]
    if raylet_pid is not None:
        command += ["--raylet-pid", str(raylet_pid)]
    # Ray ends the children of a worker that ends; an orphan in its own session is not one of them.
    launcher = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
    with (run_dir / "host.log").open("ab") as output:
        done = subprocess.run(
            [sys.executable, "-c", launcher, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)},
            cwd="/",
            check=False,
            start_new_session=True,
        )
    if done.returncode:
        raise ConnectionError(f"the engine host could not be started, see {run_dir / 'host.log'}")


class HostConnection:
    """One connection to the host: messages there, events back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, run_dir: Path, raylet_pid: int | None) -> HostConnection:
        """Connect, starting the host if it does not run."""
        await ensure_host(run_dir, raylet_pid)
        reader, writer = await asyncio.open_unix_connection(run_dir / "host.sock", limit=1 << 22)
        return cls(reader, writer)

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises ConnectionError where the host is known to have gone."""
        try:
            if not self._writer.is_closing():
                self._writer.write(encode(message))
                return
        except RuntimeError:  # of uvloop, where the connection has just ended
            pass
        raise ConnectionResetError("the engine host went away")

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Events until the host is gone."""
        with contextlib.suppress(ConnectionError):
            async for line in self._reader:
                yield json.loads(line)

    async def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send and return the next event. Raises ConnectionError if the host goes first."""
        self.send(message)
        line = await self._reader.readline()
        if not line:
            raise ConnectionResetError("the engine host went away")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._writer.close()


async def acquire(
    connection: HostConnection,
    spec: EngineSpec,
    gpu_ids: list[str],
    requested_s: float,
    config: Mapping[str, Any] | None = None,
) -> EngineInfo:
    """Get an engine that is ready; the connection is its lease from here on.

    `config` is the fleet's `engine_host`, for a host on a node without a gateway, whom nobody else tells.

    Raises EngineStartFailed with the engine's own reason, ConnectionError if the host goes.
    """
    message = {
        "op": "acquire",
        "spec": spec.to_json(),
        "gpu_ids": gpu_ids,
        "requested_s": requested_s,
        "config": config,
    }
    connection.send(message)
    async for event in connection.events():
        if event["event"] == "ready":
            return EngineInfo.from_json(event["engine"])
        if event["event"] in ("failed", "exit"):
            raise EngineStartFailed(event["reason"])
    raise ConnectionResetError("the engine host went away")


async def warm(run_dir: Path, raylet_pid: int | None, message: Mapping[str, Any]) -> dict[str, Any]:
    """Have this node's host bring a model to a rung of warmth; see `Host.warm` for what goes in and comes back.

    Raises OSError or TimeoutError if there is no host.
    """
    host = await HostConnection.open(run_dir, raylet_pid)
    try:
        return await host.ask({"op": "warm", **message})
    finally:
        host.close()
