"""Fitters that misbehave, for the service's process to import by their names."""

from __future__ import annotations

import os
import time
from typing import Any

from autoscaling.forecast.fit import FittedModel, Job, fit_standard


def hanging(job: Job) -> FittedModel | None:
    """For the model "bad" only."""
    while job.traffic.model == "bad":
        time.sleep(0.1)
    return fit_standard(job)


def raising(job: Job) -> FittedModel | None:
    if job.traffic.model == "bad":
        raise FloatingPointError("the matrix is singular")
    return fit_standard(job)


def dying(job: Job) -> FittedModel | None:
    if job.traffic.model == "bad":
        os._exit(9)
    return fit_standard(job)


def unreadable(job: Job) -> Any:
    return _Unreadable()


class _Unreadable:
    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ()


def _refuse() -> None:
    raise ValueError("made elsewhere")
