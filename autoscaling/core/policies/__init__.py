"""Every policy by its name, and what is wrong with parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from autoscaling.core.policies.base import Context, Param, Policy, Proposal
from autoscaling.core.policies.fixed import Fixed
from autoscaling.core.policies.hybrid_histogram import HybridHistogram
from autoscaling.core.policies.keep_alive import KeepAlive
from autoscaling.core.policies.kpa import Kpa
from autoscaling.core.policies.predictive import Predictive
from autoscaling.core.policies.ray_default import RayDefault
from autoscaling.core.policies.reactive import Reactive
from autoscaling.core.policies.scheduled import Scheduled

_ALL: tuple[Policy, ...] = (
    Predictive(),
    Reactive(),
    KeepAlive(),
    HybridHistogram(),
    Kpa(),
    RayDefault(),
    Scheduled(),
    Fixed(),
)
POLICIES: Mapping[str, Policy] = MappingProxyType({policy.name: policy for policy in _ALL})
DEFAULT = "predictive"


def validate_params(policy: str, params: Mapping[str, object]) -> str | None:
    """One message that names what is wrong, its value and what would be right; None if nothing is."""
    if policy not in POLICIES:
        return f"policy {policy!r} is unknown; there are {', '.join(sorted(POLICIES))}"
    known = {param.name: param for param in POLICIES[policy].params}
    for name, value in params.items():
        param = known.get(name)
        if param is None:
            return f"policy {policy} has no parameter {name!r}; it has {', '.join(sorted(known))}"
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return f"{name}: {value!r} is not a number; it must be {_bounds(param)}"
        if not param.low <= value <= param.high:
            return f"{name}: {value:g} is out of bounds; it must be {_bounds(param)}"
    return None


def _bounds(param: Param) -> str:
    return f"from {param.low:g} to {param.high:g} ({param.unit})"


__all__ = ["DEFAULT", "POLICIES", "Context", "Param", "Policy", "Proposal", "validate_params"]
