"""Everything that decides, put together: store, overrides, forecasts, the loop and its shadows, accounts.

One thread calls `tick`. The control API asks from other threads and is answered from memory. Whatever fails at its
start is replaced by what can do without it, and said in `health`.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from autoscaling.core.accounts import Prewarm, Usage, day_of
from autoscaling.core.budget import Budget
from autoscaling.core.decide import lapsed
from autoscaling.core.plan import BrokenPlan, Plan, from_json, to_json
from autoscaling.core.types import Decision, Forecast, Observation, Reason, Rung, Spec, State
from autoscaling.live import overrides
from autoscaling.live.actuator import LiveActuator, Publisher, RungKeeper
from autoscaling.live.clock import EARLIEST_S
from autoscaling.live.decision_log import DecisionLog
from autoscaling.live.intake import Intake
from autoscaling.live.ledger import TokenLedger
from autoscaling.live.metrics import LiveMetrics
from autoscaling.live.node_waits import NodeWaits
from autoscaling.live.nodes import NodeRequests, request_nodes
from autoscaling.live.records import ColdStartRow, Override, PrewarmRow, TrafficRow, UsageRow
from autoscaling.live.rungs import KEPT_STARTS
from autoscaling.live.setup import ControllerSetup
from autoscaling.live.shadow import ShadowWorld
from autoscaling.live.store import Store, StoreUnavailable
from autoscaling.live.tokens import data_dir
from autoscaling.loop import JUMP_S, Loop
from autoscaling.ports import Clock, ForecastSource

log = logging.getLogger("ray.serve")

SPECS_EVERY_S = 10.0
"""How often overrides are read again though nobody said that they changed: another process may share the database."""
WINDOWS_AHEAD_S = 2 * 86400.0
LEARNED_EVERY_S = 60.0
"""How often what is learned is written, where it changed."""
UNCLAIMED_AFTER_S = 5.0
"""How long a gateway has to tell of a start before it is taken for one that nobody waited for."""
KNOWN_FOR_S = 3600.0
"""For how long a start is known of whose engine nobody tells: a gateway that was silent tells of it again."""
STARTS_BACK_S = 90 * 86400.0
OPEN_PREWARM_S = 32 * 86400.0
CAPACITY_PREFIX = "capacity:"
FLEET_KEY = "fleet:"
"""Under which the store keeps what the forecaster learned of all models, beside the models' states."""
LEAST_HORIZON_S = 60.0
STORE_WAIT_S = 10.0
"""For how long a start waits for a store that can't be reached: a database that is restarted, a file that is locked."""


class ForecastService(ForecastSource, Protocol):
    """The forecaster as the planner uses it."""

    def start(self) -> None: ...
    def close(self) -> None: ...
    def watch(self, models: Sequence[str]) -> None: ...
    def restore(self, state: State) -> None: ...
    def kept(self) -> State | None: ...
    def arrived(self, model: str, time_s: float, count: int) -> None: ...
    def health(self) -> Mapping[str, Any]: ...


