"""One database, SQLite or PostgreSQL: connections, transactions, and what its errors mean.

SQLite runs with a write-ahead log and synchronous=FULL: what is committed survives a kill and a power cut.
PostgreSQL's own default (synchronous_commit = on) says the same.
"""

from __future__ import annotations

import logging
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Table, case, create_engine, event, insert, inspect, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import QueuePool
from sqlalchemy.schema import CreateColumn
from sqlalchemy.sql import ColumnElement

from autoscaling.live.store.schema import (
    SCHEMA_VERSION,
    SILENT,
    cold_starts,
    journal,
    meta,
    metadata,
    series,
    traffic,
    writers,
)
from autoscaling.ports import Clock
from deployments.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK_WAIT_S = 2.0
"""How long a statement waits for another process that writes."""
CONNECT_WAIT_S = 3
STATEMENT_LIMIT_S = 20
COPIED_AT_ONCE = 10_000
CHECKED_BYTES = 256 << 20
"""A SQLite file up to this size is read through when it is opened, to find damage; larger ones show it in use."""

_PICKING = (
    "sqlite:///path/of/a.db (four slashes for an absolute path) or postgresql+psycopg://user@host/database"
)
_BEGIN = re.compile(r"[^:@?=]*(://)?")
"""What of a text can be no password."""
_SUFFIXES = ("-wal", "-shm", "")
_DAMAGED = frozenset({11, 26})  # SQLITE_CORRUPT, SQLITE_NOTADB: sqlite3 names them only from Python 3.11 on


class NewerSchema(ConfigError):
    """The database was written by a newer Relight."""


class Database:
    """Where connections come from. Thread-safe; connects when first asked to, so making one can't fail for long."""

    def __init__(self, url: str, clock: Clock) -> None:
        self.url, self.path = parse_url(url)
        self.shown_url = shown(self.url)
        self._clock = clock
        self._engine = self._make_engine()
        self._inode: int | None = None
        self.aside: Path | None = None
        """Where the damaged file went that was moved last."""

    def prepare(self) -> str | None:
        """Creates the tables where they are missing.

        Returns:
            What must be said of it: that a damaged SQLite file was moved aside. None if there is nothing to say.

        Raises:
            NewerSchema: and nothing was touched.
            SQLAlchemyError, OSError: the database can't be reached.
        """
        said = None
        if self.path is not None:
            try:
                _look_at(self.path)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                said = self.move_aside(str(error))
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.write() as connection:
            if inspect(connection).has_table(meta.name):
                _refuse_newer(connection.scalar(_VERSION), self.shown_url)
            metadata.create_all(connection)
            _add_columns(connection, traffic, SILENT)
            version = {"key": "schema_version", "value": str(SCHEMA_VERSION)}
            upsert(connection, meta, [version])
        if self.path is not None:
            self._inode = self.path.stat().st_ino
        return said

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database and holds up nobody."""
        with self._engine.connect() as connection:
            if self.path is None:
                connection.execution_options(isolation_level="REPEATABLE READ")
            else:
                connection.execution_options(relight_begin="BEGIN")
            with connection.begin():
                yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is in when the block ends without an error, and else never was."""
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection for several transactions, on which temporary tables last."""
        with self._engine.connect() as connection:
            yield connection

    def is_damaged(self, error: BaseException) -> bool:
        """Whether the error says that the SQLite file itself is broken, or is gone from its place."""
        if self.path is None:
            return False
        original = error.orig if isinstance(error, DBAPIError) else error
        return isinstance(original, sqlite3.DatabaseError) and _is_damage(original)

    def is_gone(self) -> bool:
        """Whether the SQLite file that was prepared is no longer at its path: what is written to it would be lost."""
        if self.path is None or self._inode is None:
            return False
        try:
            return self.path.stat().st_ino != self._inode
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def move_aside(self, why: str) -> str:
        """Renames the SQLite file and its logs to *.corrupt-<time>, so that a new one can be begun at its path.

        Returns:
            What to tell people.
        """
        assert self.path is not None
        self.dispose()
        stamp = datetime.fromtimestamp(self._clock.now_s(), UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        aside = self.path.with_name(f"{self.path.name}.corrupt-{stamp}")
        for suffix in _SUFFIXES:
            with suppress(FileNotFoundError):
                self.path.with_name(self.path.name + suffix).rename(aside.with_name(aside.name + suffix))
        self.aside = aside
        said = f"{self.path} was damaged ({why}). It was moved to {aside}, and a new database was begun."
        logger.error(said)
        return said

    def clear_leftovers(self) -> None:
        """Removes the logs of a SQLite file that is gone; a new file must not be read together with them."""
        assert self.path is not None
        self.dispose()
        for suffix in _SUFFIXES:
            if suffix:
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def dispose(self) -> None:
        """Closes every connection that is not in use; the next use makes new ones."""
        self._engine.dispose()

    def _make_engine(self) -> Engine:
        if self.path is not None:
            engine = create_engine(
                self.url,
                poolclass=QueuePool,
                connect_args={"timeout": LOCK_WAIT_S, "check_same_thread": False},
            )
            event.listen(engine, "connect", _set_up_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine
        return create_engine(
            self.url,
            pool_pre_ping=True,
            pool_size=4,
            pool_timeout=LOCK_WAIT_S,
            connect_args={
                "connect_timeout": CONNECT_WAIT_S,
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 1000 * STATEMENT_LIMIT_S,
                "options": f"-c statement_timeout={STATEMENT_LIMIT_S}s -c lock_timeout={LOCK_WAIT_S:.0f}s",
            },
        )


_VERSION = select(meta.c.value).where(meta.c.key == "schema_version")


def shown(url: URL) -> str:
    """What people may see of it. Its password may be in its query too, and with an @ in it, in what comes after."""
    if url.get_backend_name() != "sqlite" and "@" in f"{url.host}{url.database}":
        return f"{url.drivername}://***"
    return url.set(query={}).render_as_string(hide_password=True)


def shown_text(text: str) -> str:
    """The same of a text, whether or not it is a URL. Of one that is none, anything may be the password."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        begin = _BEGIN.match(text)
        assert begin is not None
        return text if begin[0] == text else f"{begin[0]}***"
    # As it was written where that may be seen, and not as it is quoted.
    return text if shown(url) == url.render_as_string(hide_password=False) else shown(url)


