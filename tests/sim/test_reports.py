"""What is drawn and said of comparisons: the front, timelines, maps of cold starts, and how sure a saving is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from autoscaling.sim.compare import Base, Variant, compare, sampled
from autoscaling.sim.evidence import saving_of
from autoscaling.sim.group import Sample
from autoscaling.sim.plots import cold_grid, front, steps_of
from autoscaling.sim.prices import price_of
from autoscaling.sim.replay import Setup
from autoscaling.sim.report import Figures, ModelReport, Report
from tests.sim.lab import profile, requests, spec

HOUR_S, DAY_S = 3600.0, 86400.0


def reported(gpu_s: float = 0.0, waited_s: float = 0.0, policy: str = "keep-alive") -> Report:
    total = Figures(gpu_s=gpu_s, waited_s=waited_s)
    return Report(policy, {}, "", 0, 10.0, 60.0, 0.0, HOUR_S, total, ())


def test_the_front_is_what_nothing_beats_in_both() -> None:
    points = [(10, 5), (20, 5), (30, 1), (5, 9), (30, 2)]
    reports = [("x", reported(*point)) for point in points]
    # oracle would beat them all.
    assert front([*reports, ("oracle", reported(1, 0, "oracle"))]) == [3, 0, 2]


def test_timelines_tell_what_is_scored() -> None:
    """Replicas and requests over time add up to the totals, from the very moment where it is begun to measure."""
    times = [100 + 700 * i for i in range(40)]
    base = Base(
        requests(times, 20.0),
        Setup(profile=profile(), measure_from_s=10_050.0),
        spec=spec(),
    )
    (report,) = compare(sampled(base, 1000.0), [Variant("keep-alive")], processes=1)
    assert report.total.cold_starts == sum(time_s - times[0] >= 10_050 for time_s in times)
    assert cold_grid(report, ["m"]).sum() == report.total.cold_starts
    steps = steps_of(report)
    assert all(held >= 0 for held in steps.held)
    ends = [*steps.begins_s[1:], report.until_s]
    spans = [
        (max(begin, report.measured_from_s), end) for begin, end in zip(steps.begins_s, ends, strict=True)
    ]
    scored = [
        (end - begin, held, load)
        for (begin, end), held, load in zip(spans, steps.held, steps.load, strict=True)
        if end > begin
    ]
    assert sum(span * load for span, _, load in scored) == pytest.approx(report.total.busy_gpu_s, rel=1e-6)
    held_s = report.total.busy_gpu_s + report.total.idle_gpu_s
    assert sum(span * held for span, held, _ in scored) == pytest.approx(held_s, rel=1e-6)


@pytest.mark.parametrize("step_s", [60.0, 900.0, HOUR_S])
@pytest.mark.parametrize("exec_s", [5.0, 4000.0])
def test_a_cold_start_is_of_the_hour_in_which_its_request_comes(step_s: float, exec_s: float) -> None:
    """On the very hour it is of the one that begins, though the trace begins within one."""
    daily = (3 * HOUR_S - 0.001, 23 * HOUR_S)
    rows = requests([17.3, *(DAY_S * day + at_s for day in range(5) for at_s in daily)], exec_s)
    for from_s, expected in ((0.0, {0: 1, 2: 5, 23: 5}), (DAY_S + 23 * HOUR_S - 17, {2: 3, 23: 4})):
        base = Base(rows, Setup(profile=profile(), measure_from_s=from_s), spec=spec())
        (report,) = compare(sampled(base, step_s), [Variant("keep-alive")], processes=1)
        (hours,) = cold_grid(report, ["m"])
        assert {hour: count for hour, count in enumerate(hours.tolist()) if count} == expected


def test_a_line_of_fewer_steps_tells_the_same_in_all() -> None:
    base = Base(requests([700 * i for i in range(200)], 20.0), Setup(profile=profile()), spec=spec())
    (report,) = compare(sampled(base, 60.0), [Variant("keep-alive")], processes=1)
    sums = []
    for most in (None, 400, 7, 1):
        steps = steps_of(report, most)
        ends = [*steps.begins_s[1:], report.until_s]
        assert len(ends) <= (most or math.inf)
        spans = [end - begin for begin, end in zip(steps.begins_s, ends, strict=True)]
        sums.append(sum(span * held for span, held in zip(spans, steps.held, strict=True)))
    assert sums == pytest.approx([report.total.busy_gpu_s + report.total.idle_gpu_s] * 4)


def timeline(costs: list[float]) -> tuple[Sample, ...]:
    """Sums of GPU-seconds after each hour."""
    sums = [sum(costs[:i]) for i in range(len(costs) + 1)]
    return tuple(Sample(HOUR_S * i, 0.0, 0.0, 0, 0, gpu_s=each) for i, each in enumerate(sums))


def told(**models: list[float]) -> Report:
    found = tuple(ModelReport(name, Figures(gpu_s=sum(costs))) for name, costs in models.items())
    return replace(
        reported(), models=found, timeline={name: timeline(costs) for name, costs in models.items()}
    )


class TestHowSureASavingIs:
    def test_what_is_saved_everywhere_is_sure(self) -> None:
        ours = told(a=[8.0] * 10, b=[80.0] * 10)
        theirs = told(a=[10.0] * 10, b=[100.0] * 10)
        saving = saving_of(ours, theirs, "gpu_s", {})
        assert (saving.share, saving.low, saving.high) == pytest.approx((0.2, 0.2, 0.2))
        assert (saving.models, saving.spans) == (2, 10)

    def test_one_model_or_one_day_proves_little(self) -> None:
        even = [10.0] * 10
        one_model = saving_of(told(a=[1.0] * 10, b=[12.0] * 10), told(a=even, b=even), "gpu_s", {})
        one_day = saving_of(told(a=[0.0, *[11.0] * 9]), told(a=[60.0, *even[1:]]), "gpu_s", {})
        for saving in (one_model, one_day):
            assert saving.share > 0.3
            assert saving.low < 0

    def test_only_what_is_scored_counts(self) -> None:
        """Before, ours was dearer; sums begin anew where it is begun to measure."""
        ours, theirs = told(a=[5.0] * 4), told(a=[10.0] * 4)
        before = (Sample(-HOUR_S, 0, 0, 0, 0, gpu_s=0.0), Sample(-1.0, 0, 0, 0, 0, gpu_s=900.0))
        ours = replace(ours, timeline={"a": (*before, *ours.timeline["a"])})
        saving = saving_of(ours, theirs, "gpu_s", {})
        assert (saving.low, saving.high) == pytest.approx((0.5, 0.5))

    def test_waiting_has_its_price(self) -> None:
        def waiting(waited_s: float) -> Report:
            samples = tuple(
                Sample(HOUR_S * i, 0, 0, 0, 0, gpu_s=10.0 * i, waited_s=waited_s * i) for i in range(5)
            )
            return replace(told(a=[10.0] * 4), timeline={"a": samples})

        saving = saving_of(waiting(0.0), waiting(1.0), "total_cost_gpu_s", {"a": 30.0})
        assert saving.share == pytest.approx(30 / 40)


def test_a_price_is_that_of_the_first_type_that_has_one() -> None:
    prices = {"H100": 3.0, "L4": 0.7, "A100-40G": 1.0, "A100": 1.8}
    assert price_of(["MI300X", "L4", "H100"], prices) == 0.7
    assert price_of(["A100-40G"], prices) == 1.0
    assert price_of(["A100-80G"], prices) == 1.8
    assert price_of(["MI300X"], prices) is None
