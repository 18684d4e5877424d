"""Policies, the mode and shadow policies: what decides, and what is set of it at run time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from autoscaling.core.policies import wrong_keep
from autoscaling.core.types import Spec
from autoscaling.live import catalog
from autoscaling.live.api.overrides import Ends, draft, ends, keep, make, shown_override, undo
from autoscaling.live.api.plain import plain
from autoscaling.live.api.request import Refusal, Request
from autoscaling.live.invalid import InvalidValue
from autoscaling.live.overrides import merged
from autoscaling.live.records import Override
from autoscaling.live.values import ModeValue, PolicyValue, parse


class PolicyBody(PolicyValue, Ends):
    """What to set, and until when."""


class ModeBody(ModeValue, Ends):
    """The mode, and until when."""


def listing(request: Request) -> dict[str, Any]:
    """GET policies: those that there are, and the one of every model."""
    overrides = request.view.store.overrides(request.now_s)
    models = [_model(request, spec, overrides) for spec in request.models().values()]
    return {
        "policies": plain(tuple(catalog.policies().values())),
        "models": models,
        "mode": request.mode(),
    }


def show(request: Request) -> dict[str, Any]:
    """GET policies/{model}."""
    spec = request.models()[request.model()]
    return _model(request, spec, request.view.store.overrides(request.now_s))


def put(request: Request) -> dict[str, Any]:
    """PUT policies/{model}, or PUT policies for the whole fleet; with dry_run=1 it is only checked."""
    model = request.model() if request.tail else None
    body = request.parse(PolicyBody)
    value = parse(PolicyValue, body.model_dump(exclude=set(Ends.model_fields), exclude_none=True))
    specs = request.models()
    chosen = {model: specs[model]} if model is not None else specs
    for spec in chosen.values():
        checked(spec, value)
    override = draft(request, "policy", model, value, ends(request, body))
    # What is said of one model holds over what is said for the whole fleet.
    after = request.models(override)
    if not request.flag("dry_run"):
        keep(request, override)
    shown = {
        name: {"before": spec_fields(spec), "after": spec_fields(after[name])}
        for name, spec in chosen.items()
    }
    return {"override": None if request.flag("dry_run") else shown_override(override), "models": shown}


def unset(request: Request) -> dict[str, Any]:
    """DELETE policies/{model}, or DELETE policies: everything that was set for it, or for the whole fleet."""
    model = request.model() if request.tail else None
    found = [
        o for o in request.view.store.overrides(request.now_s) if o.kind == "policy" and o.model == model
    ]
    if not found:
        of = f"for {model}" if model else "for the whole fleet"
        raise Refusal(404, f"Nothing was set {of}.", field="model", value=model)
    return {"undone": [shown_override(undo(request, override.id)) for override in found]}


def checked(spec: Spec, value: PolicyValue) -> Spec:
    """The spec with this layer. Raises InvalidValue where the two contradict each other."""
    low = spec.min_replicas if value.min_replicas is None else value.min_replicas
    high = spec.max_replicas if value.max_replicas is None else value.max_replicas
    if low > high:
        field, given, bound = "min_replicas", low, f"at most max_replicas ({high} for {spec.model})"
        if value.min_replicas is None:
            field, given, bound = "max_replicas", high, f"at least min_replicas ({low} for {spec.model})"
        raise InvalidValue(field, given, bound)
    if value.params:
        catalog.check(value.policy or spec.policy, value.params)
        if wrong := wrong_keep(value.policy or spec.policy, value.params, value.keep_alive_s):
            raise InvalidValue(*wrong)
    after = merged(spec, value)
    replicas = after.params.get("replicas", 0) if after.policy == "fixed" else 0
    if replicas > after.max_replicas:
        if value.max_replicas is not None and not (value.params and "replicas" in value.params):
            bound = f"at least the {replicas:g} replicas that {spec.model} is fixed at"
            raise InvalidValue("max_replicas", value.max_replicas, bound)
        bound = f"at most max_replicas ({after.max_replicas} for {spec.model})"
        raise InvalidValue("params.replicas", replicas, bound)
    return after


def mode(request: Request) -> dict[str, Any]:
    """GET mode."""
    found = [o for o in request.view.store.overrides(request.now_s) if o.kind == "mode"]
    latest = max(found, key=lambda override: override.made_s, default=None)
    return {"mode": request.mode(), "override": shown_override(latest) if latest else None}


def put_mode(request: Request) -> dict[str, Any]:
    """PUT mode."""
    body = request.parse(ModeBody)
    override = make(request, "mode", None, ModeValue(mode=body.mode), ends(request, body))
    return {"mode": body.mode, "override": shown_override(override)}


def _model(request: Request, spec: Spec, overrides: Iterable[Override]) -> dict[str, Any]:
    base = request.view.base_models().get(spec.model)
    layers = [o for o in overrides if o.kind == "policy" and o.model in (None, spec.model)]
    return {
        "model": spec.model,
        "spec": spec_fields(spec),
        "base": None if base is None else spec_fields(base),
        "overridden": [] if base is None else _differing(spec, base),
        "overrides": [shown_override(override) for override in layers],
        "windows": plain(spec.windows),
    }


def spec_fields(spec: Spec) -> dict[str, Any]:
    shown: dict[str, Any] = plain(replace(spec, windows=()))
    del shown["windows"]
    return shown


def _differing(spec: Spec, base: Spec) -> list[str]:
    names = [field.name for field in fields(Spec) if field.name != "windows"]
    return [name for name in names if _comparable(getattr(spec, name)) != _comparable(getattr(base, name))]


def _comparable(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value
