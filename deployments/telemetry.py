"""Traces and metrics of a request, from the client's traceparent down to the engine's own spans.

Two independent outlets, each off or on:

- **Prometheus text**, on by default: counted with `prometheus_client` in a registry of our own. No exporter,
  no thread, no OpenTelemetry SDK in memory.
- **OTLP** (traces, metrics, or both), off by default: on when the standard `OTEL_*` variables or the fleet
  file ask for it. Providers are our own and never set as globals, because Ray and vLLM may bring theirs.

Both outlets hold the same metrics. In Prometheus they carry short labels (`model`, `route`, `status`); over
OTLP the names and attributes are OpenTelemetry's where a convention exists (`http.server.request.duration`,
`gen_ai.request.model`, `http.route`) and `relight.*` where none does; see `METRICS`.

Nothing here raises into a request, and nothing waits for a collector: spans and metrics leave on the SDK's
own threads, from a queue that drops its oldest entries when it is full.

A process that forks engines (the engine host's template) must not build a `Telemetry` with OTLP on: the SDK
starts its export threads anew in every child.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast
from urllib.parse import unquote

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.metrics.export import MetricExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.sdk.trace.sampling import Sampler
    from opentelemetry.trace import Span, Tracer

    from deployments.gateway.engines import ColdStart

log = logging.getLogger(__name__)
T = TypeVar("T")

Headers = Sequence[tuple[bytes, bytes]]
Label = str | int | bool
Labels = tuple[Label, ...]

PROMETHEUS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of what `Telemetry.prometheus` returns."""

_CHAT = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/messages",
    "/cohere/v2/chat",
)
_TEXT = ("/v1/completions", "/inference/v1/generate")
_EMBEDDINGS = ("/v1/embeddings", "/v2/embed")
_NAMELESS = (  # the conventions have no operation for these
    "/v1/*",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/chat/completions/derender",
    "/v1/chat/completions/render",
    "/v1/completions/derender",
    "/v1/completions/render",
    "/v1/messages/count_tokens",
    "/v1/messages/render",
    "/v1/rerank",
    "/v1/responses/render",
    "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/cancel",
    "/v1/score",
    "/v2/rerank",
    "/classify",
    "/cohere/v2/chat/render",
    "/detokenize",
    "/generative_scoring",
    "/pooling",
    "/rerank",
    "/score",
    "/tokenize",
)
ROUTES: Mapping[str, str | None] = {
    **dict.fromkeys(_CHAT, "chat"),
    **dict.fromkeys(_TEXT, "text_completion"),
    **dict.fromkeys(_EMBEDDINGS, "embeddings"),
    **dict.fromkeys(_NAMELESS),
}
"""The gateway's route templates, each with its `gen_ai.operation.name`.

All else is counted as "other", so that no client can make up time series.
"""
_METHODS: Mapping[str, str] = {**dict.fromkeys(ROUTES, "POST"), "/v1/responses/{response_id}": "GET"}
OTHER = "other"

BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
"""Upper bounds in seconds, for all histograms: a warm first byte takes milliseconds, a cold one minutes."""

_MAX_MODELS = 1024
_MAX_VALUES = 32  # of any other label: kinds, phases, reasons
_MAX_COLD_STARTS = 4096  # remembered, so that ten requests that waited for one engine count one cold start
_SHUTDOWN_S = 5.0

# ----------------------------------------------------------------------------------------------------------
# Settings


class TelemetryConfig(Protocol):
    """The fleet file's `telemetry` section, taken by its shape."""

    @property
    def enabled(self) -> bool | None:
        """True: OTLP on; False: off whatever the environment says; None: the environment decides."""
        ...

    @property
    def service_name(self) -> str: ...

    @property
    def otlp_endpoint(self) -> str | None:
        """Base URL of the collector, as `OTEL_EXPORTER_OTLP_ENDPOINT`, which wins over it."""
        ...

    @property
    def prometheus(self) -> bool: ...


Protocols = Literal["http/protobuf", "grpc"]


@dataclass(frozen=True, slots=True)
class SignalSettings:
    """Where one signal (traces or metrics) goes."""

    endpoint: str  # full URL as the exporter takes it: with /v1/traces for HTTP, with a scheme for gRPC
    protocol: Protocols
    headers: str = field(default="", repr=False)  # k=v,k2=v2 as in the variable; may hold a token


