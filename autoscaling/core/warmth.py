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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
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
    problem = _Problem(now_s, curve, prices, level)
    return problem.choice(starting_left_s)


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
    """One backward induction. Costs are multiplied by the survival, so that they need not be conditioned."""

    def __init__(self, now_s: float, curve: Curve, prices: Prices, level: Rung) -> None:
        self.now_s = now_s
        self.curve = curve
        self.prices = prices
        self.rungs = [
            rung for rung in prices.rungs if rung < Rung.SERVING and (rung <= level or level == Rung.SERVING)
        ]
        if not self.rungs:
            self.rungs = [next(iter(prices.rungs))]
        self.level = min(level, self.rungs[-1]) if level < Rung.SERVING else level
        profiles = [prices.rungs[rung] for rung in self.rungs]
        self.serving_cost = prices.rungs[Rung.SERVING].cost_per_s
        self.costs = [profile.cost_per_s for profile in profiles]
        self.arrivals = [prices.arrival_cost(rung) for rung in self.rungs]
        self.leads = [profile.delay_high_s for profile in profiles]
        self.grid = _grid(now_s, curve, self.leads)
        self.alive, self.area = curve.along(self.grid)
        self._solve()

    def _solve(self) -> None:
        """`served[k]`, `values[k][r]`: expected cost from grid[k] on. `held[k][r]`: the rung to hold, -1 a start."""
        grid, alive, area = self.grid, self.alive, self.area
        last = len(grid) - 1
        count = len(self.rungs)
        served = [0.0] * (last + 1)
        values: list[Sequence[float]] = [()] * (last + 1)
        held: list[Sequence[int]] = [()] * (last + 1)
        drops = [-1] * (last + 1)
        values[last] = [0.0] * count
        held[last] = list(range(count))
        starts = [_Starts(self, lead_s) for lead_s in self.leads]
        order = list(zip(range(count), self.costs, self.arrivals, strict=True))
        serving_cost = self.serving_cost
        self.served = served
        for k in range(last - 1, -1, -1):
            time_held = area[k + 1] - area[k]
            come = alive[k] - alive[k + 1]
            after = values[k + 1]
            lowest, lowest_r = math.inf, 0
            holds: list[float] = []
            choices: list[int] = []
            for r, cost, arrival in order:
                hold = cost * time_held + come * arrival + after[r]
                # Ties stay: moving down is free, but pointless where nothing is saved.
                if hold <= lowest:
                    lowest, lowest_r = hold, r
                holds.append(lowest)
                choices.append(lowest_r)
            keep = serving_cost * time_held + served[k + 1]
            if keep <= lowest:
                served[k] = keep
            else:
                served[k] = lowest
                drops[k] = lowest_r
            for r in range(count):
                cost = starts[r].cost(k)
                if cost < holds[r]:
                    holds[r] = cost
                    choices[r] = -1
            values[k] = holds
            held[k] = choices
        self.values, self.held, self.drops = values, held, drops
        self.starts = starts

    def choice(self, starting_left_s: float | None) -> Choice:
        """The action at the first grid point, followed along the grid to where it ends."""
        scale = 1.0 / self.alive[0]
        level = len(self.rungs) - 1
        if self.level < Rung.SERVING:
            level = max(r for r, rung in enumerate(self.rungs) if rung <= self.level or r == 0)
        numbers = self._numbers(level, scale)
        if starting_left_s is not None:
            goes_on = _Starts(self, starting_left_s).cost(0)
            numbers["keep_cost_gpu_s"] = goes_on * scale
            if goes_on <= self.values[0][level] or self.held[0][level] < 0:
                return Choice(True, Rung.SERVING, self._served_until(self.now_s + starting_left_s), numbers)
            return self._unlit(self.held[0][level], numbers)
        if self.level == Rung.SERVING:
            if self.drops[0] < 0:
                return Choice(True, Rung.SERVING, self._served_until(self.now_s), numbers)
            return self._unlit(self.drops[0], numbers)
        if self.held[0][level] < 0:
            return Choice(True, Rung.SERVING, self._served_until(self.now_s + self.leads[level]), numbers)
        return self._unlit(self.held[0][level], numbers)

    def _served_until(self, ready_s: float) -> float:
        grid, drops = self.grid, self.drops
        for k in range(bisect_left(grid, ready_s), len(grid) - 1):
            if drops[k] >= 0:
                return grid[k]
        return max(grid[-1], ready_s)

    def _unlit(self, r: int, numbers: Mapping[str, float]) -> Choice:
        # Where the forecast ends, another rule goes on; the lowest rung is the end of both.
        until_s = math.inf if r == 0 else self.grid[-1]
        for k in range(1, len(self.grid) - 1):
            if self.held[k][r] != r:
                until_s = self.grid[k]
                break
        return Choice(False, self.rungs[r], until_s, numbers)

    def _numbers(self, level: int, scale: float) -> dict[str, float]:
        grid, alive, area = self.grid, self.alive, self.area
        time_held, come = area[1] - area[0], alive[0] - alive[1]
        lead_s = self.leads[level]
        numbers = {
            "p_arrival_in_lead": 1.0 - self.curve.at(grid[0] + lead_s) * scale,
            "lead_s": lead_s,
            "dark_cost_gpu_s": scale
            * min(
                self.costs[r] * time_held + come * self.arrivals[r] + self.values[1][r]
                for r in range(level + 1)
                if self.rungs[r] != Rung.PARKED or level == 0
            ),
        }
        if self.rungs[level] == Rung.PARKED:
            parked = self.costs[level] * time_held + come * self.arrivals[level] + self.values[1][level]
            numbers["park_cost_gpu_s"] = scale * parked
        if self.level == Rung.SERVING:
            numbers["keep_cost_gpu_s"] = scale * (self.serving_cost * time_held + self.served[1])
        else:
            numbers["prewarm_cost_gpu_s"] = scale * self.starts[level].cost(0)
        return numbers


