"""`relight simulate` and `compare`: what they say, what they write, and which options change it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from autoscaling.cli import app
from autoscaling.core.types import Rung
from autoscaling.live.clock import SystemClock
from autoscaling.live.records import ColdStartRow
from autoscaling.live.store import Store
from autoscaling.sim.plots import cold_grid
from autoscaling.sim.report import Report
from autoscaling.sim.starts import Measured
from autoscaling.sources import StoredSource
from autoscaling.traces import Row
from tests.cli.sim_lab import TWO_STATES, fails, report, requests, run, says
from tests.store.lab import NOON, FakeClock, second

KEEP = ("--policy", "keep-alive")


def checked(document: Any, schema: Any) -> Any:
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema, cls=jsonschema.Draft202012Validator)
    return document


def without_time(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != "took_s"}


def test_two_requests_by_hand(tmp_path: Path) -> None:
    """A minute of silence ends a keep-alive of 45 s: both are cold, and idle is paid twice."""
    found = report("simulate", requests(tmp_path, [0, 200]), *KEEP, *TWO_STATES, "--set", "keep_alive_s=45")
    total = found["total"]
    assert (total["requests"], total["cold_requests"], total["cold_starts"]) == (2, 2, 2)
    # A start, and one turn of Serve's control loop before it.
    assert total["cold_waited_s"] == total["waited_s"] == pytest.approx(2 * 30.1, abs=0.01)
    assert total["busy_gpu_s"] == pytest.approx(10, abs=0.01)
    # The first replica's; of the second's, the trace ends before anything is known.
    assert total["idle_gpu_s"] >= 45
    assert total["gpu_s"] == pytest.approx(
        sum(total[f"{state}_gpu_s"] for state in ("starting", "busy", "idle", "parked", "node"))
    )
    assert total["total_cost_gpu_s"] == pytest.approx(total["gpu_s"] + 10 * total["waited_s"])


class TestSchema:
    def test_a_report_has_exactly_what_its_schema_says(self, tmp_path: Path) -> None:
        file = tmp_path / "two.csv"
        file.write_text("timestamp_s,model\n0,a\n10,b\n400,a\n")
        schema = json.loads(says("simulate", "--schema"))
        found = checked(report("simulate", file, *KEEP), schema)
        assert [each["model"] for each in found["models"]] == ["a", "b"]
        for name in ("requests", "cold_starts", "starts", "scale_ups"):
            assert found["total"][name] == sum(each[name] for each in found["models"])
        for name in schema["properties"]:
            with pytest.raises(jsonschema.ValidationError):
                checked({key: value for key, value in found.items() if key != name}, schema)
        with pytest.raises(jsonschema.ValidationError):
            checked({**found, "more": 1}, schema)

    def test_every_field_is_documented(self) -> None:
        def documented(properties: dict[str, Any]) -> None:
            for name, each in properties.items():
                assert len(each["description"]) > 10, name
                documented(each.get("properties", {}) | each.get("items", {}).get("properties", {}))

        documented(json.loads(says("simulate", "--schema"))["properties"])

    def test_the_page_lists_the_same_fields(self) -> None:
        page = (Path(__file__).parents[2] / "docs" / "simulate.md").read_text()
        listed = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", page, flags=re.MULTILINE))
        schema = json.loads(says("simulate", "--schema"))["properties"]
        fields = {**schema, **schema["total"]["properties"]}
        assert listed == {name: each["description"] for name, each in fields.items()}

    def test_a_comparison_too(self, tmp_path: Path) -> None:
        found = report(
            "compare", requests(tmp_path, [0, 90]), "--policies", "keep-alive,best-fixed", *TWO_STATES
        )
        checked(found, json.loads(says("compare", "--schema")))
        assert found[0]["label"] == "keep-alive"
        assert re.fullmatch(r"best-fixed \(keep_alive_s=\d+\)", found[1]["label"])


class TestOptions:
    def test_only_what_comes_after_is_scored(self, tmp_path: Path) -> None:
        file = requests(tmp_path, [0, 1000, 2000, 3000])
        total = report("simulate", file, *KEEP, *TWO_STATES, "--measure-from", "1500s")["total"]
        assert (total["requests"], total["cold_starts"]) == (2, 2)
        assert report("simulate", file, *KEEP, "--until", "1500s")["total"]["requests"] == 2
        assert "nothing comes 10,000 s after" in fails("simulate", file, *KEEP, "--measure-from", "10000s")

    def test_a_seed_draws_the_arrivals_of_windows(self, tmp_path: Path) -> None:
        file = tmp_path / "windows.csv"
        file.write_text("minute,model,count,cv\n0,a,5,\n40,a,5,3\n90,a,1,\n")
        one, again, other = (report("simulate", file, *KEEP, "--seed", seed) for seed in (1, 1, 2))
        assert without_time(one) == without_time(again)
        assert one["total"]["requests"] == other["total"]["requests"] == 11
        assert one["total"]["gpu_s"] != other["total"]["gpu_s"]

    def test_a_scale_keeps_its_share(self, tmp_path: Path) -> None:
        found = report("simulate", requests(tmp_path, range(0, 4000, 10)), *KEEP, "--scale", "0.25")
        assert found["scale"] == 0.25
        assert 60 < found["total"]["requests"] < 140

    def test_more_than_all_are_of_windows_only(self, tmp_path: Path) -> None:
        file = tmp_path / "windows.csv"
        file.write_text("minute,model,count\n" + "".join(f"{i},m,10\n" for i in range(100)))
        assert 4500 < report("simulate", file, *KEEP, "--scale", 5)["total"]["requests"] < 5500
        file = requests(tmp_path, [0, 10])
        said = fails("simulate", tmp_path / "windows.csv", *KEEP, "--scale", "1e300")
        assert "scale: 1e+300 makes more of 10 requests of a window than 100,000,000" in said
        file.with_name("none.csv").write_text("minute,model,count\n0,m,0\n9,m,0\n")
        assert "it holds no requests: every count is 0" in fails("simulate", tmp_path / "none.csv", *KEEP)
        said = fails("simulate", file, *KEEP, "--scale", 5)
        assert "scale: 5 is above 1" in said and "only traces of windows can hold more" in said

    def test_prices(self, tmp_path: Path) -> None:
        file = requests(tmp_path, [0, 100])

        def cost(*more: str) -> Any:
            return report("simulate", file, *KEEP, *more)["total"]["cost"]

        plain = cost()
        assert cost("--gpu", "L4") == pytest.approx(plain * 0.7 / 3.0)
        assert cost("--gpu", "L4", "--price", "L4=2.1") == pytest.approx(plain * 2.1 / 3.0)
        assert cost("--gpu", "MI300X", "--price", "MI300X=6") == pytest.approx(plain * 2)
        assert cost("--price", "H100=6") == pytest.approx(plain * 2)
        profile = tmp_path / "profile.json"
        profile.write_text("{}")
        assert cost("--profile", str(profile)) == pytest.approx(plain)
        assert cost("--profile", str(profile), "--price", "H100=6") == pytest.approx(plain * 2)
        assert "'MI300X' has no price" in fails("simulate", file, *KEEP, "--gpu", "MI300X")

    @pytest.mark.parametrize(
        ("arguments", "notes"),
        [
            (("--price", "h100=9"), ["h100=9 changes nothing, for what is paid is that of H100"]),
            (
                ("--price", "L4=9", "--price", "H100=2"),
                ["L4=9 changes nothing, for what is paid is that of H100"],
            ),
            (
                ("--price", "H100=9", "--gpu", "L4"),
                ["H100=9 changes nothing, for what is paid is that of L4"],
            ),
            (("--price", "L4=9", "--gpu", "L4-24G"), []),
            (
                ("--price", "H100=9", "--profile", "priced.json"),
                ["H100=9 changes nothing, for what is paid is the profile's price_per_gpu_h"],
            ),
            (("--price", "H100=9", "--profile", "priced.json", "--gpu", "H100"), []),
            (("--price", "H100=9", "--fleet", "fleet.yaml"), []),
            (
                ("--price", "A100=9", "--fleet", "fleet.yaml"),
                ["A100=9 changes nothing, for what is paid is that of H100, L4"],
            ),
        ],
    )
    def test_a_price_that_nobody_pays_is_said(
        self, tmp_path: Path, arguments: tuple[str, ...], notes: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("priced.json").write_text('{"price_per_gpu_h": 1}')
        Path("fleet.yaml").write_text(FLEET)
        found = report("simulate", requests(tmp_path, [0], model="small"), *KEEP, *arguments)["notes"]
        assert found == [f"--price {note}; --gpu names another type" for note in notes]

    def test_a_keep_alive_by_which_no_policy_goes_is_said(self, tmp_path: Path) -> None:
        file = requests(tmp_path, [0, 50])
        policies = ("--policies", "keep-alive,kpa,predictive,oracle", "--set", "keep_alive_s=60")
        found = report("compare", file, *policies)
        said = {each["policy"]: [note.partition(":")[0] for note in each["notes"]] for each in found}
        assert said == {
            "keep-alive": [],
            "kpa": ["keep_alive_s=60 changes nothing under kpa"],
            "predictive": ["keep_alive_s=60 changes nothing under predictive"],
            "oracle": ["keep_alive_s=60 changes nothing under predictive"],
        }
        bound = ("--policy", "predictive", "--set", "keep_alive_bound=1", "--set", "keep_alive_s=60")
        assert report("simulate", file, *bound)["notes"] == []

    def test_a_start_may_take_no_time(self, tmp_path: Path) -> None:
        file = requests(tmp_path, [0, 200])
        assert report("simulate", file, *KEEP, "--cold-start", "0s")["total"]["wait_max_s"] < 1

    def test_a_profile_says_what_the_cluster_is(self, tmp_path: Path) -> None:
        profile = tmp_path / "profile.json"
        profile.write_text(
            json.dumps({"starts": {"template": 7.0}, "slo_s": 10, "wake_s": 0.0, "price_per_gpu_h": 1.0})
        )
        found = report("simulate", requests(tmp_path, [0]), *KEEP, "--profile", profile)
        assert found["total"]["wait_max_s"] == pytest.approx(7.0, abs=0.01)
        assert (found["slo_s"], found["total"]["slo_attainment"]) == (10, 1.0)
        assert found["total"]["cost"] == pytest.approx(found["total"]["gpu_s"] / 3600)
        profile.write_text('{"starts": {"lukewarm": 7.0}}')
        assert "lukewarm" in fails("simulate", tmp_path / "m.csv", *KEEP, "--profile", profile)
        profile.write_text('{"starts": {"template": 7.0}, "engine": {"decode_s": 1, "decode_s": 2}}')
        said = fails("simulate", tmp_path / "m.csv", *KEEP, "--profile", profile)
        assert f"{profile}: engine.decode_s stands twice" in said
        profile.write_text('{"slo_s": [{}, {"a": 1, "a": 2}]}')
        assert "slo_s[1].a stands twice" in fails("simulate", tmp_path / "m.csv", *KEEP, "--profile", profile)

    def test_start_times_that_were_measured(self, tmp_path: Path) -> None:
        file = requests(tmp_path, range(0, 200_000, 1000))
        starts = tmp_path / "starts.csv"
        starts.write_text("timestamp_anon,value\n1,20000\n2,40000\n")
        total = report("simulate", file, *KEEP, "--cold-start", starts)["total"]
        assert (round(total["wait_p50_s"]), round(total["wait_max_s"])) in {(20, 40), (40, 40)}
        assert 27 < total["wait_mean_s"] < 33
        # By rung, as the cluster tells of its own; parked ones wake faster.
        rows = [{"rung": "template", "total_s": 50.0}, {"rung": "parked", "total_s": 2.0}]
        starts.write_text(json.dumps({"cold_starts": rows}))
        found = report("simulate", file, *KEEP, "--cold-start", starts)
        assert found["models"][0]["starts_by_rung"] == {"template": 1, "parked": 199}
        assert found["total"]["wait_max_s"] == pytest.approx(50.1, abs=0.1)
        starts.write_text("total_s\n3\n-1\n")
        assert "starts.csv:3: total_s: '-1' is not a time" in fails(
            "simulate", file, *KEEP, "--cold-start", starts
        )
        starts.write_text("seconds\n3\n")
        assert "has none of the columns total_s" in fails("simulate", file, *KEEP, "--cold-start", starts)

    def test_each_model_has_its_own_start_times(self, tmp_path: Path) -> None:
        """Of a model of which none were measured, those of all together."""
        file, starts = tmp_path / "t.csv", tmp_path / "starts.json"
        names = ("small", "big", "new")
        file.write_text(
            "timestamp_s,model\n" + "".join(f"{1000 * i},{name}\n" for i in range(40) for name in names)
        )
        rows = [{"model": "small", "rung": "template", "total_s": 5.0}] * 20
        rows += [{"model": "big", "rung": "template", "total_s": 300.0}] * 20
        starts.write_text(json.dumps({"cold_starts": rows}))

        def waits() -> dict[str, float]:
            found = report("simulate", file, *KEEP, "--cold-start", starts)
            return {each["model"]: each["wait_mean_s"] for each in found["models"]}

        assert waits() == {
            "small": pytest.approx(5.1, abs=0.1),
            "big": pytest.approx(300.1, abs=0.1),
            "new": pytest.approx(152.6, abs=40),
        }
        starts.write_text("model,total_s\nsmall,5\nbig,300\n")
        assert waits()["small"] == pytest.approx(5.1, abs=0.1)
        fleet = tmp_path / "fleet.yaml"
        fleet.write_text(
            "models:\n" + "".join(f"- {{id: {n}-id, aliases: [{n}], source: /m/{n}}}\n" for n in names[:2])
        )
        found = report("simulate", file, *KEEP, "--fleet", fleet, "--cold-start", starts)
        waited = {each["model"]: each["wait_mean_s"] for each in found["models"]}
        assert waited == {
            "small-id": pytest.approx(5.1, abs=0.1),
            "big-id": pytest.approx(300.1, abs=0.1),
        }

    def test_a_model_never_rests_below_its_base(self, tmp_path: Path) -> None:
        """Whatever is known of starts from there: the template is there anyway."""
        file, profile = requests(tmp_path, range(0, 20_000, 1000)), tmp_path / "p.json"
        waited = {}
        for base in ("template", "cold"):
            profile.write_text(json.dumps({"starts": {"cold": 100, "template": 4}, "base": base}))
            waited[base] = report("simulate", file, *KEEP, "--profile", profile)["total"]["wait_mean_s"]
        assert waited == {"template": pytest.approx(4.1, abs=0.1), "cold": pytest.approx(100.1, abs=0.1)}

    def test_who_waits_as_long_as_the_slo_keeps_to_it(self, tmp_path: Path) -> None:
        """Though differences of Unix seconds are rounded."""
        file, profile = requests(tmp_path, range(0, 20_000, 1000)), tmp_path / "p.json"
        for start_s in (1.7, 4.9, 5.7, 7.4):
            profile.write_text(json.dumps({"starts": {"template": start_s}, "slo_s": start_s, "wake_s": 0}))
            assert report("simulate", file, *KEEP, "--profile", profile)["total"]["slo_attainment"] == 1.0

    def test_a_pipe_is_said_to_be_one(self, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        for command in (("simulate", pipe, *KEEP), ("trace", "describe", pipe)):
            assert "pipe: is a pipe or a device; it must be a file" in fails(*command)

    def test_bad_rows_are_skipped_and_counted(self, tmp_path: Path) -> None:
        file = tmp_path / "m.csv"
        file.write_text("timestamp_s,model\n0,a\nx,a\n5,a\n3,a\n9\n")
        found = report("simulate", file, *KEEP, "--skip-bad")
        assert (found["skipped_rows"], found["total"]["requests"]) == (3, 2)
        assert "3 bad rows skipped" in says("simulate", file, *KEEP, "--skip-bad")

    def test_best_fixed_is_the_best_of_all_keep_alives(self, tmp_path: Path) -> None:
        file = requests(tmp_path, range(0, 9000, 300))
        found = report("simulate", file, "--policy", "best-fixed", *TWO_STATES)
        swept = report(
            "compare", file, "--policies", "keep-alive", "--sweep", "keep_alive_s=0,60,300,600", *TWO_STATES
        )
        assert found["policy"] == "best-fixed"
        # Just long enough to bridge 295 s of silence, which cost less than a start's 30 s of waiting.
        assert found["keep_alive_s"] == 300
        assert found["total"]["total_cost_gpu_s"] == min(each["total"]["total_cost_gpu_s"] for each in swept)


FLEET = """
models:
  - id: small
    aliases: [tiny]
    source: org/small
    resources: {gpus: 1, accelerator_types: [L4]}
    scaling: {policy: keep-alive, keep_alive_s: 30, max_replicas: 2}
  - id: big
    source: org/big
    resources: {gpus: 2, accelerator_types: [H100-80G]}
    scaling:
      policy: scheduled
      schedules: [{cron: "0 1 * * *", duration_s: 3600}]
