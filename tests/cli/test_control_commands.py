"""The commands against a control API over real HTTP: what they do, what they print, what they print as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autoscaling.core.policies import POLICIES
from autoscaling.core.types import Decision, Reason, Rung
from autoscaling.live.records import ColdStartRow, PrewarmRow, TrafficRow, UsageRow
from tests.cli.conftest import Cluster
from tests.control.lab import NOW_S, ORG, SMALL


def test_policy_list_names_every_policy_and_every_model(cluster: Cluster) -> None:
    text = cluster.says("policy", "list")
    for name in POLICIES:
        assert name in text
    assert "mode: active" in text
    assert SMALL in text and ORG in text


def test_policy_set_show_unset(cluster: Cluster) -> None:
    said = cluster.says(
        *(
            "policy",
            "set",
            ORG,
            "--policy",
            "kpa",
            "--param",
            "stable_window_s=30",
            "--param",
            "target_utilization=0.5",
        ),
        *("--wait-cost", "3", "--keep-alive", "1m30s", "--min-replicas", "0", "--max-replicas", "3"),
        *("--target", "8", "--priority", "-1", "--for", "1h"),
    )
    assert "kpa" in said and "until 08:00:00" in said and "relight undo policy-" in said
    spec = cluster.view.models()[ORG]
    assert (spec.policy, spec.wait_cost, spec.keep_alive_s, spec.priority) == ("kpa", 3.0, 90.0, -1)
    assert spec.params == {"stable_window_s": 30.0, "target_utilization": 0.5}
    assert (spec.min_replicas, spec.max_replicas, spec.target_ongoing_requests) == (0, 3, 8.0)
    shown = cluster.says("policy", "show", ORG)
    assert "reactive" in shown and "1 min 30 s" in shown and "by ann@lab" in shown
    assert "undone: policy" in cluster.says("policy", "unset", ORG)
    assert cluster.view.models()[ORG].policy == "reactive"


def test_what_is_said_beside_a_policy_file_goes_before_it_one_by_one(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The file's other parameters stay, but for another policy, which has others."""
    file = tmp_path / "tuned.json"
    tuned = {"policy": "predictive", "params": {"stable_s": 240.0, "headroom": 0.6}, "wait_cost": 30.0}
    file.write_text(json.dumps({**tuned, "evidence": {}}))
    for command in ("set", "validate"):
        beside = (
            "policy",
            command,
            SMALL,
            "--file",
            str(file),
            "--param",
            "panic_s=12",
            "--param",
            "headroom=0.5",
        )
        said = cluster.says(*beside)
        assert all(word in said for word in ("stable_s 240", "headroom 0.5", "panic_s 12")), said
    cluster.clock.time_s += 60
    cluster.says(
        "policy", "set", SMALL, "--file", str(file), "--policy", "kpa", "--param", "stable_window_s=30"
    )
    spec = cluster.view.models()[SMALL]
    assert (spec.policy, spec.params, spec.wait_cost) == ("kpa", {"stable_window_s": 30.0}, 30.0)
    file.write_text(json.dumps({**tuned, "params": [1]}))
    assert "its params must be" in cluster.fails(2, "policy", "set", SMALL, "--file", str(file))


def test_two_idle_times_at_once_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"policy": "keep-alive", "params": {}, "keep_alive_s": 211.4}))
    both = ("--file", str(file), "--param", "idle_s=3")
    shadow = ("--keep-alive", "90s", "--param", "idle_s=3")
    for command in (
        ("policy", "set", ORG, *both),
        ("policy", "validate", ORG, *both),
        ("policy", "validate", ORG, *both, "--address", cluster.address),
        ("policy", "set", "--all", "--policy", "reactive", *shadow),
        ("policy", "shadow", "start", "keep-alive", *shadow),
    ):
        assert "expected none beside params.idle_s, 3.0, which goes before it" in cluster.fails(2, *command)
    cluster.says("policy", "set", ORG, "--policy", "scheduled", *shadow)


