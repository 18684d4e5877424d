"""The values that decisions are made of. Times are Unix seconds, durations seconds; `None` is unknown, 0 is zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

MAX_REPLICAS = 10_000
"""The most that may be asked for of one model."""


class Rung(IntEnum):
    """How warm a model is. A higher rung answers sooner and costs more to hold."""

    COLD = 0
    """No node that could run it."""
    NODE = 1
    """A node is up."""
    WEIGHTS = 2
    """Its weights are on the node's disk."""
    TEMPLATE = 3
    """A process from which its engine is forked is there."""
    PARKED = 4
    """Its engine is there, without a GPU."""
    SERVING = 5
    """A replica serves."""


@dataclass(frozen=True, slots=True)
class RungProfile:
    """What a rung was measured to cost and to take, for one model."""

    rung: Rung
    delay_s: float
    """From this rung to the first token: the median of the model's own starts. 0 for SERVING."""
    delay_high_s: float
    """The upper quantile (0.9) of the same: how far ahead a prewarm must begin."""
    cost_per_s: float
    """GPU-seconds for each second that the rung is held. For SERVING, of one replica."""
    starts: int = 0
    """How many starts the delays were measured on; 0 means that they are assumed."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one replica was measured to do, from the engine's own metrics."""

    concurrency: float
    """Requests in progress that one replica serves within the SLO."""
    tokens_per_s: float | None = None
    requests_per_s: float | None = None
    service_s: float | None = None
    """Mean seconds that a request holds a replica."""


@dataclass(frozen=True, slots=True)
class Window:
    """A span of a schedule or a manual prewarm, resolved to times: at least these replicas, or at least this rung."""

    start_s: float
    end_s: float
    replicas: int
    rung: Rung = Rung.SERVING
    source: str = "schedule"
    """Who wants it: "schedule", "prewarm"; shown to people."""
    id: str = ""


@dataclass(frozen=True, slots=True)
class Spec:
    """How one model is to be scaled: the fleet file's values with what was overridden at run time."""

    model: str
    policy: str = "predictive"
    params: Mapping[str, float] = field(default_factory=dict)
    """The policy's own parameters, by the names that the policy declares."""
    wait_cost: float = 1.0
    """GPU-seconds worth paying to spare one request one second of waiting."""
    min_replicas: int = 0
    max_replicas: int = 1
    target_ongoing_requests: float = 16.0
    keep_alive_s: float = 60.0
    gpus_per_replica: float = 1.0
    """What a replica holds, and is charged as. One without GPUs is charged as one, for it has no other price."""
    priority: int = 0
    """A higher one keeps its replicas when the GPU budget is short."""
    park: bool = True
    windows: tuple[Window, ...] = ()
    """Floors from schedules and manual prewarms that overlap the present or come next, in the order of their starts."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One model as it was seen at `now_s`."""

    now_s: float
    ready: int | None = None
    """Replicas that serve."""
    starting: int | None = None
    """Replicas that are on their way."""
    target: int | None = None
    """Replicas that Serve was last told to have."""
    queued: int | None = None
    in_flight: int | None = None
    arrivals: int | None = None
    """Requests that came since the observation before."""
    last_arrival_s: float | None = None
    """When the last request came, ever; None if none ever has."""
    last_busy_s: float | None = None
    """When a request was last queued or in flight."""
    rung: Rung | None = None
    """The highest rung that the model is on besides its replicas: where a start would begin."""
    rungs: tuple[RungProfile, ...] = ()
    """Measured prices, one for each rung that the model can be held on here, lowest first, SERVING last."""
    capacity: Capacity | None = None
    waited_s: float | None = field(default=None, compare=False)
    """Request-seconds waited since the observation before; None where only `queued` tells. Decides nothing."""
    answering: bool = field(default=False, compare=False)
    """An engine answers, though maybe none of the replicas has it yet. Decides nothing."""
    late: int = field(default=0, compare=False)
    """Arrivals that were told so late that nobody knows what they met: gateways were not heard. Decides nothing."""


@dataclass(frozen=True, slots=True)
class NextArrival:
    """When the next request comes, as a distribution: P(no request until `made_s` + times_s[i]) = survival[i].

    `times_s` ascends from 0 and `survival` descends from 1; what remains at the end is the chance that none comes
    within the horizon. Between two times the hazard is constant.
    """

    made_s: float
    times_s: tuple[float, ...]
    survival: tuple[float, ...]

    @property
    def end_s(self) -> float:
        """The Unix time up to which it says anything."""
        return self.made_s + self.times_s[-1]