def parse_url(text: str) -> tuple[URL, Path | None]:
    """The URL of a database that a store can use, and its file if it is SQLite. Raises ConfigError."""
    said = shown_text(text)
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        # Without its cause, which cites the text.
        raise ConfigError(f"store: {said!r} is not a database URL. Expected {_PICKING}.") from None
    if url.drivername in {"postgresql", "postgres"}:
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername in {"sqlite", "sqlite+pysqlite"}:
        if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
            raise ConfigError(
                f"store: {said!r} names no file, and a store must last. Expected sqlite:///path/of/a.db."
            )
        try:
            path = Path(url.database).expanduser()
        except RuntimeError as error:
            raise ConfigError(f"store: {said!r} begins with a home folder that is not known here.") from error
        if _is_folder(path):
            raise ConfigError(
                f"store: {said!r} names a directory. Expected a file, as in {said.rstrip('/')}/relight.db."
            )
        return url.set(drivername="sqlite", database=str(path)), path
    if url.drivername == "postgresql+psycopg":
        if not url.database:
            raise ConfigError(f"store: {shown(url)!r} names no database. Expected {_PICKING}.")
        return url, None
    raise ConfigError(f"store: {url.drivername!r} in {said!r} is not supported. Expected {_PICKING}.")


def _is_folder(path: Path) -> bool:
    # What may not be looked at here may still be right where the store runs.
    with suppress(OSError):
        return path.is_dir()
    return False


def copied(path: Path, to: Path) -> bool:
    """Copies a SQLite file as it is now, without changing it. False, and nothing is copied, if it holds no store.

    Raises sqlite3.Error if it is damaged or can't be read, NewerSchema if it is newer.
    """
    _look_at(path)
    with closing(_reading(path)) as connection, closing(sqlite3.connect(to)) as copy:
        if not _holds_store(connection):
            return False
        connection.backup(copy)
    return True


def copied_history(url: str, to: Path, clock: Clock) -> bool:
    """Copies traffic and cold starts of a store, as they are now, to a new SQLite file, without changing the store.

    False, and there is nothing to use in the file, if the database holds none. Raises SQLAlchemyError if it can't be
    read, NewerSchema if it is newer.
    """
    source, copy = Database(url, clock), Database(f"sqlite:///{to}", clock)
    try:
        with source.read() as connection:
            found = inspect(connection)
            if not found.has_table(meta.name):
                return False
            _refuse_newer(connection.scalar(_VERSION), source.shown_url)
            copy.prepare()
            with copy.write() as writing:
                for table in (writers, journal, traffic, series, cold_starts):
                    there = {column["name"] for column in found.get_columns(table.name)}
                    asked = select(*(column for column in table.c if column.name in there))
                    rows = connection.execute(asked.execution_options(yield_per=COPIED_AT_ONCE))
                    for some in rows.mappings().partitions():
                        writing.execute(insert(table), [dict(row) for row in some])
    finally:
        source.dispose()
        copy.dispose()
    return True


