"""What the gateway reads of a request, and which headers cross it: pure functions, abused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Scope

from deployments.errors import InvalidRequest, RelightError, UnsupportedMediaType
from deployments.gateway import openai
from deployments.gateway.engines import ColdStart, Phase
from deployments.gateway.proxy import path_of, target

JSON = b"application/json"
CHAT = openai.ROUTES["/v1/chat/completions"]
AUDIO = openai.ROUTES["/v1/audio/transcriptions"]


def read(body: bytes, content_type: bytes = JSON, route: openai.Route = CHAT) -> openai.Asked:
    """The body of a chat request unless told otherwise."""
    return openai.read_body(route, content_type, b"", body)


def form(*parts: tuple[str, bytes], boundary: str = "xyz") -> tuple[bytes, bytes]:
    """(content type, body) of a form."""
    body = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value + b"\r\n"
        for name, value in parts
    )
    return f"multipart/form-data; boundary={boundary}".encode(), body + f"--{boundary}--\r\n".encode()


def test_model_and_stream_are_read() -> None:
    """A JSON body's model and stream, and nothing else."""
    assert read(b'{"model": "m", "stream": true, "x": [1]}') == openai.Asked("m", True)
    assert read(b'{"model": "m", "stream": null}') == openai.Asked("m", False)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"m"',
        b"{}",
        b'{"model": null}',
        b'{"model": ""}',
        b'{"model": 1}',
        b'{"model": ["m"]}',
        b"\xff\xfe",
        b'{"model": "m", "x": ' + b"[" * 100_000,
        b'{"model": "m", "x": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
def test_a_malformed_body_is_the_clients_fault(body: bytes) -> None:
    """Whatever isn't an object with a model's name is an invalid request."""
    with pytest.raises(InvalidRequest):
        read(body)


@given(st.binary(max_size=200), st.sampled_from([JSON, b"multipart/form-data; boundary=b", b"x/y", b""]))
def test_any_bytes_are_read_or_refused(body: bytes, content_type: bytes) -> None:
    """No body makes the reader fail in another way than with an error for the client."""
    try:
        assert read(body, content_type, AUDIO).model
    except RelightError as error:
        assert 400 <= error.status < 500


def test_a_form_names_its_model_around_a_file() -> None:
    """The model is found before or after a file, whose own bytes look like fields."""
    content_type, body = form(
        ("file", b'\r\n{"model": "no"}\x00\xff' * 100), ("model", b"m"), ("stream", b"true")
    )
    assert read(body, content_type, AUDIO) == openai.Asked("m", True)


@pytest.mark.parametrize("content_type", [b"multipart/form-data", b"multipart/form-data; boundary="])
def test_a_form_without_a_boundary_is_invalid(content_type: bytes) -> None:
    """Its content type must say where its parts end."""
    with pytest.raises(InvalidRequest):
        read(b"--x", content_type, AUDIO)


@pytest.mark.parametrize("content_type", [b"", b"text/plain", b"multipart/form-data; boundary=b", b"\xff"])
def test_chat_takes_json_only(content_type: bytes) -> None:
    """Other content types are refused by name."""
    with pytest.raises(UnsupportedMediaType):
        read(b'{"model": "m"}', content_type)


def test_compressed_bodies_are_refused() -> None:
    """The gateway can't read the model's name out of them."""
    with pytest.raises(UnsupportedMediaType):
        openai.read_body(CHAT, JSON, b"gzip", b'{"model": "m"}')


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/",
        "/v1/models",
        "/v1/models/m",
        "/v1/../sleep",
        "/v1/x/../../sleep",
        "/v1/./x",
        "/sleep",
        "/collective_rpc",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/scale_elastic_ep",
        "/metrics",
    ],
)
def test_an_engines_controls_are_out_of_reach(path: str) -> None:
    """Only routes that name a model are passed on, and no path climbs out of /v1/."""
    assert openai.match_route(path) is None


