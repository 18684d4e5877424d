"""`Engines` over Ray Serve: a lease comes through a Serve handle, the bytes go straight to the engine's socket.

On the engine's own node that socket is used as it is; from another node through a tunnel to the replica
(deployments/engine/relay.py). A model that is dark is asked for twice at once: from Serve, whose queue is what makes it
start a replica, and, where the replica can only land on this node and needs no GPU, from this node's engine host, so
that the engine starts beside the replica and can answer before it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, RequestCancelledError

from deployments.engine.client import HostConnection
from deployments.engine.protocol import EngineInfo, EngineSpec, remove_dead_sockets, set_private
from deployments.engine.relay import local_end, open_tunnel
from deployments.errors import (
    ControllerUnavailable,
    EngineInterrupted,
    EngineStartFailed,
    EngineUnreachable,
)
from deployments.gateway.engines import ColdStart, EngineResponse, Headers, Phase, Progress
from deployments.gateway.observe import Clock, Moment
from deployments.gateway.reports import Reports
from deployments.gateway.starts import StartLog
from deployments.gateway.traffic import TrafficCounter
from deployments.gateway.transport import UnixTransport

log = logging.getLogger("ray.serve")

RETRY_S = 0.1
SUSPECT_S = 1.0
"""How long an engine that could not be reached is not asked again; a dead one is replaced meanwhile.

Each time that it can't be reached again this doubles, up to `MOST_SUSPECT_S`: a request has few attempts.
"""
MOST_SUSPECT_S = 8.0
KEPT_ENDED = 256
METRICS_TIMEOUT_S = 2.0
LOOK_AT_CLOCK_EVERY_S = 1.0
CONTROLLER_TIMEOUT_S = 20.0


class Place(Protocol):
    """Where this gateway runs."""

    @property
    def node_id(self) -> str: ...
    @property
    def raylet_pid(self) -> int: ...
    @property
    def run_dir(self) -> Path: ...


class ServeLease:
    """A lease that Serve has granted."""

    def __init__(
        self,
        engines: ServeEngines,
        lease_id: str,
        grant: Mapping[str, Any],
        cold_start: ColdStart,
        transport: UnixTransport,
    ) -> None:
        self.engine_id: str = grant["engine"]["engine_id"]
        self.cold_start = cold_start
        self._engines = engines
        self._lease_id = lease_id
        self._grant = grant
        self._transport = transport
        self._released = False
        self._lost = False
        self._asking: asyncio.Timeout | None = None

    async def request(self, method: str, target: str, headers: Headers, body: bytes) -> EngineResponse:
        try:
            async with asyncio.timeout(0 if self._lost else None) as self._asking:
                request = self._transport.request(method, target, headers, body)
                return await self._engines.ask(self.engine_id, request)
        except TimeoutError:
            raise EngineUnreachable("The replica had given the lease up before it was taken.") from None
        finally:
            self._asking = None

    def lose(self) -> None:
        """The replica has given it up: what has not begun to be answered is asked under another lease."""
        self._lost = True
        if self._asking is not None:
            self._asking.reschedule(asyncio.get_running_loop().time())

    async def release(self, *, engine_failed: bool = False) -> None:
        if self._released:
            return
        self._released = True
        self._engines.give_back(self._grant, self._lease_id, engine_failed=engine_failed and not self._lost)


class EarlyLease:
    """A lease on an engine that its replica has not taken over yet; Serve's own lease follows in the background."""

    def __init__(
        self,
        engines: ServeEngines,
        info: EngineInfo,
        granted: asyncio.Task[ServeLease],
        transport: UnixTransport,
    ) -> None:
        self.engine_id = info.engine_id
        self.cold_start = engines.starts.cold_start(info)
        self._engines = engines
        self._info = info
        self._granted = granted
        self._transport = transport
        self._released = False

    async def request(self, method: str, target: str, headers: Headers, body: bytes) -> EngineResponse:
        return await self._engines.ask(self.engine_id, self._transport.request(method, target, headers, body))

    async def release(self, *, engine_failed: bool = False) -> None:
        if self._released:
            return
        self._released = True
        self._engines.give_back_early(self._info, self._granted, engine_failed=engine_failed)