def test_policy_set_for_the_whole_fleet(cluster: Cluster) -> None:
    cluster.says("policy", "set", "--all", "--keep-alive", "0")
    assert {spec.keep_alive_s for spec in cluster.view.models().values()} == {0.0}
    assert "the whole fleet" in cluster.says("overrides")


def test_policy_explain_is_in_words(cluster: Cluster) -> None:
    cluster.idle()
    text = cluster.says("policy", "explain", SMALL)
    assert "a replica is kept for what may come" in text
    assert "until 07:03:20 (in 3 min 20 s)" in text
    assert "keep_cost_gpu_s" in text


def test_policy_shadow(cluster: Cluster) -> None:
    assert "no shadow policy" in cluster.says("policy", "shadow", "show")
    cluster.says(
        "policy", "shadow", "start", "kpa", "--name", "k", "--param", "stable_window_s=30", "--for", "1d"
    )
    cluster.idle()
    cluster.view.shadowed = {
        "k": {SMALL: Decision(SMALL, NOW_S, 3, Rung.TEMPLATE, Reason.PANIC, NOW_S, "kpa")}
    }
    day = "2026-11-24"
    cluster.store.add_usage([UsageRow(SMALL, day, "active", {"SERVING": 100.0}, waited_s=5.0)])
    cluster.store.add_usage([UsageRow(SMALL, day, "shadow:k", {"SERVING": 160.0}, waited_s=2.0)])
    text = cluster.says("policy", "shadow", "show")
    assert "3 (panic)" in text and "1 (keep-alive)" in text
    assert "would use 60 GPU-s more, and requests would wait 3 s less" in text
    cluster.says("policy", "shadow", "stop", "k")
    assert cluster.json("overrides")["overrides"] == []


def test_prewarm_now_at_a_time_list_and_undo(cluster: Cluster) -> None:
    cluster.says("prewarm", SMALL, "--replicas", "2", "--for", "10m")
    cluster.says("prewarm", SMALL, "--rung", "parked", "--at", "tomorrow 09:00")
    windows = cluster.view.models()[SMALL].windows
    tomorrow_s = NOW_S + 26 * 3600
    assert [(w.start_s, w.end_s, w.replicas, w.rung) for w in windows] == [
        (NOW_S, NOW_S + 600, 2, Rung.SERVING),
        (tomorrow_s, tomorrow_s + 900, 0, Rung.PARKED),
    ]
    cluster.store.put_prewarm(
        PrewarmRow(
            *("p", SMALL, NOW_S - 60, "prewarm", 1, Rung.SERVING),
            hit_s=NOW_S - 20,
            ended_s=NOW_S - 20,
            cost_gpu_s=40.0,
            spared_requests=2,
            spared_wait_s=3.6,
        )
    )
    text = cluster.says("prewarm", "list")
    assert "Wed 2026-11-25 09:00" in text and "after 40 s" in text and "2 requests 3.6 s" in text
    cluster.says("prewarm", "undo", windows[0].id)
    assert [w.id for w in cluster.view.models()[SMALL].windows] == [windows[1].id]
    # Options may come before the model, and a model may be named like a subcommand.
    cluster.says("prewarm", "--for", "1m", SMALL)
    assert "There is no model" in cluster.fails(2, "prewarm", "start", "list")


def test_schedule_add_next_list_remove(cluster: Cluster) -> None:
    add = ("schedule", "add", SMALL, "--cron", "0 9 * * MON-FRI", "--for", "8h", "--replicas", "2")
    assert "next: 09:00:00 to 17:00:00" in cluster.says(*add, "--dry-run")
    assert cluster.view.models()[SMALL].windows == ()
    cluster.says(*add)
    [row] = cluster.json("schedule", "list")["schedules"]
    assert row["value"]["timezone"] == "Europe/Berlin", "this machine's"
    spans = cluster.json("schedule", "next", "--count", "2")["next"]
    assert [span["start_s"] for span in spans] == [NOW_S + 7200, NOW_S + 7200 + 86400]
    assert "0 9 * * MON-FRI" in cluster.says("schedule", "list")
    assert "2 replicas" in cluster.says("schedule", "next", SMALL)
    assert "undone: schedule" in cluster.says("schedule", "remove", row["id"])
    assert "Nothing is scheduled" in cluster.says("schedule", "next")


