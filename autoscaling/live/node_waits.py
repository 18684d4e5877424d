"""Which models wait for a node that does not come, and what kind of node is asked for in its place.

Ray starts the node type that fits best and waits for it: for minutes, and then for the same type again, if the cloud
has none. So whoever has waited for `patience_s` has another kind asked for, and after as long the next, over and over,
until a replica has its place. Kinds are a model's GPU types in the order of the fleet file, then the same without spot
markets. What Ray waits for meanwhile stays asked for: should that node come first, it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from autoscaling.core.types import Decision, Rung
from autoscaling.live.setup import ModelSetup

ACCELERATOR = "ray.io/accelerator-type"
MARKET = "ray.io/market-type"
ON_DEMAND = "on-demand"

TOLD_AFTER_S = 2.0
"""A replica that was just made is on no node either, and waits for none."""

Labels = Mapping[str, str]
"""A Ray label selector: label -> value, or `in(A,B)`."""


def labels_of(model: ModelSetup) -> Labels:
    """Of any node that a replica may be on."""
    kinds = model.accelerator_types
    if not kinds:
        return {}
    return {ACCELERATOR: kinds[0] if len(kinds) == 1 else f"in({','.join(kinds)})"}


def choices(model: ModelSetup) -> list[Labels]:
    """The kinds of node that would do, in the order in which they are asked for."""
    kinds: list[Labels] = [{ACCELERATOR: kind} for kind in model.accelerator_types] or [{}]
    return [*kinds, *({**kind, MARKET: ON_DEMAND} for kind in kinds)]


def called(labels: Labels) -> str:
    """A kind of node, for people."""
    words = [labels.get(ACCELERATOR, ""), "on demand" if MARKET in labels else ""]
    return " ".join(word for word in words if word) or "any"


@dataclass(frozen=True, slots=True)
class NodeWait:
    """A model that waits for a node. Times are monotonic."""

    since_s: float
    step: int = 0
    """How many kinds have been waited for in vain; 0 leaves the choice to Ray."""


class NodeWaits:
    """Follows all models. `patience_s` is how long one kind of node is waited for before the next is asked for too."""

    def __init__(
        self, models: Mapping[str, ModelSetup], monotonic_s: Callable[[], float], patience_s: float
    ) -> None:
        self._models = models
        self._monotonic_s = monotonic_s
        self._patience_s = patience_s
        self._waits: dict[str, NodeWait] = {}

    def look(
        self,
        decisions: Iterable[Decision],
        *,
        unplaced: Callable[[str], int],
        has_node: Callable[[str], bool],
    ) -> None:
        """See who waits. `unplaced` is how many replicas of a model are starting and are on no node yet.

        `has_node` is whether a node is up that could run it at all.
        """
        now_s = self._monotonic_s()
        waits: dict[str, NodeWait] = {}
        for decision in decisions:
            model = decision.model
            if model not in self._models:
                continue
            ahead = not decision.replicas and Rung.NODE <= decision.rung < Rung.SERVING
            if not unplaced(model) and not (ahead and not has_node(model)):
                continue
            before = self._waits.get(model, NodeWait(now_s))
            waits[model] = NodeWait(before.since_s, int((now_s - before.since_s) / self._patience_s))
        # Replaced as a whole: others read on other threads.
        self._waits = waits

    def asked(self, model: str) -> Labels | None:
        """The kind that is asked for in place of the first; None while that is left to Ray."""
        wait = self._waits.get(model)
        if wait is None or wait.step == 0:
            return None
        kinds = choices(self._models[model])
        return kinds[wait.step % len(kinds)]

    def texts(self) -> dict[str, str]:
        """Model -> what it waits for, for people."""
        now_s = self._monotonic_s()
        return {
            model: self._text(model, wait, now_s)
            for model, wait in self._waits.items()
            if now_s - wait.since_s >= TOLD_AFTER_S
        }

    def _text(self, model: str, wait: NodeWait, now_s: float) -> str:
        kinds = choices(self._models[model])
        waited = f"{now_s - wait.since_s:.0f} s"
        follows = called(kinds[(wait.step + 1) % len(kinds)])
        at = f"{self._patience_s * (wait.step + 1):.0f} s"
        if wait.step == 0:
            of = f" ({' or '.join(self._models[model].accelerator_types)})" if kinds[0] else ""
            return f"waits for a node{of} for {waited}; asks for {follows} at {at}"
        vain = ", ".join(dict.fromkeys(called(kinds[step % len(kinds)]) for step in range(wait.step)))
        now = called(kinds[wait.step % len(kinds)])
        return f"no node came ({vain}) for {waited}; asking for {now}, for {follows} at {at}"
