"""What policies share that follow the load: up at once, down when fewer have sufficed for long enough."""

from __future__ import annotations

import math

from autoscaling.core.policies.base import Context, Param, Proposal, carried, rest, setting
from autoscaling.core.seen import target
from autoscaling.core.series import alike, need_of, peak, peak_until_s, push_peak
from autoscaling.core.types import Spec

TARGET = Param(
    "target",
    None,
    0.001,
    1e6,
    "requests",
    "Requests in progress for each replica; default: target_ongoing_requests.",
)
IDLE = Param("idle_s", None, 0, 30 * 86400, "s", "How long a replica is kept idle; default: keep_alive_s.")


def per_replica(spec: Spec) -> float:
    """Requests in progress that a replica is to have, as these policies go by it."""
    return setting(spec, TARGET, target(spec))


def follow(context: Context, *, delay_s: float, idle_s: float) -> Proposal:
    """The most replicas that the load needed within the last `delay_s`, and none after `idle_s` without a request."""
    seen = context.seen
    now_s = seen.now_s
    unit = per_replica(context.spec)
    need = need_of(seen.load, unit)
    held = context.state.series or ((now_s, float(context.before)),)
    series = push_peak(held, now_s, need, delay_s)
    replicas = int(peak(series))
    until_s = peak_until_s(series, delay_s)
    numbers = {"load": float(seen.load), "target": unit, "need_replicas": float(need)}
    if seen.idle_since_s is not None:
        ends_s = seen.idle_since_s + idle_s
        numbers |= {"idle_s": seen.idle_s, "keep_alive_s": idle_s}
        lit = context.before > 0 or seen.present > 0
        if now_s >= ends_s or not lit:
            rung, reason = rest(context)
            return Proposal(0, rung, reason, math.inf, numbers, series=((now_s, 0.0),))
        replicas = max(1, replicas)
        until_s = min(until_s, ends_s)
    return Proposal(
        replicas,
        seen.rung,
        carried(context, replicas, need),
        until_s,
        numbers,
        series=series,
        loads=alike(seen.load, unit) if seen.load > 0 else None,
        # The last replica stays for so long, and nothing is remembered of a load beyond it.
        silence_s=idle_s if seen.load > 0 and replicas == 1 and len(series) == 1 else 0.0,
    )


__all__ = ["IDLE", "TARGET", "follow", "per_replica"]
