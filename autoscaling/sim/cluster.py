"""Replicas, their starts, what is warm besides them, and the GPUs that all of it holds. Event by event."""

from __future__ import annotations

import heapq
import math
import zlib
from dataclasses import dataclass, field

import numpy as np

from autoscaling.core.plan import Entry, follow
from autoscaling.core.seen import charge, per_replica
from autoscaling.core.types import Capacity, Decision, Observation, Reason, Rung, Spec, State
from autoscaling.sim.pool import Pool
from autoscaling.sim.profile import Profile
from autoscaling.sim.queueing import (
    ARRIVED,
    BUSY_S,
    DARK,
    FREED,
    HELD_S,
    LAST_ARRIVAL,
    LAST_BUSY,
    NOW,
    Floats,
    Queue,
)


@dataclass(slots=True)
class Used:
    """GPU-seconds and counts of one model since it is measured."""

    starting_s: float = 0.0
    parked_s: float = 0.0
    """What the parked engine's memory is charged."""
    node_s: float = 0.0
    """The same of rungs below, while nothing runs: nodes that are kept."""
    starts: dict[str, int] = field(default_factory=dict)
    """By the rung where they began."""
    failed_starts: int = 0
    cancelled_starts: int = 0
    scale_ups: int = 0
    scale_downs: int = 0
    evictions: int = 0


