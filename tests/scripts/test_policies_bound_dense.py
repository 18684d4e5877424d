"""The bound of dense traffic, on traffic of which it is known what it takes."""

from __future__ import annotations

import numpy as np
import pytest
from bench.policies_bound_dense import held, known_before, late, least, windows

from autoscaling.traces import Row

RANDOM = np.random.default_rng(5)
WINDOW_S = 600.0
DAY = 144
LEARN, SCORED = slice(12, 7 * DAY), slice(7 * DAY, 9 * DAY)


def test_windows_without_requests_are_there_too() -> None:
    counts, window_s = windows([Row(0.0, "m", 5, 600.0), Row(1800.0, "m", 7, 600.0)])
    assert window_s == 600
    assert counts.tolist() == [5, 1, 1, 7]


@pytest.mark.parametrize("ahead", [1, 3])
def test_nothing_is_known_of_the_window_itself_or_what_follows(ahead: int) -> None:
    counts = RANDOM.uniform(10, 1000, 3 * DAY)
    changed = counts.copy()
    changed[200:] *= 2
    before, after = known_before(counts, WINDOW_S, ahead), known_before(changed, WINDOW_S, ahead)
    np.testing.assert_array_equal(before[: 200 + ahead], after[: 200 + ahead])
    assert (before[200 + ahead, :-2] != after[200 + ahead, :-2]).any()


def test_who_waits_longer_than_the_slo_is_late() -> None:
    """A tenth too little: each second a tenth of a second's work is left, so that after 20 s one waits 2 s."""
    counts = np.asarray([1100.0])
    assert late(counts, np.asarray([1000.0]), 600.0, 300.0) == pytest.approx((300 - 20) / 600)
    assert late(counts, np.asarray([1100.0]), 600.0, 300.0) == 0
    # A start of 10 s is over before anyone waits so long.
    assert late(counts, np.asarray([1000.0]), 600.0, 10.0) == 0


def test_what_starts_is_paid_for() -> None:
    """Four replicas needed, six held at first; then five, of which three are there: two more start meanwhile."""
    capacity, come = np.asarray([6.0, 3.0]), np.asarray([4.0, 5.0])
    assert held(capacity, come, 600.0, 60.0) == pytest.approx((60 * 6 + 540 * 4 + 60 * 5 + 540 * 5) / 1200)


@pytest.mark.parametrize(("cold_s", "free_s"), [(300.0, 300.0), (450.0, 150.0), (600.0, 0.0)])
def test_who_goes_for_less_than_a_start_saves_nothing(cold_s: float, free_s: float) -> None:
    """Five at first in each window, then one: five are held all the time, but for after the last window's start."""
    found = held(np.full(10, 5.0), np.full(10, 1.0), 600.0, cold_s)
    assert found == pytest.approx(5.0 - free_s * 4.0 / 6000)


def test_replicas_are_whole() -> None:
    """Two and a half of them take three."""
    assert least(np.full(9 * DAY, 500.0), WINDOW_S, 300.0, LEARN, SCORED, 200.0) == pytest.approx(1.2)


def test_what_never_changes_takes_no_more_than_the_work() -> None:
    assert least(np.full(9 * DAY, 500.0), WINDOW_S, 300.0, LEARN, SCORED, 1.0) == pytest.approx(1.0, abs=0.02)


def test_what_nobody_can_foretell_takes_a_margin() -> None:
    """Each window is by itself: for 99 % of the requests about the highest there are must be held for half of it."""
    counts = 500 * np.exp(RANDOM.normal(0, 0.3, 9 * DAY))
    before, cheated = (least(counts, WINDOW_S, 300.0, learn, SCORED, 1.0) for learn in (LEARN, SCORED))
    assert before > 1.25
    assert cheated < before


def test_what_comes_every_day_is_learned() -> None:
    day = 500 * np.exp(RANDOM.normal(0, 0.3, DAY))
    found = least(np.tile(day, 9), WINDOW_S, 300.0, LEARN, SCORED, 1.0)
    known = held(np.tile(day, 2), np.tile(day, 2), WINDOW_S, 300.0) / day.mean()
    assert found < 1.05 * known
