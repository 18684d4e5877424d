"""Warm: Relight next to vLLM's own server alone, and to ray.serve.llm, under the same closed-loop load.

Only one system's engine runs at a time. Blocks alternate (start, warm up, measure, stop), so that what else the
machine does falls on all. In Relight's blocks the same engine is asked past the gateway, too, over its own socket:
the difference of those two is what the way through Serve's proxy and the gateway costs.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import baseline, clusters, usage
from bench.client import RequestFailed, Target, chat, closed_loop, one
from bench.clusters import MODEL, say
from bench.numbers import percentile, ratio, summary, table
from deployments.engine.template import SINGLE_THREAD_ENVIRONMENT
from deployments.local import processes
from deployments.local.http import get
from deployments.local.processes import Process
from deployments.local.state import pick_port

MAX_TOKENS = 64
PROMPTS = (
    "Explain how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper.",
    "What are the main causes of inflation?",
    "Describe the water cycle to a child.",
    "Give me three ideas for a rainy weekend.",
    "Why do cats purr?",
    "Summarise the history of the printing press.",
    "How does a refrigerator work?",
)
# Requests at each concurrency: enough for some seconds of every batch size, few enough for many blocks.
_REQUESTS_PER_WORKER = {1: 6, 4: 4}
_REQUESTS_PER_WORKER_ELSE = 3


@dataclass(frozen=True)
class Side:
    """A way to an engine that is up."""

    name: str
    target: Target
    processes: Callable[[], list[Process]]


@contextmanager
def _vllm(folder: Path) -> Iterator[list[Side]]:
    """vLLM's server as its command line starts it, with what Relight sets for its engines in the environment."""
    spec = clusters.spec()
    port = pick_port(None)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", *spec.names, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--disable-uvicorn-access-log", *spec.argv]
    with clusters.marked("vllm") as (checkout, env), (checkout.root / "vllm.log").open("w") as log:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**env, **SINGLE_THREAD_ENVIRONMENT, **dict(spec.env)},
            start_new_session=True,
        )

        def up() -> bool:
            if server.poll() is not None:
                raise clusters.BenchError(f"vLLM's server ended; see {checkout.root / 'vllm.log'}")
            get(f"http://127.0.0.1:{port}/health", timeout_s=5)
            return True

        clusters.wait_for("vLLM's server", up, 300)
        yield [Side("vllm", Target(port=port), lambda: processes.ours(checkout.run_dir))]
        server.terminate()
        server.wait()


@contextmanager
def _relight(_: Path, prebuilt: str = "auto") -> Iterator[list[Side]]:
    # Lit by its first request, as in life: a replica that must be there from the start would come before the template.
    with clusters.cluster("relight", clusters.fleet(keep_alive_s=900, prebuilt=prebuilt)) as running:
        clusters.wait_for_templates(running.checkout.run_dir)
        asyncio.run(one(running.target, chat(MODEL, "Hello", 1), 300))
        clusters.wait_for("a replica", lambda: running.status()["models"][0]["replicas"] == 1, 60)
        engine = next(e for n in running.status()["nodes"] for e in n["engines"])
        name = "relight" if prebuilt == "auto" else "relight-forked"
        yield [
            Side(name, running.target, running.processes),
            Side(f"{name}: engine alone", Target(uds=engine["http"]), running.processes),
        ]


@contextmanager
def _ray_serve_llm(folder: Path) -> Iterator[list[Side]]:
    content = baseline.settings(str(folder), min_replicas=1, tuned=True)
    with clusters.cluster(
        "ray-serve-llm", content, app=baseline.APP, python=baseline.python(), timeout_s=300
    ) as running:
        yield [Side("ray-serve-llm", running.target, running.processes)]


SYSTEMS: dict[str, Callable[[Path], Any]] = {
    "vllm": _vllm,
    "relight": _relight,
    "relight-forked": lambda folder: _relight(folder, "off"),
    "ray-serve-llm": _ray_serve_llm,
}


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--concurrency", default="1,4,16", help="how many clients at once (default: 1,4,16)")
    parser.add_argument(
        "--systems", default=",".join(SYSTEMS), help="which, and in what order (default: all)"
    )
    parser.add_argument("--no-baseline", action="store_true", help="without ray.serve.llm")


def measure(options: Namespace) -> dict[str, Any]:
    """`--runs` blocks of every system, in turn."""
    names = [n for n in options.systems.split(",") if not (options.no_baseline and n == "ray-serve-llm")]
    if unknown := set(names) - set(SYSTEMS):
        raise clusters.BenchError(f"no system {', '.join(sorted(unknown))}; there are {', '.join(SYSTEMS)}")
    levels = [int(c) for c in options.concurrency.split(",")]
    folder = clusters.model_folder()
    blocks: dict[tuple[str, int], list[dict[str, Any]]] = {}
    failures: dict[str, str] = {}
    for block in range(options.runs):
        # Every other block backwards, so that none always comes after the same one.
        for name in names if block % 2 == 0 else reversed(names):
            say(f"block {block + 1} of {options.runs}: {name}")
            clusters.read_into_page_cache(folder)
            try:
                with SYSTEMS[name](folder) as sides:
                    for side in sides:
                        _warm_up(side)
                    for level in levels:
                        for side in sides if block % 2 == 0 else reversed(sides):
                            done = _load(side, level)
                            blocks.setdefault((side.name, level), []).append(done)
                            say(
                                f"  {side.name}, {level} at once: {done['tokens_per_s']:.1f} tokens/s, "
                                f"first token {done['first_token_s']:.3f} s"
                            )
            except (clusters.BenchError, RequestFailed, OSError) as error:
                failures[name] = str(error)
                say(f"{name}: {error}")
    return {"max_tokens": MAX_TOKENS, "rows": _results(blocks), "failures": failures}


