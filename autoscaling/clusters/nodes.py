"""Which types of nodes a fleet gets: for each type of GPU the cheapest machine that fits, spot and on demand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoscaling.clusters.catalog import Machines, Market, Provider, Shape
from autoscaling.clusters.fit import fits_shape, misfit, offers, per_node
from deployments.errors import ConfigError
from deployments.fleet import Fleet, Model

NODE_START_S = 300.0
"""From a request to a GPU node with its image in the cluster, as Ray's own CI measured it."""
ACCELERATOR_LABEL = "ray.io/accelerator-type"
MARKET_LABEL = "ray.io/market-type"
CHEAPER_BY = 10
"""The step in `priority` between two types of GPU; spot is one above its on-demand twin."""


@dataclass(frozen=True, slots=True)
class NodeType:
    """A type of worker node, from 0 to `max_workers` of it."""

    name: str
    shape: Shape
    market: Market
    max_workers: int
    idle_timeout_s: int
    """After so long without work a node ends."""
    priority: int
    """Of two that fit equally well, Ray's autoscaler starts the one with the higher."""
    usd_per_hour: float | None

    @property
    def resources(self) -> dict[str, int]:
        return {name: int(amount) for name, amount in offers(self.shape).items()}

    @property
    def accelerators(self) -> frozenset[str]:
        return frozenset({self.shape.accelerator} if self.shape.accelerator else ())

    @property
    def labels(self) -> dict[str, str]:
        kind = {ACCELERATOR_LABEL: self.shape.accelerator} if self.shape.accelerator else {}
        return {**kind, MARKET_LABEL: self.market}

    def carries(self, model: Model) -> bool:
        return misfit(model, offers(self.shape), self.accelerators) is None


@dataclass(frozen=True, slots=True)
class Choice:
    """What a cluster consists of."""

    provider: Provider
    machines: Machines
    head: Shape | None
    types: tuple[NodeType, ...]
    max_workers: int
    """Of all types together."""

    def for_model(self, model: Model) -> tuple[NodeType, ...]:
        """The types that carry the model, in the order in which they are to be tried."""
        order = list(model.resources.accelerator_types)

        def rank(node: NodeType) -> tuple[int, int]:
            kind = node.shape.accelerator
            return (order.index(kind) if kind in order else len(order), -node.priority)

        return tuple(sorted((t for t in self.types if t.carries(model)), key=rank))


def choose(
    fleet: Fleet,
    provider: Provider,
    machines: Machines,
    gpus: Sequence[str] = (),
    *,
    node_start_s: float = NODE_START_S,
) -> Choice:
    """The node types for a fleet; `gpus` bounds the types of GPU, and adds those that no model names.

    Raises ConfigError where a model would fit on nothing.
    """
    unknown = [kind for kind in gpus if kind not in machines.accelerators]
    if unknown:
        raise ConfigError(
            f"--gpu: {unknown[0]!r} is no GPU of {provider}: it has {', '.join(machines.accelerators) or 'none'}"
        )
    if not machines.shapes:
        return Choice(provider, machines, None, (), 0)
    wanted: dict[str, list[Model]] = {}
    for index, model in enumerate(fleet.models):
        shapes = _shapes(model, provider, machines, gpus, f"models[{index}]")
        for shape in shapes:
            wanted.setdefault(shape.name, []).append(model)
    for kind in gpus:
        if not any(machines.shapes[name].accelerator == kind for name in wanted):
            wanted[_cheapest([s for s in machines.shapes.values() if s.accelerator == kind]).name] = []
    return Choice(
        provider,
        machines,
        machines.shapes[machines.head] if machines.head else None,
        tuple(_types(wanted, machines, node_start_s)),
        max(1, sum(_nodes(model, wanted, machines) for model in fleet.models)),
    )


