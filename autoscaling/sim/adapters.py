"""The loop's ports over the virtual cluster."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from autoscaling.core.accounts import Prewarm, Usage
from autoscaling.core.types import Decision, Observation, Spec, State
from autoscaling.sim.cluster import VirtualModel
from autoscaling.sim.pool import Pool


class SimSpecs:
    """`SpecSource`: what was given, always."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        self._specs = dict(specs)

    def specs(self, now_s: float) -> Mapping[str, Spec]:
        """The same at all times."""
        return self._specs


class SimCluster:
    """`MetricsSource` and `Actuator`: what is seen is what there is, and what is decided is done at once."""

    def __init__(self, models: Mapping[str, VirtualModel], pool: Pool, *, follow: bool = True) -> None:
        """`follow`: Serve's policy raises above a decision what requests in progress need, as it does live."""
        self._models = models
        self._pool = pool
        self._follow = follow
        self._seen: Mapping[str, Observation] = {}

    def observe(self, now_s: float) -> Mapping[str, Observation]:
        """All models."""
        self._seen = {name: model.observe(now_s) for name, model in self._models.items()}
        return self._seen

    def apply(self, now_s: float, specs: Mapping[str, Spec], decisions: Sequence[Decision]) -> None:
        """Shrinks first, so that what is freed can be given."""
        ordered = decisions if len(decisions) == 1 else sorted(decisions, key=self._grows)
        for decision in ordered:
            seen = self._seen.get(decision.model) if self._follow else None
            self._models[decision.model].apply(now_s, specs[decision.model], decision, seen)
        if self._pool.waiting:
            self._pool.grant(now_s)

    def _grows(self, decision: Decision) -> bool:
        seen = self._seen.get(decision.model)
        return decision.replicas is not None and seen is not None and decision.replicas > (seen.target or 0)


class SimSink:
    """`DecisionSink` and `AccountSink`: counts prewarms and, if asked to, keeps every decision."""

    def __init__(self, *, since_s: float = -math.inf, keep: bool = False) -> None:
        """`since_s`: prewarms that were begun earlier don't count."""
        self.decisions: list[Decision] = []
        self.prewarms: Counter[str] = Counter()
        """By model."""
        self.hits: Counter[str] = Counter()
        self._since_s = since_s
        self.keeps = keep

    def record(
        self,
        now_s: float,
        observations: Mapping[str, Observation],
        decisions: Sequence[Decision],
        states: Mapping[str, State],
    ) -> None:
        """Those that are new."""
        if self.keeps:
            self.decisions += decisions

    def account(self, now_s: float, usage: Sequence[Usage], prewarms: Sequence[Prewarm]) -> None:
        """A prewarm is told of at each of its changes. The cluster's own accounts are exact, the usage is not."""
        for prewarm in prewarms:
            if prewarm.begun_s >= self._since_s:
                self.prewarms[prewarm.model] += prewarm.begun_s == now_s
                self.hits[prewarm.model] += prewarm.hit_s == prewarm.ended_s == now_s


__all__ = ["SimCluster", "SimSink", "SimSpecs"]
