"""The engine host: one process for each node, which starts engines, hands them to replicas, parks and ends them.

It imports neither torch nor vLLM, and it is no Ray actor: an actor would keep its node from ever being idle. It is
started by whoever first needs it on the node (`deployments.engine.client.ensure_host`) and ends with the node's
raylet.

What survives what:
- The host is killed: engines live on, held by their replicas (see keeper.py). The next host reads the registry in
  the run directory and takes them over. Parked engines get the same chance, within the keeper's grace.
- The template is killed: engines live on; a new template is started. Until it is ready, starts wait for it.
- A replica is killed: its engine finishes what it is generating and waits `ABANDONED_S` for the model's next replica.
- An engine is killed: its replica is told at once, with the reason.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deployments.engine import http
from deployments.engine.command import STOP_GRACE_S, argv, slug, threads_for
from deployments.engine.control import ControlSocket
from deployments.engine.doors import DoorKeeper
from deployments.engine.forks import AskerGone, StartFailed, Template, TemplateGone
from deployments.engine.models import Grant, ModelEntry, Models
from deployments.engine.parking import Parked, evict
from deployments.engine.protocol import EngineInfo, EngineSpec, set_private
from deployments.engine.use_lock import UseLock, hold, let_go

log = logging.getLogger("relight.host")

ABANDONED_S = (
    30.0  # how long an engine without a replica waits for the next one: Serve may miss the old one for 10 s
)
PROVISIONAL_S = 60.0  # the same for one that a gateway asked for ahead of the replica, since it last did
HEALTH_TIMEOUT_S = 10.0
SLEEP_TIMEOUT_S = 120.0  # for the weights of a large model to go to host memory, or to come back
FAILURE_STANDS_S = 1.0  # who asks this soon after a start has failed asks for the same, and is told the same
DOWNLOAD_S = 0.2  # weights that were there sooner were on the node already
START_ATTEMPTS = 3  # templates that may die under a start
STARTING_S = 60.0  # a host that was spawned so lately may not have its lock yet

TEMPLATE = "deployments.engine.template"
RUNGS = ("node", "weights", "template", "parked")
"""How warm a model can be on a node without a replica, coldest first."""
_LOAD = re.compile(
    r"^vllm:(?:num_(requests)_(?:running|waiting)|(?:prompt|generation)_tokens_total)"
    r"(?:\{[^}\n]*\})? ([0-9.eE+-]+)$",
    re.M,
)
"""On vLLM's metrics page: what it is at, and what it has done."""
_OF_A_NODE = re.compile(r"[0-9a-f]{12}")  # the name of a node's run directory
_HELD = ("engines/*.http", "replicas/*.sock", "gateways/*.sock")


Tell = Callable[[Mapping[str, Any]], None]
"""Sends a message to a client of the control socket."""


@dataclass(slots=True)
class Engine:
    """An engine and what the host holds of it."""

    info: EngineInfo
    spec: EngineSpec
    control: socket.socket | None = None  # our holder's connection
    pidfd: int | None = None
    watcher: Tell | None = None  # the replica's connection
    settled: asyncio.Future[None] | None = None  # ready, or StartFailed
    expiry: asyncio.TimerHandle | None = None
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    start_s: float = 0.0  # what its start took
    path: str | None = None  # the folder of its weights
    weights: UseLock | None = None  # keeps that folder in the node's cache