@dataclass(frozen=True, slots=True)
class TelemetrySettings:
    """What is on, and where it goes. A value: can be pickled to another process.

    `warnings` says, one sentence each, which variables could not be honoured.
    """

    traces: SignalSettings | None = None
    metrics: SignalSettings | None = None
    prometheus: bool = True
    service_name: str = "relight"
    resource: Mapping[str, str] = field(default_factory=dict)  # OTEL_RESOURCE_ATTRIBUTES without service.name
    sampler: str = "parentbased_always_on"
    sampler_ratio: float = 1.0
    warnings: tuple[str, ...] = ()


_SAMPLERS = (
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
)
_DEFAULT_ENDPOINTS: dict[Protocols, str] = {
    "http/protobuf": "http://localhost:4318",
    "grpc": "http://localhost:4317",
}


def settings(config: TelemetryConfig, environ: Mapping[str, str]) -> TelemetrySettings:
    """Decide what is on. Pure; never raises: a variable that can't be honoured becomes a warning.

    Precedence: `OTEL_SDK_DISABLED=true`, then `config.enabled`, then the environment. A signal is on when
    `config.enabled` is true, or its endpoint is known, or its exporter is named `otlp`;
    `OTEL_*_EXPORTER=none` turns that signal off in every case. Where the fleet file and a variable name the
    same thing, the variable wins. Variables not read here (timeouts, compression, certificates, batch sizes,
    `OTEL_METRIC_EXPORT_INTERVAL`) are read by the SDK itself.
    """
    env = {key: value.strip() for key, value in environ.items() if key.startswith("OTEL_") and value.strip()}
    warnings: list[str] = []
    resource = _pairs(env.get("OTEL_RESOURCE_ATTRIBUTES", ""), "OTEL_RESOURCE_ATTRIBUTES", warnings)
    named = resource.pop("service.name", None)
    service_name = env.get("OTEL_SERVICE_NAME") or named or config.service_name

    sampler = env.get("OTEL_TRACES_SAMPLER", "parentbased_always_on").lower()
    if sampler not in _SAMPLERS:
        warnings.append(f"OTEL_TRACES_SAMPLER={sampler!r} is unknown; using parentbased_always_on")
        sampler = "parentbased_always_on"
    ratio = 1.0
    if sampler.endswith("traceidratio") and (argument := env.get("OTEL_TRACES_SAMPLER_ARG")):
        try:
            ratio = float(argument)
        except ValueError:
            ratio = math.nan
        if not 0 <= ratio <= 1:
            warnings.append(f"OTEL_TRACES_SAMPLER_ARG={argument!r} is not a number from 0 to 1; using 1")
            ratio = 1.0

    exporters = {
        name: env.get(f"OTEL_{name}_EXPORTER", "").lower().replace(",", " ").split()
        for name in ("TRACES", "METRICS")
    }
    disabled = env.get("OTEL_SDK_DISABLED", "").lower() == "true" or config.enabled is False

    def signal(name: str, path: str) -> SignalSettings | None:
        wanted = exporters[name]
        for other in wanted:
            if other not in ("otlp", "none", "prometheus"):
                warnings.append(f"OTEL_{name}_EXPORTER={other!r} is not supported; use otlp or none")
        if disabled or (wanted and "otlp" not in wanted):
            return None
        own = env.get(f"OTEL_EXPORTER_OTLP_{name}_ENDPOINT")
        base = env.get("OTEL_EXPORTER_OTLP_ENDPOINT") or config.otlp_endpoint
        if not (config.enabled or own or base or wanted):
            return None
        prefix = f"OTEL_EXPORTER_OTLP_{name}"
        protocol = env.get(f"{prefix}_PROTOCOL") or env.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
        if protocol not in ("http/protobuf", "grpc"):
            warnings.append(f"OTLP protocol {protocol!r} is not supported; using http/protobuf")
            protocol = "http/protobuf"
        protocol = cast("Protocols", protocol)
        endpoint = own or base or _DEFAULT_ENDPOINTS[protocol]
        if "://" not in endpoint:
            # gRPC's own rule is TLS unless told otherwise. Written out: vLLM takes the opposite default.
            insecure = env.get(f"{prefix}_INSECURE") or env.get("OTEL_EXPORTER_OTLP_INSECURE", "false")
            secure = protocol == "grpc" and insecure.lower() != "true"
            endpoint = f"{'https' if secure else 'http'}://{endpoint}"
        if protocol == "http/protobuf" and not own:
            endpoint = f"{endpoint.rstrip('/')}/{path}"
        headers = env.get(f"{prefix}_HEADERS") or env.get("OTEL_EXPORTER_OTLP_HEADERS", "")
        return SignalSettings(endpoint, protocol, headers)

    return TelemetrySettings(
        traces=signal("TRACES", "v1/traces"),
        metrics=signal("METRICS", "v1/metrics"),
        prometheus=config.prometheus or "prometheus" in exporters["METRICS"],
        service_name=service_name,
        resource=resource,
        sampler=sampler,
        sampler_ratio=ratio,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _pairs(text: str, variable: str, warnings: list[str]) -> dict[str, str]:
    """`k=v,k2=v2`, percent-decoded. A malformed pair becomes a warning."""
    pairs: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, found, value = item.partition("=")
        if found and key.strip():
            pairs[unquote(key.strip())] = unquote(value.strip())
        else:
            warnings.append(f"{variable}: {item!r} is not key=value")
    return pairs


def engine_otel_args(settings: TelemetrySettings) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment for a vLLM server whose spans go to our collector, under our request's span.

    vLLM continues the trace of each request's `traceparent` header (`RequestTelemetry.inject` writes it) and
    names its span `llm_request`. What it takes, as of 0.32: the endpoint as an argument, verbatim; the
    protocol from the *traces* variable alone, gRPC if unset; all else from the SDK's variables. It refuses
    the argument unless both OTLP exporters are importable, gRPC's and HTTP's; its own wheels depend on both.
    Without traces, the endpoint variable is blanked: vLLM's workers would export from an inherited one.
    """
    traces = settings.traces
    if traces is None:
        return [], {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": ""}
    env = {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": traces.protocol,
        "OTEL_SERVICE_NAME": f"{settings.service_name}-engine",
        "OTEL_TRACES_SAMPLER": settings.sampler,
    }
    if settings.sampler.endswith("traceidratio"):
        env["OTEL_TRACES_SAMPLER_ARG"] = str(settings.sampler_ratio)
    if settings.resource:
        env["OTEL_RESOURCE_ATTRIBUTES"] = ",".join(
            f"{key}={_quote(value)}" for key, value in settings.resource.items()
        )
    if traces.headers:
        env["OTEL_EXPORTER_OTLP_TRACES_HEADERS"] = traces.headers
    return ["--otlp-traces-endpoint", traces.endpoint], env


def _quote(value: str) -> str:
    return value.replace("%", "%25").replace(",", "%2C").replace("=", "%3D")


# ----------------------------------------------------------------------------------------------------------
# Metrics


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """One metric under both its names. `labels` are pairs of Prometheus label and OpenTelemetry attribute."""

    prometheus: str
    otel: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str  # UCUM
    description: str
    labels: tuple[tuple[str, str], ...]


_MODEL = ("model", "gen_ai.request.model")
_HTTP = (_MODEL, ("route", "http.route"), ("status", "http.response.status_code"))
_KIND = (_MODEL, ("kind", "relight.cold_start.kind"))

REQUESTS = Metric(
    "relight_requests_total", "relight.requests", "counter", "{request}",
    "Requests answered, by HTTP status.", _HTTP,
)  # fmt: skip
REQUEST_DURATION = Metric(
    "relight_request_duration_seconds", "http.server.request.duration", "histogram", "s",
    "From the request's arrival to the last byte of its answer, waiting included.", _HTTP,
)  # fmt: skip
TIME_TO_FIRST_BYTE = Metric(
    "relight_time_to_first_byte_seconds", "relight.time_to_first_byte", "histogram", "s",
    "From the request's arrival to the first byte of its answer, waiting included.", _HTTP[:2],
)  # fmt: skip
WAIT = Metric(
    "relight_wait_seconds", "relight.wait", "histogram", "s",
    "How long requests waited for an engine; cold says whether one had to be started.",
    (_MODEL, ("cold", "relight.cold")),
)  # fmt: skip
QUEUE_DEPTH = Metric(
    "relight_queue_depth", "relight.queue_depth", "gauge", "{request}",
    "Requests held in this gateway for want of an engine.", (_MODEL,),
)  # fmt: skip
IN_FLIGHT = Metric(
    "relight_in_flight", "relight.in_flight", "gauge", "{request}",
    "Requests of this gateway that an engine is answering.", (_MODEL,),
)  # fmt: skip
COLD_STARTS = Metric(
    "relight_cold_starts_total", "relight.cold_starts", "counter", "{cold_start}",
    "Engine starts that a request of this gateway waited for, by kind.", _KIND,
)  # fmt: skip
COLD_START = Metric(
    "relight_cold_start_seconds", "relight.cold_start", "histogram", "s",
    "From the first phase of an engine's start to its health check's answer.", _KIND,
)  # fmt: skip
COLD_START_PHASE = Metric(
    "relight_cold_start_phase_seconds", "relight.cold_start_phase", "histogram", "s",
    "Length of one phase of an engine's start; phases overlap.",
    (_MODEL, ("phase", "relight.cold_start.phase")),
)  # fmt: skip
RETRIES = Metric(
    "relight_retries_total", "relight.retries", "counter", "{retry}",
    "Requests sent again because no engine had begun to answer.",
    (_MODEL, ("reason", "relight.retry.reason")),
)  # fmt: skip
METRICS = (
    REQUESTS, REQUEST_DURATION, TIME_TO_FIRST_BYTE, WAIT, QUEUE_DEPTH, IN_FLIGHT,
    COLD_STARTS, COLD_START, COLD_START_PHASE, RETRIES,
)  # fmt: skip


class _Outlet(Protocol):
    def record(self, metric: Metric, value: float, labels: Labels, context: Context | None) -> None:
        """Add to a counter, set a gauge, observe in a histogram. `labels` in the order of `metric.labels`."""
        ...


class _Prometheus:
    """The metrics in a registry of our own."""

    def __init__(self, service_name: str, role: str, instance: str) -> None:
        import prometheus_client as prom

        self._registry = prom.CollectorRegistry(auto_describe=False)
        # As OpenTelemetry's own exporter does: who this is stands in one series, not on every one.
        target = prom.Gauge(
            "target_info",
            "The process behind these metrics.",
            ("service_name", "service_instance_id", "relight_role"),
            registry=self._registry,
        )
        target.labels(service_name, instance, role).set(1)
        self._metrics: dict[Metric, Any] = {}
        for metric in METRICS:
            names = [name for name, _ in metric.labels]
            kinds: dict[str, Callable[..., Any]] = {
                "counter": prom.Counter,
                "gauge": prom.Gauge,
                "histogram": prom.Histogram,
            }
            options = {"buckets": BUCKETS_S} if metric.kind == "histogram" else {}
            self._metrics[metric] = kinds[metric.kind](
                metric.prometheus, metric.description, names, registry=self._registry, **options
            )

    def record(self, metric: Metric, value: float, labels: Labels, context: Context | None) -> None:
        texts = [str(label).lower() if isinstance(label, bool) else str(label) for label in labels]
        child = self._metrics[metric].labels(*texts)
        if metric.kind == "counter":
            child.inc(value)
        elif metric.kind == "gauge":
            child.set(value)
        else:
            child.observe(value)

    def collect(self) -> Any:
        """The registry's families without `_created` samples, which add series and tell nothing here."""
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family

    def text(self) -> bytes:
        from prometheus_client import exposition

        return exposition.generate_latest(cast("Any", self))


class _Otlp:
    """The metrics in a `MeterProvider` of our own."""

    def __init__(self, exporter: MetricExporter, resource: Resource) -> None:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View

        self.provider = MeterProvider(
            metric_readers=[PeriodicExportingMetricReader(exporter)],
            resource=resource,
            views=[
                View(
                    instrument_name=metric.otel,
                    aggregation=ExplicitBucketHistogramAggregation(boundaries=BUCKETS_S),
                )
                for metric in METRICS
                if metric.kind == "histogram"
            ],
            shutdown_on_exit=False,  # its own wait is 30 s; ours is bounded by `Telemetry.shutdown`
        )
        meter = self.provider.get_meter("relight", _version())
        self._record: dict[Metric, Callable[..., None]] = {}
        for metric in METRICS:
            about = (metric.otel, metric.unit, metric.description)
            if metric.kind == "counter":
                self._record[metric] = meter.create_counter(*about).add
            elif metric.kind == "gauge":
                self._record[metric] = meter.create_gauge(*about).set
            else:
                self._record[metric] = meter.create_histogram(*about).record

    def record(self, metric: Metric, value: float, labels: Labels, context: Context | None) -> None:
        attributes = {attribute: label for (_, attribute), label in zip(metric.labels, labels, strict=True)}
        if metric is REQUEST_DURATION:  # the convention requires it; in Prometheus the route says as much
            attributes["http.request.method"] = _METHODS.get(str(attributes["http.route"]), "_OTHER")
        # The context makes exemplars: from a slow bucket to a trace that was slow.
        self._record[metric](value, attributes, context=context)


class _Bounded:
    """Lets the first `limit` distinct values through and turns all others into "other"."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._seen:
            return value
        if len(self._seen) >= self._limit:
            return OTHER
        self._seen.add(value)
        return value


# ----------------------------------------------------------------------------------------------------------
# One request


class RequestTelemetry:
    """What happens to one request. This base class is the one for when all is off: it does nothing.

    One caller at a time; no method raises or blocks.
    """

    __slots__ = ()

    def inject(self, headers: Headers) -> Headers:
        """The headers for the engine: our span's traceparent and tracestate in place of the client's.

        All other headers, baggage among them, stay as they are; with traces off, traceparent too.
        """
        return headers

    def wait_ended(self, seconds: float, cold_start: ColdStart | None) -> None:
        """The wait for an engine is over; `cold_start` only if the request waited for that very start."""

    def retried(self, reason: str) -> None:
        """The request goes to another engine. `reason` is a short code, such as `engine_unreachable`."""

    def first_byte(self) -> None:
        """The answer's first byte goes to the client. Only the first call counts."""

    def ended(self, status: int, error: str | None) -> None:
        """The answer is complete. `error` is a code (`errors.RelightError.code`), even if a 200 broke off.

        Only the first call counts.
        """


_NOTHING = RequestTelemetry()


class _Request(RequestTelemetry):
    """A request that is measured, and traced if there is a tracer."""

    __slots__ = (
        "_context",
        "_ended",
        "_first_byte",
        "_model",
        "_offset_ns",
        "_owner",
        "_route",
        "_span",
        "_start_ns",
    )

    def __init__(self, owner: Telemetry, route: str, model_id: str, headers: Headers) -> None:
        self._owner = owner
        self._route = route if route in ROUTES else OTHER
        self._model = model_id
        self._start_ns = owner.wall_ns()
        self._offset_ns = self._start_ns - owner.monotonic_ns()
        self._first_byte = False
        self._ended = False
        self._span: Span | None = None
        self._context: Context | None = None
        if owner.tracer is not None:
            self._open(owner.tracer, headers)

    def _open(self, tracer: Tracer, headers: Headers) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context

        parent = _extract(headers)
        method = _METHODS.get(self._route, "_OTHER")
        attributes: dict[str, Label] = {
            "http.request.method": method,
            "http.route": self._route,
            "gen_ai.request.model": self._model,
            "relight.role": self._owner.role,
        }
        if operation := ROUTES.get(self._route):
            attributes["gen_ai.operation.name"] = operation
        self._span = tracer.start_span(
            f"{method} {self._route}",
            context=parent,
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=self._start_ns,
        )
        self._context = set_span_in_context(self._span, parent)

    def _now_ns(self) -> int:
        # Arrival on the wall clock plus what passed on the monotonic one: a clock step can't go backwards.
        return self._offset_ns + self._owner.monotonic_ns()

    def _elapsed_s(self) -> float:
        return (self._now_ns() - self._start_ns) / 1e9

    def _record(self, metric: Metric, value: float, *labels: Label) -> None:
        self._owner.record(metric, value, (self._owner.model(self._model), *labels), self._context)

    def inject(self, headers: Headers) -> Headers:
        if self._span is None:
            return headers
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, self._context)
        kept = [header for header in headers if header[0].lower() not in (b"traceparent", b"tracestate")]
        return kept + [(name.encode(), value.encode("latin-1")) for name, value in carrier.items()]

    def wait_ended(self, seconds: float, cold_start: ColdStart | None) -> None:
        seconds = max(seconds, 0.0)
        self._record(WAIT, seconds, cold_start is not None)
        if cold_start is not None:
            self._owner.cold_started(self._model, cold_start, self._context)
        if self._span is not None and self._span.is_recording() and self._owner.tracer is not None:
            self._trace_wait(self._owner.tracer, seconds, cold_start)

    def _trace_wait(self, tracer: Tracer, seconds: float, cold_start: ColdStart | None) -> None:
        from opentelemetry.trace import set_span_in_context

        now_ns = self._now_ns()
        attributes: dict[str, Label] = {
            "gen_ai.request.model": self._model,
            "relight.cold": cold_start is not None,
        }
        if cold_start is not None:
            attributes["relight.cold_start.kind"] = cold_start.kind
            attributes["relight.engine.id"] = cold_start.engine_id
        wait = tracer.start_span(
            "relight.wait", context=self._context, attributes=attributes, start_time=now_ns - _ns(seconds)
        )
        if cold_start is not None:
            context = set_span_in_context(wait, self._context)
            wait.add_event("relight.engine.ready", timestamp=_ns(cold_start.ready_s))
            for phase in cold_start.phases:
                # On its own clock and untrimmed: it may have begun before this request, or go on after it.
                span = tracer.start_span(
                    f"relight.cold_start.{phase.name}",
                    context=context,
                    attributes={
                        "gen_ai.request.model": self._model,
                        "relight.cold_start.phase": phase.name,
                        "relight.cold_start.kind": cold_start.kind,
                        "relight.engine.id": cold_start.engine_id,
                    },
                    start_time=_ns(phase.start_s),
                )
                span.end(_ns(phase.start_s) + _ns(max(phase.duration_s, 0.0)))
        wait.end(now_ns)

    def retried(self, reason: str) -> None:
        reason = self._owner.value("reason", reason)
        self._record(RETRIES, 1, reason)
        if self._span is not None:
            self._span.add_event("relight.retry", {"relight.retry.reason": reason}, self._now_ns())

    def first_byte(self) -> None:
        if self._first_byte:
            return
        self._first_byte = True
        self._record(TIME_TO_FIRST_BYTE, self._elapsed_s(), self._route)
        if self._span is not None:
            self._span.add_event("relight.first_byte", timestamp=self._now_ns())

    def ended(self, status: int, error: str | None) -> None:
        if self._ended:
            return
        self._ended = True
        self._record(REQUESTS, 1, self._route, status)
        self._record(REQUEST_DURATION, self._elapsed_s(), self._route, status)
        if self._span is None:
            return
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("http.response.status_code", status)
        if error or status >= 500:
            self._span.set_attribute("error.type", error or str(status))
        # 4xx is the client's error and not this span's; an error after a 2xx is an answer that broke off.
        if status >= 500 or (error and status < 400):
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(self._now_ns())