@dataclass(frozen=True, slots=True)
class Demand:
    """How much comes: for each step of the horizon, quantiles of the requests in progress at once.

    `concurrency[i][j]` is the quantile `quantiles[j]` over [made_s + i*step_s, made_s + (i+1)*step_s);
    `rate_per_s` has the same shape and gives arrivals a second.
    """

    made_s: float
    step_s: float
    quantiles: tuple[float, ...]
    rate_per_s: tuple[tuple[float, ...], ...]
    concurrency: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a forecaster says of one model. Either question may be unanswered."""

    made_s: float
    forecaster: str
    next_arrival: NextArrival | None = None
    demand: Demand | None = None
    batch_size: float = 1.0
    """Requests that come together with the next one (a burst's first seconds): all of them wait for a cold start."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """For people: scores, fallbacks and their reasons. Nothing is decided from them."""
    fitted_s: float | None = None
    """When what it rests on was fitted. Two forecasts of the same fit say the same from different moments, as long as
    no request came between them: nothing is decided anew for the later one. None: each stands for itself."""


class Reason(StrEnum):
    """Why a decision is what it is. Machine-readable: tests and dashboards key on it."""

    UNKNOWN_HOLD = "unknown-hold"
    """Something that decides is unknown: the present scale is held."""
    DEMAND = "demand"
    PANIC = "panic"
    """Demand of the last seconds outruns the stable window's: up at once, down not yet."""
    WAKE = "wake"
    """A request waits and there is no replica."""
    KEEP_ALIVE = "keep-alive"
    """Idle, and kept for what may come."""
    PREWARM = "prewarm"
    """A request is expected within the lead time."""
    FORECAST_DEMAND = "forecast-demand"
    """More is expected within the lead time than the replicas can carry."""
    SCALE_DOWN_DELAY = "scale-down-delay"
    """Fewer would do now, but not yet for long enough."""
    PARK = "park"
    GO_DARK = "go-dark"
    DARK = "dark"
    """Nothing to do: at zero, and nothing is expected soon."""
    SCHEDULE = "schedule"
    MANUAL = "manual"
    FIXED = "fixed"
    MIN_REPLICAS = "min-replicas"
    MAX_REPLICAS = "max-replicas"
    GPU_BUDGET = "gpu-budget"
    SPEND_LIMIT = "spend-limit"


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas a model should have and how warm it should be kept without them. Absolute, not a step."""

    model: str
    made_s: float
    replicas: int | None
    """None holds whatever there is."""
    rung: Rung
    """The rung to hold besides the replicas: where the next start begins."""
    reason: Reason
    until_s: float
    """Until when this stands if nothing happens: no request comes or ends, nothing starts or dies, no forecast is
    fitted anew. Infinite if nothing but an event can change it."""
    policy: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What the reason was computed from, with units in the names."""
    clamps: tuple[Reason, ...] = ()
    """Which bounds then changed the replicas."""
    loads: tuple[int, int] | None = field(default=None, compare=False)
    """The least and the most requests in progress for which it stands as well, if nothing else is seen to change: to
    decide at any of them gives the same, or another reason, and leads to the same later. None: only for those that it
    was made for. Of one that was made while none was in progress: for those that come, until there are none again."""
    silence_s: float = field(default=0.0, compare=False)
    """It stands as well while none is in progress, if the next one comes within so many seconds of the last one's end:
    a decision in between would give another reason, and lead to the same later. 0: it does not."""
    ceiling: int | None = field(default=None, compare=False)
    """Whatever comes until the next decision, no more replicas than this: a budget says so. None: no budget does."""


@dataclass(frozen=True, slots=True)
class State:
    """What a policy remembers of one model between decisions. Goes through JSON, so that a restart goes on from it."""

    policy: str = ""
    """Whose memory this is; a model that changes its policy starts with an empty one."""
    values: Mapping[str, float] = field(default_factory=dict)
    series: tuple[tuple[float, float], ...] = ()
    """(Unix time, value), oldest first; bounded by the policy."""
    histogram: tuple[float, ...] = ()


__all__ = [
    "Capacity",
    "Decision",
    "Demand",
    "Forecast",
    "NextArrival",
    "Observation",
    "Reason",
    "Rung",
    "RungProfile",
    "Spec",
    "State",
    "Window",
]
