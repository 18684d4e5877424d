"""What was: traffic, decisions, cold starts, and what all of it cost. And traffic from elsewhere, taken in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import Field

from autoscaling.live.api.plain import plain
from autoscaling.live.api.request import Refusal, Request
from autoscaling.live.invalid import InvalidValue
from autoscaling.live.records import PrewarmRow, UsageRow
from autoscaling.live.values import SHADOW_NAME, Value
from autoscaling.traffic import LONGEST_WINDOW_S

YEAR_S = 400 * 86400.0
MAX_POINTS = 5000
DAY_S = 86400.0


def history(request: Request) -> dict[str, Any]:
    """GET history: one model's traffic in steps of step_s (0 chooses some hundred steps)."""
    model = _recorded(request, request.query.get("model", ""))
    since_s, until_s = request.span(DAY_S, YEAR_S)
    span_s = max(1.0, until_s - since_s)
    step_s = request.number("step_s", 0, 0, YEAR_S) or nice_step(span_s / 120)
    if span_s / step_s > MAX_POINTS:
        raise InvalidValue("step_s", step_s, f"at least {span_s / MAX_POINTS:.0f} for this span")
    return history_of(request, model, since_s, until_s, step_s)


def history_of(request: Request, model: str, since_s: float, until_s: float, step_s: float) -> dict[str, Any]:
    """One model's traffic; each point says how long its step is, which may be coarser than what was asked for."""
    points = request.view.store.history(model, since_s, until_s, step_s)
    return {
        "model": model,
        "since_s": since_s,
        "until_s": until_s,
        "step_s": step_s,
        "points": plain(list(points)),
    }


def nice_step(at_least_s: float) -> float:
    """The next step that people count in, and that the store's buckets divide."""
    for step_s in (1, 5, 10, 30, 60, 300, 900, 1800, 3600, 3 * 3600, 6 * 3600, 12 * 3600, DAY_S):
        if step_s >= at_least_s:
            return float(step_s)
    return 7 * DAY_S


def decisions(request: Request) -> dict[str, Any]:
    """GET decisions: the newest, in the order of time, or those of a shadow policy (`source` shadow:NAME).

    In the mode `shadow` the controller's own are kept under `shadow`, since nobody acted on them.
    """
    model = _optional(request)
    since_s, until_s = request.span(3600.0, YEAR_S)
    limit = request.whole("limit", 200, 1, 10_000)
    source = _source(request, "shadow" if request.mode() == "shadow" else "active")
    found = request.view.store.decisions(model, since_s, until_s, limit, source)
    return {"since_s": since_s, "until_s": until_s, "source": source, "decisions": plain(list(found))}


def cold_starts(request: Request) -> dict[str, Any]:
    """GET coldstarts: the newest, in the order of time, with their phases."""
    model = _optional(request)
    since_s, until_s = request.span(7 * DAY_S, YEAR_S)
    limit = request.whole("limit", 50, 1, 10_000)
    rows = request.view.store.cold_starts(model, since_s, limit, until_s=request.told_until_s())
    return {"since_s": since_s, "until_s": until_s, "cold_starts": plain(list(rows))}


def accounts(request: Request) -> dict[str, Any]:
    """GET accounts: by model and UTC day, what was spent and waited; the prewarms; and a dedicated GPU's price.

    With `source` shadow:NAME what a shadow policy would have spent and waited; it makes no prewarms.
    A dedicated replica is charged from the first day on which the model was used, or from when it is watched if that is
    on this day, until now, at the model's GPUs for each replica; of a model that the fleet no longer has, until the end
    of the last day on which it was used, at one GPU.
    """
    model = _optional(request)
    today = day_of(request.now_s)
    until_day = request.day("until_day", today)
    since_day = request.day("since_day", day_of(request.now_s - 6 * DAY_S))
    if since_day > until_day:
        raise InvalidValue("since_day", since_day, f"a day not after until_day ({until_day})")
    store = request.view.store
    source = _source(request, "active")
    usage = list(store.usage(since_day, until_day, model, source))
    start_s, end_s = day_start_s(since_day), min(request.now_s, day_start_s(until_day) + DAY_S)
    prewarms = _made(request, model, start_s, end_s) if source == "active" else []
    specs = request.models()
    names = sorted({row.model for row in usage} | {row.model for row in prewarms})
    models = []
    for name in names:
        rows = [row for row in usage if row.model == name]
        gpus = (specs[name].gpus_per_replica if name in specs else 0.0) or 1.0
        own_prewarms = [row for row in prewarms if row.model == name]
        models.append(
            {
                "model": name,
                **usage_total(rows),
                "dedicated_gpu_s": gpus * _there_s(request, name, rows, end_s, gone=name not in specs),
                "prewarms": prewarm_total(own_prewarms),
                "days": [{"day": row.day, **usage_total([row])} for row in sorted(rows, key=lambda r: r.day)],
            }
        )
    total = usage_total(usage)
    return {
        "since_day": since_day,
        "until_day": until_day,
        "source": source,
        "models": plain(models),
        "total": {
            **total,
            "dedicated_gpu_s": sum(row["dedicated_gpu_s"] for row in models),
            "prewarms": prewarm_total(prewarms),
        },
    }


