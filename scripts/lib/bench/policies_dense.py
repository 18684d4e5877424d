"""Dense and diurnal traffic: what each policy pays for the same SLO attainment, on traces of real systems.

Forecasts are learned on the first part of each trace; the rest is replayed and scored. The baselines' parameters are
the best of their sweeps on the scored part itself, which is more than anybody could know. Ours has one knob that is
swept, and is told nothing of the scored part. Between two points of a front GPU-seconds are interpolated over the
logarithm of the share that missed the SLO, so that no policy is charged for a coarse sweep.

Runs alone too: `PYTHONPATH=scripts/lib python -m bench.policies_dense --json`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from autoscaling.core.types import Rung, Spec
from autoscaling.sim.arrivals import ORIGIN_S, pieces
from autoscaling.sim.compare import Variant
from autoscaling.sim.forecasts import Foresight, NoForecasts, SimForecasts
from autoscaling.sim.oracle import Oracle
from autoscaling.sim.profile import Engine, Profile, Start
from autoscaling.sim.replay import Replay, Setup
from autoscaling.traces import Row, open_trace
from bench import clusters
from bench.clusters import say
from bench.numbers import table

DAY_S = 86400.0
ATTAINMENT = 0.99
SLO_S = 2.0
"""Of waiting: from a request's coming to a replica's beginning with it."""
COLD_S = (60.0, 300.0)
TICK_S = 5.0
"""How often is decided: a twelfth of the shorter start."""
WARM_UP_S = 3600.0
"""Replayed before the scored part, not counted: every policy comes to its own level."""
MOST = 200
SAVED, NEAR = 0.20, 1.2
"""The bars: so much less than the baselines, and no further from the oracle."""


@dataclass(frozen=True)
class Case:
    """A trace, which part is learned from and which is scored, and what a replica carries."""

    name: str
    file: str
    model: str | None
    """None: the only one."""
    learn_s: float
    until_s: float
    warm_up_s: float = WARM_UP_S
    concurrency: int = 16
    """Requests at once in a replica."""
    service_s: float = 20.0
    """How long each holds its place there."""
    replicas: int | None = 40
    """That the busiest windows (all but a thousandth) need; None: the trace is not scaled."""


CASES = (
    Case("azure-total", "min_azure_functions_2019_total_days0-9.csv.gz", None, 7 * DAY_S, 9 * DAY_S),
    Case("servegen-large", "win10_servegen_model_totals_days0-9.csv.gz", "m-large", 7 * DAY_S, 9 * DAY_S),
    Case("servegen-small", "win10_servegen_model_totals_days0-9.csv.gz", "m-small", 7 * DAY_S, 9 * DAY_S),
    Case("azure-code", "req_azure_llm_2023_code.csv.gz", None, 1740.0, 3600.0, 300.0, 4, 16.0, None),
)
"""ServeGen's m-mid and its two models of a single day are left out: the first has gaps in its collection, the others
nothing to learn from."""


@dataclass(frozen=True)
class Prepared:
    case: Case
    learn: Sequence[Row]
    score: Sequence[Row]
    scale: float

    def profile(self, cold_s: float) -> Profile:
        case = self.case
        engine = Engine(concurrency=case.concurrency, slowdown=(1.0,) * case.concurrency)
        return Profile(engine, {Rung.TEMPLATE: Start((cold_s,))}, slo_s=SLO_S, deadline_s=math.inf)


@dataclass(frozen=True)
class Point:
    """One run."""

    policy: str
    settings: Mapping[str, float]
    attainment: float
    gpu_s: float
    starting_gpu_s: float
    idle_gpu_s: float
    wait_p99_s: float
    starts: int
    requests: int
    took_s: float


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--traces", type=Path, default=Path("../shared/traces"), help="default: ../shared/traces"
    )
    parser.add_argument("--cases", default=",".join(case.name for case in CASES), help="default: all")
    parser.add_argument("--cold", default="60,300", help="seconds of a cold start (default: 60,300)")
    parser.add_argument("--policies", default="", help="only these of the dense part's policies")
    parser.add_argument("--processes", type=int, default=1, help="default: 1")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    wanted = options.cases.split(",")
    if unknown := set(wanted) - {case.name for case in CASES}:
        raise clusters.BenchError(
            f"--cases: {', '.join(sorted(unknown))} is none of {', '.join(case.name for case in CASES)}"
        )
    results = []
    for case in CASES:
        if case.name not in wanted:
            continue
        prepared = prepare(case, options.traces)
        for cold_s in map(float, options.cold.split(",")):
            say(f"{case.name}, cold starts of {cold_s:g} s")
            variants = [
                v for v in sweep(case) if not options.policies or v.policy in options.policies.split(",")
            ]
            results.append(judged(prepared, cold_s, _points(prepared, cold_s, variants, options.processes)))
    return {"slo_s": SLO_S, "attainment": ATTAINMENT, "tick_s": TICK_S, "cases": results}


def prepare(case: Case, traces: Path) -> Prepared:
    """Every request holds its place for the case's service time, whatever the trace says of tokens."""
    rows = [
        row for row in open_trace(traces / case.file).rows() if case.model is None or row.model == case.model
    ]
    if not rows:
        raise clusters.BenchError(f"{traces / case.file}: no requests of {case.model or 'any model'}")
    first_s = rows[0].time_s
    rows = [row._replace(time_s=row.time_s - first_s, exec_s=case.service_s) for row in rows]
    scale = 1.0
    if case.replicas is not None:
        most = busiest([row.requests / row.window_s for row in rows])
        scale = case.replicas * case.concurrency / case.service_s / most
    begins_s = case.learn_s - case.warm_up_s
    return Prepared(
        case,
        [row for row in rows if row.time_s < begins_s],
        [row for row in rows if begins_s <= row.time_s < case.until_s],
        scale,
    )


