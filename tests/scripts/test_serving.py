"""What `scripts/up` waits for before it says that all is there."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.local import serving

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
