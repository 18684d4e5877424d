"""The same replay always gives the same: by seed, in pieces, over processes; and learns before it measures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from autoscaling.core.types import Decision, Rung
from autoscaling.sim import replay as replaying
from autoscaling.sim.arrivals import pieces
from autoscaling.sim.cluster import VirtualModel
from autoscaling.sim.compare import Base, Variant, compare
from autoscaling.sim.events import ARRIVED
from autoscaling.sim.profile import Engine, Profile, Start
from autoscaling.sim.replay import Replay, Setup, replay
from autoscaling.sim.report import Report
from autoscaling.traces import Row
from tests.sim import lab

DAY_S = 86400.0
VARYING = {Rung.TEMPLATE: Start((10.0, 30.0, 50.0))}


def windows(minutes: int = 600, models: int = 3, cv: float = 1.0) -> list[Row]:
    random = np.random.default_rng(8)
    return [
        Row(60.0 * minute, f"m{model}", int(count), 60.0, cv=cv)
        for minute in range(minutes)
        for model, count in enumerate(random.poisson(0.2, models))
        if count
    ]


def said(report: Report) -> dict[str, Any]:
    plain = report.to_plain()
    del plain["took_s"]
    return plain


def played(rows: list[Row], seed: int = 0, policy: str = "keep-alive", **setup: Any) -> dict[str, Any]:
    made = lab.profile(starts=VARYING, start_failures=0.1)
    return said(replay(rows, lambda m: lab.spec(m, policy=policy), Setup(made, seed=seed, **setup)))


@pytest.mark.parametrize("cv", [1.0, 3.0])
def test_a_seed_says_all_that_is_left_to_chance(cv: float) -> None:
    rows = windows(cv=cv)
    assert played(rows, seed=5) == played(rows, seed=5)
    assert played(rows, seed=5)["total"] != played(rows, seed=6)["total"]


@pytest.mark.parametrize("policy", ["keep-alive", "predictive"])
def test_looking_on_changes_nothing(policy: str) -> None:
    """At moments that are no ticks: what happened right before one is still decided upon."""
    rows = windows()
    seen = played(rows, policy=policy, sample_s=7.3, measure_from_s=3600.5)
    alone = played(rows, policy=policy, measure_from_s=3600.5)
    for name, value in alone["total"].items():
        assert seen["total"][name] == pytest.approx(value), name


@pytest.mark.parametrize("policy", ["keep-alive", "reactive", "kpa", "hybrid-histogram", "predictive"])
@pytest.mark.parametrize("setup", [{}, {"sample_s": 7.3, "measure_from_s": 900.5}])
@pytest.mark.parametrize("kept", [True, False])
def test_ticks_that_are_ridden_over_would_have_done_nothing(
    policy: str, setup: dict[str, Any], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last digit, whether the loop looks at each tick or only where what it decided does not stand.

    Where decisions are kept, what is said of silences is too; else the ride goes over short ones.
    """
    random = np.random.default_rng(3)
    rows = [
        Row(burst + float(at), f"m{i % 3}", exec_s=float(random.exponential(4)))
        for i, burst in enumerate(np.cumsum(random.exponential(90, 40)).tolist())
        for at in np.cumsum(random.exponential(0.4, 60))
    ]
    rows.sort()
    ridden: list[float] = []
    riding = VirtualModel.ride

    def counted(model: VirtualModel, *given: Any) -> Any:
        ticks = riding(model, *given)
        ridden.extend(ticks)
        return ticks

    def run() -> tuple[dict[str, Any], list[Decision], Any]:
        made = lab.profile(starts=VARYING, engine=Engine(concurrency=8), start_failures=0.1)
        found = Replay(
            rows,
            lambda m: lab.spec(m, policy=policy, max_replicas=4, target_ongoing_requests=3.0),
            Setup(made, keep_decisions=kept, **setup),
        )
        report = found.run()
        return said(report), found.decisions, report.timeline

    monkeypatch.setattr(VirtualModel, "ride", counted)
    fast = run()
    assert len(ridden) > 20 or policy == "kpa"
    monkeypatch.setattr(VirtualModel, "ride", lambda model, *_: np.zeros(0))
    assert run() == fast


