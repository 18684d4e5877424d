"""Decisions, cold starts, prewarms, usage, overrides, states and the plan in the database: written, read, pruned."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, Table, delete, func, insert, or_, select
from sqlalchemy.sql import ColumnElement

from autoscaling.core import codec
from autoscaling.core.types import State
from autoscaling.live.records import ColdStartRow, Override, PrewarmRow, UsageRow
from autoscaling.live.store import schema
from autoscaling.live.store.buffer import Batch
from autoscaling.live.store.database import upsert
from autoscaling.live.store.values import (
    decision_dict,
    from_cold_start,
    from_decision,
    from_override,
    from_prewarm,
    text,
    to_cold_start,
    to_override,
    to_prewarm,
)

logger = logging.getLogger(__name__)

DAY_S = 86400.0
KEPT_DAYS = {
    "decisions": 14,
    "cold_starts": 90,
    "prewarms": 90,
    "overrides": 400,
    "usage": 400,
}
"""How long each is kept. Overrides count from when they ended; those in force are kept."""
MAX_DECISIONS = 1_000_000
PRUNED_AT_ONCE = 5000
"""Rows that one transaction deletes of a table at most."""


def write_decisions(connection: Connection, batch: Batch) -> None:
    if batch.decisions:
        rows = [from_decision(decision, source) for source, decision in batch.decisions]
        connection.execute(insert(schema.decisions), rows)


def write_cold_starts(connection: Connection, batch: Batch) -> None:
    upsert(connection, schema.cold_starts, [from_cold_start(row) for row in batch.cold_starts.values()])


def write_prewarms(connection: Connection, batch: Batch) -> None:
    upsert(connection, schema.prewarms, [from_prewarm(row) for row in batch.prewarms.values()])


def write_usage(connection: Connection, batch: Batch) -> None:
    counted = ("requests", "cold_requests", "waited_s", "cold_starts")
    days, gpus = [], []
    for key, row in sorted(batch.usage.items()):
        keys = dict(zip(("day", "source", "model"), map(text, key), strict=True))
        days.append({**keys, **{name: getattr(row, name) for name in counted}})
        gpus += [{**keys, "rung": text(rung), "gpu_s": gpu_s} for rung, gpu_s in sorted(row.gpu_s.items())]
    upsert(connection, schema.usage, days, add=counted)
    upsert(connection, schema.usage_gpu, gpus, add=("gpu_s",))


def write_states(connection: Connection, batch: Batch) -> None:
    rows = [
        {"model": text(model), "state": codec.to_json(state)} for model, state in sorted(batch.states.items())
    ]
    upsert(connection, schema.states, rows)


def write_plan(connection: Connection, batch: Batch) -> None:
    if batch.plan is not None:
        put_meta(connection, "plan", text(batch.plan))


def put_override(connection: Connection, row: Override) -> None:
    upsert(connection, schema.overrides, [from_override(row)])


def put_meta(connection: Connection, key: str, value: str) -> None:
    upsert(connection, schema.meta, [{"key": key, "value": value}])


def read_meta(connection: Connection, key: str) -> str | None:
    return connection.scalar(select(schema.meta.c.value).where(schema.meta.c.key == key))


def read_states(connection: Connection) -> dict[str, State]:
    """Without those that can't be read any more: a policy that has changed begins with an empty memory."""
    states = {}
    for row in connection.execute(select(schema.states)):
        try:
            states[row.model] = codec.from_json(State, row.state)
        except codec.CodecError as error:
            logger.warning("the state of %s is forgotten: %s", row.model, error)
    return states


def read_overrides(connection: Connection) -> list[Override]:
    table = schema.overrides
    rows = connection.execute(select(table).order_by(table.c.made_s, table.c.id)).mappings()
    return [to_override(dict(row)) for row in rows]


def read_decisions(
    connection: Connection,
    model: str | None,
    since_s: float,
    until_s: float,
    *,
    limit: int,
    source: str | None,
) -> list[dict[str, Any]]:
    table = schema.decisions
    where = [table.c.made_s >= since_s, table.c.made_s <= until_s]
    if model is not None:
        where.append(table.c.model == model)
    if source is not None:
        where.append(table.c.source == source)
    columns = [column for column in table.c if column.name != "id"]
    newest = select(*columns).where(*where).order_by(table.c.made_s.desc(), table.c.id.desc()).limit(limit)
    return [decision_dict(dict(row)) for row in connection.execute(newest).mappings()][::-1]


def read_cold_starts(
    connection: Connection, model: str | None, since_s: float, until_s: float, *, limit: int
) -> list[ColdStartRow]:
    table = schema.cold_starts
    rows = _newest(connection, table, table.c.ready_s, (since_s, until_s), model=model, limit=limit)
    return [to_cold_start(row) for row in rows]


