"""Policies, modes, shadows and prewarms through the control API, with a real store."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from autoscaling.core.policies import POLICIES
from autoscaling.core.types import Decision, Reason, Rung
from autoscaling.live.records import PrewarmRow, UsageRow
from autoscaling.live.store import Store
from autoscaling.live.values import LATEST_S
from tests.control.lab import NOW_S, ORG, SMALL, Lab


def test_every_policy_is_listed_with_its_source_and_its_parameters(lab: Lab) -> None:
    answer = lab.ok("GET", "policies")
    assert {row["name"] for row in answer["policies"]} == set(POLICIES)
    for row in answer["policies"]:
        assert row["summary"] and row["source"]
        assert [p["name"] for p in row["params"]] == [p.name for p in POLICIES[row["name"]].params]
    assert [row["name"] for row in answer["policies"] if row["default"]] == ["predictive"]
    assert [row["model"] for row in answer["models"]] == [SMALL, ORG]


def test_what_is_set_holds_at_once_shows_who_and_can_be_undone(lab: Lab) -> None:
    made = lab.ok(
        "PUT", f"policies/{SMALL}", {"policy": "kpa", "params": {"stable_window_s": 30.0}, "for_s": 600.0}
    )
    override = made["override"]
    assert (override["who"], override["made_s"], override["until_s"]) == ("ann@lab", NOW_S, NOW_S + 600)
    assert made["models"][SMALL]["before"]["policy"] == "predictive"
    shown = lab.ok("GET", f"policies/{SMALL}")
    assert shown["overridden"] == ["policy", "params"]
    assert (shown["spec"]["policy"], shown["base"]["policy"]) == ("kpa", "predictive")
    assert lab.view.models()[SMALL].params == {"stable_window_s": 30.0}
    assert lab.view.changes == 1
    lab.ok("DELETE", f"overrides/{override['id']}")
    assert lab.view.models()[SMALL].policy == "predictive"
    status, error = lab.refused("DELETE", f"overrides/{override['id']}")
    assert status == 409
    assert "was undone by ann@lab" in error["message"]


def test_it_ends_by_itself(lab: Lab) -> None:
    override = lab.ok("PUT", f"policies/{SMALL}", {"wait_cost": 3.0, "for_s": 600.0})["override"]
    lab.clock.time_s += 600
    assert lab.ok("GET", f"policies/{SMALL}")["spec"]["wait_cost"] == 10.0
    status, error = lab.refused("DELETE", f"overrides/{override['id']}")
    assert (status, "has ended" in error["message"]) == (409, True)


def test_the_last_word_wins_after_the_clock_was_set_back(lab: Lab) -> None:
    """Of modes, of policies, and of what was said after it was set back once more."""
    for minute, (mode, cost) in enumerate((("shadow", 2.0), ("off", 3.0), ("active", 4.0), ("shadow", 5.0))):
        lab.clock.time_s = NOW_S - 3600 * (minute % 2) - 60 * (minute // 2)
        lab.ok("PUT", "mode", {"mode": mode})
        lab.ok("PUT", f"policies/{SMALL}", {"wait_cost": cost})
        assert lab.ok("GET", "mode")["mode"] == mode
        assert lab.view.models()[SMALL].wait_cost == cost


def test_it_survives_a_restart(lab: Lab, tmp_path: Path) -> None:
    lab.ok("PUT", "policies", {"wait_cost": 3.0})
    lab.store.close()
    again = Store.open(f"sqlite:///{tmp_path / 'relight.db'}", clock=lab.clock)
    lab.view.store = lab.store = again
    assert {spec.wait_cost for spec in lab.view.models().values()} == {3.0}
    assert lab.ok("GET", "overrides")["overrides"][0]["who"] == "ann@lab"


@pytest.mark.parametrize("dry_run", [0, 1])
def test_what_is_told_to_hold_after_is_what_does(lab: Lab, dry_run: int) -> None:
    """What was said of one model holds over what is said for the whole fleet."""
    lab.ok("PUT", f"policies/{SMALL}", {"keep_alive_s": 300.0})
    lab.clock.time_s += 60
    told = lab.ok("PUT", "policies", {"keep_alive_s": 30.0, "priority": 3}, dry_run=dry_run)["models"]
    assert (told[SMALL]["after"]["keep_alive_s"], told[SMALL]["after"]["priority"]) == (300.0, 3)
    assert (told[ORG]["before"]["keep_alive_s"], told[ORG]["after"]["keep_alive_s"]) == (60.0, 30.0)
    for model, told_of in told.items():
        holds = lab.ok("GET", f"policies/{model}")["spec"]
        assert holds == told_of["before" if dry_run else "after"]


def test_a_dry_run_changes_nothing(lab: Lab) -> None:
    answer = lab.ok("PUT", f"policies/{SMALL}", {"wait_cost": 3.0}, dry_run=1)
    assert answer["override"] is None
    assert answer["models"][SMALL]["after"]["wait_cost"] == 3.0
    assert lab.ok("GET", "overrides")["overrides"] == []


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"min_replicas": 5}, "min_replicas"),
        ({"params": {"target_utilization": 0.5}}, "params.target_utilization"),
        ({"policy": "kpa", "params": {"burst_s": 1.0}}, "params.burst_s"),
        ({"policy": "fixed", "params": {"replicas": 50.0}}, "params.replicas"),
        ({"policy": "fixed", "params": {"replicas": 3.0}, "max_replicas": 2}, "params.replicas"),
        ({"wait_cost": 1.0, "until_s": NOW_S}, "until_s"),
        ({"wait_cost": 1.0, "until_s": (NOW_S + 9) * 1000}, "until_s"),
        ({"wait_cost": 1.0, "for_s": 1e12}, "for_s"),
        ({"wait_cost": 1.0, "until_s": NOW_S + 9, "for_s": 9.0}, "until_s"),
        ({"for_s": 9.0}, ""),
        ({"wait_cots": 1.0}, "wait_cots"),
    ],
)
def test_what_can_not_be_is_refused_and_not_kept(lab: Lab, body: dict[str, object], field: str) -> None:
    status, error = lab.refused("PUT", f"policies/{SMALL}", body)
    assert (status, error["field"]) == (422, field)
    assert lab.ok("GET", "overrides", history=1)["overrides"] == []


def test_the_latest_time_that_is_taken_can_be_told(lab: Lab) -> None:
    """Milliseconds taken for seconds would end in the year 58,000, which no clock shows."""
    lab.ok("PUT", f"policies/{SMALL}", {"wait_cost": 1.0, "until_s": LATEST_S - 1})
    lab.ok("POST", "prewarms", {"model": SMALL, "start_s": LATEST_S - 9, "end_s": LATEST_S - 1})
    text = " ".join(lab.ok("GET", f"explain/{SMALL}", timezone="Pacific/Kiritimati")["text"])
    assert "until Fri 9999-01-01" in text


def test_a_bound_below_what_a_model_is_fixed_at_is_refused(lab: Lab) -> None:
    fixed = {"policy": "fixed", "params": {"replicas": 3.0}, "max_replicas": 3}
    lab.ok("PUT", f"policies/{SMALL}", fixed)
    status, error = lab.refused("PUT", f"policies/{SMALL}", {"max_replicas": 2})
    assert (status, error["field"]) == (422, "max_replicas")
    assert "3 replicas" in error["expected"]


def test_unset_takes_back_what_was_set_for_the_model_alone(lab: Lab) -> None:
    lab.ok("PUT", f"policies/{SMALL}", {"wait_cost": 3.0})
    lab.ok("PUT", f"policies/{SMALL}", {"priority": 2})
    lab.ok("PUT", "policies", {"keep_alive_s": 5.0})
    assert len(lab.ok("DELETE", f"policies/{SMALL}")["undone"]) == 2
    assert lab.ok("GET", f"policies/{SMALL}")["overridden"] == ["keep_alive_s"]
    assert lab.refused("DELETE", f"policies/{SMALL}")[0] == 404
    assert len(lab.ok("DELETE", "policies")["undone"]) == 1


def test_the_mode(lab: Lab) -> None:
    assert lab.ok("GET", "mode") == {"mode": "active", "override": None}
    lab.ok("PUT", "mode", {"mode": "off", "for_s": 60.0})
    found = lab.ok("GET", "mode")
    assert (found["mode"], found["override"]["who"]) == ("off", "ann@lab")
    lab.clock.time_s += 60
    assert lab.ok("GET", "mode")["mode"] == "active"


def test_a_prewarm_now_and_one_to_come(lab: Lab) -> None:
    now = lab.ok("POST", "prewarms", {"model": SMALL})["prewarm"]
    assert now["value"] == {"replicas": 1, "rung": "serving", "start_s": NOW_S, "end_s": NOW_S + 900}
    assert now["until_s"] == NOW_S + 900
    later = lab.ok(
        "POST", "prewarms", {"model": SMALL, "rung": "parked", "start_s": NOW_S + 3600, "for_s": 60.0}
    )
    assert later["prewarm"]["value"]["replicas"] == 0
    windows = lab.view.models()[SMALL].windows
    assert [(w.start_s, w.replicas, w.rung) for w in windows] == [
        (NOW_S, 1, Rung.SERVING),
        (NOW_S + 3600, 0, Rung.PARKED),
    ]
    assert [row["id"] for row in lab.ok("GET", "prewarms", model=SMALL)["prewarms"]] == [
        now["id"],
        later["prewarm"]["id"],
    ]
    lab.ok("DELETE", f"prewarms/{now['id']}")
    assert len(lab.view.models()[SMALL].windows) == 1
    assert lab.refused("DELETE", f"schedules/{later['prewarm']['id']}")[0] == 404


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"model": SMALL, "replicas": 5}, "replicas"),
        ({"model": SMALL, "replicas": 0}, "replicas"),
        ({"model": SMALL, "end_s": NOW_S}, "end_s"),
        ({"model": SMALL, "start_s": NOW_S * 1000}, "start_s"),
        ({"model": SMALL, "start_s": NOW_S - 1000, "for_s": 1000.0}, "start_s"),
        ({"model": SMALL, "end_s": NOW_S + 9, "for_s": 9.0}, "end_s"),
        ({"model": SMALL, "rung": "hot"}, "rung"),
        ({}, "model"),
    ],
)
def test_a_prewarm_that_can_not_be_is_refused(lab: Lab, body: dict[str, object], field: str) -> None:
    status, error = lab.refused("POST", "prewarms", body)
    assert (status, error["field"]) == (422, field)


def test_a_model_that_is_not_parked_can_not_be_asked_to_be(lab: Lab) -> None:
    """It would be answered as done, and never come about."""
    lab.view.base[ORG] = replace(lab.view.base[ORG], park=False)
    schedule = {"cron": "0 9 * * *", "duration_s": 60.0}
    for path, body in (("prewarms", {"model": ORG}), ("schedules", {"model": ORG, **schedule})):
        status, error = lab.refused("POST", path, {**body, "rung": "parked"})
        assert (status, error["field"]) == (422, "rung")
        assert f"{ORG}'s scaling.park is false" in error["message"]
        lab.ok("POST", path, {**body, "rung": "template"})
        lab.ok("POST", path, {**body, "model": SMALL, "rung": "parked"})
    assert lab.refused("POST", "schedules", {**schedule, "rung": "parked"})[0] == 422, "for all models"


def test_where_no_memory_is_for_it_nothing_can_be_asked_to_be_parked(lab: Lab) -> None:
    lab.view.park_memory_bytes = 0
    schedule = {"cron": "0 9 * * *", "duration_s": 60.0}
    for path, body in (("prewarms", {"model": SMALL}), ("schedules", {"model": SMALL, **schedule})):
        status, error = lab.refused("POST", path, {**body, "rung": "parked"})
        assert (status, error["field"]) == (422, "rung")
        assert error["expected"].startswith(
            "weights, template or serving: engine_host.park_memory_bytes is 0"
        )
        lab.ok("POST", path, {**body, "rung": "template"})


def test_a_prewarm_that_would_not_be_acted_on_is_a_conflict(lab: Lab) -> None:
    lab.ok("PUT", "mode", {"mode": "shadow"})
    status, error = lab.refused("POST", "prewarms", {"model": SMALL})
    assert (status, error["field"], error["expected"]) == (409, "mode", "active")
    lab.ok("POST", "prewarms", {"model": SMALL, "start_s": NOW_S + 60})


def test_what_became_of_prewarms_is_told(lab: Lab) -> None:
    lab.store.put_prewarm(
        PrewarmRow("p1", SMALL, NOW_S - 60, "prewarm", 1, Rung.SERVING, hit_s=NOW_S - 50, cost_gpu_s=9.0)
    )
    [row] = lab.ok("GET", "prewarms")["outcomes"]
    assert (row["rung"], row["hit_s"], row["cost_gpu_s"]) == ("serving", NOW_S - 50, 9.0)


def test_a_schedule_shows_its_next_times_on_its_own_clock(lab: Lab) -> None:
    body = {
        "model": SMALL,
        "cron": "0 9 * * MON-FRI",
        "duration_s": 28800.0,
        "timezone": "Europe/Berlin",
        "replicas": 2,
    }
    checked = lab.ok("POST", "schedules", body, dry_run=1)
    assert checked["schedule"] is None
    assert checked["next"][0] == {"start_s": NOW_S + 7200, "end_s": NOW_S + 36000}
    made = lab.ok("POST", "schedules", body)["schedule"]
    lab.view.schedules[ORG] = [{"cron": "30 6 * * *", "duration_s": 60.0}]
    found = lab.ok("GET", "schedules/next", count=3)["next"]
    assert [(row["id"], row["model"], row["start_s"]) for row in found] == [
        ("fleet:0", ORG, NOW_S + 1800),
        (made["id"], SMALL, NOW_S + 7200),
        ("fleet:0", ORG, NOW_S + 1800 + 86400),
    ]
    listed = lab.ok("GET", "schedules", model=SMALL)
    assert [row["id"] for row in listed["schedules"]] == [made["id"]]
    assert {row["id"] for row in listed["windows"]} == {made["id"]}
    assert lab.refused("DELETE", "schedules/fleet:0")[0] == 409
    lab.ok("DELETE", f"schedules/{made['id']}")
    assert lab.ok("GET", "schedules", model=SMALL) == {"schedules": [], "windows": []}


def test_a_schedule_of_the_fleet_file_shows_its_next_times_however_far_they_are(lab: Lab) -> None:
    """It is Tuesday: on Fridays alone is no less a schedule than every day."""
    lab.view.schedules[ORG] = [
        {"cron": "0 9 * * FRI", "duration_s": 3600.0, "replicas": 2},
        {"cron": "0 0 1 1 *", "duration_s": 60.0, "rung": "template"},
    ]
    found = lab.ok("GET", "schedules/next", count=7)["next"]
    friday_s = NOW_S + 3 * 86400 + 3 * 3600
    shared = {"id": "fleet:0", "model": ORG, "replicas": 2, "rung": "serving"}
    assert found[0] == {**shared, "start_s": friday_s, "end_s": friday_s + 3600}
    assert [row["start_s"] for row in found[:5]] == [friday_s + 7 * 86400 * n for n in range(5)]
    assert [(row["rung"], row["replicas"]) for row in found if row["id"] == "fleet:1"] == [("template", 0)]
    assert lab.ok("GET", "schedules/next", model=SMALL)["next"] == []


def test_a_schedule_for_all_models_must_fit_each(lab: Lab) -> None:
    body = {"cron": "0 9 * * *", "duration_s": 60.0, "replicas": 3}
    status, error = lab.refused("POST", "schedules", body)
    assert (status, error["field"]) == (422, "replicas")
    assert ORG in error["expected"]


def test_a_shadow_is_compared_with_the_active_policy(lab: Lab) -> None:
    lab.ok("PUT", "shadow", {"policy": "kpa", "name": "knative"})
    day = datetime.fromtimestamp(NOW_S, UTC).date().isoformat()
    lab.store.add_usage(
        [
            UsageRow(SMALL, day, "active", {"SERVING": 100.0}, requests=10, waited_s=5.0),
            UsageRow(ORG, day, "active", {"SERVING": 7.0}),
            UsageRow(
                SMALL, day, "shadow:knative", {"SERVING": 160.0, "PARKED": 1.0}, requests=10, waited_s=2.0
            ),
        ]
    )
    lab.view.shadowed = {
        "knative": {SMALL: Decision(SMALL, NOW_S, 2, Rung.TEMPLATE, Reason.PANIC, float("inf"), "kpa")}
    }
    [shadow] = lab.ok("GET", "shadow")["shadows"]
    assert shadow["name"] == "knative"
    assert shadow["decisions"][SMALL]["replicas"] == 2
    assert shadow["decisions"][SMALL]["until_s"] is None
    comparison = shadow["comparison"]
    assert (comparison["gpu_s_difference"], comparison["waited_s_difference"]) == (61.0, -3.0)
    assert comparison["same_span"] is False
    lab.store.add_usage([UsageRow(SMALL, day, "beside:knative", {"SERVING": 40.0}, waited_s=1.0)])
    [shadow] = lab.ok("GET", "shadow")["shadows"]
    assert shadow["comparison"]["gpu_s_difference"] == 121.0
    assert shadow["comparison"]["same_span"] is True


def test_a_shadow_of_the_same_name_is_replaced_and_can_be_stopped(lab: Lab) -> None:
    lab.ok("PUT", "shadow", {"policy": "kpa"})
    lab.ok("PUT", "shadow", {"policy": "reactive", "model": SMALL})
    [row] = lab.ok("GET", "overrides")["overrides"]
    assert row["value"]["policy"] == "reactive"
    lab.ok("DELETE", "shadow/shadow")
    assert lab.ok("GET", "shadow")["shadows"] == []
    for wrong in ({"min_replicas": 3}, {"min_replicas": 5, "max_replicas": 2}):
        status, error = lab.refused("PUT", "shadow", {"policy": "kpa", **wrong})
        assert (status, error["field"]) == (422, "min_replicas")


def test_the_history_of_overrides_tells_what_is_over(lab: Lab) -> None:
    lab.ok("PUT", "policies", {"wait_cost": 3.0})
    first = lab.ok("DELETE", "policies", who="bob")["undone"][0]
    lab.ok("PUT", "policies", {"wait_cost": 4.0})
    rows = {row["id"]: row for row in lab.ok("GET", "overrides", history=1)["overrides"]}
    assert len(rows) == 2
    assert (rows[first["id"]]["in_force"], rows[first["id"]]["undone_by"]) == (False, "bob")
    assert sum(row["in_force"] for row in rows.values()) == 1


def test_what_was_set_for_a_model_that_is_gone_is_still_listed_and_can_be_undone(lab: Lab) -> None:
    """And holds again should the model come back."""
    override = lab.ok("PUT", f"policies/{SMALL}", {"wait_cost": 3.0})["override"]
    gone = lab.view.base.pop(SMALL)
    [row] = lab.ok("GET", "overrides")["overrides"]
    assert (row["id"], row["model"], row["in_force"]) == (override["id"], SMALL, True)
    lab.view.base[SMALL] = gone
    assert lab.ok("GET", f"policies/{SMALL}")["spec"]["wait_cost"] == 3.0
    del lab.view.base[SMALL]
    lab.ok("DELETE", f"overrides/{override['id']}")
    assert lab.ok("GET", "overrides")["overrides"] == []
