"""A cloud's notice that it takes a spot machine back reaches Ray."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime

import pytest

from deployments import node_reclaim
from deployments.node_start import Raylet, raylets

NOW_S = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC).timestamp()
RAYLET = Raylet(12, "abc")


class Metadata:
    """A metadata service: URL's end -> its answer."""

    def __init__(self, **answers: str | None) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str, Mapping[str, str]]] = []

    def __call__(self, method: str, url: str, headers: Mapping[str, str]) -> str | None:
        self.asked.append((method, url, headers))
        return self.answers[url.rpartition("/")[2].partition("?")[0].replace("-", "_")]


def events(
    *kinds: str, not_before: str = "Sun, 01 Mar 2026 12:00:30 GMT", of: list[str] | None = None
) -> str:
    event = {"NotBefore": not_before} | ({} if of is None else {"Resources": of})
    return json.dumps({"Events": [{"EventType": kind, **event} for kind in kinds]})


@pytest.mark.parametrize(
    ("provider", "answers", "in_s"),
    [
        ("aws", {"token": "t", "instance_action": None}, None),
        (
            "aws",
            {"token": "t", "instance_action": '{"action": "terminate", "time": "2026-03-01T12:02:00Z"}'},
            120,
        ),
        ("gcp", {"preempted": "FALSE"}, None),
        ("gcp", {"preempted": "TRUE\n"}, 30),
        ("azure", {"scheduledevents": events()}, None),
        ("azure", {"scheduledevents": events("Reboot")}, None),
        ("azure", {"scheduledevents": events("Reboot", "Preempt")}, 30),
        ("azure", {"scheduledevents": events("Preempt", not_before="")}, 30),
        ("azure", {"scheduledevents": events("Preempt", of=["gpu_7"]), "name": "gpu_3"}, None),
        ("azure", {"scheduledevents": events("Preempt", of=["gpu_7", "GPU_3"]), "name": "gpu_3\n"}, 30),
        ("azure", {"scheduledevents": events("Preempt", of=["gpu_7"]), "name": None}, 30),
        ("azure", {"scheduledevents": events("Preempt", of=[]), "name": "gpu_3"}, 30),
    ],
)
def test_each_clouds_notice_is_understood(
    provider: str, answers: dict[str, str | None], in_s: float | None
) -> None:
    """And that there is none."""
    at_s = node_reclaim.PROVIDERS[provider](Metadata(**answers), NOW_S)
    assert at_s == (None if in_s is None else NOW_S + in_s)


def test_aws_is_asked_with_a_token() -> None:
    """Version 2 of its metadata service answers nobody else."""
    metadata = Metadata(token="t", instance_action=None)
    node_reclaim.aws(metadata, NOW_S)
    assert [method for method, _, _ in metadata.asked] == ["PUT", "GET"]
    assert metadata.asked[1][2] == {"X-aws-ec2-metadata-token": "t"}


class Machine:
    """One with a raylet, on which a minute passes with each pause."""

    def __init__(self, *notices: float | Exception | None) -> None:
        self.notices = list(notices)
        self.drained: list[tuple[Raylet, float]] = []
        self.failures: list[Exception] = []
        self.now_s = NOW_S

    def notice(self, now_s: float) -> float | None:
        given = self.notices[0] if len(self.notices) == 1 else self.notices.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    def drain(self, raylet: Raylet, in_s: float) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.drained.append((raylet, in_s))

    def find(self) -> list[Raylet]:
        return [RAYLET] if self.now_s < NOW_S + 600 else []

    def pass_on(self, _: float) -> None:
        self.now_s += 60

    def watch(self) -> bool:
        return node_reclaim.watch(self.notice, self.find, self.drain, self.pass_on, lambda: self.now_s)


def test_a_notice_drains_the_raylet_until_then() -> None:
    """Once."""
    machine = Machine(None, None, NOW_S + 240)
    assert machine.watch()
    assert machine.drained == [(RAYLET, 120)]


def test_what_does_not_answer_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    """The metadata service, or Ray; the same complaint is made once."""
    machine = Machine(OSError("no route"), OSError("no route"), NOW_S + 240)
    machine.failures = [subprocess.CalledProcessError(1, "ray")]
    assert machine.watch()
    assert machine.drained == [(RAYLET, 60)]
    assert capsys.readouterr().err.count("no route") == 1


def test_it_ends_with_the_raylet() -> None:
    """A node that goes for another reason."""
    machine = Machine(None)
    assert not machine.watch()
    assert machine.drained == []


def test_a_pod_that_ends_drains_at_once_and_waits() -> None:
    """Until the raylet has gone, or the time is over."""
    machine = Machine(None)
    assert node_reclaim.leave(900, machine.find, machine.drain, machine.pass_on, lambda: machine.now_s)
    assert machine.drained == [(RAYLET, 900)]
    machine = Machine(None)
    assert not node_reclaim.leave(300, machine.find, machine.drain, machine.pass_on, lambda: machine.now_s)
    assert machine.now_s == NOW_S + 300


def test_a_pod_that_ends_but_cannot_drain_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then Kubernetes ends it at once."""
    machine = Machine(None)
    machine.failures = [subprocess.CalledProcessError(1, "ray drain-node")]
    monkeypatch.setattr(node_reclaim, "find_raylets", machine.find)
    monkeypatch.setattr(node_reclaim, "drain", machine.drain)
    assert node_reclaim.main(["--in-s", "120"]) == 1
    assert "ray drain-node" in capsys.readouterr().err


def test_a_node_on_demand_is_not_watched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands that start nodes are the same for all types."""
    labels = json.dumps({"ray.io/market-type": "on-demand"})
    command = ["/x/raylet", "--node_id=abc", f"--labels={labels}"]
    monkeypatch.setattr(node_reclaim, "find_raylets", lambda: raylets([(12, command)]))
    assert node_reclaim.main(["--provider", "gcp"]) == 0
    assert "on demand" in capsys.readouterr().out
    assert raylets([(12, [*command[:2], "--labels="])]) == [RAYLET]


def test_without_a_raylet_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was started before Ray."""
    monkeypatch.setattr(node_reclaim, "find_raylets", list)
    assert node_reclaim.main(["--provider", "aws"]) == 1
    assert "start Ray first" in capsys.readouterr().err