class _Starts:
    """What a start costs that begins at a grid point and takes `lead_s`. Asked from the last point to the first."""

    def __init__(self, problem: _Problem, lead_s: float) -> None:
        prices = problem.prices
        self.problem = problem
        self.lead_s = lead_s
        grid = problem.grid
        first_wait = prices.wait_cost
        others = prices.wait_cost * max(0.0, prices.batch_size - 1.0)
        self.serving_cost = problem.serving_cost
        # A request that comes during the start waits for its rest, and the GPU is held meanwhile. Those that come
        # after it, evenly over the burst, by Simpson's rule at its beginning, middle and end.
        burst_s = prices.burst_s if others else 0.0
        weights = [(lead_s, first_wait + problem.serving_cost + others * (1 / 6 if burst_s else 1.0))]
        if burst_s and others:
            weights += [(lead_s - burst_s / 2, others * 4 / 6), (lead_s - burst_s, others / 6)]
        self.waits = [
            (left_s, weight, problem.curve.along([time_s + left_s for time_s in grid])[1])
            for left_s, weight in weights
            if left_s > 0
        ]
        self.ready_area = problem.curve.along([time_s + lead_s for time_s in grid])[1]
        self.upper = len(grid) - 1

    def cost(self, k: int) -> float:
        problem = self.problem
        grid = problem.grid
        start_s = grid[k]
        here, alive = problem.area[k], problem.alive[k]
        total = self.serving_cost * (self.ready_area[k] - here)
        for left_s, weight, area in self.waits:
            total += weight * (alive * left_s - (area[k] - here))
        ready_s = start_s + self.lead_s
        if ready_s >= grid[-1]:
            return total
        upper = min(self.upper, len(grid) - 1)
        while upper > 0 and grid[upper - 1] >= ready_s:
            upper -= 1
        while grid[upper] < ready_s:
            upper += 1
        self.upper = upper
        served = problem.served
        if upper == k or grid[upper] == ready_s:
            return total + served[upper]
        low = upper - 1
        share = (ready_s - grid[low]) / (grid[upper] - grid[low])
        return total + served[low] + share * (served[upper] - served[low])


def _grid(now_s: float, curve: Curve, leads: Sequence[float]) -> list[float]:
    """Times from now to the curve's end: dense now, and where the arrival is likely and starts must begin for it."""
    end_s = curve.end_s
    span_s = end_s - now_s
    points = {now_s, end_s}
    first_s = min(FINEST_S, span_s / STEPS)
    growth = (span_s / first_s) ** (1.0 / STEPS)
    step_s = first_s
    for _ in range(STEPS):
        points.add(now_s + step_s)
        step_s *= growth
    alive = curve.at(now_s)
    comes = alive - curve.survival[-1]
    if comes > 1e-9 * alive:
        begins = {lead_s for lead_s in leads if lead_s > 0}
        for share in SHARES:
            time_s = curve.when_s(alive - comes * share)
            points.add(time_s)
            for lead_s in begins:
                points.add(time_s - lead_s)
    ordered = sorted(point for point in points if now_s <= point <= end_s)
    grid = ordered[:1]
    for point in ordered[1:-1]:
        # Points closer than this decide nothing that the others do not.
        if point - grid[-1] >= 1e-3:
            grid.append(point)
    if end_s > grid[-1]:
        grid.append(end_s)
    return grid


__all__ = ["Choice", "Prices", "choose", "waiting", "without_forecast"]
