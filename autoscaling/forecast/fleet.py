"""When the next request comes, by the regression over the whole fleet (see hazard)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoscaling.forecast.arrivals import ArrivalBase
from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.gap_record import Record, own_hazard, record_of, same_time
from autoscaling.forecast.hazard import CELLS_S, ONSETS, Rows, log_hazard
from autoscaling.forecast.history import TAUS_S, Floats, History, Recent
from autoscaling.forecast.prior import Prior

_TAUS: Floats = np.asarray(TAUS_S)
_MIDDLES: Floats = (CELLS_S[:-1] + CELLS_S[1:]) / 2


@dataclass(frozen=True, slots=True)
class FittedFleet(ArrivalBase):
    name: str
    record: Record
    coefficients: Floats
    own: Floats
    """gap_record.own_hazard in the middle of each of CELLS_S, shape (len(CELLS_S) - 1, 4)."""

    @staticmethod
    def of(name: str, record: Record, coefficients: Floats) -> FittedFleet:
        return FittedFleet(name, record, coefficients, own_hazard(record.gaps_s, _MIDDLES))

    def knowing(self, record: Record) -> FittedFleet:
        """The same, with a better record of the model's silences."""
        return FittedFleet.of(self.name, record, self.coefficients)

    def log_survival(self, now_s: float, recent: Recent, times_s: Floats) -> Floats:
        age_s = max(0.0, now_s - recent.last_s)
        edges, hazards = self._hazards(recent, age_s)
        gone = np.concatenate([[0.0], np.cumsum(hazards * np.diff(edges))])
        ages = age_s + times_s
        found = np.interp(ages, edges, gone)
        # Beyond the last cell it goes on as there.
        return -np.asarray(found + np.maximum(ages - edges[-1], 0.0) * hazards[-1])

    def _hazards(self, recent: Recent, age_s: float) -> tuple[Floats, Floats]:
        """Ages from the present one on, and the hazard between each two of them."""
        first = int(np.searchsorted(CELLS_S, age_s + 1e-3))
        later = CELLS_S[first:]
        edges = np.concatenate([[age_s], later if len(later) else [age_s + 3600.0]])
        age = (edges[:-1] + edges[1:]) / 2
        time_s = recent.last_s + age
        rates = np.asarray(recent.rates) * np.exp(np.minimum((recent.rates_s - recent.last_s) / _TAUS, 50.0))
        n = len(age)
        known = float(self.record.known)
        rows = Rows(
            counts=rates * _TAUS * np.exp(-age[:, None] / _TAUS),
            onsets_s=time_s[:, None] - np.asarray([recent.onsets_s[i] for i in ONSETS]),
            age_s=age,
            time_s=time_s,
            own=self.own[np.clip(np.arange(first - 1, first - 1 + n), 0, len(self.own) - 1)],
            typical=np.full(n, self.record.typical),
            known=np.full(n, known),
            day=same_time(self.record.active_s, time_s, np.inf),
        )
        return edges, np.exp(log_hazard(rows, self.coefficients))


@dataclass(frozen=True, slots=True)
class Fleet:
    """Recency, time of day, the model's own silences: weighed as in the whole fleet."""

    name: str = "fleet"

    def fit(self, history: History, prior: Prior) -> FittedFleet:
        if not prior.hazard.knows:
            raise NotApplicable("too few silences are known in the whole fleet")
        return FittedFleet.of(self.name, record_of(history), prior.hazard.coefficients)
