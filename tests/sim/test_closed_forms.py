"""The simulator against what can be worked out without it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from autoscaling.core.types import Rung
from autoscaling.sim.compare import KEEP_ALIVES_S, Base, Variant, compare, fixed, simulate
from autoscaling.sim.profile import Engine, Start
from autoscaling.sim.queueing import Queue, waited_quantile_s
from autoscaling.sim.replay import Setup
from tests.sim import lab


def test_two_requests_by_hand() -> None:
    # At 10 a start of 30 s begins, for a request of 5 s: 40 to 45, kept until 105. At 200 the same again: 230 to 235.
    report = lab.run(lab.requests([10.0, 200.0]))
    total = report.total
    assert total.requests == 2
    assert total.cold_starts == total.cold_requests == total.starts == 2
    assert total.waited_s == total.cold_waited_s == pytest.approx(60.0)
    assert total.wait_max_s == pytest.approx(30.0)
    assert total.starting_gpu_s == pytest.approx(60.0)
    assert total.busy_gpu_s == pytest.approx(10.0)
    # The replay goes on by whole minutes until nothing is open: until 260, of which 25 s are idle.
    assert report.until_s - report.measured_from_s == 250
    assert total.idle_gpu_s == pytest.approx(60.0 + 25.0)
    assert total.gpu_s == pytest.approx(155.0)
    assert total.total_cost_gpu_s == pytest.approx(155.0 + 10 * 60.0)
    assert total.cost == pytest.approx(155.0 / 3600 * 3.0)
    assert total.slo_attainment == 0.0


@pytest.mark.parametrize("keep_s", [0.0, 30.0, 120.0, 900.0])
def test_fixed_keep_alive_is_what_is_counted_on_the_trace(keep_s: float) -> None:
    # Requests take no time to speak of and starts hardly any: what a keep-alive costs is then counted on the gaps.
    times = np.round(np.cumsum(np.random.default_rng(3).exponential(200.0, 400)) + 1.0)
    times = np.unique(times)
    gaps = np.diff(times)
    report = lab.run(lab.requests(times, exec_s=1e-6), lab.profile(1e-3), keep_alive_s=keep_s)
    # A tick later at most, for a request between two ticks ends its work after the first of them.
    cold = 1 + int((gaps > math.floor(keep_s) + 1).sum())
    assert report.total.cold_starts == cold
    idle = np.minimum(gaps, math.floor(keep_s) + 1).sum()
    assert report.total.idle_gpu_s == pytest.approx(idle, abs=len(times) * 0.01 + 120)


@pytest.mark.parametrize(("c", "load"), [(1, 0.7), (4, 3.0), (16, 13.0)])
def test_waiting_of_mmc_is_erlangs(c: int, load: float) -> None:
    count = 400_000
    random = np.random.default_rng(c)
    queue = Queue(np.ones(2), deadline_s=1e18, queue_limit=1e18, slo_s=0.0)
    queue.begin(0.0)
    for _ in range(c):
        queue.add_replica()
    queue.feed(np.cumsum(random.exponential(1 / load, count)), random.exponential(1.0, count))
    queue.advance(1e12)
    waits = lab.waits(c, load)
    waited_s = queue.f[3] / count
    assert waited_s == pytest.approx(waits / (c - load), rel=0.05)
    share = 1 - queue.histogram[0] / count
    assert share == pytest.approx(waits, rel=0.03)
    # Who waits, waits exponentially.
    p99 = math.log(waits / 0.01) / (c - load)
    assert waited_quantile_s(queue.histogram, 0.99) == pytest.approx(p99, rel=0.08)


def test_processor_sharing_does_not_care_how_work_varies() -> None:
    # M/G/1 under processor sharing: the mean number in progress is load / (1 - load), whatever G is. Here with a
    # slowdown that is exactly the number in progress.
    load, count = 0.6, 300_000
    random = np.random.default_rng(5)
    most = 400
    queue = Queue(np.arange(most + 1, dtype=float), deadline_s=1e18, queue_limit=1e18, slo_s=0.0)
    queue.begin(0.0)
    queue.add_replica()
    times = np.cumsum(random.exponential(1 / load, count))
    queue.feed(times, random.choice([0.2, 5.0], count, p=[5 / 6, 1 / 6]))
    queue.advance(float(times[-1]))
    assert queue.f[5] / times[-1] == pytest.approx(load / (1 - load), rel=0.05)


def test_requests_in_a_batch_slow_each_other_down_by_hand() -> None:
    # Alone 10 s; two at once take 1.5 times as long. The second comes when the first has 5 s left: both then need 7.5 s
    # for those; the second has 5 s left when the first ends at 12.5, and ends at 17.5.
    queue = Queue(np.asarray([1.0, 1.0, 1.5]), deadline_s=1e9, queue_limit=1e9, slo_s=1.0)
    queue.begin(0.0)
    queue.add_replica()
    queue.feed(np.asarray([0.0, 5.0]), np.asarray([10.0, 10.0]))
    queue.advance(12.4)
    assert queue.in_flight == 2
    queue.advance(12.5)
    assert queue.in_flight == 1
    queue.advance(17.4)
    assert queue.in_flight == 1
    queue.advance(17.5)
    assert queue.in_flight == 0


def test_a_parked_engine_wakes_in_its_time_and_is_charged_its_memory() -> None:
    made = lab.profile(starts={Rung.TEMPLATE: Start((30.0,)), Rung.PARKED: Start((2.0,), 0.01)})
    # Cold at 10 (40 to 45), parked from 105 on, woken at 1000 (1002 to 1007).
    report = lab.run(lab.requests([10.0, 1000.0]), made)
    assert report.models[0].starts_by_rung == {"template": 1, "parked": 1}
    assert report.total.waited_s == pytest.approx(32.0)
    assert report.total.parked_gpu_s == pytest.approx(0.01 * (1000 - 105), rel=0.01)


def test_the_oracle_starts_so_that_nobody_waits_and_nothing_idles() -> None:
    times = lab.requests([600.0, 4000.0, 4003.0, 9000.0])
    base = Base(times, Setup(profile=lab.profile()), spec=lab.spec(max_replicas=4))
    total = simulate(base, Variant("oracle")).total
    # The first request of all begins the trace: nobody could know of it. Two at once are two replicas.
    assert total.cold_starts == 1
    assert total.waited_s == pytest.approx(30.0, abs=2.0)
    assert total.idle_gpu_s < 30
    others = [
        simulate(base, Variant(name)).total
        for name in ("predictive", "best-fixed", "kpa", "hybrid-histogram")
    ]
    assert all(total.total_cost_gpu_s < other.total_cost_gpu_s for other in others)


def test_best_fixed_is_the_best_of_those_that_are_tried() -> None:
    rows = lab.requests(np.cumsum(np.random.default_rng(2).exponential(300, 60)))
    base = Base(rows, Setup(profile=lab.profile()), spec=lab.spec())
    best = simulate(base, Variant("best-fixed"))
    for keep_s in (0.0, 60.0, 600.0, 3600.0):
        other = simulate(base, Variant("keep-alive", {"keep_alive_s": keep_s}))
        assert best.total.total_cost_gpu_s <= other.total.total_cost_gpu_s


@pytest.mark.parametrize(("cost_per_s", "parks"), [(0.5, False), (0.001, True)])
def test_best_fixed_parks_where_that_is_cheaper(cost_per_s: float, parks: bool) -> None:
    made = lab.profile(starts={Rung.TEMPLATE: Start((30.0,)), Rung.PARKED: Start((2.0,), cost_per_s)})
    base = Base(lab.requests(np.arange(9) * 3600.0), Setup(profile=made), spec=lab.spec())
    variants = [Variant("best-fixed", settings) for settings in ({}, {"park": 1.0}, {"park": 0.0})]
    free, parked, dark = compare(base, variants, processes=1)
    assert free.total == (parked if parks else dark).total
    assert free.total.total_cost_gpu_s < (dark if parks else parked).total.total_cost_gpu_s
    assert (free.park, parked.park, dark.park) == (parks, True, False)
    label = "best-fixed (keep_alive_s=0)" if parks else "best-fixed (keep_alive_s=0, park=0)"
    assert variants[0].label_of(free) == label
    assert variants[2].label_of(dark) == "best-fixed (park=0, keep_alive_s=0)"
    # Where nothing can be parked, it is not tried.
    plain = replace(base, setup=Setup(profile=made.two_states(30.0)))
    assert len(fixed(variants[0], base)) == 2 * len(fixed(variants[1], base)) == 2 * len(KEEP_ALIVES_S)
    assert len(fixed(variants[0], plain)) == len(KEEP_ALIVES_S)


@pytest.mark.parametrize("policy", ["keep-alive", "reactive"])
def test_a_keep_alive_that_is_set_goes_before_the_idle_time_of_a_model(policy: str) -> None:
    """The models' own `idle_s` would go before it, and each row of a sweep would be the same."""
    rows = lab.requests([0.0, 200.0, 400.0])
    own = Base(rows, Setup(profile=lab.profile()), spec=lab.spec(policy=policy, params={"idle_s": 30.0}))
    plain = Base(rows, own.setup, spec=lab.spec(policy=policy))
    for keep_s, cold in ((10.0, 3), (1000.0, 1)):
        variant = Variant(policy, {"keep_alive_s": keep_s})
        assert simulate(own, variant).total == simulate(plain, variant).total
        assert simulate(own, variant).total.cold_starts == cold
    assert simulate(own, Variant("best-fixed")).total == simulate(plain, Variant("best-fixed")).total
    # What nothing is set beside stays.
    assert simulate(own, Variant(policy)).params == {"idle_s": 30.0}


