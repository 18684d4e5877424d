"""The seam between forecasters and what uses them."""

from __future__ import annotations

from typing import Protocol

from autoscaling.core.types import Forecast
from autoscaling.forecast.history import History, Recent
from autoscaling.forecast.prior import Prior


class NotApplicable(Exception):
    """The history does not have what this forecaster needs (too short, not regular); says what."""


class Fitted(Protocol):
    """What a forecaster learned of one model. Picklable, some kilobytes."""

    @property
    def name(self) -> str: ...

    def forecast(self, now_s: float, recent: Recent | None) -> Forecast:
        """As of `now_s`, given what came lately; `recent` is None if nothing ever came."""
        ...


class Forecaster(Protocol):
    """Learns from one model's history, and what it does not say from the fleet's. Picklable."""

    @property
    def name(self) -> str: ...

    def fit(self, history: History, prior: Prior) -> Fitted:
        """Raises NotApplicable where it has nothing to learn from. Deterministic: the same history, the same result."""
        ...
