"""A request to the control API, and how one is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TypeVar

from pydantic import BaseModel

from autoscaling.core.types import Spec
from autoscaling.live import overrides
from autoscaling.live.invalid import InvalidValue, shown
from autoscaling.live.records import Override
from autoscaling.live.values import parse
from autoscaling.live.view import ControllerView

V = TypeVar("V", bound=BaseModel)
MAX_WHO = 200
WINDOWS_AHEAD_S = 2 * 86400.0


class Refusal(Exception):
    """What is answered instead: an HTTP status and the error's fields."""

    def __init__(
        self, status: int, message: str, *, field: str = "", value: object = None, expected: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.document = {
            "error": {"message": message, "field": field, "value": _json(value), "expected": expected}
        }


def _json(value: object) -> object:
    """The value if JSON can say it, else as text."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value


def invalid(error: InvalidValue, status: int = 422) -> Refusal:
    return Refusal(status, str(error), field=error.field, value=error.value, expected=error.expected)


@dataclass(frozen=True, slots=True)
class Request:
    view: ControllerView
    now_s: float
    tail: str = ""
    """What follows the route: the name of a model, an id."""
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def models(self, *drafts: Override) -> Mapping[str, Spec]:
        """How every model is scaled, with what was set a moment ago, which the controller may not have read yet.

        `drafts` count as if they were set.
        """
        base = self.view.base_models()
        known = self.view.models()
        said = [*self.view.store.overrides(self.now_s), *drafts]
        merged = overrides.apply(base, said, {}, self.now_s, WINDOWS_AHEAD_S)
        specs = {}
        for model, spec in merged.items():
            fleet = [w for w in known[model].windows if w.id.startswith("fleet:")] if model in known else []
            windows = sorted([*spec.windows, *fleet], key=lambda window: (window.start_s, window.id))
            specs[model] = replace(spec, windows=tuple(windows))
        return specs

    def mode(self) -> str:
        """active, shadow or off; what was set a moment ago counts."""
        return overrides.mode(self.view.store.overrides(self.now_s), self.view.mode(), self.now_s)

    def document(self) -> object:
        if not self.body.strip():
            return {}
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise Refusal(
                400, f"The body is not JSON: {error}", field="body", expected="a JSON object"
            ) from None

    def parse(self, kind: type[V]) -> V:
        document = self.document()
        if not isinstance(document, dict):
            raise invalid(InvalidValue("body", document, "a JSON object"))
        return parse(kind, document)

    def who(self) -> str:
        given = self.query.get("who", "")
        if len(given) > MAX_WHO or not (given.isprintable() or not given):
            raise invalid(InvalidValue("who", given, f"at most {MAX_WHO} printable characters"))
        return given or "unknown"

    def model(self, name: str | None = None, where: str = "model") -> str:
        """The id of the model that the path (or `name`) names, by its id or an alias. 404 where there is none."""
        wanted = self.tail if name is None else name
        models = self.view.base_models()
        if wanted in models:
            return wanted
        aliases = self.view.aliases()
        if wanted in aliases:
            return aliases[wanted]
        import difflib

        close = difflib.get_close_matches(wanted, [*models, *aliases], n=1)
        known = ", ".join(sorted(models)[:10]) + (" ..." if len(models) > 10 else "")
        expected = f"{close[0]}?" if close else f"one of {known}" if models else "a model of the fleet"
        message = f"There is no model {shown(wanted)} in the fleet; {_did_you_mean(close, expected)}"
        raise Refusal(404, message, field=where, value=wanted, expected=expected)

    def optional_model(self) -> str | None:
        name = self.query.get("model")
        return None if not name else self.model(name)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        given = self.query.get(name)
        if given is None:
            return default
        try:
            value = float(given)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise invalid(InvalidValue(name, given, f"a number from {low:g} to {high:.15g}"))
        return value

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        value = self.number(name, default, low, high)
        if value != int(value):
            raise invalid(InvalidValue(name, self.query[name], "a whole number"))
        return int(value)

    def span(self, default_s: float, longest_s: float) -> tuple[float, float]:
        """(since_s, until_s): from `since_s`, or the last `last_s` seconds, until `until_s`, or now."""
        until_s = self.number("until_s", self.now_s, 0, 1e12)
        last_s = self.number("last_s", default_s, 0, longest_s)
        since_s = self.number("since_s", max(0.0, until_s - last_s), 0, 1e12)
        if since_s > until_s:
            raise invalid(InvalidValue("since_s", since_s, f"a time before until_s ({until_s:.0f})"))
        return max(since_s, until_s - longest_s), until_s

    def told_until_s(self) -> float:
        """`until_s` if it was asked for; else no bound, since the clocks of other machines may be ahead of now."""
        return self.number("until_s", math.inf, 0, 1e12)

    def day(self, name: str, default: str) -> str:
        given = self.query.get(name, default)
        try:
            return date.fromisoformat(given).isoformat()
        except ValueError:
            raise invalid(InvalidValue(name, given, "a day as YYYY-MM-DD")) from None

    def flag(self, name: str) -> bool:
        given = self.query.get(name, "")
        if given not in ("", "0", "1", "true", "false"):
            raise invalid(InvalidValue(name, given, "1 or 0"))
        return given in ("1", "true")


def _did_you_mean(close: list[str], expected: str) -> str:
    return f"did you mean {close[0]}?" if close else f"expected {expected}"