"""


class TestFleet:
    @pytest.fixture
    def fleet(self, tmp_path: Path) -> Path:
        file = tmp_path / "fleet.yaml"
        file.write_text(FLEET)
        return file

    @pytest.fixture
    def trace(self, tmp_path: Path) -> Path:
        # 3700 s is within the schedule's hour.
        return self.written(tmp_path, "0,small\n100,tiny\n200,other\n3700,big\n")

    @staticmethod
    def written(folder: Path, rows: str) -> Path:
        file = folder / "trace.csv"
        file.write_text("timestamp_s,model\n" + rows)
        return file

    def test_its_schedules_last_until_the_end_of_the_longest_window(
        self, fleet: Path, tmp_path: Path
    ) -> None:
        """Not of the last one that begins: at 01:00 the first of these two goes on."""
        trace = tmp_path / "t.csv"
        trace.write_text("minute,model,count,window_s\n0,big,400,86400\n2,small,1,60\n")
        (_, big) = report("simulate", trace, "--fleet", fleet, *TWO_STATES)["models"]
        assert big["idle_gpu_s"] + big["busy_gpu_s"] > 2 * 3600

    def test_its_models_under_their_own_policies(self, fleet: Path, trace: Path) -> None:
        found = report("simulate", trace, "--fleet", fleet, *TWO_STATES)
        small, big = found["models"]
        assert (small["model"], big["model"]) == ("small", "big")
        # By its id and by its alias; 30 s don't bridge 100 s.
        assert (small["requests"], small["cold_starts"]) == (2, 2)
        assert found["policy"] == "mixed"
        assert found["notes"] == [
            "left out, as the fleet does not have their models: 1 of the requests, of 1 model: other (1)"
        ]
        # Lit by its schedule, on two GPUs for an hour.
        assert (big["requests"], big["cold_starts"]) == (1, 0)
        assert big["price_per_gpu_h"] == 3.0
        assert small["price_per_gpu_h"] == 0.7
        assert small["cost"] == pytest.approx(small["gpu_s"] / 3600 * 0.7)
        assert found["total"]["cost"] == pytest.approx(small["cost"] + big["cost"])

    def test_whose_requests_were_left_out_is_said(self, fleet: Path, tmp_path: Path) -> None:
        """Windows count as the requests in them; the busiest models are named."""
        trace = tmp_path / "t.csv"
        others = "".join(f"{i},other{i},{10 * i}\n" for i in range(1, 8))
        trace.write_text("minute,model,count\n0,small,1\n" + others)
        words = "280 of the requests, of 7 models: other7 (70), other6 (60), other5 (50), other4 (40), other3 (30)"
        for jobs in (1, 2):
            found = report("simulate", trace, "--fleet", fleet, "--jobs", jobs)
            assert [note.partition(": ")[2] for note in found["notes"]] == [f"{words} and 2 more"]

    def test_one_policy_for_all(self, fleet: Path, trace: Path) -> None:
        found = report("simulate", trace, "--fleet", fleet, *KEEP, "--set", "keep_alive_s=200")
        assert found["policy"] == "keep-alive"
        assert found["models"][0]["cold_starts"] == 1

    def test_nothing_is_parked_where_no_memory_is_set_aside(self, fleet: Path, trace: Path) -> None:
        assert report("simulate", trace, "--fleet", fleet)["total"]["parked_gpu_s"] == 0
        fleet.write_text(FLEET + "engine_host: {park_memory_bytes: 1000000000}\n")
        assert report("simulate", trace, "--fleet", fleet)["total"]["parked_gpu_s"] > 0

    def test_what_nobody_means_is_an_error_there_too(self, fleet: Path, trace: Path) -> None:
        fleet.write_text(FLEET.replace("policy: keep-alive", "policy: keep-alive, wait_cost: 1.0e+300"))
        assert "wait_cost of small: 1e+300 is above 1e+12" in fails("simulate", trace, "--fleet", fleet)

    def test_a_budget_is_shared(self, fleet: Path, tmp_path: Path) -> None:
        trace = self.written(tmp_path, "0,small\n0,big\n")
        free = report("simulate", trace, "--fleet", fleet, *KEEP, *TWO_STATES)["total"]
        fleet.write_text(FLEET + "controller: {gpu_budget: 2}\n")
        short = report("simulate", trace, "--fleet", fleet, *KEEP, *TWO_STATES)["total"]
        assert free["wait_max_s"] < 31
        assert short["wait_max_s"] > 60

    def test_its_limits_turn_requests_away(self, fleet: Path, tmp_path: Path) -> None:
        trace = self.written(tmp_path, "0,small\n1,small\n2,small\n")
        assert report("simulate", trace, "--fleet", fleet, *TWO_STATES)["total"]["rejected"] == 0
        limits = "limits: {max_queued: 1}\n    scaling: {policy: keep-alive"
        fleet.write_text(FLEET.replace("scaling: {policy: keep-alive", limits).partition("  - id: big")[0])
        assert report("simulate", trace, "--fleet", fleet, *TWO_STATES)["total"]["rejected"] == 2

    @pytest.fixture
    def limited(self, fleet: Path) -> Path:
        """small's second in the queue is one too many, big's first waits no longer than 5 s; starts take 30 s."""
        small = FLEET.replace(
            "scaling: {", "limits: {max_queued: 1, request_deadline_s: 100}\n    scaling: {"
        )
        fleet.write_text(small.replace("scaling:\n", "limits: {request_deadline_s: 5}\n    scaling:\n"))
        return fleet

    @pytest.mark.parametrize(
        ("profile", "rejected", "waited_s"),
        [
            ({"slo_s": 7}, {"small": 2, "big": 1}, {"small": 30 + 2 * 100, "big": 5}),
            ({"deadline_s": 200}, {"small": 2, "big": 0}, {"small": 30 + 2 * 200, "big": 30}),
            ({"queue_limit": 9}, {"small": 0, "big": 1}, {"small": 30 + 29 + 28, "big": 5}),
            (
                {"queue_limit": math.inf, "deadline_s": math.inf},
                {"small": 0, "big": 0},
                {"small": 87, "big": 30},
            ),
        ],
        ids=["neither", "deadline", "queue", "both"],
    )
    def test_each_model_has_its_own_limits_but_for_what_a_profile_names(
        self,
        limited: Path,
        tmp_path: Path,
        profile: dict[str, float],
        rejected: dict[str, int],
        waited_s: dict[str, float],
    ) -> None:
        trace = self.written(tmp_path, "0,small\n1,small\n2,small\n7300,big\n")
        file = tmp_path / "profile.json"
        file.write_text(json.dumps({**profile, "wake_s": 0}))
        for policy in ((), KEEP):
            found = report("simulate", trace, "--fleet", limited, "--profile", file, *policy, *TWO_STATES)
            models = {each["model"]: each for each in found["models"]}
            assert {name: each["rejected"] for name, each in models.items()} == rejected
            for name, each in models.items():
                assert each["waited_s"] == pytest.approx(waited_s[name], rel=0.1)

    def test_an_endless_deadline_asks_for_an_endless_queue(self, limited: Path, tmp_path: Path) -> None:
        file = tmp_path / "profile.json"
        file.write_text('{"deadline_s": Infinity}')
        said = fails("simulate", self.written(tmp_path, "0,small\n"), "--fleet", limited, "--profile", file)
        assert "limits of small: profile.queue_limit: 1 goes with a finite deadline_s only" in said

    def test_a_profile_that_names_gpus_goes_before_the_budget(self, fleet: Path, tmp_path: Path) -> None:
        trace, file = self.written(tmp_path, "0,small\n0,big\n"), tmp_path / "profile.json"
        fleet.write_text(FLEET + "controller: {gpu_budget: 2}\n")
        for text, waits in (("{}", True), ('{"gpus": null}', False), ('{"gpus": 3}', False)):
            file.write_text(text)
            found = report("simulate", trace, "--fleet", fleet, *KEEP, *TWO_STATES, "--profile", file)
            assert (found["total"]["wait_max_s"] > 60) == waits

    def test_a_trace_of_other_models_is_an_error(self, fleet: Path, tmp_path: Path) -> None:
        said = fails("simulate", self.written(tmp_path, "0,x\n"), "--fleet", fleet)
        assert "none of its models is in the fleet, which has small, big; its first is 'x'" in said


def test_a_stores_history_is_a_trace(tmp_path: Path) -> None:
    clock, url = FakeClock(), f"sqlite:///{tmp_path / 'relight.db'}"
    store = Store.open(url, clock=clock)
    # Recent, of some hours, and of some weeks ago, which is kept in ever longer buckets.
    ago = (3_000_000, 700_000, 40_000, 100)
    store.add_traffic([second("a", NOON - at, 2, input_tokens=20, busy_s=6.0) for at in ago])
    store.add_traffic([second("b", NOON - at) for at in (700_000, 699_995, 699_990)])
    for i, took_s in enumerate((40.0, 44.0)):
        store.add_cold_start(
            ColdStartRow("a", f"engine-{i}", NOON - 50, NOON - 50 - took_s, took_s, "forked")
        )
    store.close()
    source = StoredSource(url, clock)
    assert source.starts() == Measured.of(("a", Rung.TEMPLATE, took_s) for took_s in (40.0, 44.0))
    rows = list(source.rows())
    assert [row.time_s for row in rows] == sorted(row.time_s for row in rows)
    # A bucket's first and last request come in their seconds, the others between.
    assert [tuple(row[:4]) for row in rows if row.model == "b"] == [
        (NOON - 700_000, "b", 1, 1.0),
        (NOON - 699_999, "b", 1, 9.0),
        (NOON - 699_990, "b", 1, 1.0),
    ]
    rows = [row for row in rows if row.model == "a"]
    assert [tuple(row[:4]) for row in rows] == [(NOON - at, "a", 2, 1.0) for at in ago]
    assert {(row.input_tokens, row.exec_s) for row in rows} == {(10, 3.0)}


def test_a_stores_history_makes_up_windows(tmp_path: Path) -> None:
    clock = SystemClock()
    url, at_s = f"sqlite:///{tmp_path / 'relight.db'}", int(clock.now_s()) // 600 * 600 - 9 * 86400
    store = Store.open(url, clock=clock)
    store.add_traffic([second("a", at_s + after_s) for after_s in (20, 30, 400, 700)])
    store.close()
    said = says("trace", "convert", url, "-", "--per-window", "10m")
    assert [row["count"] for row in csv.DictReader(io.StringIO(said))] == ["3", "1"]


def test_a_stores_history_stands_still_while_it_is_replayed(tmp_path: Path) -> None:
    """What comes meanwhile is not in it, or each policy would be replayed on a trace of its own."""
    clock, url = FakeClock(), f"sqlite:///{tmp_path / 'relight.db'}"
    store = Store.open(url, clock=clock)
    store.add_traffic([second("a", NOON - 100)])
    store.flush()
    source = StoredSource(url, clock)
    before = list(source.rows())
    store.add_traffic([second("a", NOON - 50), second("b", NOON - 40)])
    store.close()
    assert list(source.rows()) == before
    assert len(list(StoredSource(url, clock).rows())) == 3


def test_a_store_by_its_url(tmp_path: Path) -> None:
    """Its traffic, and starts that take as long as its own did."""
    clock, url = SystemClock(), f"sqlite:///{tmp_path / 'relight.db'}"
    store, now_s = Store.open(url, clock=clock), clock.now_s()
    store.add_traffic([second("a", now_s - at, busy_s=2.0) for at in (1800, 300)])
    store.add_cold_start(ColdStartRow("a", "engine", now_s - 50, now_s - 62, 12.0, "forked"))
    store.close()
    found = report("simulate", "--from-store", url, *KEEP)
    assert (found["trace"], found["total"]["requests"], found["total"]["cold_starts"]) == (url, 2, 2)
    assert found["total"]["wait_max_s"] == pytest.approx(12.1, abs=0.1)
    profile = tmp_path / "profile.json"
    for named, lasts_s in (({"slo_s": 7}, 12.1), ({"starts": {"template": 3}}, 3.1)):
        profile.write_text(json.dumps(named))
        found = report("simulate", "--from-store", url, *KEEP, "--profile", profile)
        assert found["total"]["wait_max_s"] == pytest.approx(lasts_s, abs=0.1)
    for option in (("--map", "a=b"), ("--model", "b"), ("--window", "1m"), ("--skip-bad",)):
        said = fails("simulate", "--from-store", url, *KEEP, *option)
        assert f"{option[0]}: it is for a TRACE" in said
    assert "2 requests of 1 model" in says("trace", "describe", "--from-store", url)
    assert says("trace", "convert", url, "-").count(",a,") == 2


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "no.db"
    assert "there is no such file" in fails("simulate", "--from-store", f"sqlite:///{missing}", *KEEP)
    assert not missing.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("text", ["Not a database, and somebody's all the same.\n", ""])
def test_what_is_no_store_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    """A store moves a damaged file away and begins a new one in its place; who only reads must not."""
    file = tmp_path / "diary.txt"
    file.write_text(text)
    said = fails("trace", "describe", "--from-store", f"sqlite:///{file}")
    assert ("can't be read: file is not a database" if text else "is no store") in said
    assert contents(tmp_path) == {"diary.txt": text.encode()}


def test_a_database_of_another_program_gets_no_tables(tmp_path: Path) -> None:
    file = tmp_path / "notes.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE notes (text)")
    before = contents(tmp_path)
    assert "is no store" in fails("simulate", "--from-store", f"sqlite:///{file}", *KEEP)
    assert contents(tmp_path) == before


def test_a_store_is_read_where_it_may_not_be_written(tmp_path: Path) -> None:
    """A controller's, by another user, and nothing of it is changed."""
    folder = tmp_path / "data"
    clock, url = SystemClock(), f"sqlite:///{folder / 'relight.db'}"
    store = Store.open(url, clock=clock)
    store.add_traffic([second("a", clock.now_s() - at) for at in (1800, 300)])
    store.close()
    before = contents(folder)
    assert says("trace", "convert", url, "-").count(",a,") == 2
    assert contents(folder) == before


