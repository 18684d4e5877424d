"""Who may call the control API, and how it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoscaling.live.control import MAX_BODY_BYTES
from autoscaling.live.store import StoreUnavailable
from tests.control.lab import ORG, SMALL, TOKEN, Lab


@pytest.mark.parametrize("authorization", [None, "", "Bearer wrong-token-of-a-run", f"Basic {TOKEN}", TOKEN])
def test_without_the_token_nothing_is_told(lab: Lab, authorization: str | None) -> None:
    for path in ("policies", "health", "nonsense", f"explain/{SMALL}"):
        status, document = lab.control.handle("GET", f"/relight/v1/{path}", {}, b"", authorization)
        assert status == 401
        assert set(document) == {"error"}
        assert "Bearer TOKEN" in document["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "nonsense", 404),
        ("GET", "", 404),
        ("GET", "policies/none", 404),
        ("GET", "explain", 404),
        ("GET", "history/x", 404),
        ("DELETE", "overrides/none", 404),
        ("DELETE", "prewarms/none", 404),
        ("DELETE", "shadow/none", 404),
        ("POST", "policies", 405),
        ("DELETE", "mode", 405),
        ("PATCH", f"policies/{SMALL}", 405),
        ("PUT", "accounts", 405),
    ],
)
def test_what_is_not_there_is_said(lab: Lab, method: str, path: str, status: int) -> None:
    found, error = lab.refused(method, path)
    assert found == status
    assert error["message"]


def test_a_path_outside_of_the_api_is_not_found(lab: Lab) -> None:
    status, document = lab.control.handle("GET", "/v1/models", {}, b"", f"Bearer {TOKEN}")
    assert (status, document["error"]["field"]) == (404, "path")


def test_a_model_may_have_slashes_encoded_or_not(lab: Lab) -> None:
    assert lab.ok("GET", f"policies/{ORG}")["model"] == ORG
    assert lab.ok("GET", "policies/org%2Fllama-3.1")["model"] == ORG


def test_a_model_answers_to_its_alias(lab: Lab) -> None:
    assert lab.ok("GET", "policies/smol")["model"] == SMALL
    made = lab.ok("POST", "prewarms", {"model": "smol"})["prewarm"]
    assert made["model"] == SMALL


def test_a_model_that_is_not_there_is_told_with_what_may_be_meant(lab: Lab) -> None:
    status, error = lab.refused("GET", "policies/smollm2-135")
    assert (status, error["field"], error["value"]) == (404, "model", "smollm2-135")
    assert "did you mean smollm2-135m?" in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (b"{", 400, "a JSON object"),
        (b"\xff", 400, "a JSON object"),
        (b"[" * 100_000, 400, "a JSON object"),
        (b"[]", 422, "a JSON object"),
        (b"null", 422, "a JSON object"),
        (b"{}", 422, "a value: it is required"),
        (b'{"mode": "x"}', 422, "one of"),
        (b'{"mode": NaN}', 422, "a finite number"),
        (b" " * (MAX_BODY_BYTES + 1), 413, "at most"),
    ],
)
def test_a_body_that_can_not_be_is_refused(lab: Lab, body: bytes, status: int, expected: str) -> None:
    found, document = lab.control.handle("PUT", "/relight/v1/mode", {}, body, f"Bearer {TOKEN}")
    assert found == status
    assert expected in document["error"]["expected"]
    json.dumps(document, allow_nan=False)


def test_a_store_that_is_away_is_503_and_says_why(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("the disk is full")

    monkeypatch.setattr(lab.store, "put_override", away)
    status, error = lab.refused("PUT", f"policies/{SMALL}", {"wait_cost": 3.0})
    assert status == 503
    assert "the disk is full" in error["message"]
    assert lab.view.changes == 0
    assert lab.view.models()[SMALL].wait_cost == 10.0


def test_an_error_of_its_own_is_500_and_tells_no_secrets(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError(TOKEN)

    monkeypatch.setattr(lab.view, "health", broken)
    status, error = lab.refused("GET", "health")
    assert status == 500
    assert "RuntimeError" in error["message"]
    assert TOKEN not in json.dumps(error)


def test_health(lab: Lab) -> None:
    health = lab.ok("GET", "health")
    assert (health["mode"], health["ok"], health["store"]["ok"]) == ("active", True, True)


@pytest.mark.parametrize(
    ("path", "query", "field"),
    [
        ("history", {"model": SMALL, "last_s": "x"}, "last_s"),
        ("history", {"model": SMALL, "last_s": -1}, "last_s"),
        ("history", {"model": SMALL, "last_s": "nan"}, "last_s"),
        ("history", {"model": SMALL, "step_s": 0.001}, "step_s"),
        ("history", {}, "model"),
        ("decisions", {"limit": 0}, "limit"),
        ("decisions", {"limit": 1.5}, "limit"),
        ("decisions", {"since_s": 9e9}, "since_s"),
        ("decisions", {"model": "none"}, "model"),
        ("accounts", {"since_day": "yesterday"}, "since_day"),
        ("accounts", {"since_day": "2026-11-24", "until_day": "2026-11-01"}, "since_day"),
        ("overrides", {"history": "maybe"}, "history"),
        ("schedules/next", {"count": 1000}, "count"),
        (f"explain/{SMALL}", {"timezone": "Mars/Base"}, "timezone"),
        (f"forecasts/{SMALL}", {"ahead_s": 1e9}, "ahead_s"),
        ("policies", {"who": "\x1b[31m"}, None),
    ],
)
def test_a_query_that_can_not_be_names_its_field(
    lab: Lab, path: str, query: dict[str, object], field: str | None
) -> None:
    if field is None:
        status, error = lab.refused("PUT", path, {"wait_cost": 1.0}, **query)
        assert (status, error["field"]) == (422, "who")
    else:
        status, error = lab.refused("GET", path, **query)
        assert status == (404 if field == "model" else 422)
        assert error["field"] == field


NAMES = [
    "policies",
    "shadow",
    "mode",
    "prewarms",
    "schedules",
    "schedules/next",
    "history",
    "decisions",
    "coldstarts",
]
NAMES += [
    "accounts",
    "import",
    "overrides",
    "health",
    f"explain/{SMALL}",
    f"forecasts/{SMALL}",
    f"policies/{SMALL}",
]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "PUT", "POST", "DELETE"]),
    path=st.one_of(st.sampled_from(NAMES), st.text(max_size=12)),
    query=st.dictionaries(
        st.sampled_from(
            ["model", "last_s", "since_s", "until_s", "step_s", "limit", "who", "count", "since_day"]
        ),
        st.one_of(st.sampled_from([SMALL, "1", "0", "-1", "nan", "1e308"]), st.text(max_size=6)),
        max_size=3,
    ),
    body=st.one_of(
        st.binary(max_size=30),
        st.dictionaries(
            st.sampled_from(
                ["policy", "mode", "model", "cron", "duration_s", "start_s", "for_s", "rows", "bucket_s"]
            ),
            st.one_of(
                st.none(),
                st.floats(),
                st.integers(),
                st.text(max_size=6),
                st.lists(st.integers(), max_size=2),
            ),
            max_size=4,
        ).map(lambda value: json.dumps(value).encode()),
    ),
)
def test_whatever_comes_there_is_one_good_answer(
    lab: Lab, method: str, path: str, query: dict[str, str], body: bytes
) -> None:
    status, document = lab.control.handle(method, f"/relight/v1/{path}", query, body, f"Bearer {TOKEN}")
    assert status in {200, 400, 404, 405, 409, 413, 422}, document
    json.dumps(document, allow_nan=False)
    if status != 200:
        assert set(document["error"]) == {"message", "field", "value", "expected"}