@pytest.mark.usefixtures("library_zone")
def test_a_clock_without_a_name_shows_times_and_no_schedule_is_set_by_it(cluster: Cluster) -> None:
    add = ("schedule", "add", SMALL, "--cron", "0 9 * * *", "--for", "8h")
    for tz in ("CET-1CEST", "Foo/Bar"):
        assert "--timezone: this machine's own" in cluster.fails(2, *add, TZ=tz)
        assert cluster.says("accounts", "--since", "1h", TZ=tz)
        assert cluster.says("policy", "explain", SMALL, TZ=tz)
    assert cluster.json("schedule", "list")["schedules"] == []
    cluster.says(*add, "--timezone", "Europe/Berlin", TZ="CET-1CEST,M3.5.0,M10.5.0/3")
    [row] = cluster.json("schedule", "list")["schedules"]
    assert row["value"]["timezone"] == "Europe/Berlin"


def test_a_schedule_that_never_ends_is_said_to_be_always_in_force(cluster: Cluster) -> None:
    """Each of its times begins while the last goes on."""
    add = ("schedule", "add", SMALL, "--cron", "0 9 * * MON-FRI", "--for", "2w")
    said = cluster.says(*add, "--dry-run")
    assert said.startswith("It is always in force") and said.count("\n") == 1
    assert cluster.json(*add, "--dry-run")["next"] == [{"start_s": NOW_S, "end_s": None}]
    until = cluster.says(*add, "--until", "tomorrow 09:00", "--dry-run")
    assert until == "next: 07:00:00 to Wed 2026-11-25 09:00\n"
    cluster.says(*add)
    (row,) = cluster.says("schedule", "next").splitlines()[1:]
    assert row.split()[:3] == ["07:00:00", "always", SMALL]


def test_forecast_in_words_and_drawn(cluster: Cluster) -> None:
    assert "no forecast of smollm2-135m yet" in cluster.says("forecast", SMALL)
    cluster.idle()
    cluster.sparse()
    text = cluster.says("forecast", SMALL)
    assert "forecaster gaps" in text and "50 %" in text and "parked" in text
    cluster.dense()
    cluster.store.add_traffic(
        [TrafficRow(SMALL, int(NOW_S) - 1800, 5), TrafficRow(SMALL, int(NOW_S) - 60, 9)]
    )
    assert "60 requests a minute (9 of 10 times between 30 and 120)" in cluster.says("forecast", SMALL)
    plot = cluster.says("forecast", SMALL, "--plot", "--ahead", "1h", COLUMNS="100")
    assert "history" in plot and "90 % band" in plot and "planned replicas" in plot
    assert "·" in plot and "07:00" in plot
    assert max(map(len, plot.splitlines())) <= 100


def test_history_as_a_table_and_drawn(cluster: Cluster) -> None:
    assert "Nothing is known" in cluster.says("history", SMALL)
    watched_from = TrafficRow(SMALL, int(NOW_S) - 7200)
    cluster.store.add_traffic([watched_from, TrafficRow(SMALL, int(NOW_S) - 1800, 5, 50, 500, 9.0, 1.5)])
    table = cluster.says("history", SMALL, "--since", "1h", "--step", "15m")
    assert "06:30:00" in table and "500" in table and "1.5 s" in table
    assert "requests a minute" in cluster.says("history", SMALL, "--since", "1h", "--plot")


