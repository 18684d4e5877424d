"""Inside an engine: its life is that of its holders.

A holder is whoever keeps a connection open on the engine's control socket: the replica that serves with it, and the
engine host that may park it. When the last one goes (its process died: the kernel closes its sockets), a new one
has `grace_s` to come, since a host that was killed is restarted within a second or two; then the engine ends itself
with its children. So an engine survives the death of its host, and never becomes an orphan.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import threading
import time


class Keeper(threading.Thread):
    """Owns the control socket. Runs as a daemon thread; blocks in poll(), so it costs nothing while all is well."""

    def __init__(
        self, control: socket.socket, engine_id: str, *, grace_s: float, first_grace_s: float
    ) -> None:
        super().__init__(name="relight-keeper", daemon=True)
        self._control = control
        self._engine_id = engine_id
        self._grace_s = grace_s
        self._first_grace_s = first_grace_s

    def run(self) -> None:
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        holders: dict[int, socket.socket] = {}
        alone_until = time.monotonic() + self._first_grace_s
        while True:
            timeout_s = None if holders else max(0.0, alone_until - time.monotonic())
            events = poller.poll(None if timeout_s is None else timeout_s * 1000)
            if not events and not holders and time.monotonic() >= alone_until:
                end_process_group()
            for fd, _ in events:
                if fd == self._control.fileno():
                    self._accept(poller, holders)
                elif fd in holders and not self._alive(holders[fd]):
                    poller.unregister(fd)
                    holders.pop(fd).close()
                    if not holders:
                        alone_until = time.monotonic() + self._grace_s

    def _accept(self, poller: select.poll, holders: dict[int, socket.socket]) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._control.accept()
            connection.setblocking(False)
            connection.send(json.dumps({"engine_id": self._engine_id, "pid": os.getpid()}).encode() + b"\n")
            holders[connection.fileno()] = connection
            poller.register(connection, select.POLLIN)

    @staticmethod
    def _alive(connection: socket.socket) -> bool:
        try:
            return bool(connection.recv(4096))
        except BlockingIOError:
            return True
        except OSError:
            return False


def end_process_group() -> None:
    """End this engine and every process that it started. An engine leads its own process group."""
    os.killpg(os.getpgrp(), signal.SIGKILL)
