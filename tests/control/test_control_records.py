"""Traffic, decisions, cold starts, accounts and forecasts through the control API, with a real store."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from autoscaling.core.types import Decision, Reason, Rung
from autoscaling.live.records import ColdStartRow, PrewarmRow, TrafficRow, UsageRow
from tests.control.lab import NOW_S, ORG, SMALL, Lab

TODAY = datetime.fromtimestamp(NOW_S, UTC).date().isoformat()
YESTERDAY = datetime.fromtimestamp(NOW_S - 86400, UTC).date().isoformat()


def test_history_has_a_point_for_each_step(lab: Lab) -> None:
    lab.store.add_traffic(
        [TrafficRow(SMALL, int(NOW_S) - 600, 0), TrafficRow(SMALL, int(NOW_S) - 300, 3, 30, 300, 4.5)]
    )
    answer = lab.ok("GET", "history", model=SMALL, last_s=600)
    assert answer["step_s"] == 5
    assert sum(row["arrivals"] for row in answer["points"]) == 3
    coarse = lab.ok("GET", "history", model=SMALL, last_s=600, step_s=300)
    assert sum(row["output_tokens"] for row in coarse["points"]) == 300
    assert len(coarse["points"]) < len(answer["points"])


def test_what_is_imported_is_history_and_counts_once(lab: Lab) -> None:
    rows = [[SMALL, NOW_S - 7200 + 60 * i, 2, 10, 20, 1.5] for i in range(60)]
    body = {"bucket_s": 60.0, "rows": rows, "source": "trace:0"}
    assert lab.ok("POST", "import", body) == {"rows": 60}
    assert lab.ok("POST", "import", body) == {"rows": 0}
    points = lab.ok("GET", "history", model=SMALL, last_s=7200, step_s=3600)["points"]
    assert sum(row["arrivals"] for row in points) == 120


@pytest.mark.parametrize(
    ("row", "status", "field"),
    [
        (["none", 1.0, 1, 1, 1, 1.0], 404, "rows.0.0"),
        ([SMALL, NOW_S + 9, 1, 1, 1, 1.0], 422, "rows.0.1"),
        ([SMALL, 1.0, -1, 1, 1, 1.0], 422, "rows.0.2"),
        ([SMALL, 1.0, 1, "2", 1, 1.0], 422, "rows.0.3"),
        ([SMALL, 1.0, 1], 422, "rows.0"),
        ([5, 1.0, 1, 1, 1, 1.0], 422, "rows.0.0"),
    ],
)
def test_one_wrong_row_refuses_all(lab: Lab, row: list[object], status: int, field: str) -> None:
    good = [SMALL, NOW_S - 60, 1, 1, 1, 1.0]
    found, error = lab.refused("POST", "import", {"bucket_s": 60.0, "rows": [row, good]})
    assert (found, error["field"]) == (status, field)
    assert lab.store.models_with_traffic() == []


@pytest.mark.parametrize("bucket_s", [0.0, 7201.0, 86400.0])
def test_a_window_that_no_level_of_the_history_can_show_is_refused(lab: Lab, bucket_s: float) -> None:
    """And the same rows can still be imported in shorter ones."""
    body = {"bucket_s": bucket_s, "rows": [[SMALL, NOW_S - 86400, 5, 0, 0, 0.0]], "source": "days"}
    status, error = lab.refused("POST", "import", body)
    assert (status, error["field"]) == (422, "bucket_s")
    assert "7200" in error["message"] or bucket_s == 0
    assert lab.ok("POST", "import", body | {"bucket_s": 7200.0}) == {"rows": 1}


def test_decisions_are_told_in_the_order_of_time(lab: Lab) -> None:
    decisions = [
        Decision(SMALL, NOW_S - 50, 1, Rung.TEMPLATE, Reason.WAKE, NOW_S, "predictive", {"load": 1.0}),
        Decision(
            ORG,
            NOW_S - 40,
            2,
            Rung.TEMPLATE,
            Reason.DEMAND,
            float("inf"),
            "reactive",
            clamps=(Reason.MAX_REPLICAS,),
        ),
        Decision(SMALL, NOW_S - 7200, 0, Rung.PARKED, Reason.PARK, NOW_S, "predictive"),
    ]
    lab.store.add_decisions(decisions)
    lab.store.add_decisions(decisions[:1], source="shadow:k")
    found = lab.ok("GET", "decisions")["decisions"]
    assert [(row["model"], row["replicas"], row["reason"]) for row in found] == [
        (SMALL, 1, "wake"),
        (ORG, 2, "demand"),
    ]
    assert (found[1]["until_s"], found[1]["clamps"]) == (None, ["max-replicas"])
    assert len(lab.ok("GET", "decisions", model=SMALL, last_s=9000)["decisions"]) == 2
    assert len(lab.ok("GET", "decisions", source="shadow:k")["decisions"]) == 1
    lab.ok("PUT", "mode", {"mode": "shadow"})
    lab.store.add_decisions(decisions[:1], source="shadow")
    found = lab.ok("GET", "decisions")
    assert (found["source"], len(found["decisions"])) == ("shadow", 1)


def test_cold_starts_have_their_phases(lab: Lab) -> None:
    phases = ({"name": "load", "start_s": 0.1, "duration_s": 1.5},)
    lab.store.add_cold_start(ColdStartRow(SMALL, "e1", NOW_S - 9, NOW_S - 11, 2.0, "forked", phases=phases))
    [row] = lab.ok("GET", "coldstarts")["cold_starts"]
    assert (row["rung"], row["prewarmed"], row["phases"]) == ("template", False, [dict(phases[0])])
    assert lab.ok("GET", "coldstarts", model=ORG)["cold_starts"] == []


def test_cold_starts_and_prewarms_are_those_of_the_span(lab: Lab) -> None:
    """The newest of it, not of all; without an end also what another machine's clock says is to come."""
    for hours in (-1, 0, 1, 2, 3):
        at_s = NOW_S - 3600 * hours
        lab.store.add_cold_start(ColdStartRow(SMALL, f"e{hours}", at_s, at_s - 1, 1.0, "forked"))
        lab.store.put_prewarm(PrewarmRow(f"e{hours}", SMALL, at_s, "prewarm", 1, Rung.SERVING))
    for flushed in (False, True):
        assert not flushed or lab.store.flush()
        for path, rows, key in (("coldstarts", "cold_starts", "engine_id"), ("prewarms", "outcomes", "id")):
            span = {"since_s": NOW_S - 7200, "until_s": NOW_S - 3600}
            assert [row[key] for row in lab.ok("GET", path, **span)[rows]] == ["e2", "e1"]
            assert [row[key] for row in lab.ok("GET", path, **span, limit=1)[rows]] == ["e1"]
            assert [row[key] for row in lab.ok("GET", path, last_s=3600)[rows]] == ["e1", "e0", "e-1"]