def busiest(rates: Iterable[float]) -> float:
    """Of all but the highest thousandth."""
    ordered = sorted(rates)
    return float(ordered[math.ceil(0.999 * len(ordered)) - 1])


def sweep(case: Case) -> list[Variant]:
    """What is tried, the defaults first."""
    shares = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    return [
        Variant("predictive"),
        *(Variant("predictive", {"demand_quantile": q}) for q in (0.5, 0.75, 0.9, 0.95, 0.99, 0.999)),
        Variant("ray-default"),
        *(
            Variant(
                "ray-default",
                {
                    "target_ongoing_requests": share * case.concurrency,
                    "upscale_delay_s": 0,
                    "downscale_delay_s": down_s,
                },
            )
            for share in shares
            for down_s in (60, 300, 600)
        ),
        Variant("kpa"),
        *(
            Variant("kpa", {"target_utilization": share, "stable_window_s": window_s})
            for share in shares
            for window_s in (60, 300)
        ),
        *(Variant("fixed", {"replicas": n}) for n in range(10, 61, 5)),
        *(Variant("oracle", {"demand_quantile": q}) for q in (0.5,)),
    ]


def _points(
    prepared: Prepared, cold_s: float, variants: Sequence[Variant], processes: int
) -> Iterator[Point]:
    # Forked, one run a process: what was learned is learned once, and no run changes it for the next.
    _JOB[:] = [(prepared, cold_s, learned(prepared, cold_s))]
    with get_context("fork").Pool(processes, clusters.worker, maxtasksperchild=1) as pool:
        for point in pool.imap(_run, variants, chunksize=1):
            say(f"  {point.policy} {dict(point.settings)}: {point.attainment:.4f}, {point.gpu_s:.0f} GPU-s")
            yield point


_JOB: list[tuple[Prepared, float, SimForecasts]] = []


def learned(prepared: Prepared, cold_s: float) -> SimForecasts:
    """Forecasters that know the first part."""
    profile = prepared.profile(cold_s)
    forecasts = SimForecasts()
    horizon_s = max(start.measured_s()[1] for start in profile.starts.values())
    for piece in pieces(prepared.learn, profile.engine.work_s, 0, prepared.scale, ORIGIN_S):
        for model, (times, work) in piece.requests.items():
            forecasts.watch(model, float(times[0]), horizon_s)
            forecasts.arrived(model, times, work)
    return forecasts


def _run(variant: Variant) -> Point:
    prepared, cold_s, forecasts = _JOB[0]
    return run(prepared, cold_s, variant, forecasts)


def run(prepared: Prepared, cold_s: float, variant: Variant, forecasts: Foresight) -> Point:
    """One policy over the scored part. Serve's policy raises ours where requests in progress need it, as it does live;
    the others decide alone."""
    case, profile = prepared.case, prepared.profile(cold_s)
    ours = variant.policy in ("predictive", "oracle")
    setup = Setup(
        profile=profile,
        seed=zlib.crc32(case.name.encode()),
        tick_s=TICK_S,
        scale=prepared.scale,
        measure_from_s=case.warm_up_s,
        follow=variant.policy == "predictive",
        origin_s=ORIGIN_S,
    )
    if variant.policy == "oracle":
        forecasts = Oracle(profile.engine.slowdowns(), TICK_S)
    spec = variant.applied(
        Spec("", wait_cost=10.0, max_replicas=MOST, target_ongoing_requests=float(case.concurrency))
    )
    replay = Replay(
        prepared.score,
        lambda model: replace(spec, model=model),
        setup,
        forecasts=forecasts if ours else NoForecasts(),
    )
    report = replay.run()
    if report.notes:
        raise clusters.BenchError(f"{case.name}, {variant.label}: {'; '.join(report.notes)}")
    total = report.total
    return Point(
        policy=variant.policy,
        settings=dict(variant.settings),
        attainment=total.slo_attainment,
        gpu_s=total.gpu_s,
        starting_gpu_s=total.starting_gpu_s,
        idle_gpu_s=total.idle_gpu_s,
        wait_p99_s=total.wait_p99_s,
        starts=total.starts,
        requests=total.requests,
        took_s=report.took_s,
    )


