"""The controller's own cost: a fleet of many models with two weeks of history each, on this machine.

What runs is the controller's planner with its real store (SQLite), forecasts (in processes of their own), loop and
accounts; Ray is left out: reports are those that a gateway would send, the plan goes nowhere. A share of the models is
asked for at any time, and every tick new requests come.

`policy call` is what Serve's controller pays: one call of the policy class of each model on the published plan.
"""

from __future__ import annotations

import random
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import clusters
from bench.clusters import say
from bench.numbers import percentile, table

NODE = "node-1"
DAY_S = 86400.0
HISTORY_S = 14 * DAY_S
PATIENCE_S = 600.0


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--models", type=int, default=1000, help="default: 1000")
    parser.add_argument("--ticks", type=int, default=120, help="ticks that are timed (default: 120)")
    parser.add_argument(
        "--busy", type=float, default=0.1, help="share of models with requests at a time (default: 0.1)"
    )
    parser.add_argument("--processes", type=int, default=2, help="that fit forecasts (default: 2)")
    parser.add_argument("--seed", type=int, default=0)


def kind_of(number: int) -> str:
    """Half of the fleet is asked for rarely, and one in twenty all the time."""
    place = number % 20
    return "dense" if place == 0 else "timer" if place < 4 else "daily" if place < 10 else "sparse"


