"""How warm to keep an idle model: expected cost over the forecast of its next request.

All costs are GPU-seconds. A second that a request waits costs `wait_cost` of them.

With a forecast it is a finite-horizon Markov decision process over a grid of times, solved by backward induction
(Puterman, Markov Decision Processes, 1994, chapter 4). A state is a rung; it ends at the first request.

* Holding rung r over dt costs cost_per_s(r) times the expected part of dt before the request.
* A request that comes on rung r costs `arrival_cost`: those that came with it wait, and a GPU is held while it loads.
* Moving down is free. A start takes delay_high_s of its rung; SERVING is paid from its beginning, and a request that
  comes meanwhile waits for the rest.

Without a forecast it is ski rental with several states (the lower envelope of Irani, Shukla and Gupta, Online
Strategies for Dynamic Power Management in Systems with Multiple Power-Saving States, ACM TECS 2003; two states: Karlin
et al., Competitive Snoopy Caching, 1988): after an idle time t hold the rung with the least cost_per_s * t + cost of an
arrival. Whatever comes, this costs at most twice what it would have cost to know.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from autoscaling.core import induction
from autoscaling.core.survival import Curve
from autoscaling.core.types import Rung, RungProfile

STEPS = 36
"""Grid points by time alone; the distribution's own come on top."""
SHARES = (0.002, 0.01, 0.03, 0.07, 0.13, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.87, 0.93, 0.97, 0.99, 0.998)
"""Quantiles of the arrival that are grid points, and moments by which a start must have begun to meet them."""
FINEST_S = 0.5


@dataclass(frozen=True, slots=True)
class Prices:
    """What decides besides the distribution."""

    rungs: Mapping[Rung, RungProfile]
    """Lowest first, SERVING last, at least two."""
    wait_cost: float
    batch_size: float = 1.0
    burst_s: float = 5.0
    """Over which span the batch comes."""

    def arrival_cost(self, rung: Rung) -> float:
        """What it costs if the next request comes on that rung."""
        profile = self.rungs[rung]
        waited = waiting(profile.delay_s, self.batch_size, self.burst_s)
        return self.wait_cost * waited + self.rungs[Rung.SERVING].cost_per_s * profile.delay_s


@dataclass(slots=True)
class Choice:
    """The cheapest thing to do now."""

    lit: bool
    """A replica is to be there: kept, or started."""
    rung: Rung
    """The rung to hold: SERVING if lit."""
    until_s: float
    """When something else becomes cheapest, if no request comes; infinite if never within the forecast."""
    numbers: Mapping[str, float] = field(default_factory=dict)


def waiting(delay_s: float, batch_size: float, burst_s: float) -> float:
    """Request-seconds that a batch waits for a start of `delay_s` that begins with its first request.

    The first waits all of it. The others come evenly over `burst_s` and wait for what is then left:
    delay_s - burst_s/2 on average, or delay_s²/(2 burst_s) if some come after the start.
    """
    others = max(0.0, batch_size - 1.0)
    if burst_s <= 0:
        return delay_s * (1.0 + others)
    later_s = delay_s - burst_s / 2 if delay_s >= burst_s else delay_s * delay_s / (2 * burst_s)
    return delay_s + others * later_s


def choose(
    now_s: float, curve: Curve, prices: Prices, level: Rung, starting_left_s: float | None = None
) -> Choice:
    """The optimum now, on rung `level` (SERVING: a replica is ready).

    `starting_left_s`: a replica is on its way, ready in so many seconds; `level` is then what is there besides it.
    """
    return _Problem(now_s, curve, prices, level, starting_left_s).choice()


def without_forecast(idle_since_s: float, now_s: float, prices: Prices, level: Rung, *, lit: bool) -> Choice:
    """The lower envelope. `lit`: a replica is there or on its way."""
    top = Rung.SERVING if lit else level
    lines = [
        (prices.arrival_cost(rung), profile.cost_per_s, rung)
        for rung, profile in prices.rungs.items()
        if rung <= top or rung == next(iter(prices.rungs))
    ]
    base, slope, rung = min(lines)
    while True:
        next_s = math.inf
        for other_base, other_slope, other in lines:
            if other_slope < slope:
                # Compared as times and always by the same expression, so that what is given as until_s is exact.
                at_s = idle_since_s + (other_base - base) / (slope - other_slope)
                if at_s < next_s:
                    next_s, then = at_s, (other_base, other_slope, other)
        if next_s > now_s:
            break
        base, slope, rung = then
    numbers = {"idle_s": now_s - idle_since_s}
    if next_s < math.inf:
        numbers["break_even_idle_s"] = next_s - idle_since_s
    return Choice(rung is Rung.SERVING, rung, next_s, numbers)


