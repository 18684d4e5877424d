"""What every policy is: a name, a source, parameters, and a proposal from what was seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from autoscaling.core.seen import Seen
from autoscaling.core.series import Series
from autoscaling.core.types import Forecast, Observation, Reason, Rung, Spec, State


@dataclass(frozen=True, slots=True)
class Param:
    """One number that can be set."""

    name: str
    default: float | None
    """None: what the spec says in the field that `doc` names."""
    low: float
    high: float
    unit: str
    doc: str


def setting(spec: Spec, param: Param, default: float = 0.0) -> float:
    """As the user set it, else its default, else `default`. What is out of its bounds is taken as the bound."""
    value = spec.params.get(param.name)
    if value is None or not math.isfinite(value):
        value = default if param.default is None else param.default
    return min(param.high, max(param.low, value))


@dataclass(slots=True)
class Context:
    """What a policy proposes from. Nothing in it is unknown."""

    spec: Spec
    state: State
    """This policy's own memory, empty at first. `values["proposed"]` is what it last proposed."""
    seen: Seen
    forecast: Forecast | None
    floor: int
    """Replicas that windows and min_replicas ask for anyway."""

    def param(self, param: Param, default: float = 0.0) -> float:
        """See `setting`."""
        return setting(self.spec, param, default)

    @property
    def before(self) -> int:
        """Replicas as last proposed, before floors and bounds; at first those that there are."""
        held = self.state.values.get("proposed")
        return self.seen.present if held is None else int(held)


@dataclass(slots=True)
class Proposal:
    """What a policy would do, before floors and bounds, and until when if nothing happens."""

    replicas: int
    rung: Rung
    """To hold at zero replicas."""
    reason: Reason
    until_s: float
    numbers: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    series: Series = ()
    histogram: tuple[float, ...] = ()
    loads: tuple[int, int] | None = None
    """See `Decision.loads`."""
    silence_s: float = 0.0
    """See `Decision.silence_s`."""


class Policy(Protocol):
    """Pure: the same context gives the same proposal, and so does proposing again with the memory it left."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str:
        """The paper or the documentation that the algorithm is from."""
        ...

    @property
    def params(self) -> tuple[Param, ...]: ...
    def propose(self, context: Context) -> Proposal: ...
    def at_once(self, spec: Spec, observation: Observation) -> float:
        """Requests in progress for each replica, by which they alone raise its decision until the next one; infinite
        where it never answers to those of a moment."""
        ...


def rest(context: Context) -> tuple[Rung, Reason]:
    """Where a model without a view of its own rests at zero: parked if its spec parks, else on what is there anyway.

    Where nodes come and go, none is there anyway: whatever is held holds a node, and nobody asked for that.
    """
    seen = context.seen
    if Rung.COLD in seen.prices:
        return Rung.COLD, Reason.GO_DARK if seen.present > 0 or seen.rung > Rung.COLD else Reason.DARK
    below = [rung for rung in seen.prices if rung < Rung.PARKED]
    if seen.present > 0:
        if context.spec.park and Rung.PARKED in seen.prices:
            return Rung.PARKED, Reason.PARK
        return (min(seen.rung, below[-1]) if below else min(seen.rung, Rung.TEMPLATE)), Reason.GO_DARK
    if seen.rung == Rung.PARKED and not context.spec.park:
        return (below[-1] if below else Rung.TEMPLATE), Reason.GO_DARK
    return seen.rung, Reason.PARK if seen.rung == Rung.PARKED else Reason.DARK


def carried(context: Context, replicas: int, need: int) -> Reason:
    """Why so many replicas, for a policy that follows the load and lets go late."""
    seen = context.seen
    if seen.load > 0:
        if seen.ready == 0:
            return Reason.WAKE
        return Reason.SCALE_DOWN_DELAY if replicas > need else Reason.DEMAND
    return Reason.KEEP_ALIVE if replicas <= 1 else Reason.SCALE_DOWN_DELAY


__all__ = ["Context", "Param", "Policy", "Proposal", "carried", "rest", "setting"]
