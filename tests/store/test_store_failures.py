"""Databases that are full, locked, damaged, gone, newer or wrong: served from memory, said, and recovered from."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from autoscaling.core.types import State
from autoscaling.live.clock import SystemClock
from autoscaling.live.records import TrafficRow
from autoscaling.live.store import Store, StoreUnavailable
from autoscaling.live.store.schema import SCHEMA_VERSION
from deployments.errors import ConfigError
from tests.store.lab import NOON, FakeClock, Open, decision, second, totals
from tests.store.postgres import PostgresServer
from tests.store.test_store_records import COLD, OVERRIDE, PREWARM

DAY = 86400.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "relight.db"


@pytest.fixture
def lite(path: Path, clock: FakeClock) -> Iterator[Store]:
    """A store on SQLite."""
    store = Store.open(f"sqlite:///{path}", clock=clock)
    yield store
    store.close()


def reopened(path: Path, clock: FakeClock) -> Store:
    return Store.open(f"sqlite:///{path}", clock=clock)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("relight.db", "not a database URL"),
        ("mysql://root@host/db", "mysql"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:////tmp", "names a directory"),
        ("postgresql+psycopg://user:secret@host", "names no database"),
        ("", "not a database URL"),
        ("postgresql://user:secret@host:port/db", "'postgresql://.*' is not a database URL"),
        ("postgresql://user:secret", "'postgresql://.*' is not a database URL"),
        ("host=db user=u password=secret", "not a database URL"),
        ("user:secret@host/db", "not a database URL"),
        ("postgresql://user:p@secret@host", "names no database"),
        ("postgresql+psycopg://user@host?password=secret", "names no database"),
        ("mysql://host/db?password=secret", "mysql"),
    ],
)
def test_a_url_that_is_none_is_an_error_that_says_what_would_be_right(
    url: str, words: str, clock: FakeClock
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Store.open(url, clock=clock)
    assert "sqlite:///" in caught.value.message
    # Nor is it among its causes, which logs show.
    shown = "".join(traceback.format_exception(caught.value))
    assert "secret" not in shown


@pytest.mark.parametrize("url", ["user:secret@127.0.0.1:9/db", "127.0.0.1:9/db?user=u&password=secret"])
def test_a_password_is_nowhere_shown(
    url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in health, which the status shows without a token, nor in what a reader is told or the log."""
    store = Store.open(f"postgresql://{url}", clock=clock)
    assert not store.health()["ok"]
    assert store.health()["kind"] == "postgresql"
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:9/db can't be reached") as caught:
        store.usage("2024-01-01", "2024-01-02")
    store.close()
    for said in (str(store.health()), caught.value.message, caplog.text):
        assert "secret" not in said


@pytest.mark.parametrize("version", ["99", "two"])
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_newer_schema_is_refused_and_not_touched(
    database: str, version: str, request: pytest.FixtureRequest, path: Path, clock: FakeClock
) -> None:
    url = f"sqlite:///{path}" if database == "sqlite" else request.getfixturevalue("postgres").new_database()
    Store.open(url, clock=clock).close()
    change = f"UPDATE relight_meta SET value = '{version}' WHERE key = 'schema_version'"
    if database == "sqlite":
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(change)
            connection.execute("DROP TABLE relight_decisions")
            connection.commit()
        before = path.read_bytes()
    else:
        with psycopg.connect(url.replace("+psycopg", "")) as plain:
            plain.execute(change)
            plain.execute("DROP TABLE relight_decisions")
    with pytest.raises(ConfigError, match=rf"version {version}.*up to {SCHEMA_VERSION}"):
        Store.open(url, clock=clock)
    if database == "sqlite":
        assert path.read_bytes() == before
        assert [file.name for file in path.parent.iterdir()] == [path.name]
    else:
        with psycopg.connect(url.replace("+psycopg", "")) as plain:
            found = plain.execute("SELECT to_regclass('relight_decisions')").fetchone()
        assert found == (None,)


def fill(store: Store) -> None:
    """One of everything."""
    store.add_traffic([second("m", NOON - 2 * DAY, 3), TrafficRow("m", int(NOON) - 9, 2, 10, 20, 1.5, 0.5)])
    store.add_traffic([second("n", NOON - 90, 4)])
    store.add_decisions([decision("m", NOON)])
    store.add_cold_start(COLD)
    store.put_prewarm(PREWARM)
    store.put_states({"m": State("kpa", {"a": 1.0})})
    store.put_plan("plan")
    store.put_override(OVERRIDE)
    assert store.flush()


