"""The OpenAPI 3.1 document of the gateway: what it promises itself, not what engines make of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from deployments.errors import (
    BodyStalled,
    BodyTooLarge,
    DeadlineExceeded,
    EngineInterrupted,
    EngineStartFailed,
    EngineUnreachable,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    RelightError,
    UnsupportedMediaType,
)
from deployments.gateway.openai import CANCEL_RESPONSE, RETRIEVE_RESPONSE, ROUTES, Route

_REQUEST_ERRORS: tuple[type[RelightError], ...] = (
    InvalidRequest,
    ModelNotFound,
    BodyStalled,
    BodyTooLarge,
    UnsupportedMediaType,
    QueueFull,
)
_ENGINE_ERRORS: tuple[type[RelightError], ...] = (
    EngineUnreachable,
    EngineInterrupted,
    EngineStartFailed,
    DeadlineExceeded,
)

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "state", "aliases"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "state": {"type": "string", "description": "dark, lighting, parked, ready, draining or failed"},
        "aliases": {"type": "array", "items": {"type": "string"}},
    },
}
_ASK = {
    "type": "object",
    "required": ["model"],
    "additionalProperties": True,
    "properties": {
        "model": {
            "type": "string",
            "minLength": 1,
            "description": "The id or an alias of a model of the fleet.",
        },
        "stream": {"description": "true: the answer is a stream of server-sent events."},
    },
}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


_TEXT = {"schema": {"type": "string"}}

_HEADERS = {
    "X-Request-Id": {"schema": {"type": "string"}, "description": "The client's own, or a new one."},
    "X-Relight-Model": {"schema": {"type": "string"}, "description": "The model's canonical id."},
    "X-Relight-Cold-Start": {
        "schema": {"enum": ["true", "false"]},
        "description": "Whether the engine was lit while this request waited.",
    },
    "X-Relight-Wait-Ms": {
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
        "description": "Wait for an engine.",
    },
    "X-Relight-Attempts": {
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
        "description": "Engines tried.",
    },
    "Server-Timing": {
        "schema": {"type": "string"},
        "description": "The wait, and each phase of a cold start.",
    },
}
_RETRY_AFTER = {
    "Retry-After": {"schema": {"type": "string", "pattern": "^[0-9]+$"}, "description": "Seconds."}
}


def _summary(error: type[RelightError]) -> str:
    return (error.__doc__ or "").split("\n", 1)[0]


def _errors(kinds: Iterable[type[RelightError]]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for kind in kinds:
        response = responses.setdefault(
            str(kind.status), {"description": _summary(kind), "content": _json(_ref("Error"))}
        )
        if kind in {QueueFull, DeadlineExceeded}:
            response["headers"] = _RETRY_AFTER
        elif _summary(kind) not in response["description"]:
            response["description"] += f" Or: {_summary(kind)}"
    return responses


def _operation_id(method: str, path: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", f"{method} {path}").strip("_")


def _proxied(route: Route, *, one_model: bool = False) -> dict[str, Any]:
    responses: dict[str, Any] = {
        "200": {
            "description": "The engine's answer, byte for byte.",
            "headers": _HEADERS,
            "content": {"application/json": {}, **({"text/event-stream": {}} if route.streams else {})},
        },
        **_errors(_REQUEST_ERRORS if route.names_model else (InvalidRequest, ModelNotFound, QueueFull)),
        **_errors(_ENGINE_ERRORS),
        "default": {"description": "The engine's own error, byte for byte."},
    }
    if route.multipart:
        responses["200"]["content"]["text/plain"] = {}
    operation: dict[str, Any] = {
        "operationId": _operation_id(route.methods[0].lower(), route.template),
        "responses": responses,
    }
    if route.names_model:
        content = {"application/json": {"schema": _ref("Request")}}
        if route.multipart:
            content = {"multipart/form-data": {"schema": _ref("Request")}, **content}
        operation["requestBody"] = {"required": True, "content": content}
    else:
        operation["parameters"] = [
            {
                "name": "response_id",
                "in": "path",
                "required": True,
                "schema": {"type": "string", "minLength": 1},
            },
            {
                "name": "model",
                "in": "query",
                "required": not one_model,
                "schema": {"type": "string", "minLength": 1},
                "description": "The model that made the response; or the header X-Relight-Model says it.",
            },
        ]
    return {route.methods[0].lower(): operation}


def _get(path: str, description: str, content: dict[str, Any], **more: Any) -> dict[str, Any]:
    responses = {"200": {"description": description, "content": content}, **more.pop("errors", {})}
    return {"get": {"operationId": _operation_id("get", path), "responses": responses, **more}}


def document(version: str, *, one_model: bool) -> dict[str, Any]:
    """The document as JSON values. `one_model`: the fleet has one, which needs no name beside a body."""
    paths: dict[str, Any] = {route.template: _proxied(route) for route in ROUTES.values()}
    paths[RETRIEVE_RESPONSE.template] = _proxied(RETRIEVE_RESPONSE, one_model=one_model)
    paths[CANCEL_RESPONSE.template] = _proxied(CANCEL_RESPONSE, one_model=one_model)
    paths["/v1/models"] = _get(
        "/v1/models",
        "Every model of the fleet, dark ones too.",
        _json(
            {
                "type": "object",
                "required": ["object", "data"],
                "properties": {
                    "object": {"const": "list"},
                    "data": {"type": "array", "items": _ref("Model")},
                },
            }
        ),
    )
    paths["/v1/models/{model_id}"] = _get(
        "/v1/models/{model_id}",
        "One model, by its id or an alias.",
        _json(_ref("Model")),
        errors=_errors([ModelNotFound]),
        parameters=[
            {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ],
    )
    for path in ("/health", "/healthz", "/ping"):
        paths[path] = _get(path, "The gateway is up.", {"text/plain": _TEXT})
    paths["/relight/v1/status"] = _get("/relight/v1/status", "The whole fleet.", _json({"type": "object"}))
    paths["/metrics"] = _get("/metrics", "Prometheus' text format.", {"text/plain": _TEXT})
    paths["/openapi.json"] = _get("/openapi.json", "This document.", _json({"type": "object"}))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Relight",
            "version": version,
            "description": (
                "Requests for a model that is dark are held until its engine answers. "
                "Any other path under /v1/ whose body names a model is passed to that model's engine too."
            ),
        },
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR, "Model": _MODEL, "Request": _ASK}},
    }
