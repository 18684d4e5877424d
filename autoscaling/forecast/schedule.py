"""Which model is fitted next, and how thoroughly. Pure: times are given."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

REFIT_S = 900.0
QUIET_FACTOR = 4.0
"""A model to which nothing came since its last fit can wait so much longer for the next."""
SETTLE_S = 3.0
"""From the change that asks for a fit until it: the store writes once a second."""
CHANGED_SILENCES = 0.15
CHANGED_ARRIVALS = 0.5
BACKOFF_S = 6 * 3600.0
FULL_S = 6 * 3600.0
NOTHING_S = 300.0
"""Until a model without any traffic is looked at again, if nobody tells of an arrival."""


@dataclass(slots=True)
class Turn:
    """One model. Times are monotonic seconds."""

    fitted_s: float | None = None
    due_s: float = 0.0
    waits_for_change: bool = True
    """Whether it is not yet known to have changed since its last fit."""
    running: bool = False
    tried: bool = False
    """Whether it had its turn, whatever came of it."""
    ceiling: int = 0
    """The most thorough fitter that it may have: an index, 0 is the most thorough."""
    ceiling_until_s: float = 0.0
    full_s: float = 0.0
    """When it may have the most thorough one again."""
    wants_full: bool = False
    sticky: bool = False
    """The most thorough one's result was the best; a lesser one would lose it."""
    failures: list[str] = field(default_factory=list)
    """Of the last attempt, oldest first."""


@dataclass(frozen=True, slots=True)
class Next:
    model: str
    effort: int


class Schedule:
    """New models first, then those that changed, then the others in turn; not thread-safe."""

    def __init__(self, efforts: int, refit_s: float = REFIT_S) -> None:
        """`efforts`: how many fitters there are; with more than one, the first is for when there is time."""
        self._efforts = efforts
        self._refit_s = refit_s
        self.turns: dict[str, Turn] = {}

    def watch(self, models: Iterable[str]) -> None:
        wanted = dict.fromkeys(models)
        self.turns = {model: self.turns.get(model) or Turn() for model in wanted}

    def changed(
        self, model: str, now_s: float, silences: tuple[int, int], arrivals: tuple[float, float]
    ) -> None:
        """(since the last fit, known to it) each: whether that is enough for a fit out of turn."""
        turn = self.turns.get(model)
        if turn is None or turn.running or not turn.waits_for_change:
            return
        new = turn.fitted_s is None and arrivals[0] > 0
        more = silences[0] > CHANGED_SILENCES * silences[1]
        much = arrivals[0] > 20 and arrivals[0] > CHANGED_ARRIVALS * arrivals[1]
        if new or more or much:
            turn.waits_for_change = False
            turn.due_s = min(turn.due_s, now_s + SETTLE_S)

    @property
    def all_tried(self) -> bool:
        """Whether each model had its turn."""
        return all(turn.tried for turn in self.turns.values())

    def hurry(self, now_s: float) -> None:
        """Fit again each that was fitted, as soon as there is time: what they have in common is another now."""
        for turn in self.turns.values():
            if turn.fitted_s is not None and not turn.running:
                # Not as thoroughly as when nothing presses.
                turn.waits_for_change = False
                turn.due_s = min(turn.due_s, now_s)

    def next(self, now_s: float) -> Next | None:
        """The one to fit now, which then counts as running."""
        best: tuple[int, float, str] | None = None
        for model, turn in self.turns.items():
            if turn.running or turn.due_s > now_s:
                continue
            rank = 0 if turn.fitted_s is None else 2 if turn.waits_for_change else 1
            key = (rank, turn.due_s, model)
            if best is None or key < best:
                best = key
        if best is None:
            return None
        rank, _, model = best
        turn = self.turns[model]
        turn.running = True
        if now_s >= turn.ceiling_until_s:
            turn.ceiling = 0
        usual = 1 if self._efforts > 1 else 0
        thorough = turn.sticky or (rank == 2 and turn.wants_full and now_s >= turn.full_s)
        effort = 0 if thorough else usual
        return Next(model, min(max(effort, turn.ceiling), self._efforts - 1))

    def done(
        self, model: str, now_s: float, *, wants_full: bool, sticky: bool, effort: int, cost_s: float
    ) -> None:
        """It was fitted."""
        turn = self.turns.get(model)
        if turn is None:
            return
        turn.running, turn.tried = False, True
        turn.fitted_s = now_s
        turn.waits_for_change = True
        # Never more than a tenth of a process for one model.
        turn.due_s = now_s + max(self._refit_s * self._jitter(model), 10 * cost_s)
        turn.wants_full, turn.sticky = wants_full, sticky
        if effort == 0:
            turn.full_s = now_s + FULL_S * self._jitter(model)

    def quiet(self, model: str) -> None:
        """Nothing came since the fit before: it can wait longer."""
        turn = self.turns.get(model)
        if turn is not None and turn.fitted_s is not None:
            turn.due_s = turn.fitted_s + (turn.due_s - turn.fitted_s) * QUIET_FACTOR

    def nothing(self, model: str, now_s: float) -> None:
        """It has no traffic to learn from."""
        turn = self.turns.get(model)
        if turn is not None:
            turn.running, turn.tried, turn.waits_for_change = False, True, True
            turn.due_s = now_s + NOTHING_S * self._jitter(model)

    def failed(self, model: str, now_s: float, effort: int, reason: str) -> bool:
        """Whether a simpler fitter is left, which is then due at once."""
        turn = self.turns.get(model)
        if turn is None:
            return False
        turn.running = False
        turn.failures.append(reason)
        del turn.failures[: -self._efforts]
        turn.ceiling = min(effort + 1, self._efforts - 1)
        turn.ceiling_until_s = now_s + BACKOFF_S
        turn.sticky = False
        last = effort + 1 >= self._efforts
        turn.tried = turn.tried or last
        turn.due_s = now_s + (self._refit_s * self._jitter(model) if last else 0.0)
        return not last

    def put_off(self, model: str, now_s: float, reason: str) -> None:
        """It could not be tried, through no fault of a fitter's."""
        turn = self.turns.get(model)
        if turn is not None:
            turn.running, turn.tried = False, True
            turn.failures = [reason]
            turn.due_s = now_s + 30.0 * self._jitter(model)

    @staticmethod
    def _jitter(model: str) -> float:
        """0.8 to 1.2, the same for a model always, so that a fleet's fits spread out."""
        return 0.8 + 0.4 * (zlib.crc32(model.encode()) % 1000) / 1000
