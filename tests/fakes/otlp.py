"""OTLP receivers for tests: they decode the protobuf that arrives and offer its spans and metric points."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

Attributes = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Event:
    """A span's event; `time_ns` is Unix time."""

    name: str
    time_ns: int
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Span:
    """A span as it came over the wire; ids in lower-case hex, times in Unix nanoseconds."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str  # "" for a root
    kind: int  # 1 internal, 2 server
    start_ns: int
    end_ns: int
    attributes: Attributes
    events: tuple[Event, ...]
    status: int  # 0 unset, 1 ok, 2 error
    status_message: str
    trace_state: str
    resource: Attributes


@dataclass(frozen=True, slots=True)
class Point:
    """One data point: `value` of a counter or gauge; `count`, `sum`, `bounds`, `buckets` of a histogram."""

    name: str
    unit: str
    attributes: Attributes
    resource: Attributes
    value: float | None = None
    count: int = 0
    sum: float = 0.0
    bounds: tuple[float, ...] = ()
    buckets: tuple[int, ...] = ()
    exemplar_trace_ids: tuple[str, ...] = ()


@dataclass(slots=True)
class Received:
    """What has arrived so far; safe to read while more arrives."""

    requests: list[tuple[str, Mapping[str, str]]] = field(
        default_factory=list
    )  # (path, headers in lower case)
    spans: list[Span] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    def span(self, name: str) -> Span:
        """The one span of that name; fails when there is none or more than one."""
        (span,) = [span for span in self.spans if span.name == name]
        return span

    def children(self, parent: Span) -> list[Span]:
        """The spans right under `parent`, by start."""
        found = [s for s in self.spans if s.parent_id == parent.span_id and s.trace_id == parent.trace_id]
        return sorted(found, key=lambda span: span.start_ns)

    def point(self, name: str, **attributes: Any) -> Point:
        """The newest point of that name with these attributes (write `.` as `__`), others disregarded."""
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}
        found = [p for p in self.points if p.name == name and wanted.items() <= p.attributes.items()]
        assert found, (
            f"no point {name} with {wanted}; there are {[(p.name, p.attributes) for p in self.points]}"
        )
        return found[-1]

    def add_traces(self, request: ExportTraceServiceRequest) -> None:
        """Take in one decoded export of spans."""
        for resource_spans in request.resource_spans:
            resource = _attributes(resource_spans.resource.attributes)
            for scope in resource_spans.scope_spans:
                self.spans.extend(_span(span, resource) for span in scope.spans)

    def add_metrics(self, request: ExportMetricsServiceRequest) -> None:
        """Take in one decoded export of metrics."""
        for resource_metrics in request.resource_metrics:
            resource = _attributes(resource_metrics.resource.attributes)
            for scope in resource_metrics.scope_metrics:
                for metric in scope.metrics:
                    self.points.extend(_points(metric, resource))


class OtlpReceiver:
    """OTLP over HTTP on 127.0.0.1, at `url`; a context manager.

    `hang()` makes every later export wait until the receiver closes: a collector that never answers.
    """

    def __init__(self) -> None:
        self.received = Received()
        self.arrived = threading.Event()  # an export has begun
        self._hanging = False
        self._release = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.arrived.set()
                if receiver._hanging:
                    receiver._release.wait(60)
                    return
                answer = receiver._take(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                self.send_response(200 if answer is not None else 404)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer or b"")))
                self.end_headers()
                self.wfile.write(answer or b"")

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def hang(self) -> None:
        """From now on, accept exports and never answer."""
        self._hanging = True

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _take(self, path: str, headers: Mapping[str, str], body: bytes) -> bytes | None:
        self.received.requests.append((path, headers))
        if headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        assert headers["content-type"] == "application/x-protobuf"
        if path.endswith("/v1/traces"):
            self.received.add_traces(ExportTraceServiceRequest.FromString(body))
            return ExportTraceServiceResponse().SerializeToString()
        if path.endswith("/v1/metrics"):
            self.received.add_metrics(ExportMetricsServiceRequest.FromString(body))
            return ExportMetricsServiceResponse().SerializeToString()
        return None


class GrpcOtlpReceiver:
    """OTLP over gRPC on 127.0.0.1, at `url`; a context manager. Needs grpcio."""

    def __init__(self) -> None:
        import grpc

        self.received = Received()

        def traces(request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
            self._note("traces", context)
            self.received.add_traces(request)
            return ExportTraceServiceResponse()

        def metrics(request: ExportMetricsServiceRequest, context: Any) -> ExportMetricsServiceResponse:
            self._note("metrics", context)
            self.received.add_metrics(request)
            return ExportMetricsServiceResponse()

        self._server = grpc.server(ThreadPoolExecutor(2))
        for service, call, request in (
            ("trace.v1.TraceService", traces, ExportTraceServiceRequest),
            ("metrics.v1.MetricsService", metrics, ExportMetricsServiceRequest),
        ):
            method = grpc.unary_unary_rpc_method_handler(
                call,
                request_deserializer=request.FromString,
                response_serializer=lambda answer: answer.SerializeToString(),
            )
            self._server.add_generic_rpc_handlers(
                (
                    grpc.method_handlers_generic_handler(
                        f"opentelemetry.proto.collector.{service}", {"Export": method}
                    ),
                )
            )
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def _note(self, path: str, context: Any) -> None:
        self.received.requests.append((path, dict(context.invocation_metadata())))

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()


def _value(any_value: Any) -> Any:
    kind = any_value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in any_value.array_value.values]
    return getattr(any_value, kind)


def _attributes(pairs: Iterable[Any]) -> Attributes:
    return {pair.key: _value(pair.value) for pair in pairs}


def _span(span: Any, resource: Attributes) -> Span:
    return Span(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        kind=span.kind,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events=tuple(Event(e.name, e.time_unix_nano, _attributes(e.attributes)) for e in span.events),
        status=span.status.code,
        status_message=span.status.message,
        trace_state=span.trace_state,
        resource=resource,
    )


def _points(metric: Any, resource: Attributes) -> Iterable[Point]:
    data = getattr(metric, metric.WhichOneof("data"))
    for point in data.data_points:
        common = (metric.name, metric.unit, _attributes(point.attributes), resource)
        if metric.HasField("histogram"):
            yield Point(
                *common,
                count=point.count,
                sum=point.sum,
                bounds=tuple(point.explicit_bounds),
                buckets=tuple(point.bucket_counts),
                exemplar_trace_ids=tuple(exemplar.trace_id.hex() for exemplar in point.exemplars),
            )
        else:
            yield Point(*common, value=getattr(point, point.WhichOneof("value")))
