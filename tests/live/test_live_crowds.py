"""A crowd before a dark model."""

from __future__ import annotations

import asyncio
import collections

import aiohttp
import pytest

from deployments.local.processes import memory_bytes
from tests.live.lab import Relight, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CROWD = 1000


async def crowd(relight: Relight) -> collections.Counter[int]:
    """Statuses of `CROWD` requests at once."""
    body = {"model": "chat", "prompt": "One", "max_tokens": 1, "temperature": 0}
    url = f"http://127.0.0.1:{relight.port}/v1/completions"

    async def one(session: aiohttp.ClientSession) -> int:
        async with session.post(url, json=body) as response:
            document = await response.json()
            if response.status == 200:
                assert document["choices"][0]["text"]
            else:
                assert document["error"]["code"] == "queue_full", document
                assert int(response.headers["retry-after"]) >= 1
            return response.status

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(200)) as session:
        return collections.Counter(await asyncio.gather(*(one(session) for _ in range(CROWD))))


def test_a_thousand_at_once_before_a_dark_model(relight: Relight) -> None:
    """With room for 100 in the queue, each is answered or told to come back; a second crowd takes no more memory."""
    gateway = relight.process("ray::ServeReplica:default:gateway")
    taken_bytes = []
    for _ in range(2):
        relight.dark("chat")
        statuses = asyncio.run(crowd(relight))
        assert sum(statuses.values()) == CROWD
        assert statuses.keys() == {200, 429}
        assert statuses[200] >= 100
        # Who has the last byte may be quicker than who counts it.
        until(
            "nothing to be left", lambda: not any(relight.model("chat")[k] for k in ("queued", "in_flight"))
        )
        taken_bytes.append(memory_bytes([gateway]))
    assert taken_bytes[1] - taken_bytes[0] < 50 * 2**20
    assert taken_bytes[1] < 400 * 2**20
    relight.dark("chat")
