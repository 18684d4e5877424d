"""What replicas can do, and tokens that nobody told, from the engines' counters."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaling.core.types import Capacity
from autoscaling.live.capacity import MIN_WINDOWS, CapacityBook
from autoscaling.live.ledger import TokenLedger
from autoscaling.live.records import TrafficRow


class Engine:
    """Counters that go on."""

    def __init__(self, engine_id: str = "e") -> None:
        self.engine_id = engine_id
        self.counters: dict[str, float] = {
            "at_s": 0.0,
            "running": 0.0,
            "generation_tokens": 0.0,
            "requests": 0.0,
            "latency_sum_s": 0.0,
            "inter_tokens": 0.0,
            "inter_token_sum_s": 0.0,
        }

    def work(
        self, book: CapacityBook, concurrency: float, inter_token_s: float, windows: int = MIN_WINDOWS
    ) -> None:
        """Steady load for some windows of five seconds."""
        self.counters["running"] = concurrency
        self.counters["at_s"] += 5.0
        book.read(self.engine_id, "m", dict(self.counters))
        for _ in range(windows):
            tokens = 5 * concurrency / inter_token_s
            for name, grown in {
                "at_s": 5.0,
                "generation_tokens": tokens,
                "inter_tokens": tokens,
                "inter_token_sum_s": tokens * inter_token_s,
                "requests": concurrency,
                "latency_sum_s": concurrency * 3.0,
            }.items():
                self.counters[name] += grown
            book.read(self.engine_id, "m", dict(self.counters))


def learned(book: CapacityBook, target: float = 16.0, slo_s: float | None = 0.2) -> Capacity:
    found = book.capacity("m", target=target, inter_token_slo_s=slo_s)
    assert found is not None
    return found


def test_nothing_is_said_before_anything_was_learned() -> None:
    """Not of an unknown model, nor after one window."""
    book = CapacityBook()
    assert book.capacity("m", target=16, inter_token_slo_s=0.2) is None
    Engine().work(book, 4, 0.05, windows=MIN_WINDOWS - 1)
    assert book.capacity("m", target=16, inter_token_slo_s=0.2) is None


def test_within_the_slo_the_target_stands() -> None:
    """Tokens, requests and how long one holds a replica are measured all the same."""
    book = CapacityBook()
    Engine().work(book, 8, 0.1)
    found = learned(book)
    assert found.concurrency == 16
    assert found.tokens_per_s == pytest.approx(80)
    assert found.requests_per_s == pytest.approx(1.6)
    assert found.service_s == pytest.approx(3.0)


def test_where_the_slo_broke_fewer_are_served() -> None:
    """On the straight line between the last number that kept it and the first that broke it."""
    book = CapacityBook()
    engine = Engine()
    engine.work(book, 4, 0.1)
    engine.work(book, 8, 0.3)
    assert learned(book).concurrency == pytest.approx(6.0)
    assert learned(book, slo_s=None).concurrency == 16
    assert learned(book, target=5).concurrency == 5


def test_where_every_number_broke_it_at_least_one_is_served() -> None:
    """Bounded below by one request."""
    book = CapacityBook()
    Engine().work(book, 8, 0.4)
    assert learned(book).concurrency == pytest.approx(4.0)
    slow = CapacityBook()
    Engine().work(slow, 2, 5.0)
    assert learned(slow).concurrency == 1.0


def test_a_window_of_changing_load_says_nothing() -> None:
    """Its rates belong to no one number of requests; nor do those of a counter that went back."""
    book = CapacityBook()
    engine = Engine()
    for running in (1.0, 30.0, 1.0, 30.0, 1.0):
        engine.counters |= {"running": running, "at_s": engine.counters["at_s"] + 5}
        book.read("e", "m", dict(engine.counters))
    assert book.capacity("m", target=16, inter_token_slo_s=0.2) is None
    engine.counters |= {"running": 4.0, "at_s": 1000.0, "generation_tokens": 500.0}
    for _ in range(5):
        book.read("e", "m", dict(engine.counters))
        engine.counters["generation_tokens"] -= 100
        engine.counters["at_s"] += 5
    assert book.capacity("m", target=16, inter_token_slo_s=0.2) is None


@pytest.mark.parametrize("back_s", [2.0, 3600.0])
def test_a_gateways_clock_that_is_set_back_ends_no_learning(back_s: float) -> None:
    """Its readings are no older ones that another gateway told of; no token is lost or counted twice."""
    book, ledger = CapacityBook(), TokenLedger()
    engine = Engine()
    engine.counters["at_s"] = 10_000.0
    book.read("e", "m", dict(engine.counters))
    ledger.read("e", "m", counters(10_000.0, 0, 0), since_birth=True)
    engine.counters["at_s"] -= back_s
    engine.work(book, 4, 0.1, windows=10)
    assert learned(book).tokens_per_s == pytest.approx(40.0)
    for n in range(1, 11):
        for _ in range(2):  # told again with the next report
            ledger.read("e", "m", counters(10_000.0 - back_s + 5 * n, 10 * n, 100 * n), since_birth=True)
    ledger.untold("g", "m", 1)
    ledger.read("e", "m", counters(10_000.0 - back_s + 55, 110, 1100), since_birth=True)
    assert settled(ledger, 6, idle=True) == [(110, 1100)]


@pytest.mark.parametrize("behind_s", [0.5, 100.0])
def test_gateways_whose_clocks_differ_tell_of_the_same_engine(behind_s: float) -> None:
    """What the one behind read, before or after, is not learned from a second time."""
    ledger = TokenLedger()
    for n in range(20):
        for _ in range(3):
            ledger.read("e", "m", counters(1000 + 5 * n, 0, 100 * n), since_birth=True)
            ledger.read("e", "m", counters(1002 + 5 * n - behind_s, 0, 100 * n + 40), since_birth=True)
    ledger.untold("g", "m", 1)
    ledger.read("e", "m", counters(1100, 0, 2000), since_birth=True)
    assert settled(ledger, 6, idle=True) == [(0, 2000)]


def test_a_restart_goes_on_from_what_was_learned() -> None:
    """Through the values that the store keeps."""
    book, after = CapacityBook(), CapacityBook()
    engine = Engine()
    engine.work(book, 4, 0.1)
    engine.work(book, 8, 0.3)
    after.restore("m", book.states()["m"])
    assert learned(after) == learned(book)


# Tokens that nobody told


def counters(at_s: float, prompt: float, generated: float) -> dict[str, Any]:
    return {"at_s": at_s, "prompt_tokens": prompt, "generation_tokens": generated}


def settled(ledger: TokenLedger, monotonic_s: float, *, idle: bool) -> list[tuple[int, int]]:
    rows = ledger.settle(monotonic_s, 7, lambda _: idle)
    assert all(row.second == 7 and row.model == "m" for row in rows)
    return [(row.input_tokens, row.output_tokens) for row in rows]


def test_what_engines_counted_and_nobody_told_is_booked_when_all_is_quiet() -> None:
    """After the engine was read again; what was told is not booked a second time."""
    ledger = TokenLedger()
    ledger.read("e", "m", counters(0, 100, 1000), since_birth=False)
    ledger.told(TrafficRow("m", 1, 1, 10, 20))
    ledger.untold("g", "m", 1)
    assert settled(ledger, 1, idle=True) == []  # not read yet
    ledger.read("e", "m", counters(5, 140, 1100), since_birth=False)
    assert settled(ledger, 6, idle=True) == [(30, 80)]
    assert settled(ledger, 7, idle=True) == []


def test_what_every_answer_told_is_not_booked_again() -> None:
    """Without an answer that told nothing, the rest is a reading's lag."""
    ledger = TokenLedger()
    ledger.read("e", "m", counters(0, 0, 0), since_birth=True)
    ledger.read("e", "m", counters(5, 40, 100), since_birth=True)
    assert settled(ledger, 6, idle=True) == []


