"""What the virtual cluster is made of: engines, starts, prices. Read from a JSON file, or as assumed here."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscaling.core.types import Rung, RungProfile
from autoscaling.sim.prices import GPU_PRICES_PER_H
from deployments.config_text import read_json
from deployments.errors import ConfigError

Floats = NDArray[np.float64]

KNOWN_STARTS = 32
"""How many starts of each kind the controller is taken to have seen."""


MOST = 1e12
"""Of any number here: what nobody means, while sums and products of it are finite."""
ENDLESS = ("deadline_s", "queue_limit")
"""What may be infinite."""


class ProfileError(ValueError):
    """The message names the field, the value and what would be right."""


@dataclass(frozen=True)
class Engine:
    """How long a request takes. A trace's own `exec_s` goes before the tokens; it, too, is what it takes alone."""

    concurrency: int = 16
    """Requests in progress at once in one replica, at most."""
    prefill_tokens_per_s: float = 10_000.0
    decode_s: float = 0.02
    """Seconds for one token of each request in progress, in a batch of one."""
    decode_per_request_s: float = 0.0005
    """By how much that grows with each further request in the batch."""
    input_tokens: int = 512
    output_tokens: int = 128
    """Of a request of which the trace does not say."""
    service_s: float = 0.0
    """If positive, how long every request takes, whatever its tokens; nothing slows it down."""
    slowdown: tuple[float, ...] = ()
    """If given, how many times longer a request takes in a batch of 1, 2, 3… than alone, as measured. The last one goes
    on in proportion to the batch."""

    def work_s(self, input_tokens: int, output_tokens: int, exec_s: float) -> float:
        """Seconds that a request takes alone on a replica."""
        if exec_s > 0:
            return exec_s
        if self.service_s > 0:
            return self.service_s
        tokens_in = input_tokens or self.input_tokens
        tokens_out = output_tokens or (0 if input_tokens else self.output_tokens)
        return tokens_in / self.prefill_tokens_per_s + max(1, tokens_out) * self.decode_s

    def slowdowns(self) -> Floats:
        """How many times longer a request takes than alone, by requests in progress, shape (concurrency + 1,)."""
        count = np.arange(self.concurrency + 1, dtype=np.float64)
        if self.service_s > 0 and not self.slowdown:
            return np.ones(self.concurrency + 1)
        if self.slowdown:
            known = np.asarray([1.0, *self.slowdown])
            last = len(known) - 1
            beyond = known[-1] * np.maximum(count, 1) / last
            return np.where(count <= last, known[np.minimum(count.astype(int), last)], beyond)
        return 1.0 + np.maximum(count - 1, 0) * self.decode_per_request_s / self.decode_s


@dataclass(frozen=True)
class Start:
    """From one rung to a replica that serves."""

    delay_s: tuple[float, ...]
    """As measured, one of which is drawn for each start; a single one is always it."""
    cost_per_s: float = 0.0
    """GPU-seconds for each second that a model without replicas is held on this rung."""

    @cached_property
    def sorted_s(self) -> Floats:
        return np.sort(np.asarray(self.delay_s, np.float64))

    def quantile_s(self, share: float) -> float:
        """The smallest one that is not below that share of them."""
        delays = self.sorted_s
        return float(delays[min(len(delays) - 1, max(0, math.ceil(share * len(delays)) - 1))])

    def measured_s(self) -> tuple[float, float]:
        """(median, upper quantile) as a controller would have them from KNOWN_STARTS starts.

        The upper one is a little above the median even if all took the same: few starts prove little.
        """
        median = float(statistics.median(self.delay_s))
        known = max(KNOWN_STARTS, len(self.delay_s))
        return median, max(self.quantile_s(0.9), median * (1.0 + 1.0 / known))


DEFAULT_STARTS: Mapping[Rung, Start] = {
    Rung.WEIGHTS: Start((20.0,)),
    Rung.TEMPLATE: Start((4.0,)),
    Rung.PARKED: Start((1.0,), 0.01),
}


