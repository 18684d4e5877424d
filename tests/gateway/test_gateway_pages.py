"""What the gateway answers itself: models, health, status, metrics, and its own description."""

from __future__ import annotations

import pytest
import schemathesis
from prometheus_client.parser import text_string_to_metric_families

from deployments.gateway import exposition
from tests.fakes.engines import FakeEngines
from tests.gateway.lab import Lab

VLLM = """\
# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
# HELP vllm:prompt_tokens_total Number of prefill tokens.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 12.0
# HELP vllm:ttft_seconds Time to first token.
# TYPE vllm:ttft_seconds histogram
vllm:ttft_seconds_bucket{le="0.1",model_name="m"} 1.0
vllm:ttft_seconds_bucket{le="+Inf",model_name="m"} 3.0
vllm:ttft_seconds_count{model_name="m"} 3.0
vllm:ttft_seconds_sum{model_name="m"} 1.5
"""
OWN = b"# HELP relight_x What.\n# TYPE relight_x counter\nrelight_x_total 1.0\n"


async def test_models_are_listed_dark_ones_too(lab: Lab) -> None:
    """OpenAI's list, and each model's state and aliases."""
    lab.model.light()
    document = (await lab.client.get("/v1/models")).json()
    assert document["object"] == "list"
    assert [(m["id"], m["state"], m["aliases"], m["object"]) for m in document["data"]] == [
        ("tiny", "ready", ["small"], "model"),
        ("org/large", "dark", [], "model"),
    ]


@pytest.mark.parametrize(
    ("name", "found"),
    [("org/large", "org/large"), ("org%2Flarge", "org/large"), ("small", "tiny"), ("x", None)],
)
async def test_one_model_is_found_by_any_name(lab: Lab, name: str, found: str | None) -> None:
    """By id, also one with a slash, and by alias; 404 in OpenAI's shape otherwise."""
    answer = await lab.client.get(f"/v1/models/{name}")
    if found is None:
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
    else:
        assert answer.json()["id"] == found


@pytest.mark.parametrize("path", ["/health", "/healthz", "/ping"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_gateway_is_up(lab: Lab, method: str, path: str) -> None:
    """It is, whatever the models are."""
    assert (await lab.client.request(method, path)).status_code == 200


async def test_the_status_is_the_engines(lab: Lab) -> None:
    """The whole fleet as the engines tell it."""
    document = (await lab.client.get("/relight/v1/status")).json()
    assert document["models"][0] == {"id": "tiny", "state": "dark"}


async def test_a_status_that_fails_is_a_500_in_openais_shape(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody foresaw on the gateway's own pages tells no secrets either."""

    async def broken(self: FakeEngines) -> None:
        raise LookupError("unforeseen")

    monkeypatch.setattr(FakeEngines, "status", broken)
    answer = await lab.client.get("/relight/v1/status", headers={"X-Request-Id": "mine"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "unforeseen" not in answer.text
    assert answer.headers["x-request-id"] == "mine"


async def test_metrics_are_one_valid_page(lab: Lab) -> None:
    """The gateway's own and every engine's, each family once, and no two series alike."""
    lab.telemetry.page = OWN
    lab.engines.metrics = [
        ("tiny", VLLM),
        ("tiny", VLLM),
        ("org/large", VLLM),
        ("org/large", "{ not metrics"),
    ]
    answer = await lab.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    assert len(families) == len({family.name for family in families}) == 4
    assert answer.text.count("# TYPE vllm:num_requests_running gauge") == 1
    samples = [(s.name, *sorted(s.labels.items())) for family in families for s in family.samples]
    assert len(samples) == len(set(samples)) == 1 + 3 * 6
    assert 'vllm:prompt_tokens_total{engine="0",model="tiny",model_name="m",replica="1"} 12.0' in answer.text


def test_no_metrics_are_an_empty_page() -> None:
    """Neither telemetry nor engines: still valid."""
    assert exposition.merge(None, []) == b""


async def test_the_description_is_valid(lab: Lab) -> None:
    """An OpenAPI 3.1 document by its own schema, with a model required wherever a body is."""
    document = (await lab.client.get("/openapi.json")).json()
    schemathesis.openapi.from_dict(document).validate()
    for path, operations in document["paths"].items():
        if "requestBody" in operations.get("post", {}):
            assert set(operations["post"]["responses"]) >= {"200", "400", "404", "413", "415", "429"}, path
            assert set(operations["post"]["responses"]) >= {"502", "503", "504"}, path
    assert document["components"]["schemas"]["Request"]["required"] == ["model"]


async def test_websockets_are_refused(lab: Lab) -> None:
    """An ASGI server that offers a websocket hears a close, not an exception."""
    sent = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, object]) -> None:
        sent.append(message["type"])

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": [], "query_string": b""}
    await lab.gateway(scope, receive, send)  # type: ignore[arg-type]
    assert sent == ["websocket.close"]
