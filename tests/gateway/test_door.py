"""The gateway's door: a listening socket that the engine host keeps while gateways come and go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.engine.doors import DoorError, DoorKeeper, ask_for_door
from deployments.fleet import parse_fleet
from deployments.gateway import door as door_module
from deployments.gateway.app import build_gateway
from deployments.gateway.door import HEAD_S, KEEP_ALIVE_S, Door
from deployments.gateway.observe import NullTelemetry
from deployments.gateway.proxy import BODY_STALL_S
from tests.fakes.engines import fake_engines


@pytest.fixture
async def keeper(tmp_path: Path) -> AsyncIterator[DoorKeeper]:
    """The host's side, on this test's event loop."""
    keeper = DoorKeeper(tmp_path / "doors.sock")
    yield keeper
    keeper.close()


def free_address() -> str:
    """An address of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def answers(address: str) -> dict[str, Any]:
    """One GET; waits as long as it takes for somebody to accept."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    body: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return body


def app(name: str, gate: asyncio.Event | None = None) -> Any:
    """An ASGI application that says its name, once `gate` is open."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if gate is not None:
            await gate.wait()
        body = json.dumps({"name": name}).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return application


async def test_two_gateways_of_a_node_share_one_socket(tmp_path: Path, keeper: DoorKeeper) -> None:
    """Asking twice for an address gives the same socket, not an error that it is taken."""
    address = free_address()
    first = await asyncio.to_thread(ask_for_door, tmp_path / "doors.sock", address)
    second = await asyncio.to_thread(ask_for_door, tmp_path / "doors.sock", address)
    with first, second:
        assert first.getsockname() == second.getsockname()


async def test_an_address_that_is_taken_is_named(tmp_path: Path, keeper: DoorKeeper) -> None:
    """An address that another process holds is refused with its name and the reason."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(DoorError, match=f"{address}: .*in use"):
            await asyncio.to_thread(ask_for_door, tmp_path / "doors.sock", address)


@pytest.mark.parametrize("address", ["127.0.0.1:80800", "127.0.0.1:x"])
async def test_an_address_that_is_none_is_named(tmp_path: Path, keeper: DoorKeeper, address: str) -> None:
    """An answer with the reason, and the host goes on."""
    for _ in range(2):
        with pytest.raises(DoorError, match=f"{address}: "):
            await asyncio.to_thread(ask_for_door, tmp_path / "doors.sock", address)


async def test_clients_wait_for_the_next_gateway(tmp_path: Path, keeper: DoorKeeper) -> None:
    """A client that connects while no gateway lives is answered by the next one, not refused."""
    address = free_address()
    first = Door(app("first"), address, tmp_path, drain_s=1)
    while True:
        try:
            assert await answers(address) == {"name": "first"}
            break
        except ConnectionRefusedError:  # the door is being opened
            await asyncio.sleep(0.01)
    await first.close()
    waiting = asyncio.create_task(answers(address))
    await asyncio.sleep(0)
    assert not waiting.done()
    second = Door(app("second"), address, tmp_path, drain_s=1)
    assert await waiting == {"name": "second"}
    await second.close()


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application that answers the request's method, path, body, and the names of its headers."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    names = sorted(name.decode() for name, _ in scope["headers"])
    answer = json.dumps([scope["method"], scope["path"], body.decode(), names]).encode()
    headers = [(b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("cut", [1, 40, 1 << 20])
async def test_a_wish_for_another_protocol_is_ignored(
    tmp_path: Path, keeper: DoorKeeper, cut: int, framing: str
) -> None:
    """Java's client wishes for HTTP/2 beside a body, in however many pieces it comes; the connection stays HTTP/1.1."""
    address = free_address()
    door = Door(echo, address, tmp_path, drain_s=1)
    held = await asyncio.to_thread(ask_for_door, tmp_path / "doors.sock", address)
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    wish = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAA\r\n"
    length, body = b"content-length: 5\r\n", b"hello"
    if framing == "chunks":
        length, body = b"transfer-encoding: chunked\r\n", b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
    realtime = b"GET /rt HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n"
    sent = b"POST /v1 HTTP/1.1\r\nhost: x\r\n" + wish + length + b"\r\n" + body + realtime
    for start in range(0, len(sent), cut):
        writer.write(sent[start : start + cut])
        await asyncio.sleep(0)
    answers = []
    for _ in range(2):
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        answers.append(json.loads(await reader.readexactly(size)))
    assert answers[0][:3] == ["POST", "/v1", "hello"]
    assert "upgrade" not in answers[0][3] and "http2-settings" not in answers[0][3]
    assert answers[1][:3] == ["GET", "/rt", ""]
    writer.close()
    await door.close()
    held.close()


