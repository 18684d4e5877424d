"""Bytes between a gateway and an engine on another node: a TCP tunnel from socket to socket, nothing parsed.

The replica listens on its node's address. A connection begins with one line, `{"token": …, "to": "engine"|"leases"}`;
whoever does not know the replica's token, which travels only through Ray, is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

CHUNK_BYTES = 1 << 16
HELLO_DEADLINE_S = 5.0
SILENCE_S = 30  # a node that vanished closes no connection; one that answers no probe for so long is gone
UNREAD_S = 300  # the same for what an engine tells: a client that reads slowly stops the whole way, and lives

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Tunnel:
    """The replica's end: lets gateways on other nodes reach its engine's socket and its leases."""

    def __init__(self, serve_leases: Serve) -> None:
        self.token = secrets.token_hex(16)
        self.target: str | None = None  # the engine's unix socket, while there is one
        self._serve_leases = serve_leases
        self._server: asyncio.Server | None = None

    async def listen(self, ip: str) -> tuple[str, int]:
        """Listen on a free port of `ip`; returns the address."""
        self._server = await asyncio.start_server(self._accept, ip, 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            _notice_silence(writer)
            line = await asyncio.wait_for(reader.readline(), HELLO_DEADLINE_S)
            hello = json.loads(line)
            if not hmac.compare_digest(str(hello["token"]), self.token):
                return
            if hello["to"] == "leases":
                await self._serve_leases(reader, writer)
            elif self.target is not None:
                _give_up_after(writer.get_extra_info("socket"), UNREAD_S)
                await splice(reader, writer, *await asyncio.open_unix_connection(self.target))
        except (OSError, TimeoutError, ValueError, KeyError, TypeError):
            return
        finally:
            writer.close()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


async def open_tunnel(
    address: tuple[str, int], token: str, to: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a replica's tunnel. Raises OSError."""
    reader, writer = await asyncio.open_connection(*address)
    _notice_silence(writer)
    writer.write(json.dumps({"token": token, "to": to}).encode() + b"\n")
    return reader, writer


def _notice_silence(writer: asyncio.StreamWriter) -> None:
    """Have the kernel end a connection whose other end does not answer any more."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 3)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_S // 3)
    _give_up_after(connection, SILENCE_S)


def _give_up_after(connection: socket.socket, seconds: int) -> None:
    """So long after who is there has answered, or has had room for more, last."""
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)


async def local_end(path: Path, address: tuple[str, int], token: str) -> asyncio.Server:
    """The gateway's end: a unix socket at `path` whose connections come out at the engine."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await splice(reader, writer, *await open_tunnel(address, token, "engine"))
        except OSError:
            pass
        finally:
            writer.close()

    return await asyncio.start_unix_server(accept, path)


async def splice(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    far_reader: asyncio.StreamReader,
    far_writer: asyncio.StreamWriter,
) -> None:
    """Copy both ways until one side closes; then close the other, so that a hang-up reaches the engine."""

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                sink.write(data)
                await sink.drain()

    ways = [asyncio.create_task(copy(reader, far_writer)), asyncio.create_task(copy(far_reader, writer))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        far_writer.close()
        writer.close()
