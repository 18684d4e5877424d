"""Forecasts in virtual time: the live service's own book and fits, made when it would make them, at no delay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autoscaling.core.types import Forecast
from autoscaling.forecast.book import DEMAND_STALE_S, Book
from autoscaling.forecast.fit import FittedModel, Job, fit_standard, share_at
from autoscaling.forecast.prior import NO_FLEET, Prior, pooled
from autoscaling.forecast.schedule import CHANGED_ARRIVALS, CHANGED_SILENCES, SETTLE_S
from autoscaling.sim.peers import Peers
from autoscaling.sim.queueing import Floats
from autoscaling.traffic import LEVELS, Buckets, Traffic

REFIT_S = 12 * 3600.0
"""How often a model is fitted anew to which something came, without having changed much. Live it is 15 minutes, on
processors that wait anyway; what it changes in the forecasts is little."""
EARLIEST_S, EARLIEST_SHARE, LATEST_S = 300.0, 0.03, 3600.0
"""Between two fits of a model that changed, and so much of the time for which it is known, but never longer than that.
Live there is no such wait: fits have processes of their own there."""
FRESH_S = 5.0
"""A forecast that nothing has come since is as good for so long: what it says of the time from then on is the same."""

Fitter = Callable[[Job], FittedModel | None]


class Foresight(Protocol):
    """A forecaster in virtual time, as the replay uses it."""

    fits: int
    failures: Mapping[str, str]
    pools: bool
    """Whether it learns from the fleet at once, so that all models must get to the same moments; else it is told the
    whole trace before anything happens."""
    settles_s: float
    """For so long after a moment nothing is fitted for what has come since."""

    def watch(self, model: str, since_s: float, horizon_s: float) -> None: ...
    def coming(self, model: str, times: Floats, work: Floats) -> None: ...
    def arrived(self, model: str, times: Floats, work: Floats) -> None: ...
    def next_s(self, model: str) -> float: ...
    def demand_until_s(self, model: str) -> float:
        """Until when requests that come do not change how much it says will come; infinite if it says nothing."""

    def fit(self, model: str, now_s: float) -> None: ...
    def pool(self, peers: Peers, now_s: float) -> None: ...
    def forecast(self, model: str, now_s: float) -> Forecast | None: ...


class Recorder:
    """One model's traffic in the store's levels, bounded like the store's."""

    def __init__(self, model: str, since_s: float) -> None:
        self._model = model
        self._since_s = since_s
        self._new: list[tuple[Floats, Floats]] = []
        none = np.zeros(0, np.uint16)
        self._levels: list[tuple[NDArray[Any], ...]] = [
            (np.zeros(0, np.int64), np.zeros(0), np.zeros(0), none, none) for _ in LEVELS
        ]

    def add(self, times: Floats, busy_s: Floats) -> None:
        """Requests that came, and how long each is worked on."""
        if len(times):
            self._new.append((times, busy_s))

    def traffic(self, now_s: float) -> Traffic:
        """What the store would know."""
        self._settle(now_s)
        return Traffic(
            self._model,
            now_s,
            tuple(
                Buckets(
                    step_s=step_s,
                    start_s=max(self._since_s, now_s - kept_s),
                    end_s=now_s,
                    index=index,
                    arrivals=count.astype(np.float32),
                    input_tokens=np.zeros(len(index), np.float32),
                    output_tokens=np.zeros(len(index), np.float32),
                    busy_s=busy.astype(np.float32),
                    lead_s=lead_s,
                    trail_s=trail_s,
                )
                for (step_s, kept_s), (index, count, busy, lead_s, trail_s) in zip(
                    LEVELS, self._levels, strict=True
                )
            ),
        )

    def _settle(self, now_s: float) -> None:
        if not self._new:
            return
        times = np.concatenate([times for times, _ in self._new])
        worked = np.concatenate([busy for _, busy in self._new])
        self._new = []
        seconds = np.floor(times).astype(np.int64)
        for at, (step_s, kept_s) in enumerate(LEVELS):
            # In order, as they came.
            steps = seconds // int(step_s)
            begins = np.empty(len(steps), bool)
            begins[0] = True
            np.not_equal(steps[1:], steps[:-1], out=begins[1:])
            index, where = steps[begins], begins.cumsum() - 1
            count = np.bincount(where, minlength=len(index)).astype(np.float64)
            busy = np.bincount(where, worked, len(index))
            begin_s = index * int(step_s)
            lead_s = (seconds[begins] - begin_s).astype(np.uint16)
            # Each one's last is the one before the next one's first.
            last_s = seconds[np.append(np.flatnonzero(begins)[1:] - 1, -1)]
            trail_s = (begin_s + int(step_s) - 1 - last_s).astype(np.uint16)
            known = self._levels[at]
            kept = slice(int(np.searchsorted(known[0], (now_s - kept_s) // step_s)), None)
            if len(known[0]) and known[0][-1] == index[0]:
                count[0] += known[1][-1]
                busy[0] += known[2][-1]
                lead_s[0] = known[3][-1]
                kept = slice(kept.start, -1)
            new = (index, count, busy, lead_s, trail_s)
            self._levels[at] = tuple(
                np.concatenate([old[kept], more]) for old, more in zip(known, new, strict=True)
            )


@dataclass(slots=True)
class _Turn:
    recorder: Recorder
    since_s: float
    horizon_s: float
    due_s: float = math.inf
    fitted_s: float = -math.inf
    shown: Forecast | None = None
    """What still holds."""
    said: Forecast | None = None
    """What was said last."""


class SimForecasts:
    """`ForecastSource` for one simulation. Fits take no virtual time; `fits` and `failures` are counted."""

    def __init__(self, fitter: Fitter = fit_standard, refit_s: float = REFIT_S) -> None:
        self._fitter = fitter
        self._refit_s = refit_s
        self._book = Book(later=True)
        self._turns: dict[str, _Turn] = {}
        self._prior: Prior = NO_FLEET
        self.fits = 0
        self.pools = True
        self.settles_s = SETTLE_S
        self.failures: Mapping[str, str] = {}

    def watch(self, model: str, since_s: float, horizon_s: float) -> None:
        """Forecast this model; nothing is known of it before `since_s`.

        `horizon_s`: how far ahead demand is asked for. 0: not at all, for it decides nothing.
        """
        # From the full hour, so that every level of buckets begins with a whole one.
        self._turns.setdefault(model, _Turn(Recorder(model, since_s // 3600 * 3600), since_s, horizon_s))

    def coming(self, model: str, times: Floats, work: Floats) -> None:
        """Nothing: what is to come is not known."""

    def arrived(self, model: str, times: Floats, work: Floats) -> None:
        """Requests came, shape (n,) each."""
        if not len(times):
            return
        turn = self._turns[model]
        turn.shown = None
        turn.recorder.add(times, work)
        # As gateways tell: by the second.
        first = math.floor(times[0])
        if times[-1] < first + 1:
            self._book.arrived(model, float(first), len(times))
        else:
            for second, count in enumerate(np.bincount(times.astype(np.int64) - first).tolist(), first):
                if count:
                    self._book.arrived(model, float(second), count)
        fitted, silences, arrivals = self._book.since_fit(model)
        now_s = float(times[-1])
        if fitted is None:
            turn.due_s = min(turn.due_s, now_s + SETTLE_S)
            return
        more = silences > CHANGED_SILENCES * fitted.known_silences
        much = arrivals > 20 and arrivals > CHANGED_ARRIVALS * fitted.known_arrivals
        wait_s = self._refit_s
        if more or much:
            wait_s = min(LATEST_S, max(EARLIEST_S, EARLIEST_SHARE * (now_s - turn.since_s)))
        turn.due_s = min(turn.due_s, max(now_s + SETTLE_S, turn.fitted_s + wait_s))

    def next_s(self, model: str) -> float:
        """When it is fitted next; infinite if nothing came since."""
        return self._turns[model].due_s

    def demand_until_s(self, model: str) -> float:
        """As long as the book goes by what it said last."""
        shown = self._turns[model].said
        return math.inf if shown is None or shown.demand is None else shown.demand.made_s + DEMAND_STALE_S

    def fit(self, model: str, now_s: float) -> None:
        """Where that is due."""
        turn = self._turns[model]
        if turn.due_s > now_s:
            return
        turn.due_s, turn.fitted_s = math.inf, now_s
        turn.shown = turn.said = None
        seen = self._book.begin_fit(model)
        self.fits += 1
        try:
            known = turn.recorder.traffic(now_s)
            fitted = self._fitter(Job(known, now_s, turn.horizon_s, self._prior, seen, bands=False))
        except Exception as error:  # noqa: BLE001 - as live: the model keeps its last fit, and it is told
            self.failures = {**self.failures, model: f"{type(error).__name__}: {error}"}
            return
        if fitted is not None:
            self._book.install(model, fitted if turn.horizon_s > 0 else replace(fitted, demand=None))

    def pool(self, peers: Peers, now_s: float) -> None:
        """What the fleet's models have in common by now. All of them must have got to the same moment."""
        # Live a model is fitted at least every hour, whether something came or not; here, only where something did.
        mine = {
            model: share_at(fit, self._book.page(model).recent, now_s, self._prior.hazard)
            for model, fit in self._book.fits().items()
        }
        shares = {model: share for part in peers.gather(mine) for model, share in part.items()}
        if shares:
            self._prior = pooled((share for _, share in sorted(shares.items())), self._prior)

    def forecast(self, model: str, now_s: float) -> Forecast | None:
        """Of the last fit, as of about now."""
        turn = self._turns[model]
        shown = turn.shown
        if shown is not None and 0 <= now_s - shown.made_s < FRESH_S:
            return shown
        shown = self._book.forecast(model, now_s)
        if shown is not None and shown.fitted_s is None:
            shown = replace(shown, fitted_s=turn.fitted_s)
        turn.shown = turn.said = shown
        return shown


class NoForecasts:
    """For policies that ask for none."""

    def __init__(self) -> None:
        self.fits = 0
        self.pools = True
        self.settles_s = math.inf
        self.failures: Mapping[str, str] = {}

    def watch(self, model: str, since_s: float, horizon_s: float) -> None:
        """Nothing."""

    def coming(self, model: str, times: Floats, work: Floats) -> None:
        """Nothing."""

    def arrived(self, model: str, times: Floats, work: Floats) -> None:
        """Nothing."""

    def next_s(self, model: str) -> float:
        """Never."""
        return math.inf

    def demand_until_s(self, model: str) -> float:
        """For ever."""
        return math.inf

    def fit(self, model: str, now_s: float) -> None:
        """Nothing."""

    def pool(self, peers: Peers, now_s: float) -> None:
        """Nothing."""

    def forecast(self, model: str, now_s: float) -> Forecast | None:
        """None."""
        return None


__all__ = ["Foresight", "NoForecasts", "Recorder", "SimForecasts"]
