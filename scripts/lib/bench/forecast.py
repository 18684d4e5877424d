"""How good and how fast the forecasts are: on traces of real systems, learned as the controller does.

Each model is learned anew at `--refits` moments of the last two fifths of its trace, from what was known then, and
judged on what came until the next. Nothing of a trace is kept.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from autoscaling.forecast import arrival_choice, demand
from autoscaling.forecast.base import NotApplicable
from autoscaling.forecast.conformal import QUANTILES, pinball
from autoscaling.forecast.fit import Job, fit_standard
from autoscaling.forecast.history import Floats, History, Recent, history_of
from autoscaling.forecast.prior import NO_FLEET, Prior, pooled
from autoscaling.forecast.service import ForecastService
from autoscaling.forecast.service_time import NORMAL
from autoscaling.traffic import LEVELS, Traffic
from bench import clusters
from bench.numbers import table
from bench.traces import Trace, exact, load, traffic

HORIZON_S = 120.0
LEARN_SHARE = 0.6
POOLINGS = 4
"""Rounds of fits from which the fleet's regression is learned; it takes one step in each."""
CHOSEN = "chosen"
NAIVE = "last value"
Row = tuple[float, ...]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--traces", type=Path, default=Path("../shared/traces"), help="default: ../shared/traces"
    )
    parser.add_argument("--models", type=int, default=40, help="at most so many of each trace (default: 40)")
    parser.add_argument("--refits", type=int, default=24, help="of each model (default: 24)")
    parser.add_argument(
        "--fleet", type=int, default=1000, help="models of the measure of speed (default: 1000)"
    )
    parser.add_argument("--statsforecast", action="store_true", help="judge its seasonal part as well (slow)")


@dataclass
class Judged:
    """What one model's forecasters got: rows by question and forecaster."""

    model: str
    rows: dict[str, dict[str, list[Row]]] = field(default_factory=dict)
    chosen: Counter[str] = field(default_factory=Counter)

    def add(self, question: str, forecaster: str, row: Row) -> None:
        self.rows.setdefault(question, {}).setdefault(forecaster, []).append(row)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    paths = sorted(options.traces.glob("*.csv.gz"))
    if not paths:
        raise clusters.BenchError(
            f"{options.traces}: no traces (*.csv.gz) there; --traces names their folder"
        )
    files = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        for path in paths:
            traces = load(path)
            print(f"{path.name}: {len(traces)} models", file=sys.stderr)
            files[path.name.removesuffix(".csv.gz")] = _file(traces, options, pool)
    return {"files": files, "speed": _speed(options.fleet) if options.fleet else None}


def _file(traces: list[Trace], options: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, Any]:
    since_s = min(float(trace.time_s[0]) for trace in traces)
    until_s = max(float(trace.time_s[-1]) + trace.step_s for trace in traces)
    learn_s = since_s + LEARN_SHARE * (until_s - since_s)
    seen = [trace for trace in traces if trace.time_s[0] < learn_s]
    order = np.random.default_rng(0).permutation(len(seen))[: options.models]
    picked = [seen[i] for i in sorted(order)]
    known = [traffic(trace, since_s, learn_s) for trace in picked]
    prior = NO_FLEET
    for _ in range(POOLINGS):
        found = [fit_standard(Job(each, learn_s, HORIZON_S, prior)) for each in known]
        prior = pooled((fitted.share for fitted in found if fitted is not None), prior)
    moments = np.linspace(learn_s, until_s, options.refits + 1)
    kinds = dict(demand.CHEAP)
    if options.statsforecast:
        from autoscaling.forecast.fit import FULL

        kinds = dict(FULL)
    n = len(picked)
    judged = list(pool.map(judge, picked, [since_s] * n, [moments] * n, [prior] * n, [kinds] * n))
    return {
        "models": len(traces),
        "judged": n,
        "days": (until_s - since_s) / 86400,
        "next_arrival": _arrival_table(judged),
        "demand": _demand_table(judged),
        "chosen": dict(sum((j.chosen for j in judged), Counter())),
    }


def judge(
    trace: Trace, since_s: float, moments: Floats, prior: Prior, kinds: Mapping[str, demand.Kind]
) -> Judged:
    """One model, learned at each of `moments` but the last."""
    whole = history_of(exact(trace, since_s, float(moments[-1])), float(moments[-1]))
    fine = cache(lambda step_s: _all_at_one_step(trace, since_s, float(moments[-1]), step_s))
    judged = Judged(trace.model)
    for begin_s, end_s in pairwise(moments):
        history = history_of(traffic(trace, since_s, float(begin_s)), float(begin_s))
        if len(history.events):
            _judge_arrivals(judged, history, whole, float(end_s), prior)
            _judge_demand(judged, history, fine, (float(begin_s), float(end_s)), kinds)
    return judged


