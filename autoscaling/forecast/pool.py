"""What the fleet's models have in common, as one process goes along from one fit to the next."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from autoscaling.core.types import State
from autoscaling.forecast.hazard import LEAST_SILENCES, ROUNDS
from autoscaling.forecast.kept import to_prior, to_state
from autoscaling.forecast.prior import NO_FLEET, Prior, Share, pooled

KEPT_EVERY_S = 900.0
"""Where the regression took no step: the rest moves a little with each fit, and is had from history within a minute."""


class Pool:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._whole = True
        self._late = False
        self._kept_s = float("-inf")
        self._kept_round = 0
        self.prior: Prior = NO_FLEET
        self.kept: State | None = None
        """What a restart is to go on from, made anew only when that is worth writing; None before anything is known."""

    def restore(self, state: State, now_s: float) -> None:
        """Go on from what another process kept, unless as much is known already. Raises kept.UnusableError."""
        prior = to_prior(state, now_s)
        with self._lock:
            if self.prior.models and (self.prior.hazard.knows or not prior.hazard.knows):
                return
            self._late = self.prior.models > 0
            self.prior, self._whole = prior, False

    def next(self, shares: Iterable[Share], now_s: float, *, complete: bool) -> bool:
        """Take in what the models add by now; whether all of them should be fitted again at once.

        That is so where the fleet has silences enough for a regression and only steps are missing: each needs fits
        around the one before, and the last of them is better by much than the first that counts as known. So too
        where what was kept came late.

        `complete`: each of them had its turn since the process began. Until then what was kept stands: a step towards
        the few that came first would throw away what the others had told.
        """
        with self._lock:
            if not (self._whole or complete):
                return False
            self._whole = True
            before = self.prior.hazard.round
            self.prior = prior = pooled(shares, self.prior)
            round_ = prior.hazard.round
            if prior.models and (round_ != self._kept_round or now_s - self._kept_s >= KEPT_EVERY_S):
                self.kept, self._kept_round, self._kept_s = to_state(prior), round_, now_s
            late, self._late = self._late, False
            return late or (before < round_ <= ROUNDS + 1 and prior.hazard.silences >= LEAST_SILENCES)
