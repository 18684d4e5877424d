"""The control API: everything under /relight/v1 except the status, behind one token.

    GET                 policies                      those there are, and every model's
    GET PUT DELETE      policies/{model}              one model's; PUT and DELETE policies: the whole fleet's
    GET                 explain/{model}               why it has the replicas that it has
    GET PUT             shadow                        policies that only record; DELETE shadow/{name}
    GET PUT             mode                          active, shadow or off
    GET POST            prewarms                      DELETE prewarms/{id}
    GET POST            schedules                     DELETE schedules/{id}; GET schedules/next
    GET                 forecasts/{model}
    GET                 history, decisions, coldstarts, accounts, health
    POST                import                        traffic from elsewhere
    GET                 overrides                     all that was set at run time; DELETE overrides/{id}

A refusal is {"error": {"message", "field", "value", "expected"}} with status 400 (no JSON), 401 (no token, or a wrong
one), 404 (no such model, id or route), 405, 409 (it contradicts what is), 413, 422 (a wrong value) or 503 (the store
can't keep or tell it now). `who` in the query says who asks; it is kept with what they change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from autoscaling.live.api import explain, forecasts, overrides, policies, records, shadows, windows
from autoscaling.live.api.plain import plain
from autoscaling.live.api.request import Refusal, Request, invalid
from autoscaling.live.invalid import InvalidValue
from autoscaling.live.store import StoreUnavailable
from autoscaling.live.tokens import allows
from autoscaling.live.view import ControllerView

log = logging.getLogger(__name__)

PREFIX = "/relight/v1/"
MAX_BODY_BYTES = 4 << 20
Answer = Callable[[Request], dict[str, Any]]


def _health(request: Request) -> dict[str, Any]:
    """GET health."""
    shown: dict[str, Any] = plain(dict(request.view.health()))
    return {"mode": request.mode(), "now_s": request.now_s, **shown}


_EXACT: Mapping[str, Mapping[str, Answer]] = {
    "policies": {"GET": policies.listing, "PUT": policies.put, "DELETE": policies.unset},
    "shadow": {"GET": shadows.listing, "PUT": shadows.put},
    "mode": {"GET": policies.mode, "PUT": policies.put_mode},
    "prewarms": {"GET": windows.prewarms, "POST": windows.add_prewarm},
    "schedules": {"GET": windows.schedules, "POST": windows.add_schedule},
    "schedules/next": {"GET": windows.next_spans},
    "history": {"GET": records.history},
    "decisions": {"GET": records.decisions},
    "coldstarts": {"GET": records.cold_starts},
    "accounts": {"GET": records.accounts},
    "import": {"POST": records.take_in},
    "overrides": {"GET": overrides.listing},
    "health": {"GET": _health},
}
_WITH_TAIL: Mapping[str, Mapping[str, Answer]] = {
    "policies": {"GET": policies.show, "PUT": policies.put, "DELETE": policies.unset},
    "explain": {"GET": explain.explain},
    "forecasts": {"GET": forecasts.forecast},
    "shadow": {"DELETE": shadows.remove},
    "prewarms": {"DELETE": windows.undo_prewarm},
    "schedules": {"DELETE": windows.remove_schedule},
    "overrides": {"DELETE": overrides.undo_one},
}


class Control:
    """Answers one request at a time; may be called from several threads."""

    def __init__(self, view: ControllerView, token: str) -> None:
        self._view = view
        self._token = token

    def handle(
        self, method: str, path: str, query: Mapping[str, str], body: bytes, authorization: str | None
    ) -> tuple[int, dict[str, Any]]:
        """HTTP status and JSON document. The path may be percent-encoded or not. Never raises."""
        try:
            return 200, self._answer(method, path, query, body, authorization)
        except Refusal as error:
            refusal = error
        except InvalidValue as error:
            refusal = invalid(error)
        except StoreUnavailable as error:
            refusal = Refusal(503, f"The store is not available: {error}")
        except Exception as error:
            log.exception("%s %s failed in the controller", method[:10], path[:200])
            refusal = Refusal(500, f"The controller failed: {type(error).__name__}; its log tells more.")
        return refusal.status, refusal.document

    def _answer(
        self, method: str, path: str, query: Mapping[str, str], body: bytes, authorization: str | None
    ) -> dict[str, Any]:
        if not allows(self._token, authorization):
            given = (
                "The token is not the controller's" if authorization else "This needs the controller's token"
            )
            message = (
                f"{given}: send `Authorization: Bearer TOKEN` (the controller keeps it in its data folder)."
            )
            raise Refusal(401, message, field="Authorization", expected="Bearer TOKEN")
        if len(body) > MAX_BODY_BYTES:
            message = f"The body has {len(body)} bytes; at most {MAX_BODY_BYTES} are taken."
            raise Refusal(413, message, field="body", expected=f"at most {MAX_BODY_BYTES} bytes")
        name, tail = self._place(path)
        routes = _WITH_TAIL if tail else _EXACT
        exact = f"{name}/{tail}" if tail else name
        methods = _EXACT.get(exact) or routes.get(name)
        if methods is None:
            raise Refusal(404, f"There is no {path[:200]}.", field="path", value=path[:200])
        answer = methods.get(method)
        if answer is None:
            allowed = ", ".join(methods)
            message = f"{path[:200]} takes {allowed}, not {method[:20]}."
            raise Refusal(405, message, field="method", value=method[:20], expected=allowed)
        return answer(Request(self._view, self._view.now_s(), tail, query, body))

    @staticmethod
    def _place(path: str) -> tuple[str, str]:
        if not path.startswith(PREFIX):
            raise Refusal(404, f"There is no {path[:200]}.", field="path", value=path[:200])
        name, _, tail = path.removeprefix(PREFIX).partition("/")
        return name, unquote(tail).rstrip("/")
