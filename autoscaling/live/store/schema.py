"""The tables. All names begin with relight_, since a PostgreSQL database may be shared with others."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)

SCHEMA_VERSION = 2
"""Raised by every change of the tables that an older Relight could not read or would damage."""

metadata = MetaData()

SILENT = ("lead_s", "trail_s")
"""Whole seconds of a bucket before its first request's, and after its last one's. 0 says nothing."""

AMOUNTS = ("arrivals", "input_tokens", "output_tokens", "busy_s", "waited_s")
"""What is counted of traffic; requests, tokens and request-seconds. The order is that of every tuple of amounts."""

meta = Table(
    "relight_meta",
    metadata,
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)
"""schema_version; plan; revision, which changes when history or overrides are changed by another process."""

writers = Table(
    "relight_writers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("rolled_seq", BigInteger, nullable=False),
    Column("seen_s", Double, nullable=False),
)
"""One row for each process that writes: its last batch that is in, and the last whose traffic is rolled up."""

journal = Table(
    "relight_traffic_journal",
    metadata,
    Column("writer", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("first_s", BigInteger, nullable=False),
    Column("last_s", BigInteger, nullable=False),
    Column("rows", LargeBinary, nullable=False),
    Index("relight_traffic_journal_last", "last_s"),
)
"""Traffic as it came in, one row a commit: the one-second level, and the source that the others are rolled up from."""

traffic = Table(
    "relight_traffic",
    metadata,
    Column("model", Text, primary_key=True),
    Column("step_s", Integer, primary_key=True, autoincrement=False),
    Column("bucket", BigInteger, primary_key=True, autoincrement=False),
    Column("arrivals", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("busy_s", Double, nullable=False),
    Column("waited_s", Double, nullable=False),
    *(Column(name, Integer, nullable=False, server_default=text("0")) for name in SILENT),
    sqlite_with_rowid=False,
)
"""The levels above one second. A bucket covers [bucket * step_s, (bucket + 1) * step_s)."""

series = Table(
    "relight_series",
    metadata,
    Column("model", Text, primary_key=True),
    Column("step_s", Integer, primary_key=True, autoincrement=False),
    Column("since_s", Double, nullable=False),
    sqlite_with_rowid=False,
)
"""Since when a model's traffic is known, on each level. Without a row it isn't. With step_s 0: since when the model is
watched, which tells what was imported from what was seen here."""

imports = Table(
    "relight_imports",
    metadata,
    Column("id", Text, primary_key=True),
    Column("made_s", Double, nullable=False),
    Column("rows", BigInteger, nullable=False),
)
"""What was imported, by the name that the import was given, so that none is counted twice."""

decisions = Table(
    "relight_decisions",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("source", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("made_s", Double, nullable=False),
    Column("replicas", Integer),
    Column("rung", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("until_s", Double),
    Column("policy", Text, nullable=False),
    Column("numbers", Text, nullable=False),
    Column("clamps", Text, nullable=False),
    Index("relight_decisions_model", "model", "made_s"),
    Index("relight_decisions_made", "made_s"),
    sqlite_autoincrement=True,
)

cold_starts = Table(
    "relight_cold_starts",
    metadata,
    Column("engine_id", Text, primary_key=True),
    Column("ready_s", Double, primary_key=True),
    Column("model", Text, nullable=False),
    Column("begun_s", Double, nullable=False),
    Column("total_s", Double, nullable=False),
    Column("kind", Text, nullable=False),
    Column("node", Text, nullable=False),
    Column("rung", Text, nullable=False),
    Column("prewarmed", Integer, nullable=False),
    Column("phases", Text, nullable=False),
    Index("relight_cold_starts_ready", "ready_s"),
)

prewarms = Table(
    "relight_prewarms",
    metadata,
    Column("id", Text, primary_key=True),
    Column("model", Text, nullable=False),
    Column("begun_s", Double, nullable=False),
    Column("reason", Text, nullable=False),
    Column("replicas", Integer, nullable=False),
    Column("rung", Text, nullable=False),
    Column("ready_s", Double),
    Column("hit_s", Double),
    Column("ended_s", Double),
    Column("cost_gpu_s", Double, nullable=False),
    Column("spared_requests", BigInteger, nullable=False),
    Column("spared_wait_s", Double, nullable=False),
    Index("relight_prewarms_begun", "begun_s"),
)

overrides = Table(
    "relight_overrides",
    metadata,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("model", Text),
    Column("value", Text, nullable=False),
    Column("who", Text, nullable=False),
    Column("made_s", Double, nullable=False),
    Column("until_s", Double),
    Column("undone_s", Double),
    Column("undone_by", Text),
)

states = Table(
    "relight_states",
    metadata,
    Column("model", Text, primary_key=True),
    Column("state", Text, nullable=False),
)

usage = Table(
    "relight_usage",
    metadata,
    Column("day", Text, primary_key=True),
    Column("source", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("cold_requests", BigInteger, nullable=False),
    Column("waited_s", Double, nullable=False),
    Column("cold_starts", BigInteger, nullable=False),
)

usage_gpu = Table(
    "relight_usage_gpu",
    metadata,
    Column("day", Text, primary_key=True),
    Column("source", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("rung", Text, primary_key=True),
    Column("gpu_s", Double, nullable=False),
)
