"""From options and a fleet file to what is replayed: specs, profile, prices, and the source's models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autoscaling.commands import options
from autoscaling.commands.failures import WRONG, CommandError

if TYPE_CHECKING:
    from autoscaling.core.types import Spec, Window
    from autoscaling.sim.compare import Base
    from autoscaling.sim.group import Limits
    from autoscaling.sim.profile import Profile
    from autoscaling.sim.starts import Measured
    from autoscaling.traces import Source
    from deployments.fleet import Fleet, Model


@dataclass(frozen=True)
class Given:
    """Options that say what is replayed, as they were given."""

    fleet: Path | None = None
    profile: Path | None = None
    cold_start: str | None = None
    gpu: str | None = None
    prices: Sequence[str] = field(default_factory=tuple)
    seed: int = 0
    scale: float = 1.0
    measure_from: str | None = None
    until: str | None = None


def base_of(source: Source, given: Given) -> Base:
    """All that does not differ between policies. Raises CommandError, ConfigError, TraceError."""
    from autoscaling.core.types import Spec
    from autoscaling.sim.compare import Base
    from autoscaling.sim.replay import Setup
    from autoscaling.sources import Renamed
    from autoscaling.traces import until

    prices = price_table(given.prices)
    profile, named, starts = _profile(source, given, prices)
    profile = _priced(profile, given, prices)
    fleet = None if given.fleet is None else _fleet(given.fleet)
    limits: Mapping[str, Limits] = {}
    if fleet is not None:
        if "gpus" not in named:
            profile = replace(profile, gpus=fleet.controller.gpu_budget)
        limits = _limits(profile, fleet, named)
        aliases = {alias: model.id for model in fleet.models for alias in model.aliases}
        if aliases:
            source = Renamed(source, aliases)
            starts = None if starts is None else starts.renamed(aliases)
    setup = Setup(
        profile=profile,
        seed=given.seed,
        scale=given.scale,
        measure_from_s=options.duration(given.measure_from, "--measure-from") or 0.0,
        until_s=options.duration(given.until, "--until"),
        limits=limits,
        starts={} if starts is None else starts.own(profile),
    )
    spec = Spec(
        "", wait_cost=10.0, max_replicas=64, target_ongoing_requests=float(profile.engine.concurrency)
    )
    if fleet is not None:
        specs: Mapping[str, Spec] | None = _specs(fleet, source, setup.until_s)
        by_model = _prices_by_model(fleet, given, prices)
        return Base(source, setup, specs, spec, by_model, _unused(given, prices, named, fleet))
    notes = _unused(given, prices, named)
    if profile.gpus is not None or profile.parked_engines is not None:
        # Models that share something are named before the replay.
        names = sorted({row.model for row in until(source.rows(), setup.until_s)})
        return Base(source, setup, {name: replace(spec, model=name) for name in names}, spec, notes=notes)
    return Base(source, setup, None, spec, notes=notes)


def price_table(given: Sequence[str]) -> dict[str, float]:
    """The prices that Relight knows, with those that were given as TYPE=NUMBER. Raises CommandError."""
    from autoscaling.sim.prices import GPU_PRICES_PER_H
    from autoscaling.sim.profile import MOST

    table = dict(GPU_PRICES_PER_H)
    for text in given:
        name, _, value = text.partition("=")
        try:
            price = float(value)
        except ValueError:
            price = -1.0
        if not name or not 0 <= price <= MOST:
            raise CommandError(f"--price: {text!r} is not TYPE=NUMBER, like H100=2.5", WRONG)
        table[name] = price
    return table


def _profile(
    source: Source, given: Given, prices: Mapping[str, float]
) -> tuple[Profile, frozenset[str], Measured | None]:
    """And the fields that its file names, and the start times that it has, if these were measured."""
    from autoscaling.sim.profile import Profile, ProfileError, read_profile
    from autoscaling.sim.starts import measured, read_starts
    from autoscaling.sources import StoredSource

    profile, named = Profile(), frozenset[str]()
    starts: Measured | None = None
    given_file = None if given.cold_start is None else Path(given.cold_start)
    try:
        if given.profile is not None:
            profile, named = read_profile(given.profile, prices["H100"])
        if given_file is None:
            if isinstance(source, StoredSource) and "starts" not in named:
                starts = source.starts()
        elif given_file.exists() and not given_file.is_dir():
            starts = read_starts(given_file)
        else:
            delay_s = options.duration(given.cold_start, "--cold-start", zero=True)
            profile = profile.two_states(delay_s or 0.0)
        if starts is not None:
            profile = measured(profile, starts.together)
    except ProfileError as error:
        raise CommandError(str(error), WRONG) from None
    return profile, named, starts


def _priced(profile: Profile, given: Given, prices: Mapping[str, float]) -> Profile:
    from autoscaling.sim.prices import price_of

    if given.gpu is None:
        if given.profile is None:
            return replace(profile, price_per_gpu_h=prices["H100"])
        return profile
    price = price_of([given.gpu], prices)
    if price is None:
        raise CommandError(
            f"--gpu: {given.gpu!r} has no price; there are {', '.join(prices)}. --price {given.gpu}=NUMBER sets one",
            WRONG,
        )
    return replace(profile, price_per_gpu_h=price)


def _prices_by_model(fleet: Fleet, given: Given, prices: Mapping[str, float]) -> dict[str, float]:
    from autoscaling.sim.prices import price_of

    if given.gpu is not None:
        return {}
    found = {model.id: price_of(_types(model), prices) for model in fleet.models}
    return {name: price for name, price in found.items() if price is not None}


def _unused(
    given: Given, prices: Mapping[str, float], named: frozenset[str], fleet: Fleet | None = None
) -> tuple[str, ...]:
    """Notes of prices that were given and that no model pays."""
    from autoscaling.sim.prices import priced_as

    if given.gpu is not None:
        paid = {priced_as([given.gpu], prices)}
    else:
        # None: what has no price of its own.
        paid = {None} if fleet is None else {priced_as(_types(model), prices) for model in fleet.models}
        if None in paid and "price_per_gpu_h" not in named:
            paid.add("H100")
    types = ", ".join(sorted(each for each in paid if each is not None))
    of = f"that of {types}" if types else "the profile's price_per_gpu_h"
    return tuple(
        f"--price {text} changes nothing, for what is paid is {of}; --gpu names another type"
        for text in given.prices
        if text.partition("=")[0] not in paid
    )


def _types(model: Model) -> list[str]:
    return model.resources.accelerator_types if model.resources.gpus else ["CPU"]


def _fleet(file: Path) -> Fleet:
    from deployments.fleet import load_fleet

    return load_fleet(file)


def _limits(profile: Profile, fleet: Fleet, named: frozenset[str]) -> dict[str, Limits]:
    """Each model's own, but for what the profile names. Raises CommandError."""
    from autoscaling.sim.group import Limits
    from autoscaling.sim.profile import ProfileError

    found = {}
    for model in fleet.models:
        limits = Limits(
            profile.deadline_s if "deadline_s" in named else model.limits.request_deadline_s,
            profile.queue_limit
            if "queue_limit" in named
            else float(fleet.gateway.max_replicas * model.limits.max_queued),
        )
        try:
            limits.applied(profile)
        except ProfileError as error:
            raise CommandError(f"limits of {model.id}: {error}", WRONG) from None
        found[model.id] = limits
    return found


