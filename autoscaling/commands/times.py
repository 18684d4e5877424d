"""Durations and times as people write them on a command line. Strict: what could mean two things is an error."""

from __future__ import annotations

import os
import re
import time as time_module
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

DURATIONS = "like 90s, 15m, 1h30m, 2d or 1w"
TIMES = 'like 18:30, "tomorrow 09:00", "mon 08:00", "in 15m", 2026-11-25T09:00 or 2026-11-25T09:00+01:00'
PAST_TIMES = (
    'like 18:30, "yesterday 09:00", "mon 08:00", "15m ago", now, 2026-11-25T09:00 or 2026-11-25T09:00+01:00'
)
_UNITS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1}
_PART = re.compile(r"(\d+(?:\.\d+)?)([wdhms])", re.ASCII)
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?", re.ASCII)
_ISO = re.compile(r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2})?(Z|[+-]\d{2}:\d{2})?)?", re.ASCII)
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_LONGEST_S = 366 * 86400 * 10
LOCALTIME, TIMEZONE = Path("/etc/localtime"), Path("/etc/timezone")
_NO_ZONE = (OSError, ValueError, ZoneInfoNotFoundError)
_YEAR = 366


class TimeError(ValueError):
    """The text is no duration or no time; the message says what would be."""


def now() -> datetime:
    """The present on the local clock. The commands read the time nowhere else."""
    return datetime.now(local_zone())


def local_zone() -> tzinfo:
    """The machine's time zone with its rules, so that tomorrow's clock is known: TZ, else /etc/localtime, else UTC."""
    name = os.environ.get("TZ", "").removeprefix(":")
    if name:
        try:
            return ZoneInfo(name)
        except _NO_ZONE:
            return _LibraryZone()
    try:
        # The link may name a zone of which only Python's own data know.
        _, found, name = str(LOCALTIME.resolve()).rpartition("/zoneinfo/")
        if found:
            return ZoneInfo(name)
        with LOCALTIME.open("rb") as file:
            return ZoneInfo.from_file(file)
    except FileNotFoundError:
        return UTC
    except _NO_ZONE:
        return _LibraryZone()


def zone_name(zone: tzinfo) -> str | None:
    """Its IANA name; of a copy in /etc/localtime the one in /etc/timezone; None where it has none."""
    if zone is UTC:
        return "UTC"
    return (zone.key or _name_beside(zone)) if isinstance(zone, ZoneInfo) else None


class _LibraryZone(tzinfo):
    """As the C library reads TZ: a rule (CET-1CEST) has no name in the zone database; what is unknown is UTC there."""

    def __init__(self) -> None:
        time_module.tzset()

    def utcoffset(self, when: datetime | None, /) -> timedelta | None:
        return None if when is None else when.replace(tzinfo=None).astimezone().utcoffset()

    def dst(self, when: datetime | None, /) -> timedelta | None:
        return None

    def tzname(self, when: datetime | None, /) -> str | None:
        return None if when is None else when.replace(tzinfo=None).astimezone().tzname()

    def fromutc(self, when: datetime, /) -> datetime:
        return datetime.fromtimestamp(when.replace(tzinfo=UTC).timestamp()).replace(tzinfo=self)


def _name_beside(zone: ZoneInfo) -> str | None:
    """What /etc/timezone says, if the clock of that is the same: the file is not always kept up to date."""
    try:
        named = ZoneInfo(TIMEZONE.read_text(encoding="utf-8").strip())
    except _NO_ZONE:
        return None
    today = datetime.now().replace(hour=12)
    days = (today + timedelta(days=day) for day in range(-_YEAR, _YEAR))
    return named.key if all(zone.utcoffset(day) == named.utcoffset(day) for day in days) else None


def parse_duration(text: str, *, zero: bool = False) -> float:
    """Seconds: `1h30m` is 5400. Units from the largest to the smallest, each once; 0 if `zero`. Raises TimeError."""
    rest = "".join(text.split()).lower()
    seconds, last = 0.0, float("inf")
    while rest:
        part = _PART.match(rest)
        if part is None or _UNITS[part[2]] >= last:
            raise TimeError(f"{text!r} is not a duration; write one {DURATIONS}")
        last = _UNITS[part[2]]
        seconds += float(part[1]) * last
        rest = rest[part.end() :]
    if zero and text.strip() and seconds == 0:
        return 0.0
    if not 0 < seconds <= _LONGEST_S:
        raise TimeError(f"{text!r} is not a duration above 0 and up to ten years; write one {DURATIONS}")
    return seconds