def _recorded(request: Request, name: str) -> str:
    """The id of a model of the fleet, or of one that it no longer has and of which there are records; else 404."""
    try:
        return request.model(name)
    except Refusal:
        if not request.view.store.has_records(name):
            raise
        return name


def _optional(request: Request) -> str | None:
    name = request.query.get("model")
    return _recorded(request, name) if name else None


def _there_s(request: Request, model: str, rows: Sequence[UsageRow], end_s: float, *, gone: bool) -> float:
    """For how long the model was there until `end_s`, by the days of its usage and since when it is watched."""
    if not rows:
        return 0.0
    days = sorted(row.day for row in rows)
    first_s, last_s = day_start_s(days[0]), day_start_s(days[-1])
    # An installation of an hour would else seem to have saved a day.
    watched_s = request.view.store.watched_since_s(model) or first_s
    begins_s = watched_s if first_s <= watched_s < first_s + DAY_S else first_s
    return max(0.0, (min(end_s, last_s + DAY_S) if gone else end_s) - begins_s)


def _source(request: Request, default: str) -> str:
    """Whose records are asked for."""
    given = request.query.get("source") or default
    if given not in ("active", "shadow") and not re.fullmatch(f"shadow:{SHADOW_NAME}", given):
        raise InvalidValue("source", given, "active, shadow or shadow:NAME")
    return given


def _made(request: Request, model: str | None, start_s: float, end_s: float) -> list[PrewarmRow]:
    """The newest prewarms that were begun in [start_s, end_s)."""
    found = request.view.store.prewarms(model, start_s, 10_000)
    return [row for row in found if row.begun_s < end_s]


def usage_total(rows: Iterable[UsageRow]) -> dict[str, Any]:
    by_rung: dict[str, float] = {}
    sums = {"requests": 0, "cold_requests": 0, "cold_starts": 0, "waited_s": 0.0}
    for row in rows:
        for rung, gpu_s in row.gpu_s.items():
            by_rung[rung.lower()] = by_rung.get(rung.lower(), 0.0) + gpu_s
        for name in sums:
            sums[name] += getattr(row, name)
    return {"gpu_s": sum(by_rung.values()), "gpu_s_by_rung": by_rung, **sums}


def prewarm_total(rows: Iterable[PrewarmRow]) -> dict[str, Any]:
    """Of those that are over, how many met a request. One that still waits is neither hit nor missed."""
    found = list(rows)
    hits = sum(row.hit_s is not None for row in found)
    open_ = sum(row.ended_s is None and row.hit_s is None for row in found)
    return {
        "count": len(found),
        "hits": hits,
        "missed": len(found) - hits - open_,
        "open": open_,
        "cost_gpu_s": sum(row.cost_gpu_s for row in found),
        "spared_requests": sum(row.spared_requests for row in found),
        "spared_wait_s": sum(row.spared_wait_s for row in found),
    }


class ImportBody(Value):
    """Traffic from elsewhere. A row: model, Unix time, arrivals, input tokens, output tokens, request-seconds."""

    bucket_s: Annotated[float, Field(gt=0, le=LONGEST_WINDOW_S)]
    source: Annotated[str, Field(max_length=200)] = ""
    """A name for these rows: the same name is taken in once, so that a request that is sent again does no harm."""
    rows: Annotated[
        list[
            Annotated[
                list[str | float],
                Field(min_length=6, max_length=6),
            ]
        ],
        Field(max_length=50_000),
    ]


def take_in(request: Request) -> dict[str, Any]:
    """POST import: rows of models that the fleet has."""
    body = request.parse(ImportBody)
    rows = [_row(request, index, row) for index, row in enumerate(body.rows)]
    return {"rows": request.view.store.import_traffic(rows, body.bucket_s, source=body.source)}


def _row(request: Request, index: int, row: list[str | float]) -> tuple[str, float, int, int, int, float]:
    name, *numbers = row
    if not isinstance(name, str):
        raise InvalidValue(f"rows.{index}.0", name, "a model's name")
    model = request.model(name, f"rows.{index}.0")
    for column, value in enumerate(numbers, 1):
        if isinstance(value, str) or value < 0:
            raise InvalidValue(f"rows.{index}.{column}", value, "a number of at least 0")
    time_s, arrivals, inputs, outputs, busy_s = (float(value) for value in numbers)
    if time_s > request.now_s:
        raise InvalidValue(f"rows.{index}.1", time_s, f"a time before now ({request.now_s:.0f})")
    return model, time_s, int(arrivals), int(inputs), int(outputs), busy_s


def day_of(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).date().isoformat()


def day_start_s(day: str) -> float:
    return datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()
