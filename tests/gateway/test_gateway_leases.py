"""Leases through a Serve handle that is scripted, to an engine that is real enough."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentID, RequestMetadata
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentResponseGenerator

from deployments.engine.client import HostConnection
from deployments.engine.protocol import EngineInfo, EngineSpec
from deployments.engine.relay import Tunnel
from deployments.errors import (
    ControllerUnavailable,
    EngineInterrupted,
    EngineStartFailed,
    EngineUnreachable,
)
from deployments.fleet import parse_fleet
from deployments.gateway import leases as leases_module
from deployments.gateway import reports as reports_module
from deployments.gateway.app import build_gateway
from deployments.gateway.leases import EarlyLease, ServeEngines, ServeLease
from deployments.gateway.observe import NullTelemetry, SystemClock
from deployments.gateway.traffic import TrafficCounter
from tests.fakes.engines import FakeEngine

HERE, ELSEWHERE = "node-1", "node-2"
SPEC = EngineSpec("tiny", ("tiny",), "/models/tiny")


@dataclass(frozen=True)
class Place:
    """Where the gateway of the test is."""

    run_dir: Path
    node_id: str = HERE
    raylet_pid: int = 1


class Call:
    """One call of the replica's `lease`: yields what is scripted, then stays open until it is over."""

    def __init__(self, answer: Callable[[str], Any] | None, lease_id: str) -> None:
        self.lease_id = lease_id
        self.was_cancelled = False
        self.was_cancelled_late = False
        """When what it yields was on its way: that arrives all the same."""
        self.over = asyncio.Event()
        self.failure: Exception = StopAsyncIteration()  # how it ends
        self.ready = asyncio.Event()
        self.answer = answer
        self._told = False
        if answer is not None:
            self.ready.set()

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        if self._told:
            await self.over.wait()
            raise self.failure
        await self.ready.wait()
        if self.was_cancelled and not self.was_cancelled_late:
            raise RequestCancelledError("r1")
        self._told = True
        assert self.answer is not None
        result = self.answer(self.lease_id)
        if isinstance(result, BaseException):
            raise result
        return result

    def cancel(self) -> None:
        self.was_cancelled = True
        if not self.was_cancelled_late:
            self.ready.set()

    def cancelled(self) -> bool:
        return self.was_cancelled


class Handle:
    """A Serve handle. `answers` are taken one a call; the last one stays."""

    def __init__(self) -> None:
        self.answers: list[Callable[[str], Any] | None] = []
        self.calls: list[Call] = []
        self.lease = self

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, lease_id: str) -> Call:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.calls.append(Call(answer, lease_id))
        return self.calls[-1]


class Controller:
    """Takes reports, and says which models have no room."""

    def __init__(self) -> None:
        self.no_room: dict[str, str] | None = {}
        self.holds_s = 3600.0
        self.failure: Exception | None = None
        self.report = self.snapshot = self

    async def _take(self) -> dict[str, Any]:
        if self.failure is not None:
            raise self.failure
        return {
            "taken": True,
            "sequence": 0,
            "node_waits": {},
            "no_room": self.no_room,
            "no_room_s": self.holds_s,
        }

    def remote(self, *_: Any) -> Any:
        return self._take()


class Clock(SystemClock):
    """The machine's, of which the wall clock may be set."""

    set_by_s = 0.0

    def time_s(self) -> float:
        return super().time_s() + self.set_by_s


