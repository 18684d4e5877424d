"""What the tests of the store share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import create_engine, text

from autoscaling.core.types import Decision, Reason, Rung
from autoscaling.live.records import TrafficRow
from autoscaling.live.store import Store

Open = Callable[..., Store]

NOON = 1_800_000_000.0
"""When the tests play: a whole hour, in January 2027."""


class FakeClock:
    """Time as the test says."""

    def __init__(self, now_s: float = NOON) -> None:
        self._now_s = now_s
        self._monotonic_s = 1000.0

    def now_s(self) -> float:
        return self._now_s

    def monotonic_s(self) -> float:
        return self._monotonic_s

    def pass_time(self, seconds: float) -> None:
        """Time passes."""
        self._now_s += seconds
        self._monotonic_s += seconds

    def set_clock(self, by_s: float) -> None:
        """Somebody sets the clock."""
        self._now_s += by_s


def second(model: str, at_s: float, arrivals: int = 1, **amounts: Any) -> TrafficRow:
    """What came in the second of `at_s`."""
    return TrafficRow(model, int(at_s), arrivals, **amounts)


def decision(model: str, made_s: float, replicas: int = 1, **fields: Any) -> Decision:
    """A decision of the default policy."""
    values = {
        "rung": Rung.PARKED,
        "reason": Reason.DEMAND,
        "until_s": made_s + 10,
        "policy": "predictive",
        **fields,
    }
    return Decision(model=model, made_s=made_s, replicas=replicas, **values)


def counts(store: Store, model: str, now_s: float) -> dict[int, dict[int, int]]:
    """step_s -> bucket -> arrivals."""
    return {
        int(level.step_s): dict(zip(level.index.tolist(), level.arrivals.astype(int).tolist(), strict=True))
        for level in store.traffic(model, now_s).levels
    }


def totals(store: Store, model: str, now_s: float) -> list[int]:
    """Arrivals of each level, finest first."""
    return [sum(level.values()) for level in counts(store, model, now_s).values()]


def make_version_1(url: str) -> None:
    """Turn a database of this Relight into one of an earlier one: without the seconds of buckets."""
    engine = create_engine(url)
    with engine.begin() as connection:
        for column in ("lead_s", "trail_s"):
            connection.execute(text(f"ALTER TABLE relight_traffic DROP COLUMN {column}"))
        connection.execute(text("UPDATE relight_meta SET value = '1' WHERE key = 'schema_version'"))
    engine.dispose()
