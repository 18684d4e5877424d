"""What one replica can do, learned from the engines' own counters.

Method: between two readings of an engine's counters (some five seconds) lies a window. A window counts if the number
of requests in progress was about the same at both ends, so that its rates belong to that number. Windows are kept by
powers of two of it, as moving averages of tokens a second and of the time between two tokens. Then

- the tokens a second of a replica are those of the busiest kind of window that was seen,
- the requests in progress that it serves within the SLO are the largest number at which the time between two tokens
  kept to it, and between that number and the next where it did not, the point on the straight line between them.

The fleet file's target is never exceeded: what is learned can only show that a replica serves fewer within the SLO.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from autoscaling.core.types import Capacity, State
from autoscaling.live.readings import LastReadings

SHORTEST_S, LONGEST_S = 1.0, 60.0
"""Windows outside of this say too little, or too little of the present."""
STEADY = 1.5
"""How many times more requests in progress one end of a window may have than the other."""
WEIGHT = 0.2
MIN_WINDOWS = 3
COLUMNS = ("windows", "concurrency", "tokens_per_s", "requests_per_s", "inter_token_s")


@dataclass(slots=True)
class _Load:
    """Moving averages over the windows with about so many requests in progress."""

    windows: float = 0.0
    concurrency: float = 0.0
    tokens_per_s: float = 0.0
    requests_per_s: float = 0.0
    inter_token_s: float = 0.0

    def add(self, values: Mapping[str, float]) -> None:
        self.windows += 1
        weight = max(WEIGHT, 1.0 / self.windows)
        for name, value in values.items():
            setattr(self, name, getattr(self, name) * (1 - weight) + weight * value)


@dataclass(slots=True)
class _Model:
    loads: dict[int, _Load] = field(default_factory=dict)
    service_s: float | None = None


class CapacityBook:
    """Learns for all models. `read` takes what engines say, `capacity` tells. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[str, _Model] = {}
        self._readings: LastReadings[Mapping[str, float]] = LastReadings()

    def read(self, engine_id: str, model: str, counters: Mapping[str, float]) -> None:
        """One reading of an engine's counters (see deployments/gateway/scrape.py), with `at_s`, its Unix time."""
        with self._lock:
            is_news, before = self._readings.take(engine_id, counters["at_s"], counters)
            if is_news and before is not None:
                self._window(self._models.setdefault(model, _Model()), before, counters)

    def forget(self, living: set[str]) -> None:
        """Only these engines are left."""
        with self._lock:
            self._readings.forget(living)

    @staticmethod
    def _window(model: _Model, before: Mapping[str, float], now: Mapping[str, float]) -> None:
        span_s = now["at_s"] - before["at_s"]

        def grown(name: str) -> float:
            return now.get(name, 0.0) - before.get(name, 0.0)

        # A counter that went back is another process under the same name.
        names = ("generation_tokens", "requests", "inter_tokens", "latency_sum_s", "inter_token_sum_s")
        if not SHORTEST_S <= span_s <= LONGEST_S or any(not grown(name) >= 0 for name in names):
            return
        if finished := grown("requests"):
            service_s = grown("latency_sum_s") / finished
            known = model.service_s
            model.service_s = service_s if known is None else known * (1 - WEIGHT) + WEIGHT * service_s
        ends = sorted((before.get("running", 0.0), now.get("running", 0.0)))
        if ends[0] < 1 or ends[1] > STEADY * ends[0] + 1:
            return
        concurrency = sum(ends) / 2
        tokens = grown("inter_tokens")
        load = model.loads.setdefault(round(math.log2(concurrency)), _Load())
        load.add(
            {
                "concurrency": concurrency,
                "tokens_per_s": grown("generation_tokens") / span_s,
                "requests_per_s": finished / span_s,
                "inter_token_s": grown("inter_token_sum_s") / tokens if tokens else 0.0,
            }
        )

    def capacity(self, model: str, *, target: float, inter_token_slo_s: float | None) -> Capacity | None:
        """None before anything was learned. `target` is the fleet file's number of requests for each replica."""
        with self._lock:
            known = self._models.get(model)
            if known is None:
                return None
            loads = [load for _, load in sorted(known.loads.items()) if load.windows >= MIN_WINDOWS]
            if not loads:
                return None
            tokens_per_s = max(load.tokens_per_s for load in loads)
            return Capacity(
                concurrency=min(target, max(1.0, _within_slo(loads, target, inter_token_slo_s))),
                tokens_per_s=tokens_per_s or None,
                requests_per_s=max(load.requests_per_s for load in loads) or None,
                service_s=known.service_s,
            )

    # What a restart goes on from

    def states(self) -> dict[str, State]:
        """Model -> what was learned, as the store keeps it."""
        with self._lock:
            return {
                model: State(
                    policy="capacity",
                    values={
                        f"{name}:{level}": getattr(load, name)
                        for level, load in known.loads.items()
                        for name in COLUMNS
                    }
                    | ({} if known.service_s is None else {"service_s": known.service_s}),
                )
                for model, known in self._models.items()
            }

    def restore(self, model: str, state: State) -> None:
        """Go on from what `states` gave."""
        known = _Model(service_s=state.values.get("service_s"))
        for key, value in state.values.items():
            name, _, level = key.partition(":")
            if name in COLUMNS and math.isfinite(value):
                setattr(known.loads.setdefault(int(level), _Load()), name, value)
        with self._lock:
            self._models[model] = known


def _within_slo(loads: list[_Load], target: float, slo_s: float | None) -> float:
    if slo_s is None:
        return target
    kept = [load for load in loads if load.inter_token_s <= slo_s]
    broken = [load for load in loads if load.inter_token_s > slo_s]
    if not broken:
        return target
    worst = min(broken, key=lambda load: load.concurrency)
    below = [load for load in kept if load.concurrency < worst.concurrency]
    if not below:
        # Every window broke it: with fewer requests the time between tokens is shorter in proportion, at best.
        return worst.concurrency * slo_s / worst.inter_token_s
    best = max(below, key=lambda load: load.concurrency)
    share = (slo_s - best.inter_token_s) / (worst.inter_token_s - best.inter_token_s)
    return best.concurrency + share * (worst.concurrency - best.concurrency)
