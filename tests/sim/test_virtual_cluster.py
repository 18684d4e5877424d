"""The virtual cluster where it can be worked out by hand: budgets, failures, deadlines, memory, Serve's own ways."""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from autoscaling.core.types import Decision, Reason, Rung
from autoscaling.sim.cluster import VirtualModel
from autoscaling.sim.events import CELLS, FINISHED, FLOATS, NOW, WHOLES, count_wait
from autoscaling.sim.pool import Pool
from autoscaling.sim.profile import Engine, Profile, Start
from autoscaling.sim.queueing import REJECTED, WAITED_S, Queue
from autoscaling.sim.replay import Replay, Setup, replay
from autoscaling.sim.report import Figures, Report
from tests.sim import lab

PARKING = {Rung.TEMPLATE: Start((30.0,)), Rung.PARKED: Start((2.0,), 0.01)}


def two(rows: list[lab.Row], made: Profile, **changes: object) -> Report:
    """Models a and b, that share what the profile bounds."""
    specs = {name: lab.spec(name, **changes) for name in ("a", "b")}
    return replay(rows, specs, Setup(profile=made))


def of(report: Report, model: str) -> Figures:
    return next(each.figures for each in report.models if each.model == model)


def model(made: Profile, pool: Pool | None = None, **changes: object) -> VirtualModel:
    found = VirtualModel(lab.spec(**changes), made, pool or Pool(), seed=0)
    found.begin(0.0)
    return found


def told(found: VirtualModel, now_s: float, replicas: int, rung: Rung = Rung.TEMPLATE) -> None:
    found.advance(now_s)
    found.apply(now_s, found.spec, Decision("m", now_s, replicas, rung, Reason.DEMAND, 1e18, "fixed"), None)


# A GPU budget


def test_a_span_without_a_replica_is_one_cold_start_though_none_can_begin() -> None:
    report = two([lab.Row(10.0 * i, name) for i in range(9) for name in "ab"], lab.profile(gpus=0.0))
    assert (report.total.cold_starts, report.total.starts) == (2, 0)


def test_a_model_waits_for_the_gpu_that_another_holds() -> None:
    # a: 10 to 40 starting, 40 to 140 working. b asks at 20, gets the GPU when a has ended, and starts then.
    rows = [lab.Row(10.0, "a", exec_s=100.0), lab.Row(20.0, "b", exec_s=5.0)]
    report = two(rows, lab.profile(gpus=1.0))
    assert of(report, "a").waited_s == pytest.approx(30.0)
    assert of(report, "b").waited_s == pytest.approx(140.0 + 30.0 - 20.0, abs=2.0)
    assert of(report, "b").starting_gpu_s == pytest.approx(30.0)
    # Without a budget nobody waits for anybody.
    assert of(two(rows, lab.profile(gpus=2.0)), "b").waited_s == pytest.approx(30.0)


def test_models_that_are_always_busy_take_turns_on_the_one_gpu() -> None:
    """A minute of service at least for each start of half a minute; with two GPUs nobody waits but at first."""
    rows = sorted(
        lab.Row(i + shift, name, exec_s=2.0) for i in range(1800) for shift, name in ((0.0, "a"), (0.5, "b"))
    )
    report = two(rows, lab.profile(gpus=1.0, engine=Engine(concurrency=64)), target_ongoing_requests=64.0)
    for name in "ab":
        assert of(report, name).requests == 1800
        # It starts, serves a minute, and waits for the other to do the same.
        assert 7 <= of(report, name).starts <= 1800 / 150 + 1
        assert of(report, name).wait_max_s == pytest.approx(60 + 30 + 30, abs=10)
    assert of(report, "a").waited_s == pytest.approx(of(report, "b").waited_s, rel=0.2)
    roomy = two(rows, lab.profile(gpus=2.0, engine=Engine(concurrency=64)), target_ongoing_requests=64.0)
    assert roomy.total.starts == 2