def damage(path: Path, *, header: bool) -> None:
    """Overwrites the middle of the file, or its beginning."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(0 if header else 4096)
        file.write(os.urandom(4096) if header else os.urandom(size - 4096))


@pytest.mark.parametrize("header", [True, False])
def test_a_damaged_file_is_moved_aside_said_and_begun_anew(
    path: Path, clock: FakeClock, header: bool
) -> None:
    with closing(reopened(path, clock)) as store:
        fill(store)
    damage(path, header=header)
    kept = path.read_bytes()
    store = reopened(path, clock)
    aside = [file for file in path.parent.iterdir() if file.name.startswith("relight.db.corrupt-")]
    assert [file.read_bytes() for file in aside] == [kept]
    assert store.health()["ok"]
    (notice,) = store.health()["notices"]
    assert str(aside[0]) in notice and "overrides could not be read" in notice
    store.add_traffic([second("m", NOON)])
    assert store.flush()
    store.close()
    again = reopened(path, clock)
    assert totals(again, "m", NOON) == [1, 1, 1, 1]
    assert again.health()["ok"]
    again.close()


def test_overrides_are_read_from_a_file_that_is_damaged_elsewhere(path: Path, clock: FakeClock) -> None:
    with closing(reopened(path, clock)) as store:
        fill(store)
        store.add_decisions([decision("m", NOON + i, i) for i in range(3000)])
        store.flush()
    with closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'relight_decisions_model'"
        ).fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(os.urandom(4096))
    store = reopened(path, clock)
    assert "1 overrides were read from it" in store.health()["notices"][0]
    assert store.overrides(NOON) == [OVERRIDE]
    store.close()
    again = reopened(path, clock)
    assert again.overrides(NOON) == [OVERRIDE]
    again.close()


def test_a_file_that_is_damaged_in_use_is_begun_anew_with_what_is_in_memory(
    path: Path, lite: Store, clock: FakeClock
) -> None:
    fill(lite)
    before = totals(lite, "m", NOON)
    damage(path, header=False)
    lite.add_traffic([second("m", NOON - 1, 5)])
    lite.put_prewarm(replace(PREWARM, id="p2"))
    assert lite.flush()
    assert lite.health()["ok"] and lite.health()["notices"]
    for store in (lite, reopened(path, clock)):
        assert totals(store, "m", NOON) == [count + 5 for count in before]
        assert totals(store, "n", NOON) == [4, 4, 4, 4]
        assert store.history("m", NOON - 60, NOON, 60)[0]["waited_s"] == 0.5
        assert (store.states(), store.plan(), store.overrides(NOON)) == (
            {"m": State("kpa", {"a": 1.0})},
            "plan",
            [OVERRIDE],
        )
        assert [row.id for row in store.prewarms("m", 0)] == ["p2"]


def test_a_file_that_is_removed_in_use_is_begun_anew_with_what_is_in_memory(
    path: Path, lite: Store, clock: FakeClock
) -> None:
    fill(lite)
    before = totals(lite, "m", NOON)
    path.unlink()
    lite.add_traffic([second("m", NOON - 1)])
    assert lite.flush()
    assert "removed" in lite.health()["notices"][0]
    assert totals(reopened(path, clock), "m", NOON) == [count + 1 for count in before]
    assert reopened(path, clock).overrides(NOON) == [OVERRIDE]


def test_a_backup_that_is_put_in_the_files_place_is_used(path: Path, lite: Store, clock: FakeClock) -> None:
    lite.add_traffic([second("m", NOON - 100, 7)])
    lite.flush()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(path, path.with_name("backup"))
    lite.add_traffic([second("m", NOON - 50, 1)])
    lite.flush()
    for name in ("relight.db", "relight.db-wal", "relight.db-shm"):
        path.with_name(name).unlink(missing_ok=True)
    path.with_name("backup").rename(path)
    lite.add_traffic([second("m", NOON - 1, 2)])
    assert lite.flush()
    assert "replaced" in lite.health()["notices"][0]
    for store in (lite, reopened(path, clock)):
        assert totals(store, "m", NOON) == [9, 9, 9, 9]


def test_what_can_not_be_used_in_the_files_place_is_told_once(path: Path, lite: Store) -> None:
    """It is met again at each attempt, for as long as it is there."""
    lite.add_traffic([second("m", NOON - 2)])
    lite.flush()
    for name in ("relight.db", "relight.db-wal", "relight.db-shm"):
        path.with_name(name).unlink(missing_ok=True)
    path.mkdir()
    assert not any(lite.flush(0) for _ in range(5))
    assert [notice.count("replaced") for notice in lite.health()["notices"]] == [1]
    path.rmdir()


def test_a_locked_file_is_waited_out(path: Path, lite: Store, clock: FakeClock) -> None:
    lite.add_traffic([second("m", NOON - 2)])
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert not lite.flush(0)
        assert "locked" in lite.health()["error"]
        with pytest.raises(StoreUnavailable, match="locked"):
            lite.put_override(OVERRIDE)
        assert lite.overrides(NOON) == []
        assert totals(lite, "m", NOON) == [1, 1, 1, 1]
        assert lite.health()["pending"] == 1
        other.execute("ROLLBACK")
    assert lite.flush(0)
    lite.put_override(OVERRIDE)
    assert lite.health()["ok"]
    assert totals(reopened(path, clock), "m", NOON) == [1, 1, 1, 1]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where root may mount one."""
    at = tmp_path / "disk"
    at.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(at)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield at
    subprocess.run(["umount", "-l", str(at)], check=True)


