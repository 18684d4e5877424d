"""What the simulator takes: requests a second on dense traces, two weeks of a sparse one, memory while a trace streams.

Each measure runs alone in a process of its own, on one core but where it says so. What it is next to:

* the same event loop uncompiled, which is what a simulator in plain Python would be;
* the same loop at every tick, instead of only where something happens;
* the same replay over a process for each core, as `relight simulate` has it;
* the same trace read at once, instead of in pieces.
"""

from __future__ import annotations

import argparse
import csv
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from autoscaling.core.types import Spec
from autoscaling.sim import arrivals, events
from autoscaling.sim.compare import Base, Variant, simulate
from autoscaling.sim.group import Group
from autoscaling.sim.profile import Engine, Profile
from autoscaling.sim.replay import Setup, replay
from autoscaling.sim.report import Report
from autoscaling.traces import Row, Trace, open_trace
from bench import clusters
from bench.clusters import say
from bench.numbers import ratio, table

POLICIES = {"keep-alive": 100_000.0, "predictive": 50_000.0}
"""Requests a second a core that each should reach on a dense trace."""
SPARSE, SPARSE_S = "req_gentd26_models_days0-14", 10.0
DAY_S = 86400.0


@dataclass(frozen=True)
class Dense:
    """A trace, how much of it, and how often a model is asked on average."""

    file: str
    scale: float
    days: float


