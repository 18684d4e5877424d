"""Counts on their way into the store: each once, and acknowledged when they can't be lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autoscaling.live.intake import ACKNOWLEDGE_ANYWAY_S, Intake
from autoscaling.live.store import Store
from autoscaling.live.store.writer import Writer
from tests.controller.lab import HandClock

Batches = list[tuple[int, list[list[Any]]]]


class Place:
    """A store in a file, and controllers that come and go before it."""

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder / 'relight.db'}"
        self.clock = HandClock()
        self.begin()

    def begin(self) -> None:
        """A controller starts; the one before it may have been killed."""
        self.store = Store.open(self.url, clock=self.clock)
        self.intake = Intake(self.store, self.clock)

    def row(self, arrivals: int) -> list[Any]:
        return ["m", int(self.clock.now_s()), arrivals, 0, 0, 0.0, 0.0]

    def arrivals(self) -> float:
        """Of the whole history."""
        now_s = self.clock.now_s()
        return sum(p["arrivals"] for p in self.store.history("m", now_s - 3600, now_s + 60, 60))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_batch_that_is_sent_again_counts_once(place: Place) -> None:
    """However often it comes, and whatever comes with it."""
    first, second = (1, [place.row(3)]), (2, [place.row(5)])
    assert sum(r.arrivals for r in place.intake.take("g", [first]).rows) == 3
    assert sum(r.arrivals for r in place.intake.take("g", [first, second]).rows) == 5
    assert place.intake.take("g", [first, second]).rows == []
    assert place.arrivals() == 8


def test_gateways_are_told_apart(place: Place) -> None:
    """Each numbers its own."""
    place.intake.take("g", [(1, [place.row(3)])])
    place.intake.take("h", [(1, [place.row(5)])])
    assert place.arrivals() == 8


def test_nothing_is_acknowledged_before_it_is_committed(place: Place) -> None:
    """A gateway keeps what a killed controller would lose."""
    batch = (1, [place.row(3)])
    assert place.intake.take("g", [batch]).sequence == 0
    place.clock.go(1)
    assert place.intake.take("g", [batch]).sequence == 0
    assert place.store.flush()
    assert place.intake.take("g", [batch]).sequence == 1


def test_a_killed_controller_loses_nothing_and_counts_nothing_twice(place: Place) -> None:
    """What was committed is known to its successor, what was not is sent to it again."""
    first, second = (1, [place.row(3)]), (2, [place.row(5)])
    place.intake.take("g", [first])
    assert place.store.flush()
    place.intake.take("g", [first, second])
    place.begin()
    assert place.arrivals() == 3
    place.intake.take("g", [first, second])
    assert place.arrivals() == 8
    assert place.store.flush()
    assert place.intake.take("g", [second]).sequence == 2


def test_while_the_store_can_t_write_it_holds_what_came(place: Place) -> None:
    """It is bounded there; the gateway need not send it for ever."""
    batch = (1, [place.row(3)])
    assert place.intake.take("g", [batch]).sequence == 0
    place.clock.go(ACKNOWLEDGE_ANYWAY_S)
    assert place.intake.take("g", [batch]).sequence == 1
    assert place.arrivals() == 3


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
@pytest.mark.parametrize("committed", [False, True])
def test_a_clock_that_is_set_changes_no_acknowledgement(
    place: Place, jump_s: float, *, committed: bool
) -> None:
    """Set back, what is committed is acknowledged all the same; set ahead, what is not still isn't."""
    batch = (1, [place.row(3)])
    assert place.intake.take("g", [batch]).sequence == 0
    if committed:
        assert place.store.flush()
    place.clock.jump(jump_s)
    for _ in range(3):
        place.clock.go(1)
        assert place.intake.take("g", [batch]).sequence == committed
    for number in range(2, 5):
        place.intake.take("g", [(number, [place.row(1)])])
        assert place.store.flush()
        place.clock.go(1)
        assert place.intake.take("g", []).sequence == number


def test_what_came_before_the_clock_was_set_back_is_not_lost(place: Place) -> None:
    """The store takes nothing from the future: it counts as what came now."""
    batch = (1, [place.row(3)])
    place.clock.jump(-7200)
    place.intake.take("g", [batch])
    assert place.store.flush()
    assert place.store.health()["refused"] == {}
    assert place.arrivals() == 3


def test_what_comes_while_a_transaction_is_written_waits_for_the_next(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not in that one, however late that one ends."""
    first, second = (1, [place.row(3)]), (2, [place.row(5)])
    place.intake.take("g", [first])
    write = Writer._write

    def slow(writer: Writer, *args: Any, **kwargs: Any) -> None:
        write(writer, *args, **kwargs)
        assert place.intake.take("g", [second]).sequence == 0
        place.clock.go(5)

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "_write", slow)
        assert place.store.flush()
    assert place.intake.take("g", []).sequence == 1
    place.begin()
    assert place.arrivals() == 3
    place.intake.take("g", [second])
    assert place.store.flush()
    assert place.intake.take("g", []).sequence == 2
    assert place.arrivals() == 8