@dataclass(frozen=True)
class Profile:
    """All of it."""

    engine: Engine = field(default_factory=Engine)
    starts: Mapping[Rung, Start] = field(default_factory=lambda: DEFAULT_STARTS)
    base: Rung = Rung.TEMPLATE
    """Where a model rests that nothing keeps warmer."""
    gpus: float | None = None
    """GPUs of the cluster; None: as many as are asked for."""
    parked_engines: int | None = None
    """Engines that memory has room for, over all models; the one that was used longest ago makes room. None: all.
    0: models have no parked rung."""
    start_failures: float = 0.0
    """Share of the starts that fail after their time, and are begun anew."""
    deadline_s: float = 600.0
    """How long a request may wait before it is turned away."""
    queue_limit: float = math.inf
    """How many requests of one model may wait. Whoever is one too many counts as having waited until the deadline."""
    slo_s: float = 5.0
    """A request that waits longer has missed the SLO."""
    handoff_s: float = 0.0
    """What a request waits at least: the way through gateway and router to a replica that is ready."""
    wake_s: float = 0.1
    """From a request at zero replicas to the beginning of a start: one turn of Serve's control loop."""
    apply_s: float | None = None
    """From a decision of the controller to Serve's acting on it: the plan is written, read, and followed at a turn of
    the control loop. None: as long as `wake_s`."""
    stop_s: float = 0.0
    """How long a replica without requests still holds its GPUs when it is let go, while Serve ends it."""
    price_per_gpu_h: float = GPU_PRICES_PER_H["H100"]

    def __post_init__(self) -> None:
        """Raises ProfileError."""
        if self.parked_engines is not None and self.parked_engines != int(self.parked_engines):
            raise ProfileError(f"profile.parked_engines: {self.parked_engines!r} is not a whole number")
        if self.parked_engines == 0 and self.base == Rung.PARKED:
            raise ProfileError(
                "profile.base: parked, though parked_engines is 0; it must be cold to template"
            )
        if self.deadline_s == math.inf and self.queue_limit < math.inf:
            raise ProfileError(
                f"profile.queue_limit: {self.queue_limit:g} goes with a finite deadline_s only, which whoever is "
                "turned away counts as having waited; with deadline_s Infinity it must be Infinity"
            )

    def rungs(self, gpus_per_replica: float, *, park: bool = True) -> tuple[RungProfile, ...]:
        """As a controller that has measured them would say, lowest first."""
        found: list[RungProfile] = []
        for rung in sorted(self.starts):
            # A controller says it only where nodes come and go, and where it does, models rest there.
            if rung == Rung.COLD < self.up_to(self.base):
                continue
            # Where there is no room, an engine that was warmed for it would be given up at once, and warmed again.
            if rung == Rung.PARKED and not (park and self.parked_engines != 0):
                continue
            start = self.starts[rung]
            found.append(
                RungProfile(
                    rung,
                    *start.measured_s(),
                    start.cost_per_s * gpus_per_replica,
                    len(start.delay_s),
                )
            )
        return (*found, RungProfile(Rung.SERVING, 0.0, 0.0, gpus_per_replica))

    def up_to(self, rung: Rung) -> Rung:
        """The highest rung up to that one from which there are starts, else the lowest of all."""
        return max((each for each in self.starts if each <= rung), default=min(self.starts))

    @property
    def applies_s(self) -> float:
        """`apply_s`, whichever way it is said."""
        return self.wake_s if self.apply_s is None else self.apply_s

    def two_states(self, delay_s: float) -> Profile:
        """Dark or lit, with one cold start time."""
        return dataclasses.replace(self, starts={Rung.TEMPLATE: Start((delay_s,))}, base=Rung.TEMPLATE)


def load_profile(path: str | Path, price_per_gpu_h: float = Profile.price_per_gpu_h) -> Profile:
    """The price is that of a file that names none. Raises ProfileError."""
    return read_profile(path, price_per_gpu_h)[0]


