"""Plots of a comparison, as plotly's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from autoscaling.sim.compare import ORACLE
from autoscaling.sim.report import Report
from autoscaling.sim.shape import Shape

if TYPE_CHECKING:
    from plotly.graph_objects import Figure  # type: ignore[import-untyped]

Reports = Sequence[tuple[str, Report]]

MOST_MODELS = 40
MOST_STEPS = 400
"""Of a timeline's line."""
MOST_LINES = 4
"""So many policies are shown at once over time; the legend shows the others."""


def pareto(reports: Reports) -> Figure:
    """GPU-seconds against waiting, and the front of those that nothing beats in both."""
    from plotly import graph_objects as go  # type: ignore[import-untyped]

    figure = go.Figure()
    edge = front(reports)
    figure.add_scatter(
        x=[reports[i][1].total.gpu_s for i in edge],
        y=[reports[i][1].total.waited_s for i in edge],
        mode="lines",
        line={"dash": "dash", "color": "#999", "shape": "hv"},
        name="Pareto front",
        hoverinfo="skip",
    )
    policies: dict[str, list[tuple[str, Report]]] = {}
    for label, report in reports:
        policies.setdefault(report.policy, []).append((label, report))
    for policy, points in policies.items():
        figure.add_scatter(
            x=[report.total.gpu_s for _, report in points],
            y=[report.total.waited_s for _, report in points],
            text=[policy if len(points) == 1 else _short(label, policy) for label, _ in points],
            hovertext=[label for label, _ in points],
            hovertemplate="%{hovertext}<br>%{x:,.0f} GPU-s<br>%{y:,.0f} s waited<extra></extra>",
            mode="markers+text" if len(points) == 1 else "lines+markers+text",
            line={"width": 1, "dash": "dot"},
            marker={"size": 9},
            textposition="top center",
            textfont={"size": 11},
            cliponaxis=False,
            name=policy,
        )
    buttons = [
        {"label": f"{name} scale", "method": "relayout", "args": [{"xaxis.type": kind, "yaxis.type": kind}]}
        for name, kind in (("linear", "linear"), ("logarithmic", "log"))
    ]
    figure.update_layout(
        template="plotly_white",
        xaxis_title="GPU-seconds",
        yaxis_title="request-seconds of waiting",
        height=560,
        margin={"t": 60, "r": 60},
        updatemenus=[
            {
                "buttons": buttons,
                "type": "buttons",
                "direction": "right",
                "x": 0,
                "y": 1.12,
                "xanchor": "left",
            }
        ],
    )
    return figure


def front(reports: Reports) -> list[int]:
    """Places of those that no other beats in both GPU-seconds and waiting, from the cheapest on; without oracle."""
    ordered = sorted(
        (i for i, (_, report) in enumerate(reports) if report.policy != ORACLE),
        key=lambda i: (reports[i][1].total.gpu_s, reports[i][1].total.waited_s),
    )
    found, least_s = [], math.inf
    for i in ordered:
        waited_s = reports[i][1].total.waited_s
        if waited_s < least_s:
            found.append(i)
            least_s = waited_s
    return found


def _short(label: str, policy: str) -> str:
    """Of a sweep's point, what was set."""
    shown = label.removeprefix(policy).strip(" ()")
    return shown.partition("=")[2] if "," not in shown else shown


def over_time(reports: Reports) -> Figure | None:
    """Mean replicas of each policy over the requests in progress; None without timelines."""
    from plotly import graph_objects as go

    drawn = [(label, report, steps_of(report, MOST_STEPS)) for label, report in reports if report.timeline]
    if not drawn:
        return None
    figure = go.Figure()
    first = drawn[0][2]
    figure.add_scatter(
        x=_dates(first.begins_s),
        y=first.load,
        name="requests in progress",
        line={"color": "#bbb", "shape": "hv", "width": 1},
        fill="tozeroy",
        fillcolor="#e3e3e3",
    )
    for i, (label, _, steps) in enumerate(drawn):
        figure.add_scatter(
            x=_dates(steps.begins_s),
            y=steps.held,
            name=label,
            line={"shape": "hv", "width": 1.5},
            visible=True if i < MOST_LINES else "legendonly",
        )
    from_s = reports[0][1].measured_from_s
    if first.begins_s and from_s > first.begins_s[0]:
        figure.add_vrect(
            x0=_dates(first.begins_s[:1])[0],
            x1=_dates([from_s])[0],
            fillcolor="#4a7",
            opacity=0.1,
            line_width=0,
            annotation_text="learned from",
            annotation_position="top left",
        )
    figure.update_layout(
        template="plotly_white",
        yaxis_title="replicas; requests in progress",
        height=480,
        margin={"t": 30},
        legend={"orientation": "h", "y": -0.15},
    )
    return figure