def _judge_arrivals(judged: Judged, history: History, whole: History, end_s: float, prior: Prior) -> None:
    silences = [s for s in arrival_choice.silences_of(whole, 10**6) if history.now_s <= s.made_s < end_s][:50]
    if not silences:
        return
    choice = arrival_choice.choose(history, prior)
    judged.chosen[choice.fitted.name] += 1
    fits: dict[str, Any] = {CHOSEN: choice.fitted}
    for forecaster in arrival_choice.forecasters_for(prior):
        try:
            fits[forecaster.name] = forecaster.fit(history, prior)
        except NotApplicable:
            continue
    for name, fitted in fits.items():
        for silence in silences:
            log_score, *ends = arrival_choice.judged(fitted, silence)
            judged.add("next_arrival", name, (log_score, *arrival_choice.band(fitted, silence, ends)))


@dataclass(frozen=True)
class _Fine:
    """A trace in steps as the demand forecasters take them, with the recent rates at each step's end."""

    step_s: float
    first: int
    counts: Floats
    rates: Floats


def _all_at_one_step(trace: Trace, since_s: float, until_s: float, step_s: float) -> _Fine:
    first, last = int(np.ceil(since_s / step_s)), int(until_s // step_s)
    index = (trace.time_s // step_s).astype(np.int64) - first
    keep = (index >= 0) & (index < last - first)
    counts = np.bincount(index[keep], trace.count[keep], last - first)
    return _Fine(step_s, first, counts, demand.recent_rates(counts, step_s))


def _judge_demand(
    judged: Judged,
    history: History,
    at_step: Callable[[float], _Fine],
    span: tuple[float, float],
    kinds: Mapping[str, demand.Kind],
) -> None:
    fits: dict[str, demand.FittedDemand] = {}
    try:
        chosen = demand.choose(history, HORIZON_S, None, kinds).fitted
    except NotApplicable:
        return
    fits[CHOSEN] = chosen
    judged.chosen[chosen.name] += 1
    for name, kind in kinds.items():
        try:
            fits[name] = demand.choose(history, HORIZON_S, None, {name: kind}).fitted
        except NotApplicable:
            continue
    random = np.random.default_rng(zlib.crc32(judged.model.encode()))
    fine = at_step(chosen.step_s)
    steps = demand.steps_of(HORIZON_S, fine.step_s)
    for t in _spread(span, fine, steps):
        now_s = (fine.first + t + 1) * fine.step_s
        recent = Recent(now_s, (), tuple(fine.rates[:, t].tolist()), now_s)
        whole = fine.counts[t + 1 : t + 1 + steps]
        actual = whole + random.uniform(-0.5, 0.5, steps)
        for name, fitted in fits.items():
            assert fitted.step_s == fine.step_s
            judged.add("demand", name, _demand_row(actual, whole, fitted.counts(now_s, recent, steps)))
        last = fine.counts[t]
        naive = np.tile(last + NORMAL * np.sqrt(max(last, 1.0)), (steps, 1))
        judged.add("demand", NAIVE, _demand_row(actual, whole, naive))


def _spread(span: tuple[float, float], fine: _Fine, steps: int, most: int = 60) -> Iterator[int]:
    """Some of the steps that end within the span and whose future is known."""
    first = max(0, int(span[0] // fine.step_s) - fine.first)
    last = min(int(span[1] // fine.step_s) - fine.first, len(fine.counts) - steps - 1)
    return iter(range(first, last, max(1, -(-(last - first) // most))))


def _demand_row(actual: Floats, whole: Floats, quantiles: Floats) -> Row:
    """(pinball loss, covered, covered as whole counts, width), means over the steps."""
    low, high = quantiles[:, QUANTILES.index(0.05)], quantiles[:, QUANTILES.index(0.95)]
    counts = np.ceil(quantiles - 0.5)
    inside = (whole >= counts[:, QUANTILES.index(0.05)]) & (whole <= counts[:, QUANTILES.index(0.95)])
    return (
        pinball(actual, quantiles),
        float(((actual >= low) & (actual <= high)).mean()),
        float(inside.mean()),
        float((high - low).mean()),
    )


def _by_forecaster(judged: list[Judged], question: str) -> dict[str, list[tuple[str, np.ndarray[Any, Any]]]]:
    found: dict[str, list[tuple[str, np.ndarray[Any, Any]]]] = defaultdict(list)
    for model in judged:
        for name, rows in model.rows.get(question, {}).items():
            found[name].append((model.model, np.asarray(rows)))
    return found


def _arrival_table(judged: list[Judged]) -> dict[str, dict[str, float]]:
    result = {}
    for name, models in _by_forecaster(judged, "next_arrival").items():
        rows = np.concatenate([rows for _, rows in models])
        result[name] = {
            "models": len(models),
            "silences": len(rows),
            "log_score": float(rows[:, 0].mean()),
            "coverage": float(rows[:, 1].mean()),
            "width_s": float(np.median(rows[:, 2])),
        }
    return result


def _demand_table(judged: list[Judged]) -> dict[str, dict[str, float]]:
    found = _by_forecaster(judged, "demand")
    base = {model: rows[:, 0].mean() for model, rows in found.get(NAIVE, [])}
    result = {}
    for name, models in found.items():
        rows = np.concatenate([rows for _, rows in models])
        # By model against the naive one, so that a loud model does not drown the others.
        ratios = [rows[:, 0].mean() / max(base[model], 1e-12) for model, rows in models]
        result[name] = {
            "models": len(models),
            "steps": len(rows),
            "loss_ratio": float(np.median(ratios)),
            "better": float(np.mean(np.asarray(ratios) < 1)),
            "coverage": float(rows[:, 1].mean()),
            "coverage_whole": float(rows[:, 2].mean()),
            "worst_model": float(min(rows[:, 1].mean() for _, rows in models)),
            "width": float(np.median(rows[:, 3])),
        }
    return result


# Speed


class _Clock:
    def now_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()


def fleet_traffic(n: int, now_s: float, days: int = 14) -> dict[str, Traffic]:
    """`n` made-up models, half of them sparse, half busy by day, with `days` of history each."""
    random = np.random.default_rng(7)
    since_s = now_s - days * 86400
    result = {}
    for i in range(n):
        mean = 10 ** random.uniform(-4.5, -3.3) if i % 2 else 10 ** random.uniform(-2, 0)
        hours = since_s + np.arange(days * 24) * 3600.0
        rate = mean * (1 + 0.9 * np.sin((hours / 86400 + random.uniform()) * 2 * np.pi))
        counts = random.poisson(rate * 3600 * random.gamma(2.0, 0.5, len(rate)))
        times = np.sort(np.repeat(hours, counts) + random.uniform(0, 3600, int(counts.sum())))
        trace = Trace(f"model-{i:04d}", 1.0, np.floor(times), np.ones(len(times)), np.full(len(times), 2.0))
        result[trace.model] = traffic(trace, since_s, now_s)
    return result


def _speed(n: int) -> dict[str, Any]:
    print(f"speed: making two weeks of traffic of {n} models", file=sys.stderr)
    clock = _Clock()
    known = fleet_traffic(n, clock.now_s())
    service = ForecastService(known.__getitem__, lambda _: 10.0, clock, processes=2)
    began_s = time.monotonic()
    service.watch(list(known))
    service.start()
    try:
        while (health := service.health())["fitted"] < n and time.monotonic() < began_s + 600:
            if not health["ok"]:
                raise clusters.BenchError(f"the forecast service failed: {health['error']}")
            time.sleep(0.1)
        fit_s = time.monotonic() - began_s
        now_s = clock.now_s()
        first_s = _timed(lambda: [service.forecast(model, now_s) for model in known])
        ticks = []
        for second in range(1, 11):
            for model in list(known)[::2]:
                service.arrived(model, now_s + second, 1)
            ticks.append(_timed(lambda: [service.forecast(model, now_s + second) for model in known]))  # noqa: B023
        return {
            "models": n,
            "history_buckets": sum(len(level.index) for t in known.values() for level in t.levels) // n,
            "levels": len(LEVELS),
            "fit_all_s": fit_s,
            "fit_cpu_ms": service.health()["cpu_s"] / n * 1000,
            "first_tick_s": first_s,
            "tick_s": float(np.median(ticks)),
            "worst_tick_s": max(ticks),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    finally:
        service.close()


def _timed(call: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def text(result: Mapping[str, Any]) -> str:
    parts = []
    for file, found in result["files"].items():
        parts.append(f"{file}: {found['judged']} of {found['models']} models, {found['days']:.1f} days")
        if found["next_arrival"]:
            parts.append(
                _table(
                    found["next_arrival"],
                    ("next arrival", "models", "silences", "log_score", "coverage", "width_s"),
                )
            )
        if found["demand"]:
            columns = (
                "demand",
                "models",
                "steps",
                "loss_ratio",
                "better",
                "coverage",
                "coverage_whole",
                "worst_model",
                "width",
            )
            parts.append(_table(found["demand"], columns))
        parts.append("")
    if result["speed"]:
        speed = result["speed"]
        parts.append(
            f"{speed['models']} models with two weeks each: fitted in {speed['fit_all_s']:.1f} s by two processes"
            f" ({speed['fit_cpu_ms']:.0f} ms of processor time each);"
            f" a tick of forecasts {speed['tick_s'] * 1000:.0f} ms (first {speed['first_tick_s'] * 1000:.0f},"
            f" worst {speed['worst_tick_s'] * 1000:.0f}); {speed['peak_rss_bytes'] / 2**20:.0f} MiB with the traffic"
        )
    parts.append(
        f"The naive ones are poisson and {NAIVE}. Coverage is of the 5 % to 95 % band: 0.9 is right."
    )
    return "\n".join(parts)


def _table(found: Mapping[str, Mapping[str, float]], columns: tuple[str, ...]) -> str:
    ordered = sorted(found, key=lambda name: (name != CHOSEN, name))
    return table(columns, [[name, *(found[name][column] for column in columns[1:])] for name in ordered])
