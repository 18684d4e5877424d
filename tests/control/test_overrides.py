"""What people said at run time, over what the fleet file says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaling.core.types import Rung, Spec
from autoscaling.live import overrides
from autoscaling.live.invalid import InvalidValue
from autoscaling.live.records import Override, OverrideKind
from autoscaling.live.values import KINDS, parse

NOW_S = 1_795_500_000.0
BASE = {
    "a": Spec("a", wait_cost=10.0, max_replicas=2),
    "b": Spec("b", policy="kpa", params={"target_utilization": 0.5}),
}
DAY_S = 86400.0


def said(
    kind: OverrideKind,
    value: dict[str, Any],
    model: str | None = "a",
    made_s: float = NOW_S - 100,
    **more: Any,
) -> Override:
    return Override(f"{kind}-{made_s}", kind, model, value, "ann", made_s, **more)


def applied(*rows: Override, now_s: float = NOW_S, schedules: Any = None) -> dict[str, Spec]:
    return overrides.apply(BASE, rows, schedules or {}, now_s, DAY_S)


def test_without_overrides_nothing_changes() -> None:
    assert applied() == BASE


def test_a_later_layer_wins_and_one_model_wins_over_the_fleet() -> None:
    specs = applied(
        said("policy", {"wait_cost": 3.0}, made_s=NOW_S - 50),
        said("policy", {"wait_cost": 2.0, "priority": 7}, made_s=NOW_S - 90),
        said("policy", {"wait_cost": 1.0, "keep_alive_s": 5.0}, model=None, made_s=NOW_S - 10),
    )
    assert (specs["a"].wait_cost, specs["a"].priority, specs["a"].keep_alive_s) == (3.0, 7, 5.0)
    assert (specs["b"].wait_cost, specs["b"].keep_alive_s) == (1.0, 5.0)


def test_another_policy_drops_the_parameters_of_the_one_before() -> None:
    specs = applied(
        said("policy", {"params": {"stable_window_s": 30.0}}, model="b", made_s=NOW_S - 90),
        said("policy", {"policy": "reactive", "params": {"idle_s": 9.0}}, model="b", made_s=NOW_S - 80),
    )
    assert (specs["b"].policy, specs["b"].params) == ("reactive", {"idle_s": 9.0})
    kept = applied(said("policy", {"params": {"stable_window_s": 30.0}}, model="b"))
    assert kept["b"].params == {"target_utilization": 0.5, "stable_window_s": 30.0}


def test_an_idle_time_that_is_said_later_holds() -> None:
    """The policies' parameter goes before the field: it would else be set, shown and not gone by."""
    said_before = said("policy", {"policy": "keep-alive", "params": {"idle_s": 9.0}}, model="b", made_s=1.0)
    later = applied(said_before, said("policy", {"keep_alive_s": 5.0}, model="b", made_s=2.0))
    assert (later["b"].params, later["b"].keep_alive_s) == ({}, 5.0)
    # What says both, as an earlier Relight took it, stays what it was; and to other policies it says another thing.
    both = applied(said("policy", {**said_before.value, "keep_alive_s": 5.0}, model="b"))
    assert (both["b"].params, both["b"].keep_alive_s) == ({"idle_s": 9.0}, 5.0)
    windows = said("policy", {"policy": "scheduled", "params": {"idle_s": 9.0}}, model="b", made_s=1.0)
    kept = applied(windows, said("policy", {"keep_alive_s": 5.0}, model="b", made_s=2.0))
    assert (kept["b"].params, kept["b"].keep_alive_s) == ({"idle_s": 9.0}, 5.0)


def test_where_bounds_contradict_what_was_said_at_run_time_holds() -> None:
    """The fleet file may have changed since: the model is not scaled beyond what was said last."""
    assert applied(said("policy", {"min_replicas": 5}))["a"].max_replicas == 5
    high = applied(
        said("policy", {"min_replicas": 2}, made_s=1.0), said("policy", {"max_replicas": 1}, made_s=2.0)
    )
    assert (high["a"].min_replicas, high["a"].max_replicas) == (1, 1)


def test_what_has_ended_was_undone_or_is_for_a_model_that_is_gone_is_left_out() -> None:
    gone = [
        said("policy", {"wait_cost": 1.0}, until_s=NOW_S),
        said("policy", {"wait_cost": 1.0}, undone_s=NOW_S - 1),
        said("policy", {"wait_cost": 1.0}, model="removed"),
        said("prewarm", {"start_s": NOW_S, "end_s": NOW_S + 9}, model="removed"),
    ]
    told: list[str] = []
    specs = overrides.apply(BASE, gone, {}, NOW_S, DAY_S, lambda label, _error: told.append(label))
    assert (specs, told) == (BASE, [])
    assert applied(said("policy", {"wait_cost": 1.0}, until_s=NOW_S + 1))["a"].wait_cost == 1.0


