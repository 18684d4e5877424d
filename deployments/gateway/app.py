"""The gateway as an ASGI application. Knows nothing of Ray: `Engines` is its only way to an engine."""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from importlib import metadata
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from deployments.errors import BodyStalled, MethodNotAllowed, NotFound, RelightError
from deployments.gateway import exposition, openai, openapi
from deployments.gateway.engines import Engines
from deployments.gateway.observe import Clock, GatewayTelemetry, SystemClock
from deployments.gateway.proxy import ClientGone, Fleet, Proxy, path_of, read_body
from deployments.gateway.traffic import TrafficCounter

log = logging.getLogger(__name__)

MAX_CONTROL_BYTES = 4 << 20


class Gateway(Starlette):
    """The application.

    Proxied requests go around Starlette's middleware, which would cost a coroutine or two for each chunk;
    they are in its route table all the same, for those who name requests by it (Ray Serve's metrics).
    """

    def __init__(
        self,
        fleet: Fleet,
        engines: Engines,
        telemetry: GatewayTelemetry,
        clock: Clock,
        traffic: TrafficCounter,
    ) -> None:
        self.proxy = Proxy(fleet, engines, telemetry, clock, traffic)
        site = _Site(fleet, engines, telemetry, clock)
        super().__init__(
            routes=[
                Route("/v1/models", site.models),
                Route("/v1/models/{model_id:path}", site.model),
                *(Route(path, site.health) for path in ("/health", "/healthz", "/ping")),
                Route("/relight/v1/status", site.status),
                Route("/relight/v1/{path:path}", site.control, methods=["GET", "POST", "PUT", "DELETE"]),
                Route("/metrics", site.metrics),
                Route("/openapi.json", site.openapi),
                *(Route(path, _unreached, methods=["POST"]) for path in openai.ROUTES),
                Route(openai.CANCEL_RESPONSE.template, _unreached, methods=["POST"]),
                Route(openai.RETRIEVE_RESPONSE.template, _unreached, methods=["GET"]),
                Route("/v1/{path:path}", _unreached, methods=["POST"]),
                WebSocketRoute("/{path:path}", _no_websocket),
            ],
            exception_handlers={
                HTTPException: _http_error,
                RelightError: _relight_error,
                Exception: _unexpected,
            },
        )
        self.router.redirect_slashes = False
        self._pages: ASGIApp | None = None
        if fleet.gateway.cors_origins:
            self._pages = CORSMiddleware(
                self._serve,
                allow_origins=fleet.gateway.cors_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=openai.OWN_HEADERS,
            )

    def close(self) -> None:
        """Requests that are cancelled from now on are told that the gateway ends."""
        self.proxy.closing = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if self._pages is not None and scope["type"] == "http" and not scope["path"].startswith("/relight/"):
            await self._pages(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/"):
            # An engine's server would redirect to the path without it, on a host that no client can reach.
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        if scope["type"] == "http" and (route := openai.match_route(path_of(scope))) is not None:
            await self.proxy(route, scope, receive, send)
        elif scope["type"] == "http":
            await super().__call__(scope, receive, _with_request_id(scope, send))
        else:
            await super().__call__(scope, receive, send)


class _Site:
    """What the gateway answers itself."""

    def __init__(self, fleet: Fleet, engines: Engines, telemetry: GatewayTelemetry, clock: Clock) -> None:
        self._fleet = fleet
        self._engines = engines
        self._telemetry = telemetry
        self._started_s = clock.time_s()
        self._names = [name for model in fleet.models for name in (model.id, *model.aliases)]
        document = openapi.document(metadata.version("relight"), one_model=len(fleet.models) == 1)
        self._document = json.dumps(document).encode()

    def _model_document(self, model: Any) -> dict[str, Any]:
        return openai.model_document(model.id, model.aliases, self._engines.state(model.id), self._started_s)

    async def models(self, request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [self._model_document(model) for model in self._fleet.models]}
        )

    async def model(self, request: Request) -> Response:
        name = request.path_params["model_id"]
        model = self._fleet.resolve(name)
        if model is None:
            raise openai.model_not_found(name, self._names)
        return JSONResponse(self._model_document(model))

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("ok")

    async def status(self, request: Request) -> Response:
        return JSONResponse(dict(await self._engines.status()))

    async def control(self, request: Request) -> Response:
        """The control API is the controller's: it gets the request as it is, and says what is answered."""
        try:
            body = await read_body(request.receive, request.scope["headers"], MAX_CONTROL_BYTES)
        except ClientGone:
            return Response(status_code=499)
        status, document = await self._engines.control(
            request.method,
            path_of(request.scope),
            dict(request.query_params),
            body,
            request.headers.get("authorization"),
        )
        # What a 401 must say (RFC 9110, 15.5.2).
        headers = {"www-authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None
        return JSONResponse(document, status, headers)

    async def metrics(self, request: Request) -> Response:
        page = exposition.merge(self._telemetry.prometheus(), await self._engines.engine_metrics())
        return Response(page, headers={"content-type": exposition.CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        return Response(self._document, media_type="application/json")


def _with_request_id(scope: Scope, send: Send) -> Send:
    """A `send` that puts the request's id into the answer's headers."""
    request_id = openai.request_id(scope["headers"]).encode("ascii")

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
        await send(message)

    return send_with_id


async def _unreached(request: Request) -> Response:
    """The endpoint of the routes that `Gateway.__call__` takes before the router sees them."""
    raise NotFound(f"There is no {request.url.path}.")


async def _no_websocket(websocket: WebSocket) -> None:
    """Refuses: vLLM's realtime route would hold an engine for as long as a client likes."""
    await websocket.close(1008, "This gateway has no websocket routes.")


def _answer(error: RelightError, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(openai.error_document(openai.error_fields(error)), error.status, headers)


async def _relight_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RelightError)
    return _answer(error, {"connection": "close"} if isinstance(error, BodyStalled) else None)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == MethodNotAllowed.status:
        allow = (error.headers or {}).get("Allow", "")
        message = f"{path} takes {allow}, not {request.method[:20]}."
        return _answer(MethodNotAllowed(message), dict(error.headers or {}))
    return _answer(NotFound(f"There is no {path}."))


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s failed in the gateway", request.url.path, exc_info=error)
    return _answer(RelightError("The gateway failed; its log tells more."))


def build_gateway(
    fleet: Fleet,
    engines: Engines,
    telemetry: GatewayTelemetry,
    *,
    clock: Clock | None = None,
    traffic: TrafficCounter | None = None,
) -> Gateway:
    """The gateway of a fleet, ready to be served. Needs no event loop yet.

    `traffic` is where requests are counted, for those who report the counts.
    """
    clock = clock or SystemClock()
    traffic = traffic or TrafficCounter([model.id for model in fleet.models], clock)
    return Gateway(fleet, engines, telemetry, clock, traffic)
