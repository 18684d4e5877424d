"""Cron schedules as spans of time.

A schedule is read on the wall clock of its time zone: it is in force exactly while that clock shows a time at or after
one of its starts and less than `duration_s` later on the same clock. So 22:00 for eight hours ends at 06:00 in every
night, one of which lasts seven hours and one nine. Of what lies in the hour that a clock skips, only what is after it
is in force; what lies in the hour that a clock shows twice is in force both times.

Expressions are cronsim's: those of Debian's cron, with L, LW and # besides.
"""

from __future__ import annotations

import math
import zoneinfo
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from itertools import islice, pairwise, takewhile

from cronsim import CronSim

MAX_DURATION_S = 366 * 86400.0
_EPOCH = datetime(1970, 1, 1)
_HOUR_S = 3600
_FAR_S = 10 * 366 * 86400.0
_MAX_STARTS = 2000
"""How many starts before a time are looked at: in a schedule that begins anew each minute, those of 33 hours."""
_MAX_BEYOND = 32
"""How many starts beyond the bounds are looked at, where spans go on and on."""
_HOURS_KEPT = 2
_LEAST_S = 1e-3
"""What is shorter has no end after its start, among Unix seconds."""
_MAX_OFFSET_S = 26 * 3600.0
"""More than any zone is from UTC, and more than its clock ever jumps."""


@dataclass(frozen=True, slots=True)
class Cron:
    """When: a cron expression, how long each time, and on whose clock (an IANA name)."""

    expression: str
    duration_s: float
    timezone: str = "UTC"


def check_expression(expression: str) -> None:
    """Raises ValueError where it is not a cron expression, or one that never comes."""
    from cronsim import CronSimError

    if len(expression.split()) != 5:
        raise ValueError("it needs five fields: minute, hour, day of the month, month, day of the week")
    try:
        next(CronSim(expression, datetime(2024, 1, 1)))
    except CronSimError as error:
        raise ValueError(str(error)[:1].lower() + str(error)[1:]) from None
    except StopIteration:
        raise ValueError("no such day ever comes") from None


def check_timezone(name: str) -> None:
    """Raises ValueError where no time zone has that name."""
    try:
        zoneinfo.ZoneInfo(name)
    except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
        raise ValueError("no time zone has that name") from None


