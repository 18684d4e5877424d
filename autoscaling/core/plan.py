"""What the controller publishes and the policy inside Serve acts on: decisions, until they expire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autoscaling.core.types import Reason, Rung, Spec


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of a plan."""

    replicas: int | None
    """None: the plan has no opinion, Serve's policy decides reactively."""
    rung: Rung
    reason: Reason
    until_s: float
    spec: Spec
    """With everything overridden at run time, so that what follows the plan needs no store."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Holds from `made_s` until `expires_s`; after that nobody may act on it."""

    made_s: float
    expires_s: float
    entries: Mapping[str, Entry] = field(default_factory=dict)