class TestCompare:
    def test_a_keep_alive_is_swept_where_it_acts(self, tmp_path: Path) -> None:
        """As a bound on what predictive keeps; here nobody knows the model yet, and its engine would be kept."""
        file = requests(tmp_path, [0, 50, 200])
        options = (
            "--policies",
            "predictive",
            "--set",
            "keep_alive_bound=1",
            "--sweep",
            "keep_alive_s=1,3000",
        )
        found = report("compare", file, *options, *TWO_STATES)
        assert [each["keep_alive_s"] for each in found] == [1, 3000]
        bounds = (
            "--policies",
            "predictive",
            "--sweep",
            "keep_alive_bound=0,1",
            "--sweep",
            "keep_alive_s=1,3000",
        )
        assert len(report("compare", file, *bounds, *TWO_STATES)) == 4

    def test_a_row_for_each_policy_and_value(self, tmp_path: Path) -> None:
        file = requests(tmp_path, [0, 50, 200])
        options = ("--policies", "keep-alive,kpa", "--sweep", "keep_alive_s=10,60", *TWO_STATES)
        one, two = (report("compare", file, *options, "--jobs", jobs) for jobs in (1, 2))
        assert [each["label"] for each in one] == [
            "keep-alive (keep_alive_s=10)",
            "keep-alive (keep_alive_s=60)",
            "kpa",
        ]
        assert [each["total"]["cold_starts"] for each in one][:2] == [3, 2]
        assert list(map(without_time, one)) == list(map(without_time, two))
        each_by_itself = ("--sweep", "keep_alive_s=10", "--sweep", "keep_alive_s=60")
        again = report("compare", file, *options[:2], *each_by_itself, *TWO_STATES)
        assert list(map(without_time, again)) == list(map(without_time, one))
        lines = says("compare", file, *options).splitlines()
        assert [line.split("  ")[0] for line in lines[1:4]] == [each["label"] for each in one]

    def test_its_map_of_cold_starts_knows_the_hours(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a timer at 23:00 over half a month, in a trace that begins within an hour; in a short list of steps."""
        drawn: list[Report] = []
        monkeypatch.setattr(
            "autoscaling.sim.html.document", lambda found, *_: drawn.extend(each for _, each in found) or "x"
        )
        file = requests(tmp_path, [1017, *(86400 * day + 23 * 3600 for day in range(15))])
        says("compare", file, "--policies", "keep-alive", "--report", tmp_path / "out.html", *TWO_STATES)
        (hours,) = cold_grid(drawn[0], ["m"])
        assert {hour: count for hour, count in enumerate(hours.tolist()) if count} == {0: 1, 23: 15}
        assert len(drawn[0].timeline["m"]) < 500

    def test_its_page_needs_no_network(self, tmp_path: Path) -> None:
        page, name = tmp_path / "out.html", "</script><img src=http://x.example/>"
        file = tmp_path / "trace.csv"
        file.write_text("timestamp_s,model\n" + "".join(f"{at},{name}\n" for at in (0, 50, 4000, 9000)))
        says("compare", file, "--policies", "keep-alive,oracle", "--report", page, *TWO_STATES)
        text = page.read_text()
        # Its scripts are inside, nothing else is asked for, and a browser would not let it load anything either.
        assert "default-src 'none'" in text.partition("<style>")[0]
        outside = re.sub(r"<script\b[^>]*>.*?</script>", "", text, flags=re.DOTALL)
        assert not re.search(r"src=|href=|@import|url\(|https?:", outside)
        assert not re.search(r"<script\b[^>]*src", text)
        for heading in ("how long users wait", "Replicas over time", "Cold starts by hour", "Idle times"):
            assert heading in outside


KINDS = [
    ("simulate", "--policy", "keep-alive", "--json"),
    ("compare", "--policies", "keep-alive", "--json"),
    ("compare", "--policies", "keep-alive", "--report"),
    ("tune", "--policy", "keep-alive", "--parameters", "keep_alive_s", "--trials", "1", "--out"),
]


@pytest.mark.parametrize("arguments", KINDS, ids=[f"{each[0]} {each[-1]}" for each in KINDS])
class TestWriting:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "out"
        folder.mkdir()
        (folder / "x").write_text("as it was")
        (folder / "x").chmod(0o600)
        return folder

    def test_where_it_fails_the_table_is_shown_and_the_file_is_as_it_was(
        self, tmp_path: Path, folder: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = requests(tmp_path, range(0, 9000, 300))

        def full(path: Path, text: str, encoding: str) -> None:
            path.open("w").write(text[:10])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        result = run(arguments[0], file, *arguments[1:], folder / "x")
        assert result.exit_code == 1
        assert f"{folder / 'x'}: can't be written: No space left on device" in result.stderr
        assert "in SLO" in result.stdout
        assert [(each.name, each.read_text()) for each in folder.iterdir()] == [("x", "as it was")]

    def test_what_fails_before_leaves_nothing(
        self, tmp_path: Path, folder: Path, arguments: tuple[str, ...]
    ) -> None:
        file = requests(tmp_path, [300, 0])
        assert "breaks the order of times" in fails(arguments[0], file, *arguments[1:], folder / "x")
        assert [(each.name, each.read_text()) for each in folder.iterdir()] == [("x", "as it was")]

    def test_where_nothing_can_be_written_is_known_before(
        self, tmp_path: Path, arguments: tuple[str, ...]
    ) -> None:
        file = requests(tmp_path, [300, 0])
        assert f"{arguments[-1]}: /proc/x can't be written" in fails(
            arguments[0], file, *arguments[1:], "/proc/x"
        )

    def test_what_it_reads_is_not_written_over(self, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        file = requests(tmp_path, [0])
        before, link = file.read_text(), tmp_path / "link"
        link.symlink_to(file)
        fleet = tmp_path / "fleet.yaml"
        fleet.write_text(FLEET)
        for option, path, more in (
            ("TRACE", file, ()),
            ("TRACE", link, ()),
            ("--fleet", fleet, ("--fleet", fleet)),
        ):
            said = fails(arguments[0], file, *arguments[1:], path, *more)
            assert f"{arguments[-1]}: {path} is what {option} names too" in said
        assert file.read_text() == before

    def test_a_link_stays_one_and_so_does_a_pipe(
        self, tmp_path: Path, folder: Path, arguments: tuple[str, ...]
    ) -> None:
        file = requests(tmp_path, range(0, 9000, 300))
        link = tmp_path / "link"
        link.symlink_to(folder / "x")
        says(arguments[0], file, *arguments[1:], link)
        assert link.is_symlink()
        assert (folder / "x").read_text() != "as it was"
        assert (folder / "x").stat().st_mode & 0o777 == 0o600
        if arguments[-1] == "--report":
            return  # longer than a pipe holds
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
        says(arguments[0], file, *arguments[1:], pipe)
        assert json.loads(os.read(reader, 1 << 20))
        assert pipe.is_fifo()
        os.close(reader)


def test_two_outputs_are_two_files(tmp_path: Path) -> None:
    file, out = requests(tmp_path, [0]), tmp_path / "out"
    for one, other in ((out, out), (out, tmp_path / "." / "out"), ("-", "-")):
        said = fails("compare", file, "--policies", "keep-alive", "--json", one, "--report", other)
        assert f"--json: {one} is what --report names too" in said
    assert not out.exists()
    says("compare", file, "--policies", "keep-alive", "--json", "/dev/null", "--report", "/dev/null")


def test_a_store_is_not_written_over(tmp_path: Path) -> None:
    file = tmp_path / "relight.db"
    file.write_text("x")
    said = fails("simulate", "--from-store", f"sqlite:///{file}", *KEEP, "--json", file)
    assert f"--json: {file} is what --from-store names too" in said
    assert file.read_text() == "x"


WRONG = [
    (("--policy", "nope"), "policy 'nope' is unknown; there are best-fixed, fixed"),
    ((*KEEP, "--set", "nope=3"), "nope: 3.0 is not right; expected a parameter of keep-alive"),
    ((*KEEP, "--set", "keep_alive_s"), "--set: 'keep_alive_s' is not NAME=NUMBER"),
    ((*KEEP, "--set", "keep_alive_s=-3"), "keep_alive_s: -3 must not be negative"),
    ((*KEEP, "--set", "max_replicas=1.5"), "max_replicas: 1.5 is not a whole number"),
    ((*KEEP, "--set", "park=2"), "park: 2 is neither 0 nor 1"),
    (
        (*KEEP, "--set", "min_replicas=9", "--set", "max_replicas=2"),
        "min_replicas: 9 is above max_replicas, 2",
    ),
    ((*KEEP, "--set", "wait_cost=1e308"), "wait_cost: 1e+308 is above 1e+12"),
    ((*KEEP, "--set", "max_replicas=1e9"), "max_replicas: 1e+09 is above 100000"),
    ((*KEEP, "--set", "gpus_per_replica=1e308"), "gpus_per_replica: 1e+308 is above 100000"),
    (("--policy", "best-fixed", "--set", "keep_alive_s=3"), "keep_alive_s: best-fixed finds it"),
    (("--policy", "best-fixed", "--set", "idle_s=3"), "idle_s: best-fixed finds it"),
    (
        (*KEEP, "--set", "keep_alive_s=3", "--set", "idle_s=4"),
        "keep_alive_s: 3.0 is not right; expected none beside params.idle_s, 4.0, which goes before it",
    ),
    ((*KEEP, "--measure-from", "soon"), "--measure-from: 'soon' is not a duration"),
    ((*KEEP, "--price", "L4"), "--price: 'L4' is not TYPE=NUMBER"),
    ((*KEEP, "--price", "L4=1e308"), "--price: 'L4=1e308' is not TYPE=NUMBER"),
    ((*KEEP, "--json", "/nowhere/at/all.json"), "--json: /nowhere/at/all.json is in no folder"),
    ((*KEEP, "--from-store", "sqlite:///x.db"), "Give either a TRACE or --from-store"),
    ((*KEEP, "--map", "x"), "--map: 'x' is not NAME=MODEL"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[words[:30] for _, words in WRONG])
def test_what_is_wrong_is_one_clear_error(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in fails("simulate", requests(tmp_path, [0]), *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--policies", ","), "--policies: name at least one"),
        (("--policies", "keep-alive,foo"), "policy 'foo' is unknown"),
        (("--policies", "kpa", "--sweep", "keep_alive_s=1,2"), "none of kpa has 'keep_alive_s'"),
        (("--policies", "kpa", "--sweep", "keep_alive_s=a"), "is not NAME=A,B,C"),
        (
            ("--policies", "keep-alive", "--sweep", "keep_alive_s=5,nan"),
            "'keep_alive_s=5,nan' is not NAME=A,B,C",
        ),
        (("--policies", "kpa", "--sweep", "max_replicas=inf"), "'max_replicas=inf' is not NAME=A,B,C"),
        (("--policies", "kpa", "--sweep", "wait_cost=1e300"), "wait_cost: 1e+300 is above 1e+12"),
        (
            ("--policies", "kpa", "--report", "/nowhere/at/all.html"),
            "--report: /nowhere/at/all.html is in no folder",
        ),
    ],
    ids=["none", "unknown", "unused", "no-numbers", "nan", "infinite", "too-much", "folder"],
)
def test_so_in_a_comparison(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in fails("compare", requests(tmp_path, [0]), *arguments)


PROFILES = [
    ('{"deadline_s": null}', "profile.deadline_s: None is not a number from 0 to 1e+12 or Infinity"),
    ('{"slo_s": null}', "profile.slo_s: None is not a number from 0 to 1e+12"),
    ('{"handoff_s": Infinity}', "profile.handoff_s: inf is not a number from 0 to 1e+12"),
    ('{"price_per_gpu_h": Infinity}', "profile.price_per_gpu_h: inf is not a number from 0 to 1e+12"),
    ('{"start_failures": 1}', "profile.start_failures: 1 must be below 1"),
    ('{"starts": {"template": {"delay_s": []}}}', "starts.template.delay_s: [] holds no seconds"),
    ('{"starts": {"template": Infinity}}', "starts.template.delay_s.[0]: inf is not a number"),
    ('{"engine": {"slowdown": [1, 0]}}', "engine.slowdown: [1, 0] must be above 0"),
    ('{"engine": {"service_s": NaN}}', "engine.service_s: nan is not a number"),
    ('{"parked_engines": 0.5}', "profile.parked_engines: 0.5 is not a whole number"),
    ('{"parked_engines": 0, "base": "parked"}', "profile.base: parked, though parked_engines is 0"),
    (
        '{"deadline_s": Infinity, "queue_limit": 2}',
        "profile.queue_limit: 2 goes with a finite deadline_s only",
    ),
]


@pytest.mark.parametrize(("text", "words"), PROFILES, ids=[words.split(":")[0] for _, words in PROFILES])
def test_so_in_a_profile(tmp_path: Path, text: str, words: str) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(text)
    assert f"{profile}: {words}" in fails("simulate", requests(tmp_path, [0]), *KEEP, "--profile", profile)


def test_a_profile_may_leave_open_what_has_no_end(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text('{"gpus": null, "parked_engines": null, "apply_s": null, "deadline_s": Infinity}')
    found = report("simulate", requests(tmp_path, [0]), *KEEP, "--profile", profile)
    assert found["total"]["requests"] == 1


def test_start_times_that_are_damaged_are_one_clear_error(tmp_path: Path) -> None:
    starts = tmp_path / "starts.csv.gz"
    packed = bytearray(gzip.compress(b"total_s\n" + b"".join(b"%d\n" % i for i in range(900))))
    packed[200:300] = bytes(100)
    starts.write_bytes(packed)
    said = fails("simulate", requests(tmp_path, [0]), *KEEP, "--cold-start", starts)
    assert f"{starts}: can't be read: " in said


@pytest.mark.parametrize("columns", [30, 40, 60])
def test_a_narrow_terminal_shows_names_and_what_counts(tmp_path: Path, columns: int) -> None:
    """Other columns go before names do."""
    file = tmp_path / "t.csv"
    names = ("a-model-of-a-long-name", "b")
    file.write_text("timestamp_s,model\n" + "".join(f"{at},{name}\n" for at in (0, 90) for name in names))
    for command, kept in ((("trace", "describe"), "gap cv"), (("simulate", *KEEP), "total")):
        terminal = {"COLUMNS": str(columns), "FORCE_COLOR": "1", "TERM": "xterm"}
        result = CliRunner().invoke(app, [*command, str(file)], env=terminal)
        table = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout).partition("A wider terminal shows also")[0]
        lines = [line.rstrip() for line in table.splitlines()]
        assert kept in lines[0]
        assert lines[1].startswith("a-model-of-a") and any(line.startswith("b  ") for line in lines)
        assert max(map(len, lines)) <= columns


def test_a_table_says_what_the_slo_and_the_prices_are(tmp_path: Path) -> None:
    file, fleet, profile = (
        requests(tmp_path, [0], model="small"),
        tmp_path / "fleet.yaml",
        tmp_path / "p.json",
    )
    fleet.write_text(FLEET)
    profile.write_text('{"slo_s": 7, "price_per_gpu_h": 1.25}')
    plain = "in SLO: waited 5 s at most. cost: at 3 for a GPU-hour, in US dollars unless the price was given."
    assert plain in says("simulate", file, *KEEP)
    assert plain in says("compare", file, "--policies", "keep-alive")
    said = says("simulate", file, *KEEP, "--profile", profile)
    assert "in SLO: waited 7 s at most. cost: at 1.25 for a GPU-hour" in said
    assert "cost: at the price of each model's GPU type" in says("simulate", file, *KEEP, "--fleet", fleet)


def test_a_share_is_not_rounded_up(tmp_path: Path) -> None:
    """One of 1,001 waits; what is under 100 % is not shown as it."""
    file = requests(tmp_path, [0, *range(60, 1060)], exec_s=0.1)
    assert " 99.9 % " in says("simulate", file, *KEEP, *TWO_STATES)


def test_rows_of_a_list_are_a_source_too() -> None:
    from autoscaling import simulator as sim

    base = sim.Base([Row(0.0, "m", exec_s=1.0)])
    assert sim.simulate(base, sim.Variant("keep-alive")).trace == ""


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([Row(10.0, "a"), Row(5.0, "b")], "b at 5 s breaks the order of times: the row before it is of 10 s"),
        ([Row(0.0, "a"), Row(float("nan"), "b")], "b at nan s breaks the order of times"),
        ([Row(10.0, "a", 5)], "a at 10 s: requests: 5 come in no time; with window_s 0 it must be 1"),
    ],
    ids=["order", "nan", "window"],
)
def test_bad_rows_of_a_list_are_one_clear_error(rows: list[Row], words: str) -> None:
    """As those of a file, and not counted as something else."""
    from autoscaling import simulator as sim

    with pytest.raises(sim.TraceError, match=re.escape(words)):
        sim.simulate(sim.Base(rows), sim.Variant("keep-alive"))
    with pytest.raises(sim.TraceError, match=re.escape(words)):
        sim.describe(rows)


def test_what_is_given_from_python_is_looked_at() -> None:
    from autoscaling import simulator as sim

    once: Any = sim.generate([sim.stream("a=poisson")], 3600.0)
    with pytest.raises(TypeError, match=r"trace: 'generator' is neither a source .* must be made a list"):
        sim.Base(once)
    text: Any = "60"
    base = sim.Base([Row(0.0, "m")])
    for name in ("keep_alive_s", "idle_s"):
        with pytest.raises(sim.SettingError, match=f"{name}: '60' is not a number"):
            sim.simulate(base, sim.Variant("keep-alive", {name: text}))


def test_the_api_page_runs() -> None:
    import doctest

    from autoscaling import simulator

    result = doctest.testmod(simulator)
    assert (result.failed, result.attempted) == (0, 11)


def test_help_names_every_option() -> None:
    said = run("simulate", "--help").output
    for option in (
        "--policy",
        "--fleet",
        "--set",
        "--measure-from",
        "--seed",
        "--json",
        "--skip-bad",
        "--from-store",
    ):
        assert option in said
