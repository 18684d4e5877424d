"""Traces and clusters small enough to be worked out by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscaling.core.types import Rung, Spec
from autoscaling.sim.profile import Engine, Profile, Start
from autoscaling.sim.replay import Replay, Setup, replay
from autoscaling.sim.report import Report
from autoscaling.traces import Row

START_S = 30.0


def profile(delay_s: float = START_S, **changes: Any) -> Profile:
    """Dark or lit, one request at a time, nothing but what a test sets."""
    base = Profile(
        engine=Engine(concurrency=1),
        starts={Rung.TEMPLATE: Start((delay_s,))},
        wake_s=0.0,
        slo_s=1.0,
        deadline_s=1e9,
    )
    return replace(base, **changes)


def spec(model: str = "m", **changes: Any) -> Spec:
    base = Spec(
        model,
        policy="keep-alive",
        wait_cost=10.0,
        max_replicas=1,
        target_ongoing_requests=1.0,
        keep_alive_s=60.0,
    )
    return replace(base, **changes)


def requests(times: Iterable[float], exec_s: float = 5.0, model: str = "m") -> list[Row]:
    return [Row(float(time_s), model, exec_s=exec_s) for time_s in times]


def run(
    rows: list[Row], made: Profile | None = None, setup: dict[str, Any] | None = None, **changes: Any
) -> Report:
    return replay(
        rows, lambda model: spec(model, **changes), Setup(profile=made or profile(), **(setup or {}))
    )


def replayed(rows: list[Row], made: Profile, **changes: Any) -> Replay:
    """With its decisions and its groups."""
    found = Replay(rows, lambda model: spec(model, **changes), Setup(profile=made, keep_decisions=True))
    found.run()
    return found


def waits(c: int, load: float) -> float:
    """Erlang's C: the chance that a request of an M/M/c queue waits, at `load` busy servers on average."""
    terms = [1.0]
    for k in range(1, c + 1):
        terms.append(terms[-1] * load / k)
    full = terms[c] * c / (c - load)
    return full / (sum(terms[:c]) + full)


def poisson(rate_per_s: float, count: int, seed: int = 0) -> NDArray[np.float64]:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate_per_s, count))
