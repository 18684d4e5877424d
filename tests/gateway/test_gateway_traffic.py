"""What the gateway counts and tells: exact, sent until acknowledged, never twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, cast

import pytest
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.app import LateGateway
from deployments.engine.protocol import EngineInfo
from deployments.gateway import reports as reports_module
from deployments.gateway import starts as starts_module
from deployments.gateway import traffic as traffic_module
from deployments.gateway.engines import ColdStart, Phase
from deployments.gateway.reports import Reports
from deployments.gateway.scrape import engine_counters
from deployments.gateway.starts import StartLog
from deployments.gateway.traffic import Row, TrafficCounter, read_usage
from tests.fakes.engines import Watched, vllm_answer
from tests.gateway.lab import make_lab

START_S = 1_700_000_000.0


class HandClock:
    """Goes on when it is told to; `set_s` sets the wall clock alone, as a person would."""

    def __init__(self) -> None:
        self.wall_s = START_S
        self.steady_s = 5.0

    def time_s(self) -> float:
        return self.wall_s

    def monotonic_s(self) -> float:
        return self.steady_s

    def go(self, seconds: float) -> None:
        self.wall_s += seconds
        self.steady_s += seconds


def rows_of(counter: TrafficCounter) -> list[Row]:
    """Every row that waits to be acknowledged."""
    return [row for _, rows in counter.batches() for row in rows]


def test_requests_and_request_seconds_are_counted_by_second() -> None:
    """One request that waits 0.5 s and runs 1.25 s over two seconds' ends."""
    clock = HandClock()
    counter = TrafficCounter(["m"], clock)
    clock.go(0.25)
    counter.arrived("m")
    counter.queue("m", 1, 0)
    clock.go(0.5)
    counter.queue("m", 0, 1)
    clock.go(1.25)
    counter.answered("m", b'{"usage": {"prompt_tokens": 7, "completion_tokens": 3}}')
    counter.queue("m", 0, 0)
    assert rows_of(counter) == [
        ["m", START_S, 1, 0, 0, pytest.approx(0.25), pytest.approx(0.5)],
        ["m", START_S + 1, 0, 0, 0, pytest.approx(1.0), 0],
    ]
    clock.go(1)
    last = rows_of(counter)[-1]
    assert last[:5] == ["m", START_S + 2, 0, 7, 3]
    assert counter.activity("m") == {
        "last_arrival_s": START_S + 0.25,
        "last_busy_s": START_S + 2,
        "untold": 0,
    }


def test_what_goes_on_is_counted_without_an_event() -> None:
    """A stream of three seconds is three request-seconds though nothing begins or ends."""
    clock = HandClock()
    counter = TrafficCounter(["m"], clock)
    counter.queue("m", 0, 2)
    clock.go(3)
    assert [(r[1], r[5]) for r in rows_of(counter)] == [(START_S + n, 2.0) for n in range(3)]
    assert counter.activity("m")["last_busy_s"] == START_S + 3


def test_what_only_waits_is_counted_and_busy_too() -> None:
    """A request that is held for a dark model, before anything answers it."""
    clock = HandClock()
    counter = TrafficCounter(["m"], clock)
    counter.queue("m", 1, 0)
    clock.go(2)
    assert counter.activity("m")["last_busy_s"] == START_S + 2
    assert [(r[1], r[5], r[6]) for r in rows_of(counter)] == [(START_S + n, 0.0, 1.0) for n in range(2)]


def test_batches_are_sent_again_until_they_are_acknowledged() -> None:
    """The same number means the same rows; what came later has a later number."""
    clock = HandClock()
    counter = TrafficCounter(["m"], clock)
    counter.arrived("m")
    assert counter.batches() == []  # the present second is not over
    clock.go(1)
    first = counter.batches()
    assert [number for number, _ in first] == [1]
    counter.arrived("m")
    clock.go(1)
    assert counter.batches()[:1] == first
    assert [number for number, _ in counter.batches()] == [1, 2]
    counter.acknowledge(1)
    assert [number for number, _ in counter.batches()] == [2]
    counter.acknowledge(2)
    assert counter.batches() == []


