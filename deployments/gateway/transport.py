"""HTTP/1.1 to one engine over its unix socket."""

from __future__ import annotations

import io
import logging
import weakref
from collections.abc import AsyncIterator

import aiohttp
from yarl import URL

from deployments.errors import EngineInterrupted, EngineUnreachable
from deployments.gateway.engines import Headers

log = logging.getLogger("ray.serve")

# vLLM's server closes a connection that was idle for 5 s; reusing one that it is about to close costs a
# retry.
_KEEP_ALIVE_S = 2.0
_MAX_HEADER_BYTES = 1 << 20
# aiohttp adds these when the client didn't send them; the engine must see what the client sent.
_NOT_ADDED = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


class UnixEngineResponse:
    """An engine's answer; see `engines.EngineResponse`."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Headers = response.raw_headers

    async def chunks(self) -> AsyncIterator[bytes]:
        """Body bytes as they arrive, as large as the socket gave them. Raises `EngineInterrupted`."""
        read = self._response.content.readany
        try:
            while chunk := await read():
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            # How it broke off is in this client's own words, which say nothing to those who asked.
            log.info("an engine's answer broke off: %s", error)
            raise EngineInterrupted("The engine's answer broke off.") from error

    async def close(self) -> None:
        """Close the connection, unless the whole body was read and it is back in the pool."""
        self._response.close()


class UnixTransport:
    """A pool of connections to one engine. Has no timeouts of its own: deadlines belong to the caller.

    Create and use it on one event loop. `uds` is the path of the engine's socket.
    """

    def __init__(self, uds: str) -> None:
        self.uds = uds
        self._responses: weakref.WeakSet[aiohttp.ClientResponse] = weakref.WeakSet()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(path=uds, limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_NOT_ADDED,
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
        )

    async def request(self, method: str, target: str, headers: Headers, body: bytes) -> UnixEngineResponse:
        """Send a request; returns when the status line and headers are there.

        `target` is the path with its query, already percent-encoded; it reaches the engine as it is. Header
        bytes are kept; a value that isn't UTF-8 is left out, for the client library can't send one.
        Raises `EngineUnreachable` when the engine refuses, resets, or closes before its status line.
        """
        try:
            response = await self._session.request(
                method,
                URL(f"http://engine{target}", encoded=True),
                headers=[pair for name, value in headers if (pair := _text(name, value))],
                # From a stream, since aiohttp writes large bytes in one piece and warns that this blocks the
                # loop.
                data=io.BytesIO(body) if body else None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as error:
            raise EngineUnreachable(f"The engine did not answer: {error}") from error
        self._responses.add(response)
        return UnixEngineResponse(response)

    async def close(self) -> None:
        """Close every connection; whose body is not there breaks off. Idempotent."""
        for response in list(self._responses):
            # Closing the session alone would leave those who read a body waiting for ever.
            if not response.content.is_eof():
                response.close()
        await self._session.close()


def _text(name: bytes, value: bytes) -> tuple[str, str] | None:
    try:
        return name.decode("ascii"), value.decode("utf-8")
    except UnicodeDecodeError:
        return None
