"""Traffic history: what is added is what is read, on every level, over restarts, kills and clocks that jump."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from autoscaling.core.types import Decision, Reason, Rung
from autoscaling.live.records import ColdStartRow, PrewarmRow, TrafficRow, UsageRow
from autoscaling.live.store import Store
from autoscaling.traffic import LEVELS
from deployments.errors import ConfigError
from tests.store.lab import NOON, FakeClock, Open, counts, make_version_1, second, totals

DAY = 86400.0


def test_a_row_is_on_every_level_at_once_and_after_a_restart(
    store: Store, open_store: Open, clock: FakeClock
) -> None:
    store.add_traffic([TrafficRow("m", int(NOON) - 70, 3, 100, 20, 1.5, 0.5), second("m", NOON - 70, 2)])

    def seen(at: Store) -> list[tuple[float, list[int], list[float]]]:
        return [
            (
                level.step_s,
                level.index.tolist(),
                [
                    float(level.arrivals[0]),
                    float(level.input_tokens[0]),
                    float(level.output_tokens[0]),
                    float(level.busy_s[0]),
                ],
            )
            for level in at.traffic("m", clock.now_s()).levels
        ]

    expected = [
        (step_s, [int((NOON - 70) // step_s)], [5.0, 100.0, 20.0, 1.5])
        for step_s in (1.0, 60.0, 300.0, 3600.0)
    ]
    assert seen(store) == expected
    assert store.flush()
    assert seen(store) == expected
    assert seen(open_store()) == expected


def test_what_was_not_committed_is_lost_by_a_kill_and_nothing_else(
    store: Store, open_store: Open, clock: FakeClock
) -> None:
    store.add_traffic([second("m", NOON - 5, 7)])
    assert store.flush()
    store.add_traffic([second("m", NOON - 1, 1)])
    assert totals(open_store(), "m", clock.now_s()) == [7, 7, 7, 7]


def test_arrays_have_the_types_and_spans_that_forecasters_rely_on(store: Store, clock: FakeClock) -> None:
    store.add_traffic([second("m", NOON - 100)])
    for level, (step_s, kept_s) in zip(store.traffic("m", NOON + 0.5).levels, LEVELS, strict=True):
        assert (level.step_s, level.index.dtype, level.arrivals.dtype) == (step_s, np.int64, np.float32)
        assert level.start_s == math.floor((NOON - 100) / step_s) * step_s
        assert level.end_s == (NOON // step_s + 1) * step_s
        assert level.dense().sum() == 1
        assert len(level.dense()) == round((level.end_s - level.start_s) / step_s) <= kept_s / step_s


def test_arrays_that_were_handed_out_do_not_change(store: Store, clock: FakeClock) -> None:
    store.add_traffic([second("m", NOON, 1)])
    before = store.traffic("m", NOON)
    store.add_traffic([second("m", NOON, 5)])
    assert store.traffic("m", NOON).levels[0].arrivals.tolist() == [6.0]
    assert before.levels[0].arrivals.tolist() == [1.0]


def test_a_model_is_watched_from_its_first_row_on_even_an_empty_one(
    store: Store, open_store: Open, clock: FakeClock
) -> None:
    assert [level.start_s - level.end_s for level in store.traffic("m", NOON).levels] == [0.0] * 4
    store.add_traffic([second("m", NOON, 0)])
    store.flush()
    clock.pass_time(7200)
    for at in (store, open_store()):
        assert at.models_with_traffic() == ["m"]
        minutes = at.traffic("m", clock.now_s()).levels[1]
        assert (minutes.start_s, minutes.end_s, len(minutes.index)) == (NOON, NOON + 7260, 0)


def test_a_level_reaches_back_as_far_as_it_is_kept(store: Store, open_store: Open, clock: FakeClock) -> None:
    store.add_traffic([second("m", clock.now_s())])
    for _ in range(40):
        clock.pass_time(DAY)
        store.add_traffic([second("m", clock.now_s() - 1)])
        assert store.flush()
    for at in (store, open_store()):
        # The first came at noon sharp; each other a second before noon.
        assert totals(at, "m", clock.now_s()) == [1, 2, 28, 41]
        assert [
            round((level.end_s - level.start_s) / DAY, 2) for level in at.traffic("m", clock.now_s()).levels
        ] == [
            round(1 / 24, 2),
            2,
            28,
            40.04,
        ]


@pytest.mark.parametrize("unset", [False, True])
def test_what_is_too_old_is_deleted(store: Store, url: str, clock: FakeClock, *, unset: bool) -> None:
    """Also after a machine began at 1970 once: that is not where pruning goes on."""
    if unset:
        clock.set_clock(30 - NOON)
        clock.pass_time(60)
        assert store.flush()
        clock.set_clock(NOON - 90)
    for _ in range(40):
        clock.pass_time(DAY)
        store.add_traffic([second("m", clock.now_s() - 1)])
        assert store.flush()
    engine = create_engine(url)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT step_s, count(*) FROM relight_traffic GROUP BY step_s")).all()
        journal = connection.scalar(text("SELECT count(*) FROM relight_traffic_journal"))
    engine.dispose()
    assert dict(tuple(row) for row in rows) == {60: 2, 300: 28, 3600: 40}
    assert journal == 1


def test_late_rows_count_where_they_belong(store: Store, open_store: Open, clock: FakeClock) -> None:
    store.add_traffic([second("m", NOON - 10)])
    store.flush()
    clock.pass_time(61)
    store.flush()
    store.add_traffic([second("m", NOON - 11), second("m", NOON - 3 * DAY)])
    store.flush()
    clock.pass_time(61)
    store.flush()
    for at in (store, open_store()):
        assert totals(at, "m", clock.now_s()) == [2, 2, 3, 3]


@pytest.mark.parametrize(
    "row",
    [
        second("m", NOON + 62),
        TrafficRow("m", int(NOON), -1),
        TrafficRow("m", int(NOON), 1, busy_s=math.nan),
        TrafficRow("m", int(NOON), 1, busy_s=math.inf),
        TrafficRow("m", int(NOON), 1 << 62),
        TrafficRow("m", -5, 1),
        TrafficRow("m", math.nan, 1),  # type: ignore[arg-type]
        TrafficRow("", int(NOON), 1),
        TrafficRow("a\0b", int(NOON), 1),
    ],
    ids=repr,
)
def test_a_row_that_cannot_be_is_refused_and_counted(
    row: TrafficRow, tmp_path: Path, clock: FakeClock
) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/a.db", clock=clock)
    store.add_traffic([row, second("m", NOON)])
    assert sum(store.health()["refused"].values()) == 1
    assert store.flush() and store.health()["ok"]
    assert store.models_with_traffic() == ["m"]
    assert totals(store, "m", NOON) == [1, 1, 1, 1]
    store.close()


def test_a_row_a_little_ahead_is_taken_and_seen_when_its_time_comes(store: Store, clock: FakeClock) -> None:
    store.add_traffic([second("m", NOON - 5), second("m", NOON + 50)])
    assert totals(store, "m", NOON)[0] == 1
    clock.pass_time(60)
    assert totals(store, "m", clock.now_s())[0] == 2


def test_a_clock_that_is_a_year_ahead_for_an_hour_costs_little_history(
    store: Store, open_store: Open, clock: FakeClock
) -> None:
    for day in range(20, 0, -1):
        store.add_traffic([second("m", NOON - day * DAY)])
    store.flush()
    before = totals(store, "m", NOON)
    clock.set_clock(365 * DAY)
    for _ in range(60):
        clock.pass_time(60)
        store.add_traffic([second("m", clock.now_s())])
        assert store.flush()
    clock.set_clock(-365 * DAY)
    store.flush()
    assert store.health()["clock_jumps"] == 2
    for at in (store, open_store()):
        assert totals(at, "m", clock.now_s())[2:] == before[2:] == [20, 20]


@pytest.mark.parametrize("known", ["told by this Relight", "kept by one before"])
def test_a_clock_that_was_never_set_makes_no_history(
    store: Store, open_store: Open, url: str, clock: FakeClock, known: str
) -> None:
    """A machine that begins at 1970, until NTP has set its clock, is none that knows of years of silence."""
    clock.set_clock(30 - NOON)
    store.add_traffic([second("m", 30, 0), second("m", 30), second("idle", 30, 0)])
    assert store.flush()
    clock.set_clock(NOON - 30)
    store.add_traffic([second("m", NOON - 5)])
    assert store.flush()
    if known == "kept by one before":
        store.close()
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("UPDATE relight_series SET since_s = 30"))
            connection.execute(text("INSERT INTO relight_series VALUES ('idle', 0, 30)"))
        engine.dispose()
        store = open_store()
    since_s = store.watched_since_s("m")
    assert since_s is not None
    assert NOON - 3600 <= since_s <= NOON - 5
    assert store.watched_since_s("idle") is None
    for buckets in store.traffic("m", NOON).levels:
        assert buckets.start_s >= NOON - 3600
    assert totals(store, "m", NOON) == [1, 1, 1, 1]


def test_a_clock_that_is_set_back_hides_what_is_ahead_and_loses_nothing(
    store: Store, clock: FakeClock
) -> None:
    store.add_traffic([second("m", NOON - 2 * DAY), second("m", NOON)])
    store.flush()
    clock.set_clock(-DAY)
    store.flush()
    assert totals(store, "m", clock.now_s())[3] == 1
    store.add_traffic([second("m", clock.now_s())])
    store.flush()
    clock.set_clock(DAY)
    store.flush()
    assert totals(store, "m", clock.now_s())[3] == 3


def test_history_is_even_and_sums_to_what_was_added(store: Store, clock: FakeClock) -> None:
    store.add_traffic([TrafficRow("a", int(NOON) - 7200 + 90 * i, 2, 10, 5, 1.0, 0.5) for i in range(80)])
    store.add_traffic([TrafficRow("b", int(NOON) - 3600, 1)])
    for step_s in (60, 300, 900, 3600, 7200):
        rows = store.history("a", NOON - 7200, NOON, step_s)
        assert [row["start_s"] for row in rows] == [NOON - 7200 + step_s * i for i in range(7200 // step_s)]
        assert {row["step_s"] for row in rows} == {step_s}
        assert sum(row["arrivals"] for row in rows) == 160
        assert sum(row["input_tokens"] for row in rows) == 800
        assert sum(row["waited_s"] for row in rows) == pytest.approx(40)
    assert sum(row["arrivals"] for row in store.history(None, NOON - 7200, NOON, 300)) == 161
    assert store.history("a", NOON - 30 * DAY, NOON, 3600)[0]["start_s"] == NOON - 7200
    assert store.history("nobody", 0, NOON, 60) == []


def test_history_is_coarser_where_only_that_reaches_back(store: Store, clock: FakeClock) -> None:
    store.add_traffic([second("m", NOON - 10 * DAY), second("m", NOON - 60)])
    rows = store.history("m", NOON - 11 * DAY, NOON, 60)
    assert {row["step_s"] for row in rows} == {300.0}
    assert sum(row["arrivals"] for row in rows) == 2


@pytest.mark.parametrize("back_s", [3600, DAY, 30 * DAY])
def test_history_of_a_new_installation_is_as_fine_as_it_was_asked_for(
    store: Store, clock: FakeClock, back_s: float
) -> None:
    """The hour in which it began reaches no further back than its minutes."""
    store.add_traffic([second("m", NOON - 1200), second("m", NOON - 60)])
    for step_s in (60, 300, 900):
        rows = store.history("m", NOON - back_s, NOON, step_s)
        assert {row["step_s"] for row in rows} == {step_s}
        assert sum(row["arrivals"] for row in rows) == 2


def test_history_of_a_new_installation_after_its_seconds_are_gone(store: Store, clock: FakeClock) -> None:
    store.add_traffic([second("m", NOON - 4000), second("m", NOON - 60)])
    rows = store.history("m", NOON - 3500, NOON, 5)
    assert {row["step_s"] for row in rows} == {5.0}
    rows = store.history("m", NOON - DAY, NOON, 5)
    assert ({row["step_s"] for row in rows}, sum(row["arrivals"] for row in rows)) == ({60.0}, 2)


def test_since_when_a_model_is_watched(store: Store, open_store: Open) -> None:
    """What is imported says nothing of that, nor does what comes later."""
    assert store.watched_since_s("m") is None
    store.import_traffic([("m", NOON - 2 * DAY, 1, 0, 0, 0.0)], 1)
    store.flush()
    assert (store.watched_since_s("m"), store.models_with_traffic()) == (None, ["m"])
    store.add_traffic([second("m", NOON - 1234)])
    store.add_traffic([second("m", NOON - 12)])
    store.flush()
    store.import_traffic([("m", NOON - 3 * DAY, 1, 0, 0, 0.0)], 1)
    store.flush()
    for at in (store, open_store()):
        assert at.watched_since_s("m") == NOON - 1234


def test_of_which_models_there_are_records(store: Store) -> None:
    decision = Decision("d", NOON, 1, Rung.TEMPLATE, Reason.WAKE, NOON, "predictive")
    store.add_traffic([second("t", NOON)])
    store.add_usage([UsageRow("u", "2026-11-24", "shadow:k")])
    store.add_decisions([decision], source="shadow:k")
    store.add_cold_start(ColdStartRow("c", "e", NOON, NOON - 1, 1.0, "forked"))
    store.put_prewarm(PrewarmRow("id", "p", NOON, "prewarm", 1, Rung.SERVING))
    for _ in range(2):
        assert [model for model in "tudcpn" if store.has_records(model)] == ["t", "u", "d", "c", "p"]
        assert store.flush()


def test_history_of_a_time_whose_short_buckets_are_gone(store: Store, clock: FakeClock) -> None:
    """A past day is told in what is still kept of it, and ends where it was asked to."""
    store.add_traffic([second("m", NOON - 8 * DAY), second("m", NOON - 7 * DAY), second("m", NOON - 60)])
    rows = store.history("m", NOON - 8 * DAY - 3600, NOON - 8 * DAY + 3600, 60)
    assert {row["step_s"] for row in rows} == {300.0}
    assert sum(row["arrivals"] for row in rows) == 1
    assert rows[-1]["start_s"] == NOON - 8 * DAY + 3300


@pytest.mark.parametrize("step_s", [0, -1, math.nan])
def test_history_refuses_a_step_that_is_none(store: Store, step_s: float) -> None:
    with pytest.raises(ConfigError, match="step"):
        store.history("m", 0, NOON, step_s)


def test_a_second_process_that_imports_is_seen_by_the_first(
    store: Store, open_store: Open, clock: FakeClock
) -> None:
    store.add_traffic([second("m", NOON - 5)])
    store.flush()
    assert totals(store, "m", NOON) == [1, 1, 1, 1]
    other = open_store()
    assert (
        other.import_traffic([("m", NOON - 10 * DAY, 4, 0, 0, 0.0), ("n", NOON - 30, 1, 0, 0, 0.0)], 1) == 2
    )
    store.flush()
    assert totals(store, "m", NOON) == [1, 1, 5, 5]
    assert totals(store, "n", NOON) == [1, 1, 1, 1]


STEPS = [int(step_s) for step_s, _ in LEVELS]
OPERATIONS = st.one_of(
    st.tuples(st.just("add"), st.sampled_from("ab"), st.integers(0, 7000), st.integers(1, 9)),
    st.tuples(st.just("pass"), st.integers(1, 4000)),
    st.tuples(st.sampled_from(["flush", "kill", "close", "read"])),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(OPERATIONS, min_size=3, max_size=40))
def test_whatever_happens_committed_rows_count_exactly_once(
    operations: list[tuple], tmp_path_factory: pytest.TempPathFactory
) -> None:  # type: ignore[type-arg]
    url = f"sqlite:///{tmp_path_factory.mktemp('any')}/a.db"
    clock = FakeClock()
    store = Store.open(url, clock=clock)
    committed: Counter[tuple[str, int]] = Counter()
    waiting: Counter[tuple[str, int]] = Counter()
    for name, *arguments in operations:
        if name == "add":
            model, age, arrivals = arguments
            at = int(clock.now_s()) - age
            store.add_traffic([second(model, at, arrivals)])
            waiting[model, at] += arrivals
        elif name == "pass":
            clock.pass_time(*arguments)
        elif name == "read":
            check(store, committed + waiting, clock.now_s())
        elif name == "kill":
            store = Store.open(url, clock=clock)
            waiting.clear()
        else:
            assert store.flush() if name == "flush" else store.close() is None
            committed += waiting
            waiting.clear()
            if name == "close":
                store = Store.open(url, clock=clock)
    check(store, committed + waiting, clock.now_s())


def check(store: Store, rows: Counter[tuple[str, int]], now_s: float) -> None:
    for model in "ab":
        expected: dict[int, dict[int, int]] = {step_s: defaultdict(int) for step_s in STEPS}
        for (name, at), arrivals in rows.items():
            for step_s, kept_s in LEVELS:
                bucket = int(at // step_s)
                if name == model and bucket >= now_s // step_s + 1 - kept_s // step_s:
                    expected[int(step_s)][bucket] += arrivals
        assert counts(store, model, now_s) == expected
        for level in store.traffic(model, now_s).levels:
            assert level.lead_s is not None
            assert level.trail_s is not None
            for i, bucket in enumerate(level.index.tolist()):
                within = [at for name, at in rows if name == model and at // level.step_s == bucket]
                assert bucket * level.step_s + level.lead_s[i] == min(within)
                assert (bucket + 1) * level.step_s - level.trail_s[i] == max(within) + 1


def silent(store: Store, model: str, now_s: float) -> list[tuple[list[int], list[int]]]:
    """(lead_s, trail_s) of every level above a second."""
    levels = store.traffic(model, now_s).levels[1:]
    return [(list(level.lead_s), list(level.trail_s)) for level in levels]  # type: ignore[arg-type]


def test_a_bucket_tells_the_seconds_of_its_first_and_last_request_and_of_nothing_else(
    store: Store, open_store: Open, clock: FakeClock
) -> None:
    """Those in which something was only in progress say nothing."""
    rows = [
        second("m", NOON - 50),
        second("m", NOON - 40),
        TrafficRow("m", int(NOON) - 20, 0, 0, 0, 1.0, 0.0),
    ]
    store.add_traffic(rows)
    expected = [([10], [39]), ([250], [39]), ([3550], [39])]
    assert silent(store, "m", NOON) == expected
    assert store.flush()
    assert silent(open_store(), "m", NOON) == expected
    store.add_traffic([TrafficRow("quiet", int(NOON) - 5, 0, 0, 0, 1.0, 0.0)])
    assert silent(store, "quiet", NOON) == [([60], [60]), ([300], [300]), ([3600], [3600])]


def test_imports_tell_the_seconds_as_far_as_they_know_them(
    store: Store, open_store: Open, clock: FakeClock
) -> None:
    at_s = NOON - 3 * DAY + 90
    assert store.import_traffic([("s", at_s, 1, 0, 0, 0.0), ("s", at_s + 5, 1, 0, 0, 0.0)], 1) == 2
    assert store.import_traffic([("min", NOON - 3 * DAY + 60, 9, 0, 0, 0.0)], 60) == 1
    assert store.import_traffic([("two", NOON - 3 * DAY, 9, 0, 0, 0.0)], 600) == 1
    for at in (store, open_store()):
        assert silent(at, "s", NOON)[1:] == [([90], [204]), ([90], [3504])]
        assert silent(at, "min", NOON)[1:] == [([0], [0]), ([0], [0])]
        assert silent(at, "two", NOON)[1:] == [([0, 0], [0, 0]), ([0], [0])]


@pytest.mark.parametrize("bucket_s", [7200.5, 86400.0, math.inf, math.nan, 0.0])
def test_an_import_that_no_level_can_show_is_refused(store: Store, bucket_s: float) -> None:
    """Before anything is recorded: the same source can be imported in shorter windows."""
    rows = [("m", NOON - 3 * DAY, 100, 0, 0, 0.0)]
    with pytest.raises(ConfigError, match=r"bucket_s is .*at most 7200"):
        store.import_traffic(rows, bucket_s, source="days")
    assert store.models_with_traffic() == []
    assert store.import_traffic(rows, 7200.0, source="days") == 1
    assert counts(store, "m", NOON)[3600] == {(NOON - 3 * DAY) // 3600 + i: 50 for i in (0, 1)}


def test_what_waited_until_it_was_minutes_tells_no_seconds(
    url: str, open_store: Open, clock: FakeClock
) -> None:
    """A database that was away for long."""
    store = Store.open(url, clock=clock, max_pending=4)
    store.add_traffic([second("m", NOON - 3000 + 7 * at) for at in range(40)])
    batch = store._memory.buffer
    assert {step_s for _, _, step_s in batch.traffic} == {300}
    store.flush()
    for lead_s, trail_s in silent(open_store(), "m", NOON)[1:]:
        assert set(lead_s) | set(trail_s) <= {0}
    store.close()


def test_a_database_of_an_earlier_relight_is_used_and_its_buckets_tell_no_seconds(
    store: Store, open_store: Open, url: str, clock: FakeClock
) -> None:
    store.add_traffic([second("m", NOON - 3 * DAY + 90)])
    store.close()
    make_version_1(url)
    again = open_store()
    assert silent(again, "m", NOON)[1:] == [([0], [0]), ([0], [0])]
    # What comes to an old bucket tells nothing of what was in it before; a new one is told whole.
    again.import_traffic([("m", NOON - 3 * DAY + 100, 1, 0, 0, 0.0)], 1)
    again.add_traffic([second("m", NOON - 10)])
    assert again.flush()
    assert silent(open_store(), "m", NOON)[1:] == [([0, 290], [0, 9]), ([0, 3590], [0, 9])]