async def test_any_number_of_such_wishes_may_come_at_once(tmp_path: Path, keeper: DoorKeeper) -> None:
    """In one packet: each is read for itself, not within the one before."""
    address = free_address()
    door = Door(echo, address, tmp_path, drain_s=1)
    held = await asyncio.to_thread(ask_for_door, tmp_path / "doors.sock", address)
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    many = sys.getrecursionlimit()
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n" * many)
    for _ in range(many):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
    writer.close()
    await door.close()
    held.close()


@contextlib.asynccontextmanager
async def open_door(application: Any, folder: Path) -> AsyncIterator[tuple[str, int]]:
    """Serve it; host and port, which take connections at once."""
    address = free_address()
    door = Door(application, address, folder, drain_s=1)
    with await asyncio.to_thread(ask_for_door, folder / "doors.sock", address):
        host, _, port = address.rpartition(":")
        yield host, int(port)
        await door.close()


def streaming(*pieces: bytes, whole: bool = True) -> Any:
    """An ASGI application whose answer tells no length; half of one if it is not `whole`."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"1")]})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if whole:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return application


@pytest.mark.parametrize("wish", [b"", b"connection: keep-alive\r\n"])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_http_1_0_gets_no_chunks(
    tmp_path: Path, keeper: DoorKeeper, version: bytes, wish: bytes
) -> None:
    """A body of no told length ends with the connection there, whatever the client wishes; HTTP/1.1 has chunks."""
    async with open_door(streaming(b"hel", b"", b"lo"), tmp_path) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET / HTTP/" + version + b"\r\nhost: x\r\n" + wish + b"\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        if version == b"1.1":
            assert b"transfer-encoding: chunked" in head
            assert await reader.readuntil(b"0\r\n\r\n") == b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"
        else:
            assert b"transfer-encoding" not in head
            assert b"connection: close" in head
            assert await reader.read() == b"hello"
        writer.close()


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
async def test_http_1_0_keeps_a_length_that_is_told(
    tmp_path: Path, keeper: DoorKeeper, method: bytes
) -> None:
    """And a HEAD has no body."""
    async with open_door(app("sized"), tmp_path) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(method + b" / HTTP/1.0\r\n\r\n")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert b"content-length: 17" in head
        assert body == (b'{"name": "sized"}' if method == b"GET" else b"")
        writer.close()


async def test_a_body_that_breaks_off_is_not_whole_for_http_1_0(tmp_path: Path, keeper: DoorKeeper) -> None:
    """The connection is reset, since its end alone would say that all is there."""
    async with open_door(streaming(b"half", whole=False), tmp_path) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


@pytest.fixture
async def go(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets the event loop's clock go on by so many seconds."""
    loop, ahead_s = asyncio.get_running_loop(), 0.0
    steady_s = loop.time

    def go(seconds: float) -> None:
        nonlocal ahead_s
        ahead_s += seconds

    monkeypatch.setattr(loop, "time", lambda: steady_s() + ahead_s)
    return go


async def echoed(reader: asyncio.StreamReader) -> list[Any]:
    """One answer of `echo`."""
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    answer: list[Any] = json.loads(await reader.readexactly(size))
    return answer