def read_newest_starts(connection: Connection, since_s: float, each: int) -> list[ColdStartRow]:
    table = schema.cold_starts
    nth = func.row_number().over(partition_by=(table.c.model, table.c.rung), order_by=table.c.ready_s.desc())
    ranked = select(table, nth.label("nth")).where(table.c.ready_s >= since_s).subquery()
    newest = select(*(ranked.c[column.name] for column in table.c)).where(ranked.c.nth <= each)
    return [to_cold_start(dict(row)) for row in connection.execute(newest).mappings()]


def read_prewarms(
    connection: Connection, model: str | None, since_s: float, until_s: float, *, limit: int
) -> list[PrewarmRow]:
    table = schema.prewarms
    rows = _newest(connection, table, table.c.begun_s, (since_s, until_s), model=model, limit=limit)
    return [to_prewarm(row) for row in rows]


def read_usage(
    connection: Connection, since_day: str, until_day: str, model: str | None, source: str | None
) -> list[UsageRow]:
    def chosen(table: Table) -> list[ColumnElement[bool]]:
        where: list[ColumnElement[bool]] = [table.c.day >= since_day, table.c.day <= until_day]
        if model is not None:
            where.append(table.c.model == model)
        if source is not None:
            where.append(table.c.source == source)
        return where

    gpu_s: dict[tuple[str, str, str], dict[str, float]] = {}
    gpu = schema.usage_gpu
    for row in connection.execute(select(gpu).where(*chosen(gpu))):
        gpu_s.setdefault((row.day, row.source, row.model), {})[row.rung] = row.gpu_s
    table = schema.usage
    ordered = select(table).where(*chosen(table)).order_by(table.c.day, table.c.source, table.c.model)
    return [
        UsageRow(**row, gpu_s=gpu_s.get((row["day"], row["source"], row["model"]), {}))
        for row in connection.execute(ordered).mappings()
    ]


def fair_share(counts: Iterable[int], most: int) -> int:
    """The largest share of each, so that min(count, share) add up to `most` at most; the largest count if all fit."""
    ascending = sorted(counts)
    left = most
    for place, count in enumerate(ascending):
        share = left // (len(ascending) - place)
        if count > share:
            return share
        left -= count
    return max(ascending, default=0)


def _prune_surplus(connection: Connection, most: int, at_once: int) -> int:
    """Deletes the oldest decisions of the models that have more than their share of `most`. Returns how many."""
    table = schema.decisions
    first, last = connection.execute(select(func.min(table.c.id), func.max(table.c.id))).one()
    # Nearly always there can't be as many: to count them all takes a while.
    if last is None or last - first < most:
        return 0
    counted = select(table.c.model, func.count()).group_by(table.c.model)
    counts = {row[0]: int(row[1]) for row in connection.execute(counted)}
    share = fair_share(counts.values(), most)
    deleted = 0
    for model, count in sorted(counts.items()):
        surplus = min(count - share, at_once - deleted)
        if surplus > 0:
            oldest = (
                select(table.c.id)
                .where(table.c.model == model)
                .order_by(table.c.made_s, table.c.id)
                .limit(surplus)
            )
            deleted += connection.execute(delete(table).where(table.c.id.in_(oldest))).rowcount
    return deleted


def prune(connection: Connection, now_s: float, day: str, max_decisions: int) -> bool:
    """Deletes a bounded number of the oldest rows that are kept no longer.

    Args:
        day: the first UTC day, YYYY-MM-DD, of which usage is kept.
        max_decisions: how many decisions are kept; beyond it those of the models that have the most go.

    Returns:
        Whether more is left to do.
    """

    def before(name: str) -> float:
        return now_s - KEPT_DAYS[name] * DAY_S

    decisions, overrides = schema.decisions, schema.overrides
    ids = select(decisions.c.id).where(decisions.c.made_s < before("decisions")).limit(PRUNED_AT_ONCE)
    deleted = connection.execute(delete(decisions).where(decisions.c.id.in_(ids))).rowcount
    deleted += _prune_surplus(connection, max_decisions, PRUNED_AT_ONCE - deleted)
    connection.execute(delete(schema.cold_starts).where(schema.cold_starts.c.ready_s < before("cold_starts")))
    connection.execute(delete(schema.prewarms).where(schema.prewarms.c.begun_s < before("prewarms")))
    connection.execute(
        delete(overrides).where(
            or_(overrides.c.until_s < before("overrides"), overrides.c.undone_s < before("overrides"))
        )
    )
    for table in (schema.usage, schema.usage_gpu):
        connection.execute(delete(table).where(table.c.day < day))
    return deleted >= PRUNED_AT_ONCE


def _newest(
    connection: Connection,
    table: Table,
    time: ColumnElement[float],
    span: tuple[float, float],
    *,
    model: str | None,
    limit: int,
) -> list[dict[str, Any]]:
    where = [time.between(*span)] + ([table.c.model == model] if model is not None else [])
    newest = select(table).where(*where).order_by(time.desc()).limit(limit)
    return [dict(row) for row in connection.execute(newest).mappings()]
