"""The wire: which routes there are, what a request's body says, which headers cross, and OpenAI's shapes."""

from __future__ import annotations

import difflib
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from deployments.errors import (
    InvalidRequest,
    ModelNotFound,
    NotFound,
    RelightError,
    UnsupportedMediaType,
)
from deployments.gateway.engines import ColdStart, Headers
from deployments.gateway.sse import Style

# ----------------------------------------------------------------------------------------------------- routes


@dataclass(frozen=True, slots=True)
class Route:
    """One proxied route. `template` names it in metrics and in the OpenAPI document."""

    template: str
    methods: tuple[str, ...] = ("POST",)
    style: Style = Style.CHAT
    streams: bool = False  # answers server-sent events when asked to
    multipart: bool = False  # also takes a form
    names_model: bool = True  # the body names the model


_STREAMS_CHAT = ("/v1/chat/completions", "/v1/completions", "/inference/v1/generate", "/cohere/v2/chat")
_PLAIN = (
    "/v1/chat/completions/batch",
    "/v1/chat/completions/render",
    "/v1/chat/completions/derender",
    "/v1/completions/render",
    "/v1/completions/derender",
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
    "/v2/embed",
    "/v2/rerank",
    "/cohere/v2/chat/render",
    "/classify",
    "/detokenize",
    "/generative_scoring",
    "/pooling",
    "/rerank",
    "/score",
    "/tokenize",
)

ROUTES: Mapping[str, Route] = {
    **{path: Route(path, streams=True) for path in _STREAMS_CHAT},
    **{path: Route(path) for path in _PLAIN},
    "/v1/responses": Route("/v1/responses", style=Style.RESPONSES, streams=True),
    "/v1/responses/render": Route("/v1/responses/render", style=Style.RESPONSES),
    "/v1/messages": Route("/v1/messages", style=Style.MESSAGES, streams=True),
    "/v1/messages/count_tokens": Route("/v1/messages/count_tokens", style=Style.MESSAGES),
    "/v1/messages/render": Route("/v1/messages/render", style=Style.MESSAGES),
    "/v1/audio/transcriptions": Route("/v1/audio/transcriptions", streams=True, multipart=True),
    "/v1/audio/translations": Route("/v1/audio/translations", streams=True, multipart=True),
}
"""vLLM's routes whose body names a model. Other paths under /v1/ pass too: see `match_route`."""

RETRIEVE_RESPONSE = Route(
    "/v1/responses/{response_id}", ("GET",), Style.RESPONSES, streams=True, names_model=False
)
CANCEL_RESPONSE = Route("/v1/responses/{response_id}/cancel", ("POST",), Style.RESPONSES, names_model=False)
_OTHER = Route("/v1/*")
_OTHER_FORM = Route("/v1/*", multipart=True)

# These change one engine of many, behind the back of those who decide which engine holds what.
_REFUSED = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
_RESPONSE = re.compile(r"/v1/responses/(?!render$)[^/]+")
_RESPONSE_CANCEL = re.compile(r"/v1/responses/[^/]+/cancel")
_FORMS = ("/v1/audio/", "/v1/images/")


def match_route(path: str) -> Route | None:
    """The proxied route of a decoded path, or None when the gateway answers it itself or nobody does."""
    if (route := ROUTES.get(path)) is not None:
        return route
    if (
        not path.startswith("/v1/")
        or path in _REFUSED
        or path.startswith("/v1/models/")
        or path == "/v1/models"
    ):
        return None
    if not path.removeprefix("/v1/") or any(part in (".", "..") for part in path.split("/")):
        return None  # a path that climbs would reach the engine's own controls
    if _RESPONSE.fullmatch(path):
        return RETRIEVE_RESPONSE
    if _RESPONSE_CANCEL.fullmatch(path):
        return CANCEL_RESPONSE
    return _OTHER_FORM if path.startswith(_FORMS) else _OTHER


# ----------------------------------------------------------------------------------------------------- bodies


@dataclass(frozen=True, slots=True)
class Asked:
    """What the gateway reads of a body."""

    model: str
    stream: bool


def read_body(route: Route, content_type: bytes, content_encoding: bytes, body: bytes) -> Asked:
    """`model` and `stream` of a JSON document or a form.

    Raises `UnsupportedMediaType`, and `InvalidRequest` when the body is malformed or names no model.
    """
    if content_encoding.strip().lower() not in (b"", b"identity"):
        raise UnsupportedMediaType(
            "Compressed request bodies are not taken; send it with no Content-Encoding."
        )
    media_type = content_type.split(b";", 1)[0].strip().lower()
    if media_type == b"application/json":
        return _read_json(route, body)
    if media_type == b"multipart/form-data" and route.multipart:
        return _read_form(content_type, body)
    raise UnsupportedMediaType(
        f"The content type of {route.template} is application/json"
        + (" or multipart/form-data" if route.multipart else "")
        + f", not {media_type[:100].decode('latin-1') or 'absent'}."
    )