def test_what_waits_for_the_controller_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go, and it is counted how many did."""
    monkeypatch.setattr(traffic_module, "KEPT_ROWS", 10)
    clock = HandClock()
    counter = TrafficCounter(["m"], clock)
    for _ in range(25):
        counter.arrived("m")
        clock.go(1)
        counter.batches()
    assert len(rows_of(counter)) == 10
    assert counter.dropped == 15


def test_what_nobody_takes_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go, of the model that has the most."""
    monkeypatch.setattr(traffic_module, "KEPT_ROWS", 10)
    clock = HandClock()
    counter = TrafficCounter(["m", "n"], clock)
    counter.arrived("n")
    for _ in range(25):
        counter.arrived("m")
        clock.go(1)
    assert counter.dropped == 16
    assert [(row[0], row[1] - START_S) for row in rows_of(counter)] == [
        *(("m", n) for n in range(16, 25)),
        ("n", 0),
    ]
    counter.arrived("m")
    assert counter.dropped == 16


@pytest.mark.parametrize("jump_s", [-7200.0, 7200.0])
def test_a_clock_that_is_set_makes_no_load(jump_s: float) -> None:
    """The length of what was in progress is that of the steady clock."""
    clock = HandClock()
    counter = TrafficCounter(["m"], clock)
    counter.queue("m", 0, 1)
    clock.go(1)
    clock.wall_s += jump_s
    clock.go(1)
    counter.queue("m", 0, 0)
    clock.go(1)
    assert sum(row[5] for row in rows_of(counter)) == pytest.approx(2.0)


MESSAGE_END = (
    b'event: message_delta\ndata: {"type": "message_delta", "usage": {"input_tokens": 5, "output_tokens": 2}}'
    b'\n\nevent: message_stop\ndata: {"type": "message_stop"}\n\n'
)


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        (b'{"usage":{"prompt_tokens":3,"total_tokens":3,"completion_tokens":0}}', (3, 0)),
        (b'{"usage":{"prompt_tokens":3,"total_tokens":3}}', (3, 0)),
        (b'data: {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\ndata: [DONE]\n\n', (3, 4)),
        (MESSAGE_END, (5, 2)),
        (b'{"usage": {"prompt_tokens": 1}} {"usage": {"prompt_tokens": 2}}', (2, 0)),
        (b'{"usage": null}', None),
        (b'{"usage": {"prompt_tokens": "3"}}', None),
        (b'{"usage": {"prompt_tokens": -1}}', None),
        (b'{"usage": {"prompt_tok', None),
        (rb'{"text": "\"usage\": {\"prompt_tokens\": 9}"}', None),
        (b"", None),
    ],
)
def test_usage_is_read_from_the_end_of_an_answer(body: bytes, usage: tuple[int, int] | None) -> None:
    """In each API's names; a generated text can't pose as usage."""
    assert read_usage(body) == usage
    assert read_usage(b"x" * 100_000 + body) == usage


async def test_the_gateway_counts_what_it_serves() -> None:
    """Plain answers tell their tokens, streams without usage are counted as such, refused requests came too."""
    async with make_lab(limits={"max_queued": 1}) as lab:
        counter = lab.gateway.proxy.traffic
        waiting = asyncio.create_task(lab.chat())
        await lab.telemetry.until(lambda: lab.telemetry.queues.get("tiny") == (1, 0))
        assert (await lab.chat()).status_code == 429
        lab.model.light()
        assert (await waiting).status_code == 200
        assert (await lab.chat(stream=True)).status_code == 200
        lab.engine.script.tokens = ()
        lab.engine.script.pieces = (
            b'data: {"choices": []}\n\n',
            b'data: {"usage": {"prompt_tokens": 20, "completion_tokens": 30}}\n\n',
            b"data: [DONE]\n\n",
        )
        assert (await lab.chat(stream=True)).status_code == 200
        await lab.quiet()
        rows = list(counter._models["tiny"].rows.values())
        assert [sum(row[i] for row in rows) for i in (2, 3, 4)] == [4, 21, 33]
        assert counter.activity("tiny")["untold"] == 1
        assert sum(row[5] for row in rows) > 0
        assert sum(row[6] for row in rows) > 0


