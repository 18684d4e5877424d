"""What a node has of its models: their weights, the templates that are built of them, and the node's own template."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.engine.command import argv, bring, slug, threads_for
from deployments.engine.forks import StartFailed, Template
from deployments.engine.protocol import EngineSpec, HostConfig
from deployments.engine.use_lock import UseLock, hold, let_go, mapped_dir, remove_mapped

log = logging.getLogger("relight.host")

REBUILD_AFTER_S = 30.0  # how long a failed model template is not tried again
MAPPED_UNUSED_S = 7 * 86400.0  # mapped weights that no template was built from for so long are removed
PARTIAL_UNUSED_S = 600.0  # its writer may be in another container, where its pid is not known
STEADY_S = 60.0  # a template that lived this long is replaced at once
RESTART_DELAY_S = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class Grant:
    """GPUs of who asks for an engine: Ray's again, and maybe another's, once that one is not there any more."""

    gpu_ids: tuple[str, ...]
    there: Callable[[], bool]


@dataclass(slots=True)
class ModelEntry:
    """What the node has of a model."""

    spec: EngineSpec
    path: str | None = None
    resolving: asyncio.Task[str] | None = None
    source_state: str = "unresolved"  # resolving, ready, failed
    source_reason: str | None = None
    source_progress: tuple[int, int] | None = None
    template: Template | None = None
    template_state: str = "none"  # building, ready, failed, off
    template_reason: str | None = None
    template_tried_s: float = 0.0  # monotonic
    flat: str | None = None  # its mapped weights, once a template built from them has passed its self-test
    failure: tuple[str, float] | None = None  # why the last start failed, and when (monotonic)
    template_wanted: bool = True  # False once its memory was asked back
    parked_bytes: int | None = None  # what its engine took when it was last parked
    warming: asyncio.Task[None] | None = None
    granted: Grant | None = None  # of who asked last for a parked engine, while it waits for the answer
    warm_reason: str | None = None  # why the last warming did not get there
    of_fleet: bool = False  # a gateway told of it


class Models:
    """On the host's event loop, whose tasks it starts with `spawn`; `changed` is called when there is news."""

    def __init__(
        self,
        run_dir: Path,
        template_module: str,
        changed: Callable[[], None],
        spawn: Callable[[Awaitable[Any]], None],
    ) -> None:
        self.template_module = template_module
        self.config = HostConfig()
        self.entries: dict[str, ModelEntry] = {}
        self.node: Template | None = None
        self.node_process: subprocess.Popen[bytes] | None = None
        self._run_dir = run_dir
        self._changed = changed
        self._spawn = spawn
        self.told = False  # of the fleet, by a gateway that is there
        self._node_up = asyncio.Event()  # the node's template lives, though it may not be ready
        self._building = asyncio.Lock()
        self._closing = False

    # The node's template

    def start_node_template(self) -> None:
        """Start the node's template process. Starts of engines wait until it is ready. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, (self._run_dir / "template.log").open("ab") as output:
                self.node_process = subprocess.Popen(
                    [sys.executable, "-m", self.template_module, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
        except OSError:
            ours.close()
            raise
        born_s = time.monotonic()

        def ended() -> None:
            self._node_up.clear()
            process = self.node_process
            if process is not None:
                process.kill()
                process.wait()
            if self._closing:
                return
            # A template that can't even import is tried again, but not in a tight loop.
            delay_s = 0.0 if time.monotonic() - born_s > STEADY_S else RESTART_DELAY_S
            log.warning("the node's template ended; starting another in %.0f s", delay_s)
            asyncio.get_running_loop().call_later(delay_s, self._restart_node_template)

        self.node = Template(ours, "node", ended, self._run_dir / "template.log")
        self.node.pid = self.node_process.pid
        # Models without a template of their own are a rung warmer from then on.
        self.node.ready.add_done_callback(lambda _: self._changed())
        self._node_up.set()

    def _restart_node_template(self) -> None:
        if self._closing:
            return
        try:
            self.start_node_template()
        except OSError as error:
            # Of memory, processes or descriptors there may be enough again soon.
            log.warning(
                "the node's template can't be started, next try in %.0f s: %s", RESTART_DELAY_S, error
            )
            asyncio.get_running_loop().call_later(RESTART_DELAY_S, self._restart_node_template)
            return
        # Models' templates outlive the node's, but the dead ones can be rebuilt now.
        self._spawn(self.build())

    # Models

    def take(self, config: Mapping[str, Any], specs: list[EngineSpec]) -> set[str]:
        """The fleet's settings and models; whose models left it, by fingerprint."""
        self.told = True
        self.config = self.config.updated(config)
        wanted = {spec.fingerprint: spec for spec in specs}
        for fingerprint, spec in wanted.items():
            entry = self.entries.setdefault(fingerprint, ModelEntry(spec))
            entry.spec, entry.of_fleet = spec, True
        left = self.entries.keys() - wanted.keys()
        for fingerprint in left:
            self.drop(fingerprint, "the model left the fleet")
        return left

    def settings(self, config: Mapping[str, Any] | None) -> None:
        """The same settings, from a replica on a node without a gateway."""
        if not self.told:
            self.config = self.config.updated(config or {})

    def drop(self, fingerprint: str, reason: str) -> None:
        """Nothing of the model is kept any more."""
        entry = self.entries.pop(fingerprint)
        if entry.template is not None:
            entry.template.close(reason)
        self._log_of(entry).unlink(missing_ok=True)

    def _log_of(self, entry: ModelEntry) -> Path:
        """Of its latest template."""
        return self._run_dir / f"template-{slug(entry.spec.model)}-{entry.spec.fingerprint[:8]}.log"

    def entry(self, spec: EngineSpec) -> ModelEntry:
        """The model's entry, made if a replica came before the fleet did, or on a node without a gateway."""
        if spec.fingerprint not in self.entries and not self.told:
            # Nobody tells this node what left the fleet: a model's new version replaces its old one.
            for fingerprint in [f for f, e in self.entries.items() if e.spec.model == spec.model]:
                self.drop(fingerprint, "another version of the model came")
        return self.entries.setdefault(spec.fingerprint, ModelEntry(spec))

    def is_guest(self, entry: ModelEntry) -> bool:
        """Whether it is not of the fleet that was told: who asked is being replaced, or came before its gateway.

        It gets its engines, and nothing that would stay.
        """
        return self.told and not entry.of_fleet

    def keeps(self, fingerprint: str) -> bool:
        """Whether something of the model is to stay here while nobody uses it."""
        entry = self.entries.get(fingerprint)
        return entry is not None and not self.is_guest(entry)

    def _is_kept(self, entry: ModelEntry) -> bool:
        """Whether the node still has this model: what left meanwhile nobody would end."""
        return self.entries.get(entry.spec.fingerprint) is entry

    async def resolve(self, entry: ModelEntry) -> str:
        """The local folder of the model's source; fetches it at most once at a time. Raises StartFailed."""
        if entry.path is not None and Path(entry.path).is_dir():  # noqa: ASYNC240 - a stat, of a local disk
            return entry.path
        if (Path(entry.spec.source) / "config.json").is_file():  # a folder: used where it is
            entry.path, entry.source_state, entry.source_reason = entry.spec.source, "ready", None
            return entry.path
        if entry.resolving is None or entry.resolving.done():
            entry.resolving = asyncio.create_task(self._fetch(entry))
        try:
            entry.path = await asyncio.shield(entry.resolving)
        except StartFailed as error:
            entry.source_state, entry.source_reason = "failed", str(error)
            self._changed()
            raise
        entry.source_state, entry.source_reason = "ready", None
        return entry.path

    async def hold_weights(self, entry: ModelEntry) -> tuple[str, UseLock | None]:
        """The folder of the model's source, and the lock that keeps it. Raises StartFailed."""
        while True:
            path = await self.resolve(entry)
            try:
                return path, hold(Path(path))
            except FileNotFoundError:
                entry.path = None
            except BlockingIOError:
                await asyncio.sleep(0.1)
            except OSError as error:
                raise StartFailed(f"{path}: {error}") from error

    async def _fetch(self, entry: ModelEntry) -> str:
        # In a process of its own: fetching imports and converts, and may be killed.
        entry.source_state = "resolving"
        config = self.config
        command = [*bring(entry.spec.source, config.cache_dir, config.cache_budget_bytes), "--json"]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **dict(entry.spec.env)},
        )
        assert process.stdout is not None and process.stderr is not None
        reading_errors = asyncio.create_task(process.stderr.read())
        path = None
        async for line in process.stdout:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                path = message.get("path", path)
                if "done_bytes" in message:
                    entry.source_progress = (message["done_bytes"], message["total_bytes"])
                    self._changed()
        errors = (await reading_errors).decode(errors="replace").strip()
        if await process.wait() != 0 or path is None:
            raise StartFailed(errors.splitlines()[-1] if errors else f"source {entry.spec.source} failed")
        return str(path)

    async def build(self) -> None:
        """Build the missing model templates, one at a time: building takes all cores."""
        async with self._building:
            for entry in list(self.entries.values()):
                if not self._is_kept(entry) or self.is_guest(entry):
                    continue  # it left while another was built, or is about to
                if not self._is_prebuilt(entry.spec):
                    if entry.template_state != "off":
                        entry.template_state = "off"
                        self._changed()
                    if entry.spec.gpus:
                        with contextlib.suppress(StartFailed, OSError):
                            await self.resolve(entry)
                elif not self._keeps_template(entry.spec) and entry.flat is not None:
                    if entry.template is not None:
                        entry.template_state, entry.template_reason = "off", "built when it is asked for"
                        entry.template.close("built when it is asked for")
                        self._changed()
                elif entry.template_wanted and self._may_build(entry):
                    await self._build(entry)
            self._prune_mapped()

    def _mapped_dir(self) -> Path:
        return mapped_dir(self.config.cache_dir)

    def _prune_mapped(self) -> None:
        """Remove mapped weights that were left by other engine arguments, and what was left of writing them."""
        used = {Path(e.flat).stem for e in self.entries.values() if e.flat}
        for path in self._mapped_dir().glob("*.*"):
            with contextlib.suppress(FileNotFoundError):  # another host of this machine was first
                age_s = time.time() - path.stat().st_mtime
                if path.suffix == ".weights" and path.stem not in used and age_s > MAPPED_UNUSED_S:
                    remove_mapped(path)
                elif path.suffix == ".partial" and age_s > PARTIAL_UNUSED_S:
                    writer = path.name.split(".")[1]
                    if not Path("/proc", writer).exists():
                        path.unlink()

    def _may_build(self, entry: ModelEntry) -> bool:
        """Whether it has no template, and what kept it from having one may be over."""
        failed = (
            entry.template_state == "failed" and time.monotonic() - entry.template_tried_s <= REBUILD_AFTER_S
        )
        return entry.template is None and not failed

    async def _build(self, entry: ModelEntry) -> None:
        entry.template_tried_s = time.monotonic()
        entry.template_state = "building"
        self._changed()
        weights: UseLock | None = None
        try:
            path, weights = await self.hold_weights(entry)
            node = self.node
            if node is None:
                raise StartFailed("the node's template is not there")
            await asyncio.shield(node.ready)
            if not self._is_kept(entry):
                raise StartFailed("the model left the fleet")
            _check_device(node, entry.spec)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            template_id = f"template-{slug(entry.spec.model)}-{secrets.token_hex(3)}"

            def ended() -> None:
                entry.template = None
                let_go(weights)
                if entry.template_state == "ready" and not self._closing:
                    entry.template_state = "none"
                    self._changed()
                    self._spawn(self.build())

            log_file = self._log_of(entry)
            template = entry.template = Template(ours, entry.spec.model, ended, log_file)
            message = {
                "op": "template",
                "engine_id": template_id,
                "model": entry.spec.model,
                "argv": argv(entry.spec, path),
                "env": dict(entry.spec.env),
                "log": str(log_file),
                "flat_dir": str(self._mapped_dir()),
                "threads": threads_for(entry.spec),
            }
            with theirs:
                template.pid = await node.fork(message, [theirs.fileno()])
            seconds = await asyncio.shield(template.ready)
            if not self._is_kept(entry):
                raise StartFailed("the model left the fleet")
            log.info("template of %s built in %.1f s", entry.spec.model, seconds)
            entry.flat = template.flat
            if self._keeps_template(entry.spec):
                entry.template_state, entry.template_reason = "ready", None
            else:
                entry.template_state, entry.template_reason = "off", "built when it is asked for"
                template.close("built when it is asked for")
        except Exception as error:  # noqa: BLE001 - whatever one model meets: others wait for their templates
            entry.template_state, entry.template_reason = "failed", str(error)
            if entry.template is not None:
                entry.template.close(str(error))
            else:
                let_go(weights)
            log.warning("no template for %s, its starts are plain: %s", entry.spec.model, error)
        self._changed()

    async def template_for(self, entry: ModelEntry) -> tuple[Template, str]:
        """The model's own template, or the node's once it is ready, and how the engine comes from it.

        Raises StartFailed where the node's vLLM can't serve the model, or there is no template within its deadline.
        """
        if entry.template is not None and entry.template_state == "ready":
            return entry.template, "prebuilt"
        try:
            async with asyncio.timeout(entry.spec.start_deadline_s):
                await self._node_up.wait()
                assert self.node is not None
                node = self.node
                await asyncio.shield(node.ready)
        except TimeoutError:
            reason = f"the node's template was not ready within {entry.spec.start_deadline_s:.0f} s"
            raise StartFailed(f"{reason}, see {self._run_dir / 'template.log'}") from None
        _check_device(node, entry.spec)
        if entry.flat is not None and not Path(entry.flat).is_file():  # noqa: ASYNC240 - a stat, of a local disk
            entry.flat = None
            if not self._keeps_template(entry.spec):
                entry.template_state = "none"  # written again once this start is done
        if entry.flat is not None and self._is_prebuilt(entry.spec):
            return node, "mapped"
        return node, "forked"

    # Warmth

    def _is_prebuilt(self, spec: EngineSpec) -> bool:
        """Whether its engine may be built ahead of its fork: not on GPUs, which no fork survives."""
        return self.config.prebuilt != "off" and not spec.gpus

    def _keeps_template(self, spec: EngineSpec) -> bool:
        """Whether the template with its engine already built stays in memory."""
        return self.config.prebuilt == "auto" and not spec.gpus

    def rung(self, entry: ModelEntry) -> str:
        """How warm it is without an engine."""
        if entry.source_state != "ready":
            return "node"
        built = entry.template_state == "ready" if self._keeps_template(entry.spec) else self.imported()
        return "template" if built else "weights"

    def imported(self) -> bool:
        """Whether the node's template has imported vLLM."""
        return bool(self.node and self.node.ready.done() and not self.node.ready.exception())

    async def bring_up(self, entry: ModelEntry, *, template: bool) -> None:
        """Its weights, and what an engine is forked from. Raises StartFailed."""
        await self.resolve(entry)
        self._changed()
        if not template:
            return
        if self.is_guest(entry):
            raise StartFailed("it is not of the fleet that this node's gateway serves")
        if self._keeps_template(entry.spec):
            async with self._building:
                if self._may_build(entry):
                    await self._build(entry)
        elif self.node is not None:
            await asyncio.shield(self.node.ready)

    def let_down(self, entry: ModelEntry) -> None:
        """Its template, until one is asked for."""
        if not self._keeps_template(entry.spec):
            return
        entry.template_wanted = False
        if entry.template is not None and entry.template_state == "ready":
            # Before it is closed: its end would have another built.
            entry.template_state, entry.template_reason = "off", "its memory was asked back"
            entry.template.close("its memory was asked back")
            self._changed()

    def to_json(self, entry: ModelEntry) -> dict[str, Any]:
        """Of its weights and its template."""
        return {
            "source": {
                "state": entry.source_state,
                "path": entry.path,
                "reason": entry.source_reason,
                "progress": entry.source_progress,
            },
            "template": {
                "state": entry.template_state,
                "reason": entry.template_reason,
                "pid": entry.template.pid if entry.template else None,
                "imported": self.imported(),
            },
        }

    def close(self) -> None:
        """End every template."""
        self._closing = True
        for entry in self.entries.values():
            if entry.template is not None:
                entry.template.close("the host ends")
        if self.node is not None:
            self.node.close("the host ends")


def _check_device(node: Template, spec: EngineSpec) -> None:
    # A build for CUDA on a node without a GPU names no kind at all.
    if node.device not in (None, "cpu") and not spec.gpus:
        raise StartFailed(
            "this node's vLLM is for CUDA: give the model gpus: 1, or install with RELIGHT_ENGINE=cpu"
        )


__all__ = ["Grant", "ModelEntry", "Models"]
