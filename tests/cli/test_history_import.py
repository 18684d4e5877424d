"""`relight history import` of traces and logs into a real store, over HTTP."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from autoscaling.commands import importing
from tests.cli.conftest import Cluster
from tests.control.lab import NOW_S, ORG, SMALL


def arrivals(cluster: Cluster, model: str, since: str = "10d") -> float:
    points = cluster.json("history", model, "--since", since)["points"]
    return sum(row["arrivals"] for row in points)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """A hundred requests over an hour that ends two hours ago, of two models, each with tokens."""
    file = tmp_path / "requests.csv"
    rows = [f"{NOW_S - 3 * 3600 + 36 * i},{SMALL if i % 4 else ORG},{10},{20},{1.5}" for i in range(100)]
    file.write_text("timestamp_s,model,input_tokens,output_tokens,exec_s\n" + "\n".join(rows) + "\n")
    return file


def test_requests_become_history(cluster: Cluster, requests: Path) -> None:
    answer = cluster.json("history", "import", str(requests))
    assert (answer["format"], answer["requests"]) == ("requests", 100)
    # Each takes 1.5 s, and so is in progress in two of the seconds.
    assert answer["added"] == answer["rows"] == 200
    assert answer["models"] == {SMALL: 75, ORG: 25}
    assert (answer["from_s"], answer["until_s"]) == (NOW_S - 10800, NOW_S - 10800 + 36 * 99 + 1.5)
    assert (arrivals(cluster, SMALL), arrivals(cluster, ORG)) == (75, 25)
    points = cluster.json("history", ORG, "--since", "1d")["points"]
    assert sum(row["output_tokens"] for row in points) == 500
    assert sum(row["busy_s"] for row in points) == pytest.approx(37.5)


def test_the_same_file_is_added_once(cluster: Cluster, requests: Path) -> None:
    assert "Added 200 rows of 1 s" in cluster.says("history", "import", str(requests))
    assert "imported before" in cluster.says("history", "import", str(requests))
    assert arrivals(cluster, SMALL) == 75
    cluster.says("history", "import", str(requests), "--again")
    assert arrivals(cluster, SMALL) == 150


def test_a_large_file_goes_in_parts(
    cluster: Cluster, requests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was interrupted goes on with the parts that are missing."""
    monkeypatch.setattr(importing, "CHUNK_ROWS", 60)
    cluster.says("history", "import", str(requests))
    assert sum(path.endswith("/import") for _, path in cluster.asked) == 4
    assert arrivals(cluster, SMALL) == 75
    assert cluster.json("history", "import", str(requests))["added"] == 0


def test_a_trace_by_the_minute_is_moved_to_its_end(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "min_trace.csv.gz"
    with gzip.open(file, "wt") as opened:
        opened.write("minute,model,count\n" + "".join(f"{i},f1,{i % 3}\n" for i in range(120)))
    said = cluster.says("history", "import", str(file), "--model", SMALL, "--ends", "now")
    assert "120 requests of 1 model" in said and "rows of 1 min" in said
    assert arrivals(cluster, SMALL, "2h") == 120


def test_an_end_is_a_time_that_was(cluster: Cluster, requests: Path) -> None:
    """It is 07:00: eight o'clock was yesterday's."""
    answer = cluster.json("history", "import", str(requests), "--ends", "08:00")
    assert answer["until_s"] == pytest.approx(NOW_S - 23 * 3600, abs=1)
    for ends in ("in 15m", "tomorrow 09:00", "today 07:01", "2026-11-24T07:00:01"):
        said = cluster.fails(2, "history", "import", str(requests), "--ends", ends)
        assert said.startswith(f"--ends: '{ends}' is still to come; write a time that was, like 18:30")
    for said in (
        cluster.fails(2, "history", "import", str(requests), "--ends", "soon"),
        cluster.says("history", "import", "--help"),
    ):
        assert "15m ago" in said and "in 15m" not in said and "tomorrow" not in said


def test_times_that_are_no_dates_are_moved_by_whole_weeks(cluster: Cluster, tmp_path: Path) -> None:
    """So that what came at nine on a Monday is history of nine on a Monday."""
    file = tmp_path / "requests.csv"
    file.write_text(f"timestamp_s,model\n3600,{SMALL}\n7200,{SMALL}\n")
    answer = cluster.json("history", "import", str(file))
    assert (answer["from_s"] - 3600) % (7 * 86400) == 0
    assert NOW_S - 7 * 86400 < answer["until_s"] <= NOW_S
    assert arrivals(cluster, SMALL, "8d") == 2


def test_models_are_named_left_out_or_an_error(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "requests.csv"
    file.write_text(f"timestamp_s,model\n{NOW_S - 60},gpt\n{NOW_S - 50},{SMALL}\n{NOW_S - 40},gpt\n")
    said = cluster.fails(2, "history", "import", str(file))
    assert "no model gpt" in said and "--map" in said
    assert cluster.store.models_with_traffic() == []
    assert cluster.json("history", "import", str(file), "--skip-unknown")["models"] == {SMALL: 1}
    cluster.says("history", "import", str(file), "--map", f"gpt={ORG}")
    assert arrivals(cluster, ORG) == 2
    assert "is not NAME=MODEL" in cluster.fails(2, "history", "import", str(file), "--map", "gpt")
    assert "no model nope" in cluster.fails(2, "history", "import", str(file), "--map", "gpt=nope")
    assert "no model nope" in cluster.fails(2, "history", "import", str(file), "--model", "nope")
    assert "give one of them" in cluster.fails(
        2, "history", "import", str(file), "--model", SMALL, "--map", "a=b"
    )
    file.write_text(f"timestamp_s,model\n{NOW_S - 60},gpt\n")
    assert "no name in it stands for a model. It has gpt" in cluster.fails(
        2, "history", "import", str(file), "--skip-unknown"
    )


def test_an_access_log(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    lines = []
    for second in range(20):
        at = datetime.fromtimestamp(NOW_S - 3600 + second, UTC).strftime("%d/%b/%Y:%H:%M:%S +0000")
        lines.append(f'10.0.0.1 - - [{at}] "POST /v1/chat/completions HTTP/1.1" 200 512\n')
    file.write_text("".join(lines) + "broken\n")
    said = cluster.fails(2, "history", "import", str(file), "--model", SMALL)
    assert f"{file}: 1 line can't be read" in said and "line 21: the line is 'broken'" in said
    answer = cluster.json("history", "import", str(file), "--map", f"/v1/*={SMALL}", "--skip-bad")
    assert (answer["requests"], answer["bad"]) == (20, 1)
    assert arrivals(cluster, SMALL, "2h") == 20


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("what is this\n", "no known format"),
        ("timestamp_s,model\n", "there is no request in it"),
        ("timestamp_s,model\nnow,m\n", "is not a number"),
    ],
)
def test_a_file_that_can_not_be_is_2(cluster: Cluster, tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "x.csv"
    file.write_text(text)
    assert said in cluster.fails(2, "history", "import", str(file))
    assert "can't be read" in cluster.fails(2, "history", "import", str(tmp_path / "none.csv"))


def test_rows_are_plain_json(cluster: Cluster, requests: Path) -> None:
    assert set(json.loads(json.dumps(cluster.json("history", "import", str(requests))))) == {
        *("file", "format", "requests", "models", "from_s", "until_s", "bucket_s", "rows", "added", "bad"),
        "left_out",
    }