def test_a_dense_poisson_stream_on_fixed_replicas_waits_as_erlang_says() -> None:
    # The whole way, cluster and loop: four replicas that are always there.
    times = lab.poisson(3.0, 30_000)
    work = np.random.default_rng(9).exponential(1.0, len(times))
    rows = [lab.Row(float(t) + 100.0, "m", exec_s=float(w)) for t, w in zip(times, work, strict=True)]
    report = lab.run(
        rows,
        lab.profile(1e-3),
        {"measure_from_s": 100.0},
        policy="fixed",
        params={"replicas": 4.0},
        max_replicas=4,
        min_replicas=4,
    )
    assert report.total.wait_mean_s == pytest.approx(lab.waits(4, 3.0) / 1.0, rel=0.12)
    hours = report.until_s - report.measured_from_s
    assert report.total.gpu_s == pytest.approx(4 * hours, rel=1e-6)


def test_tokens_become_work_through_the_engines_rates() -> None:
    engine = Engine(concurrency=2, prefill_tokens_per_s=1000.0, decode_s=0.05, decode_per_request_s=0.01)
    assert engine.work_s(500, 20, 0.0) == pytest.approx(0.5 + 1.0)
    assert engine.work_s(0, 0, 0.0) == pytest.approx(0.512 + 128 * 0.05)
    assert engine.work_s(500, 20, 7.0) == 7.0
    assert list(engine.slowdowns()) == pytest.approx([1.0, 1.0, 1.2])
    assert list(Engine(concurrency=4, slowdown=(1.0, 1.1)).slowdowns()) == pytest.approx(
        [1.0, 1.0, 1.1, 1.65, 2.2]
    )


@pytest.mark.parametrize(("more_s", "takes_s"), [(0.01, 6.0), (0.0, 5.0)])
def test_what_a_trace_says_of_work_is_of_a_request_alone(more_s: float, takes_s: float) -> None:
    made = lab.profile(engine=Engine(concurrency=2, decode_s=0.05, decode_per_request_s=more_s))
    report = lab.run(lab.requests([10.0, 10.0], 5.0), made, target_ongoing_requests=2.0)
    assert report.total.busy_gpu_s == pytest.approx(takes_s)
