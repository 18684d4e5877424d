"""What a policy would have cost, and how long users would have waited."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscaling.sim.queueing import CELLS, waited_quantile_s

VERSION = 1


@dataclass(frozen=True)
class Figures:
    """Of one model, or of all together. What came before `measured_from_s` is not in them."""

    requests: int = 0
    """That came, whatever became of them."""
    cold_requests: int = 0
    """Those that came while no replica was ready, but for those that a full queue turned away."""
    cold_starts: int = 0
    """Spans without a ready replica in which a request came to wait, whether or not a start ended them."""
    rejected: int = 0
    """Turned away: the queue was full, or the deadline passed."""
    waited_s: float = 0.0
    """Until a replica began with a request, over all; the deadline if it was turned away, the end if never answered."""
    cold_waited_s: float = 0.0
    """The same of the cold requests."""
    wait_mean_s: float = 0.0
    """Of a request; as in `waited_s`."""
    wait_p50_s: float = 0.0
    """Median, to within 1 %, as all quantiles."""
    wait_p95_s: float = 0.0
    """95 % waited no longer."""
    wait_p99_s: float = 0.0
    """99 % waited no longer."""
    wait_max_s: float = 0.0
    """The longest."""
    slo_attainment: float = 1.0
    """Share of the requests that waited no longer than `slo_s`."""
    gpu_s: float = 0.0
    """GPU-seconds, all states together."""
    starting_gpu_s: float = 0.0
    """From a start's beginning to a replica that is ready."""
    busy_gpu_s: float = 0.0
    """At least one request in progress."""
    idle_gpu_s: float = 0.0
    """Ready, without a request."""
    stopping_gpu_s: float = 0.0
    """Let go and without requests, while Serve ends it."""
    parked_gpu_s: float = 0.0
    """What the host memory of parked engines is charged."""
    node_gpu_s: float = 0.0
    """Rungs below, where they are charged."""
    cost: float = 0.0
    """gpu_s at `price_per_gpu_h`, in its currency."""
    total_cost_gpu_s: float = 0.0
    """gpu_s + wait_cost * waited_s: what the predictive policy minimises."""
    starts: int = 0
    """Of replicas, from whatever rung."""
    failed_starts: int = 0
    """Starts that failed and were begun anew."""
    cancelled_starts: int = 0
    """Starts that were given up before their replica was ready."""
    prewarms: int = 0
    """Starts ahead of a request that was forecast."""
    prewarm_hits: int = 0
    """Those of them that a request met."""
    scale_ups: int = 0
    """How often the target was raised: with scale_downs, how much it flaps."""
    scale_downs: int = 0
    """How often the target was lowered."""


@dataclass(frozen=True)
class ModelReport:
    model: str
    figures: Figures
    starts_by_rung: Mapping[str, int] = field(default_factory=dict)
    wait_histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(CELLS, np.int64))
    price_per_gpu_h: float | None = None
    """None: the report's."""


@dataclass(frozen=True)
class Report:
    """Of one replay."""

    policy: str
    params: Mapping[str, float]
    trace: str
    seed: int
    wait_cost: float
    """NaN where models differ; as is keep_alive_s. null in JSON."""
    keep_alive_s: float
    measured_from_s: float
    """Unix seconds."""
    until_s: float
    total: Figures
    models: tuple[ModelReport, ...]
    park: bool | None = None
    """None where models differ."""
    scale: float = 1.0
    slo_s: float = 0.0
    price_per_gpu_h: float = 0.0
    took_s: float = 0.0
    """Real seconds."""
    fits: int = 0
    skipped_rows: int = 0
    notes: tuple[str, ...] = ()
    """What the reader should know: models that failed, how the trace was scaled."""
    timeline: Mapping[str, Any] = field(default_factory=dict)
    """Model -> `replay.Sample`s, if asked for: for plots."""

    def to_plain(self) -> dict[str, Any]:
        """As JSON has it; its schema is `schema.report_schema()`."""
        return {
            "version": VERSION,
            "policy": self.policy,
            "params": dict(self.params),
            "trace": self.trace,
            "seed": self.seed,
            "wait_cost": None if math.isnan(self.wait_cost) else self.wait_cost,
            "keep_alive_s": None if math.isnan(self.keep_alive_s) else self.keep_alive_s,
            "park": self.park,
            "measured_from_s": self.measured_from_s,
            "until_s": self.until_s,
            "scale": self.scale,
            "slo_s": self.slo_s,
            "price_per_gpu_h": self.price_per_gpu_h,
            "took_s": self.took_s,
            "fits": self.fits,
            "skipped_rows": self.skipped_rows,
            "notes": list(self.notes),
            "total": dataclasses.asdict(self.total),
            "models": [
                {
                    "model": each.model,
                    **dataclasses.asdict(each.figures),
                    "starts_by_rung": dict(each.starts_by_rung),
                    "price_per_gpu_h": self.price_per_gpu_h
                    if each.price_per_gpu_h is None
                    else each.price_per_gpu_h,
                }
                for each in self.models
            ],
        }


_SUMMED = tuple(
    each.name
    for each in dataclasses.fields(Figures)
    if not each.name.startswith("wait_") and each.name != "slo_attainment"
)


def figures(
    sums: Mapping[str, float], histogram: NDArray[np.int64], longest_s: float, in_time: int
) -> Figures:
    """From what is counted to what follows from it."""
    started = int(histogram.sum())
    requests = int(sums["requests"])
    return Figures(
        **sums,  # type: ignore[arg-type]
        wait_mean_s=sums["waited_s"] / started if started else 0.0,
        wait_p50_s=min(longest_s, waited_quantile_s(histogram, 0.5)),
        wait_p95_s=min(longest_s, waited_quantile_s(histogram, 0.95)),
        wait_p99_s=min(longest_s, waited_quantile_s(histogram, 0.99)),
        wait_max_s=longest_s,
        slo_attainment=in_time / requests if requests else 1.0,
    )


def together(models: Iterable[ModelReport]) -> Figures:
    """The same over all of them."""
    models = list(models)
    histogram = np.zeros(CELLS, np.int64)
    for each in models:
        histogram = histogram + each.wait_histogram
    sums: dict[str, float] = {
        name: math.fsum(getattr(each.figures, name) for each in models) for name in _SUMMED
    }
    for name in _SUMMED:
        if isinstance(getattr(Figures(), name), int):
            sums[name] = int(sums[name])
    longest_s = max((each.figures.wait_max_s for each in models), default=0.0)
    in_time = round(math.fsum(each.figures.slo_attainment * each.figures.requests for each in models))
    return figures(sums, histogram, longest_s, in_time)


def priced(report: Report, prices: Mapping[str, float]) -> Report:
    """With costs at these prices of a GPU-hour, by model; models that are not named keep the report's."""
    if not prices:
        return report
    models = tuple(
        dataclasses.replace(
            each,
            price_per_gpu_h=prices[each.model],
            figures=dataclasses.replace(each.figures, cost=each.figures.gpu_s / 3600 * prices[each.model]),
        )
        if each.model in prices
        else each
        for each in report.models
    )
    cost = math.fsum(each.figures.cost for each in models)
    return dataclasses.replace(report, models=models, total=dataclasses.replace(report.total, cost=cost))


__all__ = ["VERSION", "Figures", "ModelReport", "Report", "figures", "priced", "together"]