def _ns(seconds: float) -> int:
    whole = int(seconds)  # apart from the fraction: Unix time in nanoseconds is past a float's 53 bits
    return whole * 1_000_000_000 + round((seconds - whole) * 1e9)


def _extract(headers: Headers) -> Context:
    """The client's trace context, on an empty one: a span that happens to be current here is no parent."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parents = [value.decode("latin-1") for name, value in headers if name.lower() == b"traceparent"]
    states = [value.decode("latin-1") for name, value in headers if name.lower() == b"tracestate"]
    if len(parents) != 1:  # two are as good as none (W3C Trace Context, 3.2)
        return Context()
    carrier = {"traceparent": parents[0], "tracestate": ",".join(states)}
    return TraceContextTextMapPropagator().extract(carrier, Context())


# ----------------------------------------------------------------------------------------------------------
# One process


class Telemetry:
    """The traces and metrics of one process; made by `build_telemetry`.

    Every method may be called from any thread or event loop; only `shutdown` and `force_flush` block.
    """

    def __init__(
        self,
        *,
        role: str,
        outlets: Sequence[_Outlet] = (),
        tracer: Tracer | None = None,
        prometheus: _Prometheus | None = None,
        providers: Sequence[Any] = (),
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.role = role
        self.tracer = tracer
        self.wall_ns = wall_ns
        self.monotonic_ns = monotonic_ns
        self._outlets = tuple(outlets)
        self._prometheus = prometheus
        self._providers = list(providers)
        self.model = _Bounded(_MAX_MODELS)
        self._values: dict[str, _Bounded] = {}
        self._cold_starts: OrderedDict[tuple[str, str, float], None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def enabled(self) -> bool:
        """Whether anything is recorded at all."""
        return self.tracer is not None or bool(self._outlets)

    def request(self, route: str, model_id: str, headers: Headers) -> RequestTelemetry:
        """A request has arrived. `route` is one of `ROUTES`; `model_id` an id of the fleet."""
        if not self.enabled:
            return _NOTHING
        return _Request(self, route, model_id, headers)

    def queue(self, model_id: str, queued: int, in_flight: int) -> None:
        """How many requests of a model this gateway holds, and how many an engine is answering."""
        if self._outlets:
            labels = (self.model(model_id),)
            self.record(QUEUE_DEPTH, queued, labels, None)
            self.record(IN_FLIGHT, in_flight, labels, None)

    def cold_started(self, model_id: str, cold_start: ColdStart, context: Context | None = None) -> None:
        """Count an engine's start, once however many requests waited for it.

        Once in each process: over several gateways that waited for the same engine, the sum is larger.
        """
        # With the time: an engine may be parked and adopted again.
        key = (model_id, cold_start.engine_id, cold_start.ready_s)
        with self._lock:
            if key in self._cold_starts:
                return
            self._cold_starts[key] = None
            if len(self._cold_starts) > _MAX_COLD_STARTS:
                self._cold_starts.popitem(last=False)
        model = self.model(model_id)
        kind = self.value("kind", cold_start.kind)
        self.record(COLD_STARTS, 1, (model, kind), context)
        if cold_start.phases:
            began_s = min(phase.start_s for phase in cold_start.phases)
            self.record(COLD_START, max(cold_start.ready_s - began_s, 0.0), (model, kind), context)
        for phase in cold_start.phases:
            labels = (model, self.value("phase", phase.name))
            self.record(COLD_START_PHASE, max(phase.duration_s, 0.0), labels, context)

    def prometheus(self) -> bytes | None:
        """All metrics as Prometheus text (`PROMETHEUS_CONTENT_TYPE`); None when the fleet file says so."""
        return None if self._prometheus is None else self._prometheus.text()

    def force_flush(self, timeout_s: float = _SHUTDOWN_S) -> bool:
        """Send what is queued; false if that took longer than `timeout_s`. Blocks."""
        timeout_ms = int(timeout_s * 1000)
        return _bounded(
            [partial(provider.force_flush, timeout_ms) for provider in self._providers], timeout_s
        )

    def shutdown(self, timeout_s: float = _SHUTDOWN_S) -> None:
        """Send what is queued and stop, within `timeout_s` even if the collector hangs. Blocks; idempotent.

        From an event loop, call it through `asyncio.to_thread`. Prometheus text stays readable.
        """
        providers, self._providers = self._providers, []
        if not _bounded([provider.shutdown for provider in providers], timeout_s):
            log.warning("telemetry: not all was sent within %.1f s; the rest is lost", timeout_s)

    # For _Request.

    def value(self, label: str, value: str) -> str:
        """A label's value, or "other" when there have been too many."""
        bounded = self._values.get(label)
        if bounded is None:
            bounded = self._values.setdefault(label, _Bounded(_MAX_VALUES))
        return bounded(value)

    def record(self, metric: Metric, value: float, labels: Labels, context: Context | None) -> None:
        """Record in every outlet."""
        for outlet in self._outlets:
            outlet.record(metric, value, labels, context)


