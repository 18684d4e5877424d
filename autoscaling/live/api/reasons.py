"""Why a decision is what it is, in words: one sentence for each reason, with the numbers that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import tzinfo

from autoscaling.core.types import Decision, Observation, Reason, Rung, Spec
from autoscaling.live.api.words import count, duration, gpu_s, percent


@dataclass(frozen=True, slots=True)
class Facts:
    """What a sentence is made from."""

    spec: Spec
    observation: Observation
    decision: Decision
    now_s: float
    zone: tzinfo

    def number(self, name: str) -> float | None:
        return self.decision.numbers.get(name)

    @property
    def replicas(self) -> str:
        replicas = self.decision.replicas
        return "as many replicas as there are" if replicas is None else count(replicas, "replica")

    @property
    def per_replica(self) -> float | None:
        """Requests that one replica is taken to carry."""
        carried = self.number("per_replica")
        return self.number("target") if carried is None else carried

    @property
    def idle(self) -> str:
        """`It has been idle for 3 min`, or `It is idle` where that is not known."""
        idle_s = self.number("idle_s")
        if idle_s is None and self.observation.last_busy_s is not None:
            idle_s = self.observation.now_s - self.observation.last_busy_s
        return (
            f"It has been idle for {duration(idle_s)}" if idle_s is not None and idle_s > 0 else "It is idle"
        )


def sentence(reason: Reason, facts: Facts) -> str:
    """Why, as one or two sentences."""
    return _SENTENCES[reason](facts)


def clamp_sentence(reason: Reason, facts: Facts) -> str:
    """Which bound changed the number, and from what."""
    return _CLAMPS[reason](facts)


def _load(facts: Facts) -> str:
    load, each, need = facts.number("load"), facts.per_replica, facts.number("need_replicas")
    if load is None:
        seen = [facts.observation.queued, facts.observation.in_flight]
        load = float(sum(number for number in seen if number is not None))
    text = f"{count(load, 'request is', 'requests are')} in progress or waiting"
    if each is not None:
        text += f", one replica carries {each:.3g}"
    if need is not None:
        text += f", so {count(need, 'replica is', 'replicas are')} needed"
    return text


def _unknown(facts: Facts) -> str:
    seen = facts.observation
    named = {"replicas that are ready": seen.ready, "requests that wait": seen.queued}
    named["requests in progress"] = seen.in_flight
    unknown = [name for name, value in named.items() if value is None]
    if unknown:
        return f"How many there are is unknown ({', '.join(unknown)}), so nothing is changed until it is known again."
    return "What decides could not be relied on (a clock that jumped, or an error), so nothing is changed for now."


def _demand(facts: Facts) -> str:
    return f"{_load(facts)}."


def _panic(facts: Facts) -> str:
    return f"Demand has just jumped: {_load(facts)}. It went up at once, and does not go down before that has calmed."


def _wake(facts: Facts) -> str:
    queued = facts.observation.queued
    who = count(queued, "request waits", "requests wait") if queued else "Somebody asked"
    return f"{who} and no replica is ready: {facts.replicas} {_is(facts)} being started."


def _is(facts: Facts) -> str:
    return "is" if facts.decision.replicas == 1 else "are"


def _chance(facts: Facts) -> str:
    chance, lead_s = facts.number("p_arrival_in_lead"), facts.number("lead_s")
    if chance is None or lead_s is None:
        return ""
    return (
        f" The chance that one comes within the {duration(lead_s)} that a start takes is {percent(chance)}."
    )


def _costs(facts: Facts) -> str:
    """`Keeping it is expected to cost 3 GPU-s, going dark 10 GPU-s (...).`"""
    ways = (
        ("keep_cost_gpu_s", "keeping it"),
        ("prewarm_cost_gpu_s", "starting it now"),
        ("park_cost_gpu_s", "leaving it parked"),
        ("dark_cost_gpu_s", "leaving it dark"),
    )
    said = [f"{name} {gpu_s(cost)}" for key, name in ways if (cost := facts.number(key)) is not None]
    if not said:
        return ""
    price = f"with a second of waiting at {facts.spec.wait_cost:g} GPU-s (wait_cost)"
    return f" Expected cost from now on, {price}: {', '.join(said)}."


def _keep_alive(facts: Facts) -> str:
    keep_s, break_even_s = facts.number("keep_alive_s"), facts.number("break_even_idle_s")
    if (until_idle_s := facts.number("keep_alive_until_idle_s")) is not None:
        return (
            f"{facts.idle}, and by its idle times so far the next request comes before it has "
            f"been idle for {duration(until_idle_s)}: its replica is kept."
        )
    if break_even_s is not None:
        return (
            f"{facts.idle}. There is no forecast, so the replica is kept until it has cost as "
            f"much as a cold start would: when it has been idle for {duration(break_even_s)}."
        )
    if keep_s is not None:
        return f"{facts.idle}; an idle replica is kept for {duration(keep_s)}."
    why = _chance(facts) + _costs(facts)
    return f"{facts.idle}, but a replica is kept for what may come.{why}"


def _prewarm(facts: Facts) -> str:
    if (window_s := facts.number("prewarm_window_s")) is not None:
        return (
            f"{facts.idle}, and by its idle times so far the next request comes after {duration(window_s)} or more: it "
            "is started so that it is ready then."
        )
    return f"A request is expected soon, so it is started before anyone waits.{_chance(facts)}{_costs(facts)}"


def _forecast_demand(facts: Facts) -> str:
    ahead, need = facts.number("forecast_replicas"), facts.number("need_replicas")
    text = "More is expected within the time that a start takes than the replicas can carry"
    if ahead is not None and need is not None:
        text += f": {count(ahead, 'replica')} then, {count(need, 'replica')} now"
    return f"{text}."


def _scale_down_delay(facts: Facts) -> str:
    return f"{_load(facts)}. Fewer replicas would do, but have not for long enough to let one go."


def _park(facts: Facts) -> str:
    return (
        f"{facts.idle}. Its engine waits in host memory without a GPU, from where it is back "
        f"quickly; holding a replica would cost more than it spares.{_chance(facts)}{_costs(facts)}"
    )


def _go_dark(facts: Facts) -> str:
    return f"{facts.idle}, and what may come does not pay for holding it.{_chance(facts)}{_costs(facts)}"


def _dark(facts: Facts) -> str:
    return f"Nothing is asked for, and nothing is expected soon enough to start it.{_chance(facts)}{_costs(facts)}"


def _window(facts: Facts, source: str, who: str) -> str:
    lead_s = max((p.delay_high_s for p in facts.observation.rungs), default=0.0)
    near = [
        w for w in facts.spec.windows if w.source == source and w.start_s - lead_s <= facts.now_s < w.end_s
    ]
    floors = [count(w.replicas, "replica") for w in near if w.rung is Rung.SERVING]
    floors += [f"the rung {w.rung.name.lower()}" for w in near if w.rung is not Rung.SERVING]
    return f"{who} {' and '.join(dict.fromkeys(floors)) if floors else 'it'} to be ready now."


def _schedule(facts: Facts) -> str:
    return _window(facts, "schedule", "A schedule asks for")


def _manual(facts: Facts) -> str:
    return _window(facts, "prewarm", "Somebody asked for")


def _fixed(facts: Facts) -> str:
    return f"The policy `fixed` holds {facts.replicas}, whatever comes."


def _min_replicas(facts: Facts) -> str:
    return f"Its min_replicas is {facts.spec.min_replicas}: it never has fewer."


def _max_replicas(facts: Facts) -> str:
    return f"Its max_replicas is {facts.spec.max_replicas}: it never has more.{_wanted(facts)}"


def _gpu_budget(facts: Facts) -> str:
    return (
        "The GPUs that all models together may hold are taken: first come models that have requests, then those that "
        "somebody asked for (a minimum, a schedule, a prewarm), within each those of higher priority, then those that "
        "are there already; models whose requests need the same GPUs take turns, of one to three minutes as starts "
        f"take.{_wanted(facts)}"
    )


def _spend_limit(facts: Facts) -> str:
    return (
        "The GPU-seconds that may be spent in a day are spent: until midnight UTC there is only what requests need."
        f"{_wanted(facts)}"
    )


def _wanted(facts: Facts) -> str:
    for name in ("wanted_replicas", "proposed_replicas"):
        number = facts.number(name)
        if number is not None and number != facts.decision.replicas:
            return f" Without this bound there would be {count(number, 'replica')}."
    return ""


_SENTENCES: Mapping[Reason, Callable[[Facts], str]] = {
    Reason.UNKNOWN_HOLD: _unknown,
    Reason.DEMAND: _demand,
    Reason.PANIC: _panic,
    Reason.WAKE: _wake,
    Reason.KEEP_ALIVE: _keep_alive,
    Reason.PREWARM: _prewarm,
    Reason.FORECAST_DEMAND: _forecast_demand,
    Reason.SCALE_DOWN_DELAY: _scale_down_delay,
    Reason.PARK: _park,
    Reason.GO_DARK: _go_dark,
    Reason.DARK: _dark,
    Reason.SCHEDULE: _schedule,
    Reason.MANUAL: _manual,
    Reason.FIXED: _fixed,
    Reason.MIN_REPLICAS: _min_replicas,
    Reason.MAX_REPLICAS: _max_replicas,
    Reason.GPU_BUDGET: _gpu_budget,
    Reason.SPEND_LIMIT: _spend_limit,
}
_CLAMPS: Mapping[Reason, Callable[[Facts], str]] = {
    Reason.MIN_REPLICAS: _min_replicas,
    Reason.MAX_REPLICAS: _max_replicas,
    Reason.GPU_BUDGET: _gpu_budget,
    Reason.SPEND_LIMIT: _spend_limit,
}