def test_what_is_not_understood_is_left_out_and_reported() -> None:
    """Another version may have written it. The rest is applied."""
    told: list[tuple[str, str]] = []
    rows = [
        said("policy", {"wait_cost": "much"}, made_s=1.0),
        said("policy", {"policy": "psychic"}, made_s=2.0),
        said("schedule", {"cron": "never", "duration_s": 5.0}, made_s=3.0),
        said("policy", {"wait_cost": 4.0}, made_s=4.0),
    ]
    schedules = {"b": [{"cron": "0 0 30 2 *", "duration_s": 60.0}]}
    specs = overrides.apply(
        BASE, rows, schedules, NOW_S, DAY_S, lambda label, error: told.append((label, error.field))
    )
    assert specs["a"].wait_cost == 4.0
    assert told == [
        ("policy-1.0", "wait_cost"),
        ("policy-2.0", "policy"),
        ("schedule-3.0", "cron"),
        ("b fleet:0", "cron"),
    ]
    assert overrides.mode([said("mode", {"mode": "turbo"})], "active", NOW_S) == "active"
    assert overrides.shadows(BASE, [said("shadow", {"policy": "psychic"})], NOW_S) == {}


def test_prewarms_and_schedules_become_windows_in_the_order_of_time() -> None:
    """NOW_S is 06:00 UTC, 07:00 in Berlin."""
    nine_s = NOW_S + 2 * 3600
    specs = applied(
        said("prewarm", {"replicas": 2, "start_s": NOW_S + 9000.0, "end_s": NOW_S + 9900.0}, made_s=1.0),
        said(
            "prewarm",
            {"rung": "parked", "replicas": 9, "start_s": NOW_S - 10, "end_s": NOW_S + 10},
            made_s=2.0,
        ),
        said(
            "schedule",
            {"cron": "0 9 * * *", "duration_s": 3600.0, "timezone": "Europe/Berlin"},
            model=None,
            made_s=3.0,
        ),
        schedules={
            "b": [{"cron": "30 9 * * *", "duration_s": 60.0, "timezone": "Europe/Berlin", "replicas": 3}]
        },
    )
    a, b = specs["a"].windows, specs["b"].windows
    assert [(w.id, w.source, w.start_s, w.replicas, w.rung) for w in a] == [
        ("prewarm-2.0", "prewarm", NOW_S - 10, 0, Rung.PARKED),
        ("schedule-3.0", "schedule", nine_s, 1, Rung.SERVING),
        ("prewarm-1.0", "prewarm", NOW_S + 9000.0, 2, Rung.SERVING),
    ]
    assert [(w.id, w.start_s, w.end_s, w.replicas) for w in b] == [
        ("schedule-3.0", nine_s, nine_s + 3600, 1),
        ("fleet:0", nine_s + 1800, nine_s + 1860, 3),
    ]


def test_windows_beyond_the_horizon_or_over_are_left_out() -> None:
    far = {"start_s": NOW_S + DAY_S, "end_s": NOW_S + DAY_S + 60}
    over = {"start_s": NOW_S - 60, "end_s": NOW_S}
    assert applied(said("prewarm", far, made_s=1.0), said("prewarm", over, made_s=2.0))["a"].windows == ()


def test_the_mode_that_was_set_last_holds() -> None:
    rows = [
        said("mode", {"mode": "off"}, model=None, made_s=2.0),
        said("mode", {"mode": "shadow"}, model=None, made_s=3.0, until_s=NOW_S + 5),
        said("mode", {"mode": "active"}, model=None, made_s=1.0),
    ]
    assert overrides.mode(rows, "active", NOW_S) == "shadow"
    assert overrides.mode(rows, "active", NOW_S + 5) == "off"
    assert overrides.mode([], "active", NOW_S) == "active"


def test_a_shadow_is_each_models_own_spec_with_its_values() -> None:
    rows = [
        said("shadow", {"policy": "kpa", "wait_cost": 99.0, "name": "k"}, model=None, made_s=1.0),
        said("shadow", {"policy": "fixed", "params": {"replicas": 2.0}}, model="a", made_s=2.0),
    ]
    found = overrides.shadows(BASE, rows, NOW_S)
    assert set(found) == {"k", "shadow"}
    assert {m: (s.policy, s.wait_cost) for m, s in found["k"].items()} == {
        "a": ("kpa", 99.0),
        "b": ("kpa", 99.0),
    }
    assert found["k"]["b"].params == {"target_utilization": 0.5}
    assert {m: (s.policy, s.params) for m, s in found["shadow"].items()} == {
        "a": ("fixed", {"replicas": 2.0})
    }


