"""Prewarms and schedules: floors for a span of time, once or again and again."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from autoscaling.core.types import Spec
from autoscaling.live import cron
from autoscaling.live.api.overrides import Ends, ends, make, shown_override, undo
from autoscaling.live.api.plain import plain
from autoscaling.live.api.request import Refusal, Request
from autoscaling.live.invalid import InvalidValue
from autoscaling.live.overrides import understood
from autoscaling.live.values import (
    PrewarmValue,
    RungName,
    ScheduleValue,
    Value,
    parse,
)

DEFAULT_PREWARM_S = 900.0


class PrewarmBody(Value):
    """Who is to be warm, how warm, and when: from `start_s` (default: now) until `end_s`, or for `for_s`."""

    model: str
    replicas: int | None = None
    rung: RungName = "serving"
    start_s: float | None = None
    end_s: float | None = None
    for_s: Annotated[float, Field(gt=0)] | None = None


class ScheduleBody(ScheduleValue, Ends):
    """A schedule of a model; `model` null means every model."""

    model: str | None = None


def prewarms(request: Request) -> dict[str, Any]:
    """GET prewarms: those asked for by people and not over, and what became of all (the controller's own, too)."""
    model = request.optional_model()
    since_s, _ = request.span(86400.0, 400 * 86400.0)
    limit = request.whole("limit", 100, 1, 10_000)
    manual = sorted(_of_kind(request, "prewarm", model), key=lambda row: float(row["value"]["start_s"]))
    outcomes = request.view.store.prewarms(model, since_s, limit, until_s=request.told_until_s())
    return {"prewarms": manual, "outcomes": plain(list(outcomes))}


def add_prewarm(request: Request) -> dict[str, Any]:
    """POST prewarms."""
    body = request.parse(PrewarmBody)
    model = request.model(body.model)
    now_s = request.now_s
    start_s = now_s if body.start_s is None else body.start_s
    if body.end_s is not None and body.for_s is not None:
        raise InvalidValue("end_s", body.end_s, "either end_s or for_s, not both")
    end_s = body.end_s if body.end_s is not None else start_s + (body.for_s or DEFAULT_PREWARM_S)
    if end_s <= now_s:
        field, given = ("end_s", body.end_s) if body.end_s is not None else ("start_s", start_s)
        raise InvalidValue(field, given, f"a span that ends after now ({now_s:.0f})")
    replicas = body.replicas
    if replicas is None:
        replicas = 1 if body.rung == "serving" else 0
    value = parse(PrewarmValue, {"replicas": replicas, "rung": body.rung, "start_s": start_s, "end_s": end_s})
    _check(request, request.models()[model], value)
    mode = request.mode()
    if mode != "active" and start_s <= now_s:
        message = f"The controller's mode is {mode}: it would not act on a prewarm. `relight mode active` changes that."
        raise Refusal(409, message, field="mode", value=mode, expected="active")
    return {"prewarm": shown_override(make(request, "prewarm", model, value, end_s))}


def undo_prewarm(request: Request) -> dict[str, Any]:
    """DELETE prewarms/{id}."""
    return {"undone": [shown_override(undo(request, request.tail, "prewarm"))]}


def schedules(request: Request) -> dict[str, Any]:
    """GET schedules: those set at run time, and the windows of all (the fleet file's too) that come next."""
    model = request.optional_model()
    models = request.models()
    windows = [
        {"model": name, **plain(window)}
        for name, spec in models.items()
        if model in (None, name)
        for window in spec.windows
        if window.source == "schedule"
    ]
    return {"schedules": _of_kind(request, "schedule", model), "windows": windows}


def add_schedule(request: Request) -> dict[str, Any]:
    """POST schedules; the answer has the next spans. With dry_run=1 nothing is kept.

    Of one whose times begin before the last has ended there is one span, from now, with `end_s` null where no `until_s`
    ends it.
    """
    body = request.parse(ScheduleBody)
    model = None if body.model is None else request.model(body.model)
    given = body.model_dump(exclude={*Ends.model_fields, "model"}, exclude_none=True)
    if body.rung != "serving" and "replicas" not in body.model_fields_set:
        given["replicas"] = 0
    value = parse(ScheduleValue, given)
    models = request.models()
    for spec in models.values() if model is None else [models[model]]:
        _check(request, spec, value)
    made, until_s = None, ends(request, body)
    if not request.flag("dry_run"):
        made = shown_override(make(request, "schedule", model, value, until_s))
    return {"schedule": made, "next": _next(value, request.now_s, 3, until_s)}


def remove_schedule(request: Request) -> dict[str, Any]:
    """DELETE schedules/{id}."""
    if request.tail.startswith("fleet:"):
        message = f"{request.tail} is in the fleet file; take it out there."
        raise Refusal(
            409, message, field="id", value=request.tail, expected="an id of a schedule set at run time"
        )
    return {"undone": [shown_override(undo(request, request.tail, "schedule"))]}


def next_spans(request: Request) -> dict[str, Any]:
    """GET schedules/next: what the schedules, the fleet file's too, will do, in the order of time."""
    model, count = request.optional_model(), request.whole("count", 5, 1, 100)
    said = [(o.id, o.model, o.value, o.until_s) for o in _alive(request, "schedule", model)]
    for name, schedules in request.view.fleet_schedules().items():
        if model in (None, name):
            said += [(f"fleet:{index}", name, each, None) for index, each in enumerate(schedules)]
    found = []
    for schedule_id, of, given, until_s in said:
        value = understood("schedule", given)
        if not isinstance(value, ScheduleValue):
            continue
        replicas = value.replicas if value.rung == "serving" else 0
        shared = {"id": schedule_id, "model": of, "replicas": replicas, "rung": value.rung}
        spans = _next(value, request.now_s, count, until_s)
        found += [{**shared, **s} for s in spans if until_s is None or s["start_s"] < until_s]
    return {"next": sorted(found, key=lambda row: (row["start_s"], row["id"]))[:count]}


def _next(value: ScheduleValue, now_s: float, count: int, until_s: float | None) -> list[dict[str, Any]]:
    """The next spans; of a schedule that is always in force the one from now until it ends, None for never."""
    if cron.always(value.when()):
        return [{"start_s": now_s, "end_s": until_s}]
    return [{"start_s": start, "end_s": end} for start, end in cron.upcoming(value.when(), now_s, count)]


def _check(request: Request, spec: Spec, value: PrewarmValue | ScheduleValue) -> None:
    """Raises InvalidValue where the model can't come to be what is asked for."""
    if value.rung == "serving" and value.replicas > spec.max_replicas:
        raise InvalidValue(
            "replicas", value.replicas, f"at most {spec.max_replicas}, {spec.model}'s max_replicas"
        )
    if value.rung == "parked" and not (spec.park and request.view.parks()):
        said = "engine_host.park_memory_bytes is 0"
        if not spec.park:
            said = f"{spec.model}'s scaling.park is false"
        raise InvalidValue("rung", value.rung, f"weights, template or serving: {said} in the fleet file")


def _alive(request: Request, kind: str, model: str | None) -> list[Any]:
    overrides = request.view.store.overrides(request.now_s)
    return [o for o in overrides if o.kind == kind and (model is None or o.model in (None, model))]


def _of_kind(request: Request, kind: str, model: str | None) -> list[dict[str, Any]]:
    return [shown_override(override) for override in _alive(request, kind, model)]