def build_telemetry(
    config: TelemetryConfig,
    environ: Mapping[str, str],
    *,
    role: str,
    instance: str,
    wall_ns: Callable[[], int] = time.time_ns,
    monotonic_ns: Callable[[], int] = time.monotonic_ns,
) -> Telemetry:
    """The telemetry of this process. `role`: gateway, replica, host or controller; `instance`: a unique name.

    Never raises for want of a collector or an exporter: what can't be set up is logged and stays off.
    """
    chosen = settings(config, environ)
    for warning in chosen.warnings:
        log.warning("telemetry: %s", warning)
    outlets: list[_Outlet] = []
    providers: list[Any] = []
    tracer: Tracer | None = None
    prometheus: _Prometheus | None = None
    if chosen.prometheus:
        prometheus = _Prometheus(chosen.service_name, role, instance)
        outlets.append(prometheus)
    if chosen.traces is not None or chosen.metrics is not None:
        resource = _resource(chosen, role, instance)
        if chosen.traces is not None and (exporter := _exporter(_span_exporter, chosen.traces)):
            provider = _tracer_provider(exporter, resource, chosen)
            providers.append(provider)
            tracer = provider.get_tracer("relight", _version())
        if chosen.metrics is not None and (metric_exporter := _exporter(_metric_exporter, chosen.metrics)):
            otlp = _Otlp(metric_exporter, resource)
            providers.append(otlp.provider)
            outlets.append(otlp)
    return Telemetry(
        role=role,
        outlets=outlets,
        tracer=tracer,
        prometheus=prometheus,
        providers=providers,
        wall_ns=wall_ns,
        monotonic_ns=monotonic_ns,
    )


