"""What the control API asks of the controller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from autoscaling.core.plan import Plan
from autoscaling.core.types import Decision, Forecast, Observation, Spec

if TYPE_CHECKING:
    from autoscaling.live.store import Store


class ControllerView(Protocol):
    """The controller as it is now. Every call answers from memory and from any thread; none blocks the tick."""

    @property
    def store(self) -> Store: ...

    def now_s(self) -> float:
        """Unix seconds, by the controller's clock."""
        ...

    def models(self) -> Mapping[str, Spec]:
        """How every model is scaled now: the fleet file with what was overridden and scheduled."""
        ...

    def base_models(self) -> Mapping[str, Spec]:
        """How every model is scaled by the fleet file alone."""
        ...

    def fleet_schedules(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """The fleet file's schedules of every model, as it says them."""
        ...

    def aliases(self) -> Mapping[str, str]:
        """The id of the model behind each of the fleet's other names."""
        ...

    def mode(self) -> str:
        """active, shadow or off."""
        ...

    def parks(self) -> bool:
        """Whether nodes have host memory for parked engines."""
        ...

    def observations(self) -> Mapping[str, Observation]: ...

    def decisions(self) -> Mapping[str, Decision]:
        """The latest decision on each model."""
        ...

    def shadow_decisions(self) -> Mapping[str, Mapping[str, Decision]]:
        """Name of the shadow policy -> model -> its latest decision."""
        ...

    def forecast(self, model: str) -> Forecast | None: ...

    def plan(self) -> Plan | None:
        """The plan that was published last, None before the first."""
        ...

    def health(self) -> Mapping[str, Any]:
        """Of the store, the forecaster and the loop: last_tick_s, tick_ms, errors."""
        ...

    def overrides_changed(self) -> None:
        """Overrides were written: read them again, and plan anew at the next tick."""
        ...