def test_a_full_disk_is_waited_out(full_disk: Path, clock: FakeClock) -> None:
    store = Store.open(f"sqlite:///{full_disk}/relight.db", clock=clock)
    fill(store)
    (full_disk / "ballast").write_bytes(b"")
    with pytest.raises(OSError, match="No space"), (full_disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    given = 0
    while store.flush(0):
        store.add_traffic([second("m", NOON - given % 500)])
        store.add_decisions([decision("m", NOON, numbers={"a" * 500: 1.0})] * 10)
        given += 1
    assert "full" in store.health()["error"] or "I/O" in store.health()["error"]
    assert totals(store, "m", NOON)[0] == 2 + given
    assert store.plan() == "plan"
    with pytest.raises(StoreUnavailable):
        store.put_override(replace(OVERRIDE, id="o2", value={"a": "b" * 200_000}))

    (full_disk / "ballast").unlink()
    assert store.flush()
    assert store.health()["ok"] and store.health()["dropped"] == 0
    store.close()
    again = Store.open(f"sqlite:///{full_disk}/relight.db", clock=clock)
    assert totals(again, "m", NOON)[0] == 2 + given
    assert len(again.decisions("m", 0, NOON, 100_000)) == 1 + 10 * given
    again.close()


def test_a_file_that_may_not_grow_is_waited_out(tmp_path: Path) -> None:
    """As a full disk, for where nothing can be mounted: a limit on the size of files."""
    script = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        from tests.store.lab import FakeClock, NOON, decision, second, totals
        from autoscaling.live.store import Store
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = Store.open(f"sqlite:///{sys.argv[1]}/a.db", clock=FakeClock())
        store.add_traffic([second("m", NOON - 1)])
        assert store.flush(0)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = max(file.stat().st_size for file in Path(sys.argv[1]).iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        store.add_traffic([second("m", NOON - 2)])
        store.add_decisions([decision("m", NOON, numbers={"a" * 1000: 1.0})] * 100)
        assert not store.flush(0)
        assert store.health()["error"], store.health()
        assert totals(store, "m", NOON) == [2, 2, 2, 2]
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert store.flush(0), store.health()
        assert len(store.decisions("m", 0, NOON)) == 100
        assert store.health()["pending"] == 0
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_directory_that_can_not_be_made_is_no_crash(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "file").write_text("")
    store = Store.open(f"sqlite:///{tmp_path}/file/relight.db", clock=clock)
    store.add_traffic([second("m", NOON)])
    assert not store.health()["ok"]
    assert totals(store, "m", NOON) == [1, 1, 1, 1]
    with pytest.raises(StoreUnavailable):
        store.decisions("m", 0, NOON)
    (tmp_path / "file").unlink()
    assert store.flush()
    assert totals(reopened(tmp_path / "file" / "relight.db", clock), "m", NOON) == [1, 1, 1, 1]
    store.close()


def test_what_waits_is_bounded_decisions_go_first_and_traffic_only_loses_detail(
    tmp_path: Path, clock: FakeClock
) -> None:
    (tmp_path / "file").write_text("")
    store = Store.open(f"sqlite:///{tmp_path}/file/relight.db", clock=clock, max_pending=1000)
    store.put_prewarm(PREWARM)
    for minute in range(120):
        for i in range(20):
            store.add_traffic([TrafficRow("m", int(clock.now_s()) - i, 1, 2, 3, 0.5, 0.25)])
            store.add_decisions([decision("m", clock.now_s() - i, minute)])
        assert store.health()["pending"] <= 1000
        clock.pass_time(60)
    (tmp_path / "file").unlink()
    assert store.flush()
    health = store.health()
    assert (
        set(health["dropped_by"]) == {"decisions"} and health["dropped"] == health["dropped_by"]["decisions"]
    )
    replicas = [row["replicas"] for row in store.decisions("m", 0, clock.now_s(), 10_000)]
    assert len(replicas) == 2400 - health["dropped"]
    assert replicas[-1] == 119 and min(replicas) > 0
    again = reopened(tmp_path / "file" / "relight.db", clock)
    for at in (store, again):
        assert totals(at, "m", clock.now_s())[3] == 2400
        assert sum(row["waited_s"] for row in at.history("m", NOON - 60, clock.now_s(), 3600)) == 600
    assert again.prewarms("m", 0) == [PREWARM]


def test_at_last_traffic_is_dropped_and_counted_too(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "file").write_text("")
    store = Store.open(f"sqlite:///{tmp_path}/file/relight.db", clock=clock, max_pending=50)
    store.add_traffic([second(f"m{i}", NOON) for i in range(200)])
    assert store.health()["pending"] <= 50
    (tmp_path / "file").unlink()
    assert store.flush()
    again = reopened(tmp_path / "file" / "relight.db", clock)
    kept = sum(totals(again, f"m{i}", NOON)[3] for i in range(200))
    assert kept == 200 - store.health()["dropped_by"]["traffic"] > 0


def test_connections_that_postgresql_ends_are_made_anew(postgres: PostgresServer, clock: FakeClock) -> None:
    url = postgres.new_database()
    store = Store.open(url, clock=clock)
    for i in range(3):
        store.add_traffic([second("m", NOON - i)])
        with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        assert store.flush()
    assert totals(store, "m", NOON) == [3, 3, 3, 3]
    store.close()


def test_a_commit_whose_answer_is_lost_is_not_counted_twice(
    postgres: PostgresServer, clock: FakeClock
) -> None:
    """The driver's commit is made to fail when it is through: no server can be made to die just then."""
    url = postgres.new_database()
    store = Store.open(url, clock=clock)
    store.add_traffic([second("m", NOON - 1)])
    store.add_decisions([decision("m", NOON)])
    commit = psycopg.Connection.commit
    failed = 0

    def commit_and_fail(connection: psycopg.Connection) -> None:
        nonlocal failed
        commit(connection)
        failed += 1
        connection.close()
        raise psycopg.OperationalError("the connection is lost")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psycopg.Connection, "commit", commit_and_fail)
        assert not store.flush(0)
    assert failed == 1
    assert len(store.decisions("m", 0, NOON)) == 1
    assert totals(store, "m", NOON) == [1, 1, 1, 1]
    assert store.flush()
    for at in (store, Store.open(url, clock=clock)):
        assert len(at.decisions("m", 0, NOON)) == 1
        assert totals(at, "m", NOON) == [1, 1, 1, 1]


def test_the_thread_writes_and_says_when(path: Path) -> None:
    store = Store.open(f"sqlite:///{path}", clock=SystemClock(), commit_every_s=0.01)
    store.start()
    store.put_plan("x")
    for _ in range(500):
        with closing(sqlite3.connect(path)) as connection:
            if connection.execute("SELECT value FROM relight_meta WHERE key = 'plan'").fetchone():
                break
    else:
        pytest.fail("the thread has not written")
    store.close()
    assert store.health()["last_commit_s"] is not None


def test_many_threads_add_and_read_at_once(open_store: Open, clock: FakeClock) -> None:
    from concurrent.futures import ThreadPoolExecutor

    store = open_store(commit_every_s=0.001)
    store.start()

    def work(number: int) -> None:
        for i in range(100):
            store.add_traffic([second(f"m{number % 3}", NOON - i)])
            store.add_decisions([decision("m", NOON - i, number)])
            store.traffic(f"m{(number + 1) % 3}", NOON)
            if i % 25 == 0:
                store.decisions("m", 0, NOON, 10)
                store.put_override(replace(OVERRIDE, id=f"{number}-{i}"))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert store.flush()
    for at in (store, open_store()):
        assert [totals(at, f"m{i}", NOON) for i in range(3)] == [[200] * 4] * 3
        assert len(at.decisions("m", 0, NOON, 1000)) == 600
        assert len(at.overrides(NOON)) == 24