def _specs(fleet: Fleet, source: Source, until_s: float | None) -> dict[str, Spec]:
    from deployments.scaling import scaling_spec

    specs = {model.id: scaling_spec(model) for model in fleet.models}
    if fleet.engine_host.park_memory_bytes == 0:
        # Where no memory is set aside for it, nothing is parked.
        specs = {name: replace(spec, park=False) for name, spec in specs.items()}
    if not any(model.scaling.schedules for model in fleet.models):
        return specs
    begins_s, ends_s = _span(source, until_s)
    for model in fleet.models:
        windows = _windows(model, begins_s, ends_s)
        specs[model.id] = replace(specs[model.id], windows=windows)
    return specs


def _span(source: Source, until_s: float | None) -> tuple[float, float]:
    """Unix seconds of the first row and of the latest end of any window, as the replay places them."""
    from autoscaling.sim.arrivals import ORIGIN_S, UNIX_S
    from autoscaling.traces import until

    first_s = last_s = 0.0
    for count, row in enumerate(until(source.rows(), until_s)):
        first_s = row.time_s if count == 0 else first_s
        last_s = max(last_s, row.time_s + row.window_s)
    origin_s = 0.0 if first_s > UNIX_S else ORIGIN_S
    return first_s + origin_s, last_s + origin_s


def _windows(model: Model, begins_s: float, ends_s: float) -> tuple[Window, ...]:
    from autoscaling.core.types import Rung, Window
    from autoscaling.live.cron import Cron, spans

    found = [
        Window(start_s, end_s, schedule.replicas, Rung[schedule.rung.upper()], id=schedule.cron)
        for schedule in model.scaling.schedules
        for start_s, end_s in spans(
            Cron(schedule.cron, schedule.duration_s, schedule.timezone), begins_s, ends_s
        )
    ]
    return tuple(sorted(found, key=lambda window: window.start_s))


__all__ = ["Given", "base_of", "price_table"]
