"""HTTP/1.1 over a unix socket, against sockets that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deployments.errors import EngineInterrupted, EngineUnreachable
from deployments.gateway.transport import UnixTransport

OK = b"HTTP/1.1 200 OK\r\n"


class Peer:
    """Answers every request with the same bytes and then closes, unless it stays."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.stays = False
        self.got = b""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.got += await reader.readuntil(b"\r\n\r\n")
        writer.write(self.answer)
        await writer.drain()
        if self.stays:
            await reader.read()
        writer.close()


@contextlib.asynccontextmanager
async def connected(answer: bytes) -> AsyncIterator[tuple[UnixTransport, Peer]]:
    """A transport to a peer."""
    with tempfile.TemporaryDirectory(prefix="rl") as folder:
        peer = Peer(answer)
        uds = str(Path(folder) / "s")
        server = await asyncio.start_unix_server(peer, uds)
        transport = UnixTransport(uds)
        async with server:
            try:
                yield transport, peer
            finally:
                await transport.close()


async def body(transport: UnixTransport) -> bytes:
    """The whole body of one answer."""
    response = await transport.request("POST", "/x", [], b"y")
    return b"".join([chunk async for chunk in response.chunks()])


@pytest.mark.parametrize("answer", [b"", b"HTT", b"garbage\r\n\r\n", OK + b"x: y\r\n"])
async def test_no_whole_head_is_an_unreachable_engine(answer: bytes) -> None:
    """Closed before or inside the head, or no HTTP at all."""
    async with connected(answer) as (transport, _):
        with pytest.raises(EngineUnreachable):
            await transport.request("POST", "/x", [], b"y")


async def test_no_socket_is_an_unreachable_engine() -> None:
    """The engine's file isn't there."""
    transport = UnixTransport("/nonexistent/socket")
    with pytest.raises(EngineUnreachable):
        await transport.request("POST", "/x", [], b"")
    await transport.close()


@pytest.mark.parametrize(
    "rest",
    [
        b"content-length: 10\r\n\r\n12345",
        b"transfer-encoding: chunked\r\n\r\n5\r\n12345\r\n",
    ],
)
async def test_an_incomplete_body_is_an_interrupted_engine(rest: bytes) -> None:
    """Less than was promised is never taken for the whole."""
    async with connected(OK + rest) as (transport, _):
        with pytest.raises(EngineInterrupted):
            await body(transport)


async def test_closing_ends_those_who_read() -> None:
    """A body that is not there breaks off; one that is whole can still be read."""
    async with connected(OK + b"connection: close\r\ncontent-length: 3\r\n\r\nabc") as (transport, peer):
        whole = await transport.request("POST", "/x", [], b"y")
        peer.answer = OK + b"content-length: 10\r\n\r\n12345"
        peer.stays = True
        broken = (await transport.request("POST", "/x", [], b"y")).chunks()
        assert await anext(broken) == b"12345"
        reading = asyncio.create_task(anext(broken))
        await asyncio.sleep(0)
        await transport.close()
        with pytest.raises(EngineInterrupted):
            await reading
        assert [chunk async for chunk in whole.chunks()] == [b"abc"]


async def test_a_garbled_body_is_never_an_answer() -> None:
    """Garbage that comes with the head is found while reading it, which may be retried."""
    async with connected(OK + b"transfer-encoding: chunked\r\n\r\nzz\r\n") as (transport, _):
        with pytest.raises((EngineUnreachable, EngineInterrupted)):
            await body(transport)


async def test_bodies_are_not_decoded() -> None:
    """A compressed body passes as it is."""
    answer = OK + b"content-encoding: gzip\r\ncontent-length: 5\r\n\r\n12345"
    async with connected(answer) as (transport, _):
        assert await body(transport) == b"12345"


async def test_the_request_is_what_was_asked_for() -> None:
    """Target and headers arrive as they were given, and the library adds only what HTTP demands."""
    async with connected(OK + b"content-length: 0\r\n\r\n") as (transport, peer):
        headers = [
            (b"X-Caf\xc3\xa9", b"dropped"),
            (b"x-utf8", b"caf\xc3\xa9"),
            (b"x-latin", b"caf\xe9"),
            (b"a", b"1"),
        ]
        await transport.request("POST", "/v1/%2e%2e/a//b?x=%20&y=+", [*headers, (b"a", b"2")], b"body")
    lines = peer.got.split(b"\r\n")
    assert lines[0] == b"POST /v1/%2e%2e/a//b?x=%20&y=+ HTTP/1.1"
    assert {line.split(b":")[0].lower() for line in lines[1:] if line} == {
        b"host",
        b"content-length",
        b"x-utf8",
        b"a",
    }
    assert b"x-utf8: caf\xc3\xa9" in lines
    assert [line for line in lines if line.startswith(b"a: ")] == [b"a: 1", b"a: 2"]


async def test_response_headers_keep_their_bytes() -> None:
    """Latin-1 in an engine's header is the client's to read."""
    async with connected(OK + b"x-a: caf\xe9\r\ncontent-length: 0\r\n\r\n") as (transport, _):
        response = await transport.request("GET", "/x", [], b"")
        assert (b"x-a", b"caf\xe9") in list(response.headers)
        await response.close()
        await response.close()


async def test_redirects_are_the_clients_affair() -> None:
    """The transport follows nothing."""
    async with connected(b"HTTP/1.1 307 X\r\nlocation: /y\r\ncontent-length: 0\r\n\r\n") as (transport, _):
        assert (await transport.request("POST", "/x", [], b"")).status == 307