async def all_is_read(host: str, port: int) -> None:
    """What was sent before is read, and timers that are due have run: another connection was answered since."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(REQUEST)
    await echoed(reader)
    writer.close()


REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        (False, b""),
        (False, b"\r\n"),
        (False, b"G"),
        (False, REQUEST[:-2]),
        (True, b"\r\n"),
        (True, REQUEST[:-2]),
    ],
)
async def test_a_head_that_does_not_end_is_not_waited_for(
    tmp_path: Path, keeper: DoorKeeper, go: Callable[[float], None], asked: bool, sent: bytes
) -> None:
    """On a new connection and on one that was asked before; also where no byte comes, and however slowly they come."""
    async with open_door(echo, tmp_path) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        if asked:
            writer.write(REQUEST)
            await echoed(reader)
        steps = max(1, len(sent))
        for number in range(steps):
            writer.write(sent[number : number + 1])
            await all_is_read(host, port)
            go(HEAD_S / steps)
        assert await reader.read() == b""
        writer.close()


async def test_a_head_has_its_time_from_its_first_byte(
    tmp_path: Path, keeper: DoorKeeper, go: Callable[[float], None]
) -> None:
    """The time before that is not counted."""
    async with open_door(echo, tmp_path) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        for _ in range(2):
            for part in (REQUEST[:5], REQUEST[5:]):
                await all_is_read(host, port)
                go(HEAD_S - 5)
                await all_is_read(host, port)
                writer.write(part)
            assert (await echoed(reader))[:2] == ["GET", "/"]
        writer.close()


async def test_what_is_not_a_head_may_take_its_time(
    tmp_path: Path, keeper: DoorKeeper, go: Callable[[float], None]
) -> None:
    """Bodies, also answered ones, streams with half a request behind them, and the silence between two requests."""
    end = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/early":
            await app("early")(scope, receive, send)
            return
        if scope["path"] != "/stream":
            await echo(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await end.wait()
        await send({"type": "http.response.body", "body": b"ended", "more_body": False})

    async with open_door(application, tmp_path) as (host, port):
        idle, idle_writer = await asyncio.open_connection(host, port)
        idle_writer.write(REQUEST)
        await echoed(idle)
        body, body_writer = await asyncio.open_connection(host, port)
        body_writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhe")
        stream, stream_writer = await asyncio.open_connection(host, port)
        stream_writer.write(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n" + REQUEST[:5])
        await stream.readuntil(b"begun\r\n")
        early, early_writer = await asyncio.open_connection(host, port)
        early_writer.write(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n")
        await echoed(early)
        early_writer.write(b"he")
        await all_is_read(host, port)
        go(HEAD_S)
        await all_is_read(host, port)
        idle_writer.write(REQUEST)
        early_writer.write(b"l")
        assert (await echoed(idle))[:2] == ["GET", "/"]
        go(HEAD_S)
        await all_is_read(host, port)
        body_writer.write(b"llo")
        assert (await echoed(body))[:3] == ["POST", "/", "hello"]
        early_writer.write(b"lo" + REQUEST)
        assert (await echoed(early))[:2] == ["GET", "/"]
        end.set()
        await stream.readuntil(b"0\r\n\r\n")
        stream_writer.write(REQUEST[5:])
        assert (await echoed(stream))[:2] == ["GET", "/"]
        for writer in (idle_writer, body_writer, early_writer, stream_writer):
            writer.close()


POST = b"POST /v1/%s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 14\r\n\r\n"


@contextlib.asynccontextmanager
async def open_gateway(folder: Path) -> AsyncIterator[tuple[str, int]]:
    """A door to a gateway, of which nobody asks a model."""
    fleet = parse_fleet({"models": [{"id": "tiny", "source": "org/weights"}]}, "test")
    async with (
        fake_engines("tiny") as engines,
        open_door(build_gateway(fleet, engines, NullTelemetry()), folder) as address,
    ):
        yield address


@pytest.mark.parametrize(("route", "style"), [(b"chat/completions", "openai"), (b"messages", "anthropic")])
async def test_a_body_that_does_not_go_on_is_not_waited_for(
    tmp_path: Path, keeper: DoorKeeper, go: Callable[[float], None], route: bytes, style: str
) -> None:
    """Its client is told, should it be there; however slowly a body comes, it is waited for."""
    async with open_gateway(tmp_path) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(POST % route)
        for piece in (b'{"mo', b'del":'):
            await all_is_read(host, port)
            go(BODY_STALL_S - 5)
            await all_is_read(host, port)
            writer.write(piece)
        slow, slow_writer = await asyncio.open_connection(host, port)
        slow_writer.write(POST % route + b'{"model":')
        await all_is_read(host, port)
        go(BODY_STALL_S - 5)
        slow_writer.write(b' "')
        await all_is_read(host, port)
        go(5.0)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in head
        error = json.loads(body)
        assert error["error"]["code"] == "request_timeout"
        assert error.get("type") == ("error" if style == "anthropic" else None)
        slow_writer.write(b'x"}')
        assert (await slow.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 404 ")
        for each in (writer, slow_writer):
            each.close()


async def test_the_rest_of_an_answered_body_is_not_waited_for(
    tmp_path: Path, keeper: DoorKeeper, go: Callable[[float], None]
) -> None:
    """Longer than for the next request, from its last byte on."""
    async with open_door(app("early"), tmp_path) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(POST % b"x")
        assert await echoed(reader) == {"name": "early"}
        for _ in range(2):
            writer.write(b"{")
            await all_is_read(host, port)
            go(KEEP_ALIVE_S - 5)
            await all_is_read(host, port)
        assert not reader.at_eof()
        go(5.0)
        assert await reader.read() == b""
        writer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the options are Linux's")
async def test_who_is_gone_or_stands_still_is_found_out(
    tmp_path: Path, keeper: DoorKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel: who lost its power closes no connection, and who reads nothing of a stream holds an engine."""
    monkeypatch.setattr(door_module, "GONE_S", 1)
    left = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not left.is_set():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)
            if not door._server.server_state.connections:
                left.set()

    address = free_address()
    door = Door(application, address, tmp_path, drain_s=1)
    with await asyncio.to_thread(ask_for_door, tmp_path / "doors.sock", address):
        while not door._server.started:  # noqa: ASYNC110 - uvicorn tells nobody
            await asyncio.sleep(0.01)
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(REQUEST)
            await left.wait()
        await door.close()