def spans(cron: Cron, from_s: float, until_s: float) -> tuple[tuple[float, float], ...]:
    """Every (start_s, end_s) in Unix time that overlaps [from_s, until_s), ascending; those that touch are one.

    A span is given from its start to its end, also where those lie outside of the bounds; one that has no end, because
    each time begins before the last has ended, is cut outside of them, after some dozens of times.
    """
    first_hour, last_hour = int(from_s // _HOUR_S), int(-(-until_s // _HOUR_S))
    found = _spans_of(cron)(first_hour, last_hour)
    return tuple((start, end) for start, end in found if end > from_s and start < until_s)


@lru_cache(maxsize=128)
def always(cron: Cron) -> bool:
    """Whether each time begins before the one before it has ended, so that the schedule is always in force."""
    minute, hour, days = cron.expression.split(maxsplit=2)
    midnight, lasts = datetime(2024, 1, 1), timedelta(seconds=cron.duration_s)
    daily = CronSim(f"{minute} {hour} * * *", midnight - timedelta(seconds=1))
    of_a_day = list(takewhile(lambda start: start < midnight + timedelta(days=1), daily))
    if any(later - start > lasts for start, later in pairwise(of_a_day)):
        return False
    first, last = of_a_day[0], of_a_day[-1]
    firsts = CronSim(f"{first.minute} {first.hour} {days}", midnight)
    years = takewhile(lambda start: start < midnight + timedelta(seconds=_FAR_S), firsts)
    return all(later - start - (last - first) <= lasts for start, later in pairwise(years))


@lru_cache(maxsize=128)
def upcoming(cron: Cron, now_s: float, count: int) -> tuple[tuple[float, float], ...]:
    """The next `count` spans, beginning with the one in force. Cached: a fleet's models often share a schedule."""
    found: list[tuple[float, float]] = []
    far_s = now_s + _FAR_S
    near = takewhile(lambda span: span[0] < far_s, islice(_raw_spans(cron, now_s, far_s), 5 * _MAX_STARTS))
    for span in _merged(near):
        if span[1] > now_s:
            found.append(span)
        if len(found) == count:
            break
    return tuple(found)


@lru_cache(maxsize=4096)
def _spans_of(cron: Cron) -> Callable[[int, int], tuple[tuple[float, float], ...]]:
    """By hours, of which the last are kept: the controller asks every few seconds, never for an hour that is over."""
    return lru_cache(maxsize=_HOURS_KEPT)(partial(_spans, cron))


def _spans(cron: Cron, first_hour: int, last_hour: int) -> tuple[tuple[float, float], ...]:
    # Spans ascend but for those in an hour that a clock shows twice.
    low, high = _offsets(cron.timezone, last_hour * _HOUR_S)
    until_s, end_s, beyond = last_hour * _HOUR_S + high - low, -math.inf, 0

    def bounded() -> Iterator[tuple[float, float]]:
        nonlocal end_s, beyond
        for start, end in _raw_spans(cron, first_hour * _HOUR_S, until_s + _FAR_S):
            if start >= until_s:
                beyond += 1
                if start > end_s or beyond > _MAX_BEYOND:
                    return
            end_s = max(end_s, end)
            yield start, end

    return tuple(_merged(bounded()))


def _raw_spans(cron: Cron, from_s: float, until_s: float) -> Iterator[tuple[float, float]]:
    """Of each start from about `from_s` to `until_s`, what it is on the clock of the world. May overlap.

    It must end: a schedule may lie in nothing but hours that its clock skips.
    """
    # On the bare clock, which knows no jumps; the starts before `from_s` may still be in force.
    low, high = _offsets(cron.timezone, from_s)
    latest = _EPOCH + timedelta(seconds=from_s + high)
    begin = _EPOCH + timedelta(seconds=from_s + low - cron.duration_s)
    earliest, lasts, beyond = latest, timedelta(seconds=cron.duration_s), 0
    for past in islice(CronSim(cron.expression, latest, reverse=True), _MAX_STARTS):
        if past < begin:
            beyond += 1
            if past + lasts < earliest or beyond > _MAX_BEYOND:
                break
        earliest = past
    begin = earliest - timedelta(seconds=1)
    for naive in CronSim(cron.expression, begin):
        start = (naive - _EPOCH).total_seconds()
        if start > until_s + _MAX_OFFSET_S:
            return
        yield from _on_the_world_clock(cron.timezone, start, start + max(cron.duration_s, _LEAST_S))


def _on_the_world_clock(name: str, start: float, end: float) -> Iterator[tuple[float, float]]:
    """When a clock of this zone shows [start, end), given as seconds of the bare clock."""
    for since, until, offset in _segments(name, (_EPOCH + timedelta(seconds=start)).year):
        span = max(since, start - offset), min(until, end - offset)
        if span[0] < span[1]:
            yield span


@lru_cache(maxsize=512)
def _segments(name: str, year: int) -> tuple[tuple[float, float, float], ...]:
    """(since, until, offset from UTC) of the zone's clock, from before this year's starts to after their ends.

    zoneinfo tells no transitions, so they are searched: no zone has ever changed its clock twice within an hour.
    """
    zone = zoneinfo.ZoneInfo(name)
    first = int((datetime(year - 1, 12, 1) - _EPOCH).total_seconds())
    last = int((datetime(year + 2, 2, 1) - _EPOCH).total_seconds())
    found = []
    since, offset = -math.inf, _offset(zone, first)
    for time in range(first, last, _HOUR_S):
        if _offset(zone, time + _HOUR_S) != offset:
            low, high = time, time + _HOUR_S
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if _offset(zone, middle) == offset else (low, middle)
            found.append((since, float(high), offset))
            since, offset = float(high), _offset(zone, high)
    return (*found, (since, math.inf, offset))


def _offsets(name: str, time_s: float) -> tuple[float, float]:
    """The least and the greatest offset from UTC that the zone's clock has about that time, jumps included."""
    year = datetime.fromtimestamp(time_s, UTC).year
    near = [
        offset
        for since, until, offset in _segments(name, year)
        if since < time_s + _MAX_OFFSET_S and until > time_s - _MAX_OFFSET_S
    ]
    return min(near), max(near)


def _offset(zone: zoneinfo.ZoneInfo, time_s: float) -> float:
    offset = datetime.fromtimestamp(time_s, UTC).astimezone(zone).utcoffset()
    return offset.total_seconds() if offset else 0.0


def _merged(found: Iterator[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Ascending and apart. What comes may be out of order by as much as a clock jumps."""
    held: list[tuple[float, float]] = []
    for span in found:
        held = _join([*held, span])
        while len(held) > 1 and held[0][1] < span[0] - _MAX_OFFSET_S:
            yield held.pop(0)
    yield from held


def _join(found: list[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for start, end in sorted(found):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined
