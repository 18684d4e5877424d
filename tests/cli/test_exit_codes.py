"""How commands end where something is wrong: 1 refused, 2 a wrong value, 3 no cluster, 4 not authorised."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from autoscaling.live.store import StoreUnavailable
from tests.cli.conftest import Cluster
from tests.control.lab import SMALL, TOKEN


@pytest.fixture
def nowhere() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


ASKING = [
    ("policy", "show", SMALL),
    ("policy", "set", SMALL, "--wait-cost", "2"),
    ("policy", "unset", SMALL),
    ("policy", "explain", SMALL),
    ("policy", "validate", SMALL),
    ("policy", "shadow", "show"),
    ("policy", "shadow", "start", "kpa"),
    ("policy", "shadow", "stop"),
    ("prewarm", SMALL),
    ("prewarm", "list"),
    ("prewarm", "undo", "x"),
    ("schedule", "add", SMALL, "--cron", "0 9 * * *", "--for", "1h"),
    ("schedule", "list"),
    ("schedule", "next"),
    ("schedule", "remove", "x"),
    ("forecast", SMALL),
    ("history", SMALL),
    ("decisions",),
    ("coldstarts",),
    ("accounts",),
    ("mode",),
    ("undo", "x"),
    ("overrides",),
]
IDS = [" ".join(arguments[:3]) for arguments in ASKING]


@pytest.mark.parametrize("arguments", ASKING, ids=IDS)
def test_no_cluster_is_3_and_said_in_one_line(
    cluster: Cluster, nowhere: str, arguments: tuple[str, ...]
) -> None:
    said = cluster.fails(3, *arguments, "--address", nowhere)
    assert said.startswith(f"Nothing answers at {nowhere}")
    assert said.count("\n") == 1
    cluster.fails(3, *arguments, "--json", RELIGHT_ADDRESS=nowhere)


@pytest.mark.parametrize("arguments", ASKING, ids=IDS)
def test_a_wrong_token_is_4_and_says_where_it_is(cluster: Cluster, arguments: tuple[str, ...]) -> None:
    said = cluster.fails(4, *arguments, RELIGHT_TOKEN="wrong-token-of-a-test")
    assert "does not take this token" in said and "control-token" in said and "RELIGHT_TOKEN" in said


def test_no_token_is_4(cluster: Cluster) -> None:
    assert "needs a token" in cluster.fails(4, "mode", RELIGHT_TOKEN="")
    assert "holds no token" in cluster.fails(4, "mode", RELIGHT_TOKEN="short")


def test_the_token_of_the_data_folder_is_taken(cluster: Cluster) -> None:
    folder = cluster.folder / "data"
    folder.mkdir()
    (folder / "control-token").write_text(f"{TOKEN}\n")
    assert cluster.says("mode", RELIGHT_TOKEN="") == "active\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("policy", "show", "smollm2-135"), "did you mean smollm2-135m?"),
        (("policy", "set", SMALL), "Nothing to set"),
        (("policy", "set", "--wait-cost", "1"), "Name one model"),
        (("policy", "set", SMALL, "--all", "--wait-cost", "1"), "Name one model"),
        (("policy", "set", SMALL, "--wait-cost", "-1"), "wait_cost: -1.0 is not right; expected at least 0"),
        (("policy", "set", SMALL, "--policy", "predictiv"), "predictive?"),
        (("policy", "set", SMALL, "--param", "stable_s"), "--param: 'stable_s' is not NAME=NUMBER"),
        (("policy", "set", SMALL, "--param", "=3"), "is not NAME=NUMBER"),
        (("policy", "set", SMALL, "--param", "stable_s=much"), "is not NAME=NUMBER"),
        (("policy", "set", SMALL, "--param", "stabel_s=3"), "stable_s?"),
        (("policy", "set", SMALL, "--param", "stable_s=nan"), "is not NAME=NUMBER"),
        (
            ("policy", "set", SMALL, "--param", "stable_s=1", "--param", "stable_s = 2"),
            "--param: stable_s is given twice",
        ),
        (("policy", "set", SMALL, "--min-replicas", "9"), "max_replicas (4"),
        (("policy", "set", SMALL, "--wait-cost", "1", "--for", "soon"), "--for: 'soon' is not a duration"),
        (("policy", "set", SMALL, "--wait-cost", "1", "--until", "soon"), "--until: 'soon' is not a time"),
        (("policy", "set", SMALL, "--wait-cost", "1", "--until", "today 01:00"), "until_s"),
        (("policy", "set", SMALL, "--wait-cost", "1", "--until", "18:00", "--for", "1h"), "give one of them"),
        (("prewarm", "none"), "There is no model"),
        (("prewarm", SMALL, "--replicas", "9"), "at most 4"),
        (("prewarm", SMALL, "--rung", "hot"), "rung"),
        (("prewarm", SMALL, "--at", "sometime"), "--at: 'sometime' is not a time"),
        (("prewarm", "undo", "prewarm-none"), "There is no prewarm"),
        (("schedule", "add", SMALL, "--cron", "0 25 * * *", "--for", "1h"), "bad hour"),
        (
            ("schedule", "add", SMALL, "--cron", "0 9 * * *", "--for", "1h", "--timezone", "Mars"),
            "IANA time zone",
        ),
        (("schedule", "add", "--cron", "0 9 * * *", "--for", "1h"), "Name one model"),
        (("decisions", "--since", "lately"), "--since: 'lately' is neither"),
        (("decisions", "--since", "tomorrow 09:00"), "still to come"),
        (("accounts", "--source", "bar"), "expected active, shadow or shadow:NAME"),
        (("decisions", "--source", "foo"), "expected active, shadow or shadow:NAME"),
        (("history", SMALL, "--since", "1h", "--step", "0.001s"), "step_s"),
        (("mode", "turbo"), "'active'"),
        (("mode", "--for", "1h"), "name the mode that is to hold, active, shadow, off"),
        (("mode", "--until", "18:00"), "name the mode that is to hold"),
        (("undo", "none"), "There is no override"),
        (("mode", "--address", "localhost:8000"), "begins with http://"),
        (("mode", "--address", "http://127.0.0.1:abc"), "'http://127.0.0.1:abc' is not an address"),
        (("mode", "--address", "http://a b"), "is not an address"),
    ],
)
def test_a_wrong_value_is_2_and_says_what_would_be_right(
    cluster: Cluster, arguments: tuple[str, ...], said: str
) -> None:
    assert said in cluster.fails(2, *arguments)


@pytest.mark.parametrize(
    ("arguments", "option", "number"),
    [
        (("policy", "set", SMALL), "--wait-cost", "nan"),
        (("policy", "set", SMALL), "--wait-cost", "-inf"),
        (("policy", "set", SMALL), "--target", "nan"),
        (("policy", "validate", SMALL), "--wait-cost", "nan"),
        (("policy", "shadow", "start", "kpa"), "--wait-cost", "inf"),
        (("cluster", "render", "--provider", "aws"), "--node-start", "inf"),
    ],
)
def test_a_number_is_finite(
    cluster: Cluster, nowhere: str, arguments: tuple[str, ...], option: str, number: str
) -> None:
    """Which is said whether a cluster answers or not."""
    said = cluster.fails(2, *arguments, option, number, RELIGHT_ADDRESS=nowhere)
    assert said == f"{option}: '{number}' is not right; expected a finite number\n"


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_of_a_policy_file_is_finite(cluster: Cluster, tmp_path: Path, number: str) -> None:
    file = tmp_path / "policy.json"
    file.write_text(f'{{"policy": "kpa", "wait_cost": {number}}}')
    said = cluster.fails(2, "policy", "set", SMALL, "--file", str(file))
    assert said == f"--file: {file} is not JSON: {number} is not a finite number\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("policy", "set", "", "--wait-cost", "2"),
        ("policy", "unset", ""),
        ("policy", "show", ""),
        ("policy", "validate", "", "--wait-cost", "2"),
        ("forecast", ""),
        ("undo", ""),
        ("policy", "shadow", "stop", ""),
    ],
)
def test_an_empty_name_is_not_the_whole_fleet(cluster: Cluster, arguments: tuple[str, ...]) -> None:
    """As of a variable of the shell that is not set."""
    cluster.says("policy", "set", "--all", "--wait-cost", "7")
    assert "An empty name is none" in cluster.fails(2, *arguments)
    assert {spec.wait_cost for spec in cluster.view.models().values()} == {7.0}


def test_a_key_of_a_policy_file_stands_once(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text('{"policy": "kpa", "params": {"stable_window_s": 3, "stable_window_s": 4}}')
    said = cluster.fails(2, "policy", "set", SMALL, "--file", str(file))
    assert said == f"--file: {file}: params.stable_window_s stands twice\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("prewarm", SMALL, "--nonsense"),
        ("schedule", "add", SMALL),
        ("decisions", "--limit", "0"),
    ],
)
def test_a_wrong_command_line_is_2(cluster: Cluster, arguments: tuple[str, ...]) -> None:
    cluster.fails(2, *arguments)
    assert cluster.asked == []


def test_a_refusal_is_1(cluster: Cluster) -> None:
    made = cluster.json("policy", "set", SMALL, "--wait-cost", "1")["override"]
    cluster.says("undo", made["id"])
    assert "was undone by ann@lab already" in cluster.fails(1, "undo", made["id"])
    cluster.says("mode", "off")
    assert "mode is off" in cluster.fails(1, "prewarm", SMALL)


def test_a_store_that_is_away_is_1(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise StoreUnavailable("the disk is full")

    monkeypatch.setattr(cluster.store, "put_override", away)
    assert "the disk is full" in cluster.fails(1, "mode", "off")


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, b"<html>", "not as Relight does"),
        (200, b"[]", "not as Relight does"),
        (404, b'{"detail": "Not Found"}', "not as Relight does"),
        (
            503,
            b'{"error": {"message": "The controller does not answer: x", "type": "server_error"}}',
            "its controller does not",
        ),
    ],
)
def test_something_else_that_answers_is_3(cluster: Cluster, status: int, body: bytes, said: str) -> None:
    cluster.instead = status, body
    assert said in cluster.fails(3, "mode")


def test_a_proxy_in_the_environment_is_not_asked(cluster: Cluster) -> None:
    assert (
        cluster.says("mode", http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9") == "active\n"
    )


def test_policy_list_needs_no_cluster(cluster: Cluster, nowhere: str) -> None:
    said = cluster.says("policy", "list", RELIGHT_ADDRESS=nowhere)
    assert "predictive" in said and "Nothing answers" in said
    answer = json.loads(cluster.says("policy", "list", "--json", RELIGHT_ADDRESS=nowhere))
    assert (answer["models"], len(answer["policies"]) >= 8) == (None, True)
    cluster.fails(3, "policy", "list", "--address", nowhere)
    cluster.fails(4, "policy", "list", RELIGHT_TOKEN="wrong-token-of-a-test")


FLEET = """
models:
  - {id: small, source: o/n, scaling: {max_replicas: 2}}
  - {id: large, source: o/m, scaling: {policy: kpa, params: {stable_window_s: 30}}}
