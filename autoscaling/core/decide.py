"""The decision for one model: its policy's proposal, floors under it, bounds around it. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from autoscaling.core.policies import POLICIES, Context, Proposal
from autoscaling.core.seen import Seen, see
from autoscaling.core.series import TICK_S
from autoscaling.core.types import Decision, Forecast, Observation, Reason, Rung, Spec, State
from autoscaling.core.windows import Floor, floor_of

SETTLE_S = 60.0
"""For how long after going dark the rung that was asked for counts as being there: parking an engine takes a while."""

_LASTING = ("idle_since_s", "window_s")


def decide(
    spec: Spec, state: State, observation: Observation, forecast: Forecast | None
) -> tuple[State, Decision]:
    """What the model should have now, and what must be remembered for the next decision.

    Deciding again with the memory it gave and nothing changed gives the same. What is unknown, and a clock that went
    back, hold what there is (`replicas` None) until the next decision. Memory of another policy is dropped. Raises
    ValueError for a policy that does not exist.
    """
    policy = POLICIES.get(spec.policy)
    if policy is None:
        raise ValueError(f"policy {spec.policy!r} is unknown; there are {', '.join(sorted(POLICIES))}")
    if state.policy != spec.policy:
        state = State(policy=spec.policy)
    memory = state.values
    seen = see(spec, observation, memory.get("idle_since_s"))
    if seen is None:
        return state, hold(spec, observation)
    last_s = memory.get("now_s")
    if last_s is not None and seen.now_s < last_s:
        return _back(state, seen.now_s), hold(spec, observation, until_s=seen.now_s)
    seen, settles_s = _settled(seen, memory)
    floor = floor_of(spec, seen, memory.get("window_s"))
    context = Context(spec, state, seen, forecast, max(floor.replicas, spec.min_replicas))
    proposal = policy.propose(context)
    decision = _bounded(spec, seen, floor, proposal)
    if settles_s is not None and decision.until_s > settles_s:
        decision = replace(decision, until_s=settles_s)
    return _remembered(spec, context, floor, proposal, decision), decision


def hold(
    spec: Spec, observation: Observation, *, until_s: float = math.inf, reason: Reason = Reason.UNKNOWN_HOLD
) -> Decision:
    """Whatever there is stays."""
    rung = observation.rung
    return Decision(
        model=spec.model,
        made_s=observation.now_s,
        replicas=None,
        rung=Rung.COLD if rung is None else Rung(min(rung, Rung.PARKED)),
        reason=reason,
        until_s=until_s,
        policy=spec.policy,
    )


def _bounded(spec: Spec, seen: Seen, floor: Floor, proposal: Proposal) -> Decision:
    replicas, reason = proposal.replicas, proposal.reason
    clamps: list[Reason] = []
    if floor.replicas > replicas:
        replicas, reason = floor.replicas, floor.replicas_reason
    if spec.min_replicas > replicas:
        replicas, reason = spec.min_replicas, Reason.MIN_REPLICAS
        clamps.append(Reason.MIN_REPLICAS)
    if spec.max_replicas < replicas:
        replicas = max(0, spec.max_replicas)
        clamps.append(Reason.MAX_REPLICAS)
    rung = proposal.rung if replicas == 0 else seen.rung
    if floor.rung > rung:
        rung = floor.rung
        if replicas == 0:
            reason = floor.rung_reason
    numbers: Mapping[str, float] = proposal.numbers
    if replicas != proposal.replicas:
        numbers = {**numbers, "proposed_replicas": float(proposal.replicas)}
    return Decision(
        spec.model,
        seen.now_s,
        replicas,
        rung,
        reason,
        max(min(proposal.until_s, floor.until_s), seen.now_s + TICK_S),
        spec.policy,
        numbers,
        tuple(clamps),
        proposal.loads,
        proposal.silence_s,
    )


def _remembered(spec: Spec, context: Context, floor: Floor, proposal: Proposal, decision: Decision) -> State:
    seen, memory = context.seen, context.state.values
    replicas = decision.replicas or 0
    values = {
        **proposal.values,
        "now_s": seen.now_s,
        "replicas": float(replicas),
        "proposed": float(proposal.replicas),
    }
    if seen.idle_since_s is not None:
        values["idle_since_s"] = seen.idle_since_s
    if floor.begun_s > -math.inf and spec.windows:
        values["window_s"] = floor.begun_s
    if replicas == 0:
        if memory.get("replicas", seen.present) > 0:
            values |= {"dark_s": seen.now_s, "dark_rung": float(decision.rung)}
        elif "dark_s" in memory and seen.now_s < memory["dark_s"] + SETTLE_S:
            values |= {"dark_s": memory["dark_s"], "dark_rung": memory["dark_rung"]}
    return State(spec.policy, values, proposal.series, proposal.histogram)


def _settled(seen: Seen, memory: Mapping[str, float]) -> tuple[Seen, float | None]:
    """Just gone dark: the rung that was asked for counts as reached; until when, if it is not seen yet."""
    dark_s = memory.get("dark_s")
    if dark_s is None or seen.present > 0 or seen.now_s >= dark_s + SETTLE_S:
        return seen, None
    asked = Rung(int(memory["dark_rung"]))
    if asked <= seen.rung:
        return seen, None
    return replace(seen, rung=asked), dark_s + SETTLE_S


def lapsed(state: State) -> State:
    """The memory after a time in which nobody looked: the load of before says nothing of now. How long nothing was
    asked, what windows were begun for, and what was learned stay."""
    values = {name: state.values[name] for name in ("now_s", *_LASTING) if name in state.values}
    return State(state.policy, values, (), state.histogram)


def _back(state: State, now_s: float) -> State:
    """The memory after the clock went back: what is in the future by the new one is forgotten."""
    values = {name: value for name, value in state.values.items() if name in ("replicas", "proposed")}
    values["now_s"] = now_s
    series = tuple((min(time_s, now_s), value) for time_s, value in state.series)
    return State(state.policy, values, series, state.histogram)


__all__ = ["SETTLE_S", "decide", "hold", "lapsed"]