def test_unknown_routes_under_v1_pass() -> None:
    """A newer engine's routes need no newer gateway."""
    route = openai.match_route("/v1/something/new")
    assert route is not None
    assert route.names_model


HEADER_BYTES = st.tuples(st.binary(max_size=20), st.binary(max_size=40))


@given(st.lists(HEADER_BYTES, max_size=20))
def test_no_header_that_crosses_can_split_a_request(headers: list[tuple[bytes, bytes]]) -> None:
    """Names are tokens, values hold no control bytes, and hop-by-hop headers stay behind."""
    for name, value in openai.to_engine(headers, "id"):
        assert openai._TOKEN.fullmatch(name)
        assert not set(value) & {0, 10, 13}
        assert name.lower() not in openai._HOP_BY_HOP


def test_what_a_connection_header_names_stays_behind() -> None:
    """RFC 9110's 7.6.1: headers that are options of the connection aren't forwarded."""
    headers = [(b"Connection", b"close, X-Secret"), (b"X-Secret", b"1"), (b"X-Other", b"2")]
    assert openai.to_engine(headers, "id") == [(b"X-Other", b"2"), (b"x-request-id", b"id")]


@given(st.text(max_size=60), st.binary(max_size=60))
def test_any_target_fits_a_request_line(path: str, query: bytes) -> None:
    """Spaces, line ends and bytes above ASCII are escaped."""
    path = "/v1/" + path.encode("utf-8", "ignore").decode()
    line = target({"path": path, "query_string": query})
    assert line.isascii()
    assert line.isprintable()
    assert " " not in line


@pytest.mark.parametrize(
    ("scope", "path"),
    [
        ({"path": "/v1/x"}, "/v1/x"),
        ({"path": "/llm/v1/x", "root_path": "/llm"}, "/v1/x"),
        ({"path": "/v1/x", "root_path": "/"}, "/v1/x"),
        ({"path": "/llmv1/x", "root_path": "/llm"}, "/llmv1/x"),
    ],
)
def test_the_gateway_can_be_mounted_below_a_prefix(scope: Scope, path: str) -> None:
    """Serve puts its route prefix into root_path and leaves it in path."""
    assert path_of(scope) == path


@pytest.mark.parametrize("value", [b"", b"nan", b"inf", b"-1", b"0", b"x", b"\xff"])
def test_a_senseless_timeout_is_ignored(value: bytes) -> None:
    """Only positive finite seconds bound a request."""
    assert openai.client_timeout_s(value) is None
    assert openai.client_timeout_s(b"2.5") == 2.5


def test_server_timing_has_the_wait_and_the_phases() -> None:
    """Milliseconds, in the header's own syntax."""
    cold = ColdStart(
        "e", "forked", 1.0, (Phase("queue", 0, 9), Phase("schedule", 0, 1.5), Phase("we ights", 0, 2))
    )
    assert openai.server_timing(0.0123, None) == b"queue;dur=12.3"
    assert openai.server_timing(0.0123, cold) == b"queue;dur=12.3, schedule;dur=1500.0, we_ights;dur=2000.0"


JSON_VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.integers(min_value=400, max_value=999),
    st.binary(max_size=80)
    | st.tuples(st.sampled_from(["error", "detail", "message"]), JSON_VALUES).map(
        lambda pair: json.dumps(dict([pair])).encode()
    ),
)
def test_any_engine_error_becomes_openais_fields(status: int, body: bytes) -> None:
    """Message and type are strings whatever the engine said, and the document can be written."""
    fields = openai.engine_error_fields(status, body, "m", "/v1/x")
    assert isinstance(fields["message"], str)
    assert fields["message"]
    assert isinstance(fields["type"], str)
    assert json.dumps(fields)


def test_an_unknown_model_names_its_neighbours() -> None:
    """The message lists what was probably meant, and a huge name isn't repeated whole."""
    assert "'llama-3-8b'" in openai.model_not_found("lama3-8b", ["qwen", "llama-3-8b"]).message
    assert len(openai.model_not_found("x" * 100_000, ["qwen"]).message) < 400
