"""`relight tune`: it finds what is there to be found, looks at nothing that is scored, and says how sure it is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from autoscaling import simulator as sim
from autoscaling.traces import Row
from tests.cli.conftest import Cluster
from tests.cli.sim_lab import TWO_STATES, fails, report, requests, says
from tests.control.lab import SMALL

TUNE = ("--policy", "keep-alive", "--parameters", "keep_alive_s", "--trials", 12, *TWO_STATES)
DAYS = 6


def chats(gap_s: float, days: int = DAYS, seed: int = 0) -> list[float]:
    """Three chats a day, each of a dozen requests, somewhat more than `gap_s` apart."""
    draw = random.Random(seed)
    times = []
    for day in range(days):
        for hour in (8, 13, 19):
            at_s = day * 86400 + hour * 3600 + draw.uniform(0, 1800)
            for _ in range(12):
                times.append(round(at_s, 1))
                at_s += gap_s * draw.uniform(1.0, 1.3)
    return times


def tuned(*arguments: object) -> Any:
    return json.loads(says("tune", *arguments, "--out", "-"))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Gaps of 75 to 100 s: a keep-alive of a minute misses them all, one of 100 s none."""
    return requests(tmp_path, chats(80), model=SMALL)


def test_it_finds_the_gap(trace: Path) -> None:
    found = tuned(trace, *TUNE, "--learn-until", "4d")
    assert found["policy"] == "keep-alive"
    assert found["params"] == {}
    assert 95 < found["keep_alive_s"] < 300
    evidence = found["evidence"]
    # On the two days that it has not seen: all but the first of each chat are warm now.
    assert evidence["saving"] == pytest.approx(1 - evidence["scored"] / evidence["scored_default"])
    assert (
        evidence["is_sure"]
        and 0.3 < evidence["saving_90"][0] <= evidence["saving"] <= evidence["saving_90"][1]
    )
    assert (evidence["resampled_models"], evidence["learn_until_s"]) == (1, 4 * 86400)


def test_what_is_scored_is_not_looked_at(trace: Path, tmp_path: Path) -> None:
    """Another rest of the trace changes what the parameters are worth, not what they are."""
    as_it_was = tuned(trace, *TUNE, "--learn-until", "4d")
    times = chats(80)
    seen_s = times[0] + 4 * 86400
    rest = [seen_s + 3600 * i for i in range(40)]
    other = requests(tmp_path, [*(time_s for time_s in times if time_s < seen_s), *rest], model="other")
    changed = tuned(other, *TUNE, "--learn-until", "4d")
    assert changed["keep_alive_s"] == as_it_was["keep_alive_s"]
    assert changed["evidence"]["learned"] == as_it_was["evidence"]["learned"]
    assert changed["evidence"]["saving"] < as_it_was["evidence"]["saving"]


BURST = [0.9, *(600 * i + 0.9 for i in range(1, 100)), *(39_600.05 + i / 100 for i in range(80))]


@pytest.mark.parametrize(
    "rows",
    [
        [Row(86400.0 * i, "m", 400, 86400.0) for i in range(7)],
        [Row(3600.0 * i, "m", 40, 3600.0) for i in range(70)],
        [Row(time_s, "m") for time_s in sorted(BURST)],
    ],
    ids=["days", "hours", "requests"],
)
def test_nothing_is_both_learned_from_and_scored(rows: list[Row]) -> None:
    """Also where a window goes on after the end of what is learned, and where the first request is in a second."""
    found = sim.tune(sim.Base(rows), "keep-alive", trials=1, processes=1)
    requests = sum(row.requests for row in rows)
    assert 0 < found.scored.total.requests <= requests - found.learned.total.requests