def _shapes(
    model: Model, provider: Provider, machines: Machines, gpus: Sequence[str], where: str
) -> list[Shape]:
    """For each type of GPU that the model may use, the cheapest machine for it, and one for each market."""
    if not model.resources.gpus:
        kinds: list[str | None] = [None]
    elif model.resources.accelerator_types:
        kinds = [k for k in model.resources.accelerator_types if not gpus or k in gpus]
    else:
        kinds = list(gpus)
    fitting = [s for s in machines.shapes.values() if fits_shape(model, s)]
    if model.resources.gpus and not model.resources.accelerator_types and not gpus and fitting:
        kinds = [_cheapest(fitting).accelerator]
    found: list[Shape] = []
    for kind in kinds:
        of_kind = [s for s in fitting if s.accelerator == kind]
        for market in ("on-demand", "spot"):
            having = [s for s in of_kind if market in s.markets]
            if having:
                found.append(_cheapest(having))
    found = list(dict.fromkeys(found))
    if not found:
        raise ConfigError(_fits_nowhere(model, provider, machines, gpus, where))
    return found


def _fits_nowhere(
    model: Model, provider: Provider, machines: Machines, gpus: Sequence[str], where: str
) -> str:
    kinds = model.resources.accelerator_types
    place = f"{where}.resources ({model.id})"
    have = [k for k in machines.accelerators if not gpus or k in gpus]
    if kinds and not set(kinds) & set(have):
        only = " among --gpu" if gpus else ""
        return (
            f"{place}: accelerator_types {kinds}: {provider} has none of them{only}; it has {', '.join(have)}"
        )
    near = [s for s in machines.shapes.values() if not kinds or s.accelerator in kinds]
    reasons = "; ".join(
        f"{s.name} {misfit(model, offers(s), frozenset({s.accelerator} if s.accelerator else ()))}"
        for s in near
    )
    return f"{place}: fits on no machine of {provider}: {reasons}"


def _cheapest(shapes: Sequence[Shape]) -> Shape:
    return min(shapes, key=lambda shape: (_usd(shape), shape.gpus, shape.cpus))


def _usd(shape: Shape) -> float:
    """What is sorted by. A price that nobody gave may be any, so that it comes after all that are known."""
    return math.inf if shape.usd_per_hour is None else shape.usd_per_hour


def _nodes(model: Model, wanted: dict[str, list[Model]], machines: Machines) -> int:
    """How many nodes the model takes at most, on the machine that holds the fewest of its replicas."""
    at_most = max(model.scaling.max_replicas, *(s.replicas for s in model.scaling.schedules), 1)
    fewest = min(
        per_node(model, offers(machines.shapes[name])) for name, users in wanted.items() if model in users
    )
    return math.ceil(at_most / fewest)


def _types(wanted: dict[str, list[Model]], machines: Machines, node_start_s: float) -> list[NodeType]:
    def cost(shape: Shape) -> tuple[float, float]:
        return (_usd(shape), shape.gpus * (shape.gpu_memory_gib or 0.0))

    shapes = sorted((machines.shapes[name] for name in wanted), key=cost)
    kinds = [_kind(shape) for shape in shapes]
    found = []
    for rank, shape in enumerate(reversed(shapes)):
        users = wanted[shape.name]
        most = sum(math.ceil(m.scaling.max_replicas / per_node(m, offers(shape))) for m in users)
        # The ski rental: a node idles no longer than it would take to get it back, and never less than its models do.
        idle_s = max([node_start_s, *(m.scaling.keep_alive_s for m in users)])
        for market in shape.markets:
            found.append(
                NodeType(
                    name=_name(shape, market, alone=kinds.count(_kind(shape)) == 1),
                    shape=shape,
                    market=market,
                    max_workers=max(1, most),
                    idle_timeout_s=math.ceil(idle_s),
                    priority=CHEAPER_BY * rank + (1 if market == "spot" else 0),
                    usd_per_hour=machines.usd_per_hour(shape, market),
                )
            )
    return list(reversed(found))


def _kind(shape: Shape) -> str:
    kind = f"{shape.accelerator}x{shape.gpus}" if shape.gpus > 1 else (shape.accelerator or "cpu")
    return kind.lower()


def _name(shape: Shape, market: Market, *, alone: bool) -> str:
    size = "" if alone else f"-{shape.cpus}cpu"
    return f"{_kind(shape)}{size}-{'spot' if market == 'spot' else 'ondemand'}"
