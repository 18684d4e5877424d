"""What is wrong with a file: where, what, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deployments.config_text import path_of

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


def unknown_key(place: Place, key: str, known: Iterable[str]) -> Problem:
    """A key that nobody reads."""
    names: Sequence[str] = sorted(known)
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
    return Problem((*place, key), f"unknown key; {hint}")
