"""Decisions, states, plan, cold starts, prewarms, usage and overrides: kept, found again, bounded."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace

import pytest
from sqlalchemy import create_engine, text

from autoscaling.core.types import Reason, Rung, State
from autoscaling.live.records import ColdStartRow, Override, PrewarmRow, UsageRow
from autoscaling.live.store import Store, logs
from tests.store.lab import NOON, FakeClock, Open, decision, second, totals

DAY = 86400.0
COLD = ColdStartRow(
    model="m",
    engine_id="e1",
    ready_s=NOON,
    begun_s=NOON - 3.5,
    total_s=3.5,
    kind="forked",
    node="n1",
    rung=Rung.TEMPLATE,
    prewarmed=True,
    phases=({"name": "fork", "start_s": NOON - 3.5, "duration_s": 0.5},),
)
PREWARM = PrewarmRow("p1", "m", NOON, "forecast", 2, Rung.SERVING)
OVERRIDE = Override(
    "o1", "policy", "m", {"min_replicas": 2, "params": {"a": 1.5}}, "ann@host", NOON, NOON + 600
)


def everywhere(store: Store, open_store: Open) -> list[Store]:
    """The store as it is, with all in, and as another process finds it."""
    assert store.flush()
    return [store, open_store()]


def test_decisions_come_back_as_they_were_before_and_after_the_commit(store: Store, open_store: Open) -> None:
    made = decision(
        "m",
        NOON + 0.25,
        3,
        reason=Reason.PREWARM,
        numbers={"rate_per_s": 0.5, "unknown": math.nan},
        clamps=(Reason.MAX_REPLICAS, Reason.GPU_BUDGET),
    )
    store.add_decisions([made, replace(made, model="n", replicas=None, until_s=math.inf)])
    expected = {
        "source": "active",
        "model": "m",
        "made_s": NOON + 0.25,
        "replicas": 3,
        "rung": "parked",
        "reason": "prewarm",
        "until_s": NOON + 10.25,
        "policy": "predictive",
        "numbers": {"rate_per_s": 0.5, "unknown": None},
        "clamps": ["max-replicas", "gpu-budget"],
    }
    other = {**expected, "model": "n", "replicas": None, "until_s": None}
    assert store.decisions(None, NOON, NOON + 1) == [expected, other]
    for at in everywhere(store, open_store):
        assert at.decisions(None, NOON, NOON + 1) == [expected, other]
        assert at.decisions("m", NOON, NOON + 1) == [expected]
        assert at.decisions("m", NOON + 0.5, NOON + 1) == []


def test_the_newest_decisions_are_given_oldest_first_across_the_commit(store: Store) -> None:
    store.add_decisions([decision("m", NOON + i, i) for i in range(5)])
    store.flush()
    store.add_decisions([decision("m", NOON + i, i) for i in range(5, 8)])
    assert [row["replicas"] for row in store.decisions("m", 0, NOON + 100, limit=5)] == [3, 4, 5, 6, 7]
    assert store.decisions("m", 0, NOON + 100, limit=0) == []


def test_a_shadows_decisions_are_told_apart(store: Store) -> None:
    store.add_decisions([decision("m", NOON, 1)])
    store.add_decisions([decision("m", NOON, 2)], source="shadow:thrifty")
    assert [row["replicas"] for row in store.decisions("m", 0, NOON)] == [1]
    assert [row["replicas"] for row in store.decisions("m", 0, NOON, source="shadow:thrifty")] == [2]
    assert len(store.decisions("m", 0, NOON, source=None)) == 2


def test_states_and_the_plan_are_the_last_that_were_put(store: Store, open_store: Open) -> None:
    state = State("kpa", {"peak": 1.5, "never": math.inf}, ((NOON, 1.0), (NOON + 1, 2.0)), (0.25, 0.75))
    store.put_states({"m": State("kpa"), "n": state})
    store.put_states({"m": state})
    store.put_plan('{"made_s": 1}')
    store.put_plan('{"made_s": 2}')
    for at in everywhere(store, open_store):
        assert at.states() == {"m": state, "n": state}
        assert at.plan() == '{"made_s": 2}'


def test_nothing_is_known_of_a_new_store(store: Store) -> None:
    assert (store.states(), store.plan(), store.models_with_traffic(), store.overrides(NOON)) == (
        {},
        None,
        [],
        [],
    )


def test_what_is_put_together_is_committed_together(open_store: Open, clock: FakeClock) -> None:
    store = open_store(commit_every_s=0.0)
    store.start()
    done = threading.Event()

    def work() -> None:
        given = 0
        while not done.wait(0.002):
            given += 1
            with store.together():
                store.put_states({"mark": State(values={"given": given})})
                store.add_traffic([second("m", NOON)])

    worker = threading.Thread(target=work)
    worker.start()
    seen = []
    # A busy disk commits seldom: until it has been looked at between commits, and no longer than that may take.
    until_s = time.monotonic() + 60
    while len(seen) < 10 or (len(set(seen)) < 3 and time.monotonic() < until_s):
        at = open_store()
        counted = totals(at, "m", NOON)[0]
        seen.append((at.states().get("mark", State(values={"given": 0})).values["given"], counted))
    done.set()
    worker.join()
    assert all(marked == counted for marked, counted in seen)
    assert len(set(seen)) > 2


def test_cold_starts_said_again_replace_what_was_said(store: Store, open_store: Open) -> None:
    store.add_cold_start(COLD)
    store.flush()
    longer = replace(COLD, total_s=4.0)
    store.add_cold_start(longer)
    store.add_cold_start(replace(COLD, model="n", engine_id="e2", ready_s=NOON + 1))
    assert store.cold_starts("m", 0) == [longer]
    for at in everywhere(store, open_store):
        assert at.cold_starts("m", 0) == [longer]
        assert [row.model for row in at.cold_starts(None, 0)] == ["m", "n"]
        assert [row.model for row in at.cold_starts(None, 0, limit=1)] == ["n"]
        assert [row.model for row in at.cold_starts(None, NOON + 0.5)] == ["n"]


def test_the_newest_starts_are_those_of_every_model_and_rung(store: Store, open_store: Open) -> None:
    """One that starts often, or from one rung, pushes out no other; some wait to be written, some are in."""
    rows = [replace(COLD, engine_id=f"often-{i}", ready_s=NOON + i) for i in range(9)]
    rare = [
        replace(COLD, engine_id="rung", ready_s=NOON - 60, rung=Rung.WEIGHTS),
        replace(COLD, engine_id="model", ready_s=NOON - 30, model="n"),
    ]
    for row in [*rare, *rows[:8]]:
        store.add_cold_start(row)
    store.flush()
    store.add_cold_start(rows[8])
    wanted = [*rare, *rows[7:]]
    assert store.newest_starts(NOON - 60, 2) == wanted
    assert store.newest_starts(NOON - 59, 1) == [rare[1], rows[8]]
    for at in everywhere(store, open_store):
        assert at.newest_starts(0, 2) == wanted


def test_a_prewarm_is_followed_to_its_end(store: Store, open_store: Open) -> None:
    store.put_prewarm(PREWARM)
    assert store.prewarms("m", 0) == [PREWARM]
    store.flush()
    ended = replace(
        PREWARM,
        ready_s=NOON + 3,
        hit_s=NOON + 9,
        ended_s=NOON + 9,
        cost_gpu_s=9.0,
        spared_requests=2,
        spared_wait_s=7.0,
    )
    store.put_prewarm(ended)
    for at in everywhere(store, open_store):
        assert at.prewarms(None, 0) == [ended]
        assert at.prewarms("n", 0) == at.prewarms("m", NOON + 1) == []


def test_usage_adds_up_by_day_model_and_source(store: Store, open_store: Open) -> None:
    row = UsageRow("m", "2027-01-15", "active", {"serving": 10.0, "parked": 0.5}, 3, 1, 2.5, 1)
    for _ in range(2):
        store.add_usage(
            [row, replace(row, source="shadow:x"), replace(row, day="2027-01-16", gpu_s={"node": 1.0})]
        )
        store.flush()
    store.add_usage([row])
    expected = UsageRow("m", "2027-01-15", "active", {"serving": 30.0, "parked": 1.5}, 9, 3, 7.5, 3)
    assert store.usage("2027-01-15", "2027-01-15", "m", "active") == [expected]
    for at in everywhere(store, open_store):
        assert at.usage("2027-01-15", "2027-01-15", "m", "active") == [expected]
        assert len(at.usage("2027-01-01", "2027-02-01")) == 3
        assert at.usage("2027-01-17", "2027-02-01") == []


@pytest.mark.parametrize(
    "change",
    [
        {"waited_s": math.nan},
        {"requests": -1},
        {"gpu_s": {"serving": math.inf}},
        {"day": "2027-1-5"},
        {"day": "soon"},
    ],
    ids=str,
)
def test_usage_that_cannot_be_is_refused_and_counted(store: Store, change: dict) -> None:  # type: ignore[type-arg]
    store.add_usage([replace(UsageRow("m", "2027-01-15"), **change)])
    assert sum(store.health()["refused"].values()) == 1
    assert store.usage("0000-00-00", "9999-99-99") == []


def test_times_that_are_not_finite_are_refused_and_counted(store: Store) -> None:
    store.add_decisions([decision("m", math.nan)])
    store.add_cold_start(replace(COLD, ready_s=math.nan))
    store.put_prewarm(replace(PREWARM, cost_gpu_s=math.inf))
    assert sum(store.health()["refused"].values()) == 3
    assert store.health()["pending"] == 0


def test_a_record_that_the_database_refuses_holds_up_no_other(store: Store, open_store: Open) -> None:
    store.add_decisions([decision("m", NOON, None)])  # type: ignore[arg-type]
    store.put_prewarm(replace(PREWARM, replicas=1 << 70))
    store.add_cold_start(COLD)
    for at in everywhere(store, open_store):
        assert len(at.decisions("m", 0, NOON)) == 1
        assert at.cold_starts("m", 0) == [COLD]
        assert at.prewarms("m", 0) == []
    assert store.health()["dropped_by"] == {"prewarms": 1}
    assert store.health()["ok"]


def test_text_that_no_database_takes_is_made_to_fit(store: Store, open_store: Open) -> None:
    store.put_prewarm(replace(PREWARM, reason="a\0b \ud800"))
    store.put_override(replace(OVERRIDE, who="\ud800\0x", value={"note": "\0"}))
    for at in everywhere(store, open_store):
        assert at.prewarms("m", 0)[0].reason == "ab ?"
    assert open_store().overrides(NOON)[0].value == {"note": "\0"}


def test_old_records_go_and_others_stay(store: Store, open_store: Open, clock: FakeClock) -> None:
    store.add_decisions([decision("m", NOON)])
    store.add_cold_start(COLD)
    store.put_prewarm(PREWARM)
    store.add_usage([UsageRow("m", "2027-01-15")])
    store.put_override(OVERRIDE)
    store.put_override(replace(OVERRIDE, id="o2", until_s=None))

    def kept() -> tuple[int, int, int, int, list[str]]:
        at = open_store()
        return (
            len(at.decisions("m", 0, NOON)),
            len(at.cold_starts("m", 0)),
            len(at.prewarms("m", 0)),
            len(at.usage("2027-01-01", "2027-12-31")),
            [row.id for row in at.override_history()],
        )

    store.flush()
    for days, expected in (
        (13, (1, 1, 1, 1, ["o1", "o2"])),
        (2, (0, 1, 1, 1, ["o1", "o2"])),
        (74, (0, 1, 1, 1, ["o1", "o2"])),
        (2, (0, 0, 0, 1, ["o1", "o2"])),
        (308, (0, 0, 0, 1, ["o1", "o2"])),
        (3, (0, 0, 0, 0, ["o2"])),
    ):
        for _ in range(days):
            clock.pass_time(DAY)
            assert store.flush()
        assert kept() == expected


def test_decisions_are_bounded_in_number(open_store: Open, clock: FakeClock) -> None:
    store = open_store(max_decisions=100)
    store.add_decisions([decision("m", NOON + i / 1e5, i) for i in range(11_000)])
    store.flush()
    clock.pass_time(61)
    store.flush()
    assert [row["replicas"] for row in store.decisions("m", 0, NOON + 1, 20_000)] == list(
        range(10_900, 11_000)
    )


def test_a_busy_models_decisions_push_out_no_other_models(open_store: Open, clock: FakeClock) -> None:
    """Of those that have more than their share the oldest go, however many come."""
    store = open_store(max_decisions=100)
    store.add_decisions([decision("quiet", NOON - 1000 + i, i) for i in range(5)])
    for _ in range(3):
        store.add_decisions([decision("busy", clock.now_s() + i / 1e3, i) for i in range(7000)])
        store.add_decisions([decision("some", clock.now_s() + i / 1e3, i) for i in range(60)])
        store.flush()
        clock.pass_time(61)
        store.flush()
    kept = {
        m: [row["replicas"] for row in store.decisions(m, 0, math.inf, 20_000)]
        for m in ("quiet", "some", "busy")
    }
    assert kept["quiet"] == list(range(5))
    assert kept["some"] == list(range(13, 60))
    assert kept["busy"] == list(range(6953, 7000))


@pytest.mark.parametrize(
    ("counts", "most", "share"),
    [
        ((), 5, 0),
        ((3, 4), 7, 4),
        ((3, 4), 6, 3),
        ((1, 1, 90, 5), 10, 4),
        ((1, 9, 9), 10, 4),
        ((2, 2, 2), 2, 0),
    ],
)
def test_shares_are_fair(counts: tuple[int, ...], most: int, share: int) -> None:
    assert logs.fair_share(counts, most) == share


def test_an_override_is_durable_when_the_call_returns(store: Store, open_store: Open) -> None:
    store.put_override(OVERRIDE)
    assert open_store().overrides(NOON) == store.overrides(NOON) == [OVERRIDE]


def test_overrides_end_by_time_or_by_hand_and_stay_in_the_record(store: Store, open_store: Open) -> None:
    forever = replace(OVERRIDE, id="o2", made_s=NOON + 1, until_s=None)
    store.put_override(forever)
    store.put_override(OVERRIDE)
    assert store.overrides(NOON) == [OVERRIDE, forever]
    assert store.overrides(NOON + 600) == [forever]
    undone = store.undo_override("o2", "bob", NOON + 700)
    assert undone == replace(forever, undone_s=NOON + 700, undone_by="bob")
    assert store.undo_override("o2", "eve", NOON + 800) == undone
    assert store.undo_override("o9", "eve", NOON + 800) is None
    for at in (store, open_store()):
        assert at.overrides(NOON + 700) == []
        assert at.override_history() == [OVERRIDE, undone]
        assert at.override_history(1) == [undone]


def test_overrides_of_another_process_are_seen_at_the_next_commit(store: Store, open_store: Open) -> None:
    other = open_store()
    other.put_override(OVERRIDE)
    store.put_override(replace(OVERRIDE, id="o2"))
    store.flush()
    other.flush()
    assert (
        [row.id for row in store.overrides(NOON)] == [row.id for row in other.overrides(NOON)] == ["o1", "o2"]
    )


def test_a_state_that_cannot_be_read_any_more_is_forgotten(store: Store, open_store: Open, url: str) -> None:
    store.put_states({"m": State("kpa"), "n": State("kpa", {"a": 1.0})})
    store.flush()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE relight_states SET state = '{\"gone\": 1}' WHERE model = 'm'"))
    engine.dispose()
    other = open_store()
    assert other.health()["ok"]
    assert other.states() == {"n": State("kpa", {"a": 1.0})}