def _read_json(route: Route, body: bytes) -> Asked:
    try:
        document = json.loads(body)
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, numbers of thousands of digits
        raise InvalidRequest(f"The body is not valid JSON: {_short(str(error))}") from None
    if not isinstance(document, dict):
        raise InvalidRequest("The body must be a JSON object.")
    if route.style is Style.RESPONSES and document.get("background") is True:
        # Nobody would wait for it, so that its engine ends with the answer unwritten.
        raise InvalidRequest(
            "`background` is not served: an engine lasts while somebody waits for it. Stream the response instead.",
            param="background",
        )
    # Only a true `true` lets the gateway answer with events early; what else means true is the engine's
    # affair.
    return Asked(_model_name(document.get("model")), document.get("stream") is True)


def _model_name(value: object) -> str:
    if value is None or value == "":
        raise InvalidRequest("You must name a model: the field `model` is missing.", param="model")
    if not isinstance(value, str):
        raise InvalidRequest(f"`model` must be a string, not {type(value).__name__}.", param="model")
    return value


def _read_form(content_type: bytes, body: bytes) -> Asked:
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise InvalidRequest("The form's content type has no boundary.")
    reader = _FormReader()
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest(f"The form is malformed: {_short(str(error))}") from None
    fields = reader.fields
    if b"model" not in fields:
        raise InvalidRequest("You must name a model: the field `model` is missing.", param="model")
    try:
        model = fields[b"model"].decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest("`model` must be UTF-8.", param="model") from None
    return Asked(_model_name(model), fields.get(b"stream", b"").strip().lower() in (b"true", b"1"))


class _FormReader:
    """Collects the short fields that the gateway reads; the file's bytes are walked over."""

    _WANTED = frozenset({b"model", b"stream"})
    _MAX_FIELD_BYTES = 4096

    def __init__(self) -> None:
        self.fields: dict[bytes, bytes] = {}
        self._header = b""
        self._value = b""
        self._name: bytes | None = None

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
        }

    def _begin(self) -> None:
        self._name = None
        self._header = self._value = b""

    def _field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.strip().lower() == b"content-disposition":
            name = parse_options_header(self._value)[1].get(b"name")
            if name in self._WANTED:
                self._name = name
                self.fields[name] = b""
        self._header = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name is not None and len(self.fields[self._name]) < self._MAX_FIELD_BYTES:
            self.fields[self._name] += data[start:end]


def model_not_found(name: str, known: Sequence[str]) -> ModelNotFound:
    """The error for a model that the fleet doesn't have, with the names nearest to it."""
    near = difflib.get_close_matches(name[:200], known, n=3, cutoff=0.4) or list(known[:5])
    shown = ", ".join(repr(id_) for id_ in near) or "none"
    return ModelNotFound(f"The model {_short(name, 200)!r} does not exist. Nearest: {shown}.", param="model")


def _short(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ---------------------------------------------------------------------------------------------------- headers

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"trailers",
        b"transfer-encoding",
        b"upgrade",
    }
)
# The gateway's own business: credentials are for it, encodings would hide errors in bodies, lengths are set
# anew, and which pages may read answers it says itself (an engine that sees an origin allows all).
_NOT_FORWARDED = _HOP_BY_HOP | {
    b"accept-encoding",
    b"api-key",
    b"authorization",
    b"content-length",
    b"cookie",
    b"expect",
    b"host",
    b"origin",
    b"x-api-key",
    b"x-relight-model",
    b"x-request-id",
    b"x-request-timeout-seconds",
}
OWN_HEADERS = (
    "X-Request-Id",
    "X-Relight-Model",
    "X-Relight-Cold-Start",
    "X-Relight-Wait-Ms",
    "X-Relight-Attempts",
    "X-Relight-State",
    "Server-Timing",
    "Retry-After",
)
"""What the gateway tells of a request in headers."""
_NOT_RETURNED = _HOP_BY_HOP | {b"content-length", b"date", b"server", b"x-request-id"}
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:@/=+-]{1,200}")
# The engine's server takes 64 KiB and 256 headers; the rest is for what is added on the way.
MAX_HEADERS_BYTES = 48 << 10
MAX_HEADERS = 200


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """The first value of a header; `name` in lower case. Empty when it's absent."""
    return next((value for key, value in headers if key.lower() == name), b"")


def check_headers(headers: Headers) -> None:
    """Raises `InvalidRequest` when the headers are more, or larger, than an engine would take."""
    if len(headers) > MAX_HEADERS or sum(len(n) + len(v) for n, v in headers) > MAX_HEADERS_BYTES:
        raise InvalidRequest(
            f"At most {MAX_HEADERS} headers of {MAX_HEADERS_BYTES} bytes together are taken."
        )


