"""Every process of the path is killed under load: no accepted request is lost before its first byte."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.live.lab import Relight, kill, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CLIENTS = 4
VICTIMS = {
    "engine": "relight-engine chat ",
    "node template": "-m deployments.engine.template",
    "model template": "relight-model-template chat",
    "engine host": "relight-host",
    "model replica": "ray::ServeReplica:default:model-chat",
    "gateway": "ray::ServeReplica:default:gateway",
}
# Where the client's own connection ends: nobody can answer for a process that was killed with it.
FRONT = ("gateway",)


@dataclass(frozen=True)
class Outcome:
    """How one request ended: `whole`, `error` (it was told), `broken` (after the first byte) or `lost` (before)."""

    kind: str
    begun_s: float
    detail: str = ""


class Load:
    """Clients that ask, one request after the other, until they are told to stop."""

    def __init__(self, relight: Relight, clients: int = CLIENTS) -> None:
        self.relight = relight
        self.outcomes: list[Outcome] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(n,)) for n in range(clients)]

    def _client(self, number: int) -> None:
        while not self._stop.is_set():
            self.outcomes.append(self._one(stream=bool(number % 2)))

    def _one(self, *, stream: bool) -> Outcome:
        begun_s = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.relight.port, timeout=150)
        body = {
            "model": "chat",
            "prompt": "Once upon",
            "max_tokens": 12,
            "ignore_eos": True,
            "stream": stream,
        }
        response = None
        data = b""
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
            )
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            return Outcome("broken" if response else "lost", begun_s, f"{error!r} {data[-300:]!r}")
        finally:
            connection.close()
        if response.status != 200:
            return Outcome("error", begun_s, f"{response.status} {data[:500]!r}")
        if stream and not data.endswith(b"data: [DONE]\n\n"):
            told = b'"error"' in data.rstrip().rpartition(b"\n\n")[2]
            return Outcome("error" if told else "broken", begun_s, repr(data[-500:]))
        return Outcome("whole", begun_s)

    def whole_since(self, since_s: float) -> int:
        """Answers to requests that began since then."""
        return sum(o.kind == "whole" and o.begun_s >= since_s for o in list(self.outcomes))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Clients ask while the block runs; after it every request has ended."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()


@pytest.mark.parametrize("victim", VICTIMS)
def test_nothing_is_lost_when_it_is_killed(relight: Relight, victim: str) -> None:
    """Each request gets an answer or an honest error, service goes on, and what was killed comes back."""
    relight.templates_ready("chat")
    load = Load(relight)
    with load.running():
        until("the load to be served", lambda: load.whole_since(0) >= CLIENTS, patience_s=120)
        process = relight.process(VICTIMS[victim])
        kill(process)
        killed_s = time.monotonic()
        until(
            f"requests after the death of the {victim} to be served",
            lambda: load.whole_since(killed_s) >= 2 * CLIENTS,
            patience_s=120,
        )
    bad = [
        o for o in load.outcomes if o.kind in ("lost", "broken") or (o.kind == "error" and victim != "engine")
    ]
    if victim in FRONT:
        bad = [o for o in bad if o.begun_s > killed_s + 60]
    assert not bad, bad
    errors = [o for o in load.outcomes if o.kind == "error"]
    assert len(errors) <= 3 * CLIENTS, errors

    back = relight.process(VICTIMS[victim]) if victim != "engine" else None
    assert back is None or back.pid != process.pid
    relight.dark("chat")
    relight.templates_ready("chat", "embed")