def test_accounts_add_up_by_model_and_day(lab: Lab) -> None:
    lab.store.add_usage(
        [
            UsageRow(
                SMALL,
                YESTERDAY,
                "active",
                {"SERVING": 50.0},
                requests=5,
                cold_requests=1,
                waited_s=2.0,
                cold_starts=1,
            ),
            UsageRow(SMALL, TODAY, "active", {"SERVING": 30.0, "PARKED": 4.0}, requests=3),
            UsageRow(ORG, TODAY, "active", {"SERVING": 20.0}, requests=1),
            UsageRow(ORG, TODAY, "shadow:k", {"SERVING": 999.0}),
        ]
    )
    row = PrewarmRow("p", SMALL, NOW_S - 60, "prewarm", 1, Rung.SERVING)
    lab.store.put_prewarm(row)
    lab.store.put_prewarm(
        PrewarmRow(
            "q",
            SMALL,
            NOW_S - 60,
            "prewarm",
            1,
            Rung.SERVING,
            ended_s=NOW_S,
            hit_s=NOW_S,
            cost_gpu_s=3.0,
            spared_requests=2,
            spared_wait_s=4.0,
        )
    )
    lab.store.put_prewarm(
        PrewarmRow("r", SMALL, NOW_S - 60, "prewarm", 1, Rung.SERVING, ended_s=NOW_S, cost_gpu_s=5.0)
    )
    answer = lab.ok("GET", "accounts")
    models = {row["model"]: row for row in answer["models"]}
    small = models[SMALL]
    assert (small["gpu_s"], small["requests"], small["cold_starts"], small["waited_s"]) == (84.0, 8, 1, 2.0)
    assert small["gpu_s_by_rung"] == {"serving": 80.0, "parked": 4.0}
    assert [(day["day"], day["gpu_s"]) for day in small["days"]] == [(YESTERDAY, 50.0), (TODAY, 34.0)]
    assert small["prewarms"] == {
        "count": 3,
        "hits": 1,
        "missed": 1,
        "open": 1,
        "cost_gpu_s": 8.0,
        "spared_requests": 2,
        "spared_wait_s": 4.0,
    }
    # From the first day on which it was used until now, 06:00: two GPUs for a replica of the other.
    assert small["dedicated_gpu_s"] == 30 * 3600
    assert models[ORG]["dedicated_gpu_s"] == 2 * 6 * 3600
    assert (answer["total"]["gpu_s"], answer["total"]["requests"]) == (104.0, 9)
    assert lab.ok("GET", "accounts", source="shadow:k")["total"]["gpu_s"] == 999.0
    assert lab.ok("GET", "accounts", model=ORG)["total"]["gpu_s"] == 20.0