def test_under_load_only_what_stays_for_a_minute_is_booked() -> None:
    """What is in progress will be told later; what nobody tells is there all the time."""
    ledger = TokenLedger()
    ledger.read("e", "m", counters(0, 0, 0), since_birth=True)
    ledger.untold("g", "m", 1)
    found = []
    for second in range(5, 75, 5):
        # 50 tokens that nobody told, and 0 to 90 that are told a little later.
        ledger.read("e", "m", counters(second, 0, 50 + second * 20), since_birth=True)
        ledger.told(TrafficRow("m", second, 1, 0, 100 if second > 5 else 80))
        found += settled(ledger, second, idle=False)
    assert sum(tokens for _, tokens in found) == pytest.approx(50, abs=25)


def test_the_first_reading_of_an_engine_that_was_there_before_is_a_beginning() -> None:
    """What it counted before this controller was there is none of its business."""
    ledger = TokenLedger()
    ledger.untold("g", "m", 1)
    ledger.read("old", "m", counters(0, 1000, 1000), since_birth=False)
    ledger.read("new", "m", counters(0, 10, 20), since_birth=True)
    assert settled(ledger, 1, idle=True) == [(10, 20)]


def test_two_gateways_that_read_the_same_engine_count_once() -> None:
    """The same reading, or an older one, adds nothing."""
    ledger = TokenLedger()
    ledger.untold("g", "m", 1)
    for at_s in (5, 5, 4):
        ledger.read("e", "m", counters(at_s, 10, 20), since_birth=True)
    assert settled(ledger, 6, idle=True) == [(10, 20)]


def test_gateways_that_are_gone_are_forgotten() -> None:
    """Each that ever was would be kept for as long as the controller lives."""
    ledger = TokenLedger()
    for number in range(100):
        ledger.untold(f"g{number}", "m", 1)
    ledger.read("e", "m", counters(0, 0, 0), since_birth=True)
    ledger.forget(["e"], ["g7"])
    assert list(ledger._untold) == [("g7", "m")]
    settled(ledger, 1, idle=True)
    ledger.untold("g7", "m", 1)
    ledger.read("e", "m", counters(5, 10, 20), since_birth=True)
    assert settled(ledger, 6, idle=True) == [], "it told nothing new"
