"""Traffic in even steps, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from autoscaling.live.store.mirror import STEPS, Series
from autoscaling.live.store.schema import AMOUNTS
from deployments.errors import ConfigError

MAX_STEPS = 200_000


def history(
    series: Sequence[Series], since_s: float, until_s: float, step_s: float, now_s: float
) -> list[dict[str, Any]]:
    """What `Store.history` says, of all these models together. `now_s` tells which buckets are still kept."""
    if not step_s > 0:
        raise ConfigError(f"history: step is {step_s:g} s. It must be longer than 0.")
    if not series or not since_s < until_s:
        return []
    level_s = _level(series, since_s, now_s, step_s)
    step = max(1, round(step_s / level_s)) * level_s
    windows = [one.window(level_s, now_s) for one in series]
    first = max(int(since_s // step), min(start for start, _ in windows) * level_s // step)
    end = int(-(-until_s // step))
    if end - first > MAX_STEPS:
        raise ConfigError(
            f"history: {end - first} steps of {step:g} s are too many. Ask for at most {MAX_STEPS}, in longer steps."
        )
    table = np.zeros((len(AMOUNTS), max(0, end - first)))
    for one, (start, stop) in zip(series, windows, strict=True):
        arrays = one.arrays(level_s)
        part = arrays.between(max(start, first * step // level_s), stop)
        at = arrays.index[part].astype(np.int64) * level_s // step - first
        inside = (at >= 0) & (at < table.shape[1])
        for row, amounts in zip(table, arrays.amounts[:, part], strict=True):
            np.add.at(row, at[inside], amounts[inside])
    counts = np.rint(table[:3]).astype(np.int64).tolist()
    return [
        {
            "start_s": float((first + i) * step),
            "step_s": float(step),
            **dict(zip(AMOUNTS, (*column, float(busy_s), float(waited_s)), strict=True)),
        }
        for i, (*column, busy_s, waited_s) in enumerate(zip(*counts, *table[3:].tolist(), strict=True))
    ]


def _level(series: Sequence[Series], since_s: float, now_s: float, step_s: float) -> int:
    """The longest bucket that the step can be made of; a longer one where only that reaches back far enough."""
    fitting = [level_s for level_s in STEPS if level_s <= step_s] or [STEPS[0]]
    fitting.sort(key=lambda level_s: (step_s % level_s != 0, -level_s))
    # Not from when the first bucket begins: an hour's would reach back further than a minute's of the same traffic.
    known = {level_s: min(one.known_s(level_s, now_s) for one in series) for level_s in STEPS}
    wanted = max(since_s, min(known.values()))
    for level_s in (*fitting, *STEPS):
        # A level's first bucket may begin a little later than the span that was asked for.
        if known[level_s] <= wanted + max(level_s, step_s):
            return level_s
    return STEPS[-1]
