"""The Serve deployment of one model: holds the GPUs, holds an engine, and hands out leases on it.

It imports neither torch nor vLLM. A gateway asks for a lease through its Serve handle, so that Serve routes, counts,
scales and drains; the bytes of the request then go straight from the gateway to the engine's socket. Serve counts a
lease as one ongoing request until the gateway gives it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from autoscaling.live.call_log import log_no_calls
from deployments.engine import http
from deployments.engine.client import HostConnection, acquire
from deployments.engine.protocol import (
    EngineInfo,
    EngineSpec,
    default_run_dir,
    remove_dead_sockets,
    set_private,
)
from deployments.engine.relay import Tunnel
from deployments.errors import EngineStartFailed

log = logging.getLogger("ray.serve")

TAKE_DEADLINE_S = 10.0  # a gateway that died between asking and taking frees its lease
RETRY_AFTER_S = 1.0  # a failed start is tried again by the next request, but not in a tight loop
HEALTH_TIMEOUT_S = 30.0

_KILL = {"op": "kill", "reason": "it no longer answered"}


class ModelReplica:
    """One replica. Its constructor ends when the engine is ready or can't start; it never raises for the latter.

    A replica that raised would be counted by Serve as a failed start, and three of those end a deployment for
    good; a replica that says why lets the gateway tell the client, and tries again when asked again.
    """

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, spec: Mapping[str, Any], host_config: Mapping[str, Any]
    ) -> None:
        import ray

        log_no_calls()
        self._init_s = time.time()
        self._process_s = _process_created_s()
        self._spec = EngineSpec.from_json(spec)
        self._host_config = dict(host_config)
        context = ray.get_runtime_context()
        self._node_id = context.get_node_id()
        self._gpu_ids = [str(i) for i in context.get_accelerator_ids().get("GPU", [])]
        self._raylet_pid = os.getppid()
        self._run_dir = default_run_dir(self._node_id)
        self._id = secrets.token_hex(6)
        self._leases: dict[str, asyncio.Event] = {}
        self._taken: set[str] = set()
        self._host: HostConnection | None = None
        self._engine: EngineInfo | None = None
        self._engine_control: asyncio.StreamWriter | None = None
        self._failure: str | None = None
        self._failed_s = 0.0  # monotonic: clocks are set
        self._starting: asyncio.Task[None] | None = None
        self._closing = False
        self._tunnel = Tunnel(self._serve_gateway)
        set_private(self._run_dir / "replicas")
        remove_dead_sockets(self._run_dir / "replicas")
        self._lease_socket = self._run_dir / "replicas" / f"{self._id}.sock"
        self._lease_server = await asyncio.start_unix_server(self._serve_gateway, self._lease_socket)
        self._tcp_address = await self._tunnel.listen(ray.util.get_node_ip_address())
        await self._engine_settled()

    # The engine

    async def _engine_settled(self) -> None:
        """Wait until there is an engine that is ready, or a failure to tell of."""
        if self._engine is not None:
            return
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start_engine())
        await asyncio.shield(self._starting)

    async def _start_engine(self) -> None:
        if self._failure is not None:
            await asyncio.sleep(max(0.0, self._failed_s + RETRY_AFTER_S - time.monotonic()))
        requested_s, began_s = time.time(), time.monotonic()
        while True:
            try:
                host = await HostConnection.open(self._run_dir, self._raylet_pid)
                info = await acquire(host, self._spec, self._gpu_ids, requested_s, self._host_config)
                break
            except EngineStartFailed as error:
                self._failure, self._failed_s = error.message, time.monotonic()
                host.close()
                return
            except PermissionError as error:
                # What a person must change does not change by itself.
                self._failure, self._failed_s = str(error), time.monotonic()
                return
            except (ConnectionError, TimeoutError, OSError) as error:
                # The host was killed while it started our engine: its successor starts another.
                log.warning("engine host of this node: %s", error)
                if time.monotonic() - began_s > self._spec.start_deadline_s:
                    self._failure = f"no engine host on this node: {error}"
                    self._failed_s = time.monotonic()
                    return
                await asyncio.sleep(0.2)
        with contextlib.suppress(OSError):
            # Our own hold on the engine: with it the engine outlives its host.
            _, self._engine_control = await asyncio.open_unix_connection(info.control)
        self._failure = None
        self._engine, self._host = info, host
        self._tunnel.target = info.http
        self._watching = asyncio.create_task(self._watch(host, info))

    async def _watch(self, host: HostConnection, info: EngineInfo) -> None:
        """Follow the engine and its host: replace the one, find the other again."""
        while True:
            async for event in host.events():
                if event["event"] == "exit":
                    self._lost(info, event["reason"])
                    return
                if event["event"] == "released":
                    return
            if self._closing:
                return
            log.warning("the engine host went away; its successor takes engine %s over", info.engine_id)
            # Where the whole node ends there is no successor, and the engine went with its host.
            self._checking = asyncio.create_task(self._check_engine(info.engine_id))
            try:
                host = await HostConnection.open(self._run_dir, self._raylet_pid)
                self._host = host
                host.send({"op": "attach", "engine_id": info.engine_id})
                if self._engine is not info:
                    host.send(_KILL)
            except (OSError, TimeoutError) as error:
                log.warning("engine host: %s", error)
                await asyncio.sleep(0.5)

    def _lost(self, info: EngineInfo, reason: str) -> None:
        if self._engine is None or self._engine.engine_id != info.engine_id:
            return
        log.warning("engine %s ended: %s", info.engine_id, reason)
        self._forget_engine()
        if not self._closing:
            self._starting = asyncio.create_task(self._start_engine())

    def _forget_engine(self) -> None:
        self._engine = None
        self._tunnel.target = None
        if self._engine_control is not None:
            self._engine_control.close()
            self._engine_control = None
        if self._host is not None:
            self._host.close()
            self._host = None

    # Leases

    async def lease(self, lease_id: str) -> AsyncIterator[dict[str, Any]]:
        """Yield one message, `{"engine": …}` or `{"failed": reason}`, then stay open until the lease is given back."""
        asked_s = time.time()
        await self._engine_settled()
        engine = self._engine
        if engine is None:
            yield {"failed": self._failure or "the engine ended while it started"}
            return
        released = asyncio.Event()
        self._leases[lease_id] = released
        try:
            yield {
                "engine": engine.to_json(),
                "replica": self._id,
                "node": self._node_id,
                "lease_socket": str(self._lease_socket),
                "tunnel": {"address": self._tcp_address, "token": self._tunnel.token},
                "process_s": self._process_s,
                "init_s": self._init_s,
                "asked_s": asked_s,
            }
            taken = asyncio.create_task(released.wait())
            done, _ = await asyncio.wait({taken}, timeout=TAKE_DEADLINE_S)
            if not done and lease_id not in self._taken:
                taken.cancel()
                return
            await taken
        finally:
            self._leases.pop(lease_id, None)
            self._taken.discard(lease_id)

    async def _serve_gateway(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One gateway's connection: it takes and releases its leases here. When it dies, they are all released.

        A lease that is taken too late is lost, and the gateway told so: Serve does not count it any more.
        """
        mine: set[str] = set()
        try:
            async for line in reader:
                message = json.loads(line)
                lease_id = message["lease"]
                if message["op"] == "take" and lease_id not in self._leases:
                    writer.write(json.dumps({"op": "lost", "lease": lease_id}).encode() + b"\n")
                    continue
                if message["op"] == "take":
                    mine.add(lease_id)
                    self._taken.add(lease_id)
                    continue
                mine.discard(lease_id)
                if event := self._leases.get(lease_id):
                    event.set()
                if message.get("engine_failed"):
                    self._checking = asyncio.create_task(self._check_engine(message.get("engine_id")))
        except (ConnectionError, ValueError, KeyError):
            pass
        finally:
            for lease_id in mine:
                if event := self._leases.get(lease_id):
                    event.set()
            writer.close()

    async def _check_engine(self, engine_id: str | None) -> None:
        """A gateway says that our engine failed it: see whether it still answers, and have it replaced if not."""
        engine = self._engine
        if engine is None or engine.engine_id != engine_id:
            return
        try:
            status, _ = await asyncio.wait_for(http.request(engine.http, "GET", "/health"), HEALTH_TIMEOUT_S)
            healthy = status == 200
        except (OSError, TimeoutError):
            healthy = False
        if not healthy and self._engine is engine:
            # Whoever asks from now on waits for the next one: a lease on this one would only spend an attempt.
            self._engine = self._tunnel.target = None
            self._starting = asyncio.create_task(self._replace())

    async def _replace(self) -> None:
        """Have the host end the engine that no longer answers and, once it holds no GPU any more, start another."""
        if self._host is not None:
            # Where the host has just gone, its successor is told once it is there.
            with contextlib.suppress(ConnectionError):
                self._host.send(_KILL)
        await self._watching
        self._forget_engine()
        if not self._closing:
            await self._start_engine()

    # Serve's hooks

    async def check_health(self) -> None:
        """Serve's periodic check. A failed engine is no reason to replace the replica: the next lease retries it."""
        if (engine := self._engine) is not None:
            await self._check_engine(engine.engine_id)

    async def __del__(self) -> None:
        """Serve calls this once the last lease is back: let the host park the engine, or end it."""
        self._closing = True
        if self._host is not None:
            # Of a host that has just gone, the successor ends what no replica comes for.
            with contextlib.suppress(ConnectionError, TimeoutError, AttributeError):
                self._host.send({"op": "release", "park": True})
                await asyncio.wait_for(asyncio.shield(self._watching), 5)
        self._forget_engine()
        self._lease_server.close()
        self._tunnel.close()
        self._lease_socket.unlink(missing_ok=True)


def _process_created_s() -> float:
    import psutil

    return float(psutil.Process().create_time())