def _version() -> str:
    try:
        return metadata.version("relight")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "0"


def _resource(chosen: TelemetrySettings, role: str, instance: str) -> Resource:
    from opentelemetry.sdk.resources import Resource

    # Not Resource.create: it reads the process's environment again.
    return Resource(
        {
            **chosen.resource,
            "telemetry.sdk.language": "python",
            "telemetry.sdk.name": "opentelemetry",
            "telemetry.sdk.version": metadata.version("opentelemetry-sdk"),
            "service.name": chosen.service_name,
            "service.version": _version(),
            "service.instance.id": instance,
            "relight.role": role,
        }
    )


def _headers(signal: SignalSettings) -> dict[str, str] | None:
    from opentelemetry.util.re import parse_env_headers

    return dict(parse_env_headers(signal.headers, liberal=True)) or None


def _exporter(make: Callable[[SignalSettings], T], signal: SignalSettings) -> T | None:
    try:
        return make(signal)
    except Exception as error:  # noqa: BLE001 - exporters raise many kinds, and none is worth not serving for
        log.error("telemetry: can't export to %s: %s: %s", signal.endpoint, type(error).__name__, error)
        return None


def _span_exporter(signal: SignalSettings) -> SpanExporter:
    if signal.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

        return Grpc(endpoint=signal.endpoint, headers=_headers(signal))
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

    return Http(endpoint=signal.endpoint, headers=_headers(signal))


