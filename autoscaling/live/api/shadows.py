"""Policies that decide beside the active one and change nothing, and how they compare with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoscaling.live.api.overrides import Ends, ends, make, shown_override, undo
from autoscaling.live.api.plain import plain
from autoscaling.live.api.policies import checked
from autoscaling.live.api.records import DAY_S, day_of, usage_total
from autoscaling.live.api.request import Refusal, Request
from autoscaling.live.records import Override, UsageRow
from autoscaling.live.values import ShadowValue, parse


class ShadowBody(ShadowValue, Ends):
    """The shadow policy, for one model or all, and until when."""

    model: str | None = None


def listing(request: Request) -> dict[str, Any]:
    """GET shadow: each shadow policy, what it would do now, and how it compares with the active one."""
    overrides = [o for o in request.view.store.overrides(request.now_s) if o.kind == "shadow"]
    by_name = {str(o.value.get("name", "shadow")): o for o in overrides}
    latest = request.view.shadow_decisions()
    shown = []
    for name in sorted({*by_name, *latest}):
        override = by_name.get(name)
        decided = latest.get(name, {})
        shown.append(
            {
                "name": name,
                "override": plain(override),
                "decisions": {model: plain(decision) for model, decision in decided.items()},
                "comparison": _comparison(
                    request, name, override.made_s if override else request.now_s - 7 * DAY_S
                ),
            }
        )
    return {"shadows": shown, "active": {m: plain(d) for m, d in request.view.decisions().items()}}


def _comparison(request: Request, name: str, since_s: float) -> dict[str, Any]:
    """Both policies over the time in which the shadow ran.

    Of that time the active policy's usage is kept under `beside:NAME`. Where it is not, whole days are compared, and
    `same_span` is false: on the first day the active policy then counts from midnight.
    """
    store = request.view.store
    since_day, today = day_of(since_s), day_of(request.now_s)
    shadow = list(store.usage(since_day, today, None, f"shadow:{name}"))
    beside = list(store.usage(since_day, today, None, f"beside:{name}"))
    same_span = bool(beside)
    if not same_span:
        seen = {(row.model, row.day) for row in shadow}
        beside = [r for r in store.usage(since_day, today, None, "active") if (r.model, r.day) in seen]
    mine, theirs = usage_total(shadow), usage_total(beside)
    return {
        "since_s": since_s,
        "until_s": request.now_s,
        "same_span": same_span,
        "shadow": plain(mine),
        "active": plain(theirs),
        "gpu_s_difference": mine["gpu_s"] - theirs["gpu_s"],
        "waited_s_difference": mine["waited_s"] - theirs["waited_s"],
        "models": _by_model(shadow, beside),
    }


def _by_model(shadow: list[UsageRow], active: list[UsageRow]) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for model in sorted({row.model for row in shadow}):
        mine = usage_total(row for row in shadow if row.model == model)
        theirs = usage_total(row for row in active if row.model == model)
        found[model] = {
            "gpu_s_difference": mine["gpu_s"] - theirs["gpu_s"],
            "waited_s_difference": mine["waited_s"] - theirs["waited_s"],
        }
    return found


def put(request: Request) -> dict[str, Any]:
    """PUT shadow: replaces the shadow policy of the same name."""
    body = request.parse(ShadowBody)
    model = None if body.model is None else request.model(body.model)
    value = parse(ShadowValue, body.model_dump(exclude={*Ends.model_fields, "model"}, exclude_none=True))
    specs = request.models()
    for spec in specs.values() if model is None else [specs[model]]:
        checked(spec, value.as_policy())
    before = _shadows_named(request, value.name)
    made = make(request, "shadow", model, value, ends(request, body))
    for override in before:
        undo(request, override.id)
    return {"override": shown_override(made)}


def remove(request: Request) -> dict[str, Any]:
    """DELETE shadow/{name}."""
    found = _shadows_named(request, request.tail)
    if not found:
        raise Refusal(404, f"There is no shadow policy {request.tail!r}.", field="name", value=request.tail)
    return {"undone": [shown_override(undo(request, override.id)) for override in found]}


def _shadows_named(request: Request, name: str) -> list[Override]:
    overrides = request.view.store.overrides(request.now_s)
    return [o for o in overrides if o.kind == "shadow" and o.value.get("name", "shadow") == name]
