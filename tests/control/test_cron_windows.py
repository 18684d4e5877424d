"""Cron schedules as spans of time: in force exactly when the wall clock says so."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autoscaling.live import cron
from autoscaling.live.cron import Cron

DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
ZONES = ("Europe/Berlin", "America/New_York", "UTC", "Australia/Lord_Howe", "Asia/Kolkata")
CHANGES = (
    datetime(2026, 3, 8, 7, tzinfo=UTC),  # New York, forward
    datetime(2026, 3, 29, 1, tzinfo=UTC),  # Berlin, forward
    datetime(2026, 4, 4, 15, tzinfo=UTC),  # Lord Howe, back by half an hour
    datetime(2026, 10, 25, 1, tzinfo=UTC),  # Berlin, back
    datetime(2026, 11, 1, 6, tzinfo=UTC),  # New York, back
    datetime(2026, 12, 31, 23, tzinfo=UTC),
)


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def wall_clock_says(  # noqa: PLR0917 - those of a schedule
    minute: int, hour: int, days: frozenset[int], duration_s: float, zone: str, time_s: float
) -> bool:
    """Straight from what a schedule means, without cron and without spans. Sunday is 0."""
    wall = datetime.fromtimestamp(time_s, ZoneInfo(zone)).replace(tzinfo=None)
    for back in range(9):
        day = wall.date() - timedelta(days=back)
        start = datetime(day.year, day.month, day.day, hour, minute)
        if day.isoweekday() % 7 in days and start <= wall < start + timedelta(seconds=duration_s):
            return True
    return False


@pytest.mark.parametrize(
    ("expression", "longest_gap_s"),
    [
        ("* * * * *", 60),
        ("*/7 * * * *", 7 * 60),
        ("0 9 * * *", 86400),
        ("0 9,17 * * *", 16 * 3600),
        ("0 9 * * MON-FRI", 3 * 86400),
        ("30 8-18 * * MON", 7 * 86400 - 10 * 3600),
        ("0 0 1 * *", 31 * 86400),
        ("0 0 1 JAN *", 366 * 86400),
    ],
)
def test_a_schedule_is_always_in_force_if_no_gap_is_longer_than_it_lasts(
    expression: str, longest_gap_s: int
) -> None:
    assert cron.always(Cron(expression, float(longest_gap_s)))
    assert not cron.always(Cron(expression, longest_gap_s - 1.0))


def test_what_comes_only_in_leap_years_is_not_always_in_force() -> None:
    assert not cron.always(Cron("0 0 29 2 *", cron.MAX_DURATION_S))


@settings(max_examples=400)
@given(
    zone=st.sampled_from(ZONES),
    change=st.sampled_from(CHANGES),
    offset_s=st.integers(-60 * 3600, 60 * 3600),
    hour=st.integers(0, 23),
    minute=st.sampled_from((0, 15, 30, 45, 59)),
    days=st.frozensets(st.integers(0, 6), min_size=1),
    duration_s=st.one_of(st.sampled_from((60, 1800, 3600, 8 * 3600, 86400)), st.integers(1, 3 * 86400)),
    ahead_s=st.integers(1, 86400),
)
@example("Europe/Berlin", CHANGES[1], -1, 2, 15, frozenset({0}), 1800, 60)
@example("Europe/Berlin", CHANGES[1], 0, 2, 30, frozenset({0}), 3600, 60)
@example("Europe/Berlin", CHANGES[3], 900, 2, 15, frozenset({0}), 1800, 60)
@example("America/New_York", CHANGES[4], 1800, 1, 15, frozenset({0}), 1800, 60)
def test_a_window_is_in_force_exactly_when_the_wall_clock_says_so(  # noqa: PLR0917
    zone: str,
    change: datetime,
    offset_s: int,
    hour: int,
    minute: int,
    days: frozenset[int],
    duration_s: int,
    ahead_s: int,
) -> None:
    time_s = change.timestamp() + offset_s
    expression = f"{minute} {hour} * * {','.join(DAYS[day] for day in sorted(days))}"
    found = cron.spans(Cron(expression, float(duration_s), zone), time_s, time_s + ahead_s)
    in_force = any(start <= time_s < end for start, end in found)
    assert in_force == wall_clock_says(minute, hour, days, duration_s, zone, time_s)
    assert all(start < end for start, end in found)
    assert all(before[1] < after[0] for before, after in pairwise(found))
    for start, end in found:
        if end - start > 14 * 86400:
            continue  # it goes on and on, and is cut somewhere
        assert wall_clock_says(minute, hour, days, duration_s, zone, start)
        assert not wall_clock_says(minute, hour, days, duration_s, zone, start - 1)
        assert wall_clock_says(minute, hour, days, duration_s, zone, end - 1)
        assert not wall_clock_says(minute, hour, days, duration_s, zone, end)


def test_a_night_over_midnight_has_its_hours() -> None:
    """22:00 for eight hours ends at 06:00, also in the nights in which the clock changes."""
    night = Cron("0 22 * * *", 8 * 3600, "Europe/Berlin")
    for day, hours in (("2026-03-28", 7), ("2026-03-27", 8), ("2026-10-24", 9)):
        start_s = at(f"{day}T22:00", "Europe/Berlin")
        [(start, end)] = cron.spans(night, start_s, start_s + 1)
        assert start == start_s
        assert end - start == hours * 3600


def test_what_lies_in_the_hour_that_is_skipped_is_left_out() -> None:
    inside = Cron("10 2 * * *", 2400, "Europe/Berlin")
    day_s = at("2026-03-29", "Europe/Berlin")
    assert cron.spans(inside, day_s, day_s + 86400 - 3600) == ()
    across = Cron("30 2 * * *", 3600, "Europe/Berlin")
    [(start, end)] = cron.spans(across, day_s, day_s + 80000)
    assert (start, end) == (at("2026-03-29T03:00", "Europe/Berlin"), at("2026-03-29T03:30", "Europe/Berlin"))


def test_what_lies_in_the_hour_that_comes_twice_comes_twice() -> None:
    twice = Cron("15 2 * * *", 1800, "Europe/Berlin")
    day_s = at("2026-10-25", "Europe/Berlin")
    first_s = at("2026-10-25T00:15")
    assert cron.spans(twice, day_s, day_s + 80000) == (
        (first_s, first_s + 1800),
        (first_s + 3600, first_s + 5400),
    )


def test_times_that_overlap_are_one_span() -> None:
    always = Cron("* * * * *", 3600)
    now_s = at("2026-11-24T06:00")
    [(start, end)] = cron.spans(always, now_s, now_s + 600)
    assert start < now_s - 3600
    assert end > now_s + 600
    assert len(cron.upcoming(always, now_s, 3)) == 1


def test_a_schedule_that_is_always_in_force_for_a_year_is_no_work() -> None:
    """However long each time lasts, only so many starts are looked at."""
    long = Cron("*/1 * * * *", cron.MAX_DURATION_S)
    now_s = at("2026-11-24T06:00")
    [(start, end)] = cron.spans(long, now_s, now_s + 86400)
    assert start < now_s < now_s + 86400 < end


def test_a_year_long_span_that_began_long_ago_is_seen() -> None:
    year = Cron("0 0 1 1 *", 300 * 86400.0, "Europe/Berlin")
    now_s = at("2026-10-01")
    [(start, _)] = cron.spans(year, now_s, now_s + 60)
    assert start == at("2026-01-01", "Europe/Berlin")


def test_upcoming_begins_with_the_one_in_force() -> None:
    office = Cron("0 9 * * MON-FRI", 8 * 3600, "Europe/Berlin")
    now_s = at("2026-11-24T12:00", "Europe/Berlin")
    starts = [start for start, _ in cron.upcoming(office, now_s, 3)]
    assert starts == [at(f"2026-11-{day}T09:00", "Europe/Berlin") for day in (24, 25, 26)]
    leap = Cron("0 0 29 2 *", 60)
    assert cron.upcoming(leap, now_s, 1)[0][0] == at("2028-02-29")


@pytest.mark.parametrize(
    ("expression", "word"),
    [
        ("0 25 * * *", "hour"),
        ("0 9 * *", "five fields"),
        ("0 0 9 * * *", "five fields"),
        ("0 0 30 2 *", "day"),
        ("0 9 * * FUNDAY", "day-of-week"),
        ("", "five fields"),
    ],
)
def test_a_wrong_expression_says_what_is_wrong(expression: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        cron.check_expression(expression)


@pytest.mark.parametrize("name", ["Europe/Bielefeld", "", "../etc/passwd", "CET-1CEST", "/etc/localtime"])
def test_a_wrong_time_zone_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no time zone"):
        cron.check_timezone(name)


def test_of_a_schedule_that_is_asked_for_all_year_no_hour_is_kept_that_is_over() -> None:
    """Each knows the spans of two days, which is tens of kilobytes where they are short."""
    often = Cron("*/5 * * * *", 60.0)
    begin_s = at("2026-03-01 00:00")
    for hour in range(48):
        now_s = begin_s + 3600 * hour
        found = cron.spans(often, now_s, now_s + 86400)
        assert cron.spans(often, now_s, now_s + 86400) == found
        assert (len(found), found[0][0]) == (288, now_s)
    assert cron._spans_of(often).cache_info().currsize <= 2  # type: ignore[attr-defined]


def test_a_schedule_in_nothing_but_hours_that_are_skipped_is_never_in_force() -> None:
    skipped = Cron("30 2 * 3 SUN#2", 600.0, "America/New_York")
    assert cron.upcoming(skipped, 1.8e9, 2) == cron.spans(skipped, 1.8e9, 1.8e9 + 400 * 86400) == ()


def test_a_schedule_that_is_too_short_for_a_clock_ends_all_the_same() -> None:
    blink = Cron("0 9 * * *", 1e-7, "Europe/Berlin")
    found = cron.upcoming(blink, 1.8e9, 2)
    assert found == cron.spans(blink, 1.8e9, 1.8e9 + 2 * 86400)
    assert [0 < end - start < 0.01 for start, end in found] == [True, True]
