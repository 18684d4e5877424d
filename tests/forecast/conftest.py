"""Forecasts themselves, whatever a simulation in the same process has exchanged for compiled versions of them."""

from __future__ import annotations

import pytest

from autoscaling.forecast import demand_model, gap_record, gaps, hazard


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaps, "gap_mass", gaps._gap_mass)
    monkeypatch.setattr(demand_model, "predict", demand_model._predict)
    monkeypatch.setattr(gap_record, "came", gap_record._came)
    monkeypatch.setattr(hazard, "arranged", hazard._arranged)
