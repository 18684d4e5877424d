"""Files that are imported: formats, names, times, broken lines, all or nothing, and once."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from autoscaling.live.importer import Import, Names, Options, Progress, import_file
from autoscaling.live.store import Store
from deployments.errors import ConfigError
from tests.store.lab import NOON, FakeClock, Open, counts, totals

DAY = 86400.0
COMMON = '10.0.0.1 - ann [{time}] "{request}" {status} 512'
ALL = Options(names=Names(model="m"))


@pytest.fixture
def lite(tmp_path: Path, clock: FakeClock) -> Iterator[Store]:
    """A store on SQLite; what is imported goes the same way into PostgreSQL."""
    store = Store.open(f"sqlite:///{tmp_path}/relight.db", clock=clock)
    yield store
    store.close()


def file(tmp_path: Path, *lines: str, name: str = "log") -> Path:
    path = tmp_path / name
    text = "\n".join(lines) + "\n"
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def clf(at_s: float, request: str = "POST /v1/chat/completions HTTP/1.1", status: int = 200) -> str:
    time = datetime.fromtimestamp(at_s, UTC).strftime("%d/%b/%Y:%H:%M:%S +0000")
    return COMMON.format(time=time, request=request, status=status)


def rows(
    path: Path, options: Options = ALL, now_s: float = NOON
) -> list[tuple[str, float, int, int, int, float]]:
    return list(Import(path, options, now_s))


def test_a_trace_of_requests(tmp_path: Path, store: Store, open_store: Open) -> None:
    path = file(
        tmp_path,
        "timestamp_s,model,input_tokens,output_tokens,exec_s,tenant",
        f"{NOON - 90:.1f},a,100,10,,x",
        f"{NOON - 90:.1f},a,50,5,,x",
        f"{NOON - 10:.1f},b,1,1,2.5,y",
        name="req.csv.gz",
    )
    report = import_file(store, path, Options(), NOON)
    assert (report.format, dict(report.requests), report.shift_s) == ("requests", {"a": 2, "b": 1}, 0.0)
    assert (report.refused, report.broken, report.has_durations) == (0, 0, True)
    for at in (store, open_store()):
        assert totals(at, "a", NOON) == [2, 2, 2, 2]
        (seconds, *_) = at.traffic("a", NOON).levels
        assert (seconds.input_tokens.tolist(), seconds.output_tokens.tolist()) == ([150.0], [15.0])
        assert at.traffic("b", NOON).levels[0].busy_s.tolist() == [1.0, 1.0, 0.5]


def test_a_trace_of_windows_leaves_finer_levels_unknown(tmp_path: Path, store: Store) -> None:
    start = (NOON - 3 * DAY) / 60
    path = file(
        tmp_path,
        "minute,model,count",
        *(f"{start + 10 * i:.0f},a,{i % 3}" for i in range(432)),
        name="win10_x.csv",
    )
    report = import_file(store, path, Options(service_s=2.0), NOON)
    assert report.bucket_s == 600
    levels = store.traffic("a", NOON).levels
    assert [float(level.arrivals.sum()) for level in levels] == [0, 0, 432, 432]
    assert [level.start_s == level.end_s for level in levels] == [True, True, False, False]
    assert levels[2].start_s == levels[3].start_s == NOON - 3 * DAY
    assert float(levels[3].busy_s.sum()) == 864
    # Two requests in ten minutes are one in each five; one is in one of them, and in progress in either.
    assert list(counts(store, "a", NOON)[300].values())[:4] == [0, 1, 1, 1]


def test_windows_that_differ_are_not_spread_beyond_themselves(tmp_path: Path, store: Store) -> None:
    """As a store's own history has them, from a bucket's first request to its last."""
    start_s = NOON - 6 * DAY
    lines = (f"{(start_s + at_s) / 60!r},a,1,{window_s}" for at_s, window_s in ((20, 71), (4 * DAY + 30, 1)))
    path = file(tmp_path, "minute,model,count,window_s", *lines, name="history.csv")
    assert import_file(store, path, Options(), NOON).bucket_s == 300
    found = counts(store, "a", NOON)
    assert found[300] == {start_s // 300: 1, (start_s + 4 * DAY) // 300: 1}
    assert found[60] == {}


def test_windows_that_are_too_long_for_the_history_are_refused(tmp_path: Path, store: Store) -> None:
    """One of them is enough: nothing of the file is lost unsaid."""
    minute = (NOON - 4 * DAY) / 60
    lines = (f"{minute},a,1,60", f"{minute + 1},a,100,86400", f"{minute + 1441},a,1,60")
    path = file(tmp_path, "minute,model,count,window_s", *lines, name="days.csv")
    with pytest.raises(ConfigError, match=r"days\.csv: it has windows of 86400 s\. Expected 7200 s"):
        import_file(store, path, Options(), NOON)
    assert store.models_with_traffic() == []
    path = file(tmp_path, "minute,model,count,window_s", *(line.replace("86400", "7200") for line in lines))
    import_file(store, path, Options(), NOON)
    assert totals(store, "a", NOON)[-1] == 102


@pytest.mark.parametrize(
    ("align", "last_s"),
    [("end", NOON), ("day", NOON - 43200 - 3600 * 10), ("week", None), ("auto", None)],
)
def test_a_trace_that_counts_from_zero_is_brought_to_the_present(
    tmp_path: Path, align: str, last_s: float | None
) -> None:
    path = file(tmp_path, "timestamp_s,model", "0,a", f"{3 * DAY + 1000},a")
    found = Import(path, Options(align=align), NOON)  # type: ignore[arg-type]
    first, last = (row[1] for row in found)
    assert last - first == 3 * DAY + 1000
    assert NOON - {"end": 1, "day": DAY}.get(align, 7 * DAY) < last <= NOON
    if align == "day":
        assert first % DAY == 0
    if align in {"week", "auto"}:
        assert first % (7 * DAY) == 0


def test_a_log_in_another_time_is_refused_with_the_way_out(tmp_path: Path, lite: Store) -> None:
    for at_s, words in ((NOON + 5 * DAY, "the future"), (NOON - 500 * DAY, "400 days ago")):
        with pytest.raises(ConfigError, match=rf"{words}.*Align"):
            import_file(lite, file(tmp_path, clf(at_s)), ALL, NOON)
    assert lite.models_with_traffic() == []


COMBINED = ' "https://a.example/?q=1" "Mozilla/5.0 (\\"x\\")"'


@pytest.mark.parametrize(
    ("line", "time_s", "duration_s"),
    [
        (clf(NOON - 60), NOON - 60, 0.0),
        (clf(NOON - 60) + COMBINED, NOON - 60, 0.0),
        (clf(NOON - 60) + COMBINED + " 0.250", NOON - 60, 0.25),
        (clf(NOON - 60) + COMBINED + " rt=0.250 uct=0.1", NOON - 60, 0.25),
        (
            '::1 - - [15/Jan/2027:10:00:00 +0200] "POST /v1/chat/completions HTTP/2.0" 200 -',
            NOON,
            0.0,
        ),
        (
            '[2027-01-15T07:59:30.310Z] "POST /v1/chat/completions HTTP/2" 200 - 154 0 226 100 "10.0.35.28" "curl" '
            '"cc21d9b0-cf5c" "api" "tcp://10.0.2.1:80"',
            NOON - 29.69,
            0.226,
        ),
        (
            '[2027-01-15T07:59:30.310Z] "POST /v1/chat/completions HTTP/1.1" 200 - via_upstream - "-" 0 135 400 4 "-" '
            '"curl/7.73" "84961386" "api:8000" "127.0.0.1:80"',
            NOON - 29.69,
            0.4,
        ),
    ],
)
def test_access_logs(tmp_path: Path, line: str, time_s: float, duration_s: float) -> None:
    path = file(tmp_path, line)
    found = rows(path, now_s=NOON + 10)
    assert sum(row[2] for row in found) == 1
    assert found[0][:2] == ("m", pytest.approx(time_s))
    assert sum(row[5] for row in found) == pytest.approx(duration_s)


def test_of_an_access_log_only_what_a_model_was_asked_counts(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        clf(NOON - 60),
        clf(NOON - 59, "GET /v1/models HTTP/1.1"),
        clf(NOON - 58, status=401),
        clf(NOON - 57, status=404),
        clf(NOON - 56, status=503),
        clf(NOON - 55, "\\x16\\x03\\x01", 400),
        clf(NOON - 54, "-", 408),
    )
    report = Import(path, ALL, NOON).report
    assert (dict(report.requests), report.broken, report.lines) == ({"m": 2}, 0, 7)


def test_paths_are_mapped_to_models_and_others_are_left_out(tmp_path: Path, lite: Store) -> None:
    path = file(
        tmp_path,
        clf(NOON - 60, "POST /chat/v1/completions?x=1 HTTP/1.1"),
        clf(NOON - 60, "POST /embed HTTP/1.1"),
        clf(NOON - 60, "POST /login HTTP/1.1"),
    )
    with pytest.raises(ConfigError, match="names no models"):
        import_file(lite, path, Options(), NOON)
    with pytest.raises(ConfigError, match=r"no name in it stands for a model.*/embed \(1\)"):
        import_file(lite, path, Options(names=Names([("/none", "x")])), NOON)
    names = Names([("/chat/*", "llama"), ("/embed", "minilm")])
    report = import_file(lite, path, Options(names=names), NOON)
    assert dict(report.requests) == {"llama": 1, "minilm": 1}
    assert dict(report.left_out) == {"/login": 1}
    assert lite.models_with_traffic() == ["llama", "minilm"]


@pytest.mark.parametrize(
    "record",
    [
        {
            "timestamp": NOON - 60,
            "model": "m",
            "usage": {"prompt_tokens": 7, "completion_tokens": 3},
            "duration": 0.5,
        },
        {
            "time": "2027-01-15T07:59:00Z",
            "model": "m",
            "input_tokens": 7,
            "output_tokens": 3,
            "latency_s": 0.5,
        },
        {
            "ts": 1000 * (NOON - 60),
            "request": {"model": "m"},
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "duration": "500ms",
        },
        {
            "@timestamp": "2027-01-15T09:59:00.000000000+02:00",
            "path": "/m?x",
            "response": {"usage": {"input_tokens": 7, "output_tokens": 3}},
            "httpRequest": {"latency": "0.5s"},
        },
    ],
    ids=lambda record: next(iter(record)),
)
def test_json_lines(tmp_path: Path, record: dict) -> None:  # type: ignore[type-arg]
    found = rows(
        file(tmp_path, json.dumps(record)),
        Options(names=Names([("/m", "m")], model=None) if "path" in record else Names()),
    )
    assert found == [("m", NOON - 60, 1, 7, 3, 0.5)]


@pytest.mark.parametrize(
    "line",
    [
        lambda method, status: {"request": {"method": method, "uri": "/v1/completions"}, "status": status},
        lambda method, status: {"request_method": method, "uri": "/v1/completions", "status": str(status)},
        lambda method, status: {"httpRequest": {"requestMethod": method, "status": status}, "path": "/m"},
        lambda method, status: {"RequestMethod": method, "DownstreamStatus": status, "RequestPath": "/m"},
        lambda method, status: {"method": method, "response_code": status, "path": "/m"},
    ],
    ids=["caddy", "nginx", "knative", "traefik", "envoy"],
)
def test_of_json_lines_only_what_a_model_was_asked_counts(
    tmp_path: Path, line: Callable[[str, int], dict[str, object]]
) -> None:
    said = [("POST", 200), ("GET", 200), ("HEAD", 200), ("POST", 401), ("POST", 404), ("POST", 503)]
    path = file(tmp_path, *(json.dumps({"time": NOON - 60, **line(*each)}) for each in said))
    report = Import(path, ALL, NOON).report
    assert (dict(report.requests), report.broken, report.lines) == ({"m": 2}, 0, 6)


def test_json_lines_that_do_not_say_a_method_or_a_status_count(tmp_path: Path) -> None:
    said = [{}, {"status": "ok"}, {"status": None}, {"method": "chat"}, {"method": ["GET"]}, {"status": {}}]
    path = file(tmp_path, *(json.dumps({"time": NOON - 60, "model": "m", **each}) for each in said))
    assert dict(Import(path, Options(), NOON).report.requests) == {"m": 6}
    assert dict(Import(path, Options(fields={"status": "code"}), NOON).report.requests) == {"m": 6}


def test_json_fields_by_name(tmp_path: Path) -> None:
    path = file(tmp_path, json.dumps({"when": {"at": NOON - 5}, "llm": "m", "in": 4, "timestamp": "no"}))
    options = Options(fields={"time": "when.at", "model": "llm", "input_tokens": "in"})
    assert rows(path, options) == [("m", NOON - 5, 1, 4, 0, 0.0)]
    with pytest.raises(ConfigError, match="'tokens' is not known"):
        rows(path, Options(fields={"tokens": "in"}))


def test_broken_lines_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    good = [json.dumps({"time": NOON - i, "model": "m"}) for i in range(100)]
    broken = [
        '{"time": "yesterday", "model": "m"}',
        '{"time": 1800000000, "model": 7}',
        '{"time": 1800000000, "model": "m", "input_tokens": -1}',
        '{"time": 1800000000, "model": "m", "input_tokens": NaN}',
        "nonsense",
        "\x00\xff",
    ]
    report = Import(file(tmp_path, *good[:50], *broken, *good[50:]), Options(), NOON + 1).report
    assert (report.requests["m"], report.broken, report.lines) == (100, 6, 106)
    assert report.broken_shown == [
        "line 51: timestamp is 'yesterday'. Expected Unix time or ISO 8601.",
        "line 52: model is 7. Expected a name of printable characters.",
        "line 53: input_tokens is -1. Expected a number from 0 to 1.09951e+12.",
        "line 54: input_tokens is nan. Expected a number from 0 to 1.09951e+12.",
        "line 55: the line is 'nonsense'. Expected a JSON object.",
    ]


def test_a_file_with_many_broken_lines_is_not_imported(tmp_path: Path, lite: Store) -> None:
    path = file(tmp_path, clf(NOON - 60), "nonsense", clf(NOON - 59))
    with pytest.raises(ConfigError, match=r"1 of 3 lines can't be read.*line 2: the line is 'nonsense'"):
        import_file(lite, path, ALL, NOON)
    assert lite.models_with_traffic() == []


def test_a_traces_broken_rows_are_counted_and_shown(tmp_path: Path) -> None:
    good = [f"{NOON - 100 + i},a,1" for i in range(50)]
    path = file(tmp_path, "timestamp_s,model,input_tokens", *good[:20], f"{NOON - 80},a,many", *good[20:])
    report = Import(path, Options(), NOON).report
    assert (report.requests["a"], report.broken, report.lines) == (50, 1, 51)
    assert ":22: " in report.broken_shown[0] and "'many'" in report.broken_shown[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"hello\n", "no known format.*access log"),
        (b"\x1f\x8b\x08\x00broken", "can't be read"),
        (gzip.compress(b"timestamp_s,model\n" + b"1,a\n" * 1000)[:-20], "can't be read"),
        (bytes(range(256)) * 10, "can't be read.*access log"),
        (b"x" * (3 << 20), "no known format"),
        (b"timestamp_s,model\n", "no request"),
    ],
    ids=range(8),
)
def test_a_file_that_is_none_is_one_clear_error(
    tmp_path: Path, lite: Store, content: bytes, words: str
) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        import_file(lite, path, ALL, NOON)


def test_a_missing_file_is_one_clear_error(tmp_path: Path, lite: Store) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        import_file(lite, tmp_path / "none", ALL, NOON)


def test_the_same_file_counts_once(tmp_path: Path, store: Store, open_store: Open, clock: FakeClock) -> None:
    path = file(tmp_path, clf(NOON - 60), clf(NOON - 50))
    assert import_file(store, path, ALL, NOON).imported_before_s is None
    clock.pass_time(100)
    again = import_file(open_store(), path, Options(names=Names(model="m"), align="end"), clock.now_s())
    assert again.imported_before_s == NOON
    assert totals(store, "m", clock.now_s()) == [2, 2, 2, 2]
    import_file(store, path, Options(names=Names(model="n")), clock.now_s())
    assert totals(store, "n", clock.now_s()) == [2, 2, 2, 2]


def test_what_is_imported_adds_to_what_was_seen(tmp_path: Path, store: Store, open_store: Open) -> None:
    from tests.store.lab import second

    store.add_traffic([second("m", NOON - 60, 5)])
    import_file(store, file(tmp_path, clf(NOON - 60), clf(NOON - 2 * DAY)), ALL, NOON)
    assert totals(store, "m", NOON) == [6, 6, 7, 7]
    store.flush()
    assert totals(open_store(), "m", NOON) == [6, 6, 7, 7]


def test_nothing_is_imported_when_the_file_changes_meanwhile(tmp_path: Path, store: Store) -> None:
    path = file(tmp_path, clf(NOON - 60), clf(NOON - 50))
    found = Import(path, ALL, NOON)
    with path.open("a") as log:
        log.write(clf(NOON - 40) + "\n")
    with pytest.raises(ConfigError, match="was changed"):
        store.import_traffic(found, 1.0, source=found.identity)
    assert store.models_with_traffic() == []
    assert import_file(store, path, ALL, NOON).requests["m"] == 3
    assert totals(store, "m", NOON) == [3, 3, 3, 3]


def test_rows_ahead_of_the_clock_are_refused_and_told(tmp_path: Path, lite: Store) -> None:
    report = import_file(lite, file(tmp_path, clf(NOON - 60), clf(NOON + 3600)), ALL, NOON)
    assert report.refused == 1
    assert totals(lite, "m", NOON) == [1, 1, 1, 1]


def test_a_long_request_is_in_progress_in_every_bucket_it_touches(tmp_path: Path, lite: Store) -> None:
    path = file(tmp_path, "timestamp_s,model,exec_s", f"{NOON - 7 * DAY + 50},m,400", f"{NOON - 90},m,70")
    import_file(lite, path, Options(), NOON)
    seconds, minutes, fives, hours = lite.traffic("m", NOON).levels
    assert seconds.busy_s.tolist() == [1.0] * 70
    assert minutes.busy_s.tolist() == [30.0, 40.0]
    assert fives.busy_s.tolist() == [250.0, 150.0, 70.0]
    assert hours.busy_s.tolist() == [400.0, 70.0]
    assert [float(level.arrivals.sum()) for level in (seconds, minutes, fives, hours)] == [1, 1, 2, 2]


def test_a_large_file_streams_with_progress(tmp_path: Path, lite: Store) -> None:
    lines = 41_000
    path = tmp_path / "large.gz"
    with gzip.open(path, "wt", compresslevel=1) as log:
        for i in range(lines):
            log.write(clf(NOON - lines + i) + "\n")
    told: list[Progress] = []
    tracemalloc.start()
    report = import_file(lite, path, ALL, NOON, told.append)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.requests["m"] == lines
    assert totals(lite, "m", NOON)[2] == lines
    assert peak < 60 << 20
    for stage in ("reading", "importing"):
        steps = [progress for progress in told if progress.stage == stage]
        assert [progress.done_bytes for progress in steps] == sorted(
            progress.done_bytes for progress in steps
        )
        assert len(steps) == 3 and steps[-1].done_bytes == steps[-1].total_bytes == path.stat().st_size
