"""Durations and times as people write them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import TZPATH, ZoneInfo

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autoscaling.commands import times
from autoscaling.commands.times import TimeError, parse_duration, parse_since, parse_time

BERLIN = ZoneInfo("Europe/Berlin")
NOW = datetime(2026, 11, 24, 14, 30, tzinfo=BERLIN)
"""A Tuesday."""
UNITS = (("w", 604800), ("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("15m", 900),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("2D", 172800),
        ("1w2d", 777600),
        ("0.5h", 1800),
        ("1.5s", 1.5),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@given(st.dictionaries(st.sampled_from(UNITS), st.integers(0, 50), min_size=1))
def test_a_duration_is_the_sum_of_its_parts(parts: dict[tuple[str, int], int]) -> None:
    seconds = sum(count * unit_s for (_, unit_s), count in parts.items())
    assume(seconds > 0)
    text = "".join(f"{parts[unit]}{unit[0]}" for unit in UNITS if unit in parts)
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "15", "m", "-5m", "5m1h", "5m5m", "1y", "1h30", "0s", "1e3s", "9999999w", "1,5h", "nan s", "٣m"],
)
def test_what_is_no_duration_says_what_would_be(text: str) -> None:
    with pytest.raises(TimeError, match="15m"):
        parse_duration(text)


@given(st.text(alphabet="0123456789.:wdhms +-TZ", max_size=12))
def test_whatever_is_written_is_a_duration_or_one_error(text: str) -> None:
    try:
        seconds = parse_duration(text)
    except TimeError:
        return
    assert 0 < seconds <= 366 * 86400 * 10


@pytest.mark.parametrize(
    ("text", "zone"), [("0001-01-01", "Europe/Berlin"), ("9999-12-31T23:59", "America/New_York")]
)
def test_the_ends_of_the_calendar_are_no_times(text: str, zone: str) -> None:
    with pytest.raises(TimeError, match="beyond what clocks show"):
        parse_time(text, NOW.astimezone(ZoneInfo(zone)))


@pytest.mark.parametrize(
    ("text", "then"),
    [
        ("now", "2026-11-24T14:30"),
        ("18:30", "2026-11-24T18:30"),
        ("09:00", "2026-11-25T09:00"),
        ("14:30", "2026-11-25T14:30"),
        ("9:00", "2026-11-25T09:00"),
        ("today 09:00", "2026-11-24T09:00"),
        ("tomorrow 09:00", "2026-11-25T09:00"),
        ("Tomorrow  09:00:30", "2026-11-25T09:00:30"),
        ("yesterday 09:00", "2026-11-23T09:00"),
        ("mon 08:00", "2026-11-30T08:00"),
        ("tuesday 15:00", "2026-11-24T15:00"),
        ("tue 14:00", "2026-12-01T14:00"),
        ("in 15m", "2026-11-24T14:45"),
        ("1h30m ago", "2026-11-24T13:00"),
        ("2026-12-24T18:00", "2026-12-24T18:00"),
        ("2026-12-24 18:00:01", "2026-12-24T18:00:01"),
        ("2026-12-24", "2026-12-24T00:00"),
    ],
)
def test_times_on_the_local_clock(text: str, then: str) -> None:
    assert datetime.fromtimestamp(parse_time(text, NOW), BERLIN).replace(
        tzinfo=None
    ) == datetime.fromisoformat(then)


def test_times_with_an_offset() -> None:
    eight = datetime(2026, 11, 25, 8, tzinfo=UTC).timestamp()
    assert parse_time("2026-11-25T09:00+01:00", NOW) == eight
    assert parse_time("2026-11-25t08:00z", NOW) == eight


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "25:00",
        "12:60",
        "9",
        "9 o'clock",
        "mo 08:00",
        "tomorrow",
        "tomorrow 9",
        "in 5",
        "2026-13-01",
        "2026-02-30T09:00",
        "2026-11-25T09:00+1",
        "11/25/2026 09:00",
        "next mon 09:00",
        "in -5m",
    ],
)
def test_what_is_no_time_is_one_error(text: str) -> None:
    with pytest.raises(TimeError, match="write one like"):
        parse_time(text, NOW)


def test_a_time_that_the_clock_skips_is_an_error_and_one_that_it_shows_twice_is_the_first() -> None:
    spring = datetime(2026, 3, 28, 12, tzinfo=BERLIN)
    with pytest.raises(TimeError, match="clocks of Europe/Berlin skip"):
        parse_time("tomorrow 02:30", spring)
    autumn = datetime(2026, 10, 24, 12, tzinfo=BERLIN)
    assert parse_time("tomorrow 02:30", autumn) == datetime(2026, 10, 25, 0, 30, tzinfo=UTC).timestamp()
    # Tomorrow's clock is not today's: nine o'clock is 20 hours away, not 21.
    assert parse_time("tomorrow 09:00", spring) - spring.timestamp() == 20 * 3600


@given(
    hour=st.integers(0, 23),
    minute=st.integers(0, 59),
    now_s=st.integers(1_700_000_000, 1_900_000_000),
    zone=st.sampled_from(["Europe/Berlin", "America/New_York", "UTC", "Asia/Kolkata"]),
)
def test_a_time_of_day_is_the_next_one_and_looking_back_the_last_one(
    hour: int, minute: int, now_s: int, zone: str
) -> None:
    now = datetime.fromtimestamp(now_s, ZoneInfo(zone))
    text = f"{hour:02}:{minute:02}"
    try:
        ahead_s, back_s = parse_time(text, now), parse_time(text, now, past=True)
    except TimeError as error:
        assert "skip" in str(error)
        return
    for time_s in (ahead_s, back_s):
        assert f"{datetime.fromtimestamp(time_s, ZoneInfo(zone)):%H:%M}" == text
    # The hour that comes twice may lie between, on both sides of now.
    assert now_s - 3600 <= ahead_s <= now_s + 25 * 3600
    assert now_s - 26 * 3600 <= back_s <= now_s + 3600


def test_since_is_a_duration_or_a_time_that_was() -> None:
    assert parse_since("1h", NOW) == NOW.timestamp() - 3600
    assert parse_since("09:00", NOW) == (NOW - timedelta(hours=5, minutes=30)).timestamp()
    assert parse_since("18:00", NOW) == (NOW - timedelta(hours=20, minutes=30)).timestamp()
    assert parse_since("2026-11-20", NOW) == datetime(2026, 11, 20, tzinfo=BERLIN).timestamp()
    with pytest.raises(TimeError, match="still to come"):
        parse_since("tomorrow 09:00", NOW)
    with pytest.raises(TimeError, match="neither a duration"):
        parse_since("lately", NOW)


def test_the_local_zone_knows_its_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    assert times.zone_name(times.local_zone()) == "America/New_York"
    monkeypatch.setenv("TZ", ":Europe/Berlin")
    assert times.zone_name(times.local_zone()) == "Europe/Berlin"
    monkeypatch.delenv("TZ")
    zone = times.local_zone()
    assert datetime.now(zone).utcoffset() == datetime.now().astimezone().utcoffset()
    assert Path("/etc/localtime").exists() or times.zone_name(zone) == "UTC"


@pytest.mark.usefixtures("library_zone")
@pytest.mark.parametrize(
    ("tz", "winter_h", "summer_h"),
    [
        ("CET-1CEST,M3.5.0,M10.5.0/3", 1, 2),
        ("UTC0", 0, 0),
        ("<+03>-3", 3, 3),
        ("NST3:30", -3.5, -3.5),
        ("Foo/Bar", 0, 0),
    ],
)
def test_a_zone_without_a_name_goes_by_the_rules_of_the_c_library(
    monkeypatch: pytest.MonkeyPatch, tz: str, winter_h: float, summer_h: float
) -> None:
    monkeypatch.setenv("TZ", tz)
    zone = times.local_zone()
    assert times.zone_name(zone) is None
    for month, hours in ((1, winter_h), (7, summer_h)):
        then = datetime(2026, month, 15, 12, tzinfo=zone)
        assert then.utcoffset() == timedelta(hours=hours)
        assert datetime.fromtimestamp(then.timestamp(), zone) == then


@pytest.mark.usefixtures("library_zone")
def test_such_a_zone_shows_hours_twice_and_skips_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    zone = times.local_zone()
    for name in ("2026-10-25T00:30", "2026-10-25T01:30", "2026-03-29T00:59", "2026-03-29T01:00"):
        moment = datetime.fromisoformat(f"{name}+00:00")
        assert moment.astimezone(zone).isoformat() == moment.astimezone(BERLIN).isoformat()
        assert moment.astimezone(zone).astimezone(UTC) == moment
    now = datetime(2026, 3, 1, tzinfo=zone)
    with pytest.raises(TimeError, match="the clocks of this machine skip"):
        times.parse_time("2026-03-29 02:30", now)


@pytest.mark.usefixtures("library_zone")
def test_a_copied_zone_has_the_name_that_the_machine_says_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    berlin = next(path for folder in TZPATH if (path := Path(folder) / "Europe/Berlin").exists())
    copy, named = tmp_path / "localtime", tmp_path / "timezone"
    copy.write_bytes(berlin.read_bytes())
    monkeypatch.setattr(times, "LOCALTIME", copy)
    monkeypatch.setattr(times, "TIMEZONE", named)
    assert times.zone_name(times.local_zone()) is None
    assert datetime(2026, 7, 1, tzinfo=times.local_zone()).utcoffset() == timedelta(hours=2)
    named.write_text("Europe/Berlin\n")
    assert times.zone_name(times.local_zone()) == "Europe/Berlin"
    # What was written of another clock is out of date.
    for text in ("America/New_York\n", "Africa/Algiers\n", "\n", "/etc/passwd\n"):
        named.write_text(text)
        assert times.zone_name(times.local_zone()) is None
    copy.write_bytes(b"damaged")
    assert times.zone_name(times.local_zone()) is None
    copy.unlink()
    assert times.zone_name(times.local_zone()) == "UTC"
    # A link to what only Python's own data have.
    copy.symlink_to(tmp_path / "zoneinfo/Europe/Berlin")
    assert times.zone_name(times.local_zone()) == "Europe/Berlin"
