"""Replicas, their starts, what is warm besides them, and the GPUs that all of it holds. Event by event."""

from __future__ import annotations

import heapq
import math
import zlib

import numpy as np

from autoscaling.core.plan import Entry, follow, needed
from autoscaling.core.policies import POLICIES
from autoscaling.core.seen import charge, devices
from autoscaling.core.types import Capacity, Decision, Observation, Rung, Spec, State
from autoscaling.loop import Stands
from autoscaling.sim.pool import Pool
from autoscaling.sim.profile import Profile
from autoscaling.sim.queueing import (
    ARRIVED,
    BUSY_S,
    DARK,
    FREED,
    HELD_S,
    IN_FLIGHT,
    LAST_ARRIVAL,
    LAST_BUSY,
    NOW,
    READY,
    WAITING,
    Floats,
    Queue,
)
from autoscaling.sim.rest import Rest, Used

NO_TICKS: Floats = np.zeros(0)


class VirtualModel:
    """One model. Everything up to `now_s` has happened."""

    def __init__(self, spec: Spec, profile: Profile, pool: Pool, *, seed: int) -> None:
        self.name = spec.model
        self.spec = spec
        self.profile = profile
        self.pool = pool
        self.gpus, self.devices = charge(spec), devices(spec)
        self.queue = Queue(
            profile.engine.slowdowns(),
            deadline_s=profile.deadline_s,
            queue_limit=profile.queue_limit,
            slo_s=profile.slo_s,
            handoff_s=profile.handoff_s,
        )
        self.rungs = profile.rungs(self.gpus, park=spec.park)
        self._moved = False
        self._random = np.random.default_rng([seed, zlib.crc32(spec.model.encode()), 1])
        self._starts: list[tuple[float, float, Rung]] = []  # (ready, begun, from), a heap
        self._stops: list[tuple[float, float]] = []  # (ends, begun), oldest first
        self._pending = 0
        self._target = 0
        self._ceiling: int | None = None
        self._acts_s = math.inf
        self._rest = Rest(self, profile, pool, self._delay_s)
        self._arrived = 0
        self._follower = State()
        concurrency = profile.engine.concurrency
        self._capacity = Capacity(float(concurrency)) if concurrency < spec.target_ongoing_requests else None
        self._at_once = POLICIES[spec.policy].at_once(spec, Observation(0.0, capacity=self._capacity))

    # Time

    @property
    def now_s(self) -> float:
        return float(self.queue.f[NOW])

    def begin(self, now_s: float) -> None:
        """Nothing is known of what was before."""
        self.queue.begin(now_s)
        self._rest.begin(now_s)

    def feed(self, times: Floats, work: Floats) -> None:
        """Requests that come."""
        self.queue.feed(times, work)

    def next_s(self) -> float:
        """When something happens next by itself."""
        next_s = min(self.queue.next_s(), self._acts_s, self._rest.next_s)
        if self._stops:
            next_s = min(next_s, self._stops[0][0])
        return min(next_s, self._starts[0][0]) if self._starts else next_s

    @property
    def moved(self) -> bool:
        """What is seen changed by other means than requests: it is looked at again at the next tick."""
        return self._moved or self._rest.moved or self._rest.evicted

    @property
    def unanswered(self) -> bool:
        """A request waits or is in progress, or is known to come."""
        return self.queue.unanswered

    def answers(self, now_s: float, patience_s: float) -> bool:
        """The same, and within that time something happened to a request, or will: by itself, or as a start ends."""
        starts_s = self._starts[0][0] if self._starts else math.inf
        happened_s = float(self.queue.f[LAST_BUSY])
        return self.unanswered and (
            min(self.queue.next_s(), starts_s) < now_s + patience_s or now_s < happened_s + patience_s
        )

    @property
    def fits(self) -> bool:
        """Whether there can be a replica at all."""
        return self.pool.gpus is None or self.devices <= self.pool.gpus

    @property
    def steady(self) -> bool:
        """Nothing happens but requests that come and end."""
        queue = self.queue
        return not (
            not queue.ready == queue.held == self._target == self._there
            or self.moved
            or self._stops
            or self._acts_s < math.inf
            or self._rest.next_s < math.inf
            or "raised" in self._follower.values
        )

    def ride(self, now_s: float, before_s: float, tick_s: float, stands: Stands) -> Floats:
        """All that happens up to the last tick before `before_s`, or to the first at which what was decided does not
        stand for the requests that are queued or in flight, where ticks have no more to do than to count them: only
        while it is `steady`.

        Returns those ticks.
        """
        queue = self.queue
        replicas = queue.ready
        if replicas == 0 or self._at_once < math.inf:
            # Above that Serve's policy may raise what was decided.
            most = math.floor(replicas * self._at_once) if replicas else 0
            stands = stands._replace(most=min(stands.most, most))
        return (
            queue.ride(now_s, before_s, tick_s, stands)
            if self.load == 0 or stands.least <= self.load <= stands.most
            else NO_TICKS
        )

    def advance(self, until_s: float) -> None:
        """All that happens up to and at `until_s`."""
        queue = self.queue
        while True:
            to_s = min(until_s, self._acts_s, self._rest.next_s)
            if self._starts:
                to_s = min(to_s, self._starts[0][0])
            if self._stops:
                to_s = min(to_s, self._stops[0][0])
            why = queue.advance(to_s, (0 if self._wakes_not else 1) | (2 if queue.held > queue.ready else 0))
            if why == DARK:
                self._wake()
            elif why == FREED:
                self._stop(self.now_s)
                self._may_be_dark()
                if queue.queued and not queue.ready and not self._wakes_not:
                    self._wake()
            elif self._starts and self._starts[0][0] <= to_s:
                # Who waits for it begins at the same moment.
                self._started()
            elif self._stops and self._stops[0][0] <= to_s:
                self._stopped()
            elif self._acts_s <= to_s:
                self._act()
            elif self._rest.next_s <= to_s:
                self._rest.warmed()
            elif to_s >= until_s:
                return

    @property
    def _wakes_not(self) -> bool:
        """A replica is on its way, or a budget forbids it: a request that finds none starts none."""
        soon_s = self.now_s + self.profile.wake_s
        return bool(self._starts or self._pending or self._ceiling == 0 or self._acts_s <= soon_s)

    @property
    def load(self) -> int:
        """Requests that are queued or in flight."""
        return self.queue.queued + self.queue.in_flight

    # What the controller sees and does

    def observe(self, now_s: float) -> Observation:
        """Arrivals are those since the call before."""
        self._rest.evicted = False
        n, f = self.queue.n, self.queue.f
        arrived, queued, in_flight = int(n[ARRIVED]), int(n[WAITING]), int(n[IN_FLIGHT])
        came, self._arrived = arrived - self._arrived, arrived
        last_arrival_s = last_busy_s = None
        if arrived:
            last_arrival_s = float(f[LAST_ARRIVAL])
            last_busy_s = now_s if queued or in_flight else float(f[LAST_BUSY])
        return Observation(
            now_s,
            int(n[READY]),
            len(self._starts) + self._pending,
            self._target,
            queued,
            in_flight,
            came,
            last_arrival_s,
            last_busy_s,
            self._rest.rung,
            self.rungs,
            self._capacity,
        )

    def apply(self, now_s: float, spec: Spec, decision: Decision, observation: Observation | None) -> None:
        """As the plan and Serve's policy that follows it do: never below what requests in progress need."""
        self.spec = spec
        self._moved = self._rest.moved = False
        if decision.replicas is None:
            return
        self._ceiling = decision.ceiling
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
        self._rest.ask(decision.rung)
        if wanted != self._there:
            self._moved = True
            self._acts(now_s, self._applies_s if wanted == decision.replicas else self.profile.wake_s)
        if wanted == 0:
            self._rest.hold(now_s)

    def _followed(self, now_s: float, spec: Spec, decision: Decision, observation: Observation) -> int:
        assert decision.replicas is not None
        load = (observation.queued or 0) + (observation.in_flight or 0)
        raised = "raised" in self._follower.values
        if not raised and needed(spec, observation, load) <= decision.replicas:
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

    @property
    def _applies_s(self) -> float:
        """What a decision takes until Serve acts on it."""
        return self.profile.applies_s

    def _acts(self, now_s: float, delay_s: float) -> None:
        """Serve does what it was told at a turn of its control loop."""
        if delay_s <= 0:
            self._act()
        else:
            self._acts_s = min(self._acts_s, now_s + delay_s)

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
            self._acts(self.now_s, self.profile.wake_s)

    def _begin(self, now_s: float) -> None:
        left_s = self._rest.left_s(now_s)
        if not self.pool.take(self.devices):
            self._pending += 1
            self.pool.waiting.append(self)
            return
        self._start(now_s, left_s)

    def granted(self, now_s: float) -> None:
        """A start that waited for GPUs has them."""
        if self._pending == 0:
            self.pool.give(self.devices)
            return
        self._pending -= 1
        self._start(max(now_s, self.now_s))

    def _start(self, now_s: float, left_s: float = math.inf) -> None:
        rung = self._rest.light(now_s)
        self.used.starts[rung.name.lower()] = self.used.starts.get(rung.name.lower(), 0) + 1
        heapq.heappush(self._starts, (now_s + min(left_s, self._delay_s(rung)), now_s, rung))

    def _delay_s(self, rung: Rung) -> float:
        delays = self.profile.starts[rung].delay_s
        return delays[0] if len(delays) == 1 else float(delays[self._random.integers(len(delays))])

    def _started(self) -> None:
        ready_s, begun_s, _ = heapq.heappop(self._starts)
        self.used.starting(begun_s, ready_s, self.gpus)
        if self.profile.start_failures and self._random.random() < self.profile.start_failures:
            self.used.failed_starts += 1
            rung = self._rest.rung
            heapq.heappush(self._starts, (ready_s + self._delay_s(rung), ready_s, rung))
            return
        self._rest.served()
        self.queue.add_replica()

    def _end(self, now_s: float) -> None:
        if self._pending:
            self._pending -= 1
            self.pool.waiting.remove(self)
        elif self._starts:
            last = max(range(len(self._starts)), key=lambda i: self._starts[i][0])
            _, begun_s, _ = self._starts.pop(last)
            heapq.heapify(self._starts)
            self.used.starting(begun_s, now_s, self.gpus)
            self.used.cancelled_starts += 1
            self._stop(now_s)
        elif self.queue.drain_replica():
            self._stop(now_s)
        self._may_be_dark()

    def _stop(self, now_s: float) -> None:
        """A replica has no requests any more: it is ended."""
        if self.profile.stop_s <= 0:
            self.pool.give(self.devices)
        else:
            self._stops.append((now_s + self.profile.stop_s, now_s))

    def _stopped(self) -> None:
        ends_s, begun_s = self._stops.pop(0)
        self.used.stopping(begun_s, ends_s, self.gpus)
        self.pool.give(self.devices)

    def _may_be_dark(self) -> None:
        if not (self._rest.dark or self._starts or self._pending or self.queue.held):
            self._rest.darken(self.now_s)

    def evict(self, now_s: float) -> None:
        """Another model's parked engine takes the place of this one's."""
        self._rest.evict(now_s)

    # Accounts

    def measure(self, now_s: float) -> None:
        """Only what is from now on counts."""
        self._rest.measure(now_s)
        self.queue.measure(now_s)

    def close(self, now_s: float, patience_s: float = 0.0) -> None:
        """What is still open is charged until now; who was never answered as having waited that long at least."""
        self.queue.close(patience_s)
        self._rest.close(now_s)
        for _, begun_s, _ in self._starts:
            self.used.starting(begun_s, now_s, self.gpus)
        for _, begun_s in self._stops:
            self.used.stopping(begun_s, now_s, self.gpus)

    @property
    def used(self) -> Used:
        """Since it is measured."""
        return self._rest.used

    @property
    def busy_gpu_s(self) -> float:
        return float(self.queue.f[BUSY_S]) * self.gpus

    @property
    def idle_gpu_s(self) -> float:
        return float(self.queue.f[HELD_S] - self.queue.f[BUSY_S]) * self.gpus