class NoForecasts:
    """Where the forecaster can't be had: policies then go by what they see."""

    def __init__(self, error: str) -> None:
        self._error = error

    def start(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def watch(self, models: Sequence[str]) -> None:
        """Nothing."""

    def restore(self, state: State) -> None:
        """Nothing."""

    def kept(self) -> State | None:
        """None: what was kept stays."""
        return None

    def arrived(self, model: str, time_s: float, count: int) -> None:
        """Nothing."""

    def forecast(self, model: str, now_s: float) -> Forecast | None:
        """None."""
        return None

    def health(self) -> Mapping[str, Any]:
        """Why."""
        return {"ok": False, "error": self._error}


def open_store(url: str | None, clock: Clock) -> tuple[Store, str | None, Path | None]:
    """The store, and what is wrong for good with the one that was asked for: then it is another, in a temporary folder.

    That folder is the third; whoever closes the store removes it. A database that can't be reached now is nothing
    wrong for good: the store connects when it can.
    """
    try:
        if url is None:
            folder = data_dir()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            url = f"sqlite:///{folder / 'relight.db'}"
        return Store.open(url, clock=clock), None, None
    except Exception as error:
        log.exception("the store can't be used; nothing will outlive this process")
        folder = Path(tempfile.mkdtemp(prefix="relight-store-"))
        return Store.open(f"sqlite:///{folder / 'relight.db'}", clock=clock), str(error), folder


@dataclass(frozen=True, slots=True)
class _Kept:
    """What one controller leaves to the next."""

    spent: tuple[str, float]
    """The UTC day, and its GPU-seconds."""
    prewarms: Sequence[PrewarmRow]
    """That have not ended."""


class Planner:
    """See the module. It is the control API's `ControllerView` too."""

    def __init__(
        self,
        setup: ControllerSetup,
        metrics: LiveMetrics,
        clock: Clock,
        *,
        publish: Callable[[Plan], None],
        warm: Callable[[str, Mapping[str, Any], int, float], dict[str, Any]],
        forecasts: Callable[[Store, Callable[[str], float]], ForecastService],
        nodes: NodeRequests | None = None,
    ) -> None:
        self._setup = setup
        self._metrics = metrics
        self._clock = clock
        self._publish = publish
        self._lock = threading.Lock()
        self.store, self._store_error, self._temporary = open_store(setup.store, clock)
        self._decided = DecisionLog(self.store)
        self._errors: dict[str, str] = {}
        self._override_errors: Mapping[str, str] = {}
        self._loop: Loop | None = None
        self._base = {model.id: model.spec for model in setup.models}
        self._schedules = {model.id: list(model.schedules) for model in setup.models}
        self._mode = setup.mode
        self._specs: Mapping[str, Spec] = dict(self._base)
        self._specs_at_s = -math.inf
        self._specs_until_s = -math.inf
        self._changed = threading.Event()
        self._shadow_specs: Mapping[str, Mapping[str, Spec]] = {}
        self._shadows: dict[str, tuple[ShadowWorld, Loop]] = {}
        self._ledger = TokenLedger()
        self._born_s = clock.now_s()
        self._owes = True
        self._watches = False
        self._known_starts: dict[tuple[str, float], float] = {}  # when told last, monotonic
        self._unclaimed: dict[tuple[str, float], float] = {}
        self._prewarms: dict[str, Prewarm] = {}
        self._roomless: frozenset[str] = frozenset()
        self._learned_at_s = clock.monotonic_s()
        self._last_tick_s: float | None = None
        self._tick_ms = 0.0
        self._executor = ThreadPoolExecutor(4, thread_name_prefix="relight-warm")

        # Models scale reactively meanwhile; who begins without it can't make up for all of it.
        if not self.store.attached:
            self.store.flush(STORE_WAIT_S)
        self.store.start()
        states = self.store.states()
        self.intake = Intake(self.store, clock)
        self._restore(states)
        kept = self._kept()
        plan = self._last_plan()
        self.forecasts = self._start_forecasts(forecasts, states.get(FLEET_KEY))
        self._publisher = Publisher(self._put_plan, clock, every_s=setup.plan_every_s)
        self._nodes = nodes or NodeRequests(request_nodes)
        self._waits = NodeWaits(metrics.models, clock.monotonic_s, setup.node_wait_s)
        self._rungs = RungKeeper(metrics, warm, self._executor, clock, setup.host_config)
        self._loop = self._active = Loop(
            self,
            metrics,
            self.forecasts,
            LiveActuator(
                self._publisher,
                self._rungs,
                self._nodes,
                self._waits,
                metrics,
                clock=clock,
                mode=self.mode,
                plan_expires_s=setup.plan_expires_s,
            ),
            self,
            Budget(setup.gpu_budget, setup.spend_gpu_s_per_day),
            self._remembered(states, plan),
            accounts=self,
            spent=(day_of(clock.now_s()), 0.0) if kept is None else kept.spent,
            prewarms=() if kept is None else self._open_prewarms(kept.prewarms),
        )
        self._restore_plan(plan)

    # Starting from what the store has

    def _restore(self, states: Mapping[str, State]) -> None:
        now_s = self._clock.now_s()
        self._watch(now_s)
        for model in self._base:
            if (state := states.get(CAPACITY_PREFIX + model)) is not None:
                self._metrics.capacity.restore(model, state)
            last_busy_s = _last_busy_s(states.get(model, State()))
            self._metrics.restore(model, _last_arrival_s(self.store, model, now_s), last_busy_s)

    def _watch(self, now_s: float) -> None:
        """Have the store know since when models are watched, as soon as the clock shows a time that can be."""
        self._watches = now_s >= EARLIEST_S
        if self._watches:
            self.store.add_traffic([TrafficRow(model, int(now_s)) for model in self._base])

    def _last_plan(self) -> Plan | BrokenPlan | None:
        """That of the controller before this one."""
        text = self.store.plan()
        return from_json(text) if text is not None else None

    def _remembered(self, states: Mapping[str, State], plan: Plan | BrokenPlan | None) -> dict[str, State]:
        """What the models' policies remember, as far as it still says something: of the load of some time ago it would
        have replicas lit that nobody needs. Nor did anybody look after a model that was out of the fleet meanwhile."""
        looked: Container[str] = ()
        if isinstance(plan, Plan) and self._clock.now_s() - plan.made_s <= JUMP_S:
            looked = plan.entries
        return {
            model: state if model in looked else lapsed(state)
            for model, state in states.items()
            if model in self._base
        }

    def _kept(self) -> _Kept | None:
        """What must be read from the database itself; None if that can't be now: then `_catch_up` does it."""
        try:
            kept = self._read_kept()
        except StoreUnavailable as error:
            self._errors["restore"] = str(error)
            return None
        self._owes = False
        return kept

    def _read_kept(self) -> _Kept:
        now_s = self._clock.now_s()
        day = day_of(now_s)
        starts = self.store.newest_starts(now_s - STARTS_BACK_S, KEPT_STARTS)
        usage = self.store.usage(day, day, source="active")
        prewarms = self.store.prewarms(None, now_s - OPEN_PREWARM_S)
        for row in starts:
            key = row.engine_id, row.ready_s
            if key not in self._known_starts:
                if row.ready_s >= self._born_s:
                    self._known_starts[key] = self._clock.monotonic_s()
                if row.model in self._base:
                    self._metrics.take_start(row)
        spent = day, math.fsum(gpu_s for row in usage for gpu_s in row.gpu_s.values())
        return _Kept(spent, [row for row in prewarms if row.ended_s is None and row.model in self._base])

    def _catch_up(self) -> None:
        """What could not be read at the start, once it can be. Raises StoreUnavailable."""
        now_s = self._clock.now_s()
        kept = self._read_kept()
        self._active.resume(*kept.spent)
        for row in kept.prewarms:
            # Nobody looked after it meanwhile.
            if row.model not in self._prewarms or self._prewarms[row.model].id != row.id:
                self.store.put_prewarm(replace(row, ended_s=now_s))
        for model in self._base:
            self._metrics.restore(model, _last_arrival_s(self.store, model, now_s))
        if (state := self.store.states().get(FLEET_KEY)) is not None:
            self.forecasts.restore(state)
        self._owes = False

    def _open_prewarms(self, rows: Sequence[PrewarmRow]) -> list[Prewarm]:
        """Prewarms from zero that go on. Of others it is not known any more what they came on top of: they end here."""
        now_s = self._clock.now_s()
        found: dict[str, Prewarm] = {}
        for row in rows:
            if row.reason == Reason.FORECAST_DEMAND:
                self.store.put_prewarm(replace(row, ended_s=now_s))
                continue
            profiles = {p.rung: p for p in self._metrics.rungs.profiles(row.model, {Rung.TEMPLATE: 0.0})}
            found[row.model] = Prewarm(
                id=row.id,
                model=row.model,
                begun_s=row.begun_s,
                reason=Reason(row.reason),
                replicas=row.replicas,
                rung=row.rung,
                base=0,
                delay_s=profiles[Rung.TEMPLATE].delay_s,
                ready_s=row.ready_s,
                cost_gpu_s=row.cost_gpu_s,
            )
        self._prewarms.update(found)
        return list(found.values())

    def _restore_plan(self, plan: Plan | BrokenPlan | None) -> None:
        """Have policies act on the last plan again, if it still holds, before the first tick has seen anything."""
        if isinstance(plan, BrokenPlan):
            self._errors["plan"] = plan.message
        elif plan is not None and plan.made_s <= self._clock.now_s():
            self._publisher.plan = plan
            self._look_for_room(plan)
            if self._clock.now_s() < plan.expires_s:
                try:
                    self._publish(plan)
                except Exception as error:  # noqa: BLE001 - the first tick publishes anew
                    self._errors["plan"] = repr(error)

    def _start_forecasts(
        self, make: Callable[[Store, Callable[[str], float]], ForecastService], learned: State | None
    ) -> ForecastService:
        try:
            service = make(self.store, self.horizon_s)
            service.watch(list(self._base))
            if learned is not None:
                service.restore(learned)
            service.start()
        except Exception as error:
            log.exception("there will be no forecasts")
            return NoForecasts(repr(error))
        return service

    def horizon_s(self, model: str) -> float:
        """How far ahead forecasts of a model matter: the longest that one of its own starts takes."""
        observation = self._loop.observations.get(model) if self._loop is not None else None
        delays = [p.delay_high_s for p in observation.rungs] if observation is not None else []
        return max([LEAST_HORIZON_S, *delays])

    # What comes in

    def take_report(self, gateway: str, report: Mapping[str, Any]) -> int:
        """A gateway's report. Returns up to which batch it need not send its counts again."""
        taken = self.intake.take(str(report["source"]), report["batches"])
        self._metrics.take_report(gateway, report, taken.rows)
        for row in taken.rows:
            if row.arrivals and row.model in self._base:
                self.forecasts.arrived(row.model, float(row.second), row.arrivals)
        with self._lock:
            for row in taken.rows:
                self._ledger.told(row)
            for model, seen in report["models"].items():
                self._ledger.untold(str(report["source"]), model, int(seen.get("untold", 0)))
            self._take_counters(report)
        for start in report["starts"]:
            self._take_start(start, str(report["node"]))
        return taken.sequence

    def _take_counters(self, report: Mapping[str, Any]) -> None:
        ready = {e["engine_id"]: e["ready_s"] for e in report["engines"]}
        ready |= {e["engine_id"]: e["ready_s"] for _, e in report["remote"]}
        for engine_id, counters in report["engine_counters"].items():
            model = counters["model"]
            if model not in self._base:
                continue
            numbers = {name: float(value) for name, value in counters.items() if name != "model"}
            self._metrics.capacity.read(engine_id, model, numbers)
            born_s = ready.get(engine_id)
            self._ledger.read(
                engine_id, model, numbers, since_birth=born_s is not None and born_s > self._born_s
            )

    def _take_start(self, start: Mapping[str, Any], node: str) -> None:
        model = start["model"]
        if model not in self._base:
            return
        row = ColdStartRow(
            model=model,
            engine_id=start["engine_id"],
            ready_s=start["ready_s"],
            begun_s=start["begun_s"],
            total_s=start["total_s"],
            kind=start["kind"],
            node=node,
            rung=self._metrics.start_rung(model, start["kind"], start["phases"]),
            prewarmed=start["prewarmed"],
            phases=tuple(start["phases"]),
        )
        self._add_start(row)

    def _add_start(self, row: ColdStartRow) -> None:
        self._known_starts[row.engine_id, row.ready_s] = self._clock.monotonic_s()
        self._unclaimed.pop((row.engine_id, row.ready_s), None)
        self._metrics.take_start(row)
        self.store.add_cold_start(row)

    def _find_prewarmed(self) -> None:
        """Engines that became ready and of which no gateway tells: nobody waited for them."""
        steady_s = self._clock.monotonic_s()
        # What becomes ready after the clock was set back did not do so before this controller.
        self._born_s = min(self._born_s, self._clock.now_s())
        living: set[str] = set()
        for report in self._metrics.reports().values():
            engines = [(report["node"], e) for e in report["engines"]] + list(report["remote"])
            for node, engine in engines:
                living.add(engine["engine_id"])
                ready_s = engine["ready_s"]
                key = (engine["engine_id"], ready_s)
                if ready_s is None or key in self._known_starts:
                    continue
                if ready_s < self._born_s:
                    self._known_starts[key] = steady_s  # the controller before this one told of it
                    continue
                first_s = self._unclaimed.setdefault(key, steady_s)
                if steady_s - first_s >= UNCLAIMED_AFTER_S and engine["model"] in self._base:
                    self._add_start(self._prewarmed(engine, node))
        self._unclaimed = {key: at_s for key, at_s in self._unclaimed.items() if key[0] in living}
        for key, told_s in self._known_starts.copy().items():
            if key[0] in living:
                self._known_starts[key] = steady_s
            elif steady_s - told_s >= KNOWN_FOR_S:
                del self._known_starts[key]
        with self._lock:
            sources = {str(report["source"]) for report in self._metrics.reports().values()}
            self._ledger.forget(living, sources)
            self._metrics.capacity.forget(living)

    def _prewarmed(self, engine: Mapping[str, Any], node: str) -> ColdStartRow:
        model, ready_s, begun_s = engine["model"], engine["ready_s"], engine["requested_s"]
        prewarm = self._prewarms.get(model)
        if prewarm is not None and prewarm.rung is Rung.SERVING and prewarm.begun_s < ready_s:
            # The replica's own start is part of what a prewarm takes.
            begun_s = min(begun_s, prewarm.begun_s)
        phases = [{"name": n, "start_s": s, "duration_s": d} for n, s, d in engine["phases"]]
        return ColdStartRow(
            model=model,
            engine_id=engine["engine_id"],
            ready_s=ready_s,
            begun_s=begun_s,
            total_s=round(ready_s - begun_s, 4),
            kind=engine["kind"],
            node=node,
            rung=self._metrics.start_rung(model, engine["kind"], phases),
            prewarmed=True,
            phases=tuple(phases),
        )

    # The tick

    def tick(self) -> None:
        """Look, decide, act, record. Never raises; what fails is in `health`."""
        began_s, now_s = self._clock.monotonic_s(), self._clock.now_s()
        if not self._watches:
            self._watch(now_s)
        if self._owes and self.store.attached:
            self._try("restore", self._catch_up)
        self._try("starts", self._find_prewarmed)
        self._try("tokens", lambda: self._settle_tokens(now_s))
        self._active.tick(now_s)
        self._try("shadows", lambda: self._tick_shadows(now_s))
        self._try("learned", self._keep_learned)
        self._last_tick_s, self._tick_ms = now_s, 1e3 * (self._clock.monotonic_s() - began_s)

    def _try(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if what not in self._errors:
                log.exception("the controller's %s failed", what)
            self._errors[what] = f"{type(error).__name__}: {error}"
            return
        self._errors.pop(what, None)

    def _settle_tokens(self, now_s: float) -> None:
        seen = self._active.observations

        def idle(model: str) -> bool:
            observation = seen.get(model)
            return observation is not None and observation.queued == 0 and observation.in_flight == 0

        with self._lock:
            rows = self._ledger.settle(self._clock.monotonic_s(), int(now_s), idle)
        if rows:
            self.store.add_traffic(rows)

    def _keep_learned(self) -> None:
        if self._clock.monotonic_s() - self._learned_at_s < LEARNED_EVERY_S:
            return
        self._learned_at_s = self._clock.monotonic_s()
        with self._lock:
            states = self._metrics.capacity.states()
        kept = {CAPACITY_PREFIX + model: state for model, state in states.items()}
        # Before what is in the store was read, it would be replaced by what was learned since.
        if not self._owes and (fleet := self.forecasts.kept()) is not None:
            kept[FLEET_KEY] = fleet
        self.store.put_states(kept)

    # SpecSource

    def specs(self, now_s: float) -> Mapping[str, Spec]:
        """How models are scaled now. Read anew when overrides changed, when one ends, and every few seconds."""
        steady_s = self._clock.monotonic_s()
        changed = self._changed.is_set()
        due = steady_s - self._specs_at_s >= SPECS_EVERY_S
        if not changed and not due and now_s < self._specs_until_s:
            return self._specs
        self._changed.clear()
        rows = self.store.overrides(now_s)
        wrong: dict[str, str] = {}

        def report(label: str, error: Exception) -> None:
            wrong[f"override {label}"] = str(error)

        applied = overrides.apply(self._base, rows, self._schedules, now_s, WINDOWS_AHEAD_S, report=report)
        self._override_errors = wrong
        self._mode = overrides.mode(rows, self._setup.mode, now_s)
        self._shadow_specs = overrides.shadows(applied, [*self._fleet_shadow(), *rows], now_s)
        self._specs = self._metrics.in_force = applied
        self._specs_at_s = steady_s
        self._specs_until_s = min((o.until_s for o in rows if o.until_s is not None), default=math.inf)
        return applied

    def _fleet_shadow(self) -> list[Override]:
        if self._setup.shadow is None:
            return []
        value = {name: given for name, given in self._setup.shadow.items() if given is not None}
        return [Override("fleet:shadow", "shadow", None, value, "fleet file", 0.0)]

    # Shadows

    def _tick_shadows(self, now_s: float) -> None:
        for name in self._shadows.keys() - self._shadow_specs.keys():
            del self._shadows[name]
        for name in self._shadow_specs:
            if name not in self._shadows:
                world = ShadowWorld(name)
                world.specs_of = lambda _now_s, name=name: self._shadow_specs[name]  # type: ignore[misc]
                sink = _ShadowSink(self.store, f"shadow:{name}")
                loop = Loop(world, world, self.forecasts, world, sink, self._active.budget, accounts=sink)
                self._shadows[name] = (world, loop)
            world, loop = self._shadows[name]
            world.saw(self._active.observations)
            loop.tick(now_s)

    # Actuator's plan, DecisionSink, AccountSink

    def _put_plan(self, plan: Plan) -> None:
        # Into the store first: what policies act on must be what a successor goes on from.
        self.store.put_plan(to_json(plan))
        self._publish(plan)
        self._look_for_room(plan)

    def _look_for_room(self, plan: Plan) -> None:
        """Note which models it leaves no replica. Of one of which too little is known to decide there is no news."""
        self._roomless = frozenset(
            model
            for model, entry in plan.entries.items()
            if entry.ceiling == 0 or (entry.replicas is None and model in self._roomless)
        )

    def record(
        self,
        now_s: float,
        observations: Mapping[str, Observation],
        decisions: Sequence[Decision],
        states: Mapping[str, State],
    ) -> None:
        """Keep decisions that changed, and what policies remember. In the mode `off` nothing is decided."""
        if self._mode != "off":
            self._decided.add(decisions, "active" if self._mode == "active" else "shadow")
        if states:
            self.store.put_states(states)

    def account(self, now_s: float, usage: Sequence[Usage], prewarms: Sequence[Prewarm]) -> None:
        """Keep what was used; prewarms only where they were really made."""
        rows = [usage_row(row, "active") for row in usage]
        # Once more for every shadow, from its beginning on and of its models: what it is compared with.
        for name in self._shadows:
            shadowed = self._shadow_specs.get(name, {})
            rows += [usage_row(row, f"beside:{name}") for row in usage if row.model in shadowed]
        self.store.add_usage(rows)
        if self._mode != "active":
            return
        for prewarm in prewarms:
            self._prewarms[prewarm.model] = prewarm
            self.store.put_prewarm(prewarm_row(prewarm))

    # ControllerView

    def now_s(self) -> float:
        return self._clock.now_s()

    def models(self) -> Mapping[str, Spec]:
        return self._specs

    def base_models(self) -> Mapping[str, Spec]:
        return self._base

    def fleet_schedules(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        return self._schedules

    def aliases(self) -> Mapping[str, str]:
        return {alias: model.id for model in self._setup.models for alias in model.aliases}

    def mode(self) -> str:
        return self._mode

    def parks(self) -> bool:
        return self._metrics.parks

    def observations(self) -> Mapping[str, Observation]:
        return self._active.observations

    def decisions(self) -> Mapping[str, Decision]:
        return dict(self._active.decisions)

    def shadow_decisions(self) -> Mapping[str, Mapping[str, Decision]]:
        return {name: dict(loop.decisions) for name, (_, loop) in dict(self._shadows).items()}

    def forecast(self, model: str) -> Forecast | None:
        return self.forecasts.forecast(model, self._clock.now_s())

    def plan(self) -> Plan | None:
        return self._publisher.plan

    def overrides_changed(self) -> None:
        self._changed.set()

    def health(self) -> Mapping[str, Any]:
        """Of every part. `ok` is whether all is well."""
        store = dict(self.store.health())
        if self._store_error is not None:
            store |= {"ok": False, "error": self._store_error}
        forecaster = dict(self.forecasts.health())
        errors = {**self._errors, **self._override_errors, **self._active.errors}
        for name, (_, loop) in dict(self._shadows).items():
            errors |= {f"shadow {name}: {what}": error for what, error in loop.errors.items()}
        errors |= {f"warm {model}": reason for model, reason in dict(self._rungs.failures).items()}
        return {
            "ok": bool(store["ok"]) and bool(forecaster.get("ok", True)) and not errors,
            "mode": self._mode,
            "store": store,
            "forecaster": forecaster,
            "last_tick_s": self._last_tick_s,
            "tick_ms": round(self._tick_ms, 3),
            "errors": errors,
        }

    def node_waits(self) -> Mapping[str, str]:
        """Model -> which node it waits for, of those that wait for one."""
        return self._waits.texts()

    def no_room(self) -> tuple[Mapping[str, str], float]:
        """Model -> why it may have no replica now, of those that the plan leaves none: gateways hold their requests.

        And for how many seconds that holds.
        """
        plan, budget = self._publisher.plan, self._setup.gpu_budget
        # No longer than a plan is made for, also while the clock has just been set back.
        left_s = 0.0 if plan is None else plan.expires_s - max(self._clock.now_s(), plan.made_s)
        if budget is None or plan is None or left_s <= 0 or self._mode != "active":
            return {}, 0.0
        why = f"waits for GPUs: others hold those of controller.gpu_budget ({budget:g})"
        return dict.fromkeys(sorted(self._roomless), why), left_s

    def let_nodes_go(self) -> None:
        """Ask for no nodes ahead any more. Raises what Ray raises."""
        self._nodes.ask(self._clock.monotonic_s(), [])

    def close(self) -> None:
        """Write what waits, and end what was started."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self.forecasts.close()
        self.store.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)


class _ShadowSink:
    """Keeps a shadow's decisions and costs under its own name."""

    def __init__(self, store: Store, source: str) -> None:
        self._store = store
        self._decided = DecisionLog(store)
        self._source = source

    def record(
        self,
        now_s: float,
        observations: Mapping[str, Observation],
        decisions: Sequence[Decision],
        states: Mapping[str, State],
    ) -> None:
        self._decided.add(decisions, self._source)

    def account(self, now_s: float, usage: Sequence[Usage], prewarms: Sequence[Prewarm]) -> None:
        self._store.add_usage([usage_row(row, self._source) for row in usage])


def usage_row(usage: Usage, source: str) -> UsageRow:
    """As the store keeps it."""
    return UsageRow(
        model=usage.model,
        day=usage.day,
        source=source,
        gpu_s=usage.gpu_s,
        requests=usage.requests,
        cold_requests=usage.cold_requests,
        waited_s=usage.waited_s,
        cold_starts=usage.cold_starts,
    )


def prewarm_row(prewarm: Prewarm) -> PrewarmRow:
    """As the store keeps it."""
    return PrewarmRow(
        id=prewarm.id,
        model=prewarm.model,
        begun_s=prewarm.begun_s,
        reason=prewarm.reason.value,
        replicas=prewarm.replicas,
        rung=prewarm.rung,
        ready_s=prewarm.ready_s,
        hit_s=prewarm.hit_s,
        ended_s=prewarm.ended_s,
        cost_gpu_s=prewarm.cost_gpu_s,
        spared_requests=prewarm.spared_requests,
        spared_wait_s=prewarm.spared_wait_s,
    )


def _last_busy_s(state: State) -> float | None:
    """When a request was last queued or in flight, as the last decision had it: at that time, if one was then."""
    return state.values.get("idle_since_s", state.values.get("now_s"))


def _last_arrival_s(store: Store, model: str, now_s: float) -> float | None:
    """By the finest level that knows one: the second in which it came, or the last in which it can have come."""
    for buckets in store.traffic(model, now_s).levels:
        came = np.flatnonzero(buckets.arrivals > 0)
        if len(came):
            last = came[-1]
            _, trail_s = buckets.silent_s
            end_s = (int(buckets.index[last]) + 1) * buckets.step_s
            return min(now_s, end_s - int(trail_s[last]) - 1)
    return None
