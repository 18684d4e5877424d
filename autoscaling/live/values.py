"""What people may set at run time, checked: one clear error names the field, the value and what would be right."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from autoscaling.core.types import MAX_REPLICAS, Rung
from autoscaling.live import catalog, cron
from autoscaling.live.cron import Cron
from autoscaling.live.invalid import InvalidValue
from autoscaling.live.records import OverrideKind

Mode = Literal["active", "shadow", "off"]
RungName = Literal["weights", "template", "parked", "serving"]
SHADOW_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
MAX_PREWARM_S = 31 * 86400.0
LATEST_S = 253370764800
"""The year 9999, after which no calendar can show a time; one in milliseconds lies far beyond it."""


class Value(BaseModel):
    """Base of everything that comes from outside: no unknown keys, no infinities, numbers are numbers."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


PolicyName = Annotated[str, Field(max_length=64)]
Params = dict[Annotated[str, Field(max_length=64)], float]


class PolicyValue(Value):
    """How a model is scaled. What is absent stays as it was."""

    policy: PolicyName | None = None
    params: Params | None = None
    wait_cost: Annotated[float, Field(ge=0)] | None = None
    """GPU-seconds worth paying to spare one request one second of waiting."""
    keep_alive_s: Annotated[float, Field(ge=0)] | None = None
    min_replicas: Annotated[int, Field(ge=0, le=MAX_REPLICAS)] | None = None
    max_replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] | None = None
    target_ongoing_requests: Annotated[float, Field(ge=0.01)] | None = None
    priority: int | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if all(getattr(self, name) is None for name in PolicyValue.model_fields):
            raise InvalidValue("", {}, f"at least one of {_listed(PolicyValue.model_fields)}")
        if self.policy is not None:
            catalog.check(self.policy, self.params or {})
        _check_bounds(self.min_replicas, self.max_replicas)
        return self


class PrewarmValue(Value):
    """At least so many replicas, or so warm, from one time to another (Unix seconds)."""

    replicas: Annotated[int, Field(ge=0, le=MAX_REPLICAS)] = 1
    rung: RungName = "serving"
    start_s: Annotated[float, Field(ge=0)]
    end_s: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> Self:
        check_time("start_s", self.start_s)
        check_time("end_s", self.end_s)
        if self.end_s <= self.start_s:
            raise InvalidValue("end_s", self.end_s, f"a time after start_s ({self.start_s:.0f})")
        if self.end_s - self.start_s > MAX_PREWARM_S:
            raise InvalidValue(
                "end_s", self.end_s, "31 days after start_s at most; set min_replicas to hold for good"
            )
        _check_replicas(self.replicas, self.rung)
        return self


class ScheduleValue(Value):
    """At least so many replicas, or so warm, whenever a cron expression says so."""

    cron: Annotated[str, Field(min_length=1, max_length=200)]
    duration_s: Annotated[float, Field(gt=0, le=cron.MAX_DURATION_S)]
    timezone: Annotated[str, Field(max_length=64)] = "UTC"
    replicas: Annotated[int, Field(ge=0, le=MAX_REPLICAS)] = 1
    rung: RungName = "serving"

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, value: str) -> str:
        try:
            cron.check_expression(value)
        except ValueError as error:
            raise InvalidValue("cron", value, f"a cron expression like '0 9 * * MON-FRI' ({error})") from None
        return value

    @field_validator("timezone")
    @classmethod
    def _is_timezone(cls, value: str) -> str:
        try:
            cron.check_timezone(value)
        except ValueError as error:
            raise InvalidValue("timezone", value, f"an IANA time zone like Europe/Berlin ({error})") from None
        return value

    @model_validator(mode="after")
    def _replicas_fit_the_rung(self) -> Self:
        _check_replicas(self.replicas, self.rung)
        return self

    def when(self) -> Cron:
        return Cron(self.cron, self.duration_s, self.timezone)


class ModeValue(Value):
    mode: Mode


class ShadowValue(Value):
    """A policy that decides beside the active one and changes nothing. What is absent is each model's own."""

    name: Annotated[str, Field(pattern=f"^{SHADOW_NAME}$")] = "shadow"
    """Under which its decisions and its costs are kept."""
    policy: PolicyName
    params: Params | None = None
    wait_cost: Annotated[float, Field(ge=0)] | None = None
    keep_alive_s: Annotated[float, Field(ge=0)] | None = None
    min_replicas: Annotated[int, Field(ge=0, le=MAX_REPLICAS)] | None = None
    max_replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] | None = None
    target_ongoing_requests: Annotated[float, Field(ge=0.01)] | None = None

    @model_validator(mode="after")
    def _would_be_a_policy(self) -> Self:
        catalog.check(self.policy, self.params or {})
        _check_bounds(self.min_replicas, self.max_replicas)
        return self

    def as_policy(self) -> PolicyValue:
        return PolicyValue(**self.model_dump(exclude={"name"}, exclude_none=True))


AnyValue = PolicyValue | PrewarmValue | ScheduleValue | ModeValue | ShadowValue
KINDS: Mapping[OverrideKind, type[AnyValue]] = {
    "policy": PolicyValue,
    "prewarm": PrewarmValue,
    "schedule": ScheduleValue,
    "mode": ModeValue,
    "shadow": ShadowValue,
}
V = TypeVar("V", bound=BaseModel)


def parse(kind: type[V], value: object) -> V:
    """Raises InvalidValue for the first thing that is wrong."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _invalid(kind, error.errors(include_url=False)[0]) from None


def wrong_fields(kind: type[BaseModel], value: object) -> list[InvalidValue]:
    """Everything that is wrong with a field by itself. What the fields contradict is not looked at."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        return [_invalid(kind, details) for details in error.errors(include_url=False) if details["loc"]]
    return []


def rung_of(name: str) -> Rung:
    return Rung[name.upper()]


def check_time(field: str, time_s: float) -> None:
    """Raises InvalidValue for a Unix time that no calendar can show."""
    if time_s >= LATEST_S:
        raise InvalidValue(field, time_s, "Unix time in seconds, before the year 9999")


def _check_replicas(replicas: int, rung: str) -> None:
    if rung == "serving" and replicas < 1:
        raise InvalidValue("replicas", replicas, "at least 1 on the rung serving")


def _check_bounds(low: int | None, high: int | None) -> None:
    if low is not None and high is not None and low > high:
        raise InvalidValue("min_replicas", low, f"at most max_replicas ({high})")


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(names)


_EXPECTED = {
    "missing": "a value: it is required",
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "dict_type": "an object",
    "list_type": "a list",
    "model_type": "an object",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
    "too_long": "at most {max_length} items",
    "too_short": "at least {min_length} items",
    "literal_error": "one of {expected}",
    "string_pattern_mismatch": "text that matches {pattern}",
}


def _invalid(kind: type[BaseModel], details: ErrorDetails) -> InvalidValue:
    context: dict[str, Any] = dict(details.get("ctx") or {})
    own = context.get("error")
    field = ".".join(str(part) for part in details["loc"])
    if isinstance(own, InvalidValue):
        return own
    if details["type"] == "extra_forbidden":
        close = difflib.get_close_matches(field, kind.model_fields, n=1)
        hint = f"{close[0]}?" if close else f"one of {_listed(kind.model_fields)}"
        return InvalidValue(field, details["input"], f"no such field; {hint}")
    value = None if details["type"] == "missing" else details["input"]
    if isinstance(value, float) and not math.isfinite(value):
        return InvalidValue(field, str(value), "a finite number")
    template = _EXPECTED.get(details["type"])
    return InvalidValue(field, value, template.format(**context) if template else details["msg"])
