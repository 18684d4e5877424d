"""The control API of a cluster, as commands call it."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from autoscaling.commands.failures import FAILED, UNAUTHORISED, UNREACHABLE, WRONG, CommandError

_PREFIX = "/relight/v1/"
_WRONG = frozenset({400, 404, 405, 413, 422})
TIMEOUT_S = 30.0


def default_address() -> str:
    """RELIGHT_ADDRESS, else where this checkout's cluster listens, else port RELIGHT_PORT or 8000 of this machine."""
    from deployments.local.state import Checkout

    if named := os.environ.get("RELIGHT_ADDRESS"):
        return named
    # While a cluster is up, the checkout remembers on which port.
    cluster = Checkout.here().load()
    if cluster is not None and cluster.served:
        return cluster.endpoint
    return f"http://127.0.0.1:{os.environ.get('RELIGHT_PORT') or 8000}"


def checked_address(text: str) -> str:
    """The address without a slash at its end. Raises CommandError for what is none."""
    base = text.rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise CommandError(f"{text!r} is not an address; it begins with http:// or https://", WRONG)
    try:
        parts = urlsplit(base)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        named = False
    if not named or any(letter.isspace() or not letter.isprintable() for letter in base):
        raise CommandError(f"{text!r} is not an address; one is like http://127.0.0.1:8000", WRONG)
    return base


def who() -> str:
    """Who is kept with a change: RELIGHT_WHO, else user@host."""
    if named := os.environ.get("RELIGHT_WHO"):
        return named
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # A container's user may have no name.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


class Client:
    """Raises CommandError with the exit code that fits, for whatever is not a good answer."""

    def __init__(self, address: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self.base = checked_address(address or default_address())
        self._timeout_s = timeout_s

    def get(self, path: str, **query: object) -> dict[str, Any]:
        return self.call("GET", path, query)

    def put(self, path: str, body: Mapping[str, Any], **query: object) -> dict[str, Any]:
        return self.call("PUT", path, {**query, "who": who()}, body)

    def post(self, path: str, body: Mapping[str, Any], **query: object) -> dict[str, Any]:
        return self.call("POST", path, {**query, "who": who()}, body)

    def delete(self, path: str, **query: object) -> dict[str, Any]:
        return self.call("DELETE", path, {**query, "who": who()})

    def call(
        self, method: str, path: str, query: Mapping[str, object], body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        import httpx

        given = {name: value for name, value in query.items() if value is not None}
        try:
            # Straight to it: an http_proxy in the environment is for other places, and rarely knows loopback.
            with httpx.Client(trust_env=False, timeout=self._timeout_s) as client:
                response = client.request(
                    method,
                    self.base + _PREFIX + path,
                    params={name: str(value) for name, value in given.items()},
                    json=body,
                    headers=self._headers(),
                )
        except httpx.TimeoutException:
            raise CommandError(
                f"{self.base} did not answer within {self._timeout_s:g} s.", UNREACHABLE
            ) from None
        except (httpx.TransportError, httpx.InvalidURL) as error:
            why = "" if isinstance(error, httpx.ConnectError) else f" ({error})"
            raise CommandError(
                f"Nothing answers at {self.base}{why}; `relight up` starts a cluster on this machine, --address or "
                "RELIGHT_ADDRESS names another.",
                UNREACHABLE,
            ) from None
        return self._answer(response)

    def _headers(self) -> dict[str, str]:
        from autoscaling.live.tokens import TokenError, client_token

        try:
            token = client_token(self._data_dir())
        except TokenError as error:
            raise CommandError(str(error), UNAUTHORISED) from None
        return {"authorization": f"Bearer {token}"} if token else {}

    def _data_dir(self) -> Path:
        """Where the controller of this address keeps its token, if that is on this machine."""
        from autoscaling.live.tokens import data_dir
        from deployments.local.state import Checkout

        checkout = Checkout.here()
        cluster = checkout.load()
        ours = cluster is not None and cluster.endpoint == self.base
        return checkout.data_dir if ours and "RELIGHT_DATA" not in os.environ else data_dir()

    def _answer(self, response: Any) -> dict[str, Any]:
        try:
            document = response.json()
        except ValueError:
            document = None
        if response.status_code == 200 and isinstance(document, dict):
            return document
        error = document.get("error") if isinstance(document, dict) else None
        if response.status_code in (401, 403):
            raise CommandError(self._unauthorised(response), UNAUTHORISED)
        if not isinstance(error, dict) or not isinstance(error.get("message"), str):
            raise CommandError(
                f"{self.base} answers, but not as Relight does: HTTP {response.status_code}", UNREACHABLE
            )
        message = error["message"]
        if "field" not in error:
            # The gateway's own error: it is there, what answers behind it is not.
            raise CommandError(f"{self.base} answers, but its controller does not: {message}", UNREACHABLE)
        raise CommandError(message, WRONG if response.status_code in _WRONG else FAILED)

    def _unauthorised(self, response: Any) -> str:
        from autoscaling.live.tokens import FILE_NAME

        sent = "authorization" in response.request.headers
        what = "does not take this token" if sent else "needs a token"
        file = self._data_dir() / FILE_NAME
        return (
            f"{self.base} {what}. The controller keeps its token in {file} on its node (RELIGHT_DATA names another "
            "folder); on other machines set RELIGHT_TOKEN to it."
        )


def in_path(name: str) -> str:
    """A model's name as the end of a path. Raises CommandError for an empty one: that path would be of all of them."""
    if not name:
        raise CommandError("An empty name is none; is a variable of your shell not set?", WRONG)
    return quote(name, safe="")
