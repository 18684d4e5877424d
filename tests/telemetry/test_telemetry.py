"""Telemetry against receivers that decode what arrives, and against none."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments import telemetry as tel
from deployments.app import LateGateway
from deployments.fleet import TelemetryConfig as FleetTelemetry
from deployments.gateway.engines import ColdStart, Phase
from deployments.gateway.observe import GatewayTelemetry
from deployments.gateway.openai import CANCEL_RESPONSE, RETRIEVE_RESPONSE, match_route
from deployments.gateway.openai import ROUTES as GATEWAY_ROUTES
from deployments.telemetry import Telemetry, TelemetrySettings, build_telemetry, engine_otel_args, settings
from tests.fakes.otlp import GrpcOtlpReceiver, OtlpReceiver, Received

CHAT = "/v1/chat/completions"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CLIENT_SPAN = "b7ad6b7169203331"
SAMPLED = (b"Traceparent", f"00-{TRACE_ID}-{CLIENT_SPAN}-01".encode())
NOT_SAMPLED = (b"traceparent", f"00-{TRACE_ID}-{CLIENT_SPAN}-00".encode())
START_NS = 1_800_000_000_000_000_000
COLD_START = ColdStart(
    engine_id="engine-1",
    kind="forked",
    ready_s=1_800_000_003.5,
    phases=(
        Phase("queue", 1_800_000_000.0, 0.25),
        Phase("replica", 1_800_000_000.25, 1.5),
        Phase("weights", 1_800_000_000.5, 2.0),
    ),
)


@dataclass(frozen=True)
class Config:
    """The fleet file's section, by its shape."""

    enabled: bool | None = None
    service_name: str = "relight"
    otlp_endpoint: str | None = None
    prometheus: bool = True


class Clock:
    """Both clocks, moved by hand."""

    def __init__(self) -> None:
        self.now_ns = START_NS

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_ns += round(seconds * 1e9)

    def read(self) -> int:
        """Nanoseconds."""
        return self.now_ns