def test_the_fake_engines_usage_is_what_the_test_above_expects() -> None:
    """One token in, three out."""
    document, _ = vllm_answer("/v1/chat/completions", {}, ("a", "b", "c"))
    assert read_usage(json.dumps(document).encode()) == (1, 3)


PAGE = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 1.2e+06
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.7e+09
vllm:generation_tokens_total{engine="0",model_name="m"} 77.0
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.01",model_name="m"} 4.0
vllm:inter_token_latency_seconds_sum{engine="0",model_name="m"} 1.5
vllm:inter_token_latency_seconds_count{engine="0",model_name="m"} 75.0
"""


def test_the_counters_of_a_metrics_page() -> None:
    """Named series alone, engine cores added up, what is missing stays missing."""
    assert engine_counters(PAGE) == {
        "running": 5,
        "waiting": 0,
        "prompt_tokens": 1_200_000,
        "generation_tokens": 77,
        "inter_token_sum_s": 1.5,
        "inter_tokens": 75,
    }
    assert engine_counters("") == {}


def info(**changes: Any) -> EngineInfo:
    values: dict[str, Any] = {
        "engine_id": "e1",
        "model": "m",
        "fingerprint": "f",
        "kind": "forked",
        "state": "ready",
        "http": "",
        "control": "",
        "requested_s": 100.0,
        "ready_s": 102.0,
    }
    return EngineInfo(**{**values, **changes})


@pytest.mark.parametrize(
    ("waiting_since_s", "prewarmed"), [(99.5, False), (101.0, True), (103.0, None), (None, False)]
)
def test_a_start_is_told_with_whether_somebody_waited(
    waiting_since_s: float | None, prewarmed: bool | None
) -> None:
    """A start that nobody here saw begin is not this gateway's to tell."""
    log = StartLog()
    log.note(info(), waiting_since_s=waiting_since_s)
    assert [start["prewarmed"] for start in log.untold()] == ([] if prewarmed is None else [prewarmed])
    assert log.last("m") is not None


def test_a_start_counts_once_however_many_others_came_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine serves on long after; noted anew it would take the place of a start that is untold."""
    log = StartLog()
    log.note(info(), waiting_since_s=99.0)
    log.told(log.untold())
    for number in range(starts_module.KEPT_STARTS):
        log.note(info(engine_id=f"o{number}", model="other"), waiting_since_s=99.0)
    untold = log.untold()
    for waiting_since_s in (None, 200.0):
        log.note(info(), [Phase("schedule", 99.0, 1.0)], waiting_since_s=waiting_since_s)
    assert log.untold() == untold
    last = log.last("m")
    assert last is not None
    assert not last["prewarmed"]
    log.note(info(requested_s=300.0, ready_s=301.0), waiting_since_s=299.0)  # parked, and adopted
    assert log.estimate_s("m") == 1.5


@pytest.mark.parametrize("hours", [-1, 8])
@pytest.mark.parametrize("waits", [True, False])
def test_a_start_in_which_the_clock_made_a_step_teaches_nothing(hours: int, waits: bool) -> None:
    """Set by a person, or by a laptop that slept: it would count as one that took hours. The next one counts."""
    clock = HandClock()
    log = StartLog(clock)

    def start(engine_id: str, step_s: float = 0.0) -> ColdStart:
        requested_s = clock.wall_s
        clock.go(2.0)
        clock.wall_s += step_s
        clock.go(2.0)
        engine = info(engine_id=engine_id, requested_s=requested_s, ready_s=clock.wall_s)
        log.note(engine, waiting_since_s=requested_s if waits else clock.wall_s)
        return log.cold_start(engine)

    assert start("e1", 3600.0 * hours).ready_s == 0.0
    assert log.untold() == []
    assert (log.last("m"), log.estimate_s("m")) == (None, None)
    clock.go(60.0)
    assert start("e2").ready_s == clock.wall_s
    assert [row["total_s"] for row in log.untold()] == ([4.0] if waits else [])
    assert log.estimate_s("m") == 4.0


class Known:
    """A gateway that knows one model, and one engine that is asked all the time."""

    def __init__(self) -> None:
        self.starts = StartLog()
        self.models: Sequence[str] = ["m"]

    def view(self) -> dict[str, Any]:
        return {"node": "n1"}

    def model_view(self, model: str) -> dict[str, Any]:
        return {"failure": None}

    async def read_asked_engines(self, busy: Any) -> list[tuple[str, str, str]]:
        return [("e1", "m", PAGE)]

    def withdraw(self, model: str) -> None:
        """It asks nobody."""


class Controller(Watched):
    """Takes reports; raises what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.report = self
        self.asked = 0
        self.taken: list[dict[str, Any]] = []
        self.sequence = 0
        self.takes = True
        self.failure: Exception | None = None

    async def _take(self, report: dict[str, Any]) -> dict[str, Any]:
        self.asked += 1
        self.notify()
        if self.failure is not None:
            raise self.failure
        self.taken.append(report)
        return {"taken": self.takes, "sequence": self.sequence}

    def remote(self, gateway: str, report: dict[str, Any]) -> Any:
        return self._take(report)


