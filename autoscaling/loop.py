"""One tick: observe, decide where something happened, fit the budget, act, record, account. No clock, no I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, ParamSpec, TypeVar

from autoscaling.core.accounts import NO_ACCOUNT, NOTHING, Account, Prewarm, Usage, book, day_of, unmet
from autoscaling.core.budget import Budget, clamp
from autoscaling.core.decide import decide, hold, lapsed
from autoscaling.core.types import Decision, Forecast, Observation, Spec, State
from autoscaling.ports import AccountSink, Actuator, DecisionSink, ForecastSource, MetricsSource, SpecSource

P = ParamSpec("P")
T = TypeVar("T")

JUMP_S = 60.0
"""A tick so much later than the one before: the clock jumped, or the machine slept."""
STALE_S = 10.0
"""What was seen longer ago than this is not known any more."""
REFORECAST_S = 10.0
"""How often a model's forecast is asked for, to see whether it was fitted anew, while nothing else happens."""
SPENT_DAYS = 3
"""Of so many days what was spent is kept: a clock that is set goes on in another one, and may come back."""

_NO_STATE = State()


class Stands(NamedTuple):
    """For which requests in progress a decision stands: see `Decision.loads` and `Decision.silence_s`."""

    least: int
    most: int
    silence_s: float


class Loop:
    """Decides for a fleet, tick by tick. One thread at a time.

    A model is decided anew when its observation or its spec changed in what matters, when its forecast was fitted anew,
    or when its decision's `until_s` has passed; else its decision stands. Nothing that fails at a tick stops it: what
    failed is in `errors` until it works again, the model whose policy raised is held, and the others go on.
    """

    def __init__(  # noqa: PLR0917 - one for each port, in the order of a tick
        self,
        specs: SpecSource,
        metrics: MetricsSource,
        forecasts: ForecastSource,
        actuator: Actuator,
        sink: DecisionSink,
        budget: Budget | None = None,
        states: Mapping[str, State] | None = None,
        *,
        accounts: AccountSink | None = None,
        spent: tuple[str, float] = ("", 0.0),
        prewarms: Iterable[Prewarm] = (),
        jump_s: float = JUMP_S,
        reforecast_s: float = REFORECAST_S,
        usage: bool = True,
    ) -> None:
        """`states`, `spent` (the UTC day, and the GPU-seconds spent in it) and `prewarms` (those that had neither been
        met nor given up) are what a restarted loop goes on from; states of longer ago than JUMP_S as
        `core.decide.lapsed` leaves them.

        `jump_s` is infinite for a simulation that skips the time in which nothing happens; `usage` is False for one
        that counts itself what is used. What is spent is counted all the same where a day's spend is bounded.
        """
        self._spec_source = specs
        self._metrics = metrics
        self._forecasts = forecasts
        self._actuator = actuator
        self._sink = sink
        self._account_sink = accounts
        self.budget = budget or Budget()
        self._states = dict(states or {})
        self._jump_s = jump_s
        self._reforecast_s = reforecast_s
        self._usage = usage
        self._last_s: float | None = None
        self._day, spent_gpu_s = spent
        # UTC day -> GPU-seconds, the day that was present last at the end.
        self._spent = {self._day: spent_gpu_s}
        self._specs: dict[str, Spec] = {}
        self._seen: dict[str, Observation] = {}
        self._made: dict[str, Decision] = {}
        self._stands: dict[str, Stands | None] = {}
        self._clamped: dict[str, Decision] = {}
        self._fits: dict[str, float | None] = {}
        self._ask_s: dict[str, float] = {}
        self._ends_s: dict[str, float] = {}
        self._spread: dict[str, float] = {}
        self._accounts = {prewarm.model: Account(prewarm=prewarm) for prewarm in prewarms}
        self._errors: dict[str, str] = {}

    @property
    def decisions(self) -> Mapping[str, Decision]:
        """What stands, by model, within the budget."""
        return self._clamped

    @property
    def observations(self) -> Mapping[str, Observation]:
        """What the last tick saw; models that it did not see are unknown."""
        return self._seen

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    @property
    def states(self) -> Mapping[str, State]:
        return self._states

    @property
    def errors(self) -> Mapping[str, str]:
        """What failed and has not worked since: "metrics", "specs", "actuator", "sink", "accounts", "model NAME"..."""
        return self._errors

    @property
    def spent_gpu_s(self) -> float:
        """GPU-seconds of the present UTC day."""
        return self._spent.get(self._day, 0.0)

    def resume(self, day: str, spent_gpu_s: float) -> None:
        """What was spent of a UTC day, this loop's part included: where it began without knowing that."""
        self._day = self._day or day
        self._spent[day] = max(self._spent.get(day, 0.0), spent_gpu_s)

    def next_s(self) -> float:
        """The earliest `until_s` of all that stands."""
        next_s = math.inf
        for decision in self._made.values():
            next_s = min(next_s, decision.until_s)
        if self.budget.gpus is not None:
            # Of those that wait for their turn.
            for decision in self._clamped.values():
                next_s = min(next_s, decision.until_s)
        return next_s

    def looks_s(self) -> float:
        """The earliest end of a forecast within which nothing was to be done: the next may see something.

        It comes for ever, and what is decided then is no news.
        """
        return min(self._ends_s.values(), default=math.inf)

    def stands_for(self, model: str) -> Stands | None:
        """For which requests in progress a tick would do nothing for a model, until what it decided ends, as long as
        nothing else is seen to change. None: whatever comes must be looked at.

        Where models share a budget, or what they use is counted, each tick counts.
        """
        if (
            self._errors
            or self._usage
            or self.budget.gpus is not None
            or self.budget.gpu_s_per_day is not None
        ):
            return None
        stands = self._stands.get(model)
        account = self._accounts.get(model)
        if stands is not None and account is not None and account.prewarm is not None:
            most = unmet(account.prewarm, self._specs[model], self._seen[model])
            return None if most is None else stands._replace(most=math.floor(min(stands.most, most)))
        return stands

    def tick(self, now_s: float) -> list[Decision]:
        """The decisions that were made or changed at this tick. Never raises."""
        if not math.isfinite(now_s):
            self._errors["clock"] = f"now is {now_s}"
            return []
        errors = self._errors
        if errors:
            errors.pop("clock", None)
        last_s, self._last_s = self._last_s, now_s
        jumped = last_s is not None and now_s - last_s > self._jump_s
        back = last_s is not None and now_s < last_s
        found = self._try("specs", _told, self._spec_source.specs, now_s)
        specs = self._specs if found is None else found
        observed = self._try("metrics", _told, self._metrics.observe, now_s) or {}
        oldest_s = now_s - STALE_S
        observations: dict[str, Observation] = {}
        self._drop(specs)
        if jumped:
            self._states = {model: lapsed(state) for model, state in self._states.items()}
        states: dict[str, State] = {}
        for model, spec in specs.items():
            seen = observed.get(model)
            if seen is None or seen.now_s < oldest_s:
                seen = Observation(now_s)
            observations[model] = seen
            if jumped:
                # Nothing is concluded from times that lie across the jump; the next tick goes on.
                self._made[model] = hold(spec, seen, until_s=now_s)
                self._stands[model] = None
                self._ends_s[model] = math.inf
                continue
            forecast = self._news(model, spec, seen, now_s, back=back)
            if forecast is not False:
                state = self._decide(model, spec, seen, forecast)
                if state is not None:
                    states[model] = state
        self._specs = specs
        self._seen = {model: seen for model, seen in observations.items() if model in observed}
        before = self._clamped
        spent_gpu_s = self._spent_on(now_s)
        after = self._clamped = clamp(
            self.budget, specs, observations, self._made, spent_gpu_s, before=before
        )
        fresh = [
            decision
            for model, decision in after.items()
            if decision is not (then := before.get(model)) and decision != then
        ]
        self._try("actuator", self._actuator.apply, now_s, specs, list(after.values()))
        self._try("sink", self._sink.record, now_s, self._seen, fresh, states)
        self._book(now_s)
        return fresh

    def _news(
        self, model: str, spec: Spec, observation: Observation, now_s: float, *, back: bool
    ) -> Forecast | bool | None:
        """The forecast to decide with, or False if the decision stands."""
        made = self._made.get(model)
        stands = (
            made is not None
            and not back
            and now_s < made.until_s
            and now_s < self._ends_s[model]
            and _same(self._seen.get(model), observation)
            and ((before := self._specs.get(model)) is spec or before == spec)
            and not (self._errors and f"model {model}" in self._errors)
        )
        if stands and now_s < self._ask_s.get(model, -math.inf):
            return False
        forecast = self._try(f"forecast {model}", self._forecasts.forecast, model, now_s)
        spread = self._spread.get(model)
        if spread is None:
            # Asked at different moments, so that a fleet's forecasts don't all come at one tick.
            spread = self._spread[model] = 0.5 + (hash((len(model), sum(model.encode()))) % 64) / 64
        self._ask_s[model] = now_s + self._reforecast_s * spread
        fit = _fit(forecast)
        if stands and self._fits.get(model) == fit:
            return False
        self._fits[model] = fit
        return forecast

    def _decide(
        self, model: str, spec: Spec, observation: Observation, forecast: Forecast | bool | None
    ) -> State | None:
        before = self._states.get(model, _NO_STATE)
        known = forecast if isinstance(forecast, Forecast) else None
        self._ends_s[model] = math.inf
        try:
            state, decision = decide(spec, before, observation, known)
        except Exception as error:  # noqa: BLE001 - whatever one model's policy raises, the others are decided
            self._errors[f"model {model}"] = f"{type(error).__name__}: {error}"
            self._made[model] = hold(spec, observation, until_s=observation.now_s)
            self._stands[model] = None
            return None
        if self._errors:
            self._errors.pop(f"model {model}", None)
        # Those of the decision that says the same may be others.
        self._stands[model] = None if decision.loads is None else Stands(*decision.loads, decision.silence_s)
        if decision.until_s == math.inf and known is not None and known.next_arrival is not None:
            self._ends_s[model] = known.next_arrival.end_s
        made = self._made.get(model)
        # The same again is not made anew: neither recorded nor published as news.
        if made is None or not _says(decision, made):
            self._made[model] = decision
        self._states[model] = state
        return state if state != before else None

    def _drop(self, specs: Mapping[str, Spec]) -> None:
        if self._made.keys() <= specs.keys():
            return
        for model in self._made.keys() - specs.keys():
            for kept in (
                self._made,
                self._stands,
                self._states,
                self._fits,
                self._ask_s,
                self._ends_s,
                self._spread,
                self._accounts,
            ):
                kept.pop(model, None)
            self._errors.pop(f"model {model}", None)
            self._errors.pop(f"forecast {model}", None)

    def _spent_on(self, now_s: float) -> float:
        day = day_of(now_s)
        if day != self._day:
            self._day = day
            self._spent[day] = self._spent.pop(day, 0.0)
            while len(self._spent) > SPENT_DAYS:
                del self._spent[next(iter(self._spent))]
        return self._spent[day]

    def _book(self, now_s: float) -> None:
        usage: list[Usage] = []
        prewarms: list[Prewarm] = []
        used = self._usage or self.budget.gpu_s_per_day is not None
        for model, observation in self._seen.items():
            account, booking = book(
                self._accounts.get(model) or NO_ACCOUNT,
                self._specs[model],
                observation,
                self._clamped.get(model),
                used=used,
            )
            self._accounts[model] = account
            if booking is not NOTHING:
                usage += booking.usage
                prewarms += booking.prewarms
        for day in {row.day for row in usage} & self._spent.keys():
            self._spent[day] += math.fsum(
                gpu_s for row in usage if row.day == day for gpu_s in row.gpu_s.values()
            )
        sink = self._account_sink
        if sink is not None and (usage or prewarms):
            self._try("accounts", sink.account, now_s, usage, prewarms)

    def _try(self, what: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            result = call(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - a port that fails is unknown, and is said
            self._errors[what] = f"{type(error).__name__}: {error}"
            return None
        if self._errors:
            self._errors.pop(what, None)
        return result


def _told(call: Callable[[float], Mapping[str, T]], now_s: float) -> dict[str, T]:
    """As it is now: a source may change what it gave."""
    return dict(call(now_s))


def _same(before: Observation | None, now: Observation) -> bool:
    """Nothing that decides differs. When a loaded model was last busy is always now."""
    if before is None:
        # Never seen and still unseen is the same unknown.
        return now.ready is None and now.queued is None and now.in_flight is None
    return (
        before.queued == now.queued
        and before.in_flight == now.in_flight
        and not now.arrivals
        and before.ready == now.ready
        and before.starting == now.starting
        and before.target == now.target
        and before.rung == now.rung
        and (before.last_busy_s == now.last_busy_s or bool(now.queued or now.in_flight))
        and before.rungs == now.rungs
        and before.capacity == now.capacity
    )


def _says(decision: Decision, made: Decision) -> bool:
    """The same as that one, but for when and from which numbers."""
    return (
        decision.replicas == made.replicas
        and decision.rung == made.rung
        and decision.reason == made.reason
        and decision.until_s == made.until_s
        and decision.policy == made.policy
        and decision.clamps == made.clamps
        and decision.model == made.model
    )


def _fit(forecast: Forecast | None) -> float | None:
    if forecast is None:
        return None
    return forecast.made_s if forecast.fitted_s is None else forecast.fitted_s


__all__ = ["JUMP_S", "REFORECAST_S", "STALE_S", "Loop"]
