"""kill -9 of the process that writes, and of PostgreSQL, in the middle of it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoscaling.live.clock import SystemClock
from autoscaling.live.records import TrafficRow
from autoscaling.live.store import Store
from tests.store.lab import NOON, FakeClock, decision, second, totals
from tests.store.postgres import PostgresServer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("seconds", [2.6, 3.3])
def test_a_killed_writer_loses_nothing_older_than_two_seconds(url: str, seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.store.writes", url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    given = [float(process.stdout.readline())]
    while given[-1] < given[0] + seconds:
        given.append(float(process.stdout.readline()))
    process.kill()
    given += [float(line) for line in process.stdout if line.endswith("\n")]
    process.wait()

    store = Store.open(url, clock=SystemClock())
    for model in ("m0", "m49"):
        kept = totals(store, model, time.time())
        must = sum(1 for at in given if at < given[-1] - 2.0)
        assert must <= kept[0] <= len(given) + 1
        assert kept == [kept[0]] * 4  # no level counts more than another
    store.close()


@pytest.fixture
def own_postgres(postgres: PostgresServer) -> Iterator[PostgresServer]:
    """Another one than the other tests', to be killed. It can start where theirs could."""
    server = PostgresServer()
    server.start()
    yield server
    server.close()


def test_a_killed_postgresql_loses_nothing_that_was_accepted(own_postgres: PostgresServer) -> None:
    """Three kills under writes, each at another moment of the commits that a thread makes as fast as it can."""
    url = own_postgres.new_database()
    clock = FakeClock()
    store = Store.open(url, clock=clock, commit_every_s=0.0)
    store.start()
    stop = threading.Event()
    given = 0

    def write() -> None:
        nonlocal given
        while not stop.is_set():
            store.add_traffic([second("m", NOON - given % 1000)])
            store.add_decisions([decision("m", NOON - given % 1000, given)])
            given += 1
            stop.wait(0.0005)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for round in range(3):
            before = given
            while given < before + 50 + 17 * round:
                stop.wait(0.001)
            own_postgres.kill()
            before = given
            while given < before + 20 or store.health()["ok"]:
                stop.wait(0.001)
            assert store.health()["error"]
            assert totals(store, "m", NOON)[0] >= before  # readers are served from memory
            own_postgres.start()
            assert store.flush(20)
            assert store.health()["ok"]
    finally:
        stop.set()
        writer.join()
    assert store.flush()
    assert store.health()["dropped"] == 0
    other = Store.open(url, clock=clock)
    for at in (store, other):
        assert totals(at, "m", NOON) == [given] * 4
        assert [
            row["replicas"]
            for row in sorted(at.decisions("m", 0, NOON, given + 5), key=lambda row: row["replicas"])
        ] == list(range(given))
    other.close()
    store.close()


def test_a_store_opened_while_postgresql_is_down_works_and_joins_when_it_is_up(
    own_postgres: PostgresServer,
) -> None:
    url = own_postgres.new_database()
    clock = FakeClock()
    first = Store.open(url, clock=clock)
    first.add_traffic([second("m", NOON - 100, 5)])
    first.put_plan("old")
    first.close()
    own_postgres.kill()

    store = Store.open(url, clock=clock)
    assert not store.health()["ok"]
    store.add_traffic([TrafficRow("m", int(NOON), 2)])
    assert totals(store, "m", NOON) == [2, 2, 2, 2]
    assert store.plan() is None
    assert not store.flush(0)

    own_postgres.start()
    assert store.flush(20)
    assert totals(store, "m", NOON) == [7, 7, 7, 7]
    assert store.plan() == "old"
    store.close()