@pytest.mark.parametrize("kept", [True, False])
def test_a_forecast_of_demand_is_ridden_over_as_long_as_it_holds(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last digit, where demand comes and goes between one replica and several: with silences, prewarms that are
    met and given up, and decisions of no request in progress that leave several replicas lit."""
    random = np.random.default_rng(7)
    rows = [
        Row(float(minute * 60 + at), model, exec_s=float(random.exponential(9)))
        for minute in range(100)
        for model, mean in (("wave", 20 + 19 * np.sin(minute / 6)), ("steps", 4 + 40 * (minute % 25 > 18)))
        for at in random.uniform(0, 60, random.poisson(mean))
    ]
    rows.sort()
    foreseen: list[float] = []
    riding = VirtualModel.ride

    def counted(model: VirtualModel, now_s: float, *given: Any) -> Any:
        ticks = riding(model, now_s, *given)
        if math.isfinite(found[0]._forecasts.demand_until_s(model.name)):
            foreseen.extend(ticks)
        return ticks

    def run() -> tuple[dict[str, Any], list[Decision]]:
        made = lab.profile(starts=VARYING, engine=Engine(concurrency=4))
        found[:] = [
            Replay(
                rows,
                lambda m: lab.spec(m, policy="predictive", max_replicas=9, target_ongoing_requests=3.0),
                Setup(made, keep_decisions=kept),
            )
        ]
        return said(found[0].run()), found[0].decisions

    found: list[Replay] = []
    monkeypatch.setattr(VirtualModel, "ride", counted)
    fast = run()
    assert len(foreseen) > 500
    assert fast[0]["total"]["prewarms"] > fast[0]["total"]["prewarm_hits"] > 5
    monkeypatch.setattr(VirtualModel, "ride", lambda model, *_: np.zeros(0))
    assert run() == fast


@pytest.mark.parametrize("policy", ["keep-alive", "reactive"])
@pytest.mark.parametrize("setup", [{}, {"sample_s": 7.3, "measure_from_s": 900.5, "apply_s": 0.4}])
def test_silences_that_are_ridden_over_would_have_done_nothing(
    policy: str, setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those about as long as idle time, to the second and to its parts; between bursts and requests alone."""
    random = np.random.default_rng(5)
    gaps_s = np.concatenate(
        [random.exponential(45, 300), random.integers(58, 66, 100), random.uniform(59, 63, 200)]
    )
    random.shuffle(gaps_s)
    rows = [
        Row(float(at), "m", exec_s=float(random.choice([0.25, 1.0, 3.0, random.exponential(5)])))
        for at in np.cumsum(gaps_s)
        for _ in range(7 if random.random() < 0.04 else 1)
    ]
    within = 0
    riding = VirtualModel.ride

    def counted(model: VirtualModel, *given: Any) -> Any:
        nonlocal within
        came = int(model.queue.n[ARRIVED])
        ticks = riding(model, *given)
        within += int(model.queue.n[ARRIVED]) - came
        return ticks

    def run() -> dict[str, Any]:
        options = dict(setup)
        made = lab.profile(starts=VARYING, engine=Engine(concurrency=4), apply_s=options.pop("apply_s", 0.0))
        found = Replay(
            rows,
            lambda m: lab.spec(m, policy=policy, max_replicas=3, target_ongoing_requests=4.0),
            Setup(made, **options),
        ).run()
        return {**said(found), "timeline": found.timeline}

    monkeypatch.setattr(VirtualModel, "ride", counted)
    fast = run()
    # A ride ends where somebody looks.
    assert within > (10 if "sample_s" in setup else len(rows) / 3)
    monkeypatch.setattr(VirtualModel, "ride", lambda model, *_: np.zeros(0))
    assert run() == fast


def test_a_tick_in_whole_seconds_may_be_a_whole_number() -> None:
    """As the fleet file has it."""
    for policy in ("keep-alive", "predictive"):
        assert played(windows(100), policy=policy, tick_s=2) == played(
            windows(100), policy=policy, tick_s=2.0
        )


def test_what_a_model_gets_does_not_depend_on_the_others() -> None:
    rows = windows()
    alone = played([row for row in rows if row.model == "m1"])
    together = played(rows)
    mine = next(each for each in together["models"] if each["model"] == "m1")
    for name in ("requests", "cold_starts", "failed_starts", "waited_s"):
        assert alone["total"][name] == pytest.approx(mine[name]), name


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_pieces_change_nothing(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = windows(300, cv=2.0)
    whole = played(rows, scale=scale)
    monkeypatch.setattr(replaying, "PIECE", 17)
    assert played(rows, scale=scale) == whole


def test_a_piece_is_read_no_further_than_it_is_asked_for() -> None:
    read = 0

    def rows() -> Iterator[Row]:
        nonlocal read
        for row in windows(2000):
            read += 1
            yield row

    found = pieces(rows(), lambda *_: 1.0, most=50)
    next(found)
    assert read < 60
    next(found)
    assert read < 120


def test_one_process_or_two_give_the_same() -> None:
    base = Base(windows(200), Setup(profile=lab.profile()), spec=lab.spec())
    variants = [Variant("keep-alive", {"keep_alive_s": 30.0}), Variant("predictive"), Variant("best-fixed")]
    alone = [said(report) for report in compare(base, variants, processes=1)]
    shared = [said(report) for report in compare(base, variants, processes=2)]
    assert alone == shared


@pytest.mark.parametrize("from_s", [0.0, 3600.0, 7250.5])
def test_only_what_comes_from_then_on_is_measured(from_s: float) -> None:
    # A request every 10 minutes, 5 s each, nothing kept: each is a cold start of 30 s. The first is at 0.
    rows = lab.requests(np.arange(30) * 600.0)
    report = lab.run(rows, None, {"measure_from_s": from_s}, keep_alive_s=0.0)
    count = int((np.arange(30) * 600.0 >= from_s).sum())
    total = report.total
    assert (total.requests, total.cold_starts, total.starts) == (count,) * 3
    assert total.waited_s == pytest.approx(30.0 * count)
    assert total.starting_gpu_s == pytest.approx(30.0 * count)
    assert total.busy_gpu_s == pytest.approx(5.0 * count)


def test_a_start_that_is_under_way_counts_from_when_it_is_measured() -> None:
    report = lab.run(lab.requests([0.0, 600.0]), None, {"measure_from_s": 610.0}, keep_alive_s=0.0)
    assert report.total.requests == 0
    assert report.total.starting_gpu_s == pytest.approx(20.0)
    assert report.total.busy_gpu_s == pytest.approx(5.0)


def test_what_is_learned_before_counts() -> None:
    # Like clockwork: known for a day, the next day is met by prewarms.
    rows = lab.requests(np.arange(96) * 1800.0)
    found = {
        from_s: lab.run(rows, None, {"measure_from_s": from_s}, policy="predictive").total
        for from_s in (0.0, 86400.0)
    }
    assert found[86400.0].requests == 48
    assert found[0.0].cold_starts > 0
    assert found[86400.0].cold_starts == 0
    # The first one was begun before.
    assert found[86400.0].prewarm_hits == found[86400.0].prewarms == 47


def test_nothing_to_replay_is_a_report_of_nothing() -> None:
    report = replay([], {"m": lab.spec()}, Setup(lab.profile()))
    assert report.total.requests == 0
    assert report.total.gpu_s == 0.0
    assert replay([], lab.spec, Setup(lab.profile())).models == ()


def test_models_that_are_never_asked_may_cost_all_the_same() -> None:
    specs = {"a": lab.spec("a"), "b": replace(lab.spec("b"), min_replicas=1, policy="fixed")}
    report = replay(lab.requests([10.0, 1000.0], model="a"), specs, Setup(lab.profile()))
    figures = {each.model: each.figures for each in report.models}
    assert figures["b"].gpu_s == pytest.approx(report.until_s - report.measured_from_s, rel=1e-6)
    assert figures["b"].requests == 0


def test_a_request_that_nothing_will_answer_ends_the_replay_and_is_told() -> None:
    report = lab.run(lab.requests([10.0, 20.0]), lab.profile(deadline_s=1e12), max_replicas=0)
    assert report.total.requests == 2
    assert report.until_s - report.measured_from_s < 3600
    assert any("never answered" in note for note in report.notes)
    # It has waited all the same: to answer nobody must not be the cheapest.
    assert report.total.rejected == 0
    assert report.total.waited_s == report.total.cold_waited_s == 2 * DAY_S
    assert (report.total.slo_attainment, report.total.wait_max_s) == (0.0, DAY_S)
    # With a deadline it is turned away.
    report = lab.run(lab.requests([10.0, 20.0]), lab.profile(deadline_s=600.0), max_replicas=0)
    assert report.total.rejected == 2
    assert not report.notes


@pytest.mark.parametrize("days", [0.9, 1.1, 3.5, 400.0])
def test_a_request_in_progress_is_charged_to_its_end_however_far_that_is(days: float) -> None:
    for policy in ("keep-alive", "predictive"):
        report = lab.run(lab.requests([10.0], exec_s=days * DAY_S), policy=policy)
        assert report.total.busy_gpu_s == pytest.approx(days * DAY_S, rel=1e-6)
        assert not report.notes
    # Who waits for its turn behind it has it then.
    report = lab.run(lab.requests([10.0, 20.0], exec_s=days * DAY_S))
    assert report.total.busy_gpu_s == pytest.approx(2 * days * DAY_S, rel=1e-6)
    assert not report.notes


def test_work_without_an_end_ends_the_replay_and_is_told() -> None:
    report = lab.run(lab.requests([10.0], exec_s=math.inf))
    assert report.until_s - report.measured_from_s < 3600
    assert report.notes == ("requests were still in progress at the end: m",)


@pytest.mark.parametrize(
    ("every_days", "days", "learned_days", "cold"), [(1, 17, 7, 2), (7, 70, 28, 1)], ids=["daily", "weekly"]
)
def test_a_regular_job_is_awaited(every_days: int, days: int, learned_days: int, cold: int) -> None:
    """To the second, beside other models that come by chance: it is lit before it comes, and dark for the rest.

    Its moment lies on the edge of every bucket that history is kept in.
    """
    random, day_s = np.random.default_rng(1), 86400.0
    when = range(0, days, every_days)
    rows = [Row(day_s * day + 32400 + random.uniform(-2.5, 2.5), "job", exec_s=2.0) for day in when]
    for number in range(1, 5):
        gaps_s = number * random.exponential(3600.0, 4000) * np.where(random.random(4000) < 0.7, 1, 0.02)
        rows += [Row(float(at), f"other-{number}", exec_s=2.0) for at in gaps_s.cumsum() if at < days * day_s]
    rows.sort(key=lambda row: row.time_s)
    profile = Profile(engine=Engine(concurrency=1)).two_states(30.0)
    report = replay(
        rows,
        lambda model: lab.spec(model, policy="predictive", wait_cost=10.0),
        Setup(profile, measure_from_s=learned_days * day_s),
    )
    figures = next(each.figures for each in report.models if each.model == "job")
    assert figures.requests == len([day for day in when if day >= learned_days])
    assert figures.cold_starts <= cold
    assert figures.gpu_s < figures.requests * 60


def test_who_is_never_answered_has_waited_until_the_end() -> None:
    """From when it is measured only, and beside such as were answered and turned away."""
    rows = [
        *lab.requests([0.0, 10.0, 3600.0]),
        lab.Row(7200.0, "end", exec_s=5.0),
        lab.Row(3 * DAY_S, "end", exec_s=5.0),
    ]
    made = lab.profile(deadline_s=math.inf)
    specs = {"m": lab.spec(max_replicas=0), "end": lab.spec("end")}
    report = replay(rows, specs, Setup(made, measure_from_s=5.0))
    figures = {each.model: each.figures for each in report.models}
    lasts_s = report.until_s - report.measured_from_s + 5.0
    assert figures["m"].waited_s == pytest.approx(2 * lasts_s - 10.0 - 3600.0)
    assert figures["end"].waited_s == pytest.approx(2 * lab.START_S)


@pytest.mark.parametrize("policy", ["keep-alive", "predictive"])
def test_a_start_that_takes_years_keeps_no_replay_alive(policy: str) -> None:
    """Though a deadline is still to pass, and the policy's own timers are always due within a day."""
    made = Profile(starts={Rung.TEMPLATE: Start((1e11,))}, deadline_s=1e12)
    rows = [*lab.requests(np.arange(24) * 3600.0)]
    report = replay(rows, lambda model: lab.spec(model, policy=policy), Setup(made))
    assert report.until_s - report.measured_from_s < 3 * DAY_S
    assert report.total.waited_s >= 24 * DAY_S
    assert any("no start was to end within a day" in note for note in report.notes)


def test_a_replica_that_fits_nowhere_is_told() -> None:
    specs = {name: lab.spec(name, gpus_per_replica=gpus) for name, gpus in (("large", 2.0), ("small", 1.0))}
    rows = [*lab.requests([0.0], model="small"), *lab.requests([9.0], model="large")]
    report = replay(rows, specs, Setup(lab.profile(gpus=1.0, deadline_s=60.0)))
    assert report.notes == ("no replica fits into 1 GPUs: large takes 2",)
    assert report.total.rejected == 1


def test_looks_at_forecasts_keep_no_replay_alive() -> None:
    """A request that nothing will ever answer is given up, though dark models beside it are looked at for ever."""
    rows = [
        Row(float(at_s + 8 * 3600 * number), f"m{number}", exec_s=2.0)
        for number in range(6)
        for at_s in np.random.default_rng(number).exponential(3600.0, 12).cumsum()
    ]
    rows = sorted([*rows, Row(2 * 86400.0, "large", exec_s=2.0)], key=lambda row: row.time_s)
    profile = replace(Profile(engine=Engine(concurrency=1)).two_states(30.0), gpus=8.0, deadline_s=math.inf)
    gpus = {row.model: 16.0 if row.model == "large" else 1.0 for row in rows}
    specs = {
        model: lab.spec(model, policy="predictive", gpus_per_replica=each) for model, each in gpus.items()
    }
    report = replay(rows, specs, Setup(profile))
    assert report.until_s - report.measured_from_s < 10 * 86400.0
    assert any("never answered" in note and "large" in note for note in report.notes)