def test_a_shadow_policy_has_no_prewarms_in_its_accounts(lab: Lab) -> None:
    """Those that were made are the active policy's."""
    lab.store.put_prewarm(PrewarmRow("p", SMALL, NOW_S - 60, "prewarm", 1, Rung.SERVING, cost_gpu_s=3.0))
    lab.store.add_usage([UsageRow(SMALL, TODAY, "shadow:k", {"SERVING": 9.0})])
    assert lab.ok("GET", "accounts")["total"]["prewarms"]["count"] == 1
    answer = lab.ok("GET", "accounts", source="shadow:k")
    assert [row["prewarms"]["count"] for row in answer["models"]] == [0]
    assert answer["total"]["prewarms"]["cost_gpu_s"] == 0
    assert lab.ok("GET", "accounts", source="shadow:never")["models"] == []


@pytest.mark.parametrize("path", ["accounts", "decisions"])
@pytest.mark.parametrize("source", ["foo", "beside:k", "shadow:", "shadow:a b", "shadowy"])
def test_a_source_that_can_not_be_is_refused(lab: Lab, path: str, source: str) -> None:
    status, error = lab.refused("GET", path, source=source)
    assert (status, error["field"]) == (422, "source")
    assert error["expected"] == "active, shadow or shadow:NAME"


def test_a_dedicated_gpu_is_charged_from_when_the_model_was_first_seen(lab: Lab) -> None:
    """Not from the midnight or the hour before: an installation of an hour would seem to have saved a day."""
    lab.store.add_usage([UsageRow(SMALL, TODAY, gpu_s={"serving": 60.0}, requests=1)])
    lab.store.add_traffic([TrafficRow(SMALL, int(NOW_S) - 1234)])
    (small,) = lab.ok("GET", "accounts")["models"]
    assert 1234 <= small["dedicated_gpu_s"] <= 1235


def test_imported_history_charges_no_dedicated_gpu(lab: Lab) -> None:
    """The model was not here then."""
    rows = [[SMALL, NOW_S - 5 * 86400, 2, 10, 20, 1.5], [ORG, NOW_S - 5 * 86400, 2, 10, 20, 1.5]]
    assert lab.ok("POST", "import", {"bucket_s": 1.0, "rows": rows}) == {"rows": 2}
    lab.store.add_traffic([TrafficRow(SMALL, int(NOW_S) - 1234)])
    lab.store.add_usage([UsageRow(name, TODAY, gpu_s={"serving": 60.0}) for name in (SMALL, ORG)])
    small, other = (lab.ok("GET", "accounts", model=name)["models"][0] for name in (SMALL, ORG))
    assert 1234 <= small["dedicated_gpu_s"] <= 1235
    assert other["dedicated_gpu_s"] == 2 * 6 * 3600, "of which it is not known since when it is watched"


def test_a_model_that_left_the_fleet_is_charged_until_it_was_last_used(lab: Lab) -> None:
    days = [datetime.fromtimestamp(NOW_S - 86400 * back, UTC).date().isoformat() for back in (3, 2)]
    lab.store.add_usage([UsageRow("gone", day, gpu_s={"serving": 60.0}, requests=1) for day in days])
    for _ in range(2):
        answer = lab.ok("GET", "accounts", model="gone")
        assert answer["total"]["dedicated_gpu_s"] == 2 * 86400
        lab.clock.time_s += 2 * 86400
    lab.store.add_usage([UsageRow("gone", TODAY, gpu_s={"serving": 60.0}, requests=1)])
    lab.clock.time_s = NOW_S
    (gone,) = lab.ok("GET", "accounts", since_day=TODAY)["models"]
    assert gone["dedicated_gpu_s"] == 6 * 3600, "today is not over"


