"""Every test that takes `url` runs on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from autoscaling.live.store import Store
from tests.store.lab import FakeClock
from tests.store.postgres import CannotStart, PostgresServer


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    try:
        server = PostgresServer()
        server.start()
    except CannotStart as error:
        pytest.skip(f"no PostgreSQL to test with: {error}")
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/relight.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def open_store(url: str, clock: FakeClock) -> Iterator[Callable[..., Store]]:
    """Opens the test's database, by default without the thread: then `flush` writes, and nothing else does."""
    stores: list[Store] = []

    def opened(at: str = url, **options: float) -> Store:
        store = Store.open(at, clock=clock, **options)  # type: ignore[arg-type]
        stores.append(store)
        return store

    yield opened
    for store in stores:
        with suppress(OSError):
            store.close()


@pytest.fixture
def store(open_store: Callable[..., Store]) -> Store:
    return open_store()
