"""When the next request comes, by the regression over the whole fleet (see hazard)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from autoscaling.forecast.arrivals import ArrivalBase
from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.gap_record import Record, own_hazard, record_of, same_time
from autoscaling.forecast.hazard import CELLS_S, DAY_S, END_S, ONSETS, bends, level, log_hazard, moving
from autoscaling.forecast.history import TAUS_S, Floats, History, Recent
from autoscaling.forecast.prior import Prior

_TAUS: Floats = np.asarray(TAUS_S)
_EDGES_S: Floats = np.concatenate([[0.0], CELLS_S])
_MIDDLES_S: Floats = (_EDGES_S[:-1] + _EDGES_S[1:]) / 2
_WIDTHS_S: Floats = np.diff(_EDGES_S)
_BENDS: Floats = bends(_MIDDLES_S)
_LAST_DAY = int(np.searchsorted(_EDGES_S, END_S - DAY_S))
_LEFT: Floats = np.exp(-_MIDDLES_S[:, None] / _TAUS)
"""What is left by then of each of the recent rates."""


@dataclass(frozen=True, slots=True)
class FittedFleet(ArrivalBase):
    name: str
    record: Record
    coefficients: Floats
    correction: Floats
    _level: list[Floats] = field(default_factory=list, compare=False, repr=False)
    """hazard.level in the middle of each of _EDGES_S' cells, once it was asked for."""
    _silence: list[tuple[Recent, Floats]] = field(default_factory=list, compare=False, repr=False)
    """The one that was asked for last, and what was found: it is asked for several times while it goes on."""

    def __reduce__(self) -> tuple[object, ...]:
        # Who gets it has ticks to keep; who fits it has time.
        return FittedFleet, (self.name, self.record, self.coefficients, self.correction, [self._levels()])

    def knowing(self, record: Record) -> FittedFleet:
        """The same, with a better record of the model's silences."""
        return FittedFleet(self.name, record, self.coefficients, self.correction)

    def log_survival(self, now_s: float, recent: Recent, times_s: Floats) -> Floats:
        gone = self._gone(recent)
        ages = max(0.0, now_s - recent.last_s) + np.concatenate([[0.0], times_s])
        # Beyond the last cell as Lomax's does, from the mean of its last day: the last cell is always of the time of
        # day at which the silence began.
        daily = (gone[-1] - gone[_LAST_DAY]) / (_EDGES_S[-1] - _EDGES_S[_LAST_DAY])
        beyond = daily * END_S * np.log(np.maximum(ages / END_S, 1.0))
        found = np.interp(ages, _EDGES_S, gone) + beyond
        return np.asarray(found[0] - found[1:])

    def _levels(self) -> Floats:
        if not self._level:
            own, n = own_hazard(self.record.gaps_s, _MIDDLES_S), len(_MIDDLES_S)
            typical, known = np.full(n, self.record.typical), np.full(n, float(self.record.known))
            self._level[:] = [level(_MIDDLES_S, own, typical, known, self.coefficients)]
        return self._level[0]

    def _gone(self, recent: Recent) -> Floats:
        """The integral of the silence's hazard up to each of _EDGES_S."""
        last = self._silence[0] if self._silence else None
        if last is not None and last[0] == recent:
            return last[1]
        time_s = recent.last_s + _MIDDLES_S
        rates = np.asarray(recent.rates) * np.exp(np.minimum((recent.rates_s - recent.last_s) / _TAUS, 50.0))
        lately = moving(
            time_s,
            counts=rates * _TAUS * _LEFT,
            onsets_s=time_s[:, None] - np.asarray([recent.onsets_s[i] for i in ONSETS]),
            day=same_time(self.record.active_s, time_s, np.inf),
            shape=_BENDS,
        )
        hazards = np.exp(log_hazard(self._levels(), lately, self.coefficients, _MIDDLES_S, self.correction))
        gone = np.concatenate([[0.0], np.cumsum(hazards * _WIDTHS_S)])
        self._silence[:] = [(recent, gone)]
        return gone


@dataclass(frozen=True, slots=True)
class Fleet:
    """Recency, time of day, the model's own silences: weighed as in the whole fleet."""

    name: str = "fleet"

    def fit(self, history: History, prior: Prior) -> FittedFleet:
        if not prior.hazard.knows:
            raise NotApplicable("too few silences are known in the whole fleet")
        return FittedFleet(self.name, record_of(history), prior.hazard.coefficients, prior.hazard.correction)
