"""Plots in the terminal, by plotext."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from autoscaling.commands import times

HEIGHT = 16
WIDTH = 100
TICKS = 5


@dataclass(frozen=True, slots=True)
class Line:
    """Values over Unix time; both have shape (n,)."""

    label: str
    times_s: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Band:
    """Between two values over Unix time; all have shape (n,)."""

    label: str
    times_s: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def plot(
    title: str,
    lines: Sequence[Line],
    bands: Sequence[Band] = (),
    *,
    now_s: float | None = None,
    width: int = WIDTH,
    height: int = HEIGHT,
    whole: bool = False,
) -> str:
    """As text without colours, at most `width` columns wide; a vertical line stands at `now_s`.

    `whole`: the values are counts, and so are the marks beside them.
    """
    import plotext  # type: ignore[import-untyped]

    figure = plotext.figure
    figure.clear()
    plotext.terminal.limit(False, False)
    figure.theme("colorless")
    figure.plot_size(width, height)
    figure.title(title)
    for band in bands:
        if band.times_s:
            low = figure.signal(list(band.times_s), list(band.low), marker="·")
            figure.draw(
                figure.signal(list(band.times_s), list(band.high), marker="·").fill(low).label(band.label)
            )
    for line in lines:
        if line.times_s:
            figure.draw(figure.signal(list(line.times_s), list(line.values)).lines().label(line.label))
    drawn = [time for line in lines for time in line.times_s]
    drawn += [time for band in bands for time in band.times_s]
    if drawn:
        first, last = min(drawn), max(drawn)
        ticks = _ticks(first, last)
        figure.ruler("x").ticks([tick for tick, _ in ticks], [label for _, label in ticks])
        figure.ruler("y").lim(0, None)
        if whole:
            most = math.ceil(max(value for line in lines for value in line.values))
            figure.ruler("y").ticks(list(range(0, most + 1, max(1, math.ceil(most / 4)))))
        if now_s is not None and first < now_s < last:
            figure.line(now_s, "vertical")
    text: str = figure.build().string(colorless=True)
    return text.rstrip("\n")


def steps(line: Line, ends_s: float) -> Line:
    """The same with a corner wherever the value changes: what holds until the next time, and until `ends_s`."""
    times_s: list[float] = []
    values: list[float] = []
    for time_s, value in zip(line.times_s, line.values, strict=True):
        if values and values[-1] != value:
            times_s.append(time_s)
            values.append(values[-1])
        times_s.append(time_s)
        values.append(value)
    if values:
        times_s.append(ends_s)
        values.append(values[-1])
    return Line(line.label, times_s, values)


def _ticks(first_s: float, last_s: float) -> list[tuple[float, str]]:
    zone = times.local_zone()
    span_s = last_s - first_s
    form = "%H:%M:%S" if span_s < 600 else "%H:%M" if span_s < 86400 else "%a %H:%M"
    if span_s > 6 * 86400:
        form = "%m-%d"
    count = max(2, min(TICKS, math.ceil(span_s)))
    moments = [first_s + span_s * i / (count - 1) for i in range(count)]
    return [(moment, datetime.fromtimestamp(moment, zone).strftime(form)) for moment in moments]
