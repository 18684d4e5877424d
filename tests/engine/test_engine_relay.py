"""The tunnel from a gateway to an engine on another node."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deployments.engine import relay
from deployments.engine.relay import Tunnel, local_end, open_tunnel


class Engine:
    """Echoes what it gets in pieces, and notes when its client leaves."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(100_000):
                if data == b"bye":
                    break
                writer.write(data)
                await writer.drain()
        self.left.set()
        writer.close()


class Nodes:
    """An engine behind a tunnel, and the gateway's socket for it."""

    def __init__(self, folder: Path) -> None:
        self.engine = Engine()
        self.far, self.near = folder / "far", folder / "near"
        self.leases: list[bytes] = []
        self.tunnel = Tunnel(self._lease)

    async def _lease(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.leases.append(await reader.readline())
        writer.write(b"taken\n")


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as name:
        nodes = Nodes(Path(name))
        engine = await asyncio.start_unix_server(nodes.engine.serve, nodes.far)
        nodes.tunnel.target = str(nodes.far)
        address = await nodes.tunnel.listen("127.0.0.1")
        near = await local_end(nodes.near, address, nodes.tunnel.token)
        yield nodes
        near.close()
        engine.close()
        nodes.tunnel.close()


async def test_bytes_pass_both_ways_untouched(nodes: Nodes) -> None:
    """A megabyte of every byte there is."""
    data = bytes(range(256)) * 4096
    reader, writer = await asyncio.open_unix_connection(nodes.near)
    writer.write(data)
    assert await reader.readexactly(len(data)) == data
    writer.close()


async def test_a_hang_up_reaches_the_engine(nodes: Nodes) -> None:
    """So that it aborts the generation."""
    reader, writer = await asyncio.open_unix_connection(nodes.near)
    writer.write(b"x")
    assert await reader.readexactly(1) == b"x"
    writer.close()
    await asyncio.wait_for(nodes.engine.left.wait(), 20)


async def test_the_end_of_the_engine_reaches_the_gateway(nodes: Nodes) -> None:
    """As the end of the connection."""
    reader, writer = await asyncio.open_unix_connection(nodes.near)
    writer.write(b"bye")
    assert await reader.read() == b""
    writer.close()


@pytest.mark.parametrize(
    "hello", [b'{"token": "wrong", "to": "engine"}\n', b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b"[]\n"]
)
async def test_who_does_not_know_the_token_is_cut_off(nodes: Nodes, hello: bytes) -> None:
    """Whatever it says."""
    server = nodes.tunnel._server
    assert server is not None
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
    writer.write(hello)
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()


async def test_leases_go_through_it_too(nodes: Nodes) -> None:
    """On a connection of their own."""
    server = nodes.tunnel._server
    assert server is not None
    reader, writer = await open_tunnel(server.sockets[0].getsockname()[:2], nodes.tunnel.token, "leases")
    writer.write(b"take\n")
    assert await reader.readline() == b"taken\n"
    assert nodes.leases == [b"take\n"]
    writer.close()


async def test_a_peer_that_falls_silent_is_noticed_at_both_ends(nodes: Nodes) -> None:
    """Probes go out while nothing else does, and neither they nor bytes may stay without an answer for long."""
    accepted: list[socket.socket] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer.get_extra_info("socket"))
        writer.write(b"taken\n")
        await reader.read()

    nodes.tunnel._serve_leases = serve
    server = nodes.tunnel._server
    assert server is not None
    reader, writer = await open_tunnel(server.sockets[0].getsockname()[:2], nodes.tunnel.token, "leases")
    assert await reader.readline() == b"taken\n"
    for end in (writer.get_extra_info("socket"), *accepted):
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
    writer.close()


async def test_a_client_that_reads_nothing_for_a_while_loses_nothing(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the gateway has no room for stays with the engine, for longer than a node may be silent."""
    monkeypatch.setattr(relay, "SILENCE_S", 3)
    told = b"x" * (64 << 20)

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(told)
        await writer.drain()
        writer.close()

    nodes.tunnel.target = str(nodes.far.with_name("teller"))
    async with await asyncio.start_unix_server(tell, nodes.tunnel.target):
        reader, writer = await asyncio.open_unix_connection(nodes.near)
        writer.write(b"go\n")
        # In the kernel's own time: longer than the silence that ends a connection.
        await asyncio.sleep(8)
        got = 0
        while data := await reader.read(1 << 20):
            got += len(data)
        assert got == len(told)
        writer.close()


async def test_without_an_engine_the_connection_ends(nodes: Nodes) -> None:
    """The gateway then tries elsewhere."""
    nodes.tunnel.target = None
    reader, writer = await asyncio.open_unix_connection(nodes.near)
    writer.write(b"x")
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()