def _requests(count: int) -> list[bytes]:
    return [chat(MODEL, prompt, MAX_TOKENS) for prompt in itertools.islice(itertools.cycle(PROMPTS), count)]


def _warm_up(side: Side) -> None:
    """Every prompt once, in a batch: prefix caches and allocators are then the same for all."""
    asyncio.run(closed_loop(side.target, _requests(len(PROMPTS)), len(PROMPTS)))


def _load(side: Side, concurrency: int) -> dict[str, Any]:
    count = concurrency * _REQUESTS_PER_WORKER.get(concurrency, _REQUESTS_PER_WORKER_ELSE)
    before = usage.cpu_by_kind(side.processes())
    load = asyncio.run(closed_loop(side.target, _requests(count), concurrency))
    used = usage.cpu_between(before, usage.cpu_by_kind(side.processes()))
    tokens = sum(t.tokens for t in load.timings)
    if tokens != count * MAX_TOKENS:
        raise RequestFailed(f"{side.name} gave {tokens} tokens instead of {count * MAX_TOKENS}")
    first = [t.first_token_s for t in load.timings]
    return {
        "tokens_per_s": tokens / load.wall_s,
        "requests_per_s": count / load.wall_s,
        "first_token_s": statistics.median(first),
        "first_token_values": first,
        # Some servers send several tokens at once: what a token takes is the whole stream over its tokens.
        "between_tokens_s": statistics.median(
            (t.last_s - t.first_s) / (MAX_TOKENS - 1) for t in load.timings
        ),
        "reads_per_request": statistics.median(t.reads for t in load.timings),
        "client_cpu_share": load.client_cpu_s / load.wall_s,
        "cpu_s": used,
        "wall_s": load.wall_s,
    }


def _results(blocks: dict[tuple[str, int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for (name, level), done in blocks.items():
        first = [v for d in done for v in d["first_token_values"]]
        cpu: dict[str, list[float]] = {}
        for d in done:
            for kind, seconds in d["cpu_s"].items():
                tokens = d["tokens_per_s"] * d["wall_s"]
                cpu.setdefault(kind, []).append(seconds / tokens * 1000)
        rows.append(
            {
                "system": name,
                "concurrency": level,
                "tokens_per_s": summary([d["tokens_per_s"] for d in done]),
                "requests_per_s": summary([d["requests_per_s"] for d in done]),
                "first_token_s": {"median": statistics.median(first), "p95": percentile(first, 0.95)},
                "between_tokens_s": summary([d["between_tokens_s"] for d in done]),
                "reads_per_request": statistics.median(d["reads_per_request"] for d in done),
                "client_cpu_share": max(d["client_cpu_share"] for d in done),
                "cpu_ms_per_token": {kind: round(statistics.median(v), 3) for kind, v in cpu.items()},
            }
        )
    for row in rows:
        row["to"] = {
            other["system"]: {
                "tokens_per_s": ratio(row["tokens_per_s"]["median"], other["tokens_per_s"]["median"]),
                "first_token_s": ratio(row["first_token_s"]["median"], other["first_token_s"]["median"]),
            }
            for other in rows
            if other["concurrency"] == row["concurrency"] and other is not row
        }
    return sorted(rows, key=lambda row: row["concurrency"])


def text(result: dict[str, Any]) -> str:
    """For people."""
    head = ["system", "at once", "blocks", "tokens/s", "min", "max", "requests/s", "first token s", "p95 s"]
    head += ["between tokens ms", "client's CPU", "tokens/s to vllm's", "to ray.serve.llm's"]
    lines = []
    for row in result["rows"]:
        tokens = row["tokens_per_s"]
        lines.append(
            [
                row["system"],
                row["concurrency"],
                tokens["n"],
                *(tokens[k] for k in ("median", "min", "max")),
                row["requests_per_s"]["median"],
                row["first_token_s"]["median"],
                row["first_token_s"]["p95"],
                row["between_tokens_s"]["median"] * 1000,
                f"{row['client_cpu_share']:.1%}",
                row["to"].get("vllm", {}).get("tokens_per_s"),
                row["to"].get("ray-serve-llm", {}).get("tokens_per_s"),
            ]
        )
    cpu = [
        f"  {row['system']}, {row['concurrency']} at once: "
        + ", ".join(f"{kind} {ms}" for kind, ms in row["cpu_ms_per_token"].items())
        for row in result["rows"]
    ]
    failed = [f"  {name}: {reason}" for name, reason in result["failures"].items()]
    return "\n".join(
        [
            table(head, lines),
            "\nprocessor time by process, milliseconds a token:",
            *cpu,
            *(["\nnot measured:", *failed] if failed else []),
        ]
    )