def test_decisions_and_cold_starts(cluster: Cluster) -> None:
    assert "Nothing was decided since 06:00:00" in cluster.says("decisions", SMALL, "--since", "1h")
    cluster.store.add_decisions(
        [
            Decision(
                SMALL,
                NOW_S - 60,
                2,
                Rung.TEMPLATE,
                Reason.DEMAND,
                NOW_S,
                "predictive",
                {},
                (Reason.MAX_REPLICAS,),
            )
        ]
    )
    text = cluster.says("decisions", "--since", "06:30")
    assert "06:59:00" in text and "demand +max-replicas" in text and "1 min" in text
    assert "No engine was started" in cluster.says("coldstarts")
    phases = (
        {"name": "load", "start_s": 0.0, "duration_s": 1.5},
        {"name": "none", "start_s": 2.0, "duration_s": 0.0},
    )
    cluster.store.add_cold_start(
        ColdStartRow(SMALL, "e", NOW_S - 9, NOW_S - 11, 2.0, "forked", phases=phases)
    )
    text = cluster.says("coldstarts", SMALL)
    assert "forked" in text and "load 1.50" in text and "none 0" not in text


def test_accounts(cluster: Cluster) -> None:
    assert "Nothing was used" in cluster.says("accounts")
    cluster.store.add_usage([UsageRow(SMALL, "2026-11-23", "active", {"SERVING": 5400.0}, 7, 2, 6.0, 1)])
    cluster.store.put_prewarm(PrewarmRow("p", SMALL, NOW_S - 60, "prewarm", 1, Rung.SERVING, ended_s=NOW_S))
    text = cluster.says("accounts")
    assert "1.5 GPU-h" in text and "30.0 GPU-h" in text and "5.0% of that was used" in text
    assert "in vain" in text
    assert "2026-11-23" in cluster.says("accounts", "--by-day")


def test_mode_undo_and_overrides(cluster: Cluster) -> None:
    assert cluster.says("mode") == "active\n"
    cluster.says("mode", "shadow", "--for", "30m")
    assert "shadow, set by ann@lab at 07:00:00" in cluster.says("mode")
    [row] = cluster.json("overrides")["overrides"]
    cluster.says("undo", row["id"])
    assert cluster.says("mode") == "active\n"
    assert "Nothing was set" in cluster.says("overrides")
    assert "undone by ann@lab" in cluster.says("overrides", "--history")


def test_of_several_modes_the_last_is_in_force(cluster: Cluster) -> None:
    """And what it hides is in force again when it ends."""
    first = cluster.json("mode", "shadow", "--for", "2h")["override"]["id"]
    cluster.clock.time_s += 60
    last = cluster.json("mode", "active", "--for", "1h")["override"]["id"]
    for history in ((), ("--history",)):
        rows = {row["id"]: row for row in cluster.json("overrides", *history)["overrides"]}
        assert [(rows[each]["in_force"], rows[each]["under"]) for each in (first, last)] == [
            (False, last),
            (True, None),
        ]
        shown = cluster.says("overrides", *history).splitlines()
        assert [line.rstrip().endswith("in force") for line in shown[1:]] == [False, True]
        assert shown[1].rstrip().endswith(f"not while {last} is")
    cluster.clock.time_s += 3600
    [row] = cluster.json("overrides")["overrides"]
    assert (row["id"], row["in_force"], row["under"]) == (first, True, None)
    assert cluster.json("mode")["mode"] == "shadow"


JSON: list[tuple[tuple[str, ...], set[str]]] = [
    (("policy", "list"), {"policies", "models", "mode"}),
    (("policy", "show", SMALL), {"model", "spec", "base", "overridden", "overrides", "windows"}),
    (("policy", "set", SMALL, "--wait-cost", "2"), {"override", "models"}),
    (
        ("policy", "explain", SMALL),
        {"model", "now_s", "text", "mode", "spec", "windows", "observation", "decision", "overrides"},
    ),
    (("policy", "validate", SMALL), {"models", "checked"}),
    (("policy", "shadow", "show"), {"shadows", "active"}),
    (("policy", "shadow", "start", "kpa"), {"override"}),
    (("prewarm", SMALL), {"prewarm"}),
    (("prewarm", "list"), {"prewarms", "outcomes"}),
    (("schedule", "add", SMALL, "--cron", "0 9 * * *", "--for", "1h"), {"schedule", "next"}),
    (("schedule", "list"), {"schedules", "windows"}),
    (("schedule", "next"), {"next"}),
    (("forecast", SMALL), {"model", "now_s", "ahead_s", "step_s", "history", "forecast", "planned"}),
    (("history", SMALL), {"model", "since_s", "until_s", "step_s", "points"}),
    (("decisions",), {"since_s", "until_s", "source", "decisions"}),
    (("coldstarts",), {"since_s", "until_s", "cold_starts"}),
    (("accounts",), {"since_day", "until_day", "source", "models", "total"}),
    (("mode",), {"mode", "override"}),
    (("mode", "off"), {"mode", "override"}),
    (("overrides",), {"overrides"}),
]


