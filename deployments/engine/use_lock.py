"""The node's weights cache: the lock that says that a model is in use, whether it is whole, where mapped ones are.

Apart from `sources`, so that the engine host can hold it without what bringing and converting weights imports.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Self

MANIFEST = ".relight-manifest.json"
LOCKS = ".locks"


class UseLock:
    """A file that is locked shared by whoever uses a model; its modification time is the last use.

    flock itself, because filelock ties a shared lock to a thread, and leases pass between threads.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._fd = -1

    def __enter__(self) -> Self:
        self._fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self

    def __exit__(self, *_: object) -> None:
        """Give it back. Once more does nothing: a template's end and the failure of its build may both do it."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        # Unlocking, not only closing: a forked child may have the same open file.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)

    def share(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def try_share(self) -> bool:
        """As `share`, without waiting; False while the model is being evicted."""
        return self._try(fcntl.LOCK_SH)

    def try_exclusive(self) -> bool:
        return self._try(fcntl.LOCK_EX)

    def _try(self, kind: int) -> bool:
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def touch(self) -> None:
        os.utime(self._fd)


def use_file(root: Path, key: str) -> Path:
    """The lock's file of the model `key` in the cache at `root`."""
    return root / LOCKS / f"{key}.use"


def mapped_dir(cache_dir: str | Path | None) -> Path:
    """Where the mapped weights are that belong to the cache in that folder, or to the default one."""
    cache = Path(cache_dir or os.environ.get("RELIGHT_CACHE") or "~/.cache/relight")
    return cache.expanduser().absolute() / "mapped"


def remove_mapped(weights: Path) -> None:
    """A file of mapped weights and its index. Who has it mapped keeps it."""
    weights.unlink(missing_ok=True)
    weights.with_suffix(".json").unlink(missing_ok=True)


def is_whole(folder: Path) -> bool:
    """Whether the folder is a model that was brought completely, with every file still as long as it was."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def hold(folder: Path) -> UseLock | None:
    """Keep a folder of a cache from being evicted until the lock's `__exit__`; None if it is in no cache.

    Raises BlockingIOError while it is being evicted, FileNotFoundError if it was.
    """
    if not (folder.parent / LOCKS).is_dir():
        return None  # used in place: nothing evicts it
    lock = UseLock(use_file(folder.parent, folder.name)).__enter__()
    try:
        if not lock.try_share():
            raise BlockingIOError(f"{folder} is being evicted from the cache")
        if not is_whole(folder):
            raise FileNotFoundError(f"{folder} was evicted from the cache")
        lock.touch()
    except OSError:
        lock.__exit__()
        raise
    return lock


def let_go(lock: UseLock | None) -> None:
    """The cache may evict this model again, as far as this user of it is concerned."""
    if lock is not None:
        lock.__exit__()