@pytest.fixture(autouse=True)
def no_otel_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK reads some variables by itself; those of whoever runs the tests must not count."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def telemetry(receiver: OtlpReceiver, clock: Clock) -> Iterator[Telemetry]:
    """Traces, metrics and Prometheus, all on."""
    telemetry = build({"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}, clock=clock)
    yield telemetry
    telemetry.shutdown()


OFF = Config()


def build(environ: dict[str, str], config: Config = OFF, clock: Clock | None = None) -> Telemetry:
    clocks = {} if clock is None else {"wall_ns": clock.read, "monotonic_ns": clock.read}
    return build_telemetry(config, environ, role="gateway", instance="gateway-1", **clocks)


def flushed(telemetry: Telemetry, receiver: OtlpReceiver | GrpcOtlpReceiver) -> Received:
    assert telemetry.force_flush()
    return receiver.received


def samples(telemetry: Telemetry) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = telemetry.prometheus()
    assert text is not None
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def sample(telemetry: Telemetry, name: str, **labels: str) -> float:
    return samples(telemetry)[name, frozenset(labels.items())]


# --------------------------------------------------------------------------------------------------- settings

BASE = "OTEL_EXPORTER_OTLP_ENDPOINT"
HTTP = "http/protobuf"
ON = Config(enabled=True)


@pytest.mark.parametrize(
    ("config", "environ", "traces", "metrics"),
    [
        pytest.param(Config(), {}, None, None, id="nothing asks for it"),
        pytest.param(Config(), {"OTEL_SERVICE_NAME": "x"}, None, None, id="a name alone turns nothing on"),
        pytest.param(Config(), {BASE: " "}, None, None, id="a blank variable is an unset one"),
        pytest.param(
            Config(), {BASE: "http://c:4318"},
            (HTTP, "http://c:4318/v1/traces"), (HTTP, "http://c:4318/v1/metrics"), id="endpoint",
        ),
        pytest.param(
            Config(), {BASE: "https://c/otlp/"},
            (HTTP, "https://c/otlp/v1/traces"), (HTTP, "https://c/otlp/v1/metrics"), id="endpoint and path",
        ),
        pytest.param(
            Config(), {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/x"},
            (HTTP, "http://t/x"), None, id="traces endpoint, verbatim",
        ),
        pytest.param(
            Config(), {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://m/x"},
            None, (HTTP, "http://m/x"), id="metrics endpoint, verbatim",
        ),
        pytest.param(
            Config(), {BASE: "http://c", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/x"},
            (HTTP, "http://t/x"), (HTTP, "http://c/v1/metrics"), id="both endpoints",
        ),
        pytest.param(
            Config(), {BASE: "http://c", "OTEL_TRACES_EXPORTER": "none"},
            None, (HTTP, "http://c/v1/metrics"), id="no traces",
        ),
        pytest.param(
            Config(), {BASE: "http://c", "OTEL_METRICS_EXPORTER": "prometheus"},
            (HTTP, "http://c/v1/traces"), None, id="metrics by Prometheus only",
        ),
        pytest.param(
            Config(), {"OTEL_TRACES_EXPORTER": "otlp"},
            (HTTP, "http://localhost:4318/v1/traces"), None, id="exporter alone, standard endpoint",
        ),
        pytest.param(
            Config(), {BASE: "http://c", "OTEL_METRICS_EXPORTER": "otlp,prometheus"},
            (HTTP, "http://c/v1/traces"), (HTTP, "http://c/v1/metrics"), id="two exporters",
        ),
        pytest.param(Config(), {BASE: "http://c", "OTEL_SDK_DISABLED": "True"}, None, None, id="disabled"),
        pytest.param(
            Config(), {BASE: "http://c", "OTEL_SDK_DISABLED": "no"},
            (HTTP, "http://c/v1/traces"), (HTTP, "http://c/v1/metrics"), id="only true disables",
        ),
        pytest.param(
            Config(), {BASE: "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            ("grpc", "http://c:4317"), ("grpc", "http://c:4317"), id="gRPC",
        ),
        pytest.param(
            Config(), {BASE: "c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            ("grpc", "https://c:4317"), ("grpc", "https://c:4317"), id="gRPC without a scheme is TLS",
        ),
        pytest.param(
            Config(),
            {BASE: "c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_INSECURE": "true"},
            ("grpc", "http://c:4317"), ("grpc", "http://c:4317"), id="gRPC insecure",
        ),
        pytest.param(
            Config(), {BASE: "http://c", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"},
            ("grpc", "http://c"), (HTTP, "http://c/v1/metrics"), id="a protocol for each signal",
        ),
        pytest.param(
            ON, {}, (HTTP, "http://localhost:4318/v1/traces"), (HTTP, "http://localhost:4318/v1/metrics"),
            id="the fleet file says on",
        ),
        pytest.param(
            ON, {"OTEL_METRICS_EXPORTER": "none"}, (HTTP, "http://localhost:4318/v1/traces"), None,
            id="the fleet file says on, a variable takes metrics out",
        ),
        pytest.param(Config(enabled=False), {BASE: "http://c"}, None, None, id="the fleet file says off"),
        pytest.param(ON, {"OTEL_SDK_DISABLED": "true"}, None, None, id="disabled wins over the fleet file"),
        pytest.param(
            Config(otlp_endpoint="http://f:4318"), {},
            (HTTP, "http://f:4318/v1/traces"), (HTTP, "http://f:4318/v1/metrics"), id="fleet endpoint",
        ),
        pytest.param(
            Config(otlp_endpoint="http://f"), {BASE: "http://c"},
            (HTTP, "http://c/v1/traces"), (HTTP, "http://c/v1/metrics"), id="the variable's endpoint wins",
        ),
    ],
)  # fmt: skip
def test_what_turns_it_on(
    config: Config,
    environ: dict[str, str],
    traces: tuple[str, str] | None,
    metrics: tuple[str, str] | None,
) -> None:
    """Each combination of fleet file and variables sends each signal where the standard says."""
    chosen = settings(config, environ)
    for signal, expected in ((chosen.traces, traces), (chosen.metrics, metrics)):
        assert (None if signal is None else (signal.protocol, signal.endpoint)) == expected
    assert chosen.warnings == ()


def test_fleet_section_fits() -> None:
    """The fleet file's own section is taken as it is, and leaves OTLP off and Prometheus on."""
    assert settings(FleetTelemetry(), {}) == TelemetrySettings()


@pytest.mark.parametrize(
    ("environ", "name", "resource"),
    [
        ({}, "fleet-name", {}),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=a,x=1%2C2"}, "a", {"x": "1,2"}),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=a", "OTEL_SERVICE_NAME": "b"}, "b", {}),
    ],
)
def test_resource(environ: dict[str, str], name: str, resource: dict[str, str]) -> None:
    """The service's name comes from its own variable, then the attributes, then the fleet file."""
    chosen = settings(Config(service_name="fleet-name"), environ)
    assert (chosen.service_name, chosen.resource) == (name, resource)


@pytest.mark.parametrize(
    ("environ", "fragment"),
    [
        ({"OTEL_TRACES_SAMPLER": "jaeger_remote"}, "OTEL_TRACES_SAMPLER"),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"}, "OTEL_TRACES_SAMPLER_ARG"),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "x"}, "OTEL_TRACES_SAMPLER_ARG"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "zipkin"),
        ({BASE: "http://c", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "http/json"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "novalue"}, "novalue"),
    ],
)
def test_unusable_variable_is_a_warning(environ: dict[str, str], fragment: str) -> None:
    """A variable that can't be honoured is named in a warning and stops nothing."""
    (warning,) = settings(Config(), environ).warnings
    assert fragment in warning


def test_prometheus_switch() -> None:
    """The fleet file turns Prometheus off, and the standard exporter variable turns it on again."""
    off = Config(prometheus=False)
    assert not settings(off, {}).prometheus
    assert settings(off, {"OTEL_METRICS_EXPORTER": "prometheus"}).prometheus
    assert build({}, off).prometheus() is None


# ----------------------------------------------------------------------------------------------------- off


def test_off_by_default_imports_no_sdk() -> None:
    """With nothing asked for, requests are measured for Prometheus without OpenTelemetry's SDK in memory."""
    program = """
import json, sys
from types import SimpleNamespace
from deployments.telemetry import build_telemetry
config = SimpleNamespace(enabled=None, service_name="relight", otlp_endpoint=None, prometheus=True)
telemetry = build_telemetry(config, {}, role="gateway", instance="g")
request = telemetry.request("/v1/chat/completions", "m", [(b"traceparent", b"x")])
assert request.inject([(b"traceparent", b"x")]) == [(b"traceparent", b"x")]
request.wait_ended(0.1, None); request.retried("r"); request.first_byte(); request.ended(200, None)
assert b'relight_requests_total{model="m"' in telemetry.prometheus()
telemetry.shutdown()
print(json.dumps([m for m in sys.modules if m.startswith(("opentelemetry", "grpc", "ray", "torch"))]))
"""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60, env=environ
    )
    assert json.loads(run.stdout) == []


def test_all_off_shares_one_request() -> None:
    """With Prometheus off too, a request costs no object at all."""
    telemetry = build({}, Config(prometheus=False))
    assert not telemetry.enabled
    assert telemetry.request(CHAT, "m", []) is telemetry.request(CHAT, "n", [])
    telemetry.queue("m", 1, 1)


def test_sets_no_globals(telemetry: Telemetry) -> None:
    """The process's global providers stay free for others."""
    from opentelemetry import metrics, trace

    assert type(trace.get_tracer_provider()).__name__ == "ProxyTracerProvider"
    assert type(metrics.get_meter_provider()).__name__ == "_ProxyMeterProvider"


def test_is_what_the_gateway_asks_for(telemetry: Telemetry) -> None:
    """The gateway's protocol is fulfilled: mypy reads the annotation, and the names are there."""
    gateway: GatewayTelemetry = telemetry
    gateway.request(CHAT, "m", []).ended(200, None)


def test_knows_every_route_of_the_gateway() -> None:
    """No route that the gateway serves is counted as other."""
    other = match_route("/v1/something/new")
    assert other is not None
    templates = {
        route.template for route in (*GATEWAY_ROUTES.values(), RETRIEVE_RESPONSE, CANCEL_RESPONSE, other)
    }
    assert templates <= set(tel.ROUTES)


# --------------------------------------------------------------------------------------------------- traces


def test_one_trace_with_a_cold_start(telemetry: Telemetry, receiver: OtlpReceiver, clock: Clock) -> None:
    """A cold request is one trace: server span, wait below it, each phase below that at its own time."""
    request = telemetry.request(CHAT, "qwen", [])
    clock.advance(4.0)
    request.wait_ended(3.75, COLD_START)
    clock.advance(0.5)
    request.first_byte()
    clock.advance(1.0)
    request.ended(200, None)
    received = flushed(telemetry, receiver)

    root = received.span(f"POST {CHAT}")
    assert (root.kind, root.parent_id, root.status) == (2, "", 0)
    assert (root.start_ns, root.end_ns) == (START_NS, START_NS + 5_500_000_000)
    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "qwen",
        "relight.role": "gateway",
    }
    assert [(event.name, event.time_ns) for event in root.events] == [
        ("relight.first_byte", START_NS + 4_500_000_000)
    ]
    (wait,) = received.children(root)
    assert wait.name == "relight.wait"
    assert (wait.start_ns, wait.end_ns) == (START_NS + 250_000_000, START_NS + 4_000_000_000)
    assert wait.attributes == {
        "gen_ai.request.model": "qwen",
        "relight.cold": True,
        "relight.cold_start.kind": "forked",
        "relight.engine.id": "engine-1",
    }
    assert [(event.name, event.time_ns) for event in wait.events] == [
        ("relight.engine.ready", START_NS + 3_500_000_000)
    ]
    phases = received.children(wait)
    assert [(p.name, p.start_ns - START_NS, p.end_ns - p.start_ns) for p in phases] == [
        ("relight.cold_start.queue", 0, 250_000_000),
        ("relight.cold_start.replica", 250_000_000, 1_500_000_000),
        ("relight.cold_start.weights", 500_000_000, 2_000_000_000),
    ]
    assert [p.attributes["relight.cold_start.phase"] for p in phases] == ["queue", "replica", "weights"]
    assert {span.trace_id for span in received.spans} == {root.trace_id}
    assert len(received.spans) == 5


def test_warm_wait_has_no_phases(telemetry: Telemetry, receiver: OtlpReceiver) -> None:
    """A wait for a free place in a running engine is one span without children."""
    request = telemetry.request(CHAT, "qwen", [])
    request.wait_ended(0.1, None)
    request.ended(200, None)
    received = flushed(telemetry, receiver)
    wait = received.span("relight.wait")
    assert wait.attributes["relight.cold"] is False
    assert received.children(wait) == []


def test_continues_the_clients_trace(telemetry: Telemetry, receiver: OtlpReceiver) -> None:
    """An incoming traceparent is our parent; the engine gets our span, the client's state and its baggage."""
    client = [
        SAMPLED,
        (b"tracestate", b"a=1"),
        (b"tracestate", b"b=2"),
        (b"baggage", b"user=7"),
        (b"x", b"y"),
    ]
    request = telemetry.request(CHAT, "qwen", client)
    headers = list(request.inject(client))
    request.ended(200, None)
    root = flushed(telemetry, receiver).span(f"POST {CHAT}")
    assert (root.trace_id, root.parent_id, root.trace_state) == (TRACE_ID, CLIENT_SPAN, "a=1,b=2")
    assert headers == [
        (b"baggage", b"user=7"),
        (b"x", b"y"),
        (b"traceparent", f"00-{TRACE_ID}-{root.span_id}-01".encode()),
        (b"tracestate", b"a=1,b=2"),
    ]


def test_honours_the_clients_sampled_flag(telemetry: Telemetry, receiver: OtlpReceiver) -> None:
    """A client that doesn't sample gets no spans from us, and the engine is told the same."""
    request = telemetry.request(CHAT, "qwen", [NOT_SAMPLED])
    (header,) = request.inject([NOT_SAMPLED])
    request.wait_ended(1.0, COLD_START)
    request.ended(200, None)
    received = flushed(telemetry, receiver)
    assert received.spans == []
    assert header[0] == b"traceparent"
    assert header[1].startswith(f"00-{TRACE_ID}-".encode())
    assert header[1].endswith(b"-00")
    assert received.point("relight.requests").value == 1


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([(b"traceparent", b"\xff not one")], id="garbage"),
        pytest.param([SAMPLED, SAMPLED], id="two of them"),
        pytest.param([(b"tracestate", b"a=1")], id="state without parent"),
    ],
)
def test_bad_traceparent_starts_a_new_trace(
    telemetry: Telemetry, receiver: OtlpReceiver, headers: list[tuple[bytes, bytes]]
) -> None:
    """What isn't a valid traceparent is replaced by a new trace of ours."""
    request = telemetry.request(CHAT, "qwen", headers)
    (header,) = request.inject(headers)
    request.ended(200, None)
    root = flushed(telemetry, receiver).span(f"POST {CHAT}")
    assert root.parent_id == ""
    assert root.trace_id != TRACE_ID
    name, value = header
    assert name == b"traceparent"
    assert value.startswith(f"00-{root.trace_id}-{root.span_id}-".encode())
    assert int(value[-2:], 16) & 1  # sampled; another bit says that the id is random


def test_a_current_span_is_no_parent(telemetry: Telemetry, receiver: OtlpReceiver) -> None:
    """A span of somebody else that is current in this process doesn't capture our request."""
    assert telemetry.tracer is not None
    with telemetry.tracer.start_as_current_span("foreign"):
        telemetry.request(CHAT, "qwen", []).ended(200, None)
    received = flushed(telemetry, receiver)
    assert received.span(f"POST {CHAT}").trace_id != received.span("foreign").trace_id


@pytest.mark.parametrize(
    ("status", "error", "span_status", "error_type"),
    [
        (200, None, 0, None),
        (404, None, 0, None),
        (429, "queue_full", 0, "queue_full"),
        (499, "client_closed", 0, "client_closed"),
        (200, "engine_interrupted", 2, "engine_interrupted"),
        (504, "deadline_exceeded", 2, "deadline_exceeded"),
        (500, None, 2, "500"),
    ],
)
def test_span_status(
    telemetry: Telemetry,
    receiver: OtlpReceiver,
    *,
    status: int,
    error: str | None,
    span_status: int,
    error_type: str | None,
) -> None:
    """Ours and the engine's failures mark the span, the client's don't."""
    telemetry.request(CHAT, "qwen", []).ended(status, error)
    root = flushed(telemetry, receiver).span(f"POST {CHAT}")
    assert root.status == span_status
    assert root.attributes.get("error.type") == error_type
    assert root.attributes["http.response.status_code"] == status


def test_retry_and_repeated_calls(telemetry: Telemetry, receiver: OtlpReceiver) -> None:
    """A retry is an event; second calls of first_byte and ended change nothing."""
    request = telemetry.request(CHAT, "qwen", [])
    request.retried("engine_unreachable")
    for _ in range(2):
        request.first_byte()
        request.ended(200, None)
    received = flushed(telemetry, receiver)
    root = received.span(f"POST {CHAT}")
    assert [(event.name, event.attributes) for event in root.events] == [
        ("relight.retry", {"relight.retry.reason": "engine_unreachable"}),
        ("relight.first_byte", {}),
    ]
    assert sample(telemetry, "relight_retries_total", model="qwen", reason="engine_unreachable") == 1
    assert sample(telemetry, "relight_time_to_first_byte_seconds_count", model="qwen", route=CHAT) == 1
    assert sample(telemetry, "relight_requests_total", model="qwen", route=CHAT, status="200") == 1


@pytest.mark.parametrize(
    ("sampler", "argument", "spans"),
    [
        ("always_off", "", 0),
        ("always_on", "", 2),  # even what the client does not sample
        ("parentbased_always_off", "", 0),
        ("parentbased_always_on", "", 1),
        ("parentbased_traceidratio", "0", 0),
        ("traceidratio", "1", 2),
    ],
)
def test_samplers(receiver: OtlpReceiver, sampler: str, argument: str, spans: int) -> None:
    """The standard sampler variables decide over a root request and one that its client doesn't sample."""
    telemetry = build(
        {BASE: receiver.url, "OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": argument}
    )
    telemetry.request(CHAT, "qwen", []).ended(200, None)
    telemetry.request(CHAT, "qwen", [NOT_SAMPLED]).ended(200, None)
    telemetry.shutdown()
    assert len(receiver.received.spans) == spans


def test_who_sends_it(receiver: OtlpReceiver) -> None:
    """Resource attributes, headers and paths arrive as the variables say."""
    telemetry = build(
        {
            BASE: receiver.url,
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20abc",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=lab,service.instance.id=shared",
            "OTEL_SERVICE_NAME": "lamps",
        }
    )
    telemetry.request(CHAT, "qwen", []).ended(200, None)
    telemetry.shutdown()
    received = receiver.received
    expected = {
        "service.name": "lamps",
        "service.instance.id": "gateway-1",
        "deployment.environment.name": "lab",
        "relight.role": "gateway",
        "telemetry.sdk.language": "python",
    }
    for resource in (received.span(f"POST {CHAT}").resource, received.point("relight.requests").resource):
        assert expected.items() <= resource.items()
    assert sorted(path for path, _ in received.requests) == ["/v1/metrics", "/v1/traces"]
    assert {headers["authorization"] for _, headers in received.requests} == {"Bearer abc"}


def test_grpc() -> None:
    """Spans and metrics arrive over gRPC too."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")
    with GrpcOtlpReceiver() as receiver:
        telemetry = build({BASE: receiver.url, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
        telemetry.request(CHAT, "qwen", []).ended(200, None)
        telemetry.shutdown()
        assert receiver.received.span(f"POST {CHAT}").attributes["gen_ai.request.model"] == "qwen"
        assert receiver.received.point("relight.requests").value == 1


# -------------------------------------------------------------------------------------------------- metrics


def one_of_each(telemetry: Telemetry, clock: Clock) -> None:
    """Two requests that waited for the same cold start, gauges, and a retry."""
    telemetry.queue("qwen", 2, 0)
    for _ in range(2):
        request = telemetry.request(CHAT, "qwen", [])
        clock.advance(4.0)
        request.wait_ended(3.75, COLD_START)
        request.retried("engine_unreachable")
        clock.advance(0.5)
        request.first_byte()
        clock.advance(1.0)
        request.ended(200, None)
    telemetry.queue("qwen", 0, 1)


def test_metrics_over_otlp(telemetry: Telemetry, receiver: OtlpReceiver, clock: Clock) -> None:
    """Every metric arrives with its value, unit and conventional attributes, and with our buckets."""
    one_of_each(telemetry, clock)
    received = flushed(telemetry, receiver)
    qwen: dict[str, Any] = {"gen_ai__request__model": "qwen"}

    assert received.point("relight.requests", http__route=CHAT, http__response__status_code=200).value == 2
    duration = received.point("http.server.request.duration", http__request__method="POST", **qwen)
    assert (duration.count, duration.sum, duration.unit) == (2, 11.0, "s")
    assert duration.bounds == tel.BUCKETS_S
    assert duration.buckets[tel.BUCKETS_S.index(10.0)] == 2
    assert set(duration.exemplar_trace_ids) <= {span.trace_id for span in received.spans}
    assert duration.exemplar_trace_ids
    assert received.point("relight.time_to_first_byte", **qwen).sum == 9.0
    assert received.point("relight.wait", relight__cold=True, **qwen).sum == 7.5
    assert received.point("relight.queue_depth", **qwen).value == 0
    assert received.point("relight.in_flight", **qwen).value == 1
    assert received.point("relight.cold_starts", relight__cold_start__kind="forked", **qwen).value == 1
    assert received.point("relight.cold_start", relight__cold_start__kind="forked", **qwen).sum == 3.5
    weights = received.point("relight.cold_start_phase", relight__cold_start__phase="weights", **qwen)
    assert (weights.count, weights.sum) == (1, 2.0)
    assert received.point("relight.retries", relight__retry__reason="engine_unreachable").value == 2
    assert {point.name for point in received.points} == {metric.otel for metric in tel.METRICS}


def test_metrics_as_prometheus_text(clock: Clock) -> None:
    """Every metric can be parsed from the exposition text, without any exporter."""
    telemetry = build({}, clock=clock)
    one_of_each(telemetry, clock)
    asked = {"model": "qwen", "route": CHAT}
    done = {**asked, "status": "200"}

    assert sample(telemetry, "relight_requests_total", **done) == 2
    assert sample(telemetry, "relight_request_duration_seconds_sum", **done) == 11.0
    assert sample(telemetry, "relight_request_duration_seconds_bucket", **done, le="5.0") == 0
    assert sample(telemetry, "relight_request_duration_seconds_bucket", **done, le="10.0") == 2
    assert sample(telemetry, "relight_time_to_first_byte_seconds_sum", **asked) == 9.0
    assert sample(telemetry, "relight_wait_seconds_sum", model="qwen", cold="true") == 7.5
    assert sample(telemetry, "relight_queue_depth", model="qwen") == 0
    assert sample(telemetry, "relight_in_flight", model="qwen") == 1
    assert sample(telemetry, "relight_cold_starts_total", model="qwen", kind="forked") == 1
    assert sample(telemetry, "relight_cold_start_seconds_sum", model="qwen", kind="forked") == 3.5
    assert sample(telemetry, "relight_cold_start_phase_seconds_sum", model="qwen", phase="replica") == 1.5
    assert sample(telemetry, "relight_retries_total", model="qwen", reason="engine_unreachable") == 2
    who = {"service_name": "relight", "service_instance_id": "gateway-1", "relight_role": "gateway"}
    assert sample(telemetry, "target_info", **who) == 1
    names = {name for name, _ in samples(telemetry)}
    assert not [name for name in names if name.endswith("_created")]


def test_engine_started_again_counts_again(clock: Clock) -> None:
    """One engine that is parked and adopted again has started twice."""
    telemetry = build({}, clock=clock)
    for ready_s in (10.0, 20.0, 20.0):
        telemetry.request(CHAT, "qwen", []).wait_ended(1.0, ColdStart("engine-1", "adopted", ready_s))
    assert sample(telemetry, "relight_cold_starts_total", model="qwen", kind="adopted") == 2


def test_registries_are_separate() -> None:
    """Two processes' worth of telemetry in one process don't mix, and the global registry stays empty."""
    import prometheus_client

    first, second = build({}), build({})
    first.request(CHAT, "qwen", []).ended(200, None)
    assert not [name for name, _ in samples(second) if name.startswith("relight_requests")]
    assert b"relight_" not in prometheus_client.generate_latest()


def test_label_values_are_bounded() -> None:
    """Made-up routes, models and reasons end in one series each, however many there are."""
    telemetry = build({})
    for number in range(1100):
        request = telemetry.request(f"/v1/{number}", f"model-{number}", [])
        request.retried(f"reason-{number}")
        request.ended(200, None)
    labels = [dict(labels) for (name, labels) in samples(telemetry) if name == "relight_retries_total"]
    assert len({label["model"] for label in labels}) == 1025
    assert len({label["reason"] for label in labels}) == 33
    routes = {
        dict(labels)["route"] for (name, labels) in samples(telemetry) if name == "relight_requests_total"
    }
    assert routes == {"other"}


def test_durations_survive_a_clock_step(receiver: OtlpReceiver) -> None:
    """A wall clock that is set back during a request makes no negative span: it is read once."""
    wall = iter([START_NS])
    monotonic = iter(range(0, 10**12, 10**9))
    telemetry = build_telemetry(
        Config(), {BASE: receiver.url}, role="gateway", instance="g",
        wall_ns=lambda: next(wall), monotonic_ns=lambda: next(monotonic),
    )  # fmt: skip
    telemetry.request(CHAT, "qwen", []).ended(200, None)  # would raise if it read the wall clock again
    telemetry.shutdown()
    root = receiver.received.span(f"POST {CHAT}")
    assert root.end_ns > root.start_ns


# -------------------------------------------------------------------------------------------- bad collectors


async def test_a_gateway_that_stops_sends_what_is_queued(
    telemetry: Telemetry, receiver: OtlpReceiver
) -> None:
    """Also of the requests that its door answers until it is closed."""

    class Door:
        async def close(self) -> None:
            telemetry.request(CHAT, "qwen", []).ended(200, None)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "lifespan.shutdown"

    async def receive() -> Any:
        return {"type": "lifespan.shutdown"}

    gateway = LateGateway(lambda: app, lambda _: cast(Any, Door()), telemetry.shutdown)
    await gateway({"type": "lifespan"}, receive, None)
    assert [span.name for span in receiver.received.spans] == [f"POST {CHAT}"]
    assert receiver.received.points


def serve_requests(telemetry: Telemetry, count: int) -> float:
    """Serve `count` cold requests; the seconds that took."""
    started_s = time.monotonic()
    for _ in range(count):
        request = telemetry.request(CHAT, "qwen", [])
        request.inject([])
        request.wait_ended(1.0, COLD_START)
        request.first_byte()
        request.ended(200, None)
    return time.monotonic() - started_s


def test_collector_away(caplog: pytest.LogCaptureFixture) -> None:
    """With nobody listening, requests go through at full speed and shutdown keeps its bound."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        telemetry = build({BASE: f"http://127.0.0.1:{unused.getsockname()[1]}"})
        assert serve_requests(telemetry, 500) < 5.0
        started_s = time.monotonic()
        telemetry.shutdown(timeout_s=1.0)
        assert time.monotonic() - started_s < 3.0
    assert sample(telemetry, "relight_requests_total", model="qwen", route=CHAT, status="200") == 500


def test_collector_hangs(receiver: OtlpReceiver) -> None:
    """A collector that accepts and never answers slows no request, even past the queue's bound."""
    receiver.hang()
    telemetry = build({BASE: receiver.url})
    serve_requests(telemetry, 200)
    assert receiver.arrived.wait(30)
    assert serve_requests(telemetry, 1000) < 5.0  # 5000 spans, and the queue holds 2048
    started_s = time.monotonic()
    telemetry.shutdown(timeout_s=0.5)
    telemetry.shutdown(timeout_s=0.5)
    assert time.monotonic() - started_s < 2.0
    assert telemetry.prometheus() is not None


def test_exporter_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing exporter is logged, and requests are served and counted without it."""
    name = "opentelemetry.exporter.otlp.proto.grpc"
    for module in (f"{name}.trace_exporter", f"{name}.metric_exporter"):
        monkeypatch.setitem(sys.modules, module, None)
    telemetry = build({BASE: "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    telemetry.request(CHAT, "qwen", []).ended(200, None)
    assert telemetry.tracer is None
    assert sample(telemetry, "relight_requests_total", model="qwen", route=CHAT, status="200") == 1
    assert "can't export to http://127.0.0.1:9" in caplog.text


def test_threads(telemetry: Telemetry, receiver: OtlpReceiver) -> None:
    """Requests from many threads at once lose nothing."""
    threads = [threading.Thread(target=serve_requests, args=(telemetry, 50)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    received = flushed(telemetry, receiver)
    assert len([span for span in received.spans if span.name == f"POST {CHAT}"]) == 400
    assert received.point("relight.requests").value == 400
    assert sample(telemetry, "relight_cold_starts_total", model="qwen", kind="forked") == 1


# --------------------------------------------------------------------------------------------------- engine


def test_engine_arguments() -> None:
    """An engine gets the endpoint, the protocol by vLLM's own variable, a name, and what the operator set."""
    chosen = settings(
        Config(),
        {
            BASE: "http://c:4318",
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20abc",
            "OTEL_RESOURCE_ATTRIBUTES": "k=a%2Cb",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": "0.5",
        },
    )
    assert "abc" not in repr(chosen)
    assert engine_otel_args(chosen) == (
        ["--otlp-traces-endpoint", "http://c:4318/v1/traces"],
        {
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_SERVICE_NAME": "relight-engine",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": "0.5",
            "OTEL_RESOURCE_ATTRIBUTES": "k=a%2Cb",
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "authorization=Bearer%20abc",
        },
    )


def test_engine_without_traces() -> None:
    """With traces off, an engine gets no argument, and no endpoint to inherit from its node."""
    assert engine_otel_args(settings(Config(), {})) == ([], {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": ""})


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_engines_span_hangs_under_ours(protocol: str) -> None:
    """vLLM's own tracing, given our arguments and headers, sends its span under our request's."""
    pytest.importorskip("vllm.tracing")
    program = """
import json, sys
from vllm import tracing
endpoint, headers = sys.argv[2], json.loads(sys.argv[3])
tracing.init_tracer("vllm.llm_engine", endpoint)
context = tracing.extract_trace_context(tracing.extract_trace_headers(headers))
tracing.instrument_manual("llm_request", 1, context=context, kind=tracing.SpanKind.SERVER)
"""
    with OtlpReceiver() if protocol == HTTP else GrpcOtlpReceiver() as receiver:
        environ = {BASE: receiver.url, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
        telemetry = build(environ)
        request = telemetry.request(CHAT, "qwen", [SAMPLED])
        headers = {name.decode(): value.decode() for name, value in request.inject([SAMPLED])}
        request.ended(200, None)
        argv, env = engine_otel_args(settings(Config(), environ))
        subprocess.run(
            [sys.executable, "-c", program, *argv, json.dumps(headers)],
            env={**os.environ, **env}, check=True, timeout=240, capture_output=True,
        )  # fmt: skip
        telemetry.shutdown()
        engine = receiver.received.span("llm_request")
        root = receiver.received.span(f"POST {CHAT}")
        assert (engine.trace_id, engine.parent_id) == (TRACE_ID, root.span_id)
        assert engine.resource["service.name"] == "relight-engine"


def test_the_readme_has_every_metric_with_its_labels() -> None:
    listed = {}
    for line in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `relight_"):
            names, labels = (re.findall("`([a-z_]+)`", cell) for cell in line.split("|")[1:3])
            listed |= dict.fromkeys(names, labels)
    assert listed == {metric.prometheus: [label for label, _ in metric.labels] for metric in tel.METRICS}
