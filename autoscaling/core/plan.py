"""What the controller publishes and the policy inside Serve acts on: decisions, until they expire."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from autoscaling.core.codec import CodecError, from_plain, parse, to_plain
from autoscaling.core.decide import decide
from autoscaling.core.policies import POLICIES
from autoscaling.core.policies.reactive import DELAY
from autoscaling.core.seen import known
from autoscaling.core.series import need_of, push_peak
from autoscaling.core.types import Decision, Observation, Reason, Rung, Spec, State

VERSION = 1
HOLD_S = 3.0
"""What demand raised above the plan stays for so long: by then the controller has seen the demand too. A gateway
reports within a second, the controller decides within another, and the plan is read within half of one."""

_FOLLOWER = "reactive"


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
    ceiling: int | None = None
    """At most so many, whatever is asked: a budget said so. None: the spec's max_replicas alone."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Holds from `made_s` until `expires_s`; after that nobody may act on it."""

    made_s: float
    expires_s: float
    entries: Mapping[str, Entry] = field(default_factory=dict)

    def entry(self, model: str, now_s: float) -> Entry | None:
        """What it says of the model; None if that is nothing, or not any more."""
        return self.entries.get(model) if now_s < self.expires_s else None


@dataclass(frozen=True, slots=True)
class BrokenPlan:
    """What was read is no plan, and why. The last good one stands until it expires."""

    message: str


def make_plan(
    now_s: float, specs: Mapping[str, Spec], decisions: Iterable[Decision], ttl_s: float = 10.0
) -> Plan:
    """The decisions as a plan. One for a model without a spec is left out."""
    entries = {}
    for decision in decisions:
        spec = specs.get(decision.model)
        if spec is not None:
            entries[decision.model] = Entry(
                replicas=decision.replicas,
                rung=decision.rung,
                reason=decision.reason,
                until_s=decision.until_s,
                spec=spec,
                ceiling=decision.ceiling,
            )
    return Plan(now_s, now_s + ttl_s, entries)


def to_json(plan: Plan) -> str:
    """One line, with its version."""
    return json.dumps({"version": VERSION, **to_plain(plan)}, separators=(",", ":"), allow_nan=False)


def from_json(text: str | bytes) -> Plan | BrokenPlan:
    """All of the plan or none of it. One of another version is broken: the two sides are then of different releases."""
    try:
        data = parse(text)
        if not isinstance(data, dict) or data.get("version") != VERSION:
            found = data.get("version") if isinstance(data, dict) else type(data).__name__
            return BrokenPlan(f"version: {found!r} is not {VERSION}")
        plan = from_plain(Plan, {name: value for name, value in data.items() if name != "version"})
    except CodecError as error:
        return BrokenPlan(str(error))
    if not (math.isfinite(plan.made_s) and math.isfinite(plan.expires_s)):
        return BrokenPlan(f"made_s: {plan.made_s!r}, expires_s: {plan.expires_s!r}; both must be finite")
    return plan


def follow(
    spec: Spec, state: State, observation: Observation, entry: Entry | None, now_s: float
) -> tuple[State, Decision]:
    """What Serve's policy does at each of its calls.

    On a plan: its replicas, more at once where the requests in progress need more by the policy's own measure (see
    `needed`), never less. What demand raised stays for HOLD_S, until the plan knows of it. Without one, or where it has
    no opinion: the reactive policy, whose idle time counts from when the plan last wanted a replica, so that a
    controller that is restarted finds its replicas.
    `entry` is None where the plan is missing or has expired (`Plan.entry`); `spec` is then used, else the entry's.
    """
    if observation.now_s != now_s:
        observation = replace(observation, now_s=now_s)
    if entry is not None:
        spec = entry.spec
    if entry is None or entry.replicas is None:
        state, decision = decide(replace(spec, policy=_FOLLOWER, params={}), state, observation, None)
        return state, decision if entry is None else _within(entry, observation, decision)
    memory = state.values if state.policy == _FOLLOWER else {}
    planned = entry.replicas
    replicas, reason, until_s = planned, entry.reason, entry.until_s
    values: dict[str, float] = {"now_s": now_s}
    numbers: dict[str, float] = {"planned_replicas": float(planned)}
    if known(observation.queued) and known(observation.in_flight):
        load = int(observation.queued) + int(observation.in_flight)  # type: ignore[arg-type]
        need = needed(spec, observation, load)
        numbers |= {"load": float(load), "need_replicas": float(need)}
        raised, raised_until_s = memory.get("raised", 0.0), memory.get("raised_until_s", now_s)
        if not now_s < raised_until_s <= now_s + HOLD_S:
            raised = 0.0
        if need > planned and need >= raised:
            raised, raised_until_s = float(need), now_s + HOLD_S
        if raised > planned:
            values |= {"raised": raised, "raised_until_s": raised_until_s}
            replicas, until_s = int(raised), min(until_s, raised_until_s)
            if need >= replicas:
                reason = Reason.WAKE if observation.ready == 0 else Reason.DEMAND
            else:
                reason = Reason.SCALE_DOWN_DELAY
        if load == 0 and replicas == 0:
            values["idle_since_s"] = memory.get("idle_since_s", now_s)
    elif known(observation.target) and int(observation.target) > planned:  # type: ignore[arg-type]
        replicas, reason = int(observation.target), Reason.UNKNOWN_HOLD  # type: ignore[arg-type]
    if replicas > 0:
        values["idle_since_s"] = now_s
    replicas, clamps = _clamped(spec, entry, replicas)
    values |= {"replicas": float(replicas), "proposed": float(replicas)}
    series = state.series if state.policy == _FOLLOWER else ()
    series = push_peak(series, now_s, float(replicas), DELAY.default or 0.0)
    decision = Decision(
        spec.model, now_s, replicas, entry.rung, reason, until_s, spec.policy, numbers, clamps
    )
    return State(_FOLLOWER, values, series), decision


def _within(entry: Entry, observation: Observation, decision: Decision) -> Decision:
    """What the budget has room for, and no less than there is, of which the plan may not know."""
    if entry.ceiling is None or decision.replicas is None:
        return decision
    counts = (observation.target, observation.ready)
    there = max((int(count) for count in counts if count is not None and known(count)), default=0)
    most = max(entry.ceiling, there)
    if decision.replicas <= most:
        return decision
    return replace(decision, replicas=most, clamps=(*decision.clamps, Reason.GPU_BUDGET))


def needed(spec: Spec, observation: Observation, load: int) -> int:
    """Replicas that so many requests in progress ask for before the policy has decided anew.

    One is enough where the policy answers to no single moment: its delays and averages would count for nothing.
    """
    policy = POLICIES.get(spec.policy, POLICIES[_FOLLOWER])
    return need_of(load, policy.at_once(spec, observation))


def _clamped(spec: Spec, entry: Entry, replicas: int) -> tuple[int, tuple[Reason, ...]]:
    """The plan knows of the minimum: where it is below that, a budget has no room for it."""
    clamps: list[Reason] = []
    if replicas > spec.max_replicas:
        replicas = spec.max_replicas
        clamps.append(Reason.MAX_REPLICAS)
    if entry.ceiling is not None and replicas > entry.ceiling:
        replicas = entry.ceiling
        clamps.append(Reason.GPU_BUDGET)
    return replicas, tuple(clamps)


__all__ = [
    "HOLD_S",
    "VERSION",
    "BrokenPlan",
    "Entry",
    "Plan",
    "follow",
    "from_json",
    "make_plan",
    "needed",
    "to_json",
]
