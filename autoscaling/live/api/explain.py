"""Why a model has the replicas that it has now, and until when: for someone who never read the code."""

from __future__ import annotations

import math
import zoneinfo
from collections.abc import Iterator
from datetime import UTC, tzinfo
from typing import Any

from autoscaling.core.types import Observation, Reason, Rung
from autoscaling.live.api.overrides import shown_override
from autoscaling.live.api.plain import plain
from autoscaling.live.api.policies import spec_fields
from autoscaling.live.api.reasons import Facts, clamp_sentence, sentence
from autoscaling.live.api.request import Request
from autoscaling.live.api.words import count, duration, moment
from autoscaling.live.invalid import InvalidValue
from autoscaling.live.records import Override

_RUNGS = {
    Rung.COLD: "dark, with no node that could run it",
    Rung.NODE: "dark, with a node that is up",
    Rung.WEIGHTS: "dark, with its weights on the node",
    Rung.TEMPLATE: "dark, with a process ready to be forked into its engine",
    Rung.PARKED: "parked: its engine waits in host memory, without a GPU",
    Rung.SERVING: "serving",
}


def explain(request: Request) -> dict[str, Any]:
    """GET explain/{model}; times are told on the clock of `timezone` (UTC by default)."""
    model = request.model()
    view, now_s = request.view, request.now_s
    zone = timezone(request)
    spec = request.models()[model]
    observation = view.observations().get(model, Observation(now_s))
    decision = view.decisions().get(model)
    overrides = [o for o in view.store.overrides(now_s) if o.model in (None, model)]
    text = list(_present(model, observation))
    if decision is None:
        text.append("The controller has not decided on it yet.")
    else:
        facts = Facts(spec, observation, decision, now_s, zone)
        text += _decided(facts)
    text += _mode(request.mode())
    text += _overrides(overrides, now_s, zone)
    return {
        "model": model,
        "now_s": now_s,
        "text": text,
        "mode": request.mode(),
        "spec": spec_fields(spec),
        "windows": plain(spec.windows),
        "observation": plain(observation),
        "decision": plain(decision),
        "overrides": [shown_override(override) for override in overrides],
    }


def timezone(request: Request) -> tzinfo:
    """The reader's clock. Raises InvalidValue."""
    name = request.query.get("timezone", "UTC")
    try:
        return UTC if name == "UTC" else zoneinfo.ZoneInfo(name)
    except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
        raise InvalidValue("timezone", name, "an IANA time zone like Europe/Berlin") from None


def _present(model: str, seen: Observation) -> Iterator[str]:
    if seen.ready is None:
        yield f"{model}: how many replicas are ready is not known."
        return
    if seen.ready or seen.starting:
        text = f"{model} has {count(seen.ready, 'replica')} ready"
        if seen.starting:
            text += f" and {seen.starting} starting"
    else:
        text = f"{model} has no replica"
        if seen.rung is not None:
            text += f"; it is {_RUNGS[Rung(min(seen.rung, Rung.PARKED))]}"
    load = f"{count(seen.in_flight or 0, 'request')} in progress, {seen.queued or 0} waiting"
    yield f"{text} ({load})."


def _decided(facts: Facts) -> Iterator[str]:
    decision = facts.decision
    if decision.replicas is None:
        wish = "It is left as it is."
    elif decision.replicas == 0 and decision.rung > Rung.COLD:
        wish = f"It should have no replica, and be kept {_RUNGS[decision.rung].split(':')[0]}."
    else:
        wish = f"It should have {count(decision.replicas, 'replica')}."
    yield f"{wish} The policy `{decision.policy}` decides."
    text = sentence(decision.reason, facts)
    yield text[:1].upper() + text[1:]
    for clamp in decision.clamps:
        if clamp is not decision.reason:
            yield clamp_sentence(clamp, facts)
    if profile := next((p for p in facts.observation.rungs if p.rung == facts.observation.rung), None):
        basis = (
            f"measured on {count(profile.starts, 'start')}"
            if profile.starts
            else "assumed, none was measured yet"
        )
        high = f", nine of ten within {duration(profile.delay_high_s)}"
        if profile.rung < Rung.SERVING:
            yield f"From where it is a start takes {duration(profile.delay_s)}{high} ({basis})."
    if math.isfinite(decision.until_s) and decision.until_s > facts.now_s:
        left = duration(decision.until_s - facts.now_s)
        yield (
            f"If nothing happens, this stands until {moment(decision.until_s, facts.now_s, facts.zone)} (in {left})."
        )
    elif decision.reason is not Reason.UNKNOWN_HOLD:
        yield "This stands until something happens: a request, or a new forecast."


def _mode(mode: str) -> Iterator[str]:
    if mode == "shadow":
        yield (
            "The controller's mode is shadow: it only records this. The replicas follow the requests (reactive) until "
            "`relight mode active`."
        )
    elif mode == "off":
        yield (
            "The controller's mode is off: the replicas follow the requests (reactive), and nothing is prewarmed until "
            "`relight mode active`."
        )


def _overrides(overrides: list[Override], now_s: float, zone: tzinfo) -> Iterator[str]:
    for override in overrides:
        if override.kind not in ("policy", "prewarm", "schedule"):
            continue
        values = ", ".join(f"{name} {_value(value)}" for name, value in override.value.items())
        if override.kind == "prewarm":
            span = [moment(float(override.value[name]), now_s, zone) for name in ("start_s", "end_s")]
            rest = ", ".join(
                f"{name} {value}"
                for name, value in override.value.items()
                if name not in ("start_s", "end_s")
            )
            values = f"{rest} from {span[0]} to {span[1]}"
        until = f" until {moment(override.until_s, now_s, zone)}" if override.until_s is not None else ""
        kind = "Policy set" if override.kind == "policy" else f"{override.kind.capitalize()} made"
        made = moment(override.made_s, now_s, zone)
        yield f"{kind} by {override.who} at {made}{until}: {values} (`relight undo {override.id}` takes it back)."


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {item:g}" for name, item in value.items()) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)
