"""The gateway's own HTTP door: clients reach it without Serve's HTTP proxy in between.

Serve's proxy hands every chunk of a stream from process to process, which costs more than the gateway itself. The door
is a socket that the node's engine host keeps (deployments/engine/doors.py), and uvicorn on this end of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from deployments.engine.doors import DoorError, ask_for_door

log = logging.getLogger("ray.serve")

KEEP_ALIVE_S = 75
HEAD_S = 60.0
"""For a request's head, from its first byte on, or from the connection's beginning until one comes."""
RETRY_S = 0.2
RENEW_S = 1.0
PROBE_EVERY_S = 60
GONE_S = 300
"""A client that answers no probe for so long, or reads nothing of what there is for it, is gone: its power or network
failed, which closes no connection, or it stands still and would hold an engine."""
LAST_WORDS_S = 2.0
"""For what a request that was cancelled tells its client."""
_UPGRADE = (b"upgrade", b"http2-settings")


class _Http(HttpToolsProtocol):
    """Ignores a wish to change the protocol, as RFC 9110 (7.8) lets a server: the request is read again without it.

    The parser ends such a request at its head, and uvicorn takes it for one without a body. Java's own client wishes
    for HTTP/2 in every request that it sends over plain HTTP.

    Answers HTTP/1.0 without chunks, and closes connections whose head does not end, or the rest of a body that has been
    answered, which uvicorn does not.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _in_head = False
    _in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        left: bytes | None = data
        while left is not None:
            left = self._read(left)
        self._time_head()
        if self._in_body and not self._answers and not self.transport.is_closing():
            # uvicorn times the silence after an answer, but not after more of a body that it did not wait for.
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    @property
    def _answers(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _time_head(self) -> None:
        """Time the head that is waited for, if one is; between two requests uvicorn does, until a byte comes."""
        if self._in_body or (self._answers and not self._in_head):
            self._end_head_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEAD_S, self._head_is_late)

    def _end_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._answers:
            self._time_head()  # of a request sent ahead: what is being answered must not suffer
        else:
            self.transport.close()

    def _read(self, data: bytes) -> bytes | None:
        """What is to be read next of it, None if that was all."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        except httptools.HttpParserUpgrade as upgrade:
            if self._wished:
                return self._again(data[upgrade.args[0] :])
        return None

    @property
    def _wished(self) -> bool:
        return any(name == b"upgrade" for name, _ in self.headers)

    def _again(self, rest: bytes) -> bytes:
        """The request whose head was read, without its wish, and what follows it."""
        version = self.parser.get_http_version().encode("ascii")
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/", version, b"\r\n"]
        for name, value in self.headers:
            if name not in _UPGRADE:
                kept = value
                if name == b"connection":
                    tokens = [token.strip() for token in value.split(b",")]
                    kept = b", ".join(token for token in tokens if token.lower() not in _UPGRADE)
                head += [name, b": ", kept, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets it
        return b"".join([*head, b"\r\n", rest])

    def on_message_begin(self) -> None:
        self._end_head_timer()
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        if not (self.parser.should_upgrade() and self._wished):
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        if not (self.parser.should_upgrade() and self._wished):
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] < "1.1":
            app = _unchunked(app, cycle)
        super()._start_asgi_task(cycle, app)


def _unchunked(app: Any, cycle: RequestResponseCycle) -> Any:
    """`app` for a client of HTTP/1.0, which knows no chunks (RFC 9112, 6.1): a body of no told length ends with the
    connection. One that breaks off ends with a reset, so that nobody takes it for whole.
    """

    async def application(scope: Any, receive: Any, send: Any) -> None:
        sized = True

        async def send_unchunked(message: Any) -> None:
            nonlocal sized
            if message["type"] == "http.response.start":
                sized = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                if not sized:
                    cycle.chunked_encoding = False
            elif not sized:
                # uvicorn sends no byte beyond what it expects.
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        try:
            await app(scope, receive, send_unchunked)
        finally:
            if not (sized or cycle.response_complete or cycle.disconnected):
                _reset(cycle.transport)

    cycle.keep_alive = False
    return application


def _reset(transport: asyncio.Transport) -> None:
    """Close the connection as one that failed: a plain close tells an HTTP/1.0 client that the body is complete."""
    # uvloop's transports do not give their sockets away.
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as shared:
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _notice_silence(listener: socket.socket) -> None:
    """Have the kernel end the connections of clients that are gone; those that it accepts inherit this."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_EVERY_S)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_EVERY_S)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE_S * 1000)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the process is Ray's, and so are its signals


class Door:
    """Serves `app` on `address` (HOST:PORT). Create it on the event loop that serves.

    `on_close` is called before anything is waited for; requests that are not done `drain_s` later are cancelled.
    """

    def __init__(
        self,
        app: Any,
        address: str,
        run_dir: Path,
        drain_s: float,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_close = on_close
        self._address = address
        self._path = run_dir / "doors.sock"
        self._socket: socket.socket | None = None
        self._host_file = (0, 0)
        self._server = _Server(
            uvicorn.Config(
                app,
                http=_Http,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, int(drain_s)),
            )
        )
        self._tasks = [asyncio.ensure_future(self._serve()), asyncio.ensure_future(self._renew())]

    async def _serve(self) -> None:
        while self._socket is None:
            try:
                await self._ask()
            except DoorError as error:
                log.error("the gateway can't listen on %s", error)
                await asyncio.sleep(RENEW_S)
            except OSError:
                await asyncio.sleep(RETRY_S)  # the host is being started
        log.info("the gateway listens on %s", self._address)
        _notice_silence(self._socket)
        # uvicorn closes what it is given; ours is what a restarted host is offered.
        await self._server.serve(sockets=[self._socket.dup()])

    async def _ask(self) -> None:
        file = _identity(self._path)
        door = await asyncio.to_thread(ask_for_door, self._path, self._address, self._socket)
        self._host_file = file
        if self._socket is None:
            self._socket = door
        else:
            door.close()

    async def _renew(self) -> None:
        """Offer the socket to a host that was restarted: its doors' own socket is another file."""
        while True:
            await asyncio.sleep(RENEW_S)
            with contextlib.suppress(OSError, DoorError):
                if self._socket is not None and _identity(self._path) != self._host_file:
                    await self._ask()

    async def close(self) -> None:
        """Accept nothing more, and wait until what is being answered is answered."""
        self._on_close()
        self._server.should_exit = True
        self._tasks[1].cancel()
        if self._socket is None:
            self._tasks[0].cancel()
        await asyncio.wait({self._tasks[0]})
        if cancelled := self._server.server_state.tasks:
            await asyncio.wait(cancelled, timeout=LAST_WORDS_S)
        if self._socket is not None:
            self._socket.close()


def _identity(path: Path) -> tuple[int, int]:
    """Tells a file from the next one of its name. The inode alone does not: file systems give a freed one out again."""
    found = path.stat()
    return found.st_ino, found.st_ctime_ns