DENSE = (
    Dense("min_azure_functions_2019_total_days0-9", 0.01, 0.1),
    Dense("win10_servegen_model_totals_days0-9", 0.1, 0.05),
    Dense("win10_servegen_language_clients_days0-9", 0.1, 1.0 / 144),
    Dense("req_azure_llm_2023_code", 1.0, 1.0),
    Dense("min_azure_functions_2019_500f_8h", 1.0, 1.0 / 144),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--traces", type=Path, default=Path("../shared/traces"), help="default: ../shared/traces"
    )
    parser.add_argument("--only", default="dense,sparse,memory", help="which parts (default: all)")
    parser.add_argument("--rows", type=int, default=200_000, help="of the streamed trace (default: 200000)")
    parser.add_argument("--models", type=int, default=100, help="of the streamed trace (default: 100)")
    parser.add_argument(
        "--keep-alive-s",
        type=float,
        default=600.0,
        help="idle time on the streamed trace (default: 600): the shorter, the more starts there are to replay",
    )
    parser.add_argument("--seed", type=int, default=0)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    parts = options.only.split(",")
    if unknown := set(parts) - {"dense", "sparse", "memory"}:
        raise clusters.BenchError(f"--only: {', '.join(sorted(unknown))} is none of dense, sparse and memory")
    result: dict[str, Any] = {"dense": [], "sparse": [], "memory": None}
    if "dense" in parts:
        for each in DENSE:
            for policy in POLICIES:
                say(f"{each.file}, {policy}")
                result["dense"].append(_best(options.runs, dense, _found(options, each.file), each, policy))
    if "sparse" in parts:
        path = _found(options, SPARSE)
        for name in ("two states", "ladder"):
            say(f"{SPARSE}, {name}")
            result["sparse"].append(_best(options.runs, sparse, path, name))
        say(f"{SPARSE}, at every tick")
        result["every_tick"] = _alone(every_tick, path)
    if "memory" in parts:
        say(f"a window trace of {options.rows} rows, streamed")
        result["memory"] = _alone(streamed, options.rows, options.models, options.keep_alive_s)
        few = min(options.rows, 500_000)
        say(f"a window trace of {few} rows, read at once")
        result["at_once"] = [_alone(at_once, rows, options.models) for rows in (few // 2, few)]
    return result


def _found(options: argparse.Namespace, file: str) -> Path:
    path: Path = options.traces / f"{file}.csv.gz"
    if not path.is_file():
        raise clusters.BenchError(f"{path}: there is no such trace; --traces names their folder")
    return path


def _best(runs: int, call: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """The quickest of several runs: what else the machine does only ever adds."""
    return min((_alone(call, *given) for _ in range(runs)), key=lambda found: float(found["cpu_s"]))


def _alone(call: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(call, *given).result()


# Each of these runs in its own process.


def _timed(trace: Trace, policy: str, setup: Setup, spec: Spec) -> tuple[Report, dict[str, Any]]:
    _warm_up(policy, spec)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    report = replay(trace, lambda model: replace(spec, model=model), setup, policy=policy)
    cpu_s = time.process_time() - cpu_s
    total = report.total
    return report, {
        "policy": policy,
        "models": len(report.models),
        "days": (report.until_s - report.measured_from_s) / DAY_S,
        "requests": total.requests,
        "wall_s": time.perf_counter() - began_s,
        "cpu_s": cpu_s,
        "requests_per_core_s": total.requests / cpu_s,
        "fits": report.fits,
        "cold_starts": total.cold_starts,
        "notes": list(report.notes),
    }


def _warm_up(policy: str, spec: Spec) -> None:
    """What is compiled or imported once is not counted: a model with silences, and one with enough to foretell how much
    will come."""
    rows = [Row(3600.0 * hour, "seldom", exec_s=1.0) for hour in range(8)]
    rows += [Row(10.0 * i, "often", exec_s=5.0) for i in range(8 * 360)]
    rows.sort(key=lambda row: row.time_s)
    replay(rows, lambda model: replace(spec, model=model), policy=policy)


def dense(path: Path, of: Dense, policy: str) -> dict[str, Any]:
    setup = Setup(scale=of.scale, until_s=of.days * DAY_S)
    spec = Spec("", wait_cost=10.0, max_replicas=256)
    _, found = _timed(open_trace(path), policy, setup, spec)
    found |= {"file": of.file, "scale": of.scale}
    if policy == "keep-alive":
        found["uncompiled_requests_per_core_s"] = _uncompiled(path, setup, spec, found["requests"])
    return found


def _uncompiled(path: Path, setup: Setup, spec: Spec, requests: int) -> float:
    """The same on a share of the time with some ten thousand requests, without the compiler."""
    assert setup.until_s is not None
    share = min(1.0, 10_000 / requests)
    trace = open_trace(path)
    compiled = events.advance, events.next_event_s, events.ride
    events.advance, events.next_event_s, events.ride = events._advance, events._next_s, events._ride
    try:
        cpu_s = time.process_time()
        until_s = max(trace.window_s, setup.until_s * share)
        report = replay(
            trace,
            lambda model: replace(spec, model=model),
            replace(setup, until_s=until_s),
            policy="keep-alive",
        )
        return report.total.requests / (time.process_time() - cpu_s)
    finally:
        events.advance, events.next_event_s, events.ride = compiled


def _ladder(name: str) -> Profile:
    profile = Profile(engine=Engine(concurrency=1))
    return profile.two_states(30.0) if name == "two states" else profile


def sparse(path: Path, name: str) -> dict[str, Any]:
    """All of GenTD26, one request at a time in a replica, as it says how long each took."""
    spec = Spec("", wait_cost=10.0, max_replicas=1, target_ongoing_requests=1.0)
    setup = Setup(profile=_ladder(name))
    one, found = _timed(open_trace(path), "predictive", setup, spec)
    began_s = time.perf_counter()
    more = simulate(Base(open_trace(path), setup, spec=spec), Variant("predictive"), processes=None)
    found["wall_s_all_cores"] = time.perf_counter() - began_s
    if more.total != one.total:
        raise clusters.BenchError(f"{name}: over processes it came to {more.total}, in one to {one.total}")
    return {"rungs": name, **found}


def every_tick(path: Path) -> dict[str, Any]:
    """Six hours of the same; what all of it would take follows."""
    skipping = Group._next_s, Group._ride
    spec = Spec("", wait_cost=10.0, max_replicas=1, target_ongoing_requests=1.0)
    setup = Setup(profile=_ladder("two states"), until_s=6 * 3600.0)
    _warm_up("predictive", spec)
    Group._next_s = lambda self: self._clock.now_s()  # type: ignore[method-assign]
    Group._ride = lambda self, until_s: False  # type: ignore[method-assign]
    try:
        cpu_s = time.process_time()
        report = replay(
            open_trace(path), lambda model: replace(spec, model=model), setup, policy="predictive"
        )
        cpu_s = time.process_time() - cpu_s
    finally:
        Group._next_s, Group._ride = skipping  # type: ignore[method-assign]
    model_hours = len(report.models) * (report.until_s - report.measured_from_s) / 3600
    whole = replay(
        open_trace(path),
        lambda model: replace(spec, model=model),
        replace(setup, until_s=None),
        policy="keep-alive",
    )
    hours = len(whole.models) * (whole.until_s - whole.measured_from_s) / 3600
    return {"model_hours": model_hours, "cpu_s": cpu_s, "whole_s": cpu_s / model_hours * hours}


def streamed(rows: int, models: int, keep_alive_s: float) -> dict[str, Any]:
    """A file of so many rows, through the reader and a policy."""
    held: list[dict[str, float]] = []
    _warm_up("keep-alive", Spec(""))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "min_made.csv"
        write(path, rows, models)
        began_s, cpu_s = time.perf_counter(), time.process_time()
        report = replay(
            _watched(open_trace(path).rows(), rows, held),
            lambda model: Spec(model, policy="keep-alive", keep_alive_s=keep_alive_s),
        )
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - began_s
    return {
        "rows": rows,
        "models": models,
        "keep_alive_s": keep_alive_s,
        "requests": report.total.requests,
        "cold_starts": report.total.cold_starts,
        "days": (report.until_s - report.measured_from_s) / DAY_S,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "rows_per_core_s": rows / cpu_s,
        "held": held,
        "peak_bytes": _peak_bytes(),
        "growth_bytes": held[-1]["bytes"] - held[len(held) // 2]["bytes"],
    }


def at_once(rows: int, models: int) -> dict[str, Any]:
    """The requests of the same trace, in one piece."""
    before = _peak_bytes()
    made = (
        Row(minute * 60.0, f"model-{model}", count, 60.0)
        for minutes, numbers, counts in _made(rows, models)
        for minute, model, count in zip(minutes, numbers, counts, strict=True)
    )
    requests = sum(
        len(times)
        for piece in arrivals.pieces(made, lambda *_: 1.0, most=None)
        for times, _ in piece.requests.values()
    )
    return {"rows": rows, "requests": requests, "bytes": _peak_bytes() - before}


def _watched(rows: Iterator[Row], total: int, held: list[dict[str, float]]) -> Iterator[Row]:
    step = max(1, total // 20)
    for i, row in enumerate(rows, 1):
        if i % step == 0:
            held.append({"rows": i, "bytes": _held_bytes()})
        yield row


def write(path: Path, rows: int, models: int) -> None:
    """A window trace of so many rows, each minute some of the models."""
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["minute", "model", "count"])
        for minutes, numbers, counts in _made(rows, models):
            out.writerows(
                (minute, f"model-{model}", count)
                for minute, model, count in zip(minutes, numbers, counts, strict=True)
            )


def _made(rows: int, models: int) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """(minutes, numbers of models, counts), a bounded number at a time."""
    random = np.random.default_rng(0)
    left, minute = rows, 0
    while left > 0:
        share = random.random((64, models))
        found = np.argwhere(share < 0.3)[:left]
        counts = 1 + random.poisson(0.5, len(found))
        yield (found[:, 0] + minute).tolist(), found[:, 1].tolist(), counts.tolist()
        left -= len(found)
        minute += 64


def _held_bytes() -> float:
    return float(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_bytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


# For people


def text(result: Mapping[str, Any]) -> str:
    parts = []
    if result["dense"]:
        parts.append(_dense_table(result["dense"]))
    if result["sparse"]:
        parts.append(_sparse_table(result["sparse"]))
        every = result["every_tick"]
        parts.append(
            f"At every tick, instead of where something happens, it would take {every['whole_s']:.0f} s"
            f" (from {every['model_hours']:.0f} model-hours in {every['cpu_s']:.1f} s)."
        )
    if result["memory"]:
        parts.append(_memory_text(result["memory"], result["at_once"]))
    return "\n\n".join(parts)


def _dense_table(found: list[Mapping[str, Any]]) -> str:
    head = ["dense", "policy", "scale", "models", "requests", "a model a second", "core s", "fits"]
    head += ["requests/s a core", "to the bar", "uncompiled", "times that"]
    rows = []
    for each in found:
        speed, plain = each["requests_per_core_s"], each.get("uncompiled_requests_per_core_s")
        density = each["requests"] / max(each["days"] * DAY_S * each["models"], 1e-9)
        rows.append(
            [
                each["file"],
                each["policy"],
                each["scale"],
                each["models"],
                each["requests"],
                density,
                each["cpu_s"],
                each["fits"],
                round(speed),
                speed / POLICIES[each["policy"]],
                None if plain is None else round(plain),
                ratio(speed, plain),
            ]
        )
    return table(head, rows)


def _sparse_table(found: list[Mapping[str, Any]]) -> str:
    head = ["sparse", "rungs", "policy", "days", "models", "requests", "fits", "core s", "to the bar"]
    head += ["s over all cores", "to the bar"]
    rows = [
        [
            SPARSE,
            each["rungs"],
            each["policy"],
            each["days"],
            each["models"],
            each["requests"],
            each["fits"],
            each["cpu_s"],
            each["cpu_s"] / SPARSE_S,
            each["wall_s_all_cores"],
            each["wall_s_all_cores"] / SPARSE_S,
        ]
        for each in found
    ]
    return table(head, rows)


def _memory_text(streamed: Mapping[str, Any], whole: list[Mapping[str, Any]]) -> str:
    mib = 1 << 20
    few, more = whole
    each = (more["bytes"] - few["bytes"]) / (more["rows"] - few["rows"])
    steps = ", ".join(f"{h['bytes'] / mib:.0f}" for h in streamed["held"])
    return "\n".join(
        [
            f"Streamed: {streamed['rows']} rows of windows ({streamed['requests']} requests, {streamed['models']}"
            f" models, {streamed['days']:.1f} days, keep-alive of {streamed['keep_alive_s']:g} s:"
            f" {streamed['cold_starts']} cold starts) in {streamed['cpu_s']:.1f} s of one core,"
            f" {streamed['rows_per_core_s']:.0f} rows/s",
            f"  held at every twentieth, MiB: {steps}; peak {streamed['peak_bytes'] / mib:.0f},"
            f" second half {streamed['growth_bytes'] / mib:+.1f}",
            f"  read at once, its requests alone would add {each:.0f} bytes a row:"
            f" {each * 100e6 / (1 << 30):.1f} GiB for 100 million rows (from {few['rows']} and {more['rows']})",
        ]
    )
