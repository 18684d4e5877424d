"""Taking turns: who of those whose requests need the same GPUs has waited long enough for its first replica."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from autoscaling.core.seen import begins, priced
from autoscaling.core.types import Decision, Observation, Spec

TURN_S, TURN_STARTS, MOST_TURN_S = 60.0, 2.0, 180.0
"""For how long a model keeps its first replica at least while another's requests wait for it, in seconds and in starts
of the slowest of them as far as they are measured: no more than a third of the time goes into starts. But no longer
than MOST_TURN_S: who waits is to be served before it gives up, by default after ten minutes."""
COMING_S = 900.0
"""For so long at most others wait for one to come, from when its turn began: its node may never."""
AGAIN_S = 15.0
"""For so long a model keeps its place that nobody asks any more: who gave up waiting asks again."""
_WAITS, _COUNTS = "waits_since_s", "turn_from_s"
"""In a decision's numbers, where GPUs are short: since when its requests wait for its first replica, and from when that
counts, which is not before those that were to come were ready. Of one that has its
first: since when it serves, or was told to come."""


@dataclass(frozen=True, slots=True)
class Turns:
    """Of models whose requests need replicas, by what was decided last."""

    observations: Mapping[str, Observation]
    before: Mapping[str, Decision]
    turn_s: float
    came: bool
    """One that was to come is ready: from here on the next turn counts."""
    late: Mapping[str, float]
    """Those whose turn it is and who are not ready yet, with since when they wait. While there are any, nobody else's
    turn comes."""

    @classmethod
    def of(
        cls,
        asking: Iterable[str],
        specs: Mapping[str, Spec],
        observations: Mapping[str, Observation],
        before: Mapping[str, Decision],
    ) -> Turns:
        """`asking`: models of which there are specs and observations, and whose requests need GPUs."""
        longest_s = 0.0
        came = False
        coming: dict[str, float] = {}
        waiting: dict[str, tuple[float, float]] = {}
        for model in asking:
            observation, last = observations[model], before.get(model)
            prices = priced(specs[model], observation.rungs)
            start = prices.get(begins(observation.rung, prices))
            longest_s = max(longest_s, start.delay_s if start is not None and start.starts else 0.0)
            if last is None or _WAITS not in last.numbers:
                continue
            if observation.ready:
                came = came or bool(last.replicas)
            elif last.replicas:
                waits_s, counts_s = _since(last, observation.now_s)
                if observation.now_s < counts_s + COMING_S:
                    coming[model] = waits_s
            else:
                waits_s, counts_s = _since(last, observation.now_s)
                waiting[model] = waits_s, observation.now_s - counts_s
        turn_s = min(MOST_TURN_S, max(TURN_S, TURN_STARTS * longest_s))
        if not coming and not came:
            coming = {model: waits_s for model, (waits_s, so_far_s) in waiting.items() if so_far_s >= turn_s}
        return cls(observations, before, turn_s, came, coming)

    def place(self, model: str) -> float:
        """Of its first replica, the lowest first: those whose turn it is, who waited longest first."""
        return self.late.get(model, math.inf)

    def served(self, model: str) -> float:
        """Since when it serves while others wait; 0 where nobody did."""
        last = self.before.get(model)
        return 0.0 if last is None or _WAITS in last.numbers else last.numbers.get(_COUNTS, 0.0)

    def noted(self, decision: Decision) -> Decision:
        """The decision of one that asks, with what the next ones must know."""
        observation, last = self.observations[decision.model], self.before.get(decision.model)
        now_s = observation.now_s
        waits_s, counts_s = _since(last, now_s)
        held = last is not None and bool(last.replicas)
        until_s = decision.until_s
        if decision.replicas and observation.ready:
            begins_now = not held or (last is not None and _WAITS in last.numbers)
            numbers = {_COUNTS: now_s if begins_now else counts_s}
        elif decision.replicas:
            numbers = {_WAITS: waits_s, _COUNTS: counts_s if held else now_s}
        else:
            counts_s = now_s if self.came or held else counts_s
            numbers = {_WAITS: waits_s, _COUNTS: counts_s}
            if now_s < (due_s := counts_s + self.turn_s):
                until_s = min(until_s, due_s)
        return replace(decision, until_s=until_s, numbers={**decision.numbers, **numbers})


def keeping_place(decision: Decision, observation: Observation | None, last: Decision | None) -> Decision:
    """The decision of one that does not ask, with its place among those who wait if it asked a moment ago."""
    if last is None or last.replicas or _WAITS not in last.numbers or _WAITS in decision.numbers:
        return decision
    if observation is None or decision.replicas or observation.last_busy_s is None:
        return decision
    if not observation.last_busy_s <= observation.now_s <= observation.last_busy_s + AGAIN_S:
        return decision
    places = {name: last.numbers[name] for name in (_WAITS, _COUNTS) if name in last.numbers}
    return replace(decision, numbers={**decision.numbers, **places})


def _since(last: Decision | None, now_s: float) -> tuple[float, float]:
    """Since when a model waits, and from when that counts: not from a future that a clock set back has left behind."""
    numbers: Mapping[str, float] = {} if last is None else last.numbers
    return min(now_s, numbers.get(_WAITS, now_s)), min(now_s, numbers.get(_COUNTS, now_s))


__all__ = ["AGAIN_S", "COMING_S", "MOST_TURN_S", "TURN_S", "TURN_STARTS", "Turns", "keeping_place"]