def judged(prepared: Prepared, cold_s: float, points: Iterator[Point]) -> dict[str, Any]:
    """Every policy at the attainment asked for, and the bars."""
    case = prepared.case
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.policy, []).append(point)
    requests = next((points[0].requests for points in found.values()), 0)
    least = requests * case.service_s / case.concurrency
    wanted = comparable(found)
    at = {policy: at_attainment(points, wanted) for policy, points in found.items()}
    return {
        "case": case.name,
        "attainment": wanted,
        "cold_s": cold_s,
        "requests": requests,
        "service_s": case.service_s,
        "concurrency": case.concurrency,
        "work_gpu_s": least,
        "gpu_s_at_slo": at,
        "points": [asdict(point) for points in found.values() for point in points],
    }


def comparable(found: Mapping[str, Sequence[Point]]) -> float:
    """ATTAINMENT, or what each of those compared attains at best where one of them attains less."""
    best = [max(point.attainment for point in found[policy]) for policy in COMPARED if policy in found]
    return min([ATTAINMENT, *best])


def attained(prepared: Prepared, cold_s: float, processes: int = 1) -> float:
    """At what the policies are compared: see `comparable`."""
    variants = [each for each in sweep(prepared.case) if each.policy in COMPARED]
    found: dict[str, list[Point]] = {}
    for point in _points(prepared, cold_s, variants, processes):
        found.setdefault(point.policy, []).append(point)
    return comparable(found)


def at_attainment(points: Sequence[Point], wanted: float) -> float | None:
    """GPU-seconds on the front of a sweep where it attains so much; None where it never does."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.gpu_s, -p.attainment)):
        if not front or point.attainment > front[-1].attainment:
            front.append(point)
    above = next((i for i, point in enumerate(front) if point.attainment >= wanted), None)
    if above is None:
        return None
    if above == 0:
        return front[0].gpu_s
    low, high = front[above - 1], front[above]
    ends = [math.log(max(1e-9, 1 - share)) for share in (low.attainment, wanted, high.attainment)]
    share = (ends[1] - ends[0]) / (ends[2] - ends[0])
    return low.gpu_s + share * (high.gpu_s - low.gpu_s)


def text(result: Mapping[str, Any]) -> str:
    parts = [
        f"GPU-seconds at {result['attainment']:.0%} of the requests waiting at most {result['slo_s']:g} s (or what all "
        "attain at best: `at`), as multiples of the work itself (every place of every replica always taken)."
    ]
    rows = []
    for case in result["cases"]:
        at, work = case["gpu_s_at_slo"], case["work_gpu_s"]
        ours, oracle = at.get("predictive"), at.get("oracle")
        rows.append(
            [
                case["case"],
                case["cold_s"],
                case["attainment"],
                *(_over(at.get(policy), work) for policy in _COLUMNS),
                *(_over(ours, at.get(policy)) for policy in ("ray-default", "kpa")),
                _over(ours, oracle),
                *(_over(oracle, at.get(policy)) for policy in ("ray-default", "kpa")),
            ]
        )
    ours_over = ("ours/ray", "ours/kpa", "ours/oracle")
    head = ("trace", "cold s", "at", *_COLUMNS, *ours_over, "oracle/ray", "oracle/kpa")
    parts.append(table(head, rows))
    parts.append(
        f"The bars: ours/ray and ours/kpa at most {1 - SAVED:g}, ours/oracle at most {NEAR:g}.\n"
        "oracle/ray, oracle/kpa: what knowing every arrival would reach; above the first bar, nobody can meet it."
    )
    return "\n".join(parts)


COMPARED = ("predictive", "ray-default", "kpa", "oracle")
_COLUMNS = ("predictive", "ray-default", "kpa", "fixed", "oracle")


def _over(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.policies_dense", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments(parser)
    options = parser.parse_args()
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        result = measure(options)
    except clusters.BenchError as error:
        print(f"policies_dense: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2) if options.json else text(result), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
