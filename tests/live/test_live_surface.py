"""What clients see is vLLM's own: the gateway's bytes beside those of the engine's own socket."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.live.conftest import changed, scaling
from tests.live.lab import Answer, Relight, UnixConnection, ask, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PARIS = {"model": "chat", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0, "seed": 1}
HELLO = {
    "model": "chat",
    "messages": [{"role": "user", "content": "Say hello."}],
    "max_tokens": 8,
    "temperature": 0,
    "seed": 1,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}

REQUESTS: dict[str, tuple[str, Any]] = {
    "completion": ("/v1/completions", PARIS),
    "completion-streamed": (
        "/v1/completions",
        {**PARIS, "stream": True, "stream_options": {"include_usage": True}},
    ),
    "completion-logprobs": ("/v1/completions", {**PARIS, "logprobs": 2, "echo": True}),
    "completion-several": ("/v1/completions", {**PARIS, "prompt": ["One, two,", "A, b,"]}),
    "chat": ("/v1/chat/completions", HELLO),
    "chat-streamed": ("/v1/chat/completions", {**HELLO, "stream": True}),
    "chat-logprobs": ("/v1/chat/completions", {**HELLO, "logprobs": True, "top_logprobs": 3}),
    "chat-json-schema": ("/v1/chat/completions", {**HELLO, "max_tokens": 40, "response_format": SCHEMA}),
    "chat-tools-none": ("/v1/chat/completions", {**HELLO, "tools": TOOLS, "tool_choice": "none"}),
    "chat-tools-auto": ("/v1/chat/completions", {**HELLO, "tools": TOOLS, "tool_choice": "auto"}),
    "chat-stop": ("/v1/chat/completions", {**HELLO, "stop": ["!"], "n": 2}),
    "responses": (
        "/v1/responses",
        {"model": "chat", "input": "Say hello.", "max_output_tokens": 8, "temperature": 0},
    ),
    "messages": ("/v1/messages", {**HELLO}),
    "tokenize": ("/tokenize", {"model": "chat", "prompt": "Grüße, 世界"}),
    "detokenize": ("/detokenize", {"model": "chat", "tokens": [1, 2, 3]}),
    "bad-temperature": ("/v1/chat/completions", {**HELLO, "temperature": -1}),
    "too-long": ("/v1/completions", {**PARIS, "prompt": "a b c " * 2000}),
    "wrong-type": ("/v1/chat/completions", {"model": "chat", "messages": "no list"}),
}
EMBEDDINGS: dict[str, tuple[str, Any]] = {
    "embedding": ("/v1/embeddings", {"model": "embed", "input": "One, two"}),
    "embedding-base64": (
        "/v1/embeddings",
        {"model": "embed", "input": ["a", "b"], "encoding_format": "base64"},
    ),
    "embedding-tokens": ("/v1/embeddings", {"model": "embed", "input": [101, 2028, 102]}),
}
# What differs from one answer to the next: identities and times.
PASSING = [
    (re.compile(rb"(?<=[\"-])[0-9a-f]{16,32}\b"), b"ID"),
    (re.compile(rb"\b(chatcmpl|cmpl|embd|embedding|resp|msg|rs|call|chatcmpl-tool)[-_][0-9a-zA-Z-]+"), b"ID"),
    (re.compile(rb'"(created|created_at|completed_at)":\s*[0-9.]+'), b'"created":0'),
]
HEADERS = {"x-request-id": "01234567-89ab-cdef-0123-456789abcdef"}


def masked(body: bytes) -> bytes:
    """A body without what passes."""
    for pattern, instead in PASSING:
        body = pattern.sub(instead, body)
    return body


class Both:
    """A lit model, to be asked through the gateway and at its engine's socket."""

    def __init__(self, relight: Relight, model: str) -> None:
        self.relight = relight
        self.model = model

    def direct(self, target: str, body: Any) -> Answer:
        engine = self.relight.ready_engine(self.model)
        return ask(UnixConnection(engine["http"], 120), "POST", target, body, HEADERS)

    def compare(self, target: str, body: Any) -> Answer:
        """Ask both until they agree: an engine settles (packs its weights) within its first requests."""

        def look() -> Answer | None:
            answer = self.relight.request("POST", target, body, HEADERS)
            direct = self.direct(target, body)
            assert answer.status == direct.status, (answer, direct)
            assert answer.header("content-type") == direct.header("content-type")
            assert masked(answer.body) == masked(direct.body)
            return answer

        return until(f"the same answer to {target} from gateway and engine", look, patience_s=20)


