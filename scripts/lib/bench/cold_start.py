"""From a request at zero replicas to its first token, over HTTP.

Every run waits until nothing of the model is left (or, for a parked engine, nothing but that) and two seconds more.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench import baseline, clusters
from bench.client import RequestFailed, Target, Timing, chat, one
from bench.clusters import MODEL, say
from bench.numbers import median_of, ratio, summary, table
from deployments.engine.client import HostConnection, acquire

TOKENS = 8
PROMPT = "What is the capital of France?"
TIMEOUT_S = 300.0
PARK_BYTES = 4 * 2**30


@dataclass
class Run:
    """One cold start. `phases` are seconds; those that began before the request are not its own."""

    timing: Timing
    phases: dict[str, float] = field(default_factory=dict)
    kind: str = ""


@dataclass(frozen=True)
class Row:
    """A way to start. `runner` yields a function that makes one cold start, and returns when it may begin."""

    key: str
    title: str
    runner: Callable[[Path], Any]
    is_baseline: bool = False


def _relight(**fleet: Any) -> Callable[[Path], Any]:
    @contextmanager
    def runner(_: Path) -> Iterator[Callable[[], Run]]:
        parked = bool(fleet.get("park_memory_bytes"))
        with clusters.cluster("relight", clusters.fleet(**fleet)) as running:
            clusters.wait_for_templates(running.checkout.run_dir)
            if parked:  # the first start leaves the engine that the others find
                asyncio.run(one(running.target, chat(MODEL, PROMPT, TOKENS), TIMEOUT_S))

            def run() -> Run:
                clusters.wait_until_dark(running, parked=parked)
                timing = asyncio.run(one(running.target, chat(MODEL, PROMPT, TOKENS), TIMEOUT_S))
                start = running.status()["models"][0]["last_cold_start"]
                return Run(timing, _phases(timing, start["phases"], start["ready_s"]), start["kind"])

            yield run

    return runner


def _phases(timing: Timing, phases: list[dict[str, Any]], ready_s: float) -> dict[str, float]:
    own = {p["name"]: p["duration_s"] for p in phases if p["start_s"] >= timing.sent_s - 0.001}
    return {**own, "ready": ready_s - timing.sent_s, "ready to first token": timing.first_s - ready_s}


@contextmanager
def _floor(folder: Path, prebuilt: str) -> Iterator[Callable[[], Run]]:
    """The engine host alone: no Ray, no Serve, no gateway."""
    spec = clusters.spec()
    with clusters.marked("floor") as (checkout, env):
        run_dir = Path(tempfile.mkdtemp(dir=checkout.run_dir))

        async def configure() -> None:
            with patch.dict(os.environ, env):  # the host inherits the mark
                host = await HostConnection.open(run_dir, None)
            config = {"park_memory_bytes": 0, "prebuilt": prebuilt, "cache_dir": None}
            await host.ask({"op": "configure", "config": config, "models": [spec.to_json()]})
            host.close()

        async def cold() -> Run:
            connection = await HostConnection.open(run_dir, None)
            asked_s = time.time()
            info = await acquire(connection, spec, [], asked_s)
            timing = await one(Target(uds=info.http), chat(MODEL, PROMPT, TOKENS), TIMEOUT_S)
            timing.sent_s = asked_s
            connection.send({"op": "release", "park": False})
            async for event in connection.events():
                if event["event"] in ("released", "exit"):
                    break
            connection.close()
            phases = [{"name": n, "start_s": s, "duration_s": d} for n, s, d in info.phases]
            return Run(timing, _phases(timing, phases, info.ready_s or 0.0), info.kind)

        def run() -> Run:
            clusters.wait_for("the engine ends", lambda: not clusters.host_status(run_dir)["engines"], 60)
            time.sleep(2)
            return asyncio.run(cold())

        asyncio.run(configure())
        clusters.wait_for_templates(run_dir)
        yield run


def _ray_serve_llm(*, tuned: bool) -> Callable[[Path], Any]:
    @contextmanager
    def runner(folder: Path) -> Iterator[Callable[[], Run]]:
        content = baseline.settings(str(folder), min_replicas=0, tuned=tuned)
        python = baseline.python()
        with clusters.cluster(
            "ray-serve-llm", content, app=baseline.APP, python=python, ray_defaults=not tuned
        ) as running:

            def run() -> Run:
                baseline.wait_until_dark(running)
                return Run(asyncio.run(one(running.target, chat(MODEL, PROMPT, TOKENS), TIMEOUT_S)))

            yield run

    return runner


ROWS = (
    Row("prebuilt", "prebuilt template, early wake (the default)", _relight()),
    Row("prebuilt-replica", "prebuilt template, through the replica", _relight(early_wake="off")),
    Row("mapped", "nothing of the model resident, early wake", _relight(prebuilt="on_demand")),
    Row(
        "mapped-replica",
        "nothing of the model resident, through the replica",
        _relight(prebuilt="on_demand", early_wake="off"),
    ),
    Row("forked", "vLLM's own start from the node template, early wake", _relight(prebuilt="off")),
    Row(
        "forked-replica",
        "vLLM's own start, through the replica",
        _relight(prebuilt="off", early_wake="off"),
    ),
    Row("parked", "parked engine, early wake", _relight(park_memory_bytes=PARK_BYTES)),
    Row(
        "parked-replica",
        "parked engine, through the replica",
        _relight(park_memory_bytes=PARK_BYTES, early_wake="off"),
    ),
    Row("floor", "floor: engine host alone, prebuilt template", lambda f: _floor(f, "auto")),
    Row(
        "floor-mapped",
        "floor: engine host alone, nothing of the model resident",
        lambda f: _floor(f, "on_demand"),
    ),
    Row("floor-forked", "floor: engine host alone, node template", lambda f: _floor(f, "off")),
    Row("ray-serve-llm", "ray.serve.llm, Ray's defaults", _ray_serve_llm(tuned=False), is_baseline=True),
    Row(
        "ray-serve-llm-tuned",
        "ray.serve.llm, with Relight's settings of Ray",
        _ray_serve_llm(tuned=True),
        is_baseline=True,
    ),
)


def arguments(parser: ArgumentParser) -> None:
    """The verb's own options."""
    keys = [row.key for row in ROWS]
    parser.add_argument("--baseline-runs", type=int, default=3, help="runs of ray.serve.llm (default: 3)")
    parser.add_argument("--no-baseline", action="store_true", help="without ray.serve.llm")
    parser.add_argument("--rows", default=",".join(keys), help=f"which, of {', '.join(keys)} (default: all)")
    parser.add_argument(
        "--rounds", type=int, default=1, help="spread the runs of each row over so many clusters"
    )


