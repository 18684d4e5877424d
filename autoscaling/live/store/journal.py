"""Traffic in the database.

A commit adds one row to the journal: that is the one-second level, for an hour. Once a minute what is new in a
writer's journal is added to the coarser levels, and in the same transaction the writer's `rolled_seq` moves on. So a
crash at any moment leaves either both or neither, and no second is counted twice or lost.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from sqlalchemy import Connection, case, delete, func, insert, select, update

from autoscaling.live.clock import EARLIEST_S
from autoscaling.live.store.database import insert_into, least, upsert
from autoscaling.live.store.mirror import KEPT_S, STEPS, Amounts, Entry, LevelArrays, level_arrays
from autoscaling.live.store.schema import AMOUNTS, SILENT, journal, series, traffic, writers

Rows = Mapping[tuple[str, int, int], Amounts]
"""(model, time_s, step_s) -> amounts."""

_BLOB_ROWS = 20_000
ROLLED_AT_ONCE = 600
"""Journal rows that one transaction rolls up at most, so that it stays short and its memory small."""


def append(connection: Connection, writer: str, seq: int, rows: Rows) -> None:
    """Writes one batch of traffic; nothing if there are no rows."""
    if rows:
        connection.execute(
            insert(journal).values(
                writer=writer,
                seq=seq,
                first_s=min(time_s for _, time_s, _ in rows),
                last_s=max(time_s for _, time_s, _ in rows),
                rows=_encode(rows),
            )
        )


def committed_seq(connection: Connection, writer: str) -> int:
    """The last batch of the writer that is in; 0 if none is."""
    return connection.scalar(select(writers.c.seq).where(writers.c.id == writer)) or 0


def commit_seq(connection: Connection, writer: str, seq: int, now_s: float) -> None:
    """Says that a batch is in, within the transaction that brings it."""
    statement = insert_into(connection, writers).values(id=writer, seq=seq, rolled_seq=seq - 1, seen_s=now_s)
    connection.execute(
        statement.on_conflict_do_update(index_elements=["id"], set_={"seq": seq, "seen_s": now_s})
    )


def roll_up(connection: Connection, writer: str) -> bool:
    """Adds what is new in a writer's journal to the coarser levels.

    Returns:
        Whether more is left to do.
    """
    row = connection.execute(
        select(writers.c.seq, writers.c.rolled_seq).where(writers.c.id == writer)
    ).one_or_none()
    if row is None or row.seq == row.rolled_seq:
        return False
    until = min(row.seq, row.rolled_seq + ROLLED_AT_ONCE)
    # Another process may be at the same: only one finds the mark where it was, and that one goes on.
    claimed = connection.execute(
        update(writers)
        .where(writers.c.id == writer, writers.c.rolled_seq == row.rolled_seq)
        .values(rolled_seq=until)
    )
    if claimed.rowcount != 1:
        return False
    blobs = connection.scalars(
        select(journal.c.rows).where(
            journal.c.writer == writer, journal.c.seq > row.rolled_seq, journal.c.seq <= until
        )
    )
    levels: dict[tuple[str, int, int], list[float]] = {}
    for blob in blobs:
        for model, entry in _decode(blob):
            add_to_levels(levels, model, entry)
    add_levels(connection, levels)
    return bool(until < row.seq)


def add_to_levels(levels: dict[tuple[str, int, int], list[float]], model: str, entry: Entry) -> None:
    """Adds an entry to the buckets (model, step_s, bucket) of every level above one second that can show it."""
    time_s, own_step_s, amounts = entry
    for step_s in STEPS[1:]:
        if own_step_s <= step_s:
            add_to_bucket(levels, (model, step_s, time_s // step_s), amounts, time_s, own_step_s)


def add_to_bucket(
    levels: dict[tuple[str, int, int], list[float]],
    key: tuple[str, int, int],
    amounts: Sequence[float],
    time_s: float,
    own_step_s: float,
) -> None:
    """Adds what came in [time_s, time_s + own_step_s) to a bucket (model, step_s, bucket): AMOUNTS, then SILENT.

    What is longer than a second does not tell in which of its seconds a request came.
    """
    step_s = key[1]
    bucket = levels.setdefault(key, [0, 0, 0, 0.0, 0.0, step_s, step_s])
    for i, amount in enumerate(amounts):
        bucket[i] += amount
    if amounts[0]:
        lead_s = int(time_s % step_s)
        silent = (lead_s, step_s - lead_s - 1) if own_step_s <= 1 else (0, 0)
        for i, silent_s in enumerate(silent, len(AMOUNTS)):
            bucket[i] = min(bucket[i], silent_s)


def add_levels(connection: Connection, levels: Mapping[tuple[str, int, int], list[float]]) -> None:
    """Adds buckets (model, step_s, bucket), each [*AMOUNTS, *SILENT], to the tables."""
    # In one order, so that two processes that do so can't wait for each other's rows.
    rows = [
        {
            "model": model,
            "step_s": step_s,
            "bucket": bucket,
            **dict(zip(AMOUNTS + SILENT, values, strict=True)),
        }
        for (model, step_s, bucket), values in sorted(levels.items())
    ]
    upsert(connection, traffic, rows, least(connection, traffic, SILENT), add=AMOUNTS)


def put_since(connection: Connection, since: Mapping[tuple[str, int], float]) -> None:
    """(model, step_s) -> since when it is known; what is known for longer stays."""
    statement = insert_into(connection, series).excluded
    earlier = case((statement.since_s < series.c.since_s, statement.since_s), else_=series.c.since_s)
    rows = [
        {"model": model, "step_s": step_s, "since_s": since_s}
        for (model, step_s), since_s in sorted(since.items())
    ]
    upsert(connection, series, rows, {"since_s": earlier})


def mend_since(connection: Connection) -> None:
    """A model of which more is known than can be, since a clock that was never set told of it, is known since its first
    request, or not at all."""
    wrong = series.c.since_s < EARLIEST_S
    for model in connection.scalars(select(series.c.model).where(wrong).distinct()).all():
        begin_s = traffic.c.bucket * traffic.c.step_s
        first_s = connection.scalar(
            select(func.min(begin_s)).where(traffic.c.model == model, begin_s >= EARLIEST_S)
        )
        if first_s is None:
            connection.execute(delete(series).where(series.c.model == model, wrong))
        else:
            connection.execute(update(series).where(series.c.model == model, wrong).values(since_s=first_s))


def read_since(connection: Connection) -> list[tuple[str, int, float]]:
    """(model, step_s, since_s) of all."""
    return [(row.model, row.step_s, row.since_s) for row in connection.execute(select(series))]


def read_seconds(connection: Connection, since_s: float) -> Iterator[tuple[str, Entry]]:
    """What came in lately, by all writers: the one-second level. Longer buckets are left out."""
    blobs = connection.scalars(
        select(journal.c.rows).where(journal.c.last_s >= int(since_s)).order_by(journal.c.last_s)
    )
    for blob in blobs:
        for model, entry in _decode(blob):
            if entry[1] == 1 and entry[0] >= since_s:
                yield model, entry


def read_levels(connection: Connection, model: str, now_s: float) -> dict[int, LevelArrays]:
    """The levels above one second of one model, without what is too old to be kept."""
    levels = {}
    for step_s in STEPS[1:]:
        rows = connection.execute(
            select(traffic.c.bucket, *(traffic.c[name] for name in AMOUNTS + SILENT))
            .where(traffic.c.model == model, traffic.c.step_s == step_s)
            .where(traffic.c.bucket >= int((now_s - KEPT_S[step_s]) // step_s))
            .order_by(traffic.c.bucket)
        ).all()
        levels[step_s] = level_arrays([tuple(row) for row in rows])
    return levels


def prune_journal(connection: Connection, now_s: float) -> None:
    """Deletes seconds that are older than their level is kept for and rolled up, and writers that are long gone."""
    rolled = select(writers.c.rolled_seq).where(writers.c.id == journal.c.writer).scalar_subquery()
    connection.execute(
        delete(journal).where(
            journal.c.last_s < int(now_s - KEPT_S[1]), journal.c.seq <= func.coalesce(rolled, 0)
        )
    )
    connection.execute(
        delete(writers).where(
            writers.c.seen_s < now_s - 86400.0,
            ~select(journal.c.seq).where(journal.c.writer == writers.c.id).exists(),
        )
    )


def prune_levels(connection: Connection, model: str, now_s: float) -> None:
    """Deletes buckets of one model that are older than their level is kept for."""
    for step_s in STEPS[1:]:
        connection.execute(
            delete(traffic).where(
                traffic.c.model == model,
                traffic.c.step_s == step_s,
                traffic.c.bucket < int((now_s - KEPT_S[step_s]) // step_s),
            )
        )


def append_rolled(
    connection: Connection, writer: str, rows: Iterable[tuple[tuple[str, int, int], Amounts]], now_s: float
) -> None:
    """Writes seconds of which the coarser levels know already, under the name of a writer that never comes back."""
    seq = 0
    pending = iter(rows)
    while batch := dict(islice(pending, _BLOB_ROWS)):
        seq += 1
        append(connection, writer, seq, batch)
    if seq:
        connection.execute(insert(writers).values(id=writer, seq=seq, rolled_seq=seq, seen_s=now_s))


def _encode(rows: Rows) -> bytes:
    models: dict[str, int] = {}
    columns: dict[str, list[float]] = defaultdict(list)
    for (model, time_s, step_s), amounts in rows.items():
        columns["model"].append(models.setdefault(model, len(models)))
        columns["time_s"].append(time_s)
        columns["step_s"].append(step_s)
        for name, amount in zip(AMOUNTS, amounts, strict=True):
            columns[name].append(amount)
    return zlib.compress(json.dumps({"models": list(models), **columns}, separators=(",", ":")).encode(), 1)


def _decode(blob: bytes) -> Iterator[tuple[str, Entry]]:
    columns = json.loads(zlib.decompress(blob))
    models = columns["models"]
    amounts = zip(*(columns[name] for name in AMOUNTS), strict=True)
    for model, time_s, step_s, row in zip(
        columns["model"], columns["time_s"], columns["step_s"], amounts, strict=True
    ):
        yield models[model], (time_s, step_s, row)