def test_no_more_gpus_are_held_than_there_are() -> None:
    random = np.random.default_rng(4)
    rows = sorted(
        lab.Row(float(time_s), name, exec_s=float(random.exponential(20.0)))
        for name in ("a", "b")
        for time_s in random.uniform(0, 3600, 150)
    )
    for gpus in (1.0, 2.0, 3.0):
        specs = {name: lab.spec(name, policy="reactive", max_replicas=4) for name in ("a", "b")}
        played = Replay(rows, specs, Setup(profile=lab.profile(gpus=gpus), sample_s=1.0))
        report = played.run()
        assert report.total.requests == 300
        steps = zip(
            *(
                [after.held_s - before.held_s for before, after in pairwise(s)]
                for s in report.timeline.values()
            ),
            strict=True,
        )
        most = max(sum(step) for step in steps)
        assert gpus - 0.1 <= most <= gpus + 1e-6
        assert played.groups[""].models["a"].pool.used <= gpus


# Starts that fail, that are given up, that vary


def test_a_start_that_fails_is_begun_anew() -> None:
    rows = lab.requests(np.arange(200) * 1000.0 + 10)
    report = lab.run(rows, lab.profile(start_failures=0.4), keep_alive_s=0.0)
    total = report.total
    assert total.starts == total.requests == 200
    # How many fail before one does not: 0.4 / 0.6 on average.
    assert total.failed_starts / total.starts == pytest.approx(0.4 / 0.6, rel=0.25)
    assert total.waited_s == pytest.approx(30.0 * (total.starts + total.failed_starts))
    assert total.starting_gpu_s == pytest.approx(total.waited_s)


def test_starts_take_what_was_measured() -> None:
    rows = lab.requests(np.arange(300) * 1000.0 + 10)
    made = lab.profile(starts={Rung.TEMPLATE: Start((10.0, 20.0, 60.0))})
    report = lab.run(rows, made, keep_alive_s=0.0)
    assert report.total.wait_mean_s == pytest.approx(30.0, rel=0.1)
    assert report.total.wait_p50_s == pytest.approx(20.0, rel=0.01)
    assert report.total.wait_max_s == pytest.approx(60.0)


def test_a_start_that_is_given_up_leaves_no_parked_engine() -> None:
    made = lab.profile(starts=PARKING)
    found = model(made)
    told(found, 10.0, 1)
    told(found, 20.0, 0, Rung.PARKED)
    assert found.used.cancelled_starts == 1
    assert found.used.starting_s == pytest.approx(10.0)
    assert found.observe(20.0).rung == Rung.TEMPLATE
    # It is brought there from the template, and that takes the way that is between the two.
    found.advance(47.9)
    assert found.observe(47.9).rung == Rung.TEMPLATE
    found.advance(48.1)
    assert found.observe(48.1).rung == Rung.PARKED
    assert found.used.starting_s == pytest.approx(10.0 + 28.0)


def test_what_warms_goes_on_to_a_replica_and_gives_its_gpu_back_once() -> None:
    pool = Pool(gpus=1.0)
    found = model(lab.profile(starts=PARKING), pool)
    told(found, 10.0, 0, Rung.PARKED)
    assert pool.used == 1.0
    # Parked at 38, and from there 2 s: a start at 30 has 10 s to go, not 30.
    told(found, 30.0, 1)
    found.advance(39.9)
    assert found.observe(39.9).ready == 0
    found.advance(40.1)
    assert found.observe(40.1).ready == 1
    assert pool.used == 1.0
    told(found, 50.0, 0)
    assert pool.used == 0.0
    assert found.used.starting_s == pytest.approx(20.0 + 10.0)


# Deadlines and full queues


def test_who_waits_beyond_the_deadline_is_turned_away_and_has_waited() -> None:
    # The first gives up at 30; the second is served when the replica comes at 40.
    report = lab.run(lab.requests([10.0, 25.0]), lab.profile(deadline_s=20.0))
    total = report.total
    assert (total.requests, total.rejected, total.cold_requests) == (2, 1, 2)
    assert total.waited_s == total.cold_waited_s == pytest.approx(20.0 + 15.0)
    assert total.wait_max_s == pytest.approx(20.0)
    assert total.busy_gpu_s == pytest.approx(5.0)


