"""Sparse traffic: how many cold starts each policy has for the same idle GPU time, and what all of it costs.

One replica or none, dark or lit, 30 s to start; a replica takes all requests at once, so that only cold starts wait.
"""

from __future__ import annotations

import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from autoscaling.core.types import Spec
from autoscaling.sim.compare import ORACLE, Base, Variant, simulate
from autoscaling.sim.profile import Engine, Profile
from autoscaling.sim.replay import Setup
from autoscaling.sim.report import Report
from autoscaling.traces import Row, open_trace
from bench import clusters
from bench.clusters import say
from bench.numbers import ratio, table

DAY_S, HOUR_S = 86400.0, 3600.0
START_S = 30.0
SERVICE_S = 2.6
"""Of a request of which the trace does not say."""
WAIT_COSTS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
KEEP_ALIVES_S = (
    *(0, 10, 20, 30, 45, 60, 90, 120, 180, 240, 300, 450, 600, 900, 1200, 1800, 2700, 3600, 5400, 7200),
    *(10800, 14400, 28800, 57600),
)
BUSY_PER_H = 60.0
"""What is asked more often in the part that is learned from is not sparse, and left out."""
PER_H = 1.0
COLD_BAR, COST_BAR = 0.80, 0.85
COMPARED = ("predictive", "keep-alive")


@dataclass(frozen=True)
class Case:
    """A trace, and where the part begins that is scored."""

    file: str
    measure_from_s: float
    rows: Callable[[Sequence[Row], float], Sequence[Row]]
    says: str


def _all(rows: Sequence[Row], _: float) -> Sequence[Row]:
    return rows


def _sparse(rows: Sequence[Row], measure_from_s: float) -> Sequence[Row]:
    until_s = rows[0].time_s + measure_from_s
    count: dict[str, int] = {}
    for row in rows:
        if row.time_s < until_s:
            count[row.model] = count.get(row.model, 0) + row.requests
    most = BUSY_PER_H * measure_from_s / HOUR_S
    return [row for row in rows if count.get(row.model, 0) <= most]


def _thinned(rows: Sequence[Row], _: float) -> Sequence[Row]:
    """Each client's requests, kept or left out by themselves, so that it has no more than PER_H an hour on average."""
    total: dict[str, int] = {}
    for row in rows:
        total[row.model] = total.get(row.model, 0) + row.requests
    most = PER_H * (rows[-1].time_s - rows[0].time_s) / HOUR_S
    random = {model: np.random.default_rng(zlib.crc32(model.encode())) for model in total}
    kept = (
        row._replace(
            requests=int(random[row.model].binomial(row.requests, min(1.0, most / total[row.model]))), cv=1.0
        )
        for row in rows
    )
    return [row for row in kept if row.requests]


def _scaled(rows: Sequence[Row], _: float) -> Sequence[Row]:
    """The same share of every client's requests, so that the mean client has PER_H an hour."""
    models = len({row.model for row in rows})
    hours = (rows[-1].time_s - rows[0].time_s) / HOUR_S
    share = PER_H * hours * models / sum(row.requests for row in rows)
    random = np.random.default_rng(0)
    kept = (row._replace(requests=int(random.binomial(row.requests, share)), cv=1.0) for row in rows)
    return [row for row in kept if row.requests]


CASES: Mapping[str, Case] = {
    "gentd26-models": Case("req_gentd26_models_days0-14", 7 * DAY_S, _all, "by base model"),
    "gentd26-tenants": Case("min_gentd26_tenants_days0-14", 7 * DAY_S, _all, "by tenant"),
    "azure-500": Case(
        "min_azure_functions_2019_500f_8h",
        4 * HOUR_S,
        _sparse,
        f"functions of at most {BUSY_PER_H:g} an hour",
    ),
    "servegen-clients": Case(
        "win10_servegen_language_clients_days0-9",
        5 * DAY_S,
        _thinned,
        f"each client thinned to at most {PER_H:g} an hour",
    ),
    "servegen-scaled": Case(
        "win10_servegen_language_clients_days0-9",
        5 * DAY_S,
        _scaled,
        f"all clients thinned alike, to {PER_H:g} an hour on average",
    ),
}
TWO_STATES = Profile(engine=Engine(concurrency=64, service_s=SERVICE_S)).two_states(START_S)

Rows = dict[str, Sequence[Row]]
_ROWS: Rows = {}
"""What forked processes find without its being sent to each."""


@dataclass(frozen=True)
class Job:
    case: str
    profile: Profile
    variant: Variant


