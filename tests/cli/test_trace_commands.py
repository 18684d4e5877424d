"""`relight trace describe|convert|generate`, and what is wrong with a trace."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.cli.sim_lab import fails, report, requests, run, says

CLF = '10.0.0.1 - - [10/Oct/2025:13:55:{second} +0200] "{method} {path} HTTP/1.1" {status} 20 "-" "-" 1.250\n'


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def functions(*days: Mapping[int, int]) -> str:
    """Azure's: a line is a function's day; {minute of the day, from 1: invocations}."""
    head = "HashOwner,HashApp,HashFunction,Trigger," + ",".join(str(minute) for minute in range(1, 1441))
    lines = [
        f"o,a,{i}2345678999,timer," + ",".join(str(day.get(minute, 0)) for minute in range(1, 1441))
        for i, day in enumerate(days)
    ]
    return "\n".join([head, *lines]) + "\n"


FORMATS = {
    "requests.csv": (
        "timestamp_s,model,input_tokens,extra,output_tokens\n1.5,a,3,x,4\n2,b,,x,12.0\n",
        [("1.5", "a", "3", "4"), ("2", "b", "0", "12")],
    ),
    "marked.csv": ("\ufefftimestamp_s,model\r\n1,a\r\n", [("1", "a", "0", "0")]),
    "AzureLLMInferenceTrace_code.csv": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,4808,10\n"
        "2023-11-16 18:15:47.000000+00:00,1,2\n",
        [
            ("1700158546.68059", "AzureLLMInferenceTrace_code", "4808", "10"),
            ("1700158547", "AzureLLMInferenceTrace_code", "1", "2"),
        ],
    ),
    "mooncake.jsonl": (
        '{"timestamp": 500, "input_length": 6, "output_length": 5, "hash_ids": [1]}\n'
        '{"timestamp": 1500, "input_length": 7, "output_length": 5}\n',
        [("0.5", "mooncake", "6", "5"), ("1.5", "mooncake", "7", "5")],
    ),
    "lines.jsonl": (
        '{"timestamp": "2025-10-10T10:00:00Z", "model": "a", "usage": {"prompt_tokens": 6, "completion_tokens": 5}}\n',
        [("1760090400", "a", "6", "5")],
    ),
    "access.log": (
        # Health checks and what was refused are no requests; lines are written when requests end.
        CLF.format(second=40, method="POST", path="/v1/chat/completions", status=200)
        + CLF.format(second=30, method="POST", path="/v1/embeddings?x=1", status=502)
        + CLF.format(second=45, method="GET", path="/health", status=200)
        + CLF.format(second=50, method="POST", path="/v1/chat/completions", status=401),
        [("1760097330", "access", "0", "0"), ("1760097340", "access", "0", "0")],
    ),
}


class TestFormats:
    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
    def test_requests(self, tmp_path: Path, name: str, packed: bool) -> None:
        text, expected = FORMATS[name]
        file = tmp_path / (f"{name}.gz" if packed else name)
        file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        found = rows(says("trace", "convert", file, "-"))
        columns = ("timestamp_s", "model", "input_tokens", "output_tokens")
        assert [tuple(row[column] for column in columns) for row in found] == expected
        assert says("simulate", file, "--policy", "keep-alive")

    def test_windows(self, tmp_path: Path) -> None:
        file = tmp_path / "win10_x.csv"
        file.write_text("minute,model,count,cv\n0,a,3,2.5\n10,b,4,\n")
        found = rows(says("trace", "convert", file, "-"))
        assert [(row["minute"], row["model"], row["count"], row["cv"], row["window_s"]) for row in found] == [
            ("0", "a", "3", "2.5", "600"),
            ("10", "b", "4", "1", "600"),
        ]
        assert rows(says("trace", "convert", file, "-", "--window", "5m"))[0]["window_s"] == "300"

    def test_space_around_a_name_is_none_of_it(self, tmp_path: Path) -> None:
        file = tmp_path / "t.csv"
        for text in ("timestamp_s, model\n5, a\n6,a \n", "minute, model, count\n5, a, 1\n6,a ,1\n"):
            file.write_text(text)
            assert [row["model"] for row in rows(says("trace", "convert", file, "-"))] == ["a", "a"]

    @pytest.mark.parametrize(
        "text",
        [
            '"timestamp_s","model"\n"5","a"\n',
            '"minute","model","count","window_s"\n0,"a",1,60\n',
            '"TIMESTAMP","ContextTokens","GeneratedTokens"\n"2023-11-16 18:17:03.9799600",37,44\n',
        ],
        ids=["requests", "windows", "azure-llm"],
    )
    def test_names_of_columns_may_be_quoted(self, tmp_path: Path, text: str) -> None:
        file, plain = tmp_path / "t.csv", tmp_path / "plain" / "t.csv"
        plain.parent.mkdir()
        file.write_text(text)
        plain.write_text(text.replace('"', ""))
        assert says("trace", "convert", file, "-") == says("trace", "convert", plain, "-")

    def test_functions_of_azure(self, tmp_path: Path) -> None:
        file = tmp_path / "invocations_per_function_md.anon.d02.csv"
        file.write_text(functions({1: 2, 1440: 1}, {1: 5}))
        found = rows(says("trace", "convert", file, "-"))
        # The second day, for its name says so.
        assert [(row["minute"], row["model"], row["count"]) for row in found] == [
            ("1440", "timer/02345678", "2"),
            ("1440", "timer/12345678", "5"),
            ("2879", "timer/02345678", "1"),
        ]

    def test_paths_stand_for_models(self, tmp_path: Path) -> None:
        file = tmp_path / "access.log"
        file.write_text(FORMATS["access.log"][0])
        found = rows(
            says("trace", "convert", file, "-", "--map", "/v1/chat*=chat", "--map", "/v1/emb*=embed")
        )
        assert [(row["model"], row["exec_s"]) for row in found] == [("embed", "1.25"), ("chat", "1.25")]
        found = rows(says("trace", "convert", file, "-", "--map", "/v1/chat*=chat"))
        assert [row["model"] for row in found] == ["chat"]

    def test_requests_that_no_path_stands_for_are_said(self, tmp_path: Path) -> None:
        file, mapped = tmp_path / "access.log", ("--map", "/v1/chat*=chat")
        file.write_text(FORMATS["access.log"][0])
        words = "left out, as no --map and no --model stands for them: 1 of the requests: /v1/embeddings (1)"
        assert words in says("trace", "describe", file, *mapped)
        assert words in run("trace", "convert", file, "-", *mapped).stderr
        assert report("simulate", file, "--policy", "keep-alive", *mapped)["notes"] == [words]
        (found,) = report("compare", file, "--policies", "keep-alive", *mapped)
        assert found["notes"] == [words]
        nothing = ("--map", "/nothing=chat")
        words = (
            "it holds no requests; left out, as no --map and no --model stands for them: 2 of the requests: "
        )
        for command in (("trace", "describe"), ("simulate",)):
            assert words in fails(*command, file, *nothing)

    def test_what_is_written_reads_the_same(self, tmp_path: Path) -> None:
        for name, text in {
            "requests.csv": FORMATS["requests.csv"][0],
            "w.csv": "minute,model,count,cv,window_s\n3,a,3,1e-9,20\n",
        }.items():
            (tmp_path / name).write_text(text)
            once = says("trace", "convert", tmp_path / name, "-")
            (tmp_path / "again.csv").write_text(once)
            assert says("trace", "convert", tmp_path / "again.csv", "-") == once


class TestConversion:
    def test_requests_become_windows(self, tmp_path: Path) -> None:
        file = requests(tmp_path, [1, 2, 61, 200], exec_s=3)
        found = rows(says("trace", "convert", file, "-", "--per-window", "1m"))
        assert [(row["minute"], row["count"], row["exec_s"]) for row in found] == [
            ("0", "2", "3"),
            ("1", "1", "3"),
            ("3", "1", "3"),
        ]

    @pytest.mark.parametrize("begins_s", [0, 1_760_090_640])
    @pytest.mark.parametrize("seconds", [20, 7, 0.3])
    def test_windows_that_are_no_part_of_a_minute_stay_where_they_are(
        self, tmp_path: Path, begins_s: int, seconds: float
    ) -> None:
        """Converted again they are the same, and two of them make up a longer one."""
        file, once = tmp_path / "m.csv", tmp_path / "once.csv"
        times = [begins_s + round(seconds * i, 1) for i in range(400) if i % 5]
        file.write_text("timestamp_s,model\n" + "".join(f"{time_s!r},m\n" for time_s in times))
        says("trace", "convert", file, once, "--per-window", f"{seconds}s")
        found = rows(once.read_text())
        assert [float(row["minute"]) * 60 for row in found] == pytest.approx(times, abs=1e-6)
        assert says("trace", "convert", once, "-") == once.read_text()
        assert says("trace", "convert", once, "-", "--per-window", f"{seconds}s") == once.read_text()
        twice = ("-", "--per-window", f"{2 * seconds}s")
        assert says("trace", "convert", once, *twice) == says("trace", "convert", file, *twice)

    def test_a_minute_of_six_digits_is_the_window_that_it_was_written_for(self, tmp_path: Path) -> None:
        file = tmp_path / "w.csv"
        file.write_text("minute,model,count,window_s\n0.333333,a,1,20\n0.666667,a,1,20\n1,a,1,20\n")
        found = rows(says("trace", "convert", file, "-", "--per-window", "20s"))
        assert [row["minute"] for row in found] == [repr(20 / 60), repr(40 / 60), "1"]

    def test_windows_are_not_cut(self, tmp_path: Path) -> None:
        file = tmp_path / "win10_x.csv"
        file.write_text("minute,model,count\n0,a,3\n10,a,3\n")
        assert (
            "a window of 600 s that begins at 0 s is in none of 60 s, which begin at multiples of that"
        ) in fails("trace", "convert", file, "-", "--per-window", "1m")
        unaligned = tmp_path / "win60_x.csv"
        unaligned.write_text("minute,model,count\n30,a,3\n")
        assert "a window of 3600 s that begins at 1800 s is in none of 3600 s" in fails(
            "trace", "convert", unaligned, "-", "--per-window", "1h"
        )
        assert rows(says("trace", "convert", file, "-", "--per-window", "1h"))[0]["count"] == "6"

    def test_windows_without_requests_are_left_out(self, tmp_path: Path) -> None:
        file = tmp_path / "w.csv"
        file.write_text("minute,model,count\n0,a,3\n60,a,0\n60,b,2\n")
        found = rows(says("trace", "convert", file, "-", "--per-window", "1h"))
        assert [(row["minute"], row["model"], row["count"]) for row in found] == [
            ("0", "a", "3"),
            ("60", "b", "2"),
        ]

    def test_windows_stay_as_bursty_as_those_that_they_are_made_of(self, tmp_path: Path) -> None:
        file = tmp_path / "win10_x.csv"
        file.write_text("minute,model,count,cv\n0,a,30,4\n10,a,10,2\n")
        assert [row["cv"] for row in rows(says("trace", "convert", file, "-", "--per-window", "10m"))] == [
            "4",
            "2",
        ]
        assert rows(says("trace", "convert", file, "-", "--per-window", "20m"))[0]["cv"] == "3.5"

    def test_order_is_restored(self, tmp_path: Path) -> None:
        file = requests(tmp_path, [5, 3, 9])
        assert "m.csv:3: '3,m,5': m at 3 s breaks the order of times" in fails(
            "trace", "convert", file, tmp_path / "x.csv"
        )
        assert list(tmp_path.iterdir()) == [file]
        said = says("trace", "convert", file, "-", "--sort", "--until", "5s")
        assert [row["timestamp_s"] for row in rows(said)] == ["3", "5"]

    def test_a_trace_is_not_written_over(self, tmp_path: Path) -> None:
        file = requests(tmp_path, [1])
        before = file.read_text()
        assert f"OUT: {file} is what TRACE names too" in fails("trace", "convert", file, file)
        assert file.read_text() == before

    def test_a_name_that_ends_in_gz_is_packed(self, tmp_path: Path) -> None:
        out = tmp_path / "x.csv.gz"
        says("trace", "convert", requests(tmp_path, [1]), out)
        assert gzip.decompress(out.read_bytes()).startswith(b"timestamp_s,model")


BAD = {
    "empty": ("", "is empty"),
    "header-only": ("timestamp_s,model\n", "it holds no requests"),
    "other-header": ("time,name\n1,a\n", "'time,name' is the first line of no known format"),
    "no-number": ("timestamp_s,model\n1,a\nx,a\n", "t.csv:3: 'x,a': timestamp_s 'x' is not a number"),
    "nan": ("timestamp_s,model\n1,a\nnan,a\n", "t.csv:3: 'nan,a': timestamp_s 'nan' is not finite"),
    "negative-time": ("timestamp_s,model\n-1,a\n", "t.csv:2: '-1,a': timestamp_s '-1' is negative"),
    "milliseconds": ("timestamp_s,model\n1760090400000,a\n", "is beyond the year 2100; in which unit is it?"),
    "negative-tokens": (
        "timestamp_s,model,input_tokens\n1,a,-3\n",
        "t.csv:2: '1,a,-3': input_tokens '-3' is not a whole number from 0",
    ),
    "endless-request": (
        "timestamp_s,model,exec_s\n1,a,1e308\n",
        "t.csv:2: '1,a,1e308': exec_s '1e308' is more than 316224000, ten years",
    ),
    "half-a-request": ("minute,model,count\n1,a,3.5\n", "count '3.5' is not a whole number from 0"),
    "no-count": ("minute,model,count\n1,a,\n", "count '' is not a whole number from 0"),
    "negative-cv": ("minute,model,count,cv\n1,a,3,-1\n", "cv '-1' is negative"),
    "regular-beyond-measure": (
        "minute,model,count,cv\n1,a,3,1e-200\n",
        "cv '1e-200' is neither 0 nor a number from 1e-09 to 1e+09",
    ),
    "bursty-beyond-measure": ("minute,model,count,cv\n1,a,3,1e200\n", "cv '1e200' is neither 0 nor a number"),
    "endless-window": (
        "minute,model,count,window_s\n1,a,3,1e300\n",
        "window_s must be above 0 and at most 31622400, a year; it is 1e+300",
    ),
    "no-window": ("minute,model,count,window_s\n1,a,3,0\n", "window_s must be above 0"),
    "too-many": ("minute,model,count\n1,a,1000000000000\n", "is not a whole number from 0 to 100,000,000"),
    "twice": (
        "timestamp_s,model,exec_s,model\n1,a,2,b\n",
        "t.csv:1: there are 2 columns 'model', and may be one",
    ),
    "blank": ("timestamp_s,model\n1,  \n", "t.csv:2: '1,  ': model '' is not a name of printable characters"),
    "nameless": ("timestamp_s,model\n1,\n", "model '' is not a name of printable characters"),
    "short": ("timestamp_s,model,exec_s\n1,a\n", "t.csv:2: '1,a': it has 2 columns, the header 3"),
    "unsorted": ("timestamp_s,model\n5,a\n3,b\n", "t.csv:3: '3,b': b at 3 s breaks the order of times"),
    "no-json": (
        '{"timestamp": 1, "input_length": 1, "output_length": 1}\n{\n',
        "t.csv:2: '{': it is no JSON object",
    ),
    "json-field": ('{"timestamp": 1, "input_length": 1}\n', "t.csv:1: "),
    "log": (
        CLF.format(second=11, method="POST", path="/x", status=200) + "junk\n",
        "t.csv: line 2: the line is 'junk'",
    ),
    "no-date": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n",
        "t.csv:2: 'yesterday,1,1': TIMESTAMP 'yesterday' is no date and time",
    ),
}


UNFIT = [
    (
        "t.csv",
        "timestamp_s,model\n1,a\n",
        ("--window", "5m"),
        "--window 300 s is for windows whose length is not said",
    ),
    ("t.csv", "minute,model,count,window_s\n1,a,1,60\n", ("--window", "5m"), "its rows say theirs"),
    ("t.log", FORMATS["access.log"][0], ("--window", "5m"), "--window 300 s is for traces of windows"),
    ("t.csv", "timestamp_s,model\n1,a\n", ("--map", "a=b"), "--map is for names and paths of logs"),
    ("t.csv", "timestamp_s,model\n1,a\n", ("--model", "b"), "--model 'b' is for what names no model"),
]


@pytest.mark.parametrize(
    ("name", "text", "option", "words"), UNFIT, ids=[f"{each[2][0]} {i}" for i, each in enumerate(UNFIT)]
)
def test_an_option_that_says_nothing_of_a_file_is_one_clear_error(
    tmp_path: Path, name: str, text: str, option: tuple[str, str], words: str
) -> None:
    file = tmp_path / name
    file.write_text(text)
    said = fails("trace", "describe", file, *option)
    assert f"{file}: " in said and words in said


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_one_clear_error(tmp_path: Path, name: str) -> None:
    text, words = BAD[name]
    file = tmp_path / "t.csv"
    file.write_text(text)
    said = fails("trace", "describe", file)
    assert words in said
    assert said.count("\n") == 1


def test_bytes_that_are_no_text_are_a_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(b"timestamp_s,model\n1,\xff\xfe\n2,a\n")
    assert "t.csv:2: " in fails("trace", "describe", file)
    assert rows(says("trace", "convert", file, "-", "--skip-bad"))[0]["timestamp_s"] == "2"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            gzip.compress(b"timestamp_s,model\n" + b"".join(b"%d,a\n" % i for i in range(9000)))[:-3000],
            "in the middle of its compressed data",
        ),
        (b"\x1f\x8bnot really", "can't be read"),
        (bytes(range(256)), "its first line is not text"),
        (None, "No such file or directory"),
    ],
    ids=["cut-off", "damaged", "binary", "missing"],
)
def test_a_file_that_is_none_is_one_clear_error(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "t.csv.gz"
    if content is not None:
        file.write_bytes(content)
    assert words in fails("simulate", file, "--policy", "keep-alive")


class TestDescribe:
    def test_clockwork(self, tmp_path: Path) -> None:
        found = json.loads(says("trace", "describe", requests(tmp_path, range(0, 7200, 400)), "--json"))
        (model,) = found["models"]
        assert found["requests"] == model["requests"] == 18
        assert model["gap_cv"] == pytest.approx(0, abs=1e-6)
        assert model["median_gap_s"] == pytest.approx(400, rel=0.02)
        # 17 silences of 400 s: longer than one and five minutes, shorter than fifteen.
        assert dict(zip(found["wakes_after_s"], model["wakes"], strict=True)) == {
            60: 17,
            300: 17,
            900: 0,
            1800: 0,
            3600: 0,
        }
        edges, counts = found["idle_histogram"]
        assert {edge: count for edge, count in zip(edges, counts, strict=True) if count} == {300: 17}

    def test_of_an_even_number_of_gaps_the_median_is_between(self, tmp_path: Path) -> None:
        file = requests(tmp_path, [0, 100, 10_100])
        (model,) = json.loads(says("trace", "describe", file, "--json"))["models"]
        assert model["median_gap_s"] == pytest.approx(5050, rel=0.02)

    def test_a_scale_that_leaves_nothing_is_said(self, tmp_path: Path) -> None:
        said = fails("trace", "describe", requests(tmp_path, [0]), "--scale", "1e-9")
        assert "no requests are left of it at a scale of 1e-09" in said

    def test_for_people(self, tmp_path: Path) -> None:
        said = says("trace", "describe", requests(tmp_path, [0, 100, 90_000]))
        assert "3 requests of 1 model over 1 d 1 h" in said

    def test_a_single_request_is_no_timer(self, tmp_path: Path) -> None:
        file = requests(tmp_path, [7])
        said = says("trace", "describe", file)
        assert said.splitlines()[1].split()[:5] == ["m", "1", "-", "-", "-"]
        assert "1 request of 1 model over" in said
        (model,) = json.loads(says("trace", "describe", file, "--json"))["models"]
        assert [model[name] for name in ("per_day", "gap_cv", "median_gap_s")] == [None, None, None]


GENERATED = [
    # (stream, requests a day, variation of the gaps): the mean and what chance adds to it over ten days.
    ("poisson,rate_per_h=30", 720, 1.0),
    ("gamma,rate_per_h=30,cv=3", 720, 3.0),
    ("timer,every_s=600,jitter_s=0", 144, 0.0),
    ("diurnal,rate_per_h=30,weekend=1,swing=1", 720, None),
    ("on-off,on_s=300,off_s=2700,rate_per_s=0.1", 864, None),
    ("flash,rate_per_h=10,crowd=2400", 480, None),
]


class TestGenerate:
    @pytest.mark.parametrize(
        ("pattern", "per_day", "cv"), GENERATED, ids=[each[0].split(",")[0] for each in GENERATED]
    )
    def test_patterns(self, tmp_path: Path, pattern: str, per_day: float, cv: float | None) -> None:
        file = tmp_path / "made.csv.gz"
        says("trace", "generate", f"m={pattern}", "--for", "10d", "--seed", 4, "--out", file)
        (model,) = json.loads(says("trace", "describe", file, "--json"))["models"]
        assert model["requests"] / 10 == pytest.approx(per_day, rel=0.12)
        if cv is not None:
            assert model["gap_cv"] == pytest.approx(cv, rel=0.12, abs=0.01)
        assert (model["daily"] > 0.8) == pattern.startswith("diurnal")

    def test_a_crowd_comes_at_its_hour(self) -> None:
        found = rows(
            says("trace", "generate", "m=flash,rate_per_h=1,at_h=2,crowd=500,lasts_s=60", "--for", "4h")
        )
        crowd = [row for row in found if 7200 <= float(row["timestamp_s"]) < 7320]
        assert len(crowd) > 450

    def test_the_same_seed_draws_the_same_and_models_are_their_own(self) -> None:
        both = ("a=poisson", "b=timer,burst=2,missed=0.5")
        one = says("trace", "generate", *both, "--for", "6h", "--seed", 1)
        assert one == says("trace", "generate", *both, "--for", "6h", "--seed", 1)
        assert one != says("trace", "generate", *both, "--for", "6h", "--seed", 2)
        alone = rows(says("trace", "generate", both[0], "--for", "6h", "--seed", 1))
        assert [row for row in rows(one) if row["model"] == "a"] == alone
        times = [float(row["timestamp_s"]) for row in rows(one)]
        assert times == sorted(times)

    @pytest.mark.parametrize(
        ("stream", "words"),
        [
            ("a=nope", "'a=nope' is not MODEL=PATTERN"),
            ("a=poisson,rate=3", "poisson has no parameter 'rate'; it has rate_per_h"),
            ("a=poisson,rate_per_h=0", "rate_per_h: '0' is not a number above 0"),
            ("a=timer,jitter_s=-1", "jitter_s: '-1' is not a number from 0"),
            ("a=diurnal,swing=2", "swing: '2' is above 1"),
            ("a=poisson,rate_per_h=1e12", "requests of one model are too many"),
            ("a=gamma,cv=100000", "cv: '100000' is above 1,000"),
            ("a=on-off,on_s=1e-7,off_s=1e-7", "turns; 1,000,000 are the most"),
            ("a\tb=poisson", "model 'a\\tb' is not a name of printable characters"),
            ("a=poisson,input_tokens=1e12", "input_tokens: '1e12' is above 1,000,000"),
            ("a=timer,burst=2.7", "burst: '2.7' is not a whole number"),
            ("a=timer,burst=0", "burst: '0' is not a number above 0"),
            ("a=timer,offset_s=99999", "these streams have no requests in 1d of --for"),
        ],
        ids=[
            *(
                "pattern",
                "parameter",
                "zero",
                "negative",
                "share",
                "many",
                "variation",
                "turns",
                "name",
                "tokens",
            ),
            *("whole", "no-burst", "nothing"),
        ],
    )
    def test_what_is_wrong(self, stream: str, words: str) -> None:
        assert words in run("trace", "generate", stream).stderr

    def test_a_model_is_named_once(self) -> None:
        assert "every model can be named once only" in fails("trace", "generate", "a=poisson", "a=timer")