def test_a_trace_lasts_until_the_end_of_its_longest_window(tmp_path: Path) -> None:
    """Not until the end of the last one that begins."""
    file = tmp_path / "t.csv"
    file.write_text("minute,model,count,window_s\n0,a,3,60\n1,b,400,86400\n2,a,5,60\n")
    found = tuned(file, "--policy", "keep-alive", "--trials", 1, "--learn-until", "30s", *TWO_STATES)
    assert found["evidence"]["learn_until_s"] == 30
    assert "leave nothing to score: the trace lasts 86,460 s" in fails(
        "tune", file, "--policy", "keep-alive", "--learn-until", "2d"
    )
    # The long one is learned from as a whole.
    assert "43,200 s leave nothing to score" in fails(
        "tune", file, "--policy", "keep-alive", "--learn-until", "12h"
    )


def test_parameters_are_named(trace: Path) -> None:
    names = ("--policy", "keep-alive", "--trials", 1, *TWO_STATES, "--parameters")
    assert tuned(trace, *names, "keep_alive_s,")["policy"] == "keep-alive"
    assert "--parameters: name at least one" in fails("tune", trace, *names, ",")


def test_what_is_not_counted_is_no_part_to_search_on(trace: Path) -> None:
    said = fails("tune", trace, *TUNE, "--measure-from", "1d", "--learn-until", "12h")
    assert (
        "learn_until_s: 43,200 s leave nothing to search on: what comes before measure_from_s, 86,400 s"
        in said
    )


def test_processes_change_nothing(trace: Path) -> None:
    assert tuned(trace, *TUNE, "--jobs", 1) == tuned(trace, *TUNE, "--jobs", 2)


def test_any_seed_is_one(trace: Path) -> None:
    assert tuned(trace, *TUNE, "--seed", 5_000_000_000)["evidence"]["seed"] == 5_000_000_000


def test_where_nothing_is_to_be_had_it_says_so(tmp_path: Path) -> None:
    """Single requests, hours apart: a shorter keep-alive saves; with the best already set, nothing does."""
    file = requests(tmp_path, range(0, DAYS * 86400, 9000))
    said = says(
        "tune",
        file,
        "--policy",
        "keep-alive",
        "--parameters",
        "idle_s",
        "--set",
        "keep_alive_s=0",
        "--trials",
        4,
        *TWO_STATES,
    )
    assert "No setting that was tried was better than as it was: keep the parameters as they are." in said
    # One row, and nothing to be used instead.
    assert [line.split("  ")[0] for line in said.splitlines()[:2]] == ["on the rest", "as it was"]
    assert "% saved" not in said and "Use it live" not in said


@pytest.mark.parametrize(("kept", "searched"), [("keep_alive_s", "idle_s"), ("idle_s", "keep_alive_s")])
def test_what_is_searched_takes_the_place_of_what_says_the_same(
    trace: Path, kept: str, searched: str
) -> None:
    found = tuned(trace, *TUNE, "--parameters", searched, "--set", f"{kept}=0.5", "--objective", "waited_s")
    assert found["evidence"]["learned"] < found["evidence"]["learned_default"]
    assert list(found["evidence"]["settings"]) == [searched]


def test_a_bound_on_the_slo_goes_first(trace: Path) -> None:
    """Fewest GPU-seconds alone are those of no keep-alive at all."""
    cheap = tuned(trace, *TUNE, "--objective", "gpu_s")
    kept = tuned(trace, *TUNE, "--objective", "gpu_s", "--slo", "0.8")
    assert cheap["keep_alive_s"] < 75
    assert cheap["evidence"]["slo_attainment"] < 0.2
    assert kept["keep_alive_s"] > 95
    assert kept["evidence"]["slo_attainment"] >= 0.8
    assert (kept["evidence"]["slo"], kept["evidence"]["slo_kept"]) == (0.8, True)


