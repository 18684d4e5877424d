"""Waiting for what other threads and processes do."""

from __future__ import annotations

import threading
from collections.abc import Callable


def until(said: Callable[[], bool]) -> None:
    """Asks again and again for up to a minute. Raises AssertionError if it never came."""
    for _ in range(1200):
        if said():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it never came")