class World:
    """One model, its replica's lease socket, its engine, and the gateway's view of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = FakeEngine("e1", folder / "e1.http")
        self.handle = Handle()
        self.told: list[dict[str, Any]] = []
        self.told_more = asyncio.Event()
        self.connections: list[asyncio.StreamWriter] = []
        self.tunnel = Tunnel(self._replica)
        self.address = ("", 0)
        self.early = False
        self.controller = Controller()
        self.clock = Clock()
        self.engines = ServeEngines(
            {"tiny": SPEC},
            {"tiny": self.handle},
            self.controller,
            Place(folder),
            {},
            early_wake=lambda _: self.early,
            max_ongoing={"tiny": 2},
            counts=dict,
            traffic=TrafficCounter(["tiny"], self.clock),
            clock=self.clock,
        )

    async def _replica(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        async for line in reader:
            self.told.append(json.loads(line))
            for call in self.handle.calls:
                if self.told[-1]["op"] == "release" and call.lease_id == self.told[-1]["lease"]:
                    call.over.set()
            self.told_more.set()

    def info(self, **changes: Any) -> EngineInfo:
        """The engine as its host tells of it."""
        values = {"engine_id": "e1", "model": "tiny", "fingerprint": SPEC.fingerprint, "kind": "forked"}
        values |= {"state": "ready", "http": self.engine.uds, "control": "", "ready_s": 1.0, **changes}
        return EngineInfo(**values)

    def grant(self, node: str = HERE, replica: str = "r1", **changes: Any) -> Callable[[str], Any]:
        """The replica's answer."""
        return lambda _: {
            "engine": self.info(held=True, **changes).to_json(),
            "replica": replica,
            "node": node,
            "lease_socket": str(self.folder / "leases.sock"),
            "tunnel": {"address": self.address, "token": self.tunnel.token},
            "process_s": 0.0,
            "init_s": 0.0,
            "asked_s": 0.0,
        }

    def host_tells(self, info: EngineInfo) -> None:
        """An event of this node's engine host."""
        self.engines._take_event({"event": "engine", "engine": info.to_json()})

    async def heard(self, operation: str) -> dict[str, Any]:
        """The first message of that kind to the replica."""
        while True:
            self.told_more.clear()
            for message in self.told:
                if message["op"] == operation:
                    return message
            await asyncio.wait_for(self.told_more.wait(), 20)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as name:
        world = World(Path(name))
        server = await asyncio.start_unix_server(world._replica, world.folder / "leases.sock")
        world.address = await world.tunnel.listen("127.0.0.1")
        async with world.engine.running():
            yield world
            for call in world.handle.calls:
                call.over.set()
            for transport in world.engines._transports.values():
                await transport.close()
            for engine_id in list(world.engines._tunnels):
                world.engines._forget(world.info(engine_id=engine_id))
        server.close()
        world.tunnel.close()


async def until(look: Callable[[], object]) -> None:
    """Let the loop's other tasks run until it is so."""
    while not look():  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0.001)


async def given_back(world: World, call: Any) -> None:
    """Once Serve grants what the call asked for, its lease is released."""
    call.answer = world.grant()
    call.ready.set()
    assert (await world.heard("release"))["lease"] == call.lease_id


async def served(lease: ServeLease | EarlyLease) -> int:
    """The status of a request under this lease."""
    body = json.dumps({"model": "tiny", "prompt": "x"}).encode()
    headers = [(b"content-type", b"application/json")]
    response = await lease.request("POST", "/v1/completions", headers, body)
    async for _ in response.chunks():
        pass
    await response.close()
    return response.status


async def test_a_lease_is_taken_used_and_given_back(world: World) -> None:
    """The replica hears of both, and Serve's call ends."""
    world.handle.answers = [world.grant()]
    lease = await world.engines.acquire("tiny")
    assert await served(lease) == 200
    assert (await world.heard("take"))["lease"] == world.handle.calls[0].lease_id
    assert world.engines.state("tiny") == "ready"
    await lease.release(engine_failed=True)
    await lease.release()
    released = await world.heard("release")
    assert (released["engine_id"], released["engine_failed"]) == ("e1", True)
    assert [m["op"] for m in world.told] == ["take", "release"]


@pytest.mark.parametrize("asked", [False, True])
async def test_a_lease_that_is_lost_is_no_failure_of_its_engine(world: World, asked: bool) -> None:
    """It was taken too late, by a gateway that was busy: another is asked for, if nothing was answered yet."""
    world.handle.answers = [world.grant()]
    world.engine.script.gate = asyncio.Event()
    lease = await world.engines.acquire("tiny")
    taken = await world.heard("take")
    if asked:
        asking = asyncio.create_task(served(lease))
        await world.engine.until(lambda: len(world.engine.seen) == 1)
    world.connections[0].write(json.dumps({"op": "lost", "lease": taken["lease"]}).encode() + b"\n")
    if not asked:
        await until(lambda: lease._lost)  # type: ignore[union-attr]
        asking = asyncio.create_task(served(lease))
    with pytest.raises(EngineUnreachable, match="given the lease up"):
        await asking
    await lease.release(engine_failed=True)
    assert not (await world.heard("release"))["engine_failed"]
    assert not world.engines._lent
    world.engine.script.gate.set()
    lease = await world.engines.acquire("tiny")
    assert await served(lease) == 200
    await lease.release()


async def test_a_lease_that_is_lost_while_it_is_answered_is_answered(world: World) -> None:
    """The client would see it break off."""
    world.handle.answers = [world.grant()]
    gate = asyncio.Event()
    world.engine.script.gate_after_chunks = (1, gate)
    lease = await world.engines.acquire("tiny")
    body = json.dumps({"model": "tiny", "prompt": "x", "stream": True}).encode()
    response = await lease.request("POST", "/v1/completions", [], body)
    chunks = response.chunks()
    await anext(chunks)
    taken = await world.heard("take")
    world.connections[0].write(json.dumps({"op": "lost", "lease": taken["lease"]}).encode() + b"\n")
    await until(lambda: lease._lost)  # type: ignore[union-attr]
    gate.set()
    assert b"[DONE]" in [chunk async for chunk in chunks][-1]
    await lease.release()


