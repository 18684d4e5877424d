"""A comparison as one HTML file that needs no network: tables, and plots by plotly with its code inside."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from autoscaling.sim.report import Report
from autoscaling.sim.shape import Shape

if TYPE_CHECKING:
    from plotly.graph_objects import Figure  # type: ignore[import-untyped]

MOST_MODELS = 40
COLUMNS: Mapping[str, str] = {
    "requests": "requests",
    "cold_starts": "cold starts",
    "cold_requests": "cold requests",
    "wait_mean_s": "mean wait, s",
    "wait_p95_s": "p95, s",
    "wait_p99_s": "p99, s",
    "slo_attainment": "in SLO",
    "gpu_s": "GPU-s",
    "idle_gpu_s": "idle GPU-s",
    "cost": "cost",
    "total_cost_gpu_s": "total cost, GPU-s",
    "prewarms": "prewarms",
    "prewarm_hits": "hits",
    "scale_ups": "ups",
}


def document(reports: Sequence[tuple[str, Report]], shape: Shape, title: str) -> str:
    """The whole file. `reports` are (label, report); those with timelines are drawn over time too."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    figures = [
        ("What it costs against how long users wait", _pareto(reports)),
        ("Replicas over time against demand", _over_time(reports)),
        *(
            (f"Cold starts by hour and model: {label}", _cold_starts(report))
            for label, report in reports
            if report.timeline
        ),
        ("Idle times between requests, all models", _idle_times(shape)),
    ]
    parts = [
        f"<h2>{html.escape(name)}</h2>{figure.to_html(full_html=False, include_plotlyjs=False)}"
        for name, figure in figures
        if figure is not None
    ]
    notes = {note for _, report in reports for note in report.notes}
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in sorted(notes))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>"
        f"<h1>{html.escape(title)}</h1>{_span(reports)}{_table(reports)}<ul>{listed}</ul>{''.join(parts)}"
        "</body></html>"
    )


_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.25rem .6rem;text-align:right;"
    "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
)


def _span(reports: Sequence[tuple[str, Report]]) -> str:
    if not reports:
        return ""
    report = reports[0][1]
    since, until = (
        datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
        for at in (report.measured_from_s, report.until_s)
    )
    return (
        f"<p>{html.escape(report.trace)}: scored from {since} to {until} UTC, seed {report.seed}. "
        "Total cost is GPU-seconds plus wait_cost for each second that a request waited.</p>"
    )


def _table(reports: Sequence[tuple[str, Report]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("policy", *COLUMNS.values()))
    lines = []
    for label, report in reports:
        cells = "".join(f"<td>{_number(getattr(report.total, name))}</td>" for name in COLUMNS)
        lines.append(f"<tr><td>{html.escape(label)}</td>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _number(value: float) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:,.3g}"


def _pareto(reports: Sequence[tuple[str, Report]]) -> Figure:
    from plotly import graph_objects as go  # type: ignore[import-untyped]

    points = sorted((report.total.gpu_s, report.total.waited_s, label) for label, report in reports)
    front, least = [], np.inf
    for cost, waited, label in points:
        if waited < least:
            front.append((cost, waited, label))
            least = waited
    figure = go.Figure()
    figure.add_scatter(
        x=[each[0] for each in points],
        y=[each[1] for each in points],
        text=[each[2] for each in points],
        mode="markers+text",
        textposition="top right",
        name="policies",
    )
    figure.add_scatter(
        x=[each[0] for each in front], y=[each[1] for each in front], mode="lines", name="Pareto front"
    )
    figure.update_layout(xaxis_title="GPU-seconds", yaxis_title="request-seconds of waiting", height=520)
    return figure


def _over_time(reports: Sequence[tuple[str, Report]]) -> Figure | None:
    from plotly import graph_objects as go

    figure = go.Figure()
    drawn = False
    for label, report in reports:
        if not report.timeline:
            continue
        times, held, load = _rates(report)
        if not drawn:
            figure.add_scatter(
                x=times, y=load, name="requests in progress", line={"color": "#999"}, fill="tozeroy"
            )
            drawn = True
        figure.add_scatter(x=times, y=held, name=f"replicas: {label}", line_shape="hv")
    if not drawn:
        return None
    figure.update_layout(yaxis_title="mean over the step", height=480)
    return figure


def _rates(report: Report) -> tuple[list[datetime], list[float], list[float]]:
    """(step begins, mean replicas, mean requests in progress), over all models."""
    held: dict[float, float] = {}
    load: dict[float, float] = {}
    for samples in report.timeline.values():
        for before, after in pairwise(samples):
            span_s = after.now_s - before.now_s
            # Sums begin anew where it is begun to measure.
            if span_s > 0 and after.held_s >= before.held_s:
                held[before.now_s] = held.get(before.now_s, 0.0) + (after.held_s - before.held_s) / span_s
                load[before.now_s] = (
                    load.get(before.now_s, 0.0) + (after.in_flight_s - before.in_flight_s) / span_s
                )
    times = sorted(held)
    return (
        [datetime.fromtimestamp(at, UTC) for at in times],
        [held[at] for at in times],
        [load[at] for at in times],
    )


def _cold_starts(report: Report) -> Figure:
    from plotly import graph_objects as go

    ranked = sorted(report.models, key=lambda each: -each.figures.cold_starts)[:MOST_MODELS]
    grid = np.zeros((len(ranked), 24))
    for row, each in enumerate(ranked):
        samples: Sequence[Any] = report.timeline.get(each.model, ())
        for before, after in pairwise(samples):
            grid[row, int(before.now_s // 3600) % 24] += max(0, after.cold_starts - before.cold_starts)
    figure = go.Figure(
        go.Heatmap(
            z=grid.tolist(),
            x=[f"{hour:02d}" for hour in range(24)],
            y=[each.model for each in ranked],
            colorscale="Blues",
        )
    )
    figure.update_layout(xaxis_title="hour of the day, UTC", height=200 + 16 * len(ranked))
    figure.update_yaxes(autorange="reversed", type="category")
    return figure


def _idle_times(shape: Shape) -> Figure:
    from plotly import graph_objects as go

    edges, counts = shape.idle_histogram
    labels = [_lasting(edge) for edge in edges]
    figure = go.Figure(go.Bar(x=labels, y=list(counts)))
    figure.update_layout(xaxis_title="at least so long", yaxis_title="idle times", height=400)
    figure.update_xaxes(type="category")
    return figure


def _lasting(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"


__all__ = ["COLUMNS", "document"]