def read(folder: Path, names: Sequence[str]) -> None:
    """The traces' rows, for `run`."""
    for name in names:
        if name not in _ROWS:
            case = CASES[name]
            path = folder / f"{case.file}.csv.gz"
            if not path.exists():
                raise clusters.BenchError(f"{path}: not there; --traces names the folder of the traces")
            _ROWS[name] = case.rows(list(open_trace(path).rows()), case.measure_from_s)


def rows_of(name: str) -> Sequence[Row]:
    """The rows of a case that was read."""
    return _ROWS[name]


def run(jobs: Sequence[Job], processes: int | None) -> Iterator[tuple[Job, Report]]:
    """Each job's report, as they come."""
    count = min(processes or len(os.sched_getaffinity(0)), len(jobs))
    if count == 1:
        yield from map(_run, jobs)
        return
    with multiprocessing.get_context("fork").Pool(count, clusters.worker) as pool:
        yield from pool.imap_unordered(_run, jobs, chunksize=1)


def _run(job: Job) -> tuple[Job, Report]:
    case = CASES[job.case]
    base = Base(
        _ROWS[job.case],
        Setup(profile=job.profile, measure_from_s=case.measure_from_s),
        spec=Spec("", wait_cost=10.0, max_replicas=1, target_ongoing_requests=64.0),
    )
    report = simulate(base, job.variant)
    return job, replace(report, models=(), timeline={})


def variants(policies: Sequence[str] = ()) -> list[Variant]:
    """What is run; only those policies, where any are named."""
    found = [Variant(policy, {"wait_cost": cost}) for cost in WAIT_COSTS for policy in ("predictive", ORACLE)]
    found += [
        Variant("hybrid-histogram", {"tail_percentile": tail}) for tail in (99.0, 95.0, 90.0, 75.0, 50.0)
    ]
    found += [Variant("kpa", {"stable_window_s": window}) for window in (60.0, 300.0, 600.0, 1800.0, 3600.0)]
    found += [Variant("keep-alive", {"keep_alive_s": float(idle_s)}) for idle_s in KEEP_ALIVES_S]
    return [each for each in found if not policies or each.policy in policies]


def plain(job: Job, report: Report) -> dict[str, Any]:
    """What is told of one run."""
    total = report.total
    return {
        "policy": job.variant.policy,
        "settings": dict(job.variant.settings),
        "requests": total.requests,
        "cold_starts": total.cold_starts,
        "idle_gpu_s": total.idle_gpu_s,
        "early_gpu_s": early(report),
        "starting_gpu_s": total.starting_gpu_s,
        "busy_gpu_s": total.busy_gpu_s,
        "parked_gpu_s": total.parked_gpu_s,
        "gpu_s": total.gpu_s,
        "waited_s": total.waited_s,
        "wait_p50_s": total.wait_p50_s,
        "wait_p95_s": total.wait_p95_s,
        "prewarms": total.prewarms,
        "prewarm_hits": total.prewarm_hits,
        "fits": report.fits,
        "took_s": report.took_s,
        "notes": list(report.notes),
    }


def early(report: Report) -> float:
    """Starts that nobody asked for, GPU-seconds: what prewarming pays in place of idle time."""
    return max(0.0, report.total.starting_gpu_s - START_S * report.total.cold_starts)


def at_idle(points: Sequence[Mapping[str, Any]], idle_s: float) -> float | None:
    """Cold starts at that idle time, between the points next to it; None beyond them.

    Idle time is what is spent in case somebody comes: `early_gpu_s` is among it. Interpolated over its logarithm.
    """
    known = sorted((point["idle_gpu_s"] + point["early_gpu_s"], point["cold_starts"]) for point in points)
    idle = np.asarray([max(1.0, point[0]) for point in known])
    if not known or not idle[0] <= idle_s <= idle[-1]:
        return None
    return float(np.interp(np.log(idle_s), np.log(idle), [point[1] for point in known]))


def cost(point: Mapping[str, Any], wait_cost: float) -> float:
    """GPU-seconds and waiting, in GPU-seconds."""
    return float(point["gpu_s"] + wait_cost * point["waited_s"])