async def test_a_failed_start_is_raised_and_remembered_until_one_succeeds(world: World) -> None:
    """With the engine's own reason."""
    world.handle.answers = [lambda _: {"failed": "torn"}, world.grant()]
    with pytest.raises(EngineStartFailed, match="torn"):
        await world.engines.acquire("tiny")
    assert world.engines.state("tiny") == "failed"
    await (await world.engines.acquire("tiny")).release()
    assert world.engines.state("tiny") == "ready"


async def test_replicas_that_die_before_they_grant_are_waited_through(world: World) -> None:
    """The caller notices nothing."""
    world.handle.answers = [lambda _: RayActorError(), lambda _: StopAsyncIteration(), world.grant()]
    lease = await world.engines.acquire("tiny")
    assert await served(lease) == 200
    assert len(world.handle.calls) == 3


async def test_a_deployment_that_serve_gave_up_is_a_failed_start(world: World) -> None:
    """Waiting for it would be in vain."""
    world.handle.answers = [lambda _: DeploymentUnavailableError(DeploymentID("model-tiny", "default"))]
    with pytest.raises(EngineStartFailed, match="given tiny up"):
        await world.engines.acquire("tiny")


class NoController:
    """A handle of a controller that is not there."""

    def __init__(self, failure: Exception) -> None:
        self.failure = failure
        self.report = self.snapshot = self.control = self

    async def _raise(self) -> Any:
        raise self.failure

    def remote(self, *_: Any) -> Any:
        return self._raise()


