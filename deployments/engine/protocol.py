"""Messages between the replica, the engine host, its templates and its engines.

Everything is one JSON object a line (or a datagram) over a unix socket of the run directory. File descriptors
travel beside a message (SCM_RIGHTS) from the host to a template, which hands them to the engine that it forks:

| descriptor | what for |
|---|---|
| http | the listening socket of vLLM's server: bound by the host, so that clients connect before the engine is up |
| control | the listening socket where the engine's keeper takes its holders (replica, host): its life is theirs |
| status | a stream on which the engine reports its phases, its failure, and, by closing it, its end |
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

MAX_MESSAGE_BYTES = 1 << 20
DEAD_SOCKET_AGE_S = 10.0


@dataclass(frozen=True, slots=True)
class HostConfig:
    """The fleet's `engine_host`. What it means is said there."""

    park_memory_bytes: int = 0
    cache_dir: str | None = None
    cache_budget_bytes: int | None = None
    prebuilt: Literal["auto", "on_demand", "off"] = "auto"

    def updated(self, told: Mapping[str, Any]) -> HostConfig:
        """With what was told; keys of another version are left out."""
        return replace(self, **{each.name: told[each.name] for each in fields(self) if each.name in told})


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What makes an engine this engine. Values only, so that it crosses processes as JSON."""

    model: str  # canonical id
    names: tuple[str, ...]  # --served-model-name: the id and its aliases
    source: str  # as in the fleet file
    argv: tuple[str, ...] = ()  # vLLM's own arguments, untouched
    env: tuple[tuple[str, str], ...] = ()
    gpus: int = 0
    park: bool = True
    start_deadline_s: float = 600.0
    drain_deadline_s: float = 120.0

    @property
    def fingerprint(self) -> str:
        """Two specs with the same fingerprint can use the same engine."""
        same = (self.model, self.names, self.source, self.argv, self.env, self.gpus)
        return hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EngineSpec:
        """Rebuild from `to_json`, whose tuples JSON turned into lists."""
        return cls(
            model=value["model"],
            names=tuple(value["names"]),
            source=value["source"],
            argv=tuple(value["argv"]),
            env=tuple((k, v) for k, v in value["env"]),
            gpus=value["gpus"],
            park=value["park"],
            start_deadline_s=value["start_deadline_s"],
            drain_deadline_s=value["drain_deadline_s"],
        )


@dataclass(slots=True)
class EngineInfo:
    """One engine as the host tells about it."""

    engine_id: str
    model: str
    fingerprint: str
    kind: str  # prebuilt, forked, adopted: from which rung it came
    state: str  # starting, ready, parked, draining, failed, dead
    http: str  # path of the unix socket of vLLM's server
    control: str  # path of the keeper's socket
    gpu_ids: tuple[str, ...] = ()
    pid: int | None = None
    held: bool = False  # a replica holds it
    requested_s: float = 0.0  # Unix times
    ready_s: float | None = None
    last_used_s: float = 0.0
    uses: int = 0
    memory_bytes: int = 0
    reason: str | None = None
    phases: list[tuple[str, float, float]] = field(default_factory=list)  # (name, start_s, duration_s)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EngineInfo:
        return cls(
            **{
                **value,
                "gpu_ids": tuple(value["gpu_ids"]),
                "phases": [(p[0], p[1], p[2]) for p in value["phases"]],
            }
        )


def encode(message: Mapping[str, Any]) -> bytes:
    """One message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def send_with_fds(channel: socket.socket, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one datagram with descriptors over a SOCK_SEQPACKET socket. Raises OSError if the peer is gone."""
    socket.send_fds(channel, [encode(message)], list(fds))


def receive_with_fds(channel: socket.socket, max_fds: int = 4) -> tuple[dict[str, Any], list[int]] | None:
    """Receive one datagram with its descriptors (close-on-exec); None when the peer is gone."""
    data, fds, _flags, _addr = socket.recv_fds(channel, MAX_MESSAGE_BYTES, max_fds)
    if not data:
        return None
    for fd in fds:
        os.set_inheritable(fd, False)
    message: dict[str, Any] = json.loads(data)
    return message, list(fds)


def default_run_dir(node_id: str) -> Path:
    """Where the sockets of a node's engine host are. Short, since a unix socket's path holds 107 bytes."""
    base = os.environ.get("RELIGHT_RUN_DIR") or f"/tmp/relight-{os.getuid()}"
    # The end of it: the ids of pretended nodes all begin alike.
    return Path(base) / node_id[-12:]


def set_private(path: Path) -> None:
    """Create a directory that only this user enters: whoever reaches the sockets reaches the engines."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)


def check_place(run_dir: Path) -> None:
    """Raises PermissionError where another user owns the folder that a run directory is in, and could exchange it."""
    with contextlib.suppress(FileNotFoundError):
        owner = run_dir.parent.lstat().st_uid
        if owner not in (0, os.getuid()):
            raise PermissionError(
                f"{run_dir.parent} belongs to another user ({owner}): remove it, or set RELIGHT_RUN_DIR to "
                "another folder"
            )


def remove_dead_sockets(folder: Path) -> None:
    """Remove the unix sockets in `folder` on which nobody listens any more."""
    for path in folder.glob("*.sock"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            # One that is being bound refuses connections, too, until its owner listens.
            if time.time() - path.stat().st_mtime < DEAD_SOCKET_AGE_S:
                continue
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()


__all__ = [
    "MAX_MESSAGE_BYTES",
    "EngineInfo",
    "EngineSpec",
    "HostConfig",
    "check_place",
    "default_run_dir",
    "encode",
    "receive_with_fds",
    "remove_dead_sockets",
    "send_with_fds",
    "set_private",
]