def history(options: Namespace, now_s: float) -> Iterator[tuple[str, float, int, int, int, float]]:
    """Two weeks, minute by minute: (model, time_s, arrivals, input tokens, output tokens, busy_s)."""
    minutes = int(HISTORY_S / 60)
    begin_s = (now_s // 60 - minutes) * 60
    for number in range(options.models):
        rng = random.Random(f"{options.seed}/{number}")
        model, kind = name(number), kind_of(number)
        gap = rng.choice((15, 30, 60, 360))
        rate = rng.uniform(0.0005, 0.01)
        for minute in range(minutes):
            at_s = begin_s + 60 * minute
            hour = at_s % DAY_S / 3600
            if kind == "timer":
                count = int(minute % gap == 0)
            elif kind == "dense":
                count = int(rng.gauss(40 if 8 <= hour < 20 else 12, 4))
            else:
                by_day = (3.0 if 8 <= hour < 20 else 0.1) if kind == "daily" else 1.0
                count = int(rng.random() < rate * by_day * 3)
            if count > 0:
                yield model, at_s, count, 200 * count, 100 * count, 2.0 * count


def name(number: int) -> str:
    return f"model-{number}"


class Gateway:
    """What one gateway would report."""

    def __init__(self, options: Namespace) -> None:
        self._rng = random.Random(options.seed)
        self._models = [name(i) for i in range(options.models)]
        self._busy = set(self._rng.sample(self._models, int(options.models * options.busy)))
        self._seen: dict[str, dict[str, Any]] = {
            model: {
                "queued": 0,
                "in_flight": 0,
                "last_cold_start": None,
                "failure": None,
                "seen_ready": False,
                "last_arrival_s": None,
                "last_busy_s": None,
                "untold": 0,
            }
            for model in self._models
        }
        self._sequence = 0

    @property
    def busy(self) -> set[str]:
        return self._busy

    def report(self, now_s: float) -> dict[str, Any]:
        """One second: some models end, others begin, the busy ones get requests."""
        rng = self._rng
        for _ in range(max(1, len(self._busy) // 50)):
            gone = rng.choice(sorted(self._busy))
            self._busy.discard(gone)
            self._seen[gone] |= {"in_flight": 0}
            self._busy.add(rng.choice(self._models))
        rows = []
        for model in self._busy:
            count = rng.randint(0, 2)
            self._seen[model] |= {"in_flight": rng.randint(1, 8), "last_busy_s": now_s}
            if count:
                self._seen[model] |= {"last_arrival_s": now_s}
                rows.append([model, int(now_s), count, 200 * count, 100 * count, 1.0, 0.0])
        self._sequence += 1
        return {
            "source": "gateway-1",
            "batches": [[self._sequence, rows]],
            "node": NODE,
            "host_up": True,
            "engines": [],
            "remote": [],
            "host_models": [
                {
                    "model": m,
                    "rung": "template",
                    "template": {"state": "ready", "memory_bytes": 0},
                    "source": {},
                }
                for m in self._models
            ],
            "models": {model: dict(seen) for model, seen in self._seen.items()},
            "starts": [],
            "engine_counters": {},
        }


class Seconds:
    """Plays one second after another to a planner, and times what each part of it takes."""

    def __init__(self, options: Namespace, metrics: Any, clock: Any) -> None:
        self._models = [name(i) for i in range(options.models)]
        self._metrics = metrics
        self._clock = clock
        self._gateway = Gateway(options)
        self.reports: list[float] = []

    def cluster(self) -> None:
        """What Ray and Serve would say: one large node, and a replica for each model that is asked for."""
        from autoscaling.live.metrics import ServeView
        from autoscaling.live.nodes import Node

        self._metrics.take_nodes([Node(NODE, {"GPU": float(len(self._models))})], autoscaler=False)
        lit = {m: int(m in self._gateway.busy) for m in self._models}
        self._metrics.take_serve({f"model-{m}": ServeView(n, 0, n, {}) for m, n in lit.items()})

    def play(self, planner: Any, ticks: list[float]) -> None:
        """One second, begun now and over in a second."""
        began_s = time.perf_counter()
        report = self._gateway.report(self._clock.now_s())
        at_s = time.perf_counter()
        planner.take_report("gateway-1", report)
        self.reports.append(time.perf_counter() - at_s)
        self.cluster()
        at_s = time.perf_counter()
        planner.tick()
        ticks.append(time.perf_counter() - at_s)
        time.sleep(max(0.0, 1.0 - (time.perf_counter() - began_s)))


def _import(options: Namespace, url: str, clock: Any) -> tuple[int, float]:
    from autoscaling.live.store import Store

    store = Store.open(url, clock=clock)
    store.start()
    began_s = time.perf_counter()
    imported = store.import_traffic(history(options, clock.now_s()), 60.0)
    took_s = time.perf_counter() - began_s
    store.close()
    return imported, took_s


def _setup(options: Namespace, url: str) -> Any:
    from autoscaling.core.types import Spec
    from autoscaling.live.setup import ControllerSetup, ModelSetup

    models = [name(i) for i in range(options.models)]
    return ControllerSetup(
        models=tuple(
            ModelSetup(
                id=m,
                aliases=(),
                deployment=f"model-{m}",
                spec=Spec(m, wait_cost=10.0, max_replicas=4),
                resources={"GPU": 1.0},
            )
            for m in models
        ),
        store=url,
    )


def measure(options: Namespace) -> dict[str, Any]:
    from autoscaling.live.clock import SystemClock

    clock = SystemClock()
    folder = clusters.HOME / "controller"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"history-{int(time.time())}.db"
    url = f"sqlite:///{file}"
    say(f"two weeks of history of {options.models} models")
    imported, import_s = _import(options, url, clock)
    try:
        result = _plan(options, _setup(options, url), clock)
    finally:
        for path in folder.glob(f"{file.name}*"):
            Path(path).unlink()
    return {"models": options.models, "imported_minutes": imported, "import_s": import_s, **result}


def _plan(options: Namespace, setup: Any, clock: Any) -> dict[str, Any]:
    import psutil

    from autoscaling.core.plan import Plan, to_json
    from autoscaling.forecast.service import ForecastService
    from autoscaling.live.capacity import CapacityBook
    from autoscaling.live.garbage import collect_seldom
    from autoscaling.live.metrics import LiveMetrics
    from autoscaling.live.nodes import NodeRequests
    from autoscaling.live.planner import Planner
    from autoscaling.live.rungs import RungBook

    collect_seldom()
    process = psutil.Process()
    memory_before = process.memory_info().rss
    plans: list[Plan] = []

    def forecasts(store: Any, horizon_s: Any) -> ForecastService:
        traffic = lambda model: store.traffic(model, clock.now_s())  # noqa: E731 - one expression, used once
        return ForecastService(traffic, horizon_s, clock, processes=options.processes)

    metrics = LiveMetrics(setup.models, RungBook(), CapacityBook(), clock)
    seconds = Seconds(options, metrics, clock)
    seconds.cluster()
    say("starting the planner: fitting and deciding all of them")
    began_s = time.perf_counter()
    planner = Planner(
        setup,
        metrics,
        clock,
        publish=plans.append,
        warm=lambda *_: {},
        forecasts=forecasts,
        nodes=NodeRequests(lambda _: None, get=lambda _key: None, put=lambda _key, _value: None),
    )
    opened_s = time.perf_counter() - began_s
    ticks: list[float] = []
    replan_ticks: list[float] = []
    replan_s = None
    while replan_s is None and time.perf_counter() - began_s < PATIENCE_S:
        health = planner.forecasts.health()
        fitted = health["waiting"] == 0 and health["fitted"] + len(health["failing"]) >= 0.99 * options.models
        seconds.play(planner, replan_ticks)
        if fitted:  # and now decided
            replan_s = time.perf_counter() - began_s
    say(f"replan: {replan_s if replan_s is None else round(replan_s, 1)} s; {options.ticks} ticks")
    for _ in range(options.ticks):
        seconds.play(planner, ticks)
    health = planner.health()
    decided: dict[str, int] = {}
    for decision in planner.decisions().values():
        decided[decision.reason.value] = decided.get(decision.reason.value, 0) + 1
    result = {
        "open_s": opened_s,
        "replan_s": replan_s,
        "fitted": health["forecaster"]["fitted"],
        "fit_cpu_s": health["forecaster"]["cpu_s"],
        "failing": len(health["forecaster"]["failing"]),
        "errors": health["errors"],
        "tick_ms": _ms(ticks),
        "replan_tick_ms": _ms(replan_ticks),
        "report_ms": _ms(seconds.reports),
        "policy_call_ms": _ms(_policy_calls({m.id: m.spec for m in setup.models}, plans[-1])),
        "plan_bytes": len(to_json(plans[-1])),
        "memory_bytes": process.memory_info().rss,
        "memory_before_bytes": memory_before,
        "fit_processes_bytes": sum(c.memory_info().rss for c in process.children(recursive=True)),
        "reasons": decided,
    }
    planner.close()
    return result


def _policy_calls(specs: Mapping[str, Any], plan: Any) -> list[float]:
    """One call of every model's policy, on the plan that was published last, half of the models with requests."""
    from types import SimpleNamespace

    from autoscaling.core.codec import to_json
    from autoscaling.core.plan import to_json as plan_to_json
    from autoscaling.live.following import Follower
    from autoscaling.live.plan_store import PlanReader

    text = plan_to_json(plan).encode()
    reader = PlanReader(get=lambda _key: text, put=lambda _key, _value: None)
    reader.read_once()
    calls = []
    for number, (model, spec) in enumerate(specs.items()):
        follower = Follower(model, to_json(spec), grace_s=5.0, reader=lambda: reader)
        context = SimpleNamespace(
            current_time=plan.made_s + 0.1,
            current_num_replicas=1,
            target_num_replicas=1,
            total_num_requests=float(number % 2),
            total_queued_requests=0.0,
        )
        follower.replicas(context)
        context.current_time += 0.1
        at_s = time.perf_counter()
        follower.replicas(context)
        calls.append(time.perf_counter() - at_s)
        if follower.health.errors:
            raise clusters.BenchError(f"the policy failed: {follower.health.last_error}")
    return calls


def _ms(seconds: list[float]) -> dict[str, float]:
    values = [1e3 * s for s in seconds]
    return {
        "n": len(values),
        "p50": percentile(values, 0.5),
        "p99": percentile(values, 0.99),
        "max": max(values),
    }


def text(result: Mapping[str, Any]) -> str:
    lines = [
        [what, r["n"], r["p50"], r["p99"], r["max"]]
        for what, r in (
            ("tick", result["tick_ms"]),
            ("tick while all is fitted", result["replan_tick_ms"]),
            ("taking a gateway's report", result["report_ms"]),
            ("policy call in Serve's controller", result["policy_call_ms"]),
        )
    ]
    mib = 2**20
    replan = "not within the patience" if result["replan_s"] is None else f"{result['replan_s']:.1f} s"
    return "\n".join(
        [
            f"{result['models']} models, two weeks of history each ({result['imported_minutes']} minutes with "
            f"requests, imported in {result['import_s']:.1f} s)",
            f"full replan, from nothing to a forecast and a decision for each: {replan}, of which "
            f"{result['open_s']:.1f} s to open the store; {result['fit_cpu_s']:.1f} s of processor time fitting",
            f"fitted {result['fitted']}, without their usual forecaster {result['failing']}; "
            f"errors: {result['errors'] or 'none'}",
            f"memory: {result['memory_bytes'] / mib:.0f} MiB ({result['memory_before_bytes'] / mib:.0f} before it), "
            f"processes that fit {result['fit_processes_bytes'] / mib:.0f} MiB; "
            f"the plan {result['plan_bytes'] / 1e3:.0f} kB",
            f"decisions: {', '.join(f'{n} {r}' for r, n in sorted(result['reasons'].items()))}",
            "",
            table(["milliseconds", "n", "p50", "p99", "max"], lines),
        ]
    )
