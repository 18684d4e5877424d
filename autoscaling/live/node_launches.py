"""Node types whose launch has just failed: the cloud refused it, for want of capacity, quota or rights.

Ray's autoscaler (v2) tells of failed launches in the cluster's status, without their reasons (its monitor.log has
them), and tries the same type again and again: only a type that was granted and never came does it put back. So who
waits for such a type asks for another at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from autoscaling.live.labels import ACCELERATOR, MARKET, Labels

FAILING_S = 30.0
"""How long a failure counts. While a type is asked for, Ray tries it anew every few seconds."""


class FailedLaunches:
    """Which types fail now. Read and written by different threads."""

    def __init__(self, monotonic_s: Callable[[], float]) -> None:
        self._monotonic_s = monotonic_s
        self._told: Mapping[str, float] | None = None
        self._seen_s: dict[str, float] = {}

    def take(self, failed: Mapping[str, float]) -> None:
        """What Ray tells: node type -> Unix time of its last failure.

        How long ago that was is known only of what comes after the first look: clocks of machines differ.
        """
        now_s = self._monotonic_s()
        if self._told is not None:
            new = {kind: now_s for kind, at_s in failed.items() if at_s != self._told.get(kind)}
            self._seen_s = {**self._seen_s, **new}
        self._told = dict(failed)

    def failing(self) -> frozenset[str]:
        """Node types, by their names."""
        oldest_s = self._monotonic_s() - FAILING_S
        return frozenset(kind for kind, seen_s in self._seen_s.items() if seen_s >= oldest_s)


def is_of(node_type: str, kind: Labels) -> bool:
    """Whether a node type is of a kind, as far as its name says: those that `relight cluster render` gives do.

    `l4-spot`, `a100x8-ondemand`, `cpu-spot`: Ray does not tell the labels of a type of which no node is there.
    """
    name = node_type.lower()
    if MARKET in kind and re.search(r"(^|[^a-z])spot([^a-z]|$)", name):
        return False
    wanted = re.escape(kind.get(ACCELERATOR, "cpu").lower())
    return re.search(rf"(^|[^a-z0-9]){wanted}(x\d+)?([^a-z0-9]|$)", name) is not None
