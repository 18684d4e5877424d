"""What each process holds: dark, lit, after some requests, parked; and Ray Serve alone for comparison.

Proportional set sizes (/proc/PID/smaps_rollup): what processes share, such as a template and its engines, is counted
once between them, so that the sums are what the machine really gives.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from argparse import ArgumentParser, Namespace
from typing import Any

from bench import clusters, usage
from bench.client import chat, closed_loop, one
from bench.clusters import MODEL, Running, say
from bench.numbers import median_of, table

REQUESTS = 100
PROMPT = "What is the capital of France?"
OURS = (
    "gateway",
    "controller",
    "model replica",
    "engine host",
    "node template",
    "model template",
    "engine",
    "engine core",  # a plain start's engine has its core in a process of its own
)

Sample = dict[str, int]


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--settle",
        type=float,
        default=5.0,
        help="seconds of quiet before each reading, in which the idle processor time is taken (default: 5)",
    )


def measure(options: Namespace) -> dict[str, Any]:
    """Every state, `--runs` readings each."""
    samples: dict[str, list[Sample]] = {}
    busy: dict[str, list[dict[str, float]]] = {}

    def read(state: str, running: Running) -> None:
        before = usage.cpu_by_kind(running.processes())
        time.sleep(options.settle)
        used = usage.cpu_between(before, usage.cpu_by_kind(running.processes()))
        busy.setdefault(state, []).append({kind: s / options.settle for kind, s in used.items()})
        sample = usage.pss_by_kind(running.processes())
        samples.setdefault(state, []).append(sample)
        say(f"{state}: {sum(sample.values()) / 2**20:.0f} MiB")

    def light(running: Running) -> None:
        asyncio.run(one(running.target, chat(MODEL, PROMPT, 8), 300))
        clusters.wait_for("a replica", lambda: running.status()["models"][0]["replicas"] == 1, 60)

    say("Ray Serve alone")
    with clusters.cluster("bare", {}, app="bench.null:trivial") as running:
        for _ in range(options.runs):
            read("bare Serve", running)
    say("Relight, parking nothing")
    keep_alive_s = 10 + options.settle
    with clusters.cluster("relight", clusters.fleet(keep_alive_s=keep_alive_s)) as running:
        clusters.wait_for_templates(running.checkout.run_dir)
        for _ in range(options.runs):
            clusters.wait_until_dark(running)
            read("dark", running)
            light(running)
            read("lit, fresh", running)
            asyncio.run(closed_loop(running.target, [chat(MODEL, PROMPT, 8)] * REQUESTS, 4))
            read(f"lit, after {REQUESTS} requests", running)
    say("Relight, parking")
    parking = clusters.fleet(keep_alive_s=1, park_memory_bytes=4 * 2**30)
    with clusters.cluster("relight", parking) as running:
        clusters.wait_for_templates(running.checkout.run_dir)
        for _ in range(options.runs):
            light(running)
            clusters.wait_until_dark(running, parked=True)
            read("parked", running)
    say("Relight, without prebuilt templates")
    with clusters.cluster("relight", clusters.fleet(keep_alive_s=keep_alive_s, prebuilt="off")) as running:
        clusters.wait_for_templates(running.checkout.run_dir)
        for _ in range(options.runs):
            clusters.wait_until_dark(running)
            read("dark, prebuilt off", running)
            light(running)
            read("lit, prebuilt off", running)
    return {"states": {state: _summary(found, busy[state]) for state, found in samples.items()}}


def _summary(samples: list[Sample], busy: list[dict[str, float]]) -> dict[str, Any]:
    kinds = sorted({kind for sample in samples for kind in sample})
    medians = {kind: int(statistics.median(s.get(kind, 0) for s in samples)) for kind in kinds}
    return {
        "n": len(samples),
        "pss_bytes": {k: v for k, v in medians.items() if v},
        "sum_bytes": int(statistics.median(sum(s.values()) for s in samples)),
        "ours_bytes": int(statistics.median(sum(s.get(k, 0) for k in OURS) for s in samples)),
        "cores": round(statistics.median(sum(b.values()) for b in busy), 4),
        "cores_by_process": {k: round(v, 4) for k, v in median_of(busy).items()},
    }


def text(result: dict[str, Any]) -> str:
    """A column a state, MiB."""
    states = result["states"]
    kinds = sorted(
        {kind for state in states.values() for kind in state["pss_bytes"]},
        key=lambda kind: (kind in OURS, OURS.index(kind) if kind in OURS else 0, kind),
    )

    def mib(value: int | None) -> float | None:
        return None if value is None else round(value / 2**20, 1)

    lines: list[list[Any]] = [[k, *(mib(s["pss_bytes"].get(k)) for s in states.values())] for k in kinds]
    lines.append(["Ray and Serve", *(mib(s["sum_bytes"] - s["ours_bytes"]) for s in states.values())])
    lines.append(["Relight's own", *(mib(s["ours_bytes"]) for s in states.values())])
    lines.append(["sum", *(mib(s["sum_bytes"]) for s in states.values())])
    bare = states["bare Serve"]["sum_bytes"]
    lines.append(["times bare Serve", *(round(s["sum_bytes"] / bare, 2) for s in states.values())])
    cores = [
        f"  {name}: {state['cores']:.1%} ("
        + ", ".join(f"{kind} {share:.1%}" for kind, share in state["cores_by_process"].items())
        + ")"
        for name, state in states.items()
    ]
    sizes = table(["PSS in MiB, medians", *states], lines)
    return "\n".join([sizes, "\nprocessor time while nothing is asked, of one core:", *cores])