"""


def test_validate_checks_a_fleet_file_without_a_cluster(
    cluster: Cluster, nowhere: str, tmp_path: Path
) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(FLEET)
    away = {"RELIGHT_ADDRESS": nowhere}
    said = cluster.says("policy", "validate", str(file), **away)
    assert "large: kpa, stable_window_s 30; 0 to 1 replicas" in said
    said = cluster.says("policy", "validate", str(file), "--policy", "fixed", "--param", "replicas=1", **away)
    assert said.count("fixed, replicas 1") == 2
    said = cluster.fails(2, "policy", "validate", str(file), "--min-replicas", "2", **away)
    assert "large: min_replicas: 2 is not right" in said
    wrong = ["--param", "stable=3", "--param", "headroom=3", "--min-replicas", "5", "--wait-cost", "-1"]
    said = cluster.fails(2, "policy", "validate", str(file), *wrong, **away)
    places = [line.split(": ")[2] for line in said.splitlines() if line]
    assert places == ["wait_cost", "params.stable", "params.headroom", "min_replicas"]
    file.write_text(FLEET.replace("stable_window_s: 30", "stable_windows: 30"))
    assert "stable_windows" in cluster.fails(2, "policy", "validate", str(file), **away)
    assert "no such file" in cluster.fails(2, "policy", "validate", str(tmp_path / "none.yaml"), **away)


def test_validate_checks_a_model_in_the_cluster_or_the_policy_alone(cluster: Cluster, nowhere: str) -> None:
    said = cluster.says("policy", "validate", SMALL, "--policy", "kpa", "--param", "stable_window_s=30")
    assert "kpa, stable_window_s 30" in said and "nothing was changed" in said
    assert cluster.view.models()[SMALL].policy == "predictive"
    cluster.fails(2, "policy", "validate", SMALL, "--min-replicas", "9")
    said = cluster.says("policy", "validate", SMALL, "--policy", "kpa", RELIGHT_ADDRESS=nowhere)
    assert "Checked by itself" in said and "Nothing answers" in said
    cluster.fails(2, "policy", "validate", SMALL, "--policy", "kpq", RELIGHT_ADDRESS=nowhere)
    cluster.fails(3, "policy", "validate", SMALL, "--policy", "kpa", "--address", nowhere)


def test_the_exit_codes_are_in_the_help(cluster: Cluster) -> None:
    text = " ".join(cluster.says("--help").split())
    for said in (
        "0 done",
        "1 it failed or was refused",
        "3 no cluster answers",
        "4 the token is missing or wrong",
    ):
        assert said in text