@pytest.mark.parametrize(("arguments", "keys"), JSON, ids=[" ".join(arguments[:3]) for arguments, _ in JSON])
def test_json_has_these_fields(cluster: Cluster, arguments: tuple[str, ...], keys: set[str]) -> None:
    cluster.idle()
    assert set(cluster.json(*arguments)) == keys


@pytest.mark.parametrize(
    ("make", "take_back"),
    [
        (("policy", "set", SMALL, "--wait-cost", "2"), ("undo",)),
        (("policy", "set", SMALL, "--wait-cost", "2"), ("policy", "unset", SMALL)),
        (("prewarm", SMALL), ("prewarm", "undo")),
        (("schedule", "add", SMALL, "--cron", "0 9 * * *", "--for", "1h"), ("schedule", "remove")),
        (("policy", "shadow", "start", "kpa"), ("policy", "shadow", "stop", "shadow")),
    ],
)
def test_what_is_taken_back_is_told_as_json(
    cluster: Cluster, make: tuple[str, ...], take_back: tuple[str, ...]
) -> None:
    made: dict[str, Any] = cluster.json(*make)
    override = made.get("override") or made.get("prewarm") or made.get("schedule")
    named = () if take_back[-1] in (SMALL, "shadow") else (override["id"],)
    [undone] = cluster.json(*take_back, *named)["undone"]
    assert (undone["id"], undone["undone_by"], undone["undone_s"]) == (override["id"], "ann@lab", NOW_S)


def test_names_in_brackets_are_no_markup(cluster: Cluster) -> None:
    cluster.says("policy", "set", SMALL, "--wait-cost", "2", RELIGHT_WHO="[red]x[/red]")
    assert "[red]x[/red]" in cluster.says("overrides")


def test_ids_stay_in_one_piece_on_a_narrow_terminal(cluster: Cluster) -> None:
    """Who copies one from a list can use it."""
    made = cluster.json("prewarm", ORG, "--at", "tomorrow 09:00")["prewarm"]
    added = cluster.json("schedule", "add", SMALL, "--cron", "0 9 * * *", "--for", "1h")["schedule"]
    for arguments, found in (
        (("overrides",), made),
        (("prewarm", "list"), made),
        (("schedule", "list"), added),
        (("schedule", "next"), added),
    ):
        assert found["id"] in cluster.says(*arguments, COLUMNS="80")


def test_no_line_is_broken_for_who_reads_lines(cluster: Cluster) -> None:
    """Without a terminal there is no width."""
    cluster.environ["COLUMNS"] = ""
    made = cluster.json("prewarm", ORG, "--at", "tomorrow 09:00")["prewarm"]
    _, row = cluster.says("overrides").splitlines()
    assert row.split()[:2] == [made["id"], "prewarm"] and "ann@lab" in row and "in force" in row
    said = cluster.says("policy", "list").splitlines()
    # Each policy has its summary, its parameters and its source in a line of their own.
    for name in POLICIES:
        assert len([line for line in said if line.startswith((f"{name} ", f"{name}:"))]) == 2
    assert len([line for line in said if line.startswith("  from: ")]) == len(POLICIES)
    assert max(map(len, said)) > 80