def measure(options: Namespace) -> dict[str, Any]:
    """All rows, one after the other, in rounds."""
    chosen = options.rows.split(",")
    if unknown := set(chosen) - {row.key for row in ROWS}:
        raise clusters.BenchError(f"no row {', '.join(sorted(unknown))}")
    rows = [r for r in ROWS if r.key in chosen and not (r.is_baseline and options.no_baseline)]
    folder = clusters.model_folder()
    runs: dict[str, list[Run]] = {row.key: [] for row in rows}
    failures: dict[str, str] = {}
    for round_ in range(options.rounds):
        for row in rows:
            total = options.baseline_runs if row.is_baseline else options.runs
            count = total // options.rounds + (round_ < total % options.rounds)
            if not count:
                continue
            say(f"{row.title}: starting")
            clusters.read_into_page_cache(folder)
            try:
                with row.runner(folder) as run:
                    for _ in range(count):
                        done = run()
                        runs[row.key].append(done)
                        timing = done.timing
                        say(
                            f"{row.title}: first token {timing.first_token_s:.3f} s, "
                            f"{TOKENS} tokens {timing.total_s:.3f} s"
                        )
            except (clusters.BenchError, RequestFailed, OSError, RuntimeError) as error:
                # One system that can't be measured is no reason to lose the others' numbers.
                failures[row.key] = str(error)
                say(f"{row.title}: {error}")
    return {"rows": _results(rows, runs), "failures": failures, "tokens": TOKENS, "model": MODEL}


def _results(rows: list[Row], runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for row in rows:
        done = runs[row.key]
        first = summary([r.timing.first_token_s for r in done])
        results.append(
            {
                "row": row.key,
                "title": row.title,
                "first_token_s": first,
                "full_answer_s": summary([r.timing.total_s for r in done]),
                "first_run_to_last": ratio(first.get("first"), first.get("last")),
                "kinds": sorted({r.kind for r in done if r.kind}),
                "phases_s": median_of([r.phases for r in done]),
            }
        )
    medians = {r["row"]: r["first_token_s"].get("median") for r in results}
    for result in results:
        median = medians[result["row"]]
        result["times_faster_than_ray_serve_llm"] = ratio(medians.get("ray-serve-llm"), median)
        result["times_faster_than_ray_serve_llm_tuned"] = ratio(medians.get("ray-serve-llm-tuned"), median)
        result["times_the_floor"] = ratio(median, medians.get("floor"))
    return results


def text(result: dict[str, Any]) -> str:
    """For people."""
    head = ["seconds to the first token", "n", "median", "min", "max", "run 1", "last", "8 tokens"]
    head += ["x faster than ray.serve.llm", "than tuned", "x floor"]
    lines, phases = [], []
    for row in result["rows"]:
        first = row["first_token_s"]
        lines.append(
            [
                row["title"],
                first["n"],
                *(first.get(k) for k in ("median", "min", "max", "first", "last")),
                row["full_answer_s"].get("median"),
                row["times_faster_than_ray_serve_llm"],
                row["times_faster_than_ray_serve_llm_tuned"],
                row["times_the_floor"],
            ]
        )
        if row["phases_s"]:
            parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row["phases_s"].items())
            phases.append(f"  {row['title']} [{'/'.join(row['kinds'])}]: {parts}")
    failed = [f"  {key}: {reason}" for key, reason in result["failures"].items()]
    return "\n".join(
        [
            table(head, lines),
            "\nphases, medians in seconds (those of an early start overlap the replica's):",
            *phases,
            *(["\nnot measured:", *failed] if failed else []),
        ]
    )