WRONG: list[tuple[OverrideKind, dict[str, Any], str, str]] = [
    ("policy", {}, "", "at least one of policy"),
    ("policy", {"polcy": "kpa"}, "polcy", "policy?"),
    ("policy", {"policy": "predictiv"}, "policy", "predictive?"),
    ("policy", {"policy": "kpa", "params": {"burst_s": 1.0}}, "params.burst_s", "a parameter of kpa"),
    (
        "policy",
        {"policy": "kpa", "params": {"stable_window_s": 1.0}},
        "params.stable_window_s",
        "from 6 to 3600",
    ),
    ("policy", {"wait_cost": -1.0}, "wait_cost", "at least 0"),
    ("policy", {"wait_cost": "5"}, "wait_cost", "a number"),
    ("policy", {"wait_cost": float("nan")}, "wait_cost", "a finite number"),
    ("policy", {"wait_cost": float("inf")}, "wait_cost", "a finite number"),
    ("policy", {"min_replicas": 1.5}, "min_replicas", "a whole number"),
    ("policy", {"min_replicas": True}, "min_replicas", "a whole number"),
    ("policy", {"max_replicas": 0}, "max_replicas", "at least 1"),
    ("policy", {"min_replicas": 3, "max_replicas": 2}, "min_replicas", "at most max_replicas (2)"),
    ("policy", {"target_ongoing_requests": 0.0}, "target_ongoing_requests", "at least 0.01"),
    ("policy", {"params": [1]}, "params", "an object"),
    ("prewarm", {"start_s": 5.0}, "end_s", "required"),
    ("prewarm", {"start_s": 5.0, "end_s": 5.0}, "end_s", "after start_s"),
    ("prewarm", {"start_s": 5.0, "end_s": 1e9}, "end_s", "31 days"),
    ("prewarm", {"start_s": 5.0, "end_s": 6.0, "replicas": 0}, "replicas", "at least 1"),
    ("prewarm", {"start_s": 5.0, "end_s": 6.0, "rung": "hot"}, "rung", "'parked'"),
    ("schedule", {"cron": "0 9 * *", "duration_s": 5.0}, "cron", "five fields"),
    ("schedule", {"cron": "0 9 * * *", "duration_s": 0.0}, "duration_s", "more than 0"),
    ("schedule", {"cron": "0 9 * * *", "duration_s": 5.0, "timezone": "Mars"}, "timezone", "IANA"),
    ("mode", {"mode": "turbo"}, "mode", "'active'"),
    ("shadow", {"policy": "kpa", "name": "a b"}, "name", "matches"),
    ("shadow", {}, "policy", "required"),
    (
        "shadow",
        {"policy": "kpa", "min_replicas": 3, "max_replicas": 2},
        "min_replicas",
        "at most max_replicas (2)",
    ),
]


@pytest.mark.parametrize(("kind", "value", "field", "expected"), WRONG)
def test_a_wrong_value_names_the_field_the_value_and_what_would_be_right(
    kind: OverrideKind, value: dict[str, Any], field: str, expected: str
) -> None:
    with pytest.raises(InvalidValue) as caught:
        parse(KINDS[kind], value)
    assert caught.value.field == field
    assert expected in caught.value.expected
    assert str(caught.value).startswith(f"{field}: " if field else "")


@given(
    kind=st.sampled_from(sorted(KINDS)),
    value=st.dictionaries(
        st.one_of(
            st.sampled_from(["policy", "params", "mode", "cron", "start_s", "end_s", "rung"]),
            st.text(max_size=5),
        ),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
            lambda inner: (
                st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
            ),
            max_leaves=5,
        ),
        max_size=4,
    ),
)
def test_whatever_a_value_holds_it_is_understood_or_one_error(
    kind: OverrideKind, value: dict[str, Any]
) -> None:
    rows = [Override("x", kind, None, value, "ann", 1.0)]
    told: list[str] = []
    specs = overrides.apply(BASE, rows, {}, NOW_S, DAY_S, lambda label, _error: told.append(label))
    assert set(specs) == set(BASE)
    assert all(spec.min_replicas <= spec.max_replicas for spec in specs.values())
    assert told in ([], ["x"])
