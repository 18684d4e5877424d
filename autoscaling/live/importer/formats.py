"""Logs, line by line: each format is a function from a line to an `Arrival`, or None for a line that tells of none.

Traces (CSV, Azure's, Mooncake's) are read by `autoscaling.traces`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from autoscaling.live.importer.rows import Arrival, LineError, count, duration, moment, name
from deployments.errors import ConfigError

Parse = Callable[[str], Arrival | None]


@dataclass(frozen=True, slots=True)
class Format:
    """How the lines of a log are read."""

    kind: str
    """access or json."""
    parse: Parse
    names_models: bool
    """Whether its names are models; those of an access log are paths."""


def recognize(line: str, fields: Mapping[str, str]) -> Format | None:
    """The format of a log, from its first line that is not empty; None if it is none.

    Args:
        fields: of JSON lines: a key of GUESSES -> the key that has it, with dots for inner ones.

    Raises:
        ConfigError: the fields are wrong.
    """
    _check_fields(fields)
    if line.startswith("{") and not {'"timestamp"', '"input_length"'} <= set(_NAME.findall(line)):
        return Format("json", JsonLines(fields), names_models=True)
    if _COMMON.match(line):
        return Format("access", parse_common, names_models=False)
    if _ENVOY.match(line):
        return Format("access", parse_envoy, names_models=False)
    return None


_NAME = re.compile(r'"[a-z_]+"')
_REQUEST = r'"(?P<method>[A-Z]+) (?P<path>\S+)(?: [^"]*)?"'
_COMMON = re.compile(
    rf'\S+ \S+ \S+(?: \S+)?? \[(?P<time>[^\]]+)\] (?:{_REQUEST}|"[^"]*") (?P<status>\d{{3}}|-)(?: (?P<size>\S+))?'
    # Combined adds referer and user agent; nginx's $request_time, with its three decimals, often follows.
    r'(?: "(?:[^"\\]|\\.)*" "(?:[^"\\]|\\.)*")?(?: (?:rt=)?(?P<seconds>\d+\.\d{3})(?!\S))?'
)
_ENVOY = re.compile(
    rf'\[(?P<time>\d{{4}}-[^\]]+)\] (?:{_REQUEST}|"[^"]*") (?P<status>\d+) \S+ '
    # Istio's format has three more before the bytes received and sent.
    r'(?:\S+ \S+ "[^"]*" )?(?:\d+|-) (?:\d+|-) (?P<millis>\d+|-)'
)
_NOT_SERVED = frozenset(
    ["400", "401", "403", "404", "405", "406", "408", "410", "411", "413", "414", "415", "422"]
)
"""Answers to what no model was asked."""
_OTHER_METHODS = frozenset(["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "CONNECT", "TRACE"])
_MONTHS = {"Jan": 1, "Feb": 2, "Mar": 3, "Apr": 4, "May": 5, "Jun": 6}
_MONTHS |= {"Jul": 7, "Aug": 8, "Sep": 9, "Oct": 10, "Nov": 11, "Dec": 12}
_CLF_TIME = re.compile(r"(\d{1,2}/[A-Z][a-z]{2}/\d{4}):(\d\d):(\d\d):(\d\d) ([+-])(\d\d)(\d\d)")


def parse_common(line: str) -> Arrival | None:
    """Common or Combined Log Format: Apache, nginx, Caddy's and Traefik's common formats."""
    found = _COMMON.match(line)
    if found is None:
        raise LineError("the line", line, "Common or Combined Log Format")
    if not _was_asked(found):
        return None
    seconds = found["seconds"]
    return Arrival(
        time_s=_clf_time(found["time"]),
        name=_path(found["path"]),
        duration_s=None if seconds is None else duration("request time", seconds),
    )


def parse_envoy(line: str) -> Arrival | None:
    """Envoy's default format, and Istio's."""
    found = _ENVOY.match(line)
    if found is None:
        raise LineError("the line", line, "Envoy's default log format")
    if not _was_asked(found):
        return None
    millis = found["millis"]
    return Arrival(
        time_s=moment("time", found["time"]),
        name=_path(found["path"]),
        duration_s=None if millis == "-" else duration("duration", float(millis) / 1000),
    )


def _was_asked(found: re.Match[str]) -> bool:
    return found["method"] == "POST" and found["status"] not in _NOT_SERVED


def _path(path: str) -> str:
    return name("path", path.partition("?")[0])


def _clf_time(text: str) -> float:
    found = _CLF_TIME.fullmatch(text)
    if found is None:
        raise LineError("time", text, "a time such as 10/Oct/2026:13:55:36 +0200")
    day, hour, minute, second, sign, zone_hours, zone_minutes = found.groups()
    zone_s = (int(zone_hours) * 60 + int(zone_minutes)) * (60 if sign == "+" else -60)
    return _day_s(day) + int(hour) * 3600 + int(minute) * 60 + int(second) - zone_s


@lru_cache(maxsize=64)
def _day_s(day: str) -> float:
    number_of_day, month, year = day.split("/")
    try:
        return datetime(int(year), _MONTHS[month], int(number_of_day), tzinfo=UTC).timestamp()
    except (KeyError, ValueError):
        raise LineError("time", day, "a day such as 10/Oct/2026") from None


GUESSES: dict[str, tuple[str, ...]] = {
    "time": (
        "timestamp",
        "time",
        "ts",
        "@timestamp",
        "timestamp_s",
        "start_time",
        "startTime",
        "time_iso8601",
        "created",
        "created_at",
        "datetime",
        "msec",
        "date",
    ),
    "model": (
        "model",
        "model_name",
        "model_id",
        "request.model",
        "body.model",
        "request_body.model",
        "response.model",
    ),
    "path": (
        "path",
        "request_path",
        "uri",
        "request_uri",
        "url",
        "request.uri",
        "request.path",
        "httpRequest.requestUrl",
        "RequestPath",
    ),
    "input_tokens": (
        "input_tokens",
        "prompt_tokens",
        "usage.prompt_tokens",
        "usage.input_tokens",
        "response.usage.prompt_tokens",
        "response.usage.input_tokens",
        "n_context_tokens_total",
    ),
    "output_tokens": (
        "output_tokens",
        "completion_tokens",
        "usage.completion_tokens",
        "usage.output_tokens",
        "response.usage.completion_tokens",
        "response.usage.output_tokens",
        "n_generated_tokens_total",
    ),
    "count": ("n_requests", "num_model_requests"),
    "duration": ("duration_s", "request_time", "exec_s", "latency_s", "httpRequest.latency", "duration"),
    "method": (
        "request_method",
        "request.method",
        "httpRequest.requestMethod",
        "RequestMethod",
        "http_method",
        "method",
    ),
    "status": ("status", "httpRequest.status", "DownstreamStatus", "response_code", "status_code"),
}
"""Keys that are tried in this order; among them those of nginx, Caddy, Traefik, Knative's proxy and OpenAI's usage
export."""
_SPAN = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ns|us|µs|ms|s)?")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, None: 1.0}


class JsonLines:
    """One JSON object a line. Where it says an HTTP method and a status, what no model was asked does not count."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._keys = {
            field: (fields[field],) if field in fields else guesses for field, guesses in GUESSES.items()
        }

    def __call__(self, line: str) -> Arrival | None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise LineError("the line", line, "a JSON object") from None
        if not isinstance(record, dict):
            raise LineError("the line", line, "a JSON object")
        # Not every program means HTTP's by these names.
        method, status = str(self._get(record, "method")), str(self._get(record, "status"))
        if method in _OTHER_METHODS or status in _NOT_SERVED:
            return None
        called = self._get(record, "model")
        if called is None:
            path = self._get(record, "path")
            called = path.partition("?")[0] if isinstance(path, str) else path
        lasted = self._get(record, "duration")
        return Arrival(
            time_s=moment(self._keys["time"][0], self._get(record, "time")),
            name=name(self._keys["model"][0], called),
            count=count("count", self._or(record, "count", 1)),
            input_tokens=count(self._keys["input_tokens"][0], self._or(record, "input_tokens", 0)),
            output_tokens=count(self._keys["output_tokens"][0], self._or(record, "output_tokens", 0)),
            duration_s=None if lasted is None else _span(self._keys["duration"][0], lasted),
        )

    def _or(self, record: Mapping[str, Any], field: str, default: int) -> object:
        found = self._get(record, field)
        return default if found is None else found

    def _get(self, record: Mapping[str, Any], field: str) -> object:
        for key in self._keys[field]:
            if key in record:
                return record[key]
            value: object = record
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                return value
        return None


def _span(field: str, value: object) -> float:
    """Seconds, from a number or from text such as 0.12s or 340ms."""
    if isinstance(value, str):
        found = _SPAN.fullmatch(value.strip())
        if found is None:
            raise LineError(field, value, "seconds, or a span such as 340ms")
        return duration(field, float(found["number"]) * _UNITS[found["unit"]])
    return duration(field, value)


def _check_fields(fields: Mapping[str, str]) -> None:
    for field, key in fields.items():
        if field not in GUESSES:
            raise ConfigError(f"fields: {field!r} is not known. Expected one of {', '.join(GUESSES)}.")
        if not key:
            raise ConfigError(
                f"fields: {field!r} has no key. Expected the key of a JSON object, such as usage.prompt_tokens."
            )
