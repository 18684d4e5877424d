"""What `scripts/up` waits for before it says that all is there."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.local import serving
from deployments.local.state import Checkout, Cluster

CLUSTER: Any = SimpleNamespace(endpoint="http://here")


def waited(monkeypatch: pytest.MonkeyPatch, *told: dict[str, Any], tick_s: float = 1.0) -> int:
    """How often the status was asked for, which tells of one model's template: one after the other, then the last."""
    asked = 0

    def status(*_: Any, **__: Any) -> dict[str, Any]:
        nonlocal asked
        template = told[min(max(asked - 1, 0), len(told) - 1)]
        asked += 1
        return {"nodes": [{"templates": [{"model": "m", "reason": "", "imported": True, **template}]}]}

    def clock() -> Iterator[float]:
        now_s = 0.0
        while True:
            yield now_s
            now_s += tick_s

    times = clock()
    monkeypatch.setattr(serving, "get_json", status)
    clockwork = SimpleNamespace(sleep=lambda _: None, monotonic=lambda: next(times))
    monkeypatch.setattr(serving, "time", clockwork)
    serving._wait_for_templates(CLUSTER, 1e6)
    return asked - 1


def test_templates_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert waited(monkeypatch, {"state": "none"}, {"state": "building"}, {"state": "ready"}) == 3


def test_so_are_the_imports_that_models_on_gpus_start_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not those that are never through, nor what is built when it is asked for."""
    off = {"state": "off"}
    assert waited(monkeypatch, {**off, "imported": False}, {**off, "imported": False}, off) == 3
    assert waited(monkeypatch, {**off, "imported": False}, tick_s=25.0) == 2
    assert waited(monkeypatch, off) == 1


@pytest.mark.parametrize("soft", [256, 1024])
def test_ray_may_open_more_files_than_a_shell_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soft: int
) -> None:
    """The gateway inherits it, and a request in progress takes two."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    found: list[int] = []

    def run(*_: Any, **__: Any) -> Any:
        found.append(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(serving.subprocess, "run", run)
    checkout = Checkout(tmp_path)
    checkout.state_dir.mkdir()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
        serving.start_head(checkout, Cluster(ray_port=1, client_port=2, host="", port=3, num_cpus=1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found == [min(65536, before[1])]


@pytest.mark.parametrize(("said", "used"), [(None, "0"), ("1", "1")])
def test_rays_metrics_which_nobody_reads_are_off_unless_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, used: str
) -> None:
    """Its agent would keep the series of every replica that ever was."""
    monkeypatch.delenv("RAY_enable_metrics_collection", raising=False)
    if said is not None:
        monkeypatch.setenv("RAY_enable_metrics_collection", said)
    assert serving.head_env(Checkout(tmp_path))["RAY_enable_metrics_collection"] == used
