"""What rungs cost and take, from the starts that were measured."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaling.core.types import Rung
from autoscaling.live.records import ColdStartRow
from autoscaling.live.rungs import (
    ASSUMED_DELAY_S,
    MEMORY_PRICE,
    RungBook,
    delay_s,
    lead_s,
    memory_cost_per_s,
    rung_of_start,
    scarcity,
)

COSTS = {Rung.NODE: 0.0, Rung.WEIGHTS: 0.0, Rung.TEMPLATE: 0.1, Rung.PARKED: 0.2, Rung.SERVING: 1.0}


def phase(name: str, start_s: float, duration_s: float) -> dict[str, object]:
    return {"name": name, "start_s": start_s, "duration_s": duration_s}


def start(total_s: float, rung: Rung = Rung.TEMPLATE, number: int = 0, **changes: object) -> ColdStartRow:
    values = {"engine_id": f"e{number}", "ready_s": 100.0 + total_s, "begun_s": 100.0, "kind": "prebuilt"}
    return ColdStartRow(model="m", total_s=total_s, rung=rung, **{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "names", "own_template", "rung"),
    [
        ("prebuilt", ["fork"], True, Rung.TEMPLATE),
        ("forked", ["fork", "weights"], True, Rung.WEIGHTS),
        ("forked", ["fork", "weights"], False, Rung.TEMPLATE),
        ("adopted", ["adopt"], True, Rung.PARKED),
        ("forked", ["download", "fork"], True, Rung.NODE),
        ("prebuilt", ["download", "fork"], True, Rung.NODE),
    ],
)
def test_where_a_start_began(kind: str, names: list[str], own_template: bool, rung: Rung) -> None:
    """By how the engine came to be, and by whether its weights had to be fetched."""
    assert rung_of_start(kind, [phase(n, 0, 1) for n in names], own_template=own_template) is rung


def test_who_waits_waits_for_the_first_token_too() -> None:
    """Unless nobody waited: then the first token is that of a later request."""
    phases = (phase("first_token", 102.0, 0.5),)
    assert delay_s(start(2.0, phases=phases)) == 2.5
    assert delay_s(start(2.0, phases=phases, prewarmed=True)) == 2.0


def test_a_prewarm_takes_as_long_as_its_replica_does() -> None:
    """An engine that was lit beside its replica answered sooner than a replica will that nobody asks for."""
    beside = (phase("schedule", 100.0, 0.2), phase("replica", 100.2, 1.8), phase("fork", 100.0, 0.1))
    assert lead_s(start(0.3, phases=beside)) == pytest.approx(2.3)
    before = (phase("schedule", 100.0, 0.2), phase("replica", 100.2, 1.8), phase("fork", 102.0, 0.1))
    assert lead_s(start(2.3, phases=before)) == pytest.approx(2.3)


def test_before_the_first_start_delays_are_assumed_and_say_so() -> None:
    """Each rung that there is has a profile, lowest first, SERVING last."""
    profiles = RungBook().profiles("m", COSTS)
    assert [p.rung for p in profiles] == sorted(COSTS)
    assert {p.starts for p in profiles} == {0}
    assert [p.delay_s for p in profiles[:-1]] == [ASSUMED_DELAY_S[p.rung] for p in profiles[:-1]]
    assert [p.cost_per_s for p in profiles] == [COSTS[p.rung] for p in profiles]


def test_delays_are_those_of_the_models_own_starts() -> None:
    """The median and the upper quantile of its last starts; few starts make a careful quantile."""
    book = RungBook()
    book.add(start(4.0))
    profile = {p.rung: p for p in book.profiles("m", COSTS)}[Rung.TEMPLATE]
    assert (profile.delay_s, profile.delay_high_s, profile.starts) == (4.0, 8.0, 1)
    for number in range(1, 20):
        book.add(start(4.0 + number / 10, number=number))
    profile = {p.rung: p for p in book.profiles("m", COSTS)}[Rung.TEMPLATE]
    assert profile.starts == 20
    assert profile.delay_s == pytest.approx(4.95)
    assert profile.delay_high_s == pytest.approx(5.7)


def test_a_start_said_again_counts_once() -> None:
    """What was said before is replaced."""
    book = RungBook()
    book.add(start(4.0, ready_s=104.0))
    book.add(start(4.0, ready_s=104.0, phases=(phase("first_token", 104.0, 1.0),)))
    profile = {p.rung: p for p in book.profiles("m", COSTS)}[Rung.TEMPLATE]
    assert (profile.delay_s, profile.starts) == (5.0, 1)


def test_a_lower_rung_takes_no_less_than_a_higher() -> None:
    """What is assumed gives way to what was measured, on either side."""
    book = RungBook()
    book.add(start(0.5))
    delays = {p.rung: p.delay_s for p in book.profiles("m", COSTS)}
    assert delays[Rung.PARKED] == delays[Rung.TEMPLATE] == 0.5
    book.add(start(90.0, number=1))
    book.add(start(90.0, number=2))
    delays = {p.rung: p.delay_s for p in book.profiles("m", COSTS)}
    assert delays[Rung.NODE] == delays[Rung.WEIGHTS] == delays[Rung.TEMPLATE] == 90.0


@pytest.mark.parametrize("total_s", [float("nan"), float("inf"), -1.0])
def test_a_start_that_can_t_be_counts_for_nothing(total_s: float) -> None:
    """A clock that was set between its begin and its end leaves no delay."""
    book = RungBook()
    book.add(start(total_s))
    assert {p.starts for p in book.profiles("m", COSTS)} == {0}


@pytest.mark.parametrize(
    "slept",
    [
        {"total_s": 8 * 3600.0 + 4.0},
        {"total_s": 1201.0},
        {"total_s": 4.0, "phases": (phase("first_token", 104.0, 3600.0),)},
        {"total_s": 4.0, "phases": (phase("schedule", 100.0, 3600.0), phase("replica", 3700.0, 1.0))},
    ],
)
def test_a_start_in_which_the_machine_slept_counts_for_nothing(slept: dict[str, Any]) -> None:
    """Nor one in which the clock was set: no engine has so long to start, and nobody waits so long for one."""
    book = RungBook()
    book.add(start(**slept), 600.0)
    assert {p.starts for p in book.profiles("m", COSTS)} == {0}
    book.add(start(4.0), 600.0)
    profile = {p.rung: p for p in book.profiles("m", COSTS)}[Rung.TEMPLATE]
    assert (profile.delay_s, profile.delay_high_s, profile.starts) == (4.0, 8.0, 1)


def test_weights_are_fetched_for_as_long_as_it_takes() -> None:
    """A start's deadline begins when they are there."""
    book = RungBook()
    book.add(start(7300.0, Rung.NODE, phases=(phase("download", 100.0, 7200.0),)), 600.0)
    profile = {p.rung: p for p in book.profiles("m", COSTS)}[Rung.NODE]
    assert (profile.delay_s, profile.starts) == (7300.0, 1)


@pytest.mark.parametrize(
    ("share", "price"), [(None, 0.0), (0.9, 0.0), (0.3, 0.0), (0.2, 0.5), (0.1, 1.0), (0.0, 1.0)]
)
def test_memory_costs_where_it_is_scarce(share: float | None, price: float) -> None:
    """Nothing where there is plenty, its full price where there is none left."""
    assert scarcity(share) == pytest.approx(price)
    assert memory_cost_per_s(4.0, 16.0, share) == pytest.approx(MEMORY_PRICE * 0.25 * price)
    assert memory_cost_per_s(4.0, None, share) == 0.0
