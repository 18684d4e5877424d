"""Which models wait for a node that does not come, and what kind of node is asked for in its place.

Ray starts the node type that fits best and waits for it: for minutes, and then for the same type again, if the cloud
has none. So whoever has waited for `patience_s` has another kind asked for, and after as long the next, over and over,
until a replica has its place; and at once where the cloud refuses the kind. Kinds are a model's GPU types in the order
of the fleet file, then the same without spot markets. What Ray waits for meanwhile stays asked for: should that node
come first, it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from autoscaling.core.types import Decision, Rung
from autoscaling.live.labels import ACCELERATOR, MARKET, ON_DEMAND, Labels
from autoscaling.live.node_launches import is_of
from autoscaling.live.setup import ModelSetup

TOLD_AFTER_S = 2.0
"""A replica that was just made is on no node either, and waits for none."""


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
    asked_s: float
    """Since when for this kind."""
    asked: int | None = None
    """Which of the model's choices; None leaves that to Ray."""
    vain: tuple[str, ...] = ()
    """What was waited for in vain, for people."""


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
        failing: Collection[str] = (),
    ) -> None:
        """See who waits. `unplaced` is how many replicas of a model are starting and are on no node yet.

        `has_node` is whether a node is up that could run it at all, `failing` the node types that can't be had now.
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
            wait = self._waits.get(model, NodeWait(now_s, now_s))
            waits[model] = self._go_on(wait, choices(self._models[model]), now_s, failing)
        # Replaced as a whole: others read on other threads.
        self._waits = waits

    def _go_on(self, wait: NodeWait, kinds: list[Labels], now_s: float, failing: Collection[str]) -> NodeWait:
        refused = {n for n, kind in enumerate(kinds) if any(is_of(one, kind) for one in failing)}
        if (refused if wait.asked is None else wait.asked in refused) and len(refused) < len(kinds):
            first = 0 if wait.asked is None else wait.asked + 1
            follows = next(n for n in _round(first, len(kinds)) if n not in refused)
            # Those of Ray's own choice; where a type is refused on demand it is refused at all.
            own = [n for n in sorted(refused) if MARKET not in kinds[n]]
            vain = own if wait.asked is None else [wait.asked]
            told = dict.fromkeys([*wait.vain, *(f"{called(kinds[n])}: launch failed" for n in vain)])
            return NodeWait(wait.since_s, now_s, follows, tuple(told))
        while now_s - wait.asked_s >= self._patience_s:
            now = wait.asked or 0
            told = dict.fromkeys([*wait.vain, called(kinds[now])])
            asked_s = wait.asked_s + self._patience_s
            wait = NodeWait(wait.since_s, asked_s, (now + 1) % len(kinds), tuple(told))
        return wait

    def asked(self, model: str) -> Labels | None:
        """The kind that is asked for in place of the first; None while that is left to Ray."""
        wait = self._waits.get(model)
        if wait is None or wait.asked is None:
            return None
        return choices(self._models[model])[wait.asked]

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
        follows = called(kinds[((wait.asked or 0) + 1) % len(kinds)])
        at = f"{wait.asked_s + self._patience_s - wait.since_s:.0f} s"
        if wait.asked is None:
            of = f" ({' or '.join(self._models[model].accelerator_types)})" if kinds[0] else ""
            return f"waits for a node{of} for {waited}; asks for {follows} at {at}"
        vain, now = ", ".join(wait.vain), called(kinds[wait.asked])
        return f"no node came ({vain}) for {waited}; asking for {now}, for {follows} at {at}"


def _round(first: int, count: int) -> Iterator[int]:
    return ((first + n) % count for n in range(count))