def test_an_slo_that_nothing_keeps_is_said(trace: Path, tmp_path: Path) -> None:
    """And what was found nevertheless is measured in what was asked for."""
    file = tmp_path / "policy.json"
    said = says("tune", trace, *TUNE, "--objective", "gpu_s", "--slo", "1", "--out", file)
    assert "No setting that was tried keeps 100 % of the requests to the SLO" in said
    evidence = json.loads(file.read_text())["evidence"]
    assert evidence["slo_kept"] is False
    assert 0 < evidence["learned"] < DAYS * 86400


def test_what_an_slo_costs_is_no_reason_against_it(trace: Path) -> None:
    """As it was, it did not keep to it."""
    said = says("tune", trace, *TUNE, "--objective", "gpu_s", "--slo", "0.8")
    assert "As it was, it does not keep to the SLO" in said
    assert "keep the parameters as they are" not in said


def test_turning_requests_away_saves_nothing(tmp_path: Path) -> None:
    """They count as having waited in vain, and how many they were is shown."""
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"queue_limit": 20}))
    file = tmp_path / "bursts.csv"
    rows = [f"{3600 * hour + i / 20},m,1" for hour in range(24) for i in range(200)]
    file.write_text("\n".join(["timestamp_s,model,exec_s", *rows]) + "\n")
    settings = ("--profile", profile, "--set", "max_replicas=1", "--cold-start", "40s")
    said = says("compare", file, "--policies", "keep-alive", "--sweep", "keep_alive_s=5,7200", *settings)
    assert "turned away" in said
    found = [
        report("simulate", file, "--policy", "keep-alive", *settings, "--set", f"keep_alive_s={each}")[
            "total"
        ]
        for each in (5, 7200)
    ]
    assert found[0]["rejected"] > 2 * found[1]["rejected"] > 0
    assert found[0]["total_cost_gpu_s"] > found[1]["total_cost_gpu_s"]


def test_its_file_is_used_live(trace: Path, tmp_path: Path, cluster: Cluster) -> None:
    file = tmp_path / "policy.json"
    said = says("tune", trace, *TUNE, "--out", file)
    assert f"relight policy set MODEL --file {file}" in said.replace("\n", "")
    value = json.loads(file.read_text())
    fleet = tmp_path / "fleet.yaml"
    scaling = {name: each for name, each in value.items() if name != "evidence"}
    fleet.write_text(json.dumps({"models": [{"id": SMALL, "source": "org/small", "scaling": scaling}]}))
    cluster.says("policy", "validate", str(fleet), "--file", str(file))
    cluster.says("policy", "validate", str(fleet))
    cluster.says("policy", "set", SMALL, "--file", str(file))
    spec = cluster.json("policy", "show", SMALL)["spec"]
    assert (spec["policy"], spec["keep_alive_s"]) == ("keep-alive", value["keep_alive_s"])
    # What is said beside the file goes before it.
    cluster.clock.time_s += 60
    cluster.says("policy", "set", SMALL, "--file", str(file), "--keep-alive", "7s")
    assert cluster.json("policy", "show", SMALL)["spec"]["keep_alive_s"] == 7.0
    file.write_text("{}")
    assert "is no policy file" in cluster.fails(2, "policy", "set", SMALL, "--file", str(file))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--objective", "foo"), "objective 'foo' is unknown; there are total_cost_gpu_s"),
        (("--parameters", "foo"), "policy keep-alive has no parameter 'foo'; it has"),
        (("--policy", "oracle"), "policy 'oracle' can't be tuned"),
        (("--parameters", "idle_s,keep_alive_s"), "idle_s and keep_alive_s say the same under keep-alive"),
        (("--learn-until", "100d"), "8,640,000 s leave nothing to score: the trace lasts 8,700 s"),
        (("--out", "/nowhere/at/all.json"), "--out: /nowhere/at/all.json is in no folder"),
    ],
    ids=["objective", "parameter", "policy", "the-same", "nothing-left", "folder"],
)
def test_what_is_wrong(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    file = requests(tmp_path, range(0, 9000, 300))
    assert words in fails("tune", file, "--policy", "keep-alive", "--trials", 1, *arguments)
