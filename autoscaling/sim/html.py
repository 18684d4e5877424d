"""A comparison as one HTML file that needs no network: tables, and plots by plotly with its code inside."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from autoscaling.sim import plots
from autoscaling.sim.report import Report
from autoscaling.sim.shape import Shape

COLUMNS: Mapping[str, str] = {
    "total_cost_gpu_s": "total cost, GPU-s",
    "requests": "requests",
    "cold_starts": "cold starts",
    "cold_requests": "cold requests",
    "wait_mean_s": "mean wait, s",
    "wait_p95_s": "p95, s",
    "wait_p99_s": "p99, s",
    "slo_attainment": "in SLO",
    "gpu_s": "GPU-s",
    "idle_gpu_s": "idle GPU-s",
    "rejected": "rejected",
    "cost": "cost",
    "prewarms": "prewarms",
    "prewarm_hits": "hits",
    "scale_ups": "ups",
}


def document(reports: Sequence[tuple[str, Report]], shape: Shape, title: str) -> str:
    """The whole file. `reports` are (label, report); those with timelines are drawn over time too."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    figures = [
        ("What it costs against how long users wait", _PARETO, plots.pareto(reports)),
        ("Replicas over time against demand", _OVER_TIME, plots.over_time(reports)),
        ("Cold starts by hour and model", _COLD_STARTS, plots.cold_starts(reports)),
        ("Idle times between requests, all models", _IDLE, plots.idle_times(shape)),
    ]
    config = {"displaylogo": False, "responsive": True}
    parts = [
        f"<h2>{html.escape(name)}</h2><p>{html.escape(text)}</p>"
        + figure.to_html(full_html=False, include_plotlyjs=False, config=config)
        for name, text, figure in figures
        if figure is not None
    ]
    notes = {note for _, report in reports for note in report.notes}
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in sorted(notes))
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'>{_NO_NETWORK}"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>"
        f"<h1>{html.escape(title)}</h1>{_span(reports)}{_table(reports)}<ul>{listed}</ul>{''.join(parts)}"
        "</body></html>"
    )


_NO_NETWORK = (
    "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:\">"
)
"""Plotly can draw maps, and would load them; here a browser lets it load nothing."""
_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#222}"
    "h2{margin-top:2.5rem}p{color:#555}.wide{overflow-x:auto;font-size:13px}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.25rem .35rem;text-align:right;"
    "border-bottom:1px solid #ddd}td{white-space:nowrap}td:first-child,th:first-child{text-align:left}"
)
_PARETO = (
    "Down and to the left is better. On the dashed line are those that no other beats in both, but for oracle, "
    "which knows the future: a bound, not a policy. Points of a sweep are joined."
)
_OVER_TIME = (
    "All models together, means over each step. What is shaded was learned from and is not scored. The legend shows "
    "and hides policies."
)
_COLD_STARTS = (
    "Starts from zero that somebody waited for, by the hour of the day (UTC), of the models with the most."
)
_IDLE = "How often a model was silent so long before its next request: what no shorter keep-alive can bridge."


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
        cells = "".join(f"<td>{_number(name, getattr(report.total, name))}</td>" for name in COLUMNS)
        lines.append(f"<tr><td>{html.escape(label)}</td>{cells}</tr>")
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _number(name: str, value: float) -> str:
    if name == "slo_attainment":
        # 100 % is said only of all of them.
        return f"{math.floor(1000 * value + 1e-9) / 10:.1f} %"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:,.3g}"


__all__ = ["COLUMNS", "document"]
