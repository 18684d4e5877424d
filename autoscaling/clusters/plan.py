"""What nodes each model would get, and what they cost an hour: dark, and lit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from autoscaling.clusters.fit import per_node
from autoscaling.clusters.nodes import Choice, NodeType
from deployments.fleet import Fleet, Model


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model's nodes."""

    model: str
    choices: tuple[NodeType, ...]
    """In the order in which they are tried."""
    replicas_per_node: int
    """On the first of them."""
    max_replicas: int
    max_nodes: int
    """On the first of them, alone."""
    min_nodes: int
    """On the first of them, for what is never dark (min_replicas)."""
    lit_nodes: tuple[int, ...]
    """On each of them, for one replica, or for all that are never dark."""

    @property
    def first(self) -> NodeType:
        return self.choices[0]

    @property
    def dark_usd_per_hour(self) -> float | None:
        """What is never dark."""
        return _times(self.min_nodes, self.first.usd_per_hour)

    @property
    def lit_usd_per_hour(self) -> float | None:
        """One replica, or all that are never dark, alone on their nodes."""
        return _times(self.lit_nodes[0], self.first.usd_per_hour)

    @property
    def all_usd_per_hour(self) -> float | None:
        """All its replicas."""
        return _times(self.max_nodes, self.first.usd_per_hour)

    @property
    def fallback_usd_per_hour(self) -> float | None:
        """As lit, on the dearest nodes that it may get."""
        prices = [_times(n, t.usd_per_hour) for n, t in zip(self.lit_nodes, self.choices, strict=True)]
        known = [p for p in prices if p is not None]
        return max(known) if len(known) == len(prices) else None


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole cluster."""

    choice: Choice
    models: tuple[ModelPlan, ...]
    head_usd_per_hour: float | None

    @property
    def dark_usd_per_hour(self) -> float | None:
        """With as little lit as the fleet allows."""
        return _sum([self.head_usd_per_hour, *(m.dark_usd_per_hour for m in self.models)])

    @property
    def lit_usd_per_hour(self) -> float | None:
        """With one replica of each model, or what of it is never dark, each model alone on its nodes."""
        return _sum([self.head_usd_per_hour, *(m.lit_usd_per_hour for m in self.models)])

    @property
    def most_usd_per_hour(self) -> float | None:
        """With all replicas of all models."""
        return _sum([self.head_usd_per_hour, *(m.all_usd_per_hour for m in self.models)])

    def to_json(self) -> dict[str, Any]:
        machines = self.choice.machines
        return {
            "provider": self.choice.provider,
            "region": machines.region,
            "prices": {
                "source": machines.source,
                "checked": machines.checked,
                "spot_share": machines.spot_share,
            },
            "head": {
                "machine": self.choice.head.name if self.choice.head else None,
                "usd_per_hour": self.head_usd_per_hour,
            },
            "max_nodes": self.choice.max_workers,
            "usd_per_hour": {
                "dark": self.dark_usd_per_hour,
                "lit": self.lit_usd_per_hour,
                "most": self.most_usd_per_hour,
            },
            "models": [
                {
                    "model": m.model,
                    "nodes": [
                        {
                            "type": t.name,
                            "machine": t.shape.name,
                            "market": t.market,
                            "accelerator": t.shape.accelerator,
                            "gpus": t.shape.gpus,
                            "usd_per_hour": t.usd_per_hour,
                        }
                        for t in m.choices
                    ],
                    "replicas_per_node": m.replicas_per_node,
                    "max_replicas": m.max_replicas,
                    "max_nodes": m.max_nodes,
                    "usd_per_hour": {
                        "dark": m.dark_usd_per_hour,
                        "lit": m.lit_usd_per_hour,
                        "most": m.all_usd_per_hour,
                        "lit_at_worst": m.fallback_usd_per_hour,
                    },
                }
                for m in self.models
            ],
        }


def plan(fleet: Fleet, choice: Choice) -> Plan:
    """Prices of `choice` for the fleet; None for what nobody has priced."""
    models = tuple(_model(model, choice) for model in fleet.models) if choice.types else ()
    head = None if choice.head is None else choice.machines.usd_per_hour(choice.head, "on-demand")
    return Plan(choice, models, head)


def _model(model: Model, choice: Choice) -> ModelPlan:
    types = choice.for_model(model)
    each = [per_node(model, t.resources) for t in types]
    most = max(model.scaling.max_replicas, *(s.replicas for s in model.scaling.schedules), 0)
    least = model.scaling.min_replicas
    return ModelPlan(
        model=model.id,
        choices=types,
        replicas_per_node=each[0],
        max_replicas=most,
        max_nodes=math.ceil(most / each[0]),
        min_nodes=math.ceil(least / each[0]),
        lit_nodes=tuple(math.ceil(max(1, least) / held) for held in each),
    )


def _times(nodes: int, usd: float | None) -> float | None:
    """No nodes cost nothing, also where nobody said what one costs."""
    return 0.0 if not nodes else None if usd is None else nodes * usd


def _sum(amounts: list[float | None]) -> float | None:
    known = [a for a in amounts if a is not None]
    return sum(known) if len(known) == len(amounts) else None
