"""A store that is replayed is read in a copy: nothing of it is changed, whoever uses it meanwhile."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine, inspect, text

from autoscaling.core.types import Rung
from autoscaling.live.records import ColdStartRow
from autoscaling.live.store import Store
from autoscaling.sim.starts import Measured
from autoscaling.sources import StoredSource
from autoscaling.traces import TraceError
from tests.store.lab import NOON, FakeClock, make_version_1, second

DAY = 86400.0


def contents(url: str) -> dict[str, tuple[list[str], list[tuple[object, ...]]]]:
    """Every table's columns and rows."""
    engine = create_engine(url)
    with engine.connect() as connection:
        found = {
            name: (
                [column["name"] for column in inspect(connection).get_columns(name)],
                [tuple(row) for row in connection.execute(text(f"SELECT * FROM {name} ORDER BY 1, 2"))],
            )
            for name in inspect(connection).get_table_names()
        }
    engine.dispose()
    return found


def filled(store: Store) -> None:
    """Some of it rolled up, some in the journal only."""
    store.add_traffic([second("m", NOON - 3 * DAY + 90, 2), second("m", NOON - 3 * DAY + 99)])
    store.add_cold_start(ColdStartRow("m", "engine", NOON - 50, NOON - 62, 12.0, "forked"))
    assert store.flush()
    store.add_traffic([second("m", NOON - 60, 4)])
    assert store.flush()


def test_it_tells_all_and_is_not_changed(store: Store, url: str, clock: FakeClock) -> None:
    filled(store)
    before = contents(url)
    source = StoredSource(url, clock)
    assert [tuple(row[:4]) for row in source.rows()] == [
        (NOON - 3 * DAY + 90, "m", 1, 1.0),
        (NOON - 3 * DAY + 91, "m", 1, 8.0),
        (NOON - 3 * DAY + 99, "m", 1, 1.0),
        (NOON - 60, "m", 4, 1.0),
    ]
    assert source.starts() == Measured.of([("m", Rung.TEMPLATE, 12.0)])
    assert contents(url) == before


def test_an_earlier_relights_store_stays_one(store: Store, url: str, clock: FakeClock) -> None:
    """Its cluster goes on with it."""
    filled(store)
    store.close()
    make_version_1(url)
    before = contents(url)
    assert [row.requests for row in StoredSource(url, clock).rows()] == [3, 4]
    assert contents(url) == before


def test_a_database_without_a_store_stays_so(
    postgres: object, request: pytest.FixtureRequest, clock: FakeClock
) -> None:
    url = request.getfixturevalue("postgres").new_database()
    with pytest.raises(TraceError, match="is no store of Relight's"):
        StoredSource(url, clock)
    assert contents(url) == {}


def test_a_database_that_is_away_is_one_clear_error(clock: FakeClock) -> None:
    with pytest.raises(TraceError, match=r"postgresql.*can't be read: .*refused") as caught:
        StoredSource("postgresql://user:secret@127.0.0.1:9/db", clock)
    assert "secret" not in str(caught.value)