def test_what_is_on_record_of_a_model_that_left_the_fleet_is_told(lab: Lab) -> None:
    lab.store.add_traffic([TrafficRow("gone", int(NOW_S) - 300, 3)])
    lab.store.add_decisions(
        [Decision("gone", NOW_S - 50, 1, Rung.TEMPLATE, Reason.WAKE, NOW_S, "predictive")]
    )
    lab.store.add_cold_start(ColdStartRow("gone", "e1", NOW_S - 9, NOW_S - 11, 2.0, "forked"))
    points = lab.ok("GET", "history", model="gone", last_s=600)["points"]
    assert sum(row["arrivals"] for row in points) == 3
    for path, rows in (("decisions", "decisions"), ("coldstarts", "cold_starts")):
        assert [row["model"] for row in lab.ok("GET", path, model="gone")[rows]] == ["gone"]
    for path in ("history", "decisions", "coldstarts", "accounts"):
        status, error = lab.refused("GET", path, model="never")
        assert (status, error["field"]) == (404, "model")
    assert lab.refused("GET", "forecasts/gone")[0] == 404


def test_a_sparse_forecast_tells_when_the_next_request_comes(lab: Lab) -> None:
    lab.idle()
    lab.sparse()
    answer = lab.ok("GET", f"forecasts/{SMALL}")
    said = answer["forecast"]
    assert said["forecaster"] == "gaps"
    in_s = said["next_arrival"]["in_s"]
    assert in_s["0.1"] < in_s["0.5"] < in_s["0.9"]
    # Made five seconds ago, so that half of what was left is a little later than ten minutes after that.
    assert in_s["0.5"] == pytest.approx(597.5, abs=3)
    assert said["demand"] is None
    assert 0.8 < said["next_arrival"]["p_within_ahead"] <= 1
    planned = answer["planned"]
    # A replica for ten minutes costs more than what a request would wait: parked, it is back in no time.
    assert (planned[0]["start_s"], planned[0]["replicas"], planned[0]["rung"]) == (NOW_S, 0, "parked")
    assert len(planned) <= 96


def test_a_forecast_of_demand_has_a_band_and_plans_replicas(lab: Lab) -> None:
    """Forty requests in progress for half an hour, sixteen for each replica, at most four: then none."""
    lab.idle()
    lab.dense()
    answer = lab.ok("GET", f"forecasts/{SMALL}", ahead_s=3600)
    band = answer["forecast"]["demand"]
    assert len(band) == 60
    assert band[0]["rate_per_s"] == {"0.05": 0.5, "0.5": 1.0, "0.95": 2.0}
    by_minute = {round((row["start_s"] - NOW_S) / 60): row["replicas"] for row in answer["planned"]}
    assert by_minute[10] == 4
    assert by_minute[59] == 0


def test_without_a_forecast_there_is_still_a_plan(lab: Lab) -> None:
    lab.idle()
    lab.view.seen[SMALL] = replace(lab.view.seen[SMALL], last_busy_s=NOW_S - 1)
    answer = lab.ok("GET", f"forecasts/{SMALL}", ahead_s=600)
    assert answer["forecast"] is None
    # Kept until that has cost as much as coming back from being parked would.
    replicas = [row["replicas"] for row in answer["planned"]]
    assert (replicas[0], replicas[-1]) == (1, 0)
    assert lab.ok("GET", f"forecasts/{ORG}")["planned"] == []


def test_a_plan_follows_schedules(lab: Lab) -> None:
    lab.idle()
    lab.ok("POST", "schedules", {"model": SMALL, "cron": "30 6 * * *", "duration_s": 600.0, "replicas": 2})
    planned = lab.ok("GET", f"forecasts/{SMALL}", ahead_s=3600)["planned"]
    inside = {row["replicas"] for row in planned if NOW_S + 1800 <= row["start_s"] < NOW_S + 2400}
    after = [row["replicas"] for row in planned if row["start_s"] >= NOW_S + 2700]
    assert inside == {2}
    assert after[-1] == 0