def _metric_exporter(signal: SignalSettings) -> MetricExporter:
    if signal.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as Grpc

        return Grpc(endpoint=signal.endpoint, headers=_headers(signal))
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as Http

    return Http(endpoint=signal.endpoint, headers=_headers(signal))


def _tracer_provider(exporter: SpanExporter, resource: Resource, chosen: TelemetrySettings) -> Any:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(sampler=_sampler(chosen), resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _sampler(chosen: TelemetrySettings) -> Sampler:
    from opentelemetry.sdk.trace import sampling

    kind = chosen.sampler.removeprefix("parentbased_")
    root: Sampler
    if kind == "traceidratio":
        root = sampling.TraceIdRatioBased(chosen.sampler_ratio)
    else:
        root = sampling.ALWAYS_OFF if kind == "always_off" else sampling.ALWAYS_ON
    return sampling.ParentBased(root) if chosen.sampler.startswith("parentbased_") else root


def _bounded(calls: Sequence[Callable[[], Any]], timeout_s: float) -> bool:
    """Run all calls side by side on daemon threads; false if one was not done in time, or failed.

    The SDK's own timeouts bound the wait for a lock, not for an export under way.
    """
    done: list[bool] = []

    def run(call: Callable[[], Any]) -> None:
        try:
            done.append(call() is not False)
        except Exception as error:  # noqa: BLE001 - the SDK raises bare Exception here
            log.warning("telemetry: %s", error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    deadline_s = time.monotonic() + timeout_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(deadline_s - time.monotonic(), 0.0))
    return len(done) == len(calls) and all(done)