def measure(
    folder: Path, names: Sequence[str], processes: int | None, policies: Sequence[str] = ()
) -> dict[str, Any]:
    """`policies`: only these beside those that are compared, which are always run."""
    read(folder, names)
    wanted = (*policies, *COMPARED) if policies else ()
    jobs = [Job(name, TWO_STATES, variant) for name in names for variant in variants(wanted)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for at, (job, report) in enumerate(run(jobs, processes), 1):
        found[job.case].append(plain(job, report))
        say(f"{at} of {len(jobs)}: {job.case}, {job.variant.label}: {report.took_s:.1f} s")
    return {name: judged(name, points) for name, points in found.items()}


def unseen(name: str) -> int:
    """Models whose first request of all is in the scored part: cold whatever the policy, since nobody knows of them."""
    rows = _ROWS[name]
    first: dict[str, float] = {}
    for row in rows:
        first.setdefault(row.model, row.time_s)
    until_s = rows[0].time_s + CASES[name].measure_from_s
    return sum(time_s >= until_s for time_s in first.values())


def judged(name: str, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A trace's runs, and what they say about the bars."""
    by = {policy: [p for p in points if p["policy"] == policy] for policy in {p["policy"] for p in points}}
    fixed, ours = by["keep-alive"], by["predictive"]
    never_seen = unseen(name)
    rows = []
    for point in sorted(ours, key=lambda each: float(each["settings"]["wait_cost"])):
        wait_cost = float(point["settings"]["wait_cost"])
        best = min(fixed, key=lambda each: cost(each, wait_cost))
        bound = next(
            (each for each in by.get(ORACLE, ()) if each["settings"]["wait_cost"] == wait_cost), None
        )
        idle = point["idle_gpu_s"] + point["early_gpu_s"]
        rows.append(
            {
                "wait_cost": wait_cost,
                "idle_gpu_s": idle,
                "cold_starts": point["cold_starts"],
                "fixed_cold_starts": (other := at_idle(fixed, idle)),
                "cold_ratio": ratio(point["cold_starts"], other),
                "unseen_ratio": ratio(never_seen, other),
                "gpu_s": point["gpu_s"],
                "waited_s": point["waited_s"],
                "cost": cost(point, wait_cost),
                "best_keep_alive_s": best["settings"]["keep_alive_s"],
                "best_fixed_cost": cost(best, wait_cost),
                "cost_ratio": ratio(cost(point, wait_cost), cost(best, wait_cost)),
                "oracle_cost_ratio": bound and ratio(cost(bound, wait_cost), cost(best, wait_cost)),
            }
        )
    others = []
    for policy in ("hybrid-histogram", "kpa"):
        for point in by.get(policy, ()):
            idle = point["idle_gpu_s"] + point["early_gpu_s"]
            mine = at_idle(ours, idle)
            others.append(
                {
                    "policy": policy,
                    "setting": next(iter(point["settings"].values())),
                    "idle_gpu_s": idle,
                    "cold_starts": point["cold_starts"],
                    "ours_cold_starts": mine,
                    "ratio": ratio(mine, point["cold_starts"]),
                }
            )
    return {
        "says": CASES[name].says,
        "measure_from_s": CASES[name].measure_from_s,
        "requests": points[0]["requests"],
        "unseen": never_seen,
        "rows": rows,
        "others": others,
        "runs": list(points),
    }


def text(result: Mapping[str, Any]) -> str:
    parts = []
    for name, found in result.items():
        parts.append(
            f"{name}, {found['says']}: {found['requests']} requests after"
            f" {found['measure_from_s'] / DAY_S:.2g} days of learning, {found['unseen']} of them the first of a model"
        )
        columns = (
            *("wait_cost", "idle_gpu_s", "cold_starts", "fixed_cold_starts", "cold_ratio"),
            "unseen_ratio",
            *("best_keep_alive_s", "best_fixed_cost", "cost", "cost_ratio", "oracle_cost_ratio"),
        )
        rows = [
            [
                *(row[column] for column in columns),
                _met(row["cold_ratio"], COLD_BAR),
                _met(row["cost_ratio"], COST_BAR),
            ]
            for row in found["rows"]
        ]
        parts.append(table((*columns, f"<= {COLD_BAR}", f"<= {COST_BAR}"), rows))
        compared = ("policy", "setting", "idle_gpu_s", "cold_starts", "ours_cold_starts", "ratio")
        parts.append(
            table(
                (*compared, "fewer"),
                [[*(row[column] for column in compared), _met(row["ratio"], 1.0)] for row in found["others"]],
            )
        )
        parts.append("")
    parts.append(
        "idle_gpu_s: ready without work, and starts that nobody had asked for. fixed_cold_starts: of a fixed keep-alive"
        " with as much of it.\nunseen_ratio: what the first requests of new models alone come to, cold anyhow."
        "\ncost: all GPU-seconds + wait_cost * waiting. best_fixed_cost: of the keep-alive that was"
        " cheapest in hindsight; oracle: knows what comes."
    )
    return "\n".join(parts)


def _met(value: float | None, bar: float) -> str:
    return "-" if value is None else "met" if value <= bar else "missed"
