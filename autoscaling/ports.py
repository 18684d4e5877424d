"""What the loop asks of the world. `live` (the cluster) and `sim` (the simulator) implement it apart from each other.

All are called with the present time and return at once: what takes long (metrics, fits, databases) goes on beside
them, and they tell what is known by now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from autoscaling.core.accounts import Prewarm, Usage
from autoscaling.core.types import Decision, Forecast, Observation, Spec, State


class Clock(Protocol):
    """The one place where time is read."""

    def now_s(self) -> float:
        """Unix seconds."""
        ...

    def monotonic_s(self) -> float:
        """Seconds that never go back, for durations."""
        ...


class SpecSource(Protocol):
    """How each model is to be scaled now: the fleet file with what was overridden and scheduled."""

    def specs(self, now_s: float) -> Mapping[str, Spec]: ...


class MetricsSource(Protocol):
    """What is seen. A model that is missing is unknown, and is held."""

    def observe(self, now_s: float) -> Mapping[str, Observation]: ...


class ForecastSource(Protocol):
    """The latest forecast of a model, None where there is none."""

    def forecast(self, model: str, now_s: float) -> Forecast | None: ...


class Actuator(Protocol):
    """Makes decisions so. Applying the same ones again changes nothing."""

    def apply(self, now_s: float, specs: Mapping[str, Spec], decisions: Sequence[Decision]) -> None:
        """`decisions` are all that stand, one for each model, at every tick."""
        ...


class DecisionSink(Protocol):
    """Keeps what was decided and what must be remembered."""

    def record(
        self,
        now_s: float,
        observations: Mapping[str, Observation],
        decisions: Sequence[Decision],
        states: Mapping[str, State],
    ) -> None:
        """`observations` are all, `decisions` and `states` those that are new at this tick."""
        ...


class AccountSink(Protocol):
    """Keeps what was used and what prewarms were worth."""

    def account(self, now_s: float, usage: Sequence[Usage], prewarms: Sequence[Prewarm]) -> None:
        """`usage` is to be added up, a prewarm replaces what was said of the same id."""
        ...
