"""One replay over several processes: each has its share of the models, and they meet where the fleet learns.

Knows of processes and pipes only: what is brought together is its callers' matter.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Killed(RuntimeError):
    """A process that had a part of the work was ended from outside."""

    def __init__(self) -> None:
        super().__init__(
            "a process of the replay was ended before it was done; if memory ran out, --jobs 1 takes less"
        )


class Peers(Protocol):
    """Who replays a part of the same trace's models at the same time."""

    index: int
    count: int

    def gather(self, mine: T) -> list[T]:
        """What each of them brings, in the order of their indices. All must call it equally often."""
        ...


class Alone:
    """No others."""

    index = 0
    count = 1

    def gather(self, mine: T) -> list[T]:
        return [mine]


class _First:
    """This process, which passes on what the others bring."""

    index = 0

    def __init__(self, others: Sequence[Connection]) -> None:
        self._others = others
        self.count = len(others) + 1

    def gather(self, mine: T) -> list[T]:
        try:
            found = [mine, *(self._receive(each) for each in self._others)]
            for each in self._others:
                each.send(found)
        except (EOFError, ConnectionError):
            raise Killed from None
        return found

    def _receive(self, other: Connection) -> Any:
        error, value = other.recv()
        if error:
            raise RuntimeError(error)
        return value


class _Other:
    def __init__(self, index: int, count: int, first: Connection) -> None:
        self.index = index
        self.count = count
        self._first = first

    def gather(self, mine: T) -> list[T]:
        self._first.send(("", mine))
        found: list[T] = self._first.recv()
        return found


def shared(work: Callable[[Peers], T], processes: int) -> T:
    """What `work` returns in this process, while `processes - 1` forked ones do the same with another index.

    Raises whatever `work` raises here; RuntimeError for what it raises only in another; Killed.
    """
    if processes <= 1:
        return work(Alone())
    # Forked: what is imported and compiled is so once, and what is asked for need not be picklable.
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(processes - 1)]
    others = [
        context.Process(target=_serve, args=(work, index, processes, pipes), daemon=True)
        for index in range(1, processes)
    ]
    try:
        with forking():
            for other in others:
                other.start()
        for _, theirs in pipes:
            theirs.close()
        return work(_First([ours for ours, _ in pipes]))
    finally:
        for ours, _ in pipes:
            ours.close()
        for other in others:
            if other.pid is not None:
                other.terminate()
                other.join()


def _serve(
    work: Callable[[Peers], Any], index: int, count: int, pipes: Sequence[tuple[Connection, Connection]]
) -> None:
    follow()
    for at, (ours, theirs) in enumerate(pipes, 1):
        ours.close()
        if at != index:
            theirs.close()
    first = pipes[index - 1][1]
    try:
        work(_Other(index, count, first))
    except (EOFError, ConnectionError):
        os._exit(1)  # the first process has gone
    except Exception as error:  # noqa: BLE001 - told to the first process, which raises it
        with contextlib.suppress(ConnectionError):
            first.send((f"{type(error).__name__}: {error}", None))
    first.close()


ENDING = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
PR_SET_PDEATHSIG = 1
"""Of Linux's <sys/prctl.h>."""


@contextmanager
def forking() -> Iterator[None]:
    """Around what forks: what ends this process waits until then. In the middle of a fork Python loses it.

    What is forked calls `follow` first.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow() -> None:
    """In a forked process: it ends with the one that forked it, however that ends."""
    # Who interrupts the command, or closes its terminal, signals the first process too, which ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():
        os._exit(1)  # it ended before


__all__ = ["Alone", "Killed", "Peers", "follow", "forking", "shared"]
