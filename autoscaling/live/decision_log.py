"""Which decisions become rows of the store: those that say something else than their model's last row."""

from __future__ import annotations

from collections.abc import Sequence

from autoscaling.core.types import Decision
from autoscaling.live.store import Store


class DecisionLog:
    """Records the decisions of one loop.

    A busy model's decision is prolonged nearly every second: that is news for Serve's policy, but as a row it would
    push those of other models out of the store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last: dict[str, tuple[object, ...]] = {}

    def add(self, decisions: Sequence[Decision], source: str) -> None:
        """`source` is under which name they are kept. Numbers and `until_s` are those of the change."""
        changed: list[Decision] = []
        for decision in decisions:
            said = (
                source,
                decision.replicas,
                decision.rung,
                decision.reason,
                decision.clamps,
                decision.policy,
            )
            if self._last.get(decision.model) != said:
                self._last[decision.model] = said
                changed.append(decision)
        if changed:
            self._store.add_decisions(changed, source=source)


__all__ = ["DecisionLog"]