@pytest.fixture(scope="module")
def lit(relight: Relight, fleet: dict[str, Any]) -> Iterator[Relight]:
    """The cluster with two models that stay lit while this module's tests run."""
    relight.templates_ready("chat", "embed")
    relight.up(changed(fleet, "chat", "embed", scaling=scaling(min_replicas=1)))
    relight.ready_engine("chat"), relight.ready_engine("embed")
    yield relight
    relight.up(fleet)


@pytest.mark.parametrize("name", REQUESTS)
def test_the_bytes_are_those_of_the_engine(lit: Relight, name: str) -> None:
    """Status, content type and body of every route are the engine's own, be it an answer or a refusal."""
    target, body = REQUESTS[name]
    answer = Both(lit, "chat").compare(target, body)
    assert answer.status < 500, answer
    if name == "chat-json-schema":
        assert json.loads(answer.json["choices"][0]["message"]["content"])["city"] in ("Paris", "Rome")
    if name in ("chat-tools-auto", "bad-temperature", "too-long", "wrong-type"):
        assert answer.status == 400
        assert answer.json["error"]["message"]


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_the_bytes_are_those_of_the_embedding_engine(lit: Relight, name: str) -> None:
    """The same for the model that embeds."""
    target, body = EMBEDDINGS[name]
    assert Both(lit, "embed").compare(target, body).status < 500


@pytest.mark.parametrize(
    ("target", "body"),
    [("/v1/embeddings", {"model": "chat", "input": "x"}), ("/v1/completions", {**PARIS, "model": "embed"})],
    ids=["embedding-of-a-generator", "completion-of-an-embedder"],
)
def test_a_route_that_a_model_does_not_serve_is_said_in_openais_shape(
    lit: Relight, target: str, body: dict[str, Any]
) -> None:
    """The engine's own server says `{"detail": "Not Found"}`."""
    answer = lit.request("POST", target, body)
    assert answer.status == 404
    assert answer.json["error"]["message"] == f"The model {body['model']!r} does not serve {target}."


def test_a_document_has_one_length_and_a_stream_has_none(lit: Relight) -> None:
    """Framing fits HTTP/1.1: a length for a document, chunks for a stream."""
    plain = lit.request("POST", "/v1/completions", PARIS)
    assert plain.header("content-length") == str(len(plain.body))
    streamed = lit.request("POST", "/v1/completions", {**PARIS, "stream": True})
    assert streamed.header("content-length") is None
    assert (streamed.header("content-type") or "").startswith("text/event-stream")


def test_the_official_client(lit: Relight) -> None:
    """OpenAI's own client: chat, streamed chat, embeddings, models, and its errors."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{lit.port}/v1", api_key="k", max_retries=0) as client:
        hello: Any = HELLO["messages"]
        plain = client.chat.completions.create(model="chat", messages=hello, max_tokens=8, temperature=0)
        assert plain.choices[0].message.content
        stream = client.chat.completions.create(
            model="talk", messages=hello, max_tokens=8, temperature=0, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert text == plain.choices[0].message.content
        assert len(client.embeddings.create(model="embed", input="x").data[0].embedding) == 384
        assert {m.id for m in client.models.list()} >= {"chat", "embed"}
        with pytest.raises(openai.NotFoundError, match="no-such-model"):
            client.chat.completions.create(model="no-such-model", messages=hello)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="chat", messages=hello, temperature=-1)


def test_hanging_up_ends_the_generation(lit: Relight) -> None:
    """When a streaming client leaves, the engine stops generating long before the asked length."""
    generated = lit.engine_metric("chat", "vllm:generation_tokens_total")
    with lit.stream({**PARIS, "max_tokens": 2000, "ignore_eos": True}) as response:
        assert lit.first_event(response).startswith(b"data: ")
        assert lit.engine_metric("chat", "vllm:num_requests_running") == 1
    until("no generation to be left", lambda: lit.engine_metric("chat", "vllm:num_requests_running") == 0)
    assert lit.engine_metric("chat", "vllm:generation_tokens_total") - generated < 1000


def test_hanging_up_on_a_plain_request_ends_it_too(lit: Relight) -> None:
    """The same for a client that leaves before its document is whole."""
    generated = lit.engine_metric("chat", "vllm:generation_tokens_total")
    connection = http.client.HTTPConnection("127.0.0.1", lit.port, timeout=120)
    body = json.dumps({**PARIS, "max_tokens": 2000, "ignore_eos": True})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    until("the generation to run", lambda: lit.engine_metric("chat", "vllm:num_requests_running") == 1)
    connection.close()
    until("no generation to be left", lambda: lit.engine_metric("chat", "vllm:num_requests_running") == 0)
    assert lit.engine_metric("chat", "vllm:generation_tokens_total") - generated < 2000
