"""Which processes are this checkout's cluster, and how they end.

A process is ours if its environment carries our mark (it is inherited, so also by engine hosts, engines and
whatever they daemonize), or if it descends from one that does. Nothing goes by name, so another Ray on the
machine is never touched.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from deployments.local.state import MARK

_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    command: str
    marked: bool


def ours(run_dir: Path) -> list[Process]:
    """The cluster's processes, without this one and its ancestors (a child of one may run `down`)."""
    everything = {process.pid: process for process in _processes(f"{MARK}={run_dir}")}
    found = {pid for pid, process in everything.items() if process.marked}
    while new := {p.pid for p in everything.values() if p.parent in found and p.pid not in found}:
        found |= new
    return [everything[pid] for pid in sorted(found - _self_and_ancestors(everything))]


def end(
    run_dir: Path,
    *,
    patience_s: float = 3.0,
    find: Callable[[Path], list[Process]] = ours,
    note: Callable[[str], None] = lambda _: None,
) -> int:
    """SIGTERM to all, SIGKILL to those that remain; returns how many there were.

    Each is held by a pidfd from when it is first seen: a pid that is given anew meanwhile is never hit, and a
    child that loses its marked parent is still ours.
    """
    held: dict[int, int] = {}
    ended = 0
    deadline = time.monotonic() + patience_s
    try:
        while True:
            number = signal.SIGKILL if time.monotonic() > deadline else signal.SIGTERM
            for pid in _hold_new(held, run_dir, find):
                _send(held[pid], number)
            for pid, descriptor in list(held.items()):
                if select.select([descriptor], [], [], 0)[0]:
                    os.close(held.pop(pid))
                    ended += 1
                elif number is signal.SIGKILL:
                    _send(descriptor, number)
            if not held:
                return ended
            note(f"{len(held)} processes left")
            if time.monotonic() > deadline + patience_s:
                raise TimeoutError(f"outlived SIGKILL: {', '.join(map(str, sorted(held)))}")
            time.sleep(0.05)
    finally:
        for descriptor in held.values():
            os.close(descriptor)


def _hold_new(held: dict[int, int], run_dir: Path, find: Callable[[Path], list[Process]]) -> set[int]:
    new: dict[int, int] = {}
    for process in find(run_dir):
        if process.pid not in held:
            with contextlib.suppress(ProcessLookupError):
                new[process.pid] = os.pidfd_open(process.pid)
    # Between the first look and pidfd_open the pid may have become another process's; a second look tells.
    still = {process.pid for process in find(run_dir)} if new else set()
    for pid in list(new):
        if pid not in still:
            os.close(new.pop(pid))
    held.update(new)
    return set(new)


def _send(descriptor: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, number)


def memory_bytes(processes: Iterable[Process]) -> int:
    """Proportional set size: pages that processes share are counted once between them."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError):
            for line in (_PROC / str(process.pid) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def listener(port: int) -> str | None:
    """Who listens on a TCP port, as far as we may see: "process 12 (python -m http.server)"."""
    inodes: set[str] = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / "net" / table).read_text().splitlines()[1:]:
                part = line.split()
                if part[3] == "0A" and int(part[1].rsplit(":", 1)[1], 16) == port:
                    inodes.add(f"socket:[{part[9]}]")
    for directory in _PROC.iterdir() if inodes else ():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):
                for link in (directory / "fd").iterdir():
                    if str(link.readlink()) in inodes:
                        return f"process {directory.name} ({_command(directory)[:80]})"
    return None


def _processes(mark: str) -> Iterable[Process]:
    needle = os.fsencode(mark)
    for directory in _PROC.iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                # After the command's name, which may itself hold spaces and parentheses: state, parent, ...
                state, parent = (directory / "stat").read_text().rpartition(")")[2].split()[:2]
                if state in "ZX":
                    continue
                try:
                    marked = needle in (directory / "environ").read_bytes().split(b"\0")
                except PermissionError:
                    marked = False
                yield Process(int(directory.name), int(parent), _command(directory), marked)


def _command(directory: Path) -> str:
    return (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()


def _self_and_ancestors(everything: dict[int, Process]) -> set[int]:
    pids = {os.getpid()}
    pid = os.getpid()
    while (process := everything.get(pid)) and process.parent not in pids:
        pid = process.parent
        pids.add(pid)
    return pids