def test_a_request_that_is_turned_away_in_time_has_still_missed_the_slo() -> None:
    report = lab.run(lab.requests([10.0]), lab.profile(deadline_s=20.0, slo_s=25.0))
    assert report.total.rejected == 1
    assert report.total.slo_attainment == 0.0


def test_a_full_queue_turns_away_and_those_turned_away_do_not_fill_it() -> None:
    """They count as having waited until the deadline, as whoever waits in vain does."""
    # Two may wait: 10 and 11; 12, 13 and 14 are too many. At 40 the first begins, so that at 41 there is room.
    rows = lab.requests([10.0, 11.0, 12.0, 13.0, 14.0, 41.0, 42.0])
    report = lab.run(rows, lab.profile(queue_limit=2, deadline_s=100.0))
    assert report.total.rejected == 4
    # Of those that found no replica only the two that waited for one are cold.
    assert (report.total.cold_requests, report.total.cold_starts) == (2, 1)
    assert report.total.waited_s == pytest.approx((40 - 10) + (45 - 11) + (50 - 41) + 4 * 100)
    assert report.total.slo_attainment == 0.0


def test_no_queue_at_all_still_serves_who_finds_a_free_replica() -> None:
    queue = Queue(np.ones(2), deadline_s=1e9, queue_limit=0, slo_s=1.0)
    queue.begin(0.0)
    queue.add_replica()
    queue.feed(np.asarray([1.0, 2.0, 20.0]), np.full(3, 5.0))
    queue.advance(100.0)
    assert (queue.n[REJECTED], queue.n[FINISHED]) == (1, 2)


@pytest.mark.parametrize("waited_s", [1e12, math.inf])
def test_the_longest_waits_share_the_last_cell(waited_s: float) -> None:
    """Where a wait has no end, too, and nothing is written beyond the histogram."""
    memory = np.zeros(2 * CELLS, np.int64)
    f, n = np.zeros(FLOATS), np.zeros(WHOLES, np.int64)
    f[NOW] = 5.0
    count_wait(0, np.asarray([5.0]), np.zeros(1, np.uint8), f, n, memory[:CELLS], waited_s)
    assert np.flatnonzero(memory).tolist() == [CELLS - 1]


@pytest.mark.parametrize("seed", range(6))
def test_servers_with_impatient_customers_do_what_a_plain_simulation_does(seed: int) -> None:
    random = np.random.default_rng(seed)
    servers, count = int(random.integers(1, 5)), 3000
    deadline_s, limit = float(random.choice([0.5, 2.0, 1e9])), int(random.choice([1, 4, 10**6]))
    times = np.cumsum(random.exponential(0.9 / servers, count))
    work = random.exponential(1.0, count)
    queue = Queue(np.ones(2), deadline_s=deadline_s, queue_limit=limit, slo_s=1.0)
    queue.begin(0.0)
    for _ in range(servers):
        queue.add_replica()
    # In two pieces, and stopped now and then.
    queue.feed(times[:1000], work[:1000])
    for until_s in np.linspace(times[0], times[999], 57):
        queue.advance(float(until_s))
    queue.feed(times[1000:], work[1000:])
    queue.advance(1e12)
    assert not queue.unanswered
    waited, rejected = plain(times, work, servers, deadline_s, limit)
    assert queue.n[REJECTED] == rejected
    assert queue.f[WAITED_S] == pytest.approx(waited)