def parse_time(text: str, now: datetime, *, past: bool = False) -> float:
    """Unix seconds. A time of day without a day is the next one, or with `past` the last one. Raises TimeError.

    `now` carries the zone that is meant where the text names none. A time that a clock shows twice is the first of
    both; one that it skips is an error.
    """
    words, forms = text.lower().split(), PAST_TIMES if past else TIMES
    if words == ["now"]:
        return now.timestamp()
    if len(words) == 2 and words[0] == "in":
        return now.timestamp() + parse_duration(words[1])
    if len(words) == 2 and words[1] == "ago":
        return now.timestamp() - parse_duration(words[0])
    if _ISO.fullmatch(text.strip().upper()):
        return _from_iso(text.strip().upper(), text, now, forms)
    if len(words) in (1, 2) and (clock := _clock(words[-1])) is not None:
        days = [now.date() + timedelta(days=offset) for offset in range(-8, 9)]
        if len(words) == 2:
            days = _days_named(words[0], days, now.date(), text, forms)
        return _nearest(clock, days, now, text, past=past)
    raise TimeError(f"{text!r} is not a time; write one {forms}")


def parse_past(text: str, now: datetime) -> float:
    """A time that was, in Unix seconds: a time of day without a day is the last one. Raises TimeError."""
    then_s = parse_time(text, now, past=True)
    if then_s > now.timestamp():
        raise TimeError(f"{text!r} is still to come; write a time that was, {PAST_TIMES}")
    return then_s


def parse_since(text: str, now: datetime) -> float:
    """When to begin looking back, in Unix seconds: a duration back from now, or a time that was. Raises TimeError."""
    try:
        return now.timestamp() - parse_duration(text)
    except TimeError:
        pass
    try:
        since_s = parse_time(text, now, past=True)
    except TimeError:
        raise TimeError(f"{text!r} is neither a duration ({DURATIONS}) nor a time ({PAST_TIMES})") from None
    if since_s > now.timestamp():
        raise TimeError(f"{text!r} is still to come; write a time that was, or a duration {DURATIONS}")
    return since_s


def _from_iso(iso: str, text: str, now: datetime, forms: str) -> float:
    try:
        then = datetime.fromisoformat(iso)
        return then.timestamp() if then.tzinfo is not None else _at(then, now.tzinfo or UTC, text)
    except OverflowError:
        # The first or the last day that there is, on a clock on which it is another in UTC.
        raise TimeError(f"{text!r} is beyond what clocks show; write a time {forms}") from None
    except TimeError:
        raise
    except ValueError as error:
        raise TimeError(f"{text!r} is not a time ({error}); write one {forms}") from None


def _clock(word: str) -> time | None:
    found = _CLOCK.fullmatch(word)
    if found is None:
        return None
    try:
        return time(int(found[1]), int(found[2]), int(found[3] or 0))
    except ValueError:
        return None


def _days_named(word: str, days: list[date], today: date, text: str, forms: str) -> list[date]:
    named = {"yesterday": -1, "today": 0, "tomorrow": 1}
    if word in named:
        return [today + timedelta(days=named[word])]
    weekdays = [i for i, day in enumerate(_DAYS) if len(word) >= 3 and day.startswith(word)]
    if not weekdays:
        raise TimeError(f"{text!r} is not a time; write one {forms}")
    return [day for day in days if day.weekday() == weekdays[0]]


def _nearest(clock: time, days: list[date], now: datetime, text: str, *, past: bool) -> float:
    """Of these days the first whose clock is still to come, or the last that has been; a single day is meant so."""
    zone = now.tzinfo or UTC
    if len(days) == 1:
        return _at(datetime.combine(days[0], clock), zone, text)
    naive = now.replace(tzinfo=None)
    times = [datetime.combine(day, clock) for day in days]
    chosen = max(t for t in times if t <= naive) if past else min(t for t in times if t > naive)
    return _at(chosen, zone, text)


def _at(naive: datetime, zone: tzinfo, text: str) -> float:
    then = naive.replace(tzinfo=zone)
    if then.astimezone(UTC).astimezone(zone).replace(tzinfo=None) != naive:
        where = zone_name(zone) or "this machine"
        raise TimeError(
            f"{text!r} is {naive:%Y-%m-%d %H:%M}, which the clocks of {where} skip; take another time"
        )
    return then.timestamp()
