"""What each process holds: dark, lit, after some requests, parked, with many models; and Ray Serve alone beside it.

Proportional set sizes (/proc/PID/smaps_rollup): what processes share, such as a template and its engines, is counted
once between them, so that the sums are what the machine really gives.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
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
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--models", type=int, default=24, help="how many models many are (default: 24)")


def measure(options: Namespace) -> dict[str, Any]:
    """Every state, `--runs` readings each."""
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise clusters.BenchError(f"--parts: no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.models < 1:
        raise clusters.BenchError(f"--models: {options.models} is not at least 1")
    readings = _Readings(options.settle)
    for name, part in PARTS.items():
        if name in parts:
            part(options, readings)
    samples, busy = readings.samples, readings.busy
    return {"states": {state: _summary(found, busy[state]) for state, found in samples.items()}}


class _Readings:
    """By state."""

    def __init__(self, settle_s: float) -> None:
        self.samples: dict[str, list[Sample]] = {}
        self.busy: dict[str, list[dict[str, float]]] = {}
        self._settle_s = settle_s

    def read(self, state: str, running: Running) -> None:
        """One more of that state, after so much quiet."""
        before = usage.cpu_by_kind(running.processes())
        time.sleep(self._settle_s)
        used = usage.cpu_between(before, usage.cpu_by_kind(running.processes()))
        self.busy.setdefault(state, []).append({kind: s / self._settle_s for kind, s in used.items()})
        sample = usage.pss_by_kind(running.processes())
        self.samples.setdefault(state, []).append(sample)
        say(f"{state}: {sum(sample.values()) / 2**20:.0f} MiB")


def _bare(options: Namespace, readings: _Readings) -> None:
    say("Ray Serve alone")
    with clusters.cluster("bare", {}, app="bench.null:trivial") as running:
        for _ in range(options.runs):
            readings.read("bare Serve", running)


def _prebuilt(options: Namespace, readings: _Readings) -> None:
    say("Relight, parking nothing")
    with _relight(clusters.fleet(keep_alive_s=10 + options.settle)) as running:
        for _ in range(options.runs):
            clusters.wait_until_dark(running)
            readings.read("dark", running)
            _light(running)
            readings.read("lit, fresh", running)
            asyncio.run(closed_loop(running.target, [chat(MODEL, PROMPT, 8)] * REQUESTS, 4))
            readings.read(f"lit, after {REQUESTS} requests", running)


def _parking(options: Namespace, readings: _Readings) -> None:
    say("Relight, parking")
    with _relight(clusters.fleet(keep_alive_s=1, park_memory_bytes=4 * 2**30)) as running:
        for _ in range(options.runs):
            _light(running)
            clusters.wait_until_dark(running, parked=True)
            readings.read("parked", running)


def _plain(options: Namespace, readings: _Readings) -> None:
    say("Relight, without prebuilt templates")
    with _relight(clusters.fleet(keep_alive_s=10 + options.settle, prebuilt="off")) as running:
        for _ in range(options.runs):
            clusters.wait_until_dark(running)
            readings.read("dark, prebuilt off", running)
            _light(running)
            readings.read("lit, prebuilt off", running)


def _many(options: Namespace, readings: _Readings) -> None:
    say("Relight, without prebuilt templates, with many models")
    fleet = clusters.fleet(prebuilt="off")
    (entry,) = fleet["models"]
    fleet["models"] += [{**entry, "id": f"{MODEL}-{i}", "aliases": []} for i in range(1, options.models)]
    with _relight(fleet) as running:
        for _ in range(options.runs):
            clusters.wait_until_dark(running)
            readings.read(f"{options.models} dark, prebuilt off", running)


PARTS: Mapping[str, Callable[[Namespace, _Readings], None]] = {
    "bare": _bare,
    "prebuilt": _prebuilt,
    "parking": _parking,
    "plain": _plain,
    "many": _many,
}


@contextlib.contextmanager
def _relight(fleet: dict[str, Any]) -> Iterator[Running]:
    with clusters.cluster("relight", fleet) as running:
        clusters.wait_for_templates(running.checkout.run_dir)
        yield running


def _light(running: Running) -> None:
    asyncio.run(one(running.target, chat(MODEL, PROMPT, 8), 300))
    clusters.wait_for("a replica", lambda: running.status()["models"][0]["replicas"] == 1, 60)


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
    if "bare Serve" in states:
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
