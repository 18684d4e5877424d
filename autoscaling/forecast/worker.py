"""A process that fits. Started plain, not forked, so that nothing of its parent's (Ray, threads, locks) is in it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

Fitter = Callable[[Any], Any]
"""Takes a Job, returns a FittedModel or None. A module's own function, since it goes to the process by its name."""

_START = "import sys; sys.path[:] = {path!r}; from autoscaling.forecast.worker import serve; serve({fd})"
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
START_S = 60.0
GRACE_S = 5
MOST_TASKS = 5000
HEAVY_S = 60.0
"""Until a process gives back what only the most thorough fitter needs, if there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Task:
    id: int
    fitter: Fitter
    job: Any
    budget_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a task; `id` -1 says that the process is ready for its first."""

    id: int
    result: bytes = b""
    """Pickled, so that what can't be unpickled is that task's failure."""
    error: str = ""
    cpu_s: float = 0.0


class Worker:
    """The parent's side of one process. Not thread-safe."""

    def __init__(self, started_s: float) -> None:
        ours, theirs = Pipe(duplex=True)
        code = _START.format(path=sys.path, fd=theirs.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **dict.fromkeys(_THREADS, "1")},
        )
        theirs.close()
        self.connection = ours
        self.ready = False
        self.tasks = 0
        self.heavy = False
        """Whether it has loaded what only the most thorough fitter needs (with statsforecast, 220 MiB)."""
        self.free_since_s = started_s
        self.task: Task | None = None
        self.deadline_s = started_s + START_S

    def give(self, task: Task, now_s: float) -> None:
        """Raises OSError if the process is gone."""
        self.task, self.deadline_s = task, now_s + task.budget_s
        self.tasks += 1
        self.connection.send(task)

    def is_spent(self, now_s: float) -> bool:
        """Whether a fresh process should take its place: to give memory back, or because it has done a lot."""
        if self.task is not None or not self.ready:
            return False
        return self.tasks >= MOST_TASKS or (self.heavy and now_s - self.free_since_s > HEAVY_S)

    def end(self) -> None:
        """Kill it, and wait until it is gone."""
        self.process.kill()
        self.process.wait()
        self.connection.close()


def serve(fd: int) -> None:
    """The process's side: one task after the other until the parent closes, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent to handle
    os.nice(10)
    connection = Connection(fd)
    try:
        connection.send(Answer(-1))
        while True:
            task = connection.recv()
            # The kernel ends a process that hangs although its parent is no longer there to do so.
            signal.alarm(int(task.budget_s) + GRACE_S)
            connection.send(_run(task))
            signal.alarm(0)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _run(task: Task) -> Answer:
    began_s = time.process_time()
    try:
        result = pickle.dumps(task.fitter(task.job), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # noqa: BLE001 - it goes to the parent, which says so and takes a simpler fitter
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(last.filename)}:{last.lineno}"  # noqa: PTH119 - a name for people, no path
        return Answer(task.id, error=f"{type(error).__name__}: {error} ({place})")
    return Answer(task.id, result, cpu_s=time.process_time() - began_s)