def read_profile(
    path: str | Path, price_per_gpu_h: float = Profile.price_per_gpu_h
) -> tuple[Profile, frozenset[str]]:
    """The same, and the fields that the file names. Raises ProfileError."""
    try:
        data = read_json(Path(path).read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ProfileError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: not JSON: {error}") from error
    except ConfigError as error:
        raise ProfileError(error.message) from None
    try:
        profile = parse_profile(data)
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from None
    named = frozenset(data)
    if "price_per_gpu_h" not in named:
        profile = dataclasses.replace(profile, price_per_gpu_h=price_per_gpu_h)
    return profile, named


def parse_profile(data: object) -> Profile:
    """From plain values: the fields of Profile, `engine` as those of Engine, `starts` as rung -> {delay_s, cost_per_s}.

    Raises ProfileError.
    """
    values = _object(data, "profile", Profile)
    if "engine" in values:
        engine = _object(values["engine"], "engine", Engine)
        slowdown = engine.pop("slowdown", ())
        _numbers(engine, "engine")
        concurrency = engine.get("concurrency", 16)
        if type(concurrency) is not int or not 1 <= concurrency <= 4096:
            raise ProfileError(f"engine.concurrency: {concurrency!r} is not a whole number from 1 to 4096")
        for name in ("prefill_tokens_per_s", "decode_s"):
            if engine.get(name, 1) <= 0:
                raise ProfileError(f"engine.{name}: {engine[name]!r} must be above 0")
        slowdowns = _delays(slowdown, "engine.slowdown")
        if 0 in slowdowns:
            raise ProfileError(f"engine.slowdown: {slowdown!r} must be above 0")
        values["engine"] = Engine(slowdown=slowdowns, **engine)
    if "starts" in values:
        starts = values["starts"]
        if not isinstance(starts, dict) or not starts:
            raise ProfileError(f"starts: {starts!r} is not an object of rungs")
        values["starts"] = {_rung(name, "starts"): _start(name, start) for name, start in starts.items()}
        if Rung.SERVING in values["starts"]:
            raise ProfileError("starts.serving: nothing starts from there; it must be cold to parked")
    if "base" in values:
        values["base"] = _rung(values["base"], "base")
    unsaid = [each.name for each in dataclasses.fields(Profile) if each.default is None]
    made = ("engine", "starts", "base")
    _numbers(
        {n: v for n, v in values.items() if n not in made and (v is not None or n not in unsaid)}, "profile"
    )
    if values.get("start_failures", 0) >= 1:
        raise ProfileError(f"profile.start_failures: {values['start_failures']!r} must be below 1")
    profile = Profile(**values)
    below = [rung for rung in profile.starts if rung <= profile.base]
    if not below:
        raise ProfileError(f"base: {profile.base.name.lower()} is below every rung of starts")
    return profile


def _start(name: str, data: object) -> Start:
    where = f"starts.{name}"
    if isinstance(data, int | float | list):
        data = {"delay_s": data}
    values = _object(data, where, Start)
    if "delay_s" not in values:
        raise ProfileError(f"{where}.delay_s: missing; it must be seconds, or a list of them")
    delays = values["delay_s"]
    if delays == []:
        raise ProfileError(f"{where}.delay_s: [] holds no seconds")
    cost = values.get("cost_per_s", 0.0)
    _numbers({"cost_per_s": cost}, where)
    return Start(_delays(delays if isinstance(delays, list) else [delays], f"{where}.delay_s"), float(cost))


def _delays(values: Sequence[Any], where: str) -> tuple[float, ...]:
    if not isinstance(values, list | tuple):
        raise ProfileError(f"{where}: {values!r} is not a list of numbers")
    _numbers({f"[{i}]": value for i, value in enumerate(values)}, where)
    return tuple(float(value) for value in values)


def _object(data: object, where: str, kind: type) -> dict[str, Any]:
    known = [each.name for each in dataclasses.fields(kind)]
    if not isinstance(data, dict):
        raise ProfileError(f"{where}: {data!r} is not an object")
    for name in data:
        if name not in known:
            raise ProfileError(f"{where}: unknown field {name!r}; there are {', '.join(known)}")
    return dict(data)


def _numbers(values: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        right = isinstance(value, int | float) and not isinstance(value, bool)
        if not right or not (0 <= value <= MOST or (name in ENDLESS and value == math.inf)):
            endless = " or Infinity" if name in ENDLESS else ""
            raise ProfileError(f"{where}.{name}: {value!r} is not a number from 0 to {MOST:g}{endless}")


def _rung(name: object, where: str) -> Rung:
    rung = {each.name.lower(): each for each in Rung}.get(name) if isinstance(name, str) else None
    if rung is None:
        raise ProfileError(f"{where}: {name!r} is none of {', '.join(each.name.lower() for each in Rung)}")
    return rung


__all__ = ["Engine", "Profile", "ProfileError", "Start", "load_profile", "parse_profile", "read_profile"]
