"""Of several controllers the last one decides."""

from __future__ import annotations

import pytest

from autoscaling.live.owner import ALIVE_S, LOST_S, PATIENCE_S, Ownership
from tests.controller.lab import HandClock


class Place:
    """A KV and controllers that know each other by it alone."""

    def __init__(self) -> None:
        self.kv: dict[bytes, bytes] = {}
        self.clock = HandClock()
        self.fails = False
        self.flushed: list[str] = []
        self.waited_s = 0.0

    def controller(self, name: str) -> Ownership:
        return Ownership(name, self.clock, get=self._get, put=self._put)

    def _get(self, key: bytes) -> bytes | None:
        if self.fails:
            raise ConnectionError
        return self.kv.get(key)

    def _put(self, key: bytes, value: bytes) -> None:
        if self.fails:
            raise ConnectionError
        self.kv[key] = value

    def tick(self, name: str, controller: Ownership) -> bool:
        return controller.holds(lambda: self.flushed.append(name))

    def wait(self, seconds: float) -> bool:
        self.clock.go(seconds)
        self.waited_s += seconds
        return False


@pytest.fixture
def place() -> Place:
    return Place()


def test_the_first_waits_for_nobody(place: Place) -> None:
    """And decides."""
    first = place.controller("a")
    first.claim(place.wait)
    assert place.waited_s == 0
    assert place.tick("a", first)


def test_the_second_takes_over_once_the_first_has_let_go(place: Place) -> None:
    """The first writes what it holds, once, and decides no more."""
    first, second = place.controller("a"), place.controller("b")
    first.claim(place.wait)

    def wait(seconds: float) -> bool:
        place.wait(seconds)
        if place.waited_s > 0.5:
            assert not place.tick("a", first)
        return False

    second.claim(wait)
    assert 0.5 < place.waited_s < 1
    assert place.tick("b", second)
    assert not place.tick("a", first)
    assert place.flushed == ["a"]


def test_one_that_was_killed_is_not_waited_for(place: Place) -> None:
    """Its claim is old by the time that a successor is there."""
    first = place.controller("a")
    first.claim(place.wait)
    place.clock.go(ALIVE_S)
    place.controller("b").claim(place.wait)
    assert place.waited_s == 0


def test_one_that_hangs_is_not_waited_for_for_ever(place: Place) -> None:
    """Nor one for which there is no sense in waiting."""
    place.controller("a").claim(place.wait)
    place.controller("b").claim(place.wait)
    assert place.waited_s == pytest.approx(PATIENCE_S, abs=0.2)
    place.controller("c").claim(lambda seconds: True)


def test_the_older_goes_on_when_the_newer_fails(place: Place) -> None:
    """A redeployment that is rolled back leaves the fleet with its old controller."""
    first, second = place.controller("a"), place.controller("b")
    first.claim(place.wait)
    second.claim(place.wait)
    assert not place.tick("a", first)
    place.clock.go(LOST_S + 1)
    assert place.tick("a", first)
    place.controller("c").claim(place.wait)
    assert not place.tick("a", first)
    assert place.flushed == ["a", "a"]


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_a_clock_that_is_set_leaves_one_who_decides(place: Place, jump_s: float) -> None:
    """The one who did."""
    first = place.controller("a")
    first.claim(place.wait)
    place.clock.jump(jump_s)
    assert place.tick("a", first)


def test_while_nobody_can_be_asked_all_goes_on(place: Place) -> None:
    """Nobody can have come without the GCS."""
    first, second = place.controller("a"), place.controller("b")
    first.claim(place.wait)
    second.claim(place.wait)
    place.tick("a", first)
    place.fails = True
    assert place.tick("b", second)
    assert not place.tick("a", first)
