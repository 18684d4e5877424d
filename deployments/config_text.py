"""What every reader of configuration files shares: keys that stand once, and how places, values and errors are said."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import yaml

from deployments.errors import ConfigError


def path_of(place: Sequence[str | int]) -> str:
    """`("models", 0, "scaling")` as one writes it: models[0].scaling. A step that would not be clear so is quoted."""
    path = ""
    for step in place:
        if isinstance(step, int):
            path += f"[{step}]"
        elif re.fullmatch(r"[\w.-]+", step):
            path += f".{step}" if path else step
        else:
            path += f"[{step!r}]"
    return path


def show(value: object, limit: int = 80) -> str:
    """A value as the file would write it, shortened to `limit` characters."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class UniqueKeys:
    """For a loader of PyYAML, before its base: a key that stands twice in a mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice in one mapping", key.start_mark
                    )
                seen.add(key.value)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)  # type: ignore[misc]
        return mapping


class _Twice:
    """In place of an object of JSON, in which a key stands twice or which holds such an object."""

    def __init__(self, place: tuple[str | int, ...]) -> None:
        self.place = place


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Twice:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            return _Twice((key,))
        if (inner := _twice(value)) is not None:
            return _Twice((key, *inner.place))
        found[key] = value
    return found


def _twice(value: object) -> _Twice | None:
    if isinstance(value, list):
        for index, each in enumerate(value):
            if (inner := _twice(each)) is not None:
                return _Twice((index, *inner.place))
    return value if isinstance(value, _Twice) else None


def read_json(text: str, where: str, **how: Any) -> Any:
    """As `json.loads`. Raises ConfigError for a key that stands twice in an object."""
    found = json.loads(text, object_pairs_hook=_unique, **how)
    if (twice := _twice(found)) is not None:
        raise ConfigError(f"{where}: {path_of(twice.place)} stands twice")
    return found


@contextlib.contextmanager
def yaml_errors(where: str) -> Iterator[None]:
    """What PyYAML raises, as one ConfigError that names the file, the line and the reason."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}: {at}{reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        # What a scalar's own reader raises: of a date that no calendar has, or of a number with thousands of digits.
        raise ConfigError(f"{where}: a value can't be read: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None
