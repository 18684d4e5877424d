"""What the controller is given of each model and of itself, as values that cross processes as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoscaling.core.types import Spec


@dataclass(frozen=True, slots=True)
class ModelSetup:
    """One model of the fleet file."""

    id: str
    aliases: tuple[str, ...]
    deployment: str
    """Its Serve deployment's name."""
    spec: Spec
    """As the fleet file says, without windows."""
    schedules: tuple[Mapping[str, Any], ...] = ()
    """{"cron", "duration_s", "timezone", "replicas", "rung"} each."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """What a replica takes, by Ray's names (CPU, GPU, custom ones)."""
    accelerator_types: tuple[str, ...] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)
    """The engine's spec as engine hosts read it."""
    own_template: bool = True
    """Whether a template with the model's engine already built is possible."""
    can_park: bool = False
    """Whether an engine of it can wait without its GPU."""
    inter_token_slo_s: float | None = None

    @property
    def start_deadline_s(self) -> float:
        """How long its engine may take to start."""
        return float(self.engine.get("start_deadline_s", 600.0))


@dataclass(frozen=True, slots=True)
class ControllerSetup:
    """The fleet file's `controller` section, and what it takes to carry out decisions."""

    models: tuple[ModelSetup, ...]
    mode: str = "active"
    store: str | None = None
    tick_s: float = 1.0
    plan_every_s: float = 5.0
    plan_expires_s: float = 10.0
    node_wait_s: float = 300.0
    gpu_budget: float | None = None
    spend_gpu_s_per_day: float | None = None
    shadow: Mapping[str, Any] | None = None
    """As an override of the kind "shadow" would say it."""
    host_config: Mapping[str, Any] = field(default_factory=dict)
    """What engine hosts are told where no gateway tells them."""