class _Problem:
    """One backward induction, and what follows from it now."""

    def __init__(
        self, now_s: float, curve: Curve, prices: Prices, level: Rung, starting_left_s: float | None
    ) -> None:
        self.now_s = now_s
        self.curve = curve
        self.rungs = [
            rung for rung in prices.rungs if rung < Rung.SERVING and (rung <= level or level == Rung.SERVING)
        ]
        if not self.rungs:
            self.rungs = [next(iter(prices.rungs))]
        self.level = min(level, self.rungs[-1]) if level < Rung.SERVING else level
        profiles = [prices.rungs[rung] for rung in self.rungs]
        self.leads = tuple([profile.delay_high_s for profile in profiles])
        self.starting_left_s = starting_left_s
        self.costs = induction.Costs(
            serving=prices.rungs[Rung.SERVING].cost_per_s,
            held=tuple([profile.cost_per_s for profile in profiles]),
            arrivals=tuple([prices.arrival_cost(rung) for rung in self.rungs]),
            leads_s=self.leads if starting_left_s is None else (*self.leads, starting_left_s),
            wait=prices.wait_cost,
            others=prices.wait_cost * max(0.0, prices.batch_size - 1.0),
            burst_s=prices.burst_s,
        )
        self.grid, self.solved = solved(now_s, curve, self.costs)

    def choice(self) -> Choice:
        """The action at the first grid point, followed along the grid to where it ends."""
        solved, left_s = self.solved, self.starting_left_s
        level = len(self.rungs) - 1
        if self.level < Rung.SERVING:
            level = max(r for r, rung in enumerate(self.rungs) if rung <= self.level or r == 0)
        numbers = self._numbers(level)
        if left_s is not None:
            goes_on = solved.starts[-1]
            numbers["keep_cost_gpu_s"] = goes_on / solved.alive[0]
            if goes_on <= solved.values[level][0] or solved.held[level][0] < 0:
                return Choice(True, Rung.SERVING, self._served_until(self.now_s + left_s), numbers)
            return self._unlit(solved.held[level][0], numbers)
        if self.level == Rung.SERVING:
            if solved.drops[0] < 0:
                return Choice(True, Rung.SERVING, self._served_until(self.now_s), numbers)
            return self._unlit(solved.drops[0], numbers)
        if solved.held[level][0] < 0:
            return Choice(True, Rung.SERVING, self._served_until(self.now_s + self.leads[level]), numbers)
        return self._unlit(solved.held[level][0], numbers)

    def _served_until(self, ready_s: float) -> float:
        grid, drops = self.grid, self.solved.drops
        for k in range(bisect_left(grid, ready_s), len(grid) - 1):
            if drops[k] >= 0:
                return grid[k]
        return max(grid[-1], ready_s)

    def _unlit(self, r: int, numbers: Mapping[str, float]) -> Choice:
        # Where the forecast ends, another rule goes on; the lowest rung is the end of both.
        until_s = math.inf if r == 0 else self.grid[-1]
        held = self.solved.held[r]
        for k in range(1, len(self.grid) - 1):
            if held[k] != r:
                until_s = self.grid[k]
                break
        return Choice(False, self.rungs[r], until_s, numbers)

    def _numbers(self, level: int) -> dict[str, float]:
        costs, solved = self.costs, self.solved
        scale = 1.0 / solved.alive[0]
        time_held = solved.area[1] - solved.area[0]
        come = solved.alive[0] - solved.alive[1]
        holds = [
            (costs.held[r] * time_held + come * costs.arrivals[r] + solved.values[r][1]) * scale
            for r in range(level + 1)
        ]
        lead_s = self.leads[level]
        numbers = {
            "p_arrival_in_lead": 1.0 - self.curve.at(self.grid[0] + lead_s) * scale,
            "lead_s": lead_s,
            "dark_cost_gpu_s": min(
                hold
                for hold, rung in zip(holds, self.rungs, strict=False)
                if rung != Rung.PARKED or level == 0
            ),
        }
        if self.rungs[level] == Rung.PARKED:
            numbers["park_cost_gpu_s"] = holds[level]
        if self.level == Rung.SERVING:
            numbers["keep_cost_gpu_s"] = scale * (costs.serving * time_held + solved.served[1])
        else:
            numbers["prewarm_cost_gpu_s"] = scale * solved.starts[level]
        return numbers


def _solved(now_s: float, curve: Curve, costs: induction.Costs) -> tuple[list[float], induction.Solved]:
    grid = _grid(now_s, curve, costs.leads_s[: len(costs.held)])
    return grid, induction.solve(curve, grid, costs)


solved: Callable[[float, Curve, induction.Costs], tuple[Sequence[float], induction.Solved]] = _solved
"""The grid from that moment to the curve's end, and what is best on it. The simulator exchanges it for its own."""


def _grid(now_s: float, curve: Curve, leads: Sequence[float]) -> list[float]:
    """Times from now to the curve's end: dense now, and where the arrival is likely and starts must begin for it."""
    end_s = curve.end_s
    span_s = end_s - now_s
    first_s = min(FINEST_S, span_s / STEPS)
    growth = (span_s / first_s) ** (1.0 / STEPS)
    points = [end_s]
    step_s = first_s
    for _ in range(STEPS):
        points.append(now_s + step_s)
        step_s *= growth
    alive = curve.at(now_s)
    comes = alive - curve.survival[-1]
    if comes > 1e-9 * alive:
        when = [curve.when_s(alive - comes * share) for share in SHARES]
        points += when
        for lead_s in set(leads):
            if lead_s > 0:
                points += [time_s - lead_s for time_s in when]
    points.sort()
    grid = [now_s]
    last_s, most_s = now_s, end_s
    for point in points:
        # Points closer than this decide nothing that the others do not.
        if point - last_s >= 1e-3 and point < most_s:
            grid.append(point)
            last_s = point
    grid.append(end_s)
    return grid


__all__ = ["Choice", "Prices", "choose", "waiting", "without_forecast"]
