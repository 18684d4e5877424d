"""The little HTTP that the host needs: one request to an engine over its unix socket, whole answers only."""

from __future__ import annotations

import asyncio
import json
from typing import Any


async def request(path: str, method: str, target: str, body: Any = None) -> tuple[int, bytes]:
    """Send one request; returns (status, body). Waits as long as it takes for the engine to accept.

    Raises OSError if the engine is gone or closes without an answer.
    """
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {target} HTTP/1.0\r\nHost: engine\r\nContent-Length: {len(data)}\r\n"
    if data:
        head += "Content-Type: application/json\r\n"
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(head.encode() + b"\r\n" + data)
        await writer.drain()
        answer = await reader.read()
    finally:
        writer.close()
    status_line, _, rest = answer.partition(b"\r\n")
    fields = status_line.split(b" ", 2)
    if len(fields) < 2 or not fields[1].isdigit():
        raise ConnectionResetError(f"the engine closed the connection before it answered {target}")
    return int(fields[1]), rest.partition(b"\r\n\r\n")[2]