async def test_closing_finishes_what_is_being_answered(tmp_path: Path, keeper: DoorKeeper) -> None:
    """A gateway that is drained answers what it has accepted, and accepts nothing more."""
    address, gate = free_address(), asyncio.Event()
    door = Door(app("draining", gate), address, tmp_path, drain_s=30)
    held = await asyncio.to_thread(ask_for_door, tmp_path / "doors.sock", address)
    slow = asyncio.create_task(answers(address))
    while not door._server.server_state.tasks:  # noqa: ASYNC110 - uvicorn tells nobody
        await asyncio.sleep(0.01)
    closing = asyncio.create_task(door.close())
    await asyncio.sleep(0)
    assert not closing.done()
    gate.set()
    assert await slow == {"name": "draining"}
    await closing
    held.close()


async def test_what_is_not_done_in_time_may_still_say_so(tmp_path: Path, keeper: DoorKeeper) -> None:
    """It is cancelled, knows why, and its last words are waited for."""
    address, closing, never = free_address(), asyncio.Event(), asyncio.Event()
    last_words = app("too late")

    async def application(scope: Any, receive: Any, send: Any) -> None:
        try:
            await never.wait()
        except asyncio.CancelledError:
            assert closing.is_set()
            await asyncio.sleep(0)
            await last_words(scope, receive, send)
            raise

    door = Door(application, address, tmp_path, drain_s=1, on_close=closing.set)
    held = await asyncio.to_thread(ask_for_door, tmp_path / "doors.sock", address)
    slow = asyncio.create_task(answers(address))
    while not door._server.server_state.tasks:  # noqa: ASYNC110 - uvicorn tells nobody
        await asyncio.sleep(0.01)
    await door.close()
    assert not door._server.server_state.tasks
    assert await slow == {"name": "too late"}
    held.close()


async def test_a_restarted_host_is_offered_the_socket(tmp_path: Path) -> None:
    """A host that was killed gets the socket back from the gateway, and keeps it for the gateway after."""
    address = free_address()
    keeper = DoorKeeper(tmp_path / "doors.sock")
    mine = await asyncio.to_thread(ask_for_door, tmp_path / "doors.sock", address)
    keeper.close()
    keeper = DoorKeeper(tmp_path / "doors.sock")
    again = await asyncio.to_thread(ask_for_door, tmp_path / "doors.sock", address, mine)
    again.close()
    mine.close()
    kept = await asyncio.to_thread(ask_for_door, tmp_path / "doors.sock", address)
    with kept:
        assert f"127.0.0.1:{kept.getsockname()[1]}" == address
    keeper.close()


async def test_a_gateway_offers_its_socket_to_a_restarted_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, and also where the new host's file has the inode that the old one's had, as on ext4."""
    monkeypatch.setattr("deployments.gateway.door.RENEW_S", 0.01)
    address, path = free_address(), tmp_path / "doors.sock"
    keeper = DoorKeeper(path)
    door = Door(app("first"), address, tmp_path, drain_s=1)
    while not door._server.started:  # noqa: ASYNC110 - uvicorn tells nobody
        await asyncio.sleep(0.01)
    keeper.close()
    keeper = DoorKeeper(path)
    try:
        async with asyncio.timeout(5):
            while True:
                # A host that was not offered it can't bind the address that the gateway still holds.
                try:
                    (await asyncio.to_thread(ask_for_door, path, address)).close()
                    break
                except DoorError:
                    await asyncio.sleep(0.01)
    finally:
        await door.close()
        keeper.close()
