"""Listening sockets that outlive the gateways that accept on them.

The engine host binds a gateway's address and hands the socket over; when the gateway is killed the socket stays open,
so that clients that connect meanwhile wait in its backlog for the next gateway instead of being refused. Several
gateways of a node accept on the same socket. A gateway in turn hands its socket to a host that was restarted. (The
idea is systemd's socket activation.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from pathlib import Path

from deployments.engine.protocol import receive_with_fds, send_with_fds

log = logging.getLogger("relight.host")

BACKLOG = 4096
ANSWER_TIMEOUT_S = 5.0


class DoorError(Exception):
    """The address can't be had; the message says why."""


class DoorKeeper:
    """The host's side: one socket for each address, kept for as long as the fleet's gateways listen there."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._listener.setblocking(False)
        self._doors: dict[str, socket.socket] = {}
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._serve)

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        with connection:
            connection.settimeout(1.0)  # a client that connects sends at once
            try:
                received = receive_with_fds(connection)
                if received is not None:
                    self._answer(connection, str(received[0]["address"]), received[1])
            except (OSError, ValueError, KeyError) as error:
                log.warning("a gateway's door: %s", error)

    def _answer(self, connection: socket.socket, address: str, offered: list[int]) -> None:
        if offered and address not in self._doors:
            self._doors[address] = socket.socket(fileno=offered.pop(0))
        for descriptor in offered:
            os.close(descriptor)
        try:
            if address not in self._doors:
                self._doors[address] = listen(address)
        except (OSError, ValueError, OverflowError) as error:
            send_with_fds(connection, {"error": f"{address}: {error}"})
            return
        send_with_fds(connection, {"address": address}, [self._doors[address].fileno()])

    def keep_only(self, address: str | None) -> None:
        """The fleet listens there now, or nowhere: who connects to another door would wait for nobody.

        A gateway that is being replaced has its socket, and accepts on it to its end.
        """
        for other in self._doors.keys() - {address}:
            self._doors.pop(other).close()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._listener.fileno())
        self._listener.close()
        for door in self._doors.values():
            door.close()


def listen(address: str) -> socket.socket:
    """Bind HOST:PORT. Raises OSError, ValueError, OverflowError."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    door = socket.socket(family, socket.SOCK_STREAM)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((host.strip("[]"), int(port)))
        door.listen(BACKLOG)
    except BaseException:
        door.close()
        raise
    door.setblocking(False)
    return door


def ask_for_door(path: Path, address: str, mine: socket.socket | None = None) -> socket.socket:
    """The gateway's side: the socket of `address`, from the host at `path`; `mine` is offered to a host without one.

    Raises DoorError if the address can't be bound, OSError if the host is not there.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(ANSWER_TIMEOUT_S)
        connection.connect(str(path))
        send_with_fds(connection, {"address": address}, [mine.fileno()] if mine else [])
        received = receive_with_fds(connection)
    if received is None:
        raise ConnectionResetError("the engine host went away")
    message, descriptors = received
    if not descriptors:
        raise DoorError(message.get("error", "the engine host gave no socket"))
    door = socket.socket(fileno=descriptors.pop(0))
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    door.setblocking(False)
    return door