class Host:
    """The node's engines. Everything runs on one event loop; there are no locks but one for each model's starts."""

    def __init__(self, run_dir: Path, template: str = TEMPLATE) -> None:
        self.run_dir = run_dir
        self.engine_dir = run_dir / "engines"
        set_private(self.engine_dir)
        self._ipc_dir = run_dir / "ipc"
        self.engines: dict[str, Engine] = {}
        self.doors: DoorKeeper | None = None
        self.models = Models(run_dir, template, self._changed, self.spawn)
        self.started_s = time.time()
        self._start_locks: dict[str, asyncio.Lock] = {}
        self._watchers: set[Tell] = set()
        self._gateways: set[Tell] = set()  # those that told of the fleet
        self._tasks: set[asyncio.Task[Any]] = set()
        self._eviction_clock = 0.0

    # Models

    def configure(
        self, config: Mapping[str, Any], specs: list[EngineSpec], gateway: Tell | None = None
    ) -> None:
        """Take the fleet's settings and models: bring sources to this node and build templates ahead.

        That stands for as long as the `gateway` that told it is there.
        """
        if gateway is not None:
            self._gateways.add(gateway)
        if self.doors is not None and "listen" in config:
            self.doors.keep_only(config["listen"])
        left = self.models.take(config, specs)
        for engine in list(self.engines.values()):
            info = engine.info
            # A predecessor may have parked what this host never had an entry of.
            if (info.fingerprint in left and not info.held) or self._is_left_parked(info):
                self.spawn(self.stop(engine, "its model left the fleet"))
        self._changed()
        self.spawn(self.models.build())
        self.spawn(self._evict())

    def _entry(self, spec: EngineSpec) -> ModelEntry:
        """What the node has of the model; what is parked of its other versions, which nobody would wake, ends."""
        entry = self.models.entry(spec)
        for engine in list(self.engines.values()):
            if engine.info.model == spec.model and self._is_left_parked(engine.info):
                self.spawn(self.stop(engine, "another version of the model came"))
        return entry

    def _is_left_parked(self, info: EngineInfo) -> bool:
        return info.state == "parked" and not self.models.keeps(info.fingerprint)

    # Engines

    async def start(
        self, spec: EngineSpec, gpu_ids: tuple[str, ...], requested_s: float, there: Callable[[], bool]
    ) -> Engine:
        """Fork a new engine. Returns as soon as it is on its way: `engine.settled` tells the rest."""
        entry = self.models.entry(spec)
        attempt = 1
        while True:
            began_s = time.time()
            path, weights = await self.models.hold_weights(entry)
            held_s = time.time()
            try:
                template, kind = await self.models.template_for(entry)
                # A download may have lain between: whose the GPUs are is as it is now.
                _see(spec, there)
                self._clear(gpu_ids)
                engine = await self._fork(
                    template,
                    kind,
                    spec,
                    gpu_ids=gpu_ids,
                    requested_s=requested_s,
                    path=path,
                    weights=weights,
                    flat=entry.flat if kind == "mapped" else None,
                )
                if held_s - began_s > DOWNLOAD_S:
                    engine.info.phases.insert(0, ("download", began_s, held_s - began_s))
                return engine
            except TemplateGone as error:
                let_go(weights)
                log.warning("start of %s, attempt %d: %s", spec.model, attempt, error)
                if attempt == START_ATTEMPTS:
                    raise
                attempt += 1
            except StartFailed:
                let_go(weights)
                raise

    async def _fork(
        self,
        template: Template,
        kind: str,
        spec: EngineSpec,
        *,
        gpu_ids: tuple[str, ...],
        requested_s: float,
        path: str,
        weights: UseLock | None,
        flat: str | None,
    ) -> Engine:
        engine_id = f"{slug(spec.model)}-{secrets.token_hex(4)}"
        base = self.engine_dir / engine_id
        info = EngineInfo(
            engine_id=engine_id,
            model=spec.model,
            fingerprint=spec.fingerprint,
            kind=kind,
            state="starting",
            http=f"{base}.http",
            control=f"{base}.ctl",
            gpu_ids=gpu_ids,
            requested_s=requested_s,
            last_used_s=time.time(),
        )
        engine = Engine(info, spec, settled=asyncio.get_running_loop().create_future(), path=path)
        assert engine.settled is not None
        engine.settled.add_done_callback(lambda f: f.cancelled() or f.exception())
        sockets = self._sockets_of(engine_id)
        message = {
            "op": "fork",
            "engine_id": engine_id,
            "model": spec.model,
            "argv": argv(spec, path, sleeps=self._sleeps(spec)),
            "env": {
                "VLLM_RPC_BASE_PATH": str(sockets),
                **dict(spec.env),
                **({"VLLM_SERVER_DEV_MODE": "1"} if self._sleeps(spec) else {}),
            },
            "gpu_ids": list(gpu_ids),
            "log": f"{base}.log",
            "requested_s": time.time(),
        }
        if flat is not None:
            message |= {"flat": flat, "threads": threads_for(spec)}
        self.engines[engine_id] = engine
        status_write = -1
        try:
            set_private(sockets)
            with _listen(info.http, 4096) as http_socket, _listen(info.control, 16) as control:
                status_read, status_write = os.pipe()
                self.spawn(self._read_status(engine, status_read), engine)
                info.pid = await template.fork(
                    message, [http_socket.fileno(), control.fileno(), status_write]
                )
            self._hold(engine)
            self._register(engine)
        except (StartFailed, OSError) as error:
            # It may be the engine that has ended already: then it has said why.
            if isinstance(error, OSError) and info.pid is not None:
                await asyncio.sleep(0.05)
                error = StartFailed(info.reason or f"the engine process {info.pid} ended at once: {error}")
            self._ended(engine, str(error))
            failed = error if isinstance(error, StartFailed) else StartFailed(str(error))
            failed.stands = kind != "mapped"  # the next start is the plain one
            raise failed from (None if failed is error else error)
        finally:
            if status_write >= 0:
                os.close(status_write)
        engine.weights = weights
        self.spawn(self._wait_ready(engine), engine)
        self._changed(engine)
        return engine

    def _sockets_of(self, engine_id: str) -> Path:
        """Where an engine's processes meet: vLLM leaves its sockets behind, and engines come and go all day.

        A short name: a socket's own takes 36 of the 107 bytes of its path.
        """
        return self._ipc_dir / engine_id[-8:]

    def _sleeps(self, spec: EngineSpec) -> bool:
        """Whether an engine of this model is parked by vLLM's sleep mode, whose routes are development routes."""
        return bool(spec.gpus and spec.park and self.models.config.park_memory_bytes)

    def _hold(self, engine: Engine) -> None:
        """Become a holder of the engine and watch its process. Raises OSError if it is gone."""
        assert engine.info.pid is not None
        engine.pidfd = os.pidfd_open(engine.info.pid)
        asyncio.get_running_loop().add_reader(engine.pidfd, self._on_exit, engine)
        engine.control = socket.socket(socket.AF_UNIX)
        engine.control.connect(engine.info.control)

    def _register(self, engine: Engine) -> None:
        """Write what the next host needs to take this engine over. On a full disk it serves all the same."""
        path = self.engine_dir / f"{engine.info.engine_id}.json"
        partial = path.with_suffix(".partial")
        saved = {"info": engine.info.to_json(), "spec": engine.spec.to_json(), "path": engine.path}
        try:
            partial.write_text(json.dumps(saved))
            partial.rename(path)
        except OSError as error:
            log.warning("engine %s is not written down for a next host: %s", engine.info.engine_id, error)

    async def _read_status(self, engine: Engine, descriptor: int) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
        )
        try:
            async for line in reader:
                message = json.loads(line)
                if message["event"] == "phase":
                    engine.info.phases.append((message["name"], message["start_s"], message["duration_s"]))
                    self._changed(engine)
                elif message["event"] == "failed":
                    engine.info.reason = message["reason"]
                elif message["event"] == "born":
                    # Should its template die before it can name the child, this is how we know of it.
                    engine.info.pid = message["pid"]
                    if engine.info.engine_id not in self.engines:
                        self.kill(engine)  # the start goes on elsewhere
        finally:
            transport.close()

    async def _wait_ready(self, engine: Engine) -> None:
        """One request for /health: the socket is bound already, so its answer is the notification."""
        info = engine.info
        started_s = time.time()
        try:
            status, _ = await asyncio.wait_for(
                http.request(info.http, "GET", "/health"), engine.spec.start_deadline_s
            )
        except TimeoutError:
            phase = info.phases[-1][0] if info.phases else "fork"
            reason = f"not ready after {engine.spec.start_deadline_s:.0f} s (last phase done: {phase})"
            info.reason = reason
            self.kill(engine)
            return
        except OSError:
            return  # it died: _on_exit tells why
        if status != 200:
            info.reason = f"/health answered {status}"
            self.kill(engine)
            return
        now_s = time.time()
        if not any(name == "warm_up" for name, _, _ in info.phases):
            last_s = max([started_s, *(s + d for _, s, d in info.phases)])
            info.phases.append(("warm_up", last_s, max(0.0, now_s - last_s)))
        info.state, info.ready_s = "ready", now_s
        engine.start_s = now_s - info.requested_s
        self._register(engine)
        self._settle(engine, None)
        self._changed(engine)
        entry = self.models.entries.get(info.fingerprint)
        if entry is not None and info.kind == "forked" and entry.template_state in ("failed", "none"):
            self.spawn(self.models.build())

    def _settle(self, engine: Engine, reason: str | None) -> None:
        if engine.settled is not None and not engine.settled.done():
            if reason is None:
                engine.settled.set_result(None)
            else:
                engine.settled.set_exception(StartFailed(reason))

    def _on_exit(self, engine: Engine) -> None:
        if engine.pidfd is not None:
            asyncio.get_running_loop().remove_reader(engine.pidfd)
        # The status pipe may still hold the reason: let its reader run first.
        asyncio.get_running_loop().call_later(0.05, self._ended, engine, None)

    def _ended(self, engine: Engine, reason: str | None) -> None:
        info = engine.info
        if self.engines.pop(info.engine_id, None) is None:
            return
        was_starting = info.state == "starting"
        info.reason = reason or info.reason or f"the engine process {info.pid} ended unexpectedly"
        if info.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(info.pid, signal.SIGKILL)  # what it started and left behind
        if engine.pidfd is not None:
            os.close(engine.pidfd)
            engine.pidfd = None
        if engine.control is not None:
            engine.control.close()
        if engine.expiry is not None:
            engine.expiry.cancel()
        let_go(engine.weights)
        engine.weights = None
        info.state = "failed" if was_starting else "dead"
        for path in (info.http, info.control, str(self.engine_dir / f"{info.engine_id}.json")):
            Path(path).unlink(missing_ok=True)
        shutil.rmtree(self._sockets_of(info.engine_id), ignore_errors=True)
        if was_starting:
            if entry := self.models.entries.get(info.fingerprint):
                if info.kind == "mapped":
                    entry.flat = None  # the next start, which may come at once, is the plain one
                else:
                    entry.failure = (info.reason, time.monotonic())
            self._keep_one_log(info)
        else:
            Path(f"{self.engine_dir / info.engine_id}.log").unlink(missing_ok=True)
            self._see_off(info.fingerprint)
        self._settle(engine, info.reason)
        if engine.watcher is not None:
            engine.watcher({"event": "exit", "engine_id": info.engine_id, "reason": info.reason})
        log.info("engine %s is %s: %s", info.engine_id, info.state, info.reason)
        self._changed(engine)
        # A parked one that is gone leaves its model colder, which only the whole status tells.
        self._changed()

    def _see_off(self, fingerprint: str) -> None:
        """A model that is a guest here goes with its last engine."""
        entry = self.models.entries.get(fingerprint)
        others = any(e.info.fingerprint == fingerprint for e in self.engines.values())
        if entry is not None and self.models.is_guest(entry) and not others:
            self.models.drop(fingerprint, "its last engine has ended")

    def _keep_one_log(self, info: EngineInfo) -> None:
        """Of the starts of a model that failed, the log of the last one is kept for a look."""
        living = {*self.engines, info.engine_id}
        for log_file in self.engine_dir.glob(f"{slug(info.model)}-{'[0-9a-f]' * 8}.log"):
            if log_file.stem not in living:
                log_file.unlink(missing_ok=True)

    def kill(self, engine: Engine) -> None:
        """At once, with all that it started."""
        if engine.info.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(engine.info.pid, signal.SIGKILL)

    async def stop(self, engine: Engine, reason: str) -> None:
        """End an engine: SIGTERM lets it finish what it answers, SIGKILL ends what is left of its group."""
        info = engine.info
        if info.engine_id not in self.engines or info.pid is None:
            return
        info.state, info.reason = "draining", reason
        self._changed(engine)
        with contextlib.suppress(ProcessLookupError):
            os.kill(info.pid, signal.SIGTERM)
        for _ in range(int(STOP_GRACE_S / 0.05)):
            if info.engine_id not in self.engines:
                return
            await asyncio.sleep(0.05)
        self.kill(engine)

    async def obtain(
        self,
        spec: EngineSpec,
        gpu_ids: tuple[str, ...],
        requested_s: float,
        *,
        hold: bool,
        there: Callable[[], bool] = lambda: True,
    ) -> Engine:
        """An engine for one more replica: one that waits, a parked one that still answers, or a new one.

        With `hold` the caller owns it from here on; without, it waits for an owner for `PROVISIONAL_S`. Nothing is
        woken or forked for a caller who is not `there` any more: its GPUs may be another's. Raises StartFailed.
        """
        async with self._start_locks.setdefault(spec.fingerprint, asyncio.Lock()):
            _see(spec, there)
            entry = self._entry(spec)
            for engine in self._waiting(spec, gpu_ids):
                if engine.info.state == "parked" and not await self._adopt(engine):
                    continue
                if engine.info.engine_id in self.engines:
                    self.claim(engine, hold=hold)
                    return engine
            self._clear(gpu_ids)
            if entry.failure is not None and time.monotonic() - entry.failure[1] < FAILURE_STANDS_S:
                raise StartFailed(entry.failure[0])
            try:
                engine = await self.start(spec, gpu_ids, requested_s, there)
            except StartFailed as error:
                if error.stands:
                    entry.failure = (str(error), time.monotonic())
                raise
            self.claim(engine, hold=hold)
            return engine

    def _clear(self, gpu_ids: tuple[str, ...]) -> None:
        """End what is left on GPUs that Ray has given to somebody else, at once."""
        for engine in self.engines.values():
            if set(gpu_ids) & set(engine.info.gpu_ids) and not engine.info.held:
                engine.info.reason = "its GPUs were granted to another replica"
                self.kill(engine)

    def _waiting(self, spec: EngineSpec, gpu_ids: tuple[str, ...]) -> list[Engine]:
        order = {"ready": 0, "starting": 1, "parked": 2}
        found = [
            e
            for e in self.engines.values()
            if e.info.fingerprint == spec.fingerprint
            and not e.info.held
            and e.info.state in order
            and e.info.gpu_ids == gpu_ids
        ]
        return sorted(found, key=lambda e: order[e.info.state])

    def claim(self, engine: Engine, *, hold: bool) -> None:
        """For whoever holds it from now on, or, without `hold`, for whoever comes."""
        if engine.expiry is not None:
            engine.expiry.cancel()
            engine.expiry = None
        engine.info.held = engine.info.held or hold
        engine.info.uses += hold
        engine.info.last_used_s = time.time()
        if not engine.info.held:
            self._expire(
                engine, PROVISIONAL_S + engine.spec.start_deadline_s * (engine.info.state == "starting")
            )
        self._changed(engine)

    def _expire(self, engine: Engine, after_s: float, tokens: float | None = None) -> None:
        """Let go of it when nobody has come for it by then, and it answers nothing; `tokens` as it last was looked at.

        Gateways ask an engine that its replica has not taken yet, and what was asked may take longer than that.
        """

        async def expired() -> None:
            now = await self._tokens_while_busy(engine) if engine.info.state == "ready" else None
            if engine.expiry is not expiry or engine.info.state not in ("starting", "ready"):
                return  # somebody came while it was asked
            if now is not None and now != tokens:
                self._expire(engine, after_s, now)
            else:
                await self.let_go(engine, park=True)

        if engine.expiry is not None:
            engine.expiry.cancel()
        expiry = engine.expiry = asyncio.get_running_loop().call_later(after_s, lambda: self.spawn(expired()))

    async def _tokens_while_busy(self, engine: Engine) -> float | None:
        """How many tokens it has read and written so far; None if it answers nothing now, or does not say.

        One that says that it is busy and goes on with nothing is not.
        """
        try:
            page = (await self._ask(engine, "GET", "/metrics")).decode(errors="replace")
        except (OSError, TimeoutError, StartFailed):
            return None
        load, tokens = 0.0, 0.0
        for requests, value in _LOAD.findall(page):
            if requests:
                load += float(value)
            else:
                tokens += float(value)
        return tokens if load else None

    async def _adopt(self, engine: Engine) -> bool:
        """Wake a parked engine and see that it still answers; one that does not is ended."""
        info = engine.info
        started_s = time.time()
        info.state = "starting"
        try:
            if info.gpu_ids:
                await self._ask(engine, "POST", "/wake_up", within_s=SLEEP_TIMEOUT_S)
            await self._canary(engine)
        except (OSError, TimeoutError, StartFailed) as error:
            log.warning("parked engine %s no longer answers: %s", info.engine_id, error)
            info.state = "draining"  # its end is no failed start
            info.reason = f"it no longer answered after being parked: {error}"
            self.kill(engine)
            return False
        now_s = time.time()
        info.kind, info.state, info.ready_s, info.requested_s = "adopted", "ready", now_s, started_s
        info.phases = [("adopt", started_s, now_s - started_s)]
        self._register(engine)
        return True

    async def _ask(self, engine: Engine, method: str, target: str, *, within_s: float | None = None) -> bytes:
        status, data = await asyncio.wait_for(
            http.request(engine.info.http, method, target), within_s or HEALTH_TIMEOUT_S
        )
        if status != 200:
            raise StartFailed(f"{target} answered {status}: {data[:200]!r}")
        return data

    async def _canary(self, engine: Engine) -> None:
        """One token, or its health for a model that generates none (sleep mode is known to wake up broken)."""
        body = {"model": engine.spec.model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
        status, data = await asyncio.wait_for(
            http.request(engine.info.http, "POST", "/v1/completions", body), HEALTH_TIMEOUT_S
        )
        if status in (400, 404):
            await self._ask(engine, "GET", "/health")
        elif status != 200:
            raise StartFailed(f"a completion answered {status}: {data[:200]!r}")

    async def let_go(self, engine: Engine, *, park: bool) -> None:
        """Its replica is done with it: park it within the budget, or end it."""
        info = engine.info
        info.held, engine.watcher = False, None
        # Whoever asks for an engine meanwhile waits, and gets the parked one.
        async with self._start_locks.setdefault(info.fingerprint, asyncio.Lock()):
            if info.held or info.engine_id not in self.engines:
                return  # another replica has taken it at once
            wanted = park and engine.spec.park and self.models.keeps(info.fingerprint)
            if wanted and self.models.config.park_memory_bytes and info.state == "ready":
                await self._park(engine)
                return
        await self.stop(engine, "no replica uses it any more")

    async def _park(self, engine: Engine) -> None:
        engine.info.state = "draining"
        # Before it sleeps: a next host must not take it for one that serves.
        self._register(engine)
        await self._put_to_sleep(engine)
        if engine.info.state != "parked":
            return
        if entry := self.models.entries.get(engine.info.fingerprint):
            entry.parked_bytes = engine.info.memory_bytes
        if self._is_left_parked(engine.info):
            self.spawn(self.stop(engine, "its model left while it was parked"))
            return
        await self._evict()

    async def _put_to_sleep(self, engine: Engine) -> None:
        """It is parked then, or on its way out. One that sleeps already sleeps on."""
        info = engine.info
        try:
            if info.gpu_ids:
                await self._ask(engine, "POST", "/sleep?level=1", within_s=SLEEP_TIMEOUT_S)
            info.memory_bytes = await asyncio.to_thread(group_pss_bytes, info.pid)
        except (OSError, TimeoutError, StartFailed) as error:
            self.spawn(self.stop(engine, f"it could not be parked: {error}"))
            return
        if info.engine_id not in self.engines:
            return  # it has ended meanwhile
        info.state = "parked"
        self._register(engine)
        self._changed(engine)

    async def _evict(self) -> None:
        """End what is parked beyond the budget."""
        parked = [
            Parked(e.info.engine_id, e.info.memory_bytes, e.start_s or 1.0, e.info.uses, e.info.last_used_s)
            for e in self.engines.values()
            if e.info.state == "parked"
        ]
        eviction = evict(parked, self.models.config.park_memory_bytes, self._eviction_clock)
        self._eviction_clock = eviction.clock
        for engine_id in eviction.evict:
            self.spawn(self.stop(self.engines[engine_id], "evicted: the parking budget is spent"))

    def abandon(self, engine: Engine) -> None:
        """Its replica died without a word: the next one may take it, for a while."""
        engine.info.held, engine.watcher = False, None
        if engine.info.engine_id in self.engines:
            self._expire(engine, ABANDONED_S)
            self._changed(engine)

    async def recover(self) -> None:
        """Take over the engines of a host that was killed, or end what can't be taken over."""
        for path in self.engine_dir.glob("*.json"):
            try:
                saved = json.loads(path.read_text())
                info, spec = EngineInfo.from_json(saved["info"]), EngineSpec.from_json(saved["spec"])
                engine = Engine(info, spec, path=saved.get("path"))
                self._hold(engine)
                with contextlib.suppress(OSError):  # evicted, while nobody held it: the engine has it mapped
                    engine.weights = hold(Path(engine.path)) if engine.path else None
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.info("engine of %s is gone: %s", path.name, error)
                for stale in self.engine_dir.glob(f"{path.stem}.*"):
                    stale.unlink(missing_ok=True)
                continue
            info.held = False
            engine.start_s = max(0.0, (info.ready_s or 0.0) - info.requested_s)
            self.engines[info.engine_id] = engine
            if info.state == "starting":
                engine.settled = asyncio.get_running_loop().create_future()
                engine.settled.add_done_callback(lambda f: f.cancelled() or f.exception())
                self.spawn(self._wait_ready(engine), engine)
            elif info.state == "draining":
                self.spawn(self._finish_parking(engine))
            self._expire(engine, ABANDONED_S)
            log.info("took over engine %s (%s)", info.engine_id, info.state)
        living = {self._sockets_of(engine_id) for engine_id in self.engines}
        for sockets in self._ipc_dir.glob("*"):
            if sockets not in living:
                shutil.rmtree(sockets, ignore_errors=True)

    async def _finish_parking(self, engine: Engine) -> None:
        """It was falling asleep when the host before this one died, and may not have been told to yet."""
        async with self._start_locks.setdefault(engine.info.fingerprint, asyncio.Lock()):
            await self._put_to_sleep(engine)
            if self.models.told and self._is_left_parked(engine.info):
                self.spawn(self.stop(engine, "its model left the fleet"))

    # Warmth

    def rung(self, entry: ModelEntry) -> str:
        """How warm the model is on this node besides the engines that replicas hold: one of RUNGS."""
        waiting = [e for e in self.engines.values() if e.info.fingerprint == entry.spec.fingerprint]
        if any(e.info.state in ("parked", "ready") and not e.info.held for e in waiting):
            return "parked"
        return self.models.rung(entry)

    async def warm(
        self, message: Mapping[str, Any], there: Callable[[], bool] = lambda: True
    ) -> dict[str, Any]:
        """Bring the model to a rung, or let it down to one. Asked again, it goes on where it is.

        Goes on beside the answer, for which `wait_s` waits: {rung: where it is now, working, reason: why it does not
        get there}. `gpu_ids` are those that Ray granted to who asks, for an engine that is to be parked: with the
        answer, or when who asks is not `there` any more, they are Ray's again, and no engine is begun on them.
        """
        spec, wanted = EngineSpec.from_json(message["spec"]), RUNGS.index(message["rung"])
        self.models.settings(message.get("config"))
        entry = self._entry(spec)
        entry.template_wanted = entry.template_wanted or wanted >= RUNGS.index("template")
        granted = None
        if message["rung"] == "parked":
            granted = entry.granted = Grant(tuple(message.get("gpu_ids") or ()), there)
        if wanted < RUNGS.index(self.rung(entry)):
            await self._let_down(entry, wanted)
        elif wanted > RUNGS.index(self.rung(entry)) and (entry.warming is None or entry.warming.done()):
            entry.warm_reason = None
            entry.warming = asyncio.create_task(self._bring_up(entry, message["rung"]))
        if entry.warming is not None and (wait_s := message.get("wait_s", 0)):
            await asyncio.wait({entry.warming}, timeout=wait_s)
        if entry.granted is granted:
            entry.granted = None
        working = entry.warming is not None and not entry.warming.done()
        return {
            "event": "warm",
            "model": spec.model,
            "rung": self.rung(entry),
            "working": working,
            "reason": entry.warm_reason,
        }

    async def _let_down(self, entry: ModelEntry, wanted: int) -> None:
        if wanted < RUNGS.index("parked"):
            for engine in list(self.engines.values()):
                same = engine.info.fingerprint == entry.spec.fingerprint
                if same and engine.info.state == "parked" and not engine.info.held:
                    self.spawn(self.stop(engine, "its memory was asked back"))
        if wanted < RUNGS.index("template"):
            self.models.let_down(entry)

    async def _bring_up(self, entry: ModelEntry, rung: str) -> None:
        try:
            await self.models.bring_up(entry, template=rung != "weights")
            if rung == "parked":
                await self._start_parked(entry)
            elif rung == "template" and self.models.rung(entry) != rung:
                raise StartFailed(entry.template_reason or "its template is not there")
        except AskerGone as error:
            log.info("%s is not parked: %s", entry.spec.model, error)  # whoever asks again brings others
        except StartFailed as error:
            entry.warm_reason = str(error)
            log.warning("%s could not be warmed to %s: %s", entry.spec.model, rung, error)

    async def _start_parked(self, entry: ModelEntry) -> None:
        """Start an engine that nobody holds, and park it. Raises StartFailed if it would not be kept."""
        spec, budget, granted = entry.spec, self.models.config.park_memory_bytes, entry.granted
        gpu_ids = granted.gpu_ids if granted is not None else ()

        def there() -> bool:
            return not spec.gpus or (granted is not None and entry.granted is granted and granted.there())

        others = sum(
            e.info.memory_bytes
            for e in self.engines.values()
            if e.info.state == "parked" and e.info.fingerprint != spec.fingerprint
        )
        if not spec.park or not budget:
            raise StartFailed(
                "nothing of it may be parked here (scaling.park, engine_host.park_memory_bytes)"
            )
        if others + (entry.parked_bytes or 0) > budget:
            raise StartFailed(f"parked engines hold {others} bytes of {budget}: no room for one more")
        _see(spec, there)
        if len(gpu_ids) != spec.gpus:
            raise StartFailed(f"it takes {spec.gpus} GPUs to load, and {len(gpu_ids)} were granted")
        engine = await self.obtain(spec, gpu_ids, time.time(), hold=False, there=there)
        if engine.settled is not None:
            await asyncio.shield(engine.settled)
        if not engine.info.held:
            await self.let_go(engine, park=True)

    # Telling

    def status(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {
            "pid": os.getpid(),
            "started_s": self.started_s,
            "template": {
                "pid": self.models.node.pid if self.models.node else None,
                "ready": self.models.imported(),
            },
            "models": [self._model_json(e) for e in self.models.entries.values()],
            "engines": [e.info.to_json() for e in self.engines.values()],
            "config": asdict(self.models.config),
        }

    def _model_json(self, entry: ModelEntry) -> dict[str, Any]:
        return {
            "model": entry.spec.model,
            "fingerprint": entry.spec.fingerprint,
            "rung": self.rung(entry),
            **self.models.to_json(entry),
        }

    def watch(self, watcher: Tell) -> None:
        """Tell it everything now, and what changes from then on."""
        self._watchers.add(watcher)
        watcher({"event": "status", **self.status()})

    def forget(self, client: Tell) -> None:
        """It is gone. With the last gateway goes what the fleet is: who comes knows better than who told it last."""
        self._watchers.discard(client)
        if self._gateways == {client}:
            self.models.told = False
        self._gateways.discard(client)

    def _changed(self, engine: Engine | None = None) -> None:
        for watcher in list(self._watchers):
            if engine is None:
                watcher({"event": "status", **self.status()})
            else:
                watcher({"event": "engine", "engine": engine.info.to_json()})

    def spawn(self, work: Awaitable[Any], engine: Engine | None = None) -> None:
        task = asyncio.ensure_future(work)
        tasks = engine.tasks if engine else self._tasks
        tasks.add(task)

        def done(finished: asyncio.Future[Any]) -> None:
            tasks.discard(task)
            if not finished.cancelled() and (error := finished.exception()):
                log.error("a task of the host failed", exc_info=error)

        task.add_done_callback(done)

    async def close(self) -> None:
        """End every engine and template."""
        for engine in list(self.engines.values()):
            self.kill(engine)
        self.models.close()


def _see(spec: EngineSpec, there: Callable[[], bool]) -> None:
    """Raises AskerGone if who asked for the engine is gone."""
    if not there():
        raise AskerGone(f"who asked for an engine of {spec.model} is gone, and what Ray granted to it")


def group_pss_bytes(pgid: int | None) -> int:
    """Proportional set size of a process group: what ending it would give back."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == pgid:
                rollup = stat.with_name("smaps_rollup").read_text()
                total += int(re.search(r"^Pss:\s+(\d+)", rollup, re.M)[1]) * 1024  # type: ignore[index]
    return total


def _listen(path: str, backlog: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(backlog)
    return listener


def _watch_raylet(pid: int, on_end: Callable[[], None]) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        on_end()
        return
    asyncio.get_running_loop().add_reader(descriptor, on_end)


async def run(run_dir: Path, raylet_pid: int | None, template: str = TEMPLATE) -> None:
    """Serve until SIGTERM or the end of the raylet."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    if raylet_pid is not None:
        _watch_raylet(raylet_pid, ended.set)
    host = Host(run_dir, template)
    await host.recover()
    host.models.start_node_template()
    doors = host.doors = DoorKeeper(run_dir / "doors.sock")
    path = run_dir / "host.sock"
    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(ControlSocket(host).serve, path, limit=1 << 22)
    host.spawn(asyncio.to_thread(remove_dead, run_dir))
    async with server:
        await ended.wait()
    doors.close()
    await host.close()
    for name in ("engines", "ipc"):
        shutil.rmtree(run_dir / name, ignore_errors=True)


def remove_dead(run_dir: Path) -> None:
    """Remove the run directories of nodes that are gone, beside this one: neither their host nor an engine lives."""
    if not _OF_A_NODE.fullmatch(run_dir.name):
        return  # who knows what is beside it
    for folder in run_dir.parent.iterdir():
        if not _OF_A_NODE.fullmatch(folder.name):
            continue
        # Its host takes the lock as its first act, and holds it for life: there is none while it is ours.
        with contextlib.suppress(OSError), (folder / "host.lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_used(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_used(run_dir: Path) -> bool:
    """Whether a host is on its way there, or one would find engines, replicas or gateways to go on with."""
    spawned = run_dir / "host.spawned"
    if spawned.exists() and time.time() - spawned.stat().st_mtime < STARTING_S:
        return True
    sockets = [path for pattern in _HELD for path in run_dir.glob(pattern)]
    return any(_is_listening(path) for path in sockets)


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.setblocking(False)
        return connection.connect_ex(str(path)) in (0, errno.EAGAIN)


def main() -> None:
    """Entry point: `python -m deployments.engine.host --run-dir DIR [--raylet-pid N]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--raylet-pid", type=int)
    parser.add_argument(
        "--template", default=TEMPLATE, help="the module of the node's template (default: %(default)s)"
    )
    options = parser.parse_args()
    set_private(options.run_dir)
    lock = (options.run_dir / "host.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # another host has this node
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(f"relight-host {options.run_dir}")
    asyncio.run(run(options.run_dir, options.raylet_pid, options.template))


if __name__ == "__main__":
    main()
