"""Every policy by its name, and what is wrong with parameters."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from autoscaling.core.policies.base import Context, Param, Policy, Proposal
from autoscaling.core.policies.fixed import Fixed
from autoscaling.core.policies.following import IDLE
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
KEEPS = ("keep-alive", "reactive")
"""Policies that hold to the spec's keep_alive_s, unless their parameter idle_s is set."""


class Wrong(NamedTuple):
    """What can't be: where, its value, and what would be right."""

    field: str
    value: object
    expected: str

    def __str__(self) -> str:
        return f"{self.field}: {self.value!r} is not right; expected {self.expected}"


def wrong_choice(policy: str, params: Mapping[str, object]) -> Wrong | None:
    """The first thing that is wrong with a policy and its parameters; None if nothing is."""
    return next(wrong_choices(policy, params), None)


def wrong_choices(policy: str, params: Mapping[str, object]) -> Iterator[Wrong]:
    """Everything that is wrong with a policy and its parameters."""
    if policy not in POLICIES:
        yield Wrong("policy", policy, _one_of(policy, POLICIES))
        return
    known = {param.name: param for param in POLICIES[policy].params}
    for name, value in params.items():
        param = known.get(name)
        if param is None:
            yield Wrong(f"params.{name}", value, f"a parameter of {policy}: {_one_of(name, known)}")
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not param.low <= value <= param.high:  # type: ignore[operator]
            expected = f"a number from {param.low:g} to {param.high:g} ({param.unit})"
            yield Wrong(f"params.{name}", value, expected)


def wrong_keep(policy: str, params: Mapping[str, object], keep_alive_s: float | None) -> Wrong | None:
    """What is wrong with an idle time that is set at once with these parameters; None if nothing is."""
    if keep_alive_s is None or policy not in KEEPS or IDLE.name not in params:
        return None
    return Wrong(
        "keep_alive_s",
        keep_alive_s,
        f"none beside params.{IDLE.name}, {params[IDLE.name]!r}, which goes before it: set one of them",
    )


def _one_of(wanted: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(wanted, known, n=1)
    if close:
        return f"{close[0]}? There are {', '.join(sorted(known))}"
    return f"one of {', '.join(sorted(known))}" if known else "none (it has none)"


__all__ = [
    "DEFAULT",
    "KEEPS",
    "POLICIES",
    "Context",
    "Param",
    "Policy",
    "Proposal",
    "Wrong",
    "wrong_choice",
    "wrong_choices",
    "wrong_keep",
]
