"""`scripts/bench fidelity`: its traffic, how the live side is counted and calibrated, and how both are compared."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from bench import calibration, fidelity, fidelity_figures, fidelity_live
from bench.calibration import Cycle, calibrated, rated
from bench.client import Timing
from bench.clusters import BenchError
from bench.fidelity_traffic import Pattern, arrivals
from bench.replica_watch import Life, Sample, held_s, life

from autoscaling.core.types import Rung, Spec
from autoscaling.sim.profile import Engine, Profile, Start, parse_profile
from autoscaling.sim.replay import Setup
from autoscaling.traces import Row
from deployments.fleet import parse_fleet
from deployments.scaling import scaling_spec

PATTERN = Pattern(600.0, keep_alive_s=20.0, margin_s=5.0, mean_gap_s=25.0, burst_requests=6, burst_gap_s=0.25)


# Traffic


@pytest.mark.parametrize("seed", range(20))
def test_traffic_leaves_no_doubt_of_whether_a_replica_is_there(seed: int) -> None:
    times = arrivals(PATTERN, seed)
    assert times == sorted(times) == arrivals(PATTERN, seed)
    assert all(not 15.0 < other - one < 30.0 for one, other in pairwise(times))
    # Dark again at the end.
    assert times[-1] < 600.0 - 20.0


def test_traffic_has_cold_starts_single_requests_and_bursts_in_both_states() -> None:
    gaps = [other - one for seed in range(20) for one, other in pairwise(arrivals(PATTERN, seed))]
    dark = sum(gap >= 30.0 for gap in gaps) / 20
    assert 5 < dark < 15
    close = sum(gap < 1.5 for gap in gaps) / 20
    assert 25 < close < 60
    assert any(3.0 < gap <= 15.0 for gap in gaps)


# The live side


def _samples(*states: tuple[float, dict[str, int]]) -> list[Sample]:
    return [Sample(at_s, held) for at_s, held in states]


LIVED = _samples(
    (0.0, {}),
    (1.0, {"STARTING": 1}),
    (3.0, {"RUNNING": 1}),
    (10.0, {"RUNNING": 1}),
    (11.0, {"STOPPING": 1}),
    (12.0, {}),
    (13.0, {}),
)


def test_replica_seconds_are_those_of_every_state_within_the_span() -> None:
    # From 0.5 to 11.5, each change halfway between two samples.
    assert held_s(LIVED, 0.0, 13.0) == pytest.approx(11.0)
    assert held_s(LIVED, 4.0, 6.0) == pytest.approx(2.0)
    assert held_s(LIVED, 12.5, 13.0) == 0.0
    assert held_s(_samples((0.0, {"RUNNING": 1, "STOPPING": 1}), (2.0, {"RUNNING": 2})), 0.0, 2.0) == 4.0


def test_a_replicas_life_is_told_by_the_samples() -> None:
    assert life(LIVED, 0.1) == Life(0.5, 10.5, 11.5)
    # It can't have begun before it was asked for.
    assert life(LIVED, 0.7).begun_s == pytest.approx(0.7)
    # A stop that fell between two samples.
    assert life([s for s in LIVED if s.at_s != 11.0], 0.1) == Life(0.5, 11.0, 11.0)
    with pytest.raises(BenchError, match="no whole life"):
        life(LIVED[:-3], 0.1)
    with pytest.raises(BenchError, match="no whole life"):
        life(LIVED, 12.5)


def test_who_is_given_a_new_engine_at_once_waited_for_the_same_start() -> None:
    assert fidelity_live.cold_starts([]) == 0
    assert fidelity_live.cold_starts([5.0, 5.1, 90.0, 5.2, 90.05]) == 2


def _timing(sent_s: float, wait_ms: int, cold: bool) -> Timing:
    headers = {
        "server-timing": f"queue;dur={wait_ms:.1f}",
        "x-relight-cold-start": "true" if cold else "false",
    }
    return Timing(sent_s, headers=headers)


def test_what_is_seen_live_has_the_simulators_names() -> None:
    live = fidelity_live.Live([], 0.0, gpu_s=30.0)
    live.timings = [_timing(0.0, 2000, True), _timing(1.0, 1010, True), _timing(9.0, 4, False)]
    found = fidelity_live.seen(live)
    assert {
        n: found[n] for n in ("requests", "cold_requests", "cold_starts", "wait_p50_s", "wait_p95_s")
    } == {
        "requests": 3,
        "cold_requests": 2,
        "cold_starts": 1,
        "wait_p50_s": 1.01,
        "wait_p95_s": 2.0,
    }
    both = fidelity_live.seen_together([found, found])
    assert (both["cold_starts"], both["gpu_s"], both["wait_p50_s"]) == (2, 60.0, 1.01)


# Calibration


def test_a_gateway_that_does_not_tell_the_wait_is_an_error() -> None:
    assert calibration.waited_s(_timing(0.0, 1234, cold=False)) == pytest.approx(1.234)
    with pytest.raises(BenchError, match=r"queue;dur=MILLISECONDS"):
        calibration.waited_s(Timing(0.0, headers={"server-timing": "engine;dur=3.0"}))


def _cycle(
    wait_s: float,
    *,
    wake_s: float = 0.3,
    overdue_s: float = 1.1,
    stop_s: float = 0.5,
    handoff_s: float = 0.006,
    batch: int = 1,
    answer_s: float = 2.0,
) -> Cycle:
    return Cycle(wake_s, wait_s, batch, answer_s, handoff_s, overdue_s, stop_s)


async def test_a_cycle_goes_from_dark_to_dark() -> None:
    class Lived:
        """A replica from 0.5 to 11.5, let go at 10.5."""

        samples = {"m": LIVED}  # noqa: RUF012 - nobody changes it

        async def dark(self, model: str) -> None:
            assert model == "m"

    answers = [_timing(0.1, 2000, cold=True), _timing(0.2, 1900, cold=True), _timing(7.0, 6, cold=False)]
    for timing, done_s in zip(answers, (4.1, 5.1, 8.0), strict=True):
        timing.done_s = done_s
    left = iter(answers)

    async def ask() -> Timing:
        return next(left)

    found = await calibration.cycle(Lived(), "m", ask, 2.0, 2)  # type: ignore[arg-type]
    assert found == Cycle(
        wake_s=pytest.approx(0.4),  # type: ignore[arg-type]
        wait_s=pytest.approx(1.95),  # type: ignore[arg-type]
        batch=2,
        answer_s=pytest.approx(2.5),  # type: ignore[arg-type]
        handoff_s=pytest.approx(0.006),  # type: ignore[arg-type]
        overdue_s=pytest.approx(0.5),  # type: ignore[arg-type]
        stop_s=pytest.approx(1.0),  # type: ignore[arg-type]
    )


def test_rates_are_as_fast_as_the_answers_that_were_measured() -> None:
    engine = Engine(4, prefill_tokens_per_s=400.0, decode_s=0.05, slowdown=(1.0, 1.1, 1.2, 1.3))
    cycles = [
        _cycle(1.8),
        _cycle(1.8, batch=3, answer_s=5.0),
        _cycle(1.8),
        _cycle(1.8, batch=3, answer_s=5.0),
    ]
    work_s = engine.work_s(40, 18, 0.0)
    assert work_s == pytest.approx(1.0)
    made = rated(engine, work_s, cycles)
    assert made.work_s(40, 18, 0.0) == pytest.approx(2.0)
    # Of three at once 2.5 times as slow as alone, and in proportion for the others.
    assert made.slowdown == pytest.approx((1.0, 1.75, 2.5, 3.25))
    # An engine of which is known only that batches slow nothing: in a straight line.
    flat = rated(replace(engine, slowdown=(1.0, 1.0, 1.0, 1.0)), work_s, cycles)
    assert flat.slowdown == pytest.approx((1.0, 1.75, 2.5, 3.25))
    # Batches that were answered sooner than single requests slow nothing.
    assert set(rated(engine, work_s, [_cycle(1.8), _cycle(1.8, batch=3, answer_s=1.0)]).slowdown) == {1.0}


def test_a_simulated_cold_request_waits_as_long_as_a_calibrated_one() -> None:
    cycles = [_cycle(1.8), _cycle(2.0, wake_s=0.5, overdue_s=1.3, stop_s=0.7), _cycle(1.9)]
    found = calibrated(Profile(), cycles, tick_s=1.0, work_s=1.0)
    (start,) = found.starts.values()
    assert found.wake_s == pytest.approx(0.3)
    assert [delay_s + found.wake_s for delay_s in start.delay_s] == pytest.approx([1.8, 2.0, 1.9])
    assert found.apply_s == pytest.approx(1.1667 - 0.5, abs=1e-3)
    assert found.stop_s == pytest.approx(0.5667, abs=1e-3)
    assert found.handoff_s == pytest.approx(0.006)
    # It can be used elsewhere, too.
    engine = Engine(4, 400.0, 0.05, slowdown=(1.0, 1.5))
    made = replace(found, engine=engine)
    assert parse_profile(json.loads(json.dumps(fidelity_figures.profile_of(made)))) == made
    # Moments are halfway between samples: nothing becomes negative for that.
    short = calibrated(Profile(), [_cycle(0.2, overdue_s=0.1)], tick_s=1.0, work_s=1.0)
    assert short.wake_s == pytest.approx(0.2)
    assert short.apply_s == 0.0


def test_the_calibration_of_a_simulated_cluster_gives_its_own_profile_back() -> None:
    """What the simulator does with a profile, calibrated as the live cluster is, gives that profile."""
    made = Profile(
        engine=Engine(service_s=1.0),
        starts={Rung.TEMPLATE: Start((2.0,))},
        wake_s=0.4,
        apply_s=0.7,
        stop_s=0.5,
    )
    spec = Spec("m", policy="keep-alive", keep_alive_s=5.0, max_replicas=1)
    reports = [
        fidelity_figures.simulated(spec, Setup(profile=made, seed=seed), [Row(100.0, "m")], 100.0, 60.0)
        for seed in range(40)
    ]
    held = [each.figures.gpu_s for each in reports]
    # Starting, answering, keeping alive, half a tick, the decision's way, stopping.
    assert sum(held) / len(held) == pytest.approx(2.0 + 1.0 + 5.0 + 0.5 + 0.7 + 0.5, abs=0.15)
    assert max(held) - min(held) <= 1.0 + 1e-6
    assert [each.figures.wait_max_s for each in reports] == [pytest.approx(2.4)] * len(reports)


# The comparison


def test_bars_are_shares_of_what_was_seen() -> None:
    live = {"cold_starts": 4, "wait_p50_s": 1.0, "wait_p95_s": 2.0, "gpu_s": 100.0}
    sim = {"cold_starts": 4, "wait_p50_s": 1.14, "wait_p95_s": 1.6, "gpu_s": 106.0}
    found = fidelity_figures.compared(live, sim)
    assert {name: of["met"] for name, of in found.items()} == {
        "cold_starts": True,
        "wait_p50_s": True,
        "wait_p95_s": False,
        "gpu_s": False,
    }
    assert found["wait_p95_s"]["off"] == pytest.approx(-0.2)
    assert fidelity_figures.compared(live, sim | {"cold_starts": 5})["cold_starts"]["met"] is False
    # Nobody waited: any waiting is wrong, and by no share that can be told.
    nobody = fidelity_figures.compared(live | {"wait_p50_s": 0.0}, sim)["wait_p50_s"]
    assert (nobody["off"], nobody["met"]) == (None, False)
    same = fidelity_figures.compared(live | {"wait_p50_s": 0.0}, sim | {"wait_p50_s": 0.0})["wait_p50_s"]
    assert (same["off"], same["met"]) == (0.0, True)


def test_the_fleet_has_a_model_for_each_run_with_one_keep_alive() -> None:
    runs = {"keep-alive-1": "keep-alive", "keep-alive-2": "keep-alive", "predictive-1": "predictive"}
    parsed = parse_fleet(fidelity.fleet(runs, 20.0, "sqlite:///x.db"))
    specs = {model.id: scaling_spec(model) for model in parsed.models}
    assert {name: (spec.policy, spec.keep_alive_s) for name, spec in specs.items()} == {
        fidelity_live.CALIBRATION: ("keep-alive", 20.0),
        "keep-alive-1": ("keep-alive", 20.0),
        "keep-alive-2": ("keep-alive", 20.0),
        "predictive-1": ("predictive", 20.0),
    }
    assert all(spec.max_replicas == 1 and spec.min_replicas == 0 for spec in specs.values())