def plain(
    times: np.ndarray, work: np.ndarray, servers: int, deadline_s: float, limit: int
) -> tuple[float, int]:
    """(seconds waited by all, turned away) first come, first served."""
    free = [-math.inf] * servers
    waiting: deque[tuple[float, float]] = deque()
    waited, rejected = 0.0, 0
    for time_s, takes_s in [*zip(times.tolist(), work.tolist(), strict=True), (math.inf, 0.0)]:
        while waiting:
            came_s, its_s = waiting[0]
            frees_s = free[0]
            if came_s + deadline_s < min(frees_s, time_s):
                rejected += 1
                waited += deadline_s
            elif frees_s <= time_s:
                heapq.heapreplace(free, frees_s + its_s)
                waited += frees_s - came_s
            else:
                break
            waiting.popleft()
        if free[0] <= time_s:
            heapq.heapreplace(free, time_s + takes_s)
        elif len(waiting) < limit:
            waiting.append((time_s, takes_s))
        else:
            rejected += 1
            waited += deadline_s
    return waited, rejected


# Memory for parked engines


def test_memory_holds_so_many_parked_engines_and_the_oldest_makes_room() -> None:
    # a is parked from about 105, b from about 295. With room for one, a is not any more when it is asked at 1000.
    rows = [lab.Row(10.0, "a", exec_s=5.0), lab.Row(200.0, "b", exec_s=5.0), lab.Row(1000.0, "a", exec_s=5.0)]
    made = lab.profile(starts=PARKING)
    roomy = two(rows, replace(made, parked_engines=2))
    assert {m.model: m.starts_by_rung for m in roomy.models}["a"] == {"template": 1, "parked": 1}
    tight = two(rows, replace(made, parked_engines=1))
    assert {m.model: m.starts_by_rung for m in tight.models}["a"] == {"template": 2}
    assert of(tight, "a").waited_s == pytest.approx(60.0)
    # Until 295 it was charged for; its last engine is parked again at the end, if at all, for less than a minute.
    assert of(tight, "a").parked_gpu_s == pytest.approx(0.01 * (295 - 105), rel=0.02, abs=0.6)
    # b's engine stayed until a's second one was parked, at 1095.
    assert of(tight, "b").parked_gpu_s >= 0.01 * (1000 - 295)
    none = two(rows, replace(made, parked_engines=0))
    assert none.total.parked_gpu_s == 0.0
    assert {m.model: m.starts_by_rung for m in none.models}["a"] == {"template": 2}


@pytest.mark.parametrize("policy", ["keep-alive", "predictive"])
def test_without_room_no_engine_is_warmed_to_be_parked(policy: str) -> None:
    """Nothing but starts from the template, each of which a request needed."""
    rows = lab.requests(np.arange(20) * 900.0)
    made = lab.profile(starts=PARKING, parked_engines=0)
    report = replay(rows, {"m": lab.spec(policy=policy)}, Setup(made))
    never = lab.run(rows, replace(made, parked_engines=None), policy=policy, park=False)
    assert report.total == never.total
    assert report.total.starting_gpu_s == 30.0 * report.total.starts


# Serve's own ways


def test_a_request_at_zero_starts_a_replica_at_serves_next_turn_not_at_the_controllers() -> None:
    for wake_s in (0.0, 0.1):
        report = lab.run(lab.requests([10.5, 500.25]), lab.profile(wake_s=wake_s))
        assert report.total.wait_max_s == pytest.approx(30.0 + wake_s)
        assert report.total.waited_s == pytest.approx(2 * (30.0 + wake_s))


def test_from_several_replicas_to_none_takes_two_turns() -> None:
    found = model(lab.profile(5.0, wake_s=0.1), max_replicas=3)
    told(found, 10.0, 3)
    found.advance(15.05)
    assert found.queue.ready == 0
    found.advance(15.15)
    assert found.queue.ready == 3
    told(found, 20.0, 0)
    held = []
    for now_s in (20.05, 20.15, 20.25):
        found.advance(now_s)
        held.append(found.queue.held)
    assert held == [3, 1, 0]


def test_a_replica_that_is_let_go_ends_its_requests_first() -> None:
    found = model(lab.profile(1.0))
    told(found, 0.0, 1)
    found.feed(np.asarray([2.0]), np.asarray([10.0]))
    told(found, 5.0, 0)
    assert (found.queue.ready, found.queue.held) == (0, 1)
    # One that comes meanwhile starts another.
    found.feed(np.asarray([7.0]), np.asarray([1.0]))
    found.advance(7.5)
    assert found.observe(7.5).starting == 1
    found.advance(12.5)
    assert found.queue.held == 1
    assert found.queue.f[WAITED_S] == pytest.approx(1.0)


