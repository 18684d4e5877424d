"""Which model a name or a path of a log stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import translate

from deployments.errors import ConfigError


class Names:
    """Patterns with * and ?, tried in order. Without any, names are models."""

    def __init__(self, patterns: Sequence[tuple[str, str]] = (), model: str | None = None) -> None:
        """patterns: (pattern, model). model: what stands for whatever no pattern matches."""
        for pattern, meant in patterns:
            if not pattern or not meant:
                raise ConfigError(f"map: {pattern}={meant} is incomplete. Expected PATTERN=MODEL.")
        self.patterns = tuple(patterns)
        self.model = model
        self._compiled = [(re.compile(translate(pattern)), meant) for pattern, meant in patterns]
        self._known: dict[str, str | None] = {}

    def model_of(self, name: str, *, names_models: bool) -> str | None:
        """The model, or None if the name stands for none."""
        if name not in self._known:
            if len(self._known) > 10_000:
                self._known.clear()
            self._known[name] = self._look_up(name, names_models)
        return self._known[name]

    def _look_up(self, name: str, names_models: bool) -> str | None:
        for pattern, meant in self._compiled:
            if pattern.match(name):
                return meant
        if self.model is not None or self._compiled or not names_models:
            return self.model
        return name