def to_engine(headers: Headers, id_: str) -> list[tuple[bytes, bytes]]:
    """The client's headers that an engine may see, and the request's id."""
    kept = [(name, value) for name, value in _crossing(headers, _NOT_FORWARDED) if not _CONTROL.search(value)]
    kept.append((b"x-request-id", id_.encode("ascii")))
    return kept


def to_client(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The engine's headers that the client may see. Content-Length is left to who sends the body."""
    return [(name.lower(), value) for name, value in _crossing(headers, _NOT_RETURNED)]


def _crossing(headers: Headers, dropped: frozenset[bytes]) -> Iterable[tuple[bytes, bytes]]:
    named = {
        token.strip().lower() for n, v in headers if n.lower() == b"connection" for token in v.split(b",")
    }
    for name, value in headers:
        lower = name.lower()
        if lower not in dropped and lower not in named and _TOKEN.fullmatch(name):
            yield name, value


def request_id(headers: Headers) -> str:
    """The client's own request id if it can be put into headers and logs without harm, else a new one."""
    value = header(headers, b"x-request-id")
    return value.decode("ascii") if _REQUEST_ID.fullmatch(value) else uuid.uuid4().hex


def client_timeout_s(value: bytes) -> float | None:
    """`X-Request-Timeout-Seconds`: positive and finite, or None when it's absent or makes no sense."""
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0 < seconds < float("inf") else None


def server_timing(wait_s: float, cold_start: ColdStart | None) -> bytes:
    """`Server-Timing`: the wait as `queue`, and each phase of a cold start, in milliseconds."""
    entries = [f"queue;dur={wait_s * 1e3:.1f}"]
    if cold_start is not None:
        entries += [
            f"{re.sub('[^A-Za-z0-9_-]', '_', phase.name)};dur={phase.duration_s * 1e3:.1f}"
            for phase in cold_start.phases
            if phase.name != "queue"  # the wait of this very request says more
        ]
    return ", ".join(entries).encode("ascii")


def header_value(text: str) -> bytes:
    """`text` as a header value: printable ASCII, the rest replaced, since ids come from files and clients."""
    return re.sub(r"[^\x20-\x7e]", "?", text).encode("ascii")


# ----------------------------------------------------------------------------------------------------- shapes


def error_fields(error: RelightError) -> dict[str, Any]:
    """OpenAI's four fields of an error."""
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


def error_document(fields: Mapping[str, Any], style: Style = Style.CHAT) -> dict[str, Any]:
    """The body of an error response: OpenAI's shape, with Anthropic's `type` on top on its routes."""
    if style is Style.MESSAGES:
        return {"type": "error", "error": dict(fields)}
    return {"error": dict(fields)}


def reshaped_error(status: int, body: bytes, model: str, path: str, style: Style) -> bytes | None:
    """The route's document for an error that an engine answered; None if that has its shape already, or is no JSON."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    shaped = isinstance(document, dict) and isinstance(document.get("error"), dict)
    if shaped and (style is not Style.MESSAGES or document.get("type") == "error"):
        return None
    return json.dumps(error_document(engine_error_fields(status, body, model, path), style)).encode()


def engine_error_fields(status: int, body: bytes, model: str, path: str) -> dict[str, Any]:
    """OpenAI's fields of an error that an engine answered to a request for `path`."""
    fields: dict[str, Any] = {}
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict):
        if status == HTTPStatus.NOT_FOUND and document == {"detail": HTTPStatus.NOT_FOUND.phrase}:
            # What an engine's server says of a route that its kind of model has not.
            return error_fields(NotFound(f"The model {model!r} does not serve {_short(path, 200)}."))
        inner = document.get("error", document)
        fields = inner if isinstance(inner, dict) else {"message": inner}
    message = fields.get("message", fields.get("detail"))
    if not (isinstance(message, str) and message):
        message = body[:1000].decode("utf-8", "replace") or f"The engine answered with status {status}."
    type_ = fields.get("type")
    return {
        "message": message,
        "type": type_
        if isinstance(type_, str)
        else HTTPStatus(status).phrase
        if status in _STATUSES
        else "error",
        "param": fields.get("param"),
        "code": fields.get("code", status),
    }


_STATUSES = frozenset(int(status) for status in HTTPStatus)


def model_document(id_: str, aliases: Sequence[str], state: str, created_s: float) -> dict[str, Any]:
    """One entry of /v1/models: OpenAI's fields, and the model's state and other names."""
    return {
        "id": id_,
        "object": "model",
        "created": int(created_s),
        "owned_by": "relight",
        "state": state,
        "aliases": list(aliases),
    }
