"""What is remembered, durably: `Store`."""

from __future__ import annotations

from autoscaling.live.store.errors import StoreUnavailable
from autoscaling.live.store.store import Store

__all__ = ["Store", "StoreUnavailable"]
