"""A shadow's world: real requests, imagined replicas."""

from __future__ import annotations

from dataclasses import replace

from autoscaling.core.types import Decision, Observation, Reason, Rung, RungProfile
from autoscaling.live.shadow import ShadowWorld
from tests.controller.lab import NOW_S, spec

RUNGS = (
    RungProfile(Rung.WEIGHTS, 20.0, 30.0, 0.0),
    RungProfile(Rung.TEMPLATE, 5.0, 6.0, 0.0),
    RungProfile(Rung.SERVING, 0.0, 0.0, 1.0),
)
REAL = Observation(
    NOW_S, ready=1, starting=0, target=1, queued=0, in_flight=0, arrivals=0, rung=Rung.TEMPLATE, rungs=RUNGS
)


class World(ShadowWorld):
    """One model, second by second."""

    def __init__(self) -> None:
        super().__init__("shadow")
        self.now_s = NOW_S

    def see(self, after_s: float = 1.0, **real: object) -> Observation:
        self.now_s += after_s
        self.saw({"m": replace(REAL, now_s=self.now_s, **real)})  # type: ignore[arg-type]
        return self.observe(self.now_s)["m"]

    def decide(self, replicas: int | None, rung: Rung = Rung.TEMPLATE) -> None:
        made = Decision("m", self.now_s, replicas, rung, Reason.DEMAND, self.now_s, "p")
        self.apply(self.now_s, {"m": spec()}, [made])


def test_it_begins_with_what_there_is() -> None:
    """As if it had been obeyed only from then on."""
    seen = World().see(ready=2, in_flight=3)
    assert (seen.ready, seen.in_flight, seen.queued) == (2, 3, 0)


def test_a_replica_that_it_ended_is_missed_by_the_next_request() -> None:
    """Which waits for a start from the rung that the shadow kept, though in truth it is served at once."""
    world = World()
    world.see()
    world.decide(0)
    assert world.see().ready == 0
    seen = world.see(arrivals=2, in_flight=2)
    assert (seen.ready, seen.queued, seen.in_flight) == (0, 2, 0)
    world.decide(1)
    waits = [world.see() for _ in range(5)]
    assert [w.queued for w in waits] == [2, 2, 2, 2, 0]
    assert [w.starting for w in waits] == [1, 1, 1, 1, 0]
    assert (waits[-1].ready, waits[-1].in_flight) == (1, 2)


def test_a_clock_that_is_set_back_makes_no_start_longer() -> None:
    """What was left of it is left of it."""
    world = World()
    world.see()
    world.decide(0)
    world.see(arrivals=2, in_flight=2)
    world.decide(1)
    world.see()
    assert [world.see(after_s).ready for after_s in (-3600.0, 1.0, 1.0, 1.0, 1.0)] == [0, 0, 0, 0, 1]


def test_a_colder_rung_takes_longer() -> None:
    """The start from its weights."""
    world = World()
    world.see()
    world.decide(0, Rung.WEIGHTS)
    assert world.see().rung is Rung.WEIGHTS
    world.decide(1)
    assert world.see(19.5).ready == 0
    assert world.see(1.0).ready == 1


def test_a_replica_that_only_it_has_is_there_for_the_request() -> None:
    """In truth the request waits."""
    world = World()
    world.see(ready=0)
    world.decide(1)
    world.see(6.0, ready=0)
    seen = world.see(ready=0, queued=1, arrivals=1)
    assert (seen.ready, seen.queued, seen.in_flight) == (1, 0, 1)


def test_starts_that_are_not_wanted_any_more_go_first() -> None:
    """Then those that serve."""
    world = World()
    world.see()
    world.decide(3)
    assert world.see().starting == 2
    world.decide(2)
    assert (world.see().ready, world.see().starting) == (1, 1)
    world.decide(0)
    assert (world.see().ready, world.see().starting) == (0, 0)


def test_what_is_unknown_is_unknown_there_too() -> None:
    """And changes nothing."""
    world = World()
    world.see()
    assert world.see(queued=None).ready is None
    world.decide(None)
    assert world.see().ready == 1
