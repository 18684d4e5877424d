"""One at a time: the second scripts/up (or down) of a checkout waits for the first, and says so."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[int]:
    """Holds `path` locked. The kernel lets go when the process ends, however it ends: no lock is stale.

    Yields the descriptor: a child that inherits it holds the lock for as long as it lives, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Python opens files non-inheritable, so that a daemon that we start does not hold the lock for ever.
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            print(f"Waiting for {holder}, which is at work on this checkout ({what}) ...", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()}")
        file.flush()
        try:
            yield file.fileno()
        finally:
            file.truncate(0)