@dataclass(slots=True)
class Steps:
    """Of a timeline, all models together: lists of the same length."""

    begins_s: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    """Mean replicas over the step."""
    load: list[float] = field(default_factory=list)
    """Mean requests in progress."""


def steps_of(report: Report, most: int | None = None) -> Steps:
    """The step in which it is begun to measure is told by what came after.

    Args:
        most: steps, of which several are made one if there are more; None: all.
    """
    held: dict[float, float] = {}
    load: dict[float, float] = {}
    for samples in report.timeline.values():
        for before, after in pairwise(_thinned(samples, most)):
            begins_s, sums = _since(before, after, report.measured_from_s)
            span_s = after.now_s - begins_s
            if span_s > 0:
                held[before.now_s] = held.get(before.now_s, 0.0) + (after.held_s - sums.held_s) / span_s
                load[before.now_s] = (
                    load.get(before.now_s, 0.0) + (after.in_flight_s - sums.in_flight_s) / span_s
                )
    times = sorted(held)
    return Steps(times, [held[at] for at in times], [load[at] for at in times])


def _thinned(samples: Sequence[Any], most: int | None) -> list[Any]:
    """The first and the last of them, and so many between that there are no more steps."""
    if most is None or len(samples) <= most + 1:
        return list(samples)
    return [*samples[: -1 : math.ceil((len(samples) - 1) / most)], samples[-1]]


class _Nothing:
    held_s = in_flight_s = 0.0
    cold_starts = 0


def _since(before: Any, after: Any, from_s: float) -> tuple[float, Any]:
    """(when, from which sums): these begin anew where it is begun to measure."""
    return (from_s, _Nothing) if before.now_s < from_s <= after.now_s else (before.now_s, before)


def cold_starts(reports: Reports) -> Figure | None:
    """A map of hours and models for each policy, one at a time, in the same colours; None without timelines."""
    from plotly import graph_objects as go

    drawn = [(label, report) for label, report in reports if report.timeline]
    if not drawn:
        return None
    total: dict[str, int] = {}
    for _, report in drawn:
        for each in report.models:
            total[each.model] = max(total.get(each.model, 0), each.figures.cold_starts)
    models = sorted(total, key=lambda model: (-total[model], model))[:MOST_MODELS]
    grids = [cold_grid(report, models) for _, report in drawn]
    most = max((int(grid.max()) for grid in grids if grid.size), default=0)
    figure = go.Figure()
    for i, grid in enumerate(grids):
        figure.add_heatmap(
            z=grid.tolist(),
            x=[f"{hour:02d}" for hour in range(24)],
            y=models,
            zmin=0,
            zmax=max(1, most),
            colorscale="Blues",
            visible=i == 0,
            hovertemplate="%{y}, %{x}:00: %{z}<extra></extra>",
        )
    buttons = [
        {"label": label, "method": "restyle", "args": ["visible", [j == i for j in range(len(drawn))]]}
        for i, (label, _) in enumerate(drawn)
    ]
    figure.update_layout(
        template="plotly_white",
        xaxis_title="hour of the day, UTC",
        height=220 + 18 * len(models),
        margin={"t": 70},
        updatemenus=[
            {"buttons": buttons, "x": 0, "y": 1.0, "xanchor": "left", "yanchor": "bottom", "pad": {"b": 12}}
        ],
    )
    figure.update_yaxes(autorange="reversed", type="category")
    return figure


def cold_grid(report: Report, models: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Cold starts that are scored: shape (models, 24). Each counts in the hour in which the middle of its step is."""
    grid = np.zeros((len(models), 24), np.int64)
    timeline: Mapping[str, Any] = report.timeline
    for row, model in enumerate(models):
        for before, after in pairwise(timeline.get(model, ())):
            if after.now_s >= report.measured_from_s:
                begins_s, sums = _since(before, after, report.measured_from_s)
                grid[row, int((begins_s + after.now_s) / 2 // 3600) % 24] += (
                    after.cold_starts - sums.cold_starts
                )
    return grid


def idle_times(shape: Shape) -> Figure:
    """A histogram of the silences between requests."""
    from plotly import graph_objects as go

    edges, counts = shape.idle_histogram
    figure = go.Figure(go.Bar(x=[_lasting(edge) for edge in edges], y=list(counts)))
    figure.update_layout(
        template="plotly_white",
        xaxis_title="at least so long, and shorter than the next",
        yaxis_title="idle times",
        height=400,
        margin={"t": 30},
    )
    figure.update_xaxes(type="category")
    return figure


def _dates(times: Sequence[float]) -> list[datetime]:
    return [datetime.fromtimestamp(at, UTC) for at in times]


def _lasting(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"


__all__ = ["cold_grid", "cold_starts", "front", "idle_times", "over_time", "pareto", "steps_of"]