@pytest.mark.parametrize(
    "failure", [RayActorError(), DeploymentUnavailableError(DeploymentID("controller", "default"))]
)
async def test_without_a_controller_its_api_is_unavailable(
    world: World, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """However Ray or Serve says it."""
    monkeypatch.setattr(world.engines, "_controller", NoController(failure))
    monkeypatch.setattr(world.engines.reports, "_controller", NoController(failure))
    with pytest.raises(ControllerUnavailable):
        await world.engines.status()
    with pytest.raises(ControllerUnavailable):
        await world.engines.control("GET", "/relight/v1/policies", {}, b"", None)


async def test_who_leaves_while_it_waits_cancels_the_call(world: World) -> None:
    """So that Serve does not start a replica for nobody."""
    world.handle.answers = [None]
    waiting = asyncio.create_task(world.engines.acquire("tiny"))
    await until(lambda: world.handle.calls)
    assert world.engines.progress("tiny") is not None
    assert world.engines.state("tiny") == "lighting"
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await until(lambda: world.handle.calls[0].was_cancelled)
    assert world.engines.progress("tiny") is None


@pytest.fixture
async def reporting(world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """It reports all the time."""
    monkeypatch.setattr(reports_module, "REPORT_SOONEST_S", 0.001)
    monkeypatch.setattr(reports_module, "REPORT_EVERY_S", 0.002)
    task = asyncio.create_task(world.engines.reports.run())
    yield world
    task.cancel()


async def test_who_finds_no_room_in_the_budget_waits_for_it_here(reporting: World) -> None:
    """A call that waits at Serve's handle would have a replica started, whatever the plan says."""
    world = reporting
    world.handle.answers = [world.grant()]
    world.controller.no_room = {"tiny": "others hold the GPUs"}
    await world.engines.reports.send()
    waiting = asyncio.create_task(world.engines.acquire("tiny"))
    await until(lambda: world.engines.progress("tiny") is not None)
    for _ in range(3):
        await world.engines.reports.send()
    progress = world.engines.progress("tiny")
    assert progress is not None
    assert (progress.phase, progress.detail) == ("gpu_budget", "others hold the GPUs")
    assert not world.handle.calls
    world.controller.no_room = {}
    assert await served(await asyncio.wait_for(waiting, 20)) == 200


async def test_waiting_for_room_is_no_part_of_the_start(reporting: World) -> None:
    """It would count as how long the model's starts take."""
    world = reporting
    world.handle.answers = [
        lambda call: {
            **world.grant(requested_s=time.time() + 2, ready_s=time.time() + 3)(call),
            "process_s": time.time() + 1,
            "init_s": time.time() + 2,
        }
    ]
    world.controller.no_room = {"tiny": "others hold the GPUs"}
    await world.engines.reports.send()
    waiting = asyncio.create_task(world.engines.acquire("tiny"))
    await until(lambda: world.engines.progress("tiny") is not None)
    await asyncio.sleep(0.3)
    room_s = time.time()
    world.controller.no_room = {}
    assert await served(await asyncio.wait_for(waiting, 20)) == 200
    start = world.engines.starts.last("tiny")  # told by now, or not
    assert start is not None
    assert [phase["name"] for phase in start["phases"]][:2] == ["schedule", "replica"]
    assert start["begun_s"] >= room_s
    assert not start["prewarmed"]


async def test_who_waits_at_serve_is_called_back_when_there_is_no_room_any_more(reporting: World) -> None:
    """And asks again once there is."""
    world = reporting
    world.handle.answers = [None, world.grant()]
    waiting = asyncio.create_task(world.engines.acquire("tiny"))
    await until(lambda: world.handle.calls)
    world.controller.no_room = {"tiny": "others hold the GPUs"}
    await until(lambda: world.handle.calls[0].was_cancelled)
    for _ in range(3):
        await world.engines.reports.send()
    assert len(world.handle.calls) == 1
    assert not waiting.done()
    world.controller.no_room = {}
    assert await served(await asyncio.wait_for(waiting, 20)) == 200


async def test_who_asks_finds_room_that_came_since_the_last_report(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for the next one."""
    monkeypatch.setattr(reports_module, "REPORT_EVERY_S", 3600.0)
    world.handle.answers = [world.grant()]
    world.controller.no_room = {"tiny": "others hold the GPUs"}
    task = asyncio.create_task(world.engines.reports.run())
    await until(lambda: world.engines.reports.no_room)
    world.controller.no_room = {}
    await asyncio.wait_for(world.engines.acquire("tiny"), 20)
    task.cancel()


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "does not decide"])
@pytest.mark.parametrize("holds_s", [3600.0, 0.0], ids=["plan holds", "plan is over"])
async def test_without_news_there_is_room_once_the_last_plan_is_over(
    reporting: World, holds_s: float, gone: bool
) -> None:
    """A controller that starts, ends or misses a report has not said so; one that is gone can't forbid it for ever."""
    world = reporting
    world.handle.answers = [world.grant()]
    world.controller.no_room, world.controller.holds_s = {"tiny": "others hold the GPUs"}, holds_s
    await world.engines.reports.send()
    waiting = asyncio.create_task(world.engines.acquire("tiny"))
    await until(lambda: world.engines.progress("tiny") is not None)
    world.controller.no_room = None
    world.controller.failure = RayActorError() if gone else None
    for _ in range(3):
        await world.engines.reports.send()
    if holds_s:
        assert not world.handle.calls
        world.controller.no_room, world.controller.failure = {}, None
    await asyncio.wait_for(waiting, 20)


class ServesCall(DeploymentResponseGenerator):
    """Serve's own; nothing is scripted but what its router finds."""

    def __init__(self, found: concurrent.futures.Future[Any]) -> None:
        super().__init__(found, RequestMetadata(request_id="r", internal_request_id="i"))


@pytest.mark.parametrize("turns", range(-3, 4))
async def test_who_leaves_while_the_call_is_withdrawn_leaves_nothing(world: World, turns: int) -> None:
    """However many turns of the loop lie between: Serve says the same of both."""
    found: concurrent.futures.Future[Any] = concurrent.futures.Future()
    asked: list[ServesCall] = []

    def remote(_: str) -> ServesCall:
        asked.append(ServesCall(found))
        return asked[-1]

    world.handle.remote = remote  # type: ignore[assignment]
    waiting = asyncio.create_task(world.engines.acquire("tiny"))
    await until(lambda: world.engines._asking["tiny"])
    world.engines.reports.no_room = {"tiny": "others hold the GPUs"}
    first, second = (waiting.cancel, lambda: world.engines.withdraw("tiny"))
    if turns > 0:
        first, second = second, first
    first()
    for _ in range(abs(turns)):
        await asyncio.sleep(0)
    second()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    for _ in range(20):
        await asyncio.sleep(0)
    world.engines.reports.no_room = {}
    await world.engines.reports.send()
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(asked) == 1
    assert not world.engines._asking["tiny"]
    assert not [task for task in world.engines._tasks if "_granted" in repr(task)]


async def test_a_grant_that_comes_after_its_call_was_withdrawn_is_not_used(world: World) -> None:
    """The replica has taken it back: what ran on it would be cut off."""
    world.handle.answers = [None, world.grant()]
    waiting = asyncio.create_task(world.engines.acquire("tiny"))
    await until(lambda: world.handle.calls)
    late = world.handle.calls[0]
    late.was_cancelled_late = True
    world.engines.withdraw("tiny")
    late.answer = world.grant()
    late.ready.set()
    assert await served(await asyncio.wait_for(waiting, 20)) == 200
    assert [message["lease"] for message in world.told if message["op"] == "take"] == [
        world.handle.calls[1].lease_id
    ]


async def test_a_model_of_another_fleet_and_a_call_that_failed_stop_no_report(world: World) -> None:
    """In a redeploy an old gateway hears of the new one's models; Serve tells of a failure where it is cancelled."""
    found: concurrent.futures.Future[Any] = concurrent.futures.Future()
    world.handle.remote = lambda _: ServesCall(found)  # type: ignore[method-assign]
    waiting = asyncio.create_task(world.engines.acquire("tiny"))
    await until(lambda: world.engines._asking["tiny"])
    found.set_exception(DeploymentUnavailableError(DeploymentID("model-tiny", "default")))
    world.controller.no_room = {"new-model": "others hold the GPUs", "tiny": "others hold the GPUs"}
    await world.engines.reports.send()
    with pytest.raises(EngineStartFailed):
        await waiting


async def test_who_leaves_while_there_is_no_room_leaves_nothing(reporting: World) -> None:
    """No call, and nobody who waits."""
    world = reporting
    world.controller.no_room = {"tiny": "others hold the GPUs"}
    await world.engines.reports.send()
    waiting = asyncio.create_task(world.engines.acquire("tiny"))
    await until(lambda: world.engines.progress("tiny") is not None)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await world.engines.reports.send()
    assert not world.handle.calls
    assert world.engines.progress("tiny") is None


async def test_a_model_that_is_busy_is_not_being_lit(world: World) -> None:
    """Though somebody waits for it."""
    world.handle.answers = [None]
    world.host_tells(world.info(held=True))
    waiting = asyncio.create_task(world.engines.acquire("tiny"))
    await until(lambda: world.handle.calls)
    assert world.engines.state("tiny") == "ready"
    assert world.engines.progress("tiny") is None
    waiting.cancel()


async def test_a_start_is_told_of_though_nobody_waits(world: World) -> None:
    """Since it was asked for, with the phase that it is in."""
    world.host_tells(
        world.info(state="starting", ready_s=None, requested_s=time.time() - 5, phases=[("fork", 0.0, 0.1)])
    )
    progress = world.engines.progress("tiny")
    assert progress is not None
    assert progress.phase == "config"
    assert progress.elapsed_s == pytest.approx(5, abs=1)


async def test_an_engine_that_was_lit_before_the_clock_was_set_back_is_no_cold_start(world: World) -> None:
    """It seems to be ready in an hour, and its replica to be started then."""
    ready_s = world.clock.time_s()
    times: dict[str, Any] = {"requested_s": ready_s - 4.0, "ready_s": ready_s}
    world.host_tells(world.info(held=True, phases=[("fork", ready_s - 4.0, 4.0)], **times))
    world.clock.set_by_s = -3600.0
    replica = {"process_s": ready_s - 6.0, "init_s": ready_s - 4.5}
    world.handle.answers = [lambda call: {**world.grant(**times)(call), **replica}]
    fleet = parse_fleet({"models": [{"id": "tiny", "source": "org/weights"}]}, "test")
    gateway = build_gateway(fleet, world.engines, NullTelemetry(), clock=world.clock)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://gateway") as client:
        answer = await client.post("/v1/chat/completions", json={"model": "tiny", "messages": []})
    assert answer.status_code == 200
    assert answer.headers["x-relight-cold-start"] == "false"
    assert world.engines.starts.untold() == []
    assert world.engines.starts.estimate_s("tiny") is None


async def test_a_wait_is_as_long_as_the_machine_was_awake(world: World) -> None:
    """Or a client is told that it has waited for hours."""
    world.handle.answers = [None]
    waiting = asyncio.create_task(world.engines.acquire("tiny"))
    await until(lambda: world.handle.calls)
    world.clock.set_by_s = 8 * 3600.0
    progress = world.engines.progress("tiny")
    assert progress is not None
    assert progress.elapsed_s < 3600
    waiting.cancel()
    await asyncio.wait({waiting})


@pytest.mark.parametrize("limit", ["start_deadline_s", "request_deadline_s"])
async def test_the_last_who_waits_is_told_what_it_waited_for(world: World, limit: str) -> None:
    """Whichever deadline it was that passed."""
    fleet = parse_fleet({"models": [{"id": "tiny", "source": "org/weights", "limits": {limit: 0.1}}]}, "test")
    gateway = build_gateway(fleet, world.engines, NullTelemetry())
    world.handle.answers = [None]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://gateway") as client:
        answer = await client.post("/v1/chat/completions", json={"model": "tiny", "messages": []})
    assert answer.status_code == 504
    assert "still being lit: phase schedule" in answer.json()["error"]["message"]
    assert answer.headers["x-relight-state"] == "lighting"
    assert world.handle.calls[0].was_cancelled


async def test_an_engine_that_is_ready_before_its_replica_is_used_at_once(world: World) -> None:
    """Serve's own lease follows, and is given back then."""
    world.early = True
    world.handle.answers = [None]
    waiting = asyncio.create_task(world.engines.acquire("tiny"))
    await until(lambda: world.handle.calls)
    world.host_tells(world.info(state="starting"))
    assert not waiting.done()
    world.host_tells(world.info())
    lease = await waiting
    assert isinstance(lease, EarlyLease)
    assert await served(lease) == 200
    await lease.release()
    (call,) = world.handle.calls
    assert not call.was_cancelled
    await given_back(world, call)


async def test_early_leases_are_as_many_as_a_replica_takes(world: World) -> None:
    """Whoever is left waits until one is given back."""
    world.early = True
    world.handle.answers = [None]
    world.host_tells(world.info())
    held = [await world.engines.acquire("tiny") for _ in range(2)]
    waiting = [asyncio.create_task(world.engines.acquire("tiny")) for _ in range(3)]
    await until(lambda: len(world.handle.calls) == 5)
    assert not any(task.done() for task in waiting)
    await held[0].release()
    await held[0].release()
    assert isinstance(await waiting[0], EarlyLease)
    waiting[1].cancel()
    await held[1].release()
    assert isinstance(await waiting[2], EarlyLease)
    for task in waiting[0], waiting[2]:
        await task.result().release()
    assert not world.engines._early_leases


async def test_one_call_of_serve_stays_open_for_early_leases_that_are_over(world: World) -> None:
    """It is the demand that brings up the replica, and the others would ask for more."""
    world.early = True
    world.handle.answers = [None]
    world.host_tells(world.info())
    for _ in range(10):
        lease = await world.engines.acquire("tiny")
        assert await served(lease) == 200
        await lease.release()
    await until(lambda: sum(call.was_cancelled for call in world.handle.calls) == 9)
    (call,) = (call for call in world.handle.calls if not call.was_cancelled)
    await given_back(world, call)


@pytest.mark.parametrize("seen", [True, False])
async def test_nothing_asks_for_a_replica_when_the_early_engine_has_ended(world: World, seen: bool) -> None:
    """Where there is no room for one it would wait for ever, for nobody."""
    world.early = True
    world.handle.answers = [None]
    world.host_tells(world.info())
    lease = await world.engines.acquire("tiny")
    await until(lambda: world.handle.calls)
    (call,) = world.handle.calls
    await lease.release()
    world.host_tells(world.info(engine_id="e2"))  # another that the replica could take over
    world.host_tells(world.info(state="dead"))
    assert not world.engines._demand["tiny"].cancelling()
    if seen:
        world.host_tells(world.info(engine_id="e2", state="dead"))
    else:
        world.engines._local.clear()  # its host ended, too
        world.engines._take_event({"event": "status", "engines": [], "models": []})
        world.engines._forget_what_ended_unseen()
    assert world.engines._demand["tiny"].cancelling()
    await until(lambda: call.was_cancelled)
    await until(lambda: not world.engines._tasks)


async def test_who_leaves_while_an_engine_starts_leaves_no_task(world: World) -> None:
    """However many come and go."""
    world.early = True
    world.handle.answers = [None]
    before = asyncio.all_tasks()
    for count in range(1, 4):
        waiting = asyncio.create_task(world.engines.acquire("tiny"))
        await until(lambda count=count: len(world.handle.calls) == count)  # type: ignore[misc]
        waiting.cancel()
        await asyncio.wait({waiting})
    await until(lambda: asyncio.all_tasks() == before)


async def test_a_request_that_fails_before_it_waits_asks_serve_for_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease that came later would be nobody's, and would keep its replica for ever."""
    monkeypatch.setattr(world.engines, "_early_wake", lambda _: 1 / 0)
    world.handle.answers = [None]
    with pytest.raises(ZeroDivisionError):
        await world.engines.acquire("tiny")
    assert not world.engines._tasks
    assert not world.handle.calls


@pytest.mark.parametrize("closing", [True, False], ids=["seen", "unseen"])
async def test_a_host_that_has_just_gone_fails_no_request(world: World, closing: bool) -> None:
    """Its successor is asked by the replica. uvloop raises a RuntimeError on a connection that has just ended."""

    def write(_: bytes) -> None:
        raise RuntimeError("unable to perform operation; the handler is closed")

    world.early = True
    gone = SimpleNamespace(is_closing=lambda: closing, write=write, close=lambda: None)
    world.engines._host = HostConnection(asyncio.StreamReader(), gone)  # type: ignore[arg-type]
    world.handle.answers = [world.grant(HERE)]
    lease = await world.engines.acquire("tiny")
    assert await served(lease) == 200
    await lease.release()
    with pytest.raises(ConnectionError):
        world.engines._host.send({})
    world.engines._host = None


async def test_an_engine_elsewhere_is_reached_through_the_tunnel_and_forgotten_with_its_replica(
    world: World,
) -> None:
    """No host tells of its end: the replica's connection does."""
    world.tunnel.target = world.engine.uds
    world.handle.answers = [world.grant(ELSEWHERE, http="/nowhere")]
    lease = await world.engines.acquire("tiny")
    assert await served(lease) == 200
    await lease.release()
    await world.heard("release")
    assert world.engines.state("tiny") == "ready"
    for connection in world.connections:
        connection.close()
    await until(lambda: world.engines.state("tiny") == "dark")
    assert not world.engines._tunnels


@pytest.mark.parametrize("node", [HERE, ELSEWHERE])
async def test_a_stream_ends_with_a_replica_whose_node_vanished(world: World, node: str) -> None:
    """Its connections stay open, and Ray says that it is gone; an engine of this node ends them itself."""
    world.tunnel.target = world.engine.uds
    gate = asyncio.Event()
    world.engine.script.gate_after_chunks = (1, gate)
    world.handle.answers = [world.grant(node)]
    lease = await world.engines.acquire("tiny")
    body = json.dumps({"model": "tiny", "prompt": "x", "stream": True}).encode()
    response = await lease.request("POST", "/v1/completions", [], body)
    chunks = response.chunks()
    await anext(chunks)
    (call,) = world.handle.calls
    call.failure = RayActorError()
    call.over.set()
    if node == ELSEWHERE:
        with pytest.raises(EngineInterrupted):
            await anext(chunks)
        assert world.engines.state("tiny") == "dark"
        gate.set()
    else:
        await asyncio.sleep(0.01)
        gate.set()
        assert b"[DONE]" in [chunk async for chunk in chunks][-1]
    await lease.release()


async def test_a_request_to_a_node_that_vanished_may_be_tried_elsewhere(world: World) -> None:
    """As long as nothing has come."""
    world.tunnel.target = world.engine.uds
    world.engine.script.gate = asyncio.Event()
    world.handle.answers = [world.grant(ELSEWHERE)]
    lease = await world.engines.acquire("tiny")
    asking = asyncio.create_task(served(lease))
    await world.engine.until(lambda: len(world.engine.seen) == 1)
    (call,) = world.handle.calls
    call.failure = RayActorError()
    call.over.set()
    with pytest.raises(EngineUnreachable):
        await asking
    await lease.release(engine_failed=True)


async def test_an_engine_that_stays_out_of_reach_is_asked_ever_less_often(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request has few attempts, and its replica may go on granting for some seconds."""
    now_s = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now_s[0], time=time.time)
    monkeypatch.setattr(leases_module, "time", clock)
    uds = world.engine.uds
    spared_s = []

    async def fails() -> None:
        world.handle.answers = [world.grant(http=f"{uds}.gone")]
        lease = await world.engines.acquire("tiny")
        others = await world.engines.acquire("tiny")
        for one in (lease, others):  # who asks at the same time learns nothing new
            with pytest.raises(EngineUnreachable):
                await served(one)
            await one.release(engine_failed=True)

    for _ in range(5):
        began_s = now_s[0]
        await fails()
        while world.engines._is_suspect("e1"):
            now_s[0] += 0.25
        spared_s.append(now_s[0] - began_s)
    assert spared_s == [1.0, 2.0, 4.0, 8.0, 8.0]
    await world.engines._transports.pop("e1").close()
    world.handle.answers = [world.grant()]
    lease = await world.engines.acquire("tiny")
    assert await served(lease) == 200
    await lease.release()
    await world.engines._transports.pop("e1").close()
    await fails()
    now_s[0] += 1.0
    assert not world.engines._is_suspect("e1")


async def test_a_model_is_ready_while_one_of_its_replicas_elsewhere_serves(world: World) -> None:
    """Also where the one that answered last has gone."""
    world.tunnel.target = world.engine.uds
    world.handle.answers = [world.grant(ELSEWHERE), world.grant(ELSEWHERE, "r2", engine_id="e2")]
    for _ in range(2):
        await (await world.engines.acquire("tiny")).release()
    await until(lambda: len(world.connections) == 2)
    world.connections[1].close()
    await until(lambda: "r2" not in world.engines._remote)
    assert world.engines.state("tiny") == "ready"
    assert world.engines.model_view("tiny")["seen_ready"]
    world.connections[0].close()
    await until(lambda: not world.engines._remote)
    assert world.engines.state("tiny") == "dark"
    assert not world.engines.model_view("tiny")["seen_ready"]


async def test_the_metrics_are_those_of_every_engine_that_is_known(world: World) -> None:
    """Here and elsewhere, each once."""
    world.tunnel.target = world.engine.uds
    world.engine.script.answer = (200, b"text/plain", b"vllm:num_requests_running 1.0\n")
    world.host_tells(world.info(engine_id="e0"))
    world.handle.answers = [
        world.grant(engine_id="e0"),
        world.grant(ELSEWHERE, "r2", engine_id="e2"),
        world.grant(ELSEWHERE, "r3", engine_id="e2"),
    ]
    for _ in range(3):
        await (await world.engines.acquire("tiny")).release()
    assert await world.engines.engine_metrics() == [("tiny", "vllm:num_requests_running 1.0\n")] * 2


def listening(folder: Path) -> int:
    """Sockets below this folder that take connections."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sum(str(folder) in line and line.split()[3] == "00010000" for line in lines)


@pytest.mark.parametrize("node", [HERE, ELSEWHERE])
async def test_a_crowd_shares_one_channel_and_one_tunnel_which_go_with_the_replica(
    world: World, node: str
) -> None:
    """Neither a connection, nor a listening socket, nor its file stays."""
    world.tunnel.target = world.engine.uds
    world.handle.answers = [world.grant(node)]
    leases = await asyncio.gather(*(world.engines.acquire("tiny") for _ in range(32)))
    assert [await served(lease) for lease in leases] == [200] * 32
    for lease in leases:
        await lease.release()
    await until(lambda: sum(m["op"] == "release" for m in world.told) == 32)
    assert len(world.connections) == 1
    assert listening(world.folder / "gateways") == (node == ELSEWHERE)
    world.connections[0].close()
    await until(lambda: not world.engines._lease_channels)
    await until(lambda: not listening(world.folder / "gateways"))
    assert not list(world.folder.glob("gateways/*"))


async def test_a_replica_that_goes_while_its_channel_opens_leaves_nothing(world: World) -> None:
    """The request is tried elsewhere."""
    world.tunnel.target = world.engine.uds
    world.handle.answers = [world.grant(ELSEWHERE)]
    world.tunnel.close()
    with pytest.raises(EngineUnreachable):
        await world.engines.acquire("tiny")
    assert world.engines.state("tiny") == "dark"
    assert not world.engines._remote
    assert not world.engines._tunnels
    assert not world.engines._opening


async def test_sockets_of_dead_gateways_are_removed_at_the_start(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of living ones stay, and those that may not listen yet."""
    folder = world.folder / "gateways"
    folder.mkdir()
    old = time.time() - 60
    with (
        socket.socket(socket.AF_UNIX) as dead,
        socket.socket(socket.AF_UNIX) as living,
        socket.socket(socket.AF_UNIX) as new,
    ):
        for name, one in {"dead": dead, "living": living, "new": new}.items():
            one.bind(str(folder / f"{name}.sock"))
            if name != "new":
                os.utime(folder / f"{name}.sock", (old, old))
        living.listen()
        monkeypatch.setattr(world.engines, "_spawn", lambda work: work.close())
        world.engines.start()
    assert {path.stem for path in folder.iterdir()} == {"living", "new"}


@pytest.mark.parametrize(
    ("state", "told"), [("parked", "parked"), ("draining", "draining"), ("dead", "dark")]
)
async def test_an_engine_that_no_longer_serves_is_not_told_as_ready(
    world: World, state: str, told: str
) -> None:
    """Once its host has said so."""
    world.handle.answers = [world.grant()]
    await (await world.engines.acquire("tiny")).release()
    assert world.engines.state("tiny") == "ready"
    world.host_tells(world.info(state=state))
    assert world.engines.state("tiny") == told


async def test_an_engine_that_ended_before_it_was_granted_is_not_lent(world: World) -> None:
    """Its model would be told as ready, as nobody tells of the end again; who waits waits for the next one."""
    world.handle.answers = [None]
    world.host_tells(world.info(held=True))
    waiting = asyncio.create_task(world.engines.acquire("tiny"))
    await until(lambda: world.handle.calls)
    (granted,) = world.handle.calls
    world.host_tells(world.info(state="dead", held=True))
    granted.was_cancelled_late = True
    granted.answer = world.grant()
    granted.ready.set()
    await until(lambda: granted.was_cancelled or waiting.done())
    assert not waiting.done()
    granted.over.set()
    await until(lambda: len(world.handle.calls) == 2)
    assert world.engines.state("tiny") == "lighting"
    assert world.engines.progress("tiny") is not None
    assert not world.engines._transports
    world.handle.calls[1].answer = world.grant(engine_id="e2")
    world.handle.calls[1].ready.set()
    lease = await waiting
    assert await served(lease) == 200
    await lease.release()


async def test_engines_that_ended_while_their_host_was_down_are_forgotten(world: World) -> None:
    """Its successor's first word does not name them."""
    world.handle.answers = [world.grant()]
    await (await world.engines.acquire("tiny")).release()
    world.engines._take_event({"event": "status", "engines": [], "models": []})
    world.engines._forget_what_ended_unseen()
    assert world.engines.state("tiny") == "dark"
