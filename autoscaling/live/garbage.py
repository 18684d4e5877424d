"""How often the controller's process looks for garbage in cycles."""

from __future__ import annotations

import gc

THRESHOLDS = (10_000, 20, 20)


def collect_seldom() -> None:
    """Fewer collections than Python's own rule makes. Changes the process; may be called again.

    A thousand models' forecasts and decisions are some hundred thousand objects that stay, and every tick makes
    thousands more: by Python's rule each tick or two would go through all of them, for 90 ms. Next to nothing of it is
    in cycles; the rest goes by its reference count at once.
    """
    gc.set_threshold(*THRESHOLDS)


__all__ = ["THRESHOLDS", "collect_seldom"]
