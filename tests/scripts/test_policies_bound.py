"""What boosted trees make of traffic of which it is known what can be known."""

from __future__ import annotations

import numpy as np
import pytest
from bench import policies_bound
from bench.policies_bound import (
    DAY_S,
    KEEP_ALIVES_S,
    Silences,
    cells,
    cold_ratios,
    cost_ratios,
    learned_before,
    learned_on_it,
    same_time,
    silences,
)

RANDOM = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer trees, learned less often: what is tested is what they are given."""
    monkeypatch.setattr(policies_bound, "TREES", 60)
    monkeypatch.setattr(policies_bound, "RELEARN_S", 15 * DAY_S)


SCORED_S = 30 * DAY_S


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


def test_chance_leaves_nothing_to_learn() -> None:
    """Poisson traffic at one rate: a fixed keep-alive is as good as anything, but for what was fitted of chance."""
    times = found(np.cumsum(RANDOM.exponential(600.0, 8000)).tolist())
    cut = cells(times)
    before, cheated = (learn(times, cut, SCORED_S) for learn in (learned_before, learned_on_it))
    # Few requests come later than after 900 s.
    colds = [cold_ratios(times, cut, hazard, SCORED_S)[:5] for hazard in (before, cheated)]
    assert colds[0] == pytest.approx([1.0] * 5, abs=0.1)
    assert np.mean(colds[1]) < np.mean(colds[0])
    costs = [cost_ratios(times, cut, hazard, SCORED_S, 0.0) for hazard in (before, cheated)]
    # Where waiting is worth little, dark at once is the best; where much, always lit: neither needs a forecast.
    assert costs[0] == pytest.approx([1.0] * 6, abs=0.05)
    assert np.mean(costs[1]) <= np.mean(costs[0])


def test_a_rhythm_is_learned() -> None:
    """Pairs of requests, 100 s apart, every half hour: the end of either silence is known to the second or so."""
    begins = np.arange(0.0, 60 * DAY_S, 1800.0)
    times = np.sort(np.concatenate([begins, begins + 100.0])) + RANDOM.uniform(0, 2, 2 * len(begins))
    known = found(times.tolist())
    cut = cells(known)
    hazard = learned_before(known, cut, SCORED_S)
    colds = dict(zip(KEEP_ALIVES_S, cold_ratios(known, cut, hazard, SCORED_S), strict=True))
    assert colds[60.0] < 0.7
    assert colds[900.0] < 0.2
    assert cost_ratios(known, cut, hazard, SCORED_S, 0.0)[3] < 0.3


def test_what_is_worked_on_costs_the_same_under_any_policy() -> None:
    begins = np.arange(0.0, 60 * DAY_S, 1800.0)
    known = found(np.sort(np.concatenate([begins, begins + 100.0])).tolist())
    cut = cells(known)
    hazard = np.log(np.where(cut.ended > 0, 1.0, 1e-9))
    free, dear = (cost_ratios(known, cut, hazard, SCORED_S, busy_s)[3] for busy_s in (0.0, 1e12))
    assert free < 0.5
    assert dear == pytest.approx(1.0, abs=1e-3)


def test_the_last_day_is_not_learned_from_before_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of a day's silences does not change with what comes after it."""
    monkeypatch.setattr(policies_bound, "RELEARN_S", DAY_S)
    times = np.sort(RANDOM.uniform(0, 33 * DAY_S, 800)).tolist()
    some, more = found([t for t in times if t < 32 * DAY_S]), found(times)
    few, many = cells(some), cells(more)
    early = few.begin_s < 31.5 * DAY_S
    one = learned_before(some, few, 30 * DAY_S)[early]
    other = learned_before(more, many, 30 * DAY_S)[: len(early)][early]
    scored = np.isfinite(one)
    assert scored.any()
    day = some.begin_s[few.of][early] < 30.9 * DAY_S
    np.testing.assert_allclose(one[scored & day], other[scored & day])
