"""`ray-default`: what Ray Serve does with a deployment that has no policy of its own."""

from __future__ import annotations

import math

from autoscaling.core.policies.base import Context, Param, Proposal, carried, rest
from autoscaling.core.policies.following import TARGET, per_replica
from autoscaling.core.series import mean, mean_until_s, push_step
from autoscaling.core.types import Observation, Spec

UP_FACTOR = Param("upscaling_factor", 1, 0.001, 1000, "ratio", "Share of the missing replicas that is added.")
DOWN_FACTOR = Param(
    "downscaling_factor", 1, 0.001, 1000, "ratio", "Share of the superfluous replicas that is taken away."
)
UP_DELAY = Param("upscale_delay_s", 30, 0, 86400, "s", "How long more must be wanted before any is added.")
DOWN_DELAY = Param(
    "downscale_delay_s", 600, 0, 86400, "s", "How long fewer must be wanted before any is taken away."
)
ZERO_DELAY = Param(
    "downscale_to_zero_delay_s",
    None,
    0,
    86400,
    "s",
    "The same for the last replica; default: downscale_delay_s.",
)
LOOK_BACK = Param(
    "look_back_period_s", 30, 0.1, 3600, "s", "Over which time the requests in progress are averaged."
)


class RayDefault:
    """replica_queue_length_autoscaling_policy with the factors and delays that Serve wraps around it.

    Left out: how late Serve's handles and replicas report (the simulator and the cluster have that anyway).
    """

    name = "ray-default"
    source = "Ray 2.60, serve/autoscaling_policy.py and serve/config.py (AutoscalingConfig)"
    params = (TARGET, UP_FACTOR, DOWN_FACTOR, UP_DELAY, DOWN_DELAY, ZERO_DELAY, LOOK_BACK)

    def at_once(self, spec: Spec, observation: Observation) -> float:
        return math.inf

    def propose(self, context: Context) -> Proposal:
        seen, memory = context.seen, context.state.values
        now_s, current, before = seen.now_s, seen.ready, context.before
        low, high = context.spec.min_replicas, context.spec.max_replicas
        back_s = context.param(LOOK_BACK)
        unit = per_replica(context.spec)
        up, down = context.param(UP_FACTOR), context.param(DOWN_FACTOR)
        series = push_step(context.state.series, now_s, float(seen.load), back_s)
        load = mean(series, now_s, back_s)
        numbers = {"load": float(seen.load), "mean_load": load, "target": unit}
        if current == 0:
            if seen.load > 0:
                replicas = max(math.ceil(up), before)
                return Proposal(
                    replicas,
                    seen.rung,
                    carried(context, replicas, 1),
                    math.inf,
                    numbers,
                    {},
                    series,
                )
            # Serve keeps its target while nothing runs: a start that is under way goes on.
            rung, reason = (seen.rung, carried(context, before, before)) if before else rest(context)
            return Proposal(before, rung, reason, math.inf, numbers, {}, series)
        until_s = min(
            mean_until_s(series, now_s, back_s, 1 / unit),
            mean_until_s(series, now_s, back_s, up / unit, current * (1 - up)),
            mean_until_s(series, now_s, back_s, down / unit, current * (1 - down)),
        )
        wanted = self._scaled(load / unit, current, up, down)
        numbers["wanted_replicas"] = float(wanted)
        # Serve's target, from which its delays count, is within the bounds.
        replicas, bounded = (min(high, max(low, number)) for number in (before, wanted))
        values: dict[str, float] = {}
        sign = (bounded > replicas) - (bounded < replicas)
        if sign:
            since_s = memory["since_s"] if memory.get("direction") == sign else now_s
            last = replicas == 1
            delay_s = context.param(UP_DELAY)
            if sign < 0:
                delay_s = context.param(DOWN_DELAY)
                if last:
                    delay_s = context.param(ZERO_DELAY, delay_s)
            if now_s >= since_s + delay_s:
                replicas = bounded if sign > 0 or last else max(1, bounded)
                since_s = now_s
                if replicas == 1:
                    delay_s = context.param(ZERO_DELAY, delay_s)
            if replicas != bounded:
                values = {"direction": float(sign), "since_s": since_s}
                until_s = min(until_s, since_s + delay_s)
        if (wanted > high and replicas == high) or (wanted < low and replicas == low):
            # What the bound takes away is said by whoever applies it.
            replicas = wanted
        rung, reason = (seen.rung, carried(context, replicas, wanted)) if replicas else rest(context)
        return Proposal(replicas, rung, reason, until_s, numbers, values, series)

    @staticmethod
    def _scaled(desired: float, current: int, up: float, down: float) -> int:
        delta = desired - current
        # A millionth of a replica is the averaging's rounding, not demand.
        scaled = math.ceil(current + (up if delta > 0 else down) * delta - 1e-6)
        if math.ceil(desired - 1e-6) < current and scaled == current:
            scaled -= 1
        return max(0, scaled)


__all__ = ["RayDefault"]
