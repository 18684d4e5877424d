"""What boosted trees make of traffic of which it is known what can be known."""

from __future__ import annotations

import numpy as np
import pytest
from bench import policies_bound, policies_sparse
from bench.policies_bound import (
    DAY_S,
    EDGES_S,
    Foretold,
    Learn,
    Silences,
    cells,
    learned_before,
    learned_on_it,
    points,
    same_time,
    silences,
    silences_of,
)

from autoscaling.core.survival import curve_of
from autoscaling.traces import Row

RANDOM = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer trees, learned less often: what is tested is what they are given."""
    monkeypatch.setattr(policies_bound, "TREES", 60)
    monkeypatch.setattr(policies_bound, "RELEARN_S", 15 * DAY_S)
    monkeypatch.setattr(policies_bound, "SETTINGS", {**policies_bound.SETTINGS, "num_threads": 1})


SCORED_S = 15 * DAY_S


def found(*models: list[float]) -> Silences:
    return silences(
        {f"m{i}": (np.asarray(times), np.full(len(times), 5.0)) for i, times in enumerate(models)}
    )


def test_silences_are_from_the_last_answer_to_the_next_request() -> None:
    """Worked on at once; the last one goes on."""
    one = found([0.0, 3.0, 100.0])
    assert one.begin_s.tolist() == [8.0, 105.0]
    assert one.last_s.tolist() == [3.0, 100.0]
    assert one.length_s.tolist() == [92.0, 2 * DAY_S]
    assert one.over.tolist() == [True, False]


def test_nothing_is_known_of_later() -> None:
    """A silence's features are the same, whatever comes after it began."""
    times = np.sort(RANDOM.uniform(0, 10 * DAY_S, 300)).tolist()
    some, more = found(times[:200]), found(times)
    np.testing.assert_array_equal(some.known, more.known[: len(some.known)])
    few, many = cells(some), cells(more)
    same = few.begin_s < times[199]
    np.testing.assert_array_equal(few.known[same], many.known[: len(few.known)][same])
    at = np.repeat(np.arange(100), 2)
    then_s = some.begin_s[at] + np.tile([60.0, 20_000.0], 100)
    np.testing.assert_array_equal(same_time(some, at, then_s), same_time(more, at, then_s))


def judged(
    monkeypatch: pytest.MonkeyPatch, times: list[float], *learns: Learn
) -> list[dict[float, tuple[float, float]]]:
    """By wait_cost, (cold starts over fixed keep-alive's, cost over the best one's) of one model's traffic: of each way
    to learn."""
    case = policies_sparse.Case("", SCORED_S, lambda rows, _: rows, "")
    monkeypatch.setitem(policies_sparse.CASES, "one", case)
    # With no more at once than it comes, each is worked on for as long as the silences were made for.
    monkeypatch.setitem(policies_sparse._ROWS, "one", [Row(time_s, "m0", 1, exec_s=5.0) for time_s in times])
    monkeypatch.setattr(policies_sparse, "KEEP_ALIVES_S", (0.0, 30.0, 120.0, 600.0, 2400.0, 9600.0))
    monkeypatch.setattr(policies_sparse, "WAIT_COSTS", (1.0, 10.0, 100.0))
    fixed = [
        policies_sparse.Job("one", policies_sparse.TWO_STATES, variant)
        for variant in policies_sparse.variants(("keep-alive",))
    ]
    runs = [policies_sparse.plain(job, report) for job, report in policies_sparse.run(fixed, 1)]
    known, scored_s = silences_of("one")
    cut = cells(known)
    result = []
    for learn in learns:
        hazards = learn(known, cut, scored_s)
        rows = policies_sparse.judged("one", [*runs, *points("one", known, hazards)])["rows"]
        result.append({row["wait_cost"]: (row["cold_ratio"], row["cost_ratio"]) for row in rows})
    return result


def test_chance_leaves_nothing_to_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poisson traffic at one rate: nothing is cheaper than the best keep-alive, but for what was fitted of chance."""
    times = np.cumsum(RANDOM.exponential(600.0, 3300)).tolist()
    before, cheated = judged(monkeypatch, times, learned_before, learned_on_it)
    costs = [[cost for _, cost in each.values()] for each in (before, cheated)]
    assert costs[0] == pytest.approx([1.0] * 3, abs=0.05)
    assert np.mean(costs[1]) < np.mean(costs[0])


def test_a_rhythm_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of requests, 100 s apart, every half hour: the end of either silence is known to the second or so."""
    begins = np.arange(0.0, 20 * DAY_S, 1800.0)
    times = np.sort(np.concatenate([begins, begins + 100.0])) + RANDOM.uniform(0, 2, 2 * len(begins))
    (found,) = judged(monkeypatch, times.tolist(), learned_before)
    assert found[10.0][1] < 0.7
    assert found[100.0][1] < 0.5


def test_forecasts_are_of_the_silence_that_goes_on() -> None:
    """Survival falls by the hazards from the silence's age on, and not before it has begun; before the first scored one
    nothing is foretold."""
    known = found([0.0, 100.0, 1000.0])
    hazards = np.full((3, len(EDGES_S) - 1), 0.01)
    hazards[0] = np.nan
    foretold = Foretold(known, hazards)
    times = np.asarray([0.0, 100.0, 1000.0])
    foretold.coming("m0", times, np.full(3, 5.0))
    assert foretold.forecast("m0", 50.0) is None
    assert foretold.forecast("m1", 50.0) is None
    for now_s, quiet_s in ((103.0, 2.0), (105.0, 0.0), (400.0, 0.0)):
        forecast = foretold.forecast("m0", now_s)
        assert forecast is not None
        curve = curve_of(forecast, now_s)
        assert curve is not None
        assert curve.at(now_s + quiet_s + 50.0) == pytest.approx(np.exp(-0.5), rel=1e-6)


def test_the_last_day_is_not_learned_from_before_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is foretold of a day's silences does not change with what comes after it."""
    monkeypatch.setattr(policies_bound, "RELEARN_S", DAY_S)
    times = np.sort(RANDOM.uniform(0, 33 * DAY_S, 800)).tolist()
    # Both begin to learn anew at the same moments: a day apart from the beginning of what is scored.
    last = max(t for t in times if t < 32 * DAY_S)
    some, more = (
        found([t for t in times if t < 32 * DAY_S]),
        found([*(t for t in times if t < 32 * DAY_S), last + 2 * DAY_S]),
    )
    few = learned_before(some, cells(some), last + 5.0 - 2 * DAY_S)
    many = learned_before(more, cells(more), last + 5.0 - 2 * DAY_S)
    day = (some.begin_s >= last + 5.0 - 2 * DAY_S) & (some.begin_s < last + 5.0 - DAY_S)
    assert day.any()
    np.testing.assert_allclose(few[day], many[: len(few)][day])