class ServeEngines:
    """See the module. Create it on the event loop that uses it, then `start` it."""

    def __init__(
        self,
        specs: Mapping[str, EngineSpec],
        handles: Mapping[str, Any],
        controller: Any,
        place: Place,
        host_config: Mapping[str, Any],
        *,
        early_wake: Callable[[EngineSpec], bool],
        max_ongoing: Mapping[str, int],
        counts: Callable[[], Mapping[str, tuple[int, int]]],
        traffic: TrafficCounter,
        clock: Clock,
    ) -> None:
        self._specs = specs
        self._handles = {model: handle.options(stream=True) for model, handle in handles.items()}
        self._controller = controller
        self._place = place
        self._host_config = dict(host_config)
        self._early_wake = early_wake
        self._max_ongoing = max_ongoing
        self._id = secrets.token_hex(4)
        self._local: dict[str, EngineInfo] = {}  # engines of this node, as its host tells
        self._ended: deque[str] = deque(maxlen=KEPT_ENDED)  # those of which its host told the end
        self._host_models: list[dict[str, Any]] = []
        self._host_up = asyncio.Event()
        self._early_leases: Counter[str] = Counter()  # by engine
        self._early_waiting: dict[str, dict[asyncio.Future[None], None]] = {model: {} for model in specs}
        self._demand: dict[str, asyncio.Task[ServeLease]] = {}  # model -> Serve's lease, awaited for nobody
        self._host: HostConnection | None = None
        self._transports: dict[str, UnixTransport] = {}
        self._tunnels: dict[str, tuple[Path, asyncio.Task[asyncio.Server]]] = {}  # by engine
        self._lent: dict[str, ServeLease] = {}  # by lease id
        self._lease_channels: dict[str, asyncio.StreamWriter] = {}
        self._opening: dict[str, asyncio.Task[asyncio.StreamWriter]] = {}  # lease channels, by replica
        self._remote: dict[str, tuple[str, EngineInfo]] = {}  # replica elsewhere -> its node, its engine
        self._waiting_since: dict[str, dict[str, Moment]] = {model: {} for model in specs}
        self._asking: dict[str, set[Any]] = {model: set() for model in specs}  # Serve's unanswered calls
        self._failures: dict[str, str] = {}
        self._ready_models: dict[str, str] = {}  # model -> engine id that answered last
        self._asked: set[str] = set()  # engines that were asked since their metrics were last read
        self.starts = StartLog(clock)
        self.reports = Reports(self, controller, traffic, counts)
        self._suspects: dict[str, tuple[float, float]] = {}
        """Engine that could not be reached -> until when it is not asked again, and how long that is; seconds."""
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self) -> None:
        """Begin to follow this node's engine host and to report to the controller."""
        remove_dead_sockets(self._place.run_dir / "gateways")
        self._spawn(self._follow_host())
        self._spawn(self._follow_clock())
        self._spawn(self.reports.run())
        self._spawn(self.reports.read_engines())

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _follow_clock(self) -> None:
        while True:
            self.starts.now()
            await asyncio.sleep(LOOK_AT_CLOCK_EVERY_S)

    # The node's engine host

    async def _follow_host(self) -> None:
        models = [spec.to_json() for spec in self._specs.values()]
        while True:
            try:
                host = await HostConnection.open(self._place.run_dir, self._place.raylet_pid)
                host.send({"op": "configure", "config": self._host_config, "models": models})
                host.send({"op": "watch"})
                self._host = host
                self._host_up.set()
                first = True
                async for event in host.events():
                    self._take_event(event)
                    if first and event["event"] == "status":
                        first = False
                        self._forget_what_ended_unseen()
            except (OSError, TimeoutError, ValueError) as error:
                log.warning("the node's engine host: %s", error)
            self._host = None
            self._host_up.clear()
            self._local.clear()
            await asyncio.sleep(RETRY_S)

    def _take_event(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "engine":
            infos = [EngineInfo.from_json(event["engine"])]
        elif event["event"] == "status":
            infos = [EngineInfo.from_json(e) for e in event["engines"]]
            self._host_models = event["models"]
            gone = set(self._local) - {i.engine_id for i in infos}
            for engine_id in gone:
                self._forget(self._local.pop(engine_id))
        else:
            return
        for info in infos:
            if info.state in ("failed", "dead"):
                self._local.pop(info.engine_id, None)
                self._ended.append(info.engine_id)
                self._forget(info)
            else:
                self._local[info.engine_id] = info
                if info.state != "ready" and self._ready_models.get(info.model) == info.engine_id:
                    del self._ready_models[info.model]  # parked, or on its way out
            self._wake(info.model)

    def _forget(self, info: EngineInfo) -> None:
        if transport := self._transports.pop(info.engine_id, None):
            self._spawn(transport.close())
        if tunnel := self._tunnels.pop(info.engine_id, None):
            path, opening = tunnel
            opening.add_done_callback(partial(_close_tunnel, path))
        if self._ready_models.get(info.model) == info.engine_id:
            del self._ready_models[info.model]
        self._end_vain_demand(info.model)

    def _end_vain_demand(self, model: str) -> None:
        """What asks for a replica for nobody ends with the last engine that the replica could take over."""
        demand = self._demand.get(model)
        free = (i for i in self._local_engines(model) if not i.held and i.state in ("starting", "ready"))
        if demand is not None and not any(free):
            demand.cancel()

    def _forget_what_ended_unseen(self) -> None:
        """Engines that ended while no host was there to tell of it."""
        living = {*self._local, *(info.engine_id for _, info in self._remote.values())}
        for engine_id in [e for e in self._transports if e not in living]:
            self._spawn(self._transports.pop(engine_id).close())
        self._ready_models = {m: e for m, e in self._ready_models.items() if e in living}
        for model in self._demand:
            self._end_vain_demand(model)

    def _local_engines(self, model: str) -> list[EngineInfo]:
        fingerprint = self._specs[model].fingerprint
        return [i for i in self._local.values() if i.fingerprint == fingerprint]

    # Leases

    async def acquire(self, model: str) -> ServeLease | EarlyLease:
        waiting_id = secrets.token_hex(8)
        self._waiting_since[model][waiting_id] = self.starts.now()
        try:
            return await self._acquire(model)
        finally:
            self._waiting_since[model].pop(waiting_id, None)

    async def _acquire(self, model: str) -> ServeLease | EarlyLease:
        spec = self._specs[model]
        early = self._early_wake(spec)
        granted = self._spawn(self._granted(model, self.starts.now().unix_s))
        if not early:
            return await _own(granted)
        try:
            if not any(i.held for i in self._local_engines(model)):
                self._light(spec)
            while True:
                ready = self._early_engine(model)
                if ready is not None and not granted.done():
                    self._note_start(ready)
                    self._early_leases[ready.engine_id] += 1
                    return EarlyLease(self, ready, granted, self._transport(ready.engine_id, ready.http))
                change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._early_waiting[model][change] = None
                try:
                    await asyncio.wait({granted, change}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    self._early_waiting[model].pop(change, None)
                if granted.done():
                    self._wake(model, 1)
                    lease: ServeLease = granted.result()
                    return lease
        except BaseException:
            self._wake(model, 1)
            await _abandon(granted)
            raise

    def _early_engine(self, model: str) -> EngineInfo | None:
        """An engine that is ready before its replica, and takes one more request, as the replica would bound it."""
        early = (i for i in self._local_engines(model) if i.state == "ready" and not i.held)
        room = (i for i in early if self._early_leases[i.engine_id] < self._max_ongoing[model])
        return next((i for i in room if not self._is_suspect(i.engine_id)), None)

    def _wake(self, model: str, most: int | None = None) -> None:
        """Let those look again who wait for an engine of this node, or the first of them."""
        waiting = self._early_waiting.get(model, {})
        for change in [*itertools.islice(waiting, most)]:
            del waiting[change]
            change.set_result(None)

    def _light(self, spec: EngineSpec) -> None:
        if self._host is not None:
            # Where the host has just gone, the replica has its successor start the engine.
            with contextlib.suppress(ConnectionError):
                self._host.send({"op": "light", "spec": spec.to_json(), "requested_s": time.time()})

    async def _granted(self, model: str, arrived_s: float) -> ServeLease:
        """Serve's lease. Waits through replicas that die meanwhile; the caller holds the deadline."""
        while True:
            # What waits at Serve's handle has a replica started, whatever the plan says of the model's budget.
            # And how long others had the GPUs is no part of how long a start takes.
            arrived_s = max(arrived_s, await self.reports.room(model))
            lease_id = secrets.token_hex(8)
            generator = self._handles[model].lease.remote(lease_id)
            self._asking[model].add(generator)
            try:
                grant = await anext(generator)
            except RequestCancelledError:
                # Serve says so of a call that was withdrawn, also where its caller was cancelled at that moment.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise asyncio.CancelledError from None
                continue
            except DeploymentUnavailableError as error:
                raise EngineStartFailed(f"Serve has given {model} up: {error}") from error
            except (RayActorError, StopAsyncIteration) as error:
                log.info("replica of %s went before it granted a lease: %r", model, error)
                await asyncio.sleep(RETRY_S)
                continue
            except asyncio.CancelledError:
                generator.cancel()
                raise
            except RayError as error:
                if not generator.cancelled():
                    log.warning("lease of %s: %s", model, error)
                await asyncio.sleep(RETRY_S)
                continue
            finally:
                self._asking[model].discard(generator)
            if generator.cancelled():
                # Withdrawn when the grant was on its way: the replica has taken it back.
                self._spawn(_drain(generator))
                continue
            if "failed" in grant:
                self._spawn(_drain(generator))
                self._failures[model] = grant["failed"]
                raise EngineStartFailed(grant["failed"])
            self._failures.pop(model, None)
            lease = await self._lease(model, lease_id, generator, grant, arrived_s)
            if lease is not None:
                return lease
            await asyncio.sleep(RETRY_S)

    def withdraw(self, model: str) -> None:
        """See `Known`. Those who ask wait here for room instead."""
        for generator in [*self._asking.get(model, ())]:
            # Serve tells here too of what became of the call.
            with contextlib.suppress(RayError, RayServeException):
                generator.cancel()

    async def _lease(
        self, model: str, lease_id: str, generator: Any, grant: Mapping[str, Any], arrived_s: float
    ) -> ServeLease | None:
        """The lease that was granted; None if asking its engine would only spend an attempt."""
        info = EngineInfo.from_json(grant["engine"])
        phases: list[Phase] = []
        if self.starts.since(arrived_s, grant["init_s"]):  # the replica was started for this request
            process_s = max(arrived_s, grant["process_s"])
            phases.append(Phase("schedule", arrived_s, process_s - arrived_s))
            phases.append(Phase("replica", process_s, max(0.0, grant["init_s"] - process_s)))
        self._note_start(info, phases)
        remote = grant["node"] != self._place.node_id
        try:
            channel = await self._lease_channel(grant, remote=remote)
            path = await self._open_tunnel(info, grant) if remote else info.http
            if channel.is_closing():
                # What is forgotten with the channel was forgotten before it had this engine.
                if remote:
                    self._forget(info)
                raise ConnectionResetError("its lease channel was closed")
        except OSError as error:
            self._spawn(_drain(generator))
            raise EngineUnreachable(f"the replica of {model} went away: {error}") from error
        except asyncio.CancelledError:
            generator.cancel()
            raise
        if info.engine_id in self._ended:
            # Its host has told before its replica knew, and tells it once.
            generator.cancel()
            self._spawn(_drain(generator))
            return None
        if remote:
            before = self._remote.get(grant["replica"])
            if before is not None and before[1].engine_id != info.engine_id:
                self._forget(before[1])
            self._remote[grant["replica"]] = (grant["node"], info)
        self._ready_models[model] = info.engine_id
        transport = self._transport(info.engine_id, path)
        lease = ServeLease(self, lease_id, grant, self.starts.cold_start(info, phases), transport)
        self._lent[lease_id] = lease
        channel.write(json.dumps({"op": "take", "lease": lease_id}).encode() + b"\n")
        self._spawn(_follow(generator, channel) if remote else _drain(generator))
        if self._is_suspect(info.engine_id):
            # Its replica is still looking whether it lives.
            await lease.release()
            return None
        return lease

    def _note_start(self, info: EngineInfo, phases: Sequence[Phase] = ()) -> None:
        longest = min(self._waiting_since[info.model].values(), default=None)
        self.starts.note(info, phases, waiting_since_s=longest.unix_s if longest else None)

    async def _lease_channel(self, grant: Mapping[str, Any], *, remote: bool) -> asyncio.StreamWriter:
        """The replica's channel: one, however many ask for it at once."""
        replica = grant["replica"]
        channel = self._lease_channels.get(replica)
        if channel is None or channel.is_closing():
            if replica not in self._opening:
                self._opening[replica] = self._spawn(self._open_channel(grant, remote=remote))
            channel = await asyncio.shield(self._opening[replica])
        return channel

    async def _open_channel(self, grant: Mapping[str, Any], *, remote: bool) -> asyncio.StreamWriter:
        replica = grant["replica"]
        try:
            if remote:
                tunnel = grant["tunnel"]
                reader, channel = await open_tunnel(tuple(tunnel["address"]), tunnel["token"], "leases")
            else:
                reader, channel = await asyncio.open_unix_connection(grant["lease_socket"])
        finally:
            del self._opening[replica]
        self._lease_channels[replica] = channel
        self._spawn(self._close_at_end(replica, reader, channel))
        return channel

    async def _close_at_end(
        self, replica: str, reader: asyncio.StreamReader, channel: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError, ValueError):
            async for line in reader:
                if lost := self._lent.get(json.loads(line)["lease"]):
                    lost.lose()
        channel.close()
        if self._lease_channels.get(replica) is channel:
            del self._lease_channels[replica]
            # No host tells of engines on other nodes: they are gone for us when their replica is.
            if remote := self._remote.pop(replica, None):
                self._forget(remote[1])

    async def ask(self, engine_id: str, request: Coroutine[Any, Any, EngineResponse]) -> EngineResponse:
        """Await a request to an engine, and learn from it: a start's first token, or that the engine is not there."""
        asked = self.starts.now()
        self._asked.add(engine_id)
        try:
            response = await request
        except EngineUnreachable:
            now_s = time.monotonic()
            recent = {e: s for e, s in self._suspects.items() if s[0] + MOST_SUSPECT_S > now_s}
            until_s, length_s = recent.get(engine_id, (0.0, SUSPECT_S / 2))
            if until_s <= now_s:  # else it failed several who asked at once
                length_s = min(2 * length_s, MOST_SUSPECT_S)
                recent[engine_id] = (now_s + length_s, length_s)
            self._suspects = recent
            raise
        self._suspects.pop(engine_id, None)
        return self.starts.timed(engine_id, asked, response)

    def _is_suspect(self, engine_id: str) -> bool:
        return self._suspects.get(engine_id, (0.0, 0.0))[0] > time.monotonic()

    def give_back(self, grant: Mapping[str, Any], lease_id: str, *, engine_failed: bool) -> None:
        """Tell the replica that a lease is over; Serve's call then ends by itself."""
        self._lent.pop(lease_id, None)
        channel = self._lease_channels.get(grant["replica"])
        if channel is not None and not channel.is_closing():
            message = {
                "op": "release",
                "lease": lease_id,
                "engine_failed": engine_failed,
                "engine_id": grant["engine"]["engine_id"],
            }
            channel.write(json.dumps(message).encode() + b"\n")

    def give_back_early(
        self, info: EngineInfo, granted: asyncio.Task[ServeLease], *, engine_failed: bool
    ) -> None:
        """End an early lease, and Serve's lease with it, which may still be waited for.

        One of each model is waited for, for nobody: it is the demand that brings up the replica that will own the
        engine.
        """
        self._early_leases -= Counter([info.engine_id])  # keeps none that is at zero
        self._wake(info.model, 1)

        async def release() -> None:
            await asyncio.wait({granted})
            if not granted.cancelled():
                with contextlib.suppress(EngineStartFailed, EngineUnreachable):
                    await granted.result().release(engine_failed=engine_failed)

        demand = self._demand.get(info.model)
        if not granted.done():
            if demand is not None and not demand.done():
                granted.cancel()
                return
            self._demand[info.model] = granted
        self._spawn(release())

    def _transport(self, engine_id: str, path: str) -> UnixTransport:
        if engine_id not in self._transports:
            self._transports[engine_id] = UnixTransport(path)
        return self._transports[engine_id]

    async def _open_tunnel(self, info: EngineInfo, grant: Mapping[str, Any]) -> str:
        """The path of the engine's tunnel: one, however many ask for it at once."""
        if info.engine_id not in self._tunnels:
            path = self._place.run_dir / "gateways" / f"{self._id}-{secrets.token_hex(4)}.sock"
            set_private(path.parent)
            tunnel = grant["tunnel"]
            opening = self._spawn(local_end(path, tuple(tunnel["address"]), tunnel["token"]))
            self._tunnels[info.engine_id] = (path, opening)
        path, opening = self._tunnels[info.engine_id]
        try:
            await asyncio.shield(opening)
        except OSError:
            if self._tunnels.get(info.engine_id) == (path, opening):
                del self._tunnels[info.engine_id]
            raise
        return str(path)

    # What is known

    def progress(self, model: str) -> Progress | None:
        starting = [i for i in self._local_engines(model) if i.state == "starting"]
        now = self.starts.now()
        if longest := min(self._waiting_since[model].values(), default=None):
            elapsed_s = now.monotonic_s - longest.monotonic_s
        elif starting:
            elapsed_s = max(0.0, now.unix_s - min(i.requested_s for i in starting))
        else:
            return None
        if self.state(model) == "ready":
            return None
        phase = "schedule"
        if starting:
            done = {name for name, _, _ in starting[0].phases}
            phase = next((p for p in ("fork", "config", "weights", "warm_up") if p not in done), "warm_up")
        elif any(m["model"] == model and m["source"]["state"] == "resolving" for m in self._host_models):
            phase = "download"
        if phase == "schedule" and (detail := self.reports.node_waits.get(model)):
            return Progress("node", elapsed_s, self.starts.estimate_s(model), detail)
        if phase == "schedule" and (detail := self.reports.no_room.get(model)):
            return Progress("gpu_budget", elapsed_s, None, detail)
        return Progress(phase, elapsed_s, self.starts.estimate_s(model))

    def _seen_ready(self, model: str) -> bool:
        fingerprint = self._specs[model].fingerprint
        elsewhere = any(i.fingerprint == fingerprint for _, i in self._remote.values())
        return elsewhere or model in self._ready_models

    def state(self, model: str) -> str:
        states = {i.state for i in self._local_engines(model)}
        if "ready" in states or self._seen_ready(model):
            return "ready"
        if "starting" in states:
            return "lighting"
        if model in self._failures:
            return "failed"
        if self._waiting_since[model]:
            return "lighting"
        for state in ("draining", "parked"):
            if state in states:
                return state
        return "dark"

    async def status(self) -> Mapping[str, Any]:
        await self.reports.send()
        try:
            async with asyncio.timeout(CONTROLLER_TIMEOUT_S):
                result: Mapping[str, Any] = await self._controller.snapshot.remote()
                return result
        except (RayError, RayServeException, TimeoutError) as error:
            raise ControllerUnavailable(f"The controller does not answer: {error!r}") from error

    async def control(
        self, method: str, path: str, query: Mapping[str, str], body: bytes, authorization: str | None
    ) -> tuple[int, dict[str, Any]]:
        # What it knows must not be older than what the caller has just done here.
        await self.reports.send()
        request = {
            "method": method,
            "path": path,
            "query": dict(query),
            "body": body,
            "authorization": authorization,
        }
        try:
            async with asyncio.timeout(CONTROLLER_TIMEOUT_S):
                status, document = await self._controller.control.remote(request)
        except (RayError, RayServeException, TimeoutError) as error:
            raise ControllerUnavailable(f"The controller does not answer: {error!r}") from error
        return status, document

    async def engine_metrics(self) -> Sequence[tuple[str, str]]:
        ready = {i.engine_id: i.model for i in self._local.values() if i.state == "ready"}
        ready |= {i.engine_id: i.model for _, i in self._remote.values()}
        pages = await asyncio.gather(*(self._metrics_page(engine_id) for engine_id in ready))
        return [(model, page) for model, page in zip(ready.values(), pages, strict=True) if page is not None]

    async def _metrics_page(self, engine_id: str) -> str | None:
        """vLLM's own page; None if the engine does not give one."""
        info = self._local.get(engine_id)
        try:
            async with asyncio.timeout(METRICS_TIMEOUT_S):
                transport = self._transports.get(engine_id) or (
                    self._transport(engine_id, info.http) if info is not None else None
                )
                if transport is None:
                    return None
                response = await transport.request("GET", "/metrics", [], b"")
                text = b"".join([chunk async for chunk in response.chunks()]).decode(errors="replace")
        except (EngineUnreachable, EngineInterrupted, TimeoutError):
            return None
        return text if response.status == 200 else None

    async def read_asked_engines(self, busy: Container[str]) -> list[tuple[str, str, str]]:
        """(engine id, model, metrics page) of the engines that were asked since the last call, wherever they are.

        Those of `busy` models stay among the asked.
        """
        models = {i.engine_id: i.model for i in self._local.values()}
        models |= {i.engine_id: i.model for _, i in self._remote.values()}
        asked = sorted(self._asked & models.keys())
        self._asked = {e for e in asked if models[e] in busy}
        pages = await asyncio.gather(*(self._metrics_page(engine_id) for engine_id in asked))
        return [(e, models[e], page) for e, page in zip(asked, pages, strict=True) if page is not None]

    def view(self) -> dict[str, Any]:
        """What this gateway knows of its node, and of the engines that it was lent elsewhere."""
        return {
            "node": self._place.node_id,
            "host_up": self._host_up.is_set(),
            "engines": [i.to_json() for i in self._local.values()],
            "remote": [(node, i.to_json()) for node, i in self._remote.values()],
            "host_models": self._host_models,
            "memory": _memory(),
        }

    def model_view(self, model: str) -> dict[str, Any]:
        """What it knows of a model."""
        return {
            "last_cold_start": self.starts.last(model),
            "failure": self._failures.get(model),
            "seen_ready": self._seen_ready(model),
        }

    @property
    def models(self) -> Sequence[str]:
        return list(self._specs)


def _memory() -> dict[str, float]:
    """Of this node. In tenths: what matters is whether there is plenty, and every change is a report."""
    memory = psutil.virtual_memory()
    return {"total_bytes": memory.total, "available_share": round(memory.available / memory.total, 1)}


def _close_tunnel(path: Path, opened: asyncio.Task[asyncio.Server]) -> None:
    """Close it and remove its socket's file, which Python 3.11 leaves."""
    if not opened.cancelled() and opened.exception() is None:
        opened.result().close()
        path.unlink(missing_ok=True)


async def _own(task: asyncio.Task[ServeLease]) -> ServeLease:
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _abandon(task)
        raise


async def _abandon(task: asyncio.Task[ServeLease]) -> None:
    """The caller is gone: cancel the call, or give back what it got in the meantime."""
    if task.done():
        if not task.cancelled() and task.exception() is None:
            await task.result().release()
    else:
        task.cancel()


async def _drain(generator: Any) -> None:
    """Take Serve's end of the call, so that it forgets it."""
    with contextlib.suppress(RayError, RayServeException):
        async for _ in generator:
            pass


async def _follow(generator: Any, channel: asyncio.StreamWriter) -> None:
    """Take the end of a call to another node; if it is the replica's, close its channel and all that goes with it.

    A node that vanishes closes no connection: Ray is the first to know.
    """
    try:
        async for _ in generator:
            pass
    except RayActorError as error:
        log.info("a replica elsewhere is gone: %s", error)
        channel.transport.abort()
    except (RayError, RayServeException):
        pass