def test_a_decision_acts_after_the_plans_way_and_demand_after_serves_own() -> None:
    found = model(lab.profile(5.0, wake_s=0.1, apply_s=2.0))
    told(found, 10.0, 1)
    found.advance(16.9)
    assert (found.queue.ready, found.observe(16.9).starting) == (0, 1)
    found.advance(17.0)
    assert found.queue.ready == 1
    # A request that comes while a decision is still on its way does not wait for that.
    early = model(lab.profile(5.0, wake_s=0.1, apply_s=2.0))
    told(early, 10.0, 1)
    early.feed(np.asarray([10.5]), np.asarray([1.0]))
    early.advance(20.0)
    assert early.queue.f[WAITED_S] == pytest.approx(5.1)
    # Nor does the replica that was let go by a decision go before that has come: who asks meanwhile meets it.
    told(found, 20.0, 0)
    found.feed(np.asarray([21.5]), np.asarray([0.25]))
    found.advance(21.99)
    assert (found.queue.ready, found.queue.f[WAITED_S]) == (1, 0.0)
    found.advance(22.0)
    assert found.queue.held == 0


def test_a_replica_that_is_ended_holds_its_gpu_for_as_long_as_that_takes() -> None:
    # Starting from 10 to 40, working until 45, idle until 105, stopping until 109; the end is at 200.
    rows = [*lab.requests([10.0]), lab.Row(200.0, "end", exec_s=1.0)]
    plain, stopping = (lab.run(rows, lab.profile(stop_s=stop_s)) for stop_s in (0.0, 4.0))
    one, other = of(plain, "m"), of(stopping, "m")
    assert (one.stopping_gpu_s, other.stopping_gpu_s) == (0.0, pytest.approx(4.0))
    assert other.gpu_s == pytest.approx(one.gpu_s + 4.0)
    # Whoever waits for that GPU waits for the stop, too.
    rows = [lab.Row(10.0, "a", exec_s=5.0), lab.Row(90.0, "b", exec_s=5.0)]
    waited = [of(two(rows, lab.profile(gpus=1.0, stop_s=s)), "b").waited_s for s in (0.0, 4.0)]
    assert waited[1] - waited[0] == pytest.approx(4.0, abs=1.0)
    # Of one that is ended when the span begins and when it closes, what is within counts.
    found = model(lab.profile(stop_s=4.0))
    told(found, 0.0, 1)
    told(found, 50.0, 0)
    for now_s, account in ((51.0, found.measure), (53.0, found.close)):
        found.advance(now_s)
        account(now_s)
    assert found.used.stopping_s == pytest.approx(2.0)


def test_a_request_that_finds_a_replica_waits_for_the_way_to_it() -> None:
    report = lab.run(lab.requests([10.0, 45.0, 60.0]), lab.profile(handoff_s=0.25))
    # The first waits for the start, in which its way is; the second comes as that has ended.
    assert report.total.waited_s == pytest.approx(30.0 + 0.25 + 0.25)
    assert report.total.wait_p50_s == pytest.approx(0.25, rel=0.01)


# Where measuring begins


def test_a_dark_span_in_which_measuring_begins_is_a_cold_start_of_who_comes_then() -> None:
    """The first request is not scored, the start for which it waits serves two that are."""
    report = lab.run(
        lab.requests([0.0, 20.0, 30.0], exec_s=1.0), lab.profile(100.0), {"measure_from_s": 10.0}
    )
    assert (report.total.cold_requests, report.total.cold_starts) == (2, 1)


def test_what_the_first_tick_starts_counts() -> None:
    report = lab.run(lab.requests([50.0, 400.0]), lab.profile(apply_s=0.0), min_replicas=1)
    assert (report.total.starts, report.total.scale_ups) == (1, 1)