FAILURES = [RayActorError(), DeploymentUnavailableError(DeploymentID("controller", "default"))]
any_failure = pytest.mark.parametrize(
    "failure", [*FAILURES, ValueError()], ids=lambda failure: type(failure).__name__
)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
async def test_counts_and_starts_are_told_until_the_controller_has_them(failure: Exception) -> None:
    """A report that fails is made up for by the next; what is acknowledged is not sent again."""
    clock, controller, known = HandClock(), Controller(), Known()
    counter = TrafficCounter(["m"], clock)
    reports = Reports(known, controller, counter, lambda: {"m": (1, 2)})
    counter.arrived("m")
    known.starts.note(info(), waiting_since_s=99.0)
    clock.go(1)
    controller.failure = failure
    await reports.send()
    controller.failure = None
    await reports.send()
    (report,) = controller.taken
    assert (report["models"]["m"]["queued"], report["models"]["m"]["in_flight"]) == (1, 2)
    assert [(number, len(rows)) for number, rows in report["batches"]] == [(1, 1)]
    assert [start["engine_id"] for start in report["starts"]] == ["e1"]
    controller.sequence = 1
    await reports.send()
    await reports.send()
    assert [len(r["batches"]) for r in controller.taken] == [1, 1, 0]
    assert [len(r["starts"]) for r in controller.taken] == [1, 0, 0]
    assert {r["source"] for r in controller.taken} == {counter.source}


async def test_starts_are_told_until_a_controller_that_decides_has_them() -> None:
    """One that has only come, or has let go, answers and keeps nothing."""
    controller, known = Controller(), Known()
    reports = Reports(known, controller, TrafficCounter(["m"], HandClock()), dict)
    known.starts.note(info(), waiting_since_s=99.0)
    controller.takes = False
    await reports.send()
    controller.takes = True
    await reports.send()
    await reports.send()
    assert [len(report["starts"]) for report in controller.taken] == [1, 1, 0]


@any_failure
async def test_reporting_goes_on_after_any_failure(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """Also after one that nobody has thought of, in reports and in what engines tell."""
    monkeypatch.setattr(reports_module, "REPORT_EVERY_S", 0.001)
    monkeypatch.setattr(reports_module, "READ_ENGINES_EVERY_S", 0.001)
    controller, known = Controller(), Known()
    controller.failure = failure
    failed = asyncio.Event()

    async def fails(busy: Any) -> Any:
        if failed.is_set():
            return [("e1", "m", PAGE)]
        failed.set()
        raise failure

    monkeypatch.setattr(known, "read_asked_engines", fails)
    reports = Reports(known, controller, TrafficCounter(["m"], HandClock()), dict)
    tasks = [asyncio.create_task(reports.run()), asyncio.create_task(reports.read_engines())]
    await failed.wait()
    controller.failure = None
    async with asyncio.timeout(20):
        while not any("e1" in report["engine_counters"] for report in controller.taken):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.001)
    for task in tasks:
        task.cancel()


def rows_taken(controller: Controller) -> list[Row]:
    """Each batch that came, once."""
    batches = {number: rows for report in controller.taken for number, rows in report["batches"]}
    return [row for _, rows in sorted(batches.items()) for row in rows]


