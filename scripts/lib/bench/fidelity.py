"""Is the simulator right? The same minutes of traffic on a live cluster of this machine, and in the simulator.

Live is all of it: the real engine behind a real cluster, asked over HTTP. What the simulator is told is measured before
and after the minutes that are compared: the engine's rates by batch size (`scripts/bench profile`), and, by a model
that is asked a few times while it is dark, what starts, answers, decisions and stops take. Of the compared minutes it
gets the arrival times only. Policy and spec are those of the fleet.

A dozen starts wander from one ten minutes to the next by more than the bars, on a machine with so few cores: so there
are several runs, each with traffic of its own, by a model of its own. What is compared is all of them together.

Both sides count alike. Cold starts: from zero, with somebody waiting. Waiting: from a request's coming to its being
given to an engine. GPU-seconds: replicas that start, run or stop, live as Serve tells several times a second; a model
without GPUs counts as one GPU. What is drawn is drawn anew for each of the simulator's seeds; medians are compared.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoscaling.core.policies import POLICIES
from autoscaling.sim.profile import Profile, ProfileError, load_profile
from autoscaling.sim.replay import Setup
from autoscaling.sim.report import ModelReport, together
from autoscaling.traces import Row
from bench import calibration, clusters, engine_profile
from bench.calibration import waited_s
from bench.clusters import BenchError
from bench.fidelity_figures import compared, middle, profile_of, simulated
from bench.fidelity_live import CALIBRATION, Live, drive, seen, seen_together
from bench.fidelity_traffic import Pattern, arrivals
from bench.numbers import table
from deployments.fleet import Fleet, parse_fleet
from deployments.scaling import scaling_spec


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--policies", default="keep-alive", help="one after another, --runs of each (default: keep-alive)"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of traffic for each run (default: 10)")
    parser.add_argument("--keep-alive-s", type=float, default=20.0, help="of all policies (default: 20)")
    parser.add_argument("--mean-gap-s", type=float, default=25.0, help="between bursts (default: 25)")
    parser.add_argument(
        "--margin-s", type=float, default=5.0, help="gap and keep-alive differ by (default: 5)"
    )
    parser.add_argument("--burst-requests", type=int, default=6, help="on average (default: 6)")
    parser.add_argument("--burst-gap-s", type=float, default=0.25, help="in a burst, mean (default: 0.25)")
    parser.add_argument("--output-tokens", type=int, default=32, help="of each answer (default: 32)")
    parser.add_argument(
        "--cycles",
        type=int,
        default=8,
        help="of calibration, half before and half after a run (default: 8)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first run's traffic, the next ones' follow (default: 0)",
    )
    parser.add_argument(
        "--sim-seeds", type=int, default=25, help="replays, of which the median (default: 25)"
    )
    parser.add_argument("--profile", type=Path, help="the engine's rates; default: measured first")


def fleet(policies: Mapping[str, str], keep_alive_s: float, store: str) -> dict[str, Any]:
    """`policies`: by model, one for each run. One more is there to calibrate with; all have the default model's engine.
    Replicas start through Serve, as they must on GPUs.

    The one to calibrate with is lit for as long as the others: after a short life Serve begins the next start later.
    """
    base = clusters.fleet(early_wake="off")
    (entry,) = base["models"]
    scaling = {CALIBRATION: {"policy": "keep-alive", "keep_alive_s": keep_alive_s}}
    scaling |= {model: {"policy": policy, "keep_alive_s": keep_alive_s} for model, policy in policies.items()}
    base["models"] = [
        {**entry, "id": name, "aliases": [], "scaling": {"max_replicas": 1, **of}}
        for name, of in scaling.items()
    ]
    base["controller"] = {"store": store}
    return base


def measure(options: Namespace) -> dict[str, Any]:
    policies: dict[str, str] = {}
    traffic: dict[str, list[float]] = {}
    for policy in _policies(options):
        for run in range(options.runs):
            model = f"{policy}-{run + 1}"
            policies[model] = policy
            traffic[model] = _arrivals(options, options.seed + run)
    folder = clusters.HOME / "fidelity"
    folder.mkdir(parents=True, exist_ok=True)
    engine = _engine(options.profile, folder)
    content = fleet(policies, options.keep_alive_s, f"sqlite:///{folder / f'history-{int(time.time())}.db'}")
    parsed = parse_fleet(content)
    with clusters.cluster("fidelity", content) as running:
        clusters.wait_for_templates(running.checkout.run_dir)
        lives, input_tokens = asyncio.run(drive(options, running, traffic))
    rows, replays = [], []
    for model, live in lives.items():
        work_s = engine.engine.work_s(input_tokens, options.output_tokens, 0.0)
        profile = calibration.calibrated(engine, live.cycles, parsed.controller.tick_s, work_s)
        found = _replays(options, parsed, model, profile, live, traffic[model], input_tokens)
        replays.append(found)
        row = _row(model, seen(live), [each.figures for each in found])
        rows.append(row | {"profile": profile_of(profile), "arrivals_s": traffic[model]} | _raw(live))
    path = folder / "profile.json"
    path.write_text(json.dumps(rows[-1]["profile"], indent=2) + "\n", encoding="utf-8")
    whole = _row(
        "all", seen_together([r["live"] for r in rows]), [together(s) for s in zip(*replays, strict=True)]
    )
    return {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "json"},
        "file": str(path),
        "input_tokens": input_tokens,
        "rows": rows,
        "total": whole,
    }


def _policies(options: Namespace) -> list[str]:
    policies = list(dict.fromkeys(options.policies.split(",")))
    for name in policies:
        if name not in POLICIES:
            raise BenchError(f"--policies: {name!r} is none of {', '.join(sorted(POLICIES))}")
    if options.burst_requests < 2:
        raise BenchError(f"--burst-requests: {options.burst_requests} is not at least 2")
    if options.cycles < 4 or options.cycles % 2:
        raise BenchError(f"--cycles: {options.cycles} is not even and at least 4")
    for name in ("runs", "minutes", "mean_gap_s", "burst_gap_s", "sim_seeds", "output_tokens"):
        if getattr(options, name) <= 0:
            raise BenchError(f"--{name.replace('_', '-')}: {getattr(options, name)} is not above 0")
    return policies


def _arrivals(options: Namespace, seed: int) -> list[float]:
    if not 0 <= options.margin_s < options.keep_alive_s:
        raise BenchError(f"--margin-s: {options.margin_s:g} is not from 0 to below --keep-alive-s")
    pattern = Pattern(
        span_s=options.minutes * 60,
        keep_alive_s=options.keep_alive_s,
        margin_s=options.margin_s,
        mean_gap_s=options.mean_gap_s,
        burst_requests=options.burst_requests,
        burst_gap_s=options.burst_gap_s,
    )
    times = arrivals(pattern, seed)
    if not times:
        raise BenchError(f"--minutes: {options.minutes:g} is too short for a request and its keep-alive")
    return times


def _engine(path: Path | None, folder: Path) -> Profile:
    if path is None:
        path = folder / "engine-profile.json"
        engine_profile.measure(Namespace(most=16, requests=3, runs=1, out=path))
    try:
        return load_profile(path)
    except ProfileError as error:
        raise BenchError(f"--profile: {error}") from None


def _replays(  # noqa: PLR0917 - called once, above
    options: Namespace,
    parsed: Fleet,
    name: str,
    profile: Profile,
    live: Live,
    times: Sequence[float],
    input_tokens: int,
) -> list[ModelReport]:
    spec = next(scaling_spec(model) for model in parsed.models if model.id == name)
    rows = [
        Row(live.begin_s + at_s, name, input_tokens=input_tokens, output_tokens=options.output_tokens)
        for at_s in times
    ]
    return [
        simulated(
            spec,
            Setup(profile=profile, seed=seed, tick_s=parsed.controller.tick_s),
            rows,
            live.begin_s,
            options.minutes * 60,
        )
        for seed in range(options.sim_seeds)
    ]


def _row(name: str, live: dict[str, Any], figures: Sequence[Any]) -> dict[str, Any]:
    sim = middle(figures)
    return {"run": name, "live": live, "simulated": sim, "compared": compared(live, sim)}


def _raw(live: Live) -> dict[str, Any]:
    """What the figures come from, for whoever looks closer."""
    return {
        "cycles": [dataclasses.asdict(each) for each in live.cycles],
        "answer_s": statistics.median(t.total_s - waited_s(t) for t in live.timings),
        "sent_s": [round(t.sent_s - live.begin_s, 3) for t in live.timings],
        "replicas": [
            [round(s.at_s - live.begin_s, 3), dict(s.states)] for s in live.samples if s.at_s >= live.begin_s
        ],
    }


def _median(cycles: Sequence[Mapping[str, Any]]) -> float:
    return statistics.median(float(cycle["answer_s"]) for cycle in cycles)


def text(result: Mapping[str, Any]) -> str:
    lines = []
    for row in [*result["rows"], result["total"]]:
        live, sim = row["live"], row["simulated"]
        for name, of in row["compared"].items():
            off = "-" if of["off"] is None else f"{100 * of['off']:+.1f} %"
            met = "met" if of["met"] else "MISSED"
            lines.append([row["run"], name, live[name], sim[name], off, f"{100 * of['bar']:.0f} %", met])
    told = table(["run", "figure", "live", "simulated", "off", "bar", ""], lines)
    for row in result["rows"]:
        live, sim, profile = row["live"], row["simulated"], row["profile"]
        low, high = sim["cold_starts_range"]
        (starts,) = profile["starts"].values()
        alone, batch = ([c for c in row["cycles"] if (c["batch"] > 1) is many] for many in (False, True))
        told += (
            f"\n\n{row['run']}: {live['requests']} requests, {live['failed']} failed, {live['cold_requests']} cold"
            f" (simulated {sim['cold_requests']:g}; cold starts {low} to {high} over the seeds). An answer took"
            f" {row['answer_s']:.2f} s (median). Calibrated on either side, in seconds: start after"
            f" {profile['wake_s']:.2f}, which takes {min(starts):.2f} to {max(starts):.2f}; a decision acts after"
            f" {profile['apply_s']:.2f}; a stop takes {profile['stop_s']:.2f}; an answer alone"
            f" {_median(alone):.2f}, of {batch[0]['batch']} at once {_median(batch):.2f}. Who finds a replica waits"
            f" {profile['handoff_s'] * 1e3:.1f} ms."
        )
    return told + f"\n\nThe last of these profiles: relight simulate TRACE --profile {result['file']}"


__all__ = ["arguments", "fleet", "measure", "text"]
