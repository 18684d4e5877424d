"""The bound: the same decisions with the trace itself as the forecast."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from autoscaling.core.types import Demand, Forecast, NextArrival
from autoscaling.sim.peers import Peers
from autoscaling.sim.queueing import Floats

SURE_S = 0.5
"""Within which time the next request surely comes."""
HORIZON_S = 7 * 86400.0
STEP_S = 10.0
QUANTILES = (0.5, 0.99)
WITHIN_S = 0.1
"""Of a decision's way to its effect: for so much the upper quantile by which starts are begun leaves time."""


class Oracle:
    """`Foresight` that knows every request. With the policy `predictive` it is the cheapest that its rules can do.

    It is told of each request a tick early, since what is decided at a tick takes effect there, and of everything
    earlier by what a decision takes to act.
    """

    def __init__(
        self,
        slowdown: Floats,
        tick_s: float = 1.0,
        *,
        acts_s: float = 0.0,
        share: float = 1.0,
        over_s: float = 0.0,
    ) -> None:
        """`slowdown` as in `queueing`: how much longer requests take in a full replica counts in the demand.

        With 0 as `stable_s` of the policy, what it has is the least that serves every request at once: the nth replica
        is needed while more than n - 1 are full, and held in between where that is shorter than a start, which costs as
        much. Two numbers bring it to a lower SLO attainment instead.

        Args:
            acts_s: from a decision to its effect.
            share: of the demand that is told of.
            over_s: tell of the mean demand over so many seconds, not of its peaks: requests may wait about as long.
        """
        self.fits = 0
        self.failures: Mapping[str, str] = {}
        self.pools = False
        self.settles_s = 0.0
        self._slow = float(slowdown[-1])
        self._tick_s = tick_s
        self._acts_s = max(0.0, acts_s - WITHIN_S)
        self._share = share
        self._over_s = over_s
        self._times: dict[str, Floats] = {}
        self._peaks: dict[str, tuple[float, Floats]] = {}
        self._at: dict[str, int] = {}
        self._ahead_s = 0.0

    def watch(self, model: str, since_s: float, horizon_s: float) -> None:
        """Looks twice the horizon ahead, and a minute."""
        self._ahead_s = max(self._ahead_s, 2 * horizon_s + 120.0)

    def coming(self, model: str, times: Floats, work: Floats) -> None:
        """All that will ever come."""
        self._times[model] = times
        self._at[model] = 0
        moments = np.concatenate([times - self._acts_s, times + work * self._slow])
        order = np.argsort(moments, kind="stable")
        load = np.cumsum(np.where(order < len(times), 1, -1))
        moments = moments[order]
        first_s = math.floor(float(moments[0]) / STEP_S) * STEP_S
        demand = (
            _means(moments, load, first_s, self._over_s) if self._over_s else _peaks(moments, load, first_s)
        )
        self._peaks[model] = first_s, demand * self._share

    def arrived(self, model: str, times: Floats, work: Floats) -> None:
        """Known before."""

    def next_s(self, model: str) -> float:
        """Never learns anything new."""
        return math.inf

    def demand_until_s(self, model: str) -> float:
        """Each moment it says what comes after it."""
        return -math.inf

    def fit(self, model: str, now_s: float) -> None:
        """Nothing."""

    def pool(self, peers: Peers, now_s: float) -> None:
        """Nothing."""

    def forecast(self, model: str, now_s: float) -> Forecast | None:
        """The next request within half a second, and the demand as it will be."""
        times = self._times.get(model)
        if times is None:
            return None
        at = self._at[model]
        while at < len(times) and times[at] <= now_s:
            at = min(len(times), at + max(1, int(np.searchsorted(times[at:], now_s, side="right"))))
        self._at[model] = at
        demand = self._demand(model, now_s)
        if at >= len(times):
            never = NextArrival(now_s, (0.0, HORIZON_S), (1.0, 1.0))
            return Forecast(now_s, "oracle", never, demand, fitted_s=math.inf)
        gap_s = max(SURE_S, float(times[at]) - now_s - self._tick_s - self._acts_s)
        batch = int(np.searchsorted(times, times[at] + 5.0)) - at
        curve = NextArrival(
            now_s, (0.0, gap_s, gap_s + SURE_S, max(HORIZON_S, 2 * gap_s)), (1.0, 1.0, 0.0, 0.0)
        )
        return Forecast(now_s, "oracle", curve, demand, float(batch), fitted_s=float(times[at]))

    def _demand(self, model: str, now_s: float) -> Demand:
        first_s, peaks = self._peaks[model]
        begin = math.floor((now_s - first_s) / STEP_S)
        steps = range(begin, begin + math.ceil(self._ahead_s / STEP_S))
        rows = tuple((float(peaks[i]),) * 2 if 0 <= i < len(peaks) else (0.0, 0.0) for i in steps)
        return Demand(first_s + begin * STEP_S, STEP_S, QUANTILES, rows, rows)


def _peaks(moments: Floats, load: Floats, first_s: float) -> Floats:
    """The most requests in progress in each step; `load` is from each of the moments on."""
    steps = np.floor((moments - first_s) / STEP_S).astype(np.int64)
    peaks = np.zeros(int(steps[-1]) + 1)
    np.maximum.at(peaks, steps, load)
    # What a step begins with.
    last = np.zeros(len(peaks))
    last[steps] = load
    filled = np.zeros(len(peaks), bool)
    filled[steps] = True
    where = np.maximum.accumulate(np.where(filled, np.arange(len(peaks)), 0))
    return np.asarray(np.maximum(peaks, np.concatenate([[0.0], last[where][:-1]])))


def _means(moments: Floats, load: Floats, first_s: float, over_s: float) -> Floats:
    """The mean over `over_s` around the middle of each step."""
    total = np.concatenate([[0.0], np.cumsum(load[:-1] * np.diff(moments))])
    middle = np.arange(first_s, float(moments[-1]) + STEP_S, STEP_S) + STEP_S / 2
    after, before = (np.interp(middle + side * over_s / 2, moments, total) for side in (1, -1))
    return np.asarray((after - before) / over_s)


__all__ = ["Oracle"]
