"""History that is imported: gathered in a temporary table, then merged in one short transaction.

The temporary table holds what memory need not, and nobody's writing waits while a large file is read.
"""

from __future__ import annotations

import math
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from sqlalchemy import Column, Connection, MetaData, Table, select, text
from sqlalchemy.schema import DropTable

from autoscaling.live.store import journal
from autoscaling.live.store.database import insert_into, least, upsert
from autoscaling.live.store.mirror import KEPT_S, STEPS
from autoscaling.live.store.schema import AMOUNTS, SILENT, imports, traffic
from autoscaling.traffic import LONGEST_WINDOW_S
from deployments.errors import ConfigError

IN_MEMORY = 50_000
"""Buckets that are added up in memory before they go to the temporary table."""
AHEAD_S = 60.0

Row = tuple[str, float, int, int, int, float]

staging = Table(
    "relight_staging",
    MetaData(),
    *(
        Column(column.name, column.type, primary_key=column.primary_key, autoincrement=False)
        for column in traffic.c
    ),
    prefixes=["TEMPORARY"],
)


@dataclass(slots=True)
class Staged:
    """An import under way. ConfigError where no level can show what came in so many seconds."""

    now_s: float
    bucket_s: float
    taken: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    first_s: dict[str, float] = field(default_factory=dict)
    """model -> its first time."""

    def __post_init__(self) -> None:
        if not 0 < self.bucket_s <= LONGEST_WINDOW_S:
            raise ConfigError(
                f"import: bucket_s is {self.bucket_s:g}. Expected more than 0 and at most {LONGEST_WINDOW_S:g}, twice "
                "the coarsest bucket of the history."
            )

    @property
    def levels(self) -> dict[int, int]:
        """step_s of each level that this import can show -> over how many of its buckets a row is spread."""
        return {
            step_s: max(1, math.ceil(self.bucket_s / step_s))
            for step_s in STEPS
            if self.bucket_s <= 2 * step_s
        }


def stage(connection: Connection, rows: Iterable[Row], staged: Staged) -> None:
    """Gathers rows in the temporary table of this connection."""
    with connection.execution_options(relight_begin="BEGIN").begin():
        # The pool may have kept it on this connection, from an import before.
        connection.execute(DropTable(staging, if_exists=True))
        staging.create(connection, checkfirst=False)
    buckets: dict[tuple[str, int, int], list[float]] = {}
    for row in rows:
        refusal = _refusal(row, staged)
        if refusal is not None:
            staged.refused[refusal] += 1
            continue
        _add(buckets, row, staged)
        if len(buckets) >= IN_MEMORY:
            _put(connection, buckets)
            buckets = {}
    _put(connection, buckets)


def merge(connection: Connection, staged: Staged, source: str) -> int:
    """Adds what was gathered to the history, within the caller's transaction; nothing if `source` is in already."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL statement_timeout = 0"))
    if source:
        row = {"id": source, "made_s": staged.now_s, "rows": staged.taken}
        new = insert_into(connection, imports).on_conflict_do_nothing().values(**row)
        if connection.execute(new).rowcount == 0:
            return 0
    columns = [column.name for column in traffic.c]
    gathered = select(*(staging.c[name] for name in columns)).where(staging.c.step_s > 1)
    ordered = gathered.order_by(*(staging.c[name] for name in columns[:3]))
    statement = insert_into(connection, traffic).from_select(columns, ordered)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=list(traffic.primary_key),
            set_={
                **{name: traffic.c[name] + statement.excluded[name] for name in AMOUNTS},
                **least(connection, traffic, SILENT),
            },
        )
    )
    seconds = connection.execute(
        select(staging.c.model, staging.c.bucket, *(staging.c[name] for name in AMOUNTS)).where(
            staging.c.step_s == 1
        )
    )
    rows = (((row[0], row[1], 1), (row[2], row[3], row[4], row[5], row[6])) for row in seconds)
    journal.append_rolled(connection, f"import-{uuid.uuid4().hex}", rows, staged.now_s)
    known = {
        (model, step_s): first_s for model, first_s in staged.first_s.items() for step_s in staged.levels
    }
    journal.put_since(connection, known)
    return staged.taken


def imported(connection: Connection, source: str) -> float | None:
    """When `source` was imported; None if it was not."""
    return connection.scalar(select(imports.c.made_s).where(imports.c.id == source))


def _refusal(row: Row, staged: Staged) -> str | None:
    model, time_s, *amounts = row
    if not model or "\0" in model or not model.isprintable():
        return "import: no model's name"
    if not all(0 <= number < 1 << 40 for number in (time_s, *amounts)):
        return "import: negative or not finite"
    if time_s > staged.now_s + AHEAD_S:
        return "import: from the future"
    if time_s < staged.now_s - KEPT_S[STEPS[-1]]:
        return "import: older than anything is kept"
    return None


def _add(buckets: dict[tuple[str, int, int], list[float]], row: Row, staged: Staged) -> None:
    model, time_s, arrivals, input_tokens, output_tokens, busy_s = row
    staged.taken += 1
    staged.first_s[model] = min(time_s, staged.first_s.get(model, time_s))
    if not (arrivals or input_tokens or output_tokens or busy_s):
        return
    for step_s, parts in staged.levels.items():
        if time_s < staged.now_s - KEPT_S[step_s]:
            continue
        for part in range(parts):
            counts = (arrivals, input_tokens, output_tokens)
            shares = [count * (part + 1) // parts - count * part // parts for count in counts]
            if any(shares) or busy_s:
                key = (model, step_s, int(time_s // step_s) + part)
                journal.add_to_bucket(buckets, key, (*shares, busy_s / parts), time_s, staged.bucket_s)


def _put(connection: Connection, buckets: dict[tuple[str, int, int], list[float]]) -> None:
    rows = [
        {
            "model": model,
            "step_s": step_s,
            "bucket": bucket,
            **dict(zip(AMOUNTS + SILENT, values, strict=True)),
        }
        for (model, step_s, bucket), values in buckets.items()
    ]
    with connection.execution_options(relight_begin="BEGIN").begin():
        upsert(connection, staging, rows, least(connection, staging, SILENT), add=AMOUNTS)