def _reading(path: Path) -> sqlite3.Connection:
    # Without a write-ahead log the file is all there is, and SQLite needn't make one to read it.
    alone = "" if path.with_name(f"{path.name}-wal").exists() else "&immutable=1"
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro{alone}", uri=True, timeout=LOCK_WAIT_S)


def _holds_store(connection: sqlite3.Connection) -> bool:
    found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (meta.name,)).fetchone()
    return found is not None


def _look_at(path: Path) -> None:
    """Reads a SQLite file without changing it: sqlite3.DatabaseError if it is damaged, NewerSchema if it is newer."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with closing(_reading(path)) as connection:
        if _holds_store(connection):
            row = connection.execute(f"SELECT value FROM {meta.name} WHERE key = 'schema_version'").fetchone()
            _refuse_newer(row[0] if row else None, str(path))
        if path.stat().st_size <= CHECKED_BYTES:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                error = sqlite3.DatabaseError(re.sub(r"\s+", " ", found))
                error.sqlite_errorcode = min(_DAMAGED)
                raise error


def _is_damage(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def _refuse_newer(found: str | None, where: str) -> None:
    # What is no number is of a Relight that this one knows nothing of, too.
    if found is not None and not (str(found).isdecimal() and int(found) <= SCHEMA_VERSION):
        raise NewerSchema(
            f"store: {where} has schema version {found}, and this Relight knows versions up to {SCHEMA_VERSION}. "
            "Use the Relight that wrote it, or another database. Nothing was changed."
        )


def _add_columns(connection: Connection, table: Table, names: Sequence[str]) -> None:
    """Those that a table lacks which an earlier Relight made."""
    there = {column["name"] for column in inspect(connection).get_columns(table.name)}
    # Two processes may be at the same.
    unless = "" if connection.dialect.name == "sqlite" else "IF NOT EXISTS "
    for name in names:
        if name not in there:
            column = CreateColumn(table.c[name]).compile(dialect=connection.dialect)
            connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {unless}{column}")


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # sqlite3 begins no transactions: _begin_sqlite does
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute(f"PRAGMA journal_size_limit={64 << 20}")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that begins as a reader and then writes fails at once where another has written since.
    connection.exec_driver_sql(connection.get_execution_options().get("relight_begin", "BEGIN IMMEDIATE"))


def upsert(
    connection: Connection,
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    changes: Mapping[str, ColumnElement[Any]] | None = None,
    *,
    add: Sequence[str] = (),
) -> None:
    """Inserts rows; one whose primary key is there already is replaced, or changed as `changes` and `add` say.

    Args:
        changes: column -> expression over what is there (the table's columns); the new values are `excluded(table)`.
        add: columns of which the new value is added to what is there.
    """
    if not rows:
        return
    statement = insert_into(connection, table)
    new = statement.excluded
    if changes is None and not add:
        keys = {column.name for column in table.primary_key}
        changes = {name: new[name] for name in rows[0] if name not in keys}
    sums = {name: table.c[name] + new[name] for name in add}
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=list(table.primary_key), set_={**(changes or {}), **sums}
        ),
        list(rows),
    )


def least(connection: Connection, table: Table, names: Sequence[str]) -> dict[str, ColumnElement[Any]]:
    """For `upsert`: of each of these columns the least of what is there and what is new."""
    new = insert_into(connection, table).excluded
    return {name: case((new[name] < table.c[name], new[name]), else_=table.c[name]) for name in names}


def put_missing(connection: Connection, table: Table, row: Mapping[str, Any]) -> None:
    """Inserts a row unless its primary key is there already."""
    connection.execute(insert_into(connection, table).on_conflict_do_nothing(), [dict(row)])


def insert_into(connection: Connection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that knows ON CONFLICT, which both databases have but not the SQL standard."""
    if connection.dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


FAILURES = (SQLAlchemyError, OSError, sqlite3.Error)
"""What a database that is down, full, locked or damaged raises."""