@any_failure
async def test_a_gateway_that_ends_tells_its_last_second(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """Also of what came until its door was closed, and again until the next controller has it."""
    monkeypatch.setattr(reports_module, "LAST_REPORTS_S", 60.0)
    monkeypatch.setattr(reports_module, "LAST_REPORTS_EVERY_S", 0.001)
    clock, controller = HandClock(), Controller()
    counter = TrafficCounter(["m"], clock)
    counter.arrived("m")
    clock.go(1)

    class LastRequest:
        async def close(self) -> None:
            counter.arrived("m")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    async def receive() -> Any:
        return {"type": "lifespan.shutdown"}

    reports = Reports(Known(), controller, counter, dict)
    gateway = LateGateway(lambda: app, lambda _: cast(Any, LastRequest()), lambda: None, reports.close)
    controller.failure = failure
    ending = asyncio.create_task(gateway({"type": "lifespan"}, receive, None))
    await controller.until(lambda: controller.asked >= 3)
    controller.failure = None
    await controller.until(lambda: len(controller.taken) >= 2)
    assert [row[:3] for row in rows_taken(controller)] == [["m", START_S, 1], ["m", START_S + 1, 1]]
    assert not ending.done()
    controller.sequence = counter.batches()[-1][0]
    await ending
    assert counter.batches() == []
    asked = controller.asked
    await reports.close()
    assert controller.asked == asked


@pytest.mark.parametrize("hangs", [True, False])
async def test_last_reports_are_bounded(monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    """Without a controller the gateway ends all the same."""
    monkeypatch.setattr(reports_module, "LAST_REPORTS_S", 0.01)
    controller = Controller()
    counter = TrafficCounter(["m"], HandClock())
    counter.arrived("m")

    async def never(report: dict[str, Any]) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    if hangs:
        monkeypatch.setattr(controller, "_take", never)
    await Reports(Known(), controller, counter, dict).close()
    assert len(rows_of(counter)) == 1


class Response:
    """An engine's answer of one byte."""

    status = 200

    def __init__(self, content_type: bytes) -> None:
        self.headers = [(b"Content-Type", content_type)]

    async def chunks(self) -> Any:
        yield b"x"

    async def close(self) -> None:
        """Nothing."""


async def test_a_start_is_told_again_when_its_first_token_is_known() -> None:
    """The record of a start is not whole before that."""
    log = StartLog()
    log.note(info(), waiting_since_s=99.0)
    log.told(log.untold())
    assert log.untold() == []
    async for _ in log.timed("e1", log.now(), Response(b"text/event-stream; charset=utf-8")).chunks():
        pass
    (start,) = log.untold()
    assert [p["name"] for p in start["phases"]] == ["first_token"]


async def test_an_answer_that_is_not_streamed_tells_no_first_token() -> None:
    """Its first byte comes when the whole answer is there: a start would seem to take as long as the answer."""
    log = StartLog()
    log.note(info(), waiting_since_s=99.0)
    log.told(log.untold())
    for content_type in (b"application/json", b"text/event-stream"):
        async for _ in log.timed("e1", log.now(), Response(content_type)).chunks():
            pass
    assert log.untold() == []
    assert (log.last("m") or {"phases": []})["phases"] == []


async def test_the_control_api_is_the_controllers() -> None:
    """Method, path, query, body and authorization go there as they are; its status and document come back."""
    async with make_lab() as lab:
        answer = await lab.client.post(
            "/relight/v1/prewarm?model=tiny", content=b"{}", headers={"authorization": "Bearer x"}
        )
        assert (answer.status_code, answer.json()) == (418, {"answer": 1})
        assert lab.engines.controlled == [
            ("POST", "/relight/v1/prewarm", {"model": "tiny"}, b"{}", "Bearer x")
        ]
        assert (await lab.client.post("/relight/v1/x", content=b"x" * (4 << 20 | 1))).status_code == 413
        assert len(lab.engines.controlled) == 1
        assert (await lab.client.get("/relight/v1/status")).json()["models"][0]["id"] == "tiny"


async def test_who_has_no_token_is_told_which_kind_is_asked_for() -> None:
    """As HTTP wants of a 401, and of no other answer."""
    async with make_lab() as lab:
        answers = []
        for lab.engines.control_status in (401, 200):
            answers.append(await lab.client.get("/relight/v1/policies"))
        assert [a.headers.get("www-authenticate") for a in answers] == ["Bearer", None]
