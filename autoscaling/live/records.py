"""What the store keeps, as values. Times are Unix seconds; JSON columns hold plain values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from autoscaling.core.types import Rung

OverrideKind = Literal["policy", "prewarm", "schedule", "mode", "shadow"]


@dataclass(frozen=True, slots=True)
class TrafficRow:
    """What came in one second. Rows of the same model and second are added up."""

    model: str
    second: int
    arrivals: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    busy_s: float = 0.0
    """Request-seconds in progress, queued ones not counted."""
    waited_s: float = 0.0
    """Request-seconds spent waiting for an engine."""


@dataclass(frozen=True, slots=True)
class ColdStartRow:
    """One start of an engine. Known by its engine and when that was ready; said again, it replaces what was said."""

    model: str
    engine_id: str
    ready_s: float
    begun_s: float
    total_s: float
    kind: str
    """prebuilt, forked, adopted."""
    node: str = ""
    rung: Rung = Rung.TEMPLATE
    """Where it began."""
    prewarmed: bool = False
    """No request waited for it when it began."""
    phases: tuple[Mapping[str, Any], ...] = ()
    """{"name", "start_s", "duration_s"} each."""


@dataclass(frozen=True, slots=True)
class Override:
    """Something a person said at run time. It stays in the record when it ends or is undone."""

    id: str
    kind: OverrideKind
    model: str | None
    """None: the whole fleet."""
    value: Mapping[str, Any]
    who: str
    made_s: float
    until_s: float | None = None
    """None: until undone."""
    undone_s: float | None = None
    undone_by: str | None = None


@dataclass(frozen=True, slots=True)
class PrewarmRow:
    """One prewarm: what it cost and whether it was worth it. Written when it begins, and again as it goes on."""

    id: str
    model: str
    begun_s: float
    reason: str
    replicas: int
    rung: Rung
    ready_s: float | None = None
    hit_s: float | None = None
    """When the first request met it."""
    ended_s: float | None = None
    """When it was hit, or given up."""
    cost_gpu_s: float = 0.0
    """From its beginning until it was hit or given up."""
    spared_requests: int = 0
    spared_wait_s: float = 0.0
    """What those requests would have waited, by the model's measured cold start."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What one model cost in one UTC day. Rows of the same model, day and source are added up."""

    model: str
    day: str
    """YYYY-MM-DD."""
    source: str = "active"
    """active, or shadow:NAME for what a shadow policy would have cost."""
    gpu_s: Mapping[str, float] = field(default_factory=dict)
    """GPU-seconds by rung name."""
    requests: int = 0
    cold_requests: int = 0
    waited_s: float = 0.0
    cold_starts: int = 0
