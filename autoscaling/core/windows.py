"""Floors from schedules and manual prewarms: in force from their start, and a start's time before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoscaling.core.seen import Seen
from autoscaling.core.types import Reason, Rung, Spec, Window


@dataclass(frozen=True, slots=True)
class Floor:
    """The windows that are in force, together."""

    replicas: int = 0
    rung: Rung = Rung.COLD
    replicas_reason: Reason = Reason.SCHEDULE
    rung_reason: Reason = Reason.SCHEDULE
    until_s: float = math.inf
    begun_s: float = -math.inf
    """The latest start among the windows for which something was begun. Given back at the next decision, they stay in
    force even if a start would by then take less."""


NO_FLOOR = Floor()


def floor_of(spec: Spec, seen: Seen, begun_s: float | None) -> Floor:
    """What the spec's windows ask for at `seen.now_s`; `begun_s` is that of the floor before."""
    if not spec.windows:
        return NO_FLOOR
    now_s = seen.now_s
    replicas, rung = 0, Rung.COLD
    replicas_reason = rung_reason = Reason.SCHEDULE
    until_s, begun = math.inf, -math.inf if begun_s is None else begun_s
    for window in spec.windows:
        if window.end_s <= now_s or window.end_s <= window.start_s:
            continue
        from_s = window.start_s - lead_s(seen, window.rung)
        if from_s > now_s and not (begun_s is not None and window.start_s <= begun_s):
            until_s = min(until_s, from_s)
            continue
        until_s = min(until_s, window.end_s)
        begun = max(begun, window.start_s)
        if window.rung == Rung.SERVING:
            if window.replicas > replicas:
                replicas, replicas_reason = window.replicas, _reason(window)
        elif window.rung > rung:
            rung, rung_reason = window.rung, _reason(window)
    return Floor(replicas, rung, replicas_reason, rung_reason, until_s, begun)


def lead_s(seen: Seen, rung: Rung) -> float:
    """How long before its time the way to `rung` must begin: what a start takes, less what is left from there."""
    if rung == Rung.SERVING:
        return seen.lead_s
    there = seen.prices.get(rung)
    if there is None or rung <= seen.rung:
        return 0.0
    return max(0.0, seen.lead_s - there.delay_high_s)


def _reason(window: Window) -> Reason:
    return Reason.SCHEDULE if window.source == "schedule" else Reason.MANUAL


__all__ = ["Floor", "floor_of", "lead_s"]