class VirtualModel:
    """One model. Everything up to `now_s` has happened."""

    def __init__(self, spec: Spec, profile: Profile, pool: Pool, *, seed: int, fixed: bool = False) -> None:
        """`fixed`: the trace says how long its requests took, whatever else was in progress."""
        self.name = spec.model
        self.spec = spec
        self.profile = profile
        self.pool = pool
        self.gpus = charge(spec)
        self.queue = Queue(
            profile.engine.slowdowns(fixed=fixed),
            deadline_s=profile.deadline_s,
            queue_limit=profile.queue_limit,
            slo_s=profile.slo_s,
        )
        self.rungs = profile.rungs(self.gpus, park=spec.park)
        self.used = Used()
        self._moved = False
        self._evicted = False
        self._random = np.random.default_rng([seed, zlib.crc32(spec.model.encode()), 1])
        self._starts: list[tuple[float, float, Rung]] = []  # (ready, begun, from), a heap
        self._pending = 0
        self._warming: tuple[float, float, Rung] | None = None  # (ready, begun, to)
        self._target = 0
        self._ceiling: int | None = None
        self._acts_s = math.inf
        self._rung = self._resting = self._rests(profile.base)
        self._then = self._reached = self._rung
        self._dark_s: float | None = -math.inf
        self._since_s = -math.inf
        self._arrived = 0
        self._follower = State()
        concurrency = profile.engine.concurrency
        self._capacity = Capacity(float(concurrency)) if concurrency < spec.target_ongoing_requests else None

    # Time

    @property
    def now_s(self) -> float:
        return float(self.queue.f[NOW])

    def begin(self, now_s: float) -> None:
        """Nothing is known of what was before."""
        self.queue.begin(now_s)
        self._dark_s = self._since_s = now_s

    def feed(self, times: Floats, work: Floats) -> None:
        """Requests that come."""
        self.queue.feed(times, work)

    def next_s(self) -> float:
        """When something happens next by itself."""
        next_s = self.queue.next_s()
        if self._starts:
            next_s = min(next_s, self._starts[0][0])
        if self._warming is not None:
            next_s = min(next_s, self._warming[0])
        return min(next_s, self._acts_s)

    @property
    def moved(self) -> bool:
        """What is seen changed by other means than requests: it is looked at again at the next tick."""
        return self._moved or self._evicted

    @property
    def unanswered(self) -> bool:
        """A request waits or is in progress, or is known to come."""
        return self.queue.unanswered

    def advance(self, until_s: float) -> None:
        """All that happens up to and at `until_s`."""
        queue = self.queue
        while True:
            to_s = min(until_s, self._acts_s)
            if self._starts:
                to_s = min(to_s, self._starts[0][0])
            if self._warming is not None:
                to_s = min(to_s, self._warming[0])
            why = queue.advance(to_s, (0 if self._wakes_not else 1) | (2 if queue.held > queue.ready else 0))
            if why == DARK:
                self._wake()
            elif why == FREED:
                self.pool.give(self.gpus)
                self._may_be_dark()
                if queue.queued and not queue.ready and not self._wakes_not:
                    self._wake()
            elif self._starts and self._starts[0][0] <= to_s:
                # Who waits for it begins at the same moment.
                self._started()
            elif self._acts_s <= to_s:
                self._act()
            elif self._warming is not None and self._warming[0] <= to_s:
                self._warmed()
            elif to_s >= until_s:
                return

    @property
    def _wakes_not(self) -> bool:
        """A replica is on its way, or a budget forbids it: a request that finds none starts none."""
        return bool(self._starts or self._pending or self._ceiling == 0 or self._acts_s < math.inf)

    # What the controller sees and does

    def observe(self, now_s: float) -> Observation:
        """Arrivals are those since the call before."""
        queue = self.queue
        self._evicted = False
        f, arrived = queue.f, int(queue.n[ARRIVED])
        came, self._arrived = arrived - self._arrived, arrived
        queued, in_flight = queue.queued, queue.in_flight
        last_arrival_s, last_busy_s = float(f[LAST_ARRIVAL]), float(f[LAST_BUSY])
        return Observation(
            now_s=now_s,
            ready=queue.ready,
            starting=len(self._starts) + self._pending,
            target=self._target,
            queued=queued,
            in_flight=in_flight,
            arrivals=came,
            last_arrival_s=last_arrival_s if arrived else None,
            last_busy_s=(now_s if queued or in_flight else last_busy_s) if arrived else None,
            rung=self._rung,
            rungs=self.rungs,
            capacity=self._capacity,
        )

    def apply(self, now_s: float, spec: Spec, decision: Decision, observation: Observation | None) -> None:
        """As the plan and Serve's policy that follows it do: never below what requests in progress need."""
        self.spec = spec
        self._moved = False
        if decision.replicas is None:
            return
        cut = Reason.GPU_BUDGET in decision.clamps or Reason.SPEND_LIMIT in decision.clamps
        self._ceiling = decision.replicas if cut else None
        wanted = decision.replicas
        if observation is not None:
            wanted = self._followed(now_s, spec, decision, observation)
        if wanted != self._target:
            if wanted > self._target:
                self.used.scale_ups += 1
            else:
                self.used.scale_downs += 1
            self._target = wanted
            self._moved = True
        self._then = self._rests(min(decision.rung, Rung.PARKED))
        if wanted != self._there:
            self._moved = True
            self._acts(now_s)
        # Whose engine just had to make room for another's is decided anew first.
        if self._dark_s is not None and not self._evicted:
            self._hold(now_s, self._then)

    def _followed(self, now_s: float, spec: Spec, decision: Decision, observation: Observation) -> int:
        assert decision.replicas is not None
        load = (observation.queued or 0) + (observation.in_flight or 0)
        raised = "raised" in self._follower.values
        if not raised and load <= decision.replicas * per_replica(spec, observation):
            return decision.replicas
        entry = Entry(
            decision.replicas, decision.rung, decision.reason, decision.until_s, spec, self._ceiling
        )
        self._follower, followed = follow(spec, self._follower, observation, entry, now_s)
        return followed.replicas or 0

    # Replicas

    @property
    def _there(self) -> int:
        """Replicas that are ready or on their way."""
        return self.queue.ready + len(self._starts) + self._pending

    def _acts(self, now_s: float) -> None:
        """Serve does what it was told at the next turn of its control loop."""
        if self.profile.wake_s <= 0:
            self._act()
        else:
            self._acts_s = min(self._acts_s, now_s + self.profile.wake_s)

    def _act(self) -> None:
        """From several replicas to none in two turns."""
        now_s, there = self.now_s, self._there
        self._acts_s = math.inf
        last = self._target
        if last == 0 and there > 1 and self.profile.wake_s > 0:
            last = 1
            self._acts_s = now_s + self.profile.wake_s
        for _ in range(last - there):
            self._begin(now_s)
        for _ in range(there - last):
            self._end(now_s)

    def _wake(self) -> None:
        """Serve's own way: a request and no replica, so one is started."""
        if self.spec.max_replicas > 0:
            if self._target == 0:
                self._target = 1
                self.used.scale_ups += 1
            self._acts(self.now_s)

    def _begin(self, now_s: float) -> None:
        left_s = math.inf
        if self._warming is not None:
            # What is on its way to a rung goes on from there to a replica.
            ready_s, _, rung = self._warming
            left_s = ready_s - now_s + self._delay_s(rung)
            self._unwarm(now_s)
        if not self.pool.take(self.gpus):
            self._pending += 1
            self.pool.waiting.append(self)
            return
        self._start(now_s, left_s)

    def granted(self, now_s: float) -> None:
        """A start that waited for GPUs has them."""
        if self._pending == 0:
            self.pool.give(self.gpus)
            return
        self._pending -= 1
        self._start(max(now_s, self.now_s))

    def _start(self, now_s: float, left_s: float = math.inf) -> None:
        if self._dark_s is not None:
            self._reached = self._rung
        self._light(now_s)
        rung = self._rung
        if rung == Rung.PARKED:
            self.pool.unpark(self)
            self._rung = self._resting
        self.used.starts[rung.name.lower()] = self.used.starts.get(rung.name.lower(), 0) + 1
        heapq.heappush(self._starts, (now_s + min(left_s, self._delay_s(rung)), now_s, rung))

    def _delay_s(self, rung: Rung) -> float:
        delays = self.profile.starts[rung].delay_s
        return delays[0] if len(delays) == 1 else float(delays[self._random.integers(len(delays))])

    def _started(self) -> None:
        ready_s, begun_s, _ = heapq.heappop(self._starts)
        self.used.starting_s += (ready_s - max(begun_s, self._since_s)) * self.gpus
        if self.profile.start_failures and self._random.random() < self.profile.start_failures:
            self.used.failed_starts += 1
            heapq.heappush(self._starts, (ready_s + self._delay_s(self._resting), ready_s, self._resting))
            return
        self._reached = max(self._reached, Rung.PARKED)
        self.queue.add_replica()

    def _end(self, now_s: float) -> None:
        if self._pending:
            self._pending -= 1
            self.pool.waiting.remove(self)
        elif self._starts:
            last = max(range(len(self._starts)), key=lambda i: self._starts[i][0])
            _, begun_s, _ = self._starts.pop(last)
            heapq.heapify(self._starts)
            self.used.starting_s += max(0.0, now_s - max(begun_s, self._since_s)) * self.gpus
            self.used.cancelled_starts += 1
            self.pool.give(self.gpus)
        elif self.queue.drain_replica():
            self.pool.give(self.gpus)
        self._may_be_dark()

    # Darkness

    def _may_be_dark(self) -> None:
        if self._dark_s is None and not self._starts and not self._pending and self.queue.held == 0:
            self._dark_s = self.now_s
            # Only an engine that was there can be parked: a start that is given up leaves what it began from.
            self._rung = min(self._then, max(self._reached, self._resting))
            if self._rung == Rung.PARKED:
                self.pool.park(self, self.now_s)
            if not self._evicted:
                self._hold(self.now_s, self._then)

    def _light(self, now_s: float) -> None:
        self._book(now_s)
        self._dark_s = None

    def _book(self, now_s: float) -> None:
        """What holding the present rung has cost."""
        if self._dark_s is None:
            return
        span_s = max(0.0, now_s - self._dark_s)
        self._dark_s = now_s
        cost = self.profile.starts[self._rung].cost_per_s * self.gpus * span_s
        if self._rung == Rung.PARKED:
            self.used.parked_s += cost
        else:
            self.used.node_s += cost

    def _hold(self, now_s: float, rung: Rung) -> None:
        """Down at once, up in the time that is between the two."""
        if self._warming is not None and self._warming[2] != rung:
            self._unwarm(now_s)
        if rung < self._rung:
            self._moved = True
            self._book(now_s)
            self.pool.unpark(self)
            self._rung = rung
        elif rung > self._rung and self._warming is None:
            if rung == Rung.PARKED and not self.pool.take(self.gpus):
                return
            takes_s = max(0.0, self._delay_s(self._rung) - self.profile.starts[rung].quantile_s(0.5))
            self._warming = (now_s + takes_s, now_s, rung)

    def _warmed(self) -> None:
        assert self._warming is not None
        _, _, rung = self._warming
        self._unwarm(self._warming[0])
        self._book(self.now_s)
        self._rung = rung
        if rung == Rung.PARKED:
            self.pool.park(self, self.now_s)

    def _unwarm(self, now_s: float) -> None:
        assert self._warming is not None
        _, begun_s, rung = self._warming
        if rung == Rung.PARKED:
            self.used.starting_s += max(0.0, now_s - max(begun_s, self._since_s)) * self.gpus
            self.pool.give(self.gpus)
        self._warming = None

    def evict(self, now_s: float) -> None:
        """Another model's parked engine takes the place of this one's."""
        self._book(max(now_s, self._dark_s or now_s))
        self._rung = self._resting
        self._evicted = True
        self.used.evictions += 1

    def _rests(self, rung: Rung) -> Rung:
        """The highest rung up to that one that there is here."""
        below = [each for each in self.profile.starts if each <= rung]
        return max(below) if below else min(self.profile.starts)

    # Accounts

    def measure(self, now_s: float) -> None:
        """Only what is from now on counts."""
        self._book(now_s)
        self._since_s = now_s
        self.queue.measure(now_s)
        self.used = Used()

    def close(self, now_s: float) -> None:
        """What is still open is charged until now."""
        self._book(now_s)
        for _, begun_s, _ in self._starts:
            self.used.starting_s += max(0.0, now_s - max(begun_s, self._since_s)) * self.gpus
        if self._warming is not None:
            self._unwarm(now_s)
        self._since_s = now_s

    @property
    def busy_gpu_s(self) -> float:
        return float(self.queue.f[BUSY_S]) * self.gpus

    @property
    def idle_gpu_s(self) -> float:
        return float(self.queue.f[HELD_S] - self.queue.f[BUSY_S]) * self.gpus
