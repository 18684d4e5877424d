"""The core itself, whatever a simulation in the same process has exchanged for compiled versions of it."""

from __future__ import annotations

import pytest

from autoscaling.core import survival, warmth

# Taken while tests are collected: before any of them has run a simulation.
SOLVED, FROM_ARRIVAL = warmth.solved, survival.from_arrival


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmth, "solved", SOLVED)
    monkeypatch.setattr(survival, "from_arrival", FROM_ARRIVAL)
