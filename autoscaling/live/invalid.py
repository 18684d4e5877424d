"""A value that can't be, said in one sentence."""

from __future__ import annotations

import json


class InvalidValue(ValueError):
    """A value that can't be. `field` is its place, "" for the whole."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        self.field = field
        self.value = value
        self.expected = expected
        place = f"{field}: " if field else ""
        super().__init__(f"{place}{shown(value)} is not right; expected {expected}")


def shown(value: object, limit: int = 80) -> str:
    """A value as it would be written in JSON, cut to `limit` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."
