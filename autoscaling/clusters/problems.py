"""What is wrong with a file: where, what, and what would be right."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Place = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One line for whoever reads. A note does not keep the file from being right."""

    place: Place
    text: str
    note: bool = False

    def line(self, where: str) -> str:
        path = path_of(self.place)
        return f"{where}: {path}: {self.text}" if path else f"{where}: {self.text}"


def path_of(place: Place) -> str:
    """`("available_node_types", "l4", "labels")` as one writes it: available_node_types.l4.labels."""
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
    """A value as the file would write it, shortened."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def unknown_key(place: Place, key: str, known: Iterable[str]) -> Problem:
    """A key that nobody reads."""
    names: Sequence[str] = sorted(known)
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
    return Problem((*place, key), f"unknown key; {hint}")
