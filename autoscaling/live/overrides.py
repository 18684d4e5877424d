"""What people said at run time, put over what the fleet file says. Pure.

Policies are layers: first those for the whole fleet, then those for the one model, each in the order in which they were
made, and what a later one says wins. A layer that names another policy drops the parameters of the one before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from autoscaling.core.policies import KEEPS
from autoscaling.core.policies.following import IDLE
from autoscaling.core.types import Rung, Spec, Window
from autoscaling.live import cron
from autoscaling.live.invalid import InvalidValue
from autoscaling.live.records import Override, OverrideKind
from autoscaling.live.values import (
    KINDS,
    AnyValue,
    ModeValue,
    PolicyValue,
    PrewarmValue,
    ScheduleValue,
    ShadowValue,
    parse,
    rung_of,
)

Report = Callable[[str, InvalidValue], None]
"""Told the id of an override, or "MODEL fleet:INDEX" of a schedule in the fleet file, and what is wrong with it."""
FleetSchedules = Mapping[str, Sequence[Mapping[str, Any]]]
"""Model -> its schedules in the fleet file: {"cron", "duration_s", "timezone", "replicas", "rung"} each."""

_FIELDS = (
    "wait_cost",
    "keep_alive_s",
    "min_replicas",
    "max_replicas",
    "target_ongoing_requests",
    "priority",
)


def apply(  # noqa: PLR0917 - the contract names them in this order
    base: Mapping[str, Spec],
    overrides: Sequence[Override],
    fleet_schedules: FleetSchedules,
    now_s: float,
    horizon_s: float,
    report: Report | None = None,
) -> dict[str, Spec]:
    """Every model's spec as it is in force at `now_s`, its windows up to `now_s + horizon_s`.

    Never raises: an override that is not understood, which another version wrote, is left out and told to `report`.
    One for a model that is gone is left out, and nothing is wrong with it: it is still listed with the others, and
    holds again when the model is back.
    """
    layers, windows = _Layers(), _Windows(now_s, now_s + horizon_s)
    for override in _in_force(overrides, now_s):
        if override.model is not None and override.model not in base:
            continue
        value = understood(override.kind, override.value, override.id, report)
        if isinstance(value, PolicyValue):
            layers.add(override.model, value)
        elif isinstance(value, PrewarmValue):
            windows.add_prewarm(override, value)
        elif isinstance(value, ScheduleValue):
            windows.add_schedule(override.model, override.id, value)
    for model, schedules in fleet_schedules.items():
        for index, schedule in enumerate(schedules):
            value = understood("schedule", schedule, f"{model} fleet:{index}", report)
            if isinstance(value, ScheduleValue):
                windows.add_schedule(model, f"fleet:{index}", value)
    return {model: replace(layers.over(spec), windows=windows.of(spec)) for model, spec in base.items()}


def merged(spec: Spec, value: PolicyValue) -> Spec:
    """One layer over a spec. Where the two contradict each other in the bounds, the layer's word holds."""
    changes: dict[str, Any] = {name: given for name in _FIELDS if (given := getattr(value, name)) is not None}
    policy = value.policy or spec.policy
    params = dict(spec.params) if policy == spec.policy else {}
    if value.keep_alive_s is not None and policy in KEEPS:
        # The parameter goes before the field: what this layer says would do nothing.
        params.pop(IDLE.name, None)
    params.update(value.params or {})
    low, high = changes.get("min_replicas", spec.min_replicas), changes.get("max_replicas", spec.max_replicas)
    if low > high:
        if value.max_replicas is not None:
            changes["min_replicas"] = high
        else:
            changes["max_replicas"] = low
    return replace(spec, policy=policy, params=params, **changes)


def mode(overrides: Sequence[Override], default: str, now_s: float, report: Report | None = None) -> str:
    """The mode that was set last, `default` where none was."""
    found = default
    for override in _in_force(overrides, now_s):
        if override.kind == "mode":
            value = understood("mode", override.value, override.id, report)
            found = value.mode if isinstance(value, ModeValue) else found
    return found


def shadows(
    specs: Mapping[str, Spec], overrides: Sequence[Override], now_s: float, report: Report | None = None
) -> dict[str, dict[str, Spec]]:
    """Name of each shadow policy -> model -> how it would scale it. Of two of one name the later holds."""
    found: dict[str, dict[str, Spec]] = {}
    for override in _in_force(overrides, now_s):
        value = None
        if override.kind == "shadow":
            value = understood("shadow", override.value, override.id, report)
        if isinstance(value, ShadowValue):
            layer = value.as_policy()
            chosen = {m: spec for m, spec in specs.items() if override.model in (None, m)}
            found[value.name] = {model: merged(spec, layer) for model, spec in chosen.items()}
    return found


def parsed(kind: OverrideKind, value: Mapping[str, Any]) -> AnyValue:
    """An override's value. Raises InvalidValue. The same value is parsed once, however often it is asked for."""
    return _parsed(kind, _frozen(value))


def understood(
    kind: OverrideKind, value: Mapping[str, Any], label: str = "", report: Report | None = None
) -> AnyValue | None:
    try:
        return parsed(kind, value)
    except InvalidValue as error:
        if report is not None:
            report(label, error)
        return None


def _in_force(overrides: Iterable[Override], now_s: float) -> list[Override]:
    """In the order in which they were made. A clock that was set back ends none."""
    alive = [o for o in overrides if o.undone_s is None and (o.until_s is None or o.until_s > now_s)]
    return sorted(alive, key=lambda o: (o.made_s, o.id))


def _frozen(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), sort_keys=True)


@lru_cache(maxsize=8192)
def _parsed(kind: OverrideKind, value: str) -> AnyValue:
    return parse(KINDS[kind], json.loads(value))


class _Layers:
    def __init__(self) -> None:
        self._fleet: list[PolicyValue] = []
        self._models: dict[str, list[PolicyValue]] = {}

    def add(self, model: str | None, value: PolicyValue) -> None:
        (self._fleet if model is None else self._models.setdefault(model, [])).append(value)

    def over(self, spec: Spec) -> Spec:
        for value in (*self._fleet, *self._models.get(spec.model, ())):
            spec = merged(spec, value)
        return spec


class _Windows:
    def __init__(self, from_s: float, until_s: float) -> None:
        self._from_s = from_s
        self._until_s = until_s
        self._fleet: list[Window] = []
        self._models: dict[str, list[Window]] = {}

    def add_prewarm(self, override: Override, value: PrewarmValue) -> None:
        if value.end_s > self._from_s and value.start_s < self._until_s:
            self._add(override.model, value, (value.start_s, value.end_s), "prewarm", override.id)

    def add_schedule(self, model: str | None, schedule_id: str, value: ScheduleValue) -> None:
        for span in cron.spans(value.when(), self._from_s, self._until_s):
            self._add(model, value, span, "schedule", schedule_id)

    def _add(
        self,
        model: str | None,
        value: PrewarmValue | ScheduleValue,
        span: tuple[float, float],
        source: str,
        window_id: str,
    ) -> None:
        rung = rung_of(value.rung)
        replicas = value.replicas if rung is Rung.SERVING else 0
        window = Window(*span, replicas, rung, source, window_id)
        (self._fleet if model is None else self._models.setdefault(model, [])).append(window)

    def of(self, spec: Spec) -> tuple[Window, ...]:
        found = (*self._fleet, *self._models.get(spec.model, ()))
        return tuple(sorted((*spec.windows, *found), key=lambda window: (window.start_s, window.id)))


__all__ = ["FleetSchedules", "Report", "apply", "merged", "mode", "parsed", "shadows"]
