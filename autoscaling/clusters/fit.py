"""Which machines a model fits on: its resources against a machine's, and its list of accelerators."""

from __future__ import annotations

import math
from collections.abc import Mapping

from autoscaling.clusters.catalog import Shape
from deployments.fleet import Model


def needs(model: Model) -> dict[str, float]:
    """What Ray must find free on one node for one replica."""
    wanted = {"CPU": float(model.resources.cpus), "GPU": float(model.resources.gpus)}
    wanted.update(model.resources.custom)
    return {name: amount for name, amount in wanted.items() if amount}


def offers(shape: Shape) -> dict[str, float]:
    """What a node of this shape gives to Ray."""
    found = {"CPU": float(shape.cpus)}
    if shape.gpus:
        found["GPU"] = float(shape.gpus)
        found[f"accelerator_type:{shape.accelerator}"] = 1.0
    return found


def misfit(model: Model, resources: Mapping[str, float], accelerators: frozenset[str]) -> str | None:
    """Why a replica can't run on an empty node with `resources` and GPUs of `accelerators`; None if it can."""
    wanted = model.resources.accelerator_types
    if wanted and not accelerators & set(wanted):
        return f"has {' and '.join(sorted(accelerators)) or 'no GPU'}, not {' or '.join(wanted)}"
    if not model.resources.gpus and resources.get("GPU"):
        return "has a GPU, which a model without GPUs would hold"
    for name, amount in needs(model).items():
        if resources.get(name, 0.0) < amount:
            return f"has {resources.get(name, 0.0):g} {name}, not {amount:g}"
    return None


def fits_shape(model: Model, shape: Shape) -> bool:
    """Whether a replica can run on an empty machine of this shape."""
    return misfit(model, offers(shape), frozenset({shape.accelerator} if shape.accelerator else ())) is None


def per_node(model: Model, resources: Mapping[str, float]) -> int:
    """How many replicas an empty node with `resources` holds; at least 1 for one that fits."""
    counts = [math.floor(resources.get(name, 0.0) / amount + 1e-9) for name, amount in needs(model).items()]
    return max(1, min(counts, default=1))
