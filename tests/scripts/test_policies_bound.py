"""What boosted trees make of traffic of which it is known what can be known."""

from __future__ import annotations

import numpy as np
import pytest
from bench.policies_bound import DAY_S, KEEP_ALIVES_S, Silences, ratios, same_time, silences

RANDOM = np.random.default_rng(3)
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
    at = np.repeat(np.arange(100), 2)
    then_s = some.begin_s[at] + np.tile([60.0, 20_000.0], 100)
    np.testing.assert_array_equal(same_time(some, at, then_s), same_time(more, at, then_s))


def test_chance_leaves_nothing_to_learn() -> None:
    """Poisson traffic at one rate: a fixed keep-alive is as good as anything, but for what was fitted of chance."""
    times = found(np.cumsum(RANDOM.exponential(600.0, 8000)).tolist())
    # Few requests come later than after 900 s.
    before, cheated = (ratios(times, SCORED_S, cheats=cheats)[:5] for cheats in (False, True))
    assert before == pytest.approx([1.0] * 5, abs=0.1)
    assert np.mean(cheated) < np.mean(before)


def test_a_rhythm_is_learned() -> None:
    """Pairs of requests, 100 s apart, every half hour: the end of either silence is known to the second or so."""
    begins = np.arange(0.0, 60 * DAY_S, 1800.0)
    times = np.sort(np.concatenate([begins, begins + 100.0])) + RANDOM.uniform(0, 2, 2 * len(begins))
    learned = dict(zip(KEEP_ALIVES_S, ratios(found(times.tolist()), SCORED_S, cheats=False), strict=True))
    assert learned[60.0] < 0.7
    assert learned[900.0] < 0.2
