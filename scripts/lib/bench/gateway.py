"""The way of a request through Serve's HTTP proxy and the gateway, before an engine that costs nothing.

Four sides, in turn, in one cluster: the engine itself on its socket; a bare Serve application that sends the same
bytes from memory; and Relight, whose gateway gets a lease from a replica through Serve for each request:
through Serve's proxy, and by the gateway's own door (`gateway.listen`, as scripts/up has it).
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Any

from bench import clusters, null, usage
from bench.client import Load, Target, closed_loop, request
from bench.clusters import MODEL, say
from bench.numbers import percentile, ratio, summary, table
from deployments.local.state import MARK, pick_port


@dataclass(frozen=True)
class Work:
    """What each request asks for."""

    key: str
    title: str
    body: dict[str, Any]
    requests: dict[int, int]  # by concurrency


def _body(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], **more}


WORKS = (
    Work("document", "one document", _body(stream=False, max_tokens=1), {1: 200, 32: 1000}),
    Work(
        "stream",
        "64 events, 20 ms apart",
        _body(stream=True, max_tokens=64, interval_ms=20),
        {1: 4, 32: 96},
    ),
    Work("burst", "64 events at once", _body(stream=True, max_tokens=64), {1: 100, 32: 320}),
)
_ELSE_REQUESTS_PER_WORKER = 4


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--concurrency", default="1,32", help="how many clients at once (default: 1,32)")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set in the cluster's environment, such as one of Serve's settings; may be repeated",
    )


def measure(options: Namespace) -> dict[str, Any]:
    """`--runs` rounds over sides, works and levels."""
    levels = [int(c) for c in options.concurrency.split(",")]
    extra = dict(pair.partition("=")[::2] for pair in options.env)
    loads: dict[tuple[str, str, int], list[tuple[Load, dict[str, float]]]] = {}
    with clusters.marked("null-engine") as (checkout, env):
        socket = checkout.run_dir / "null.sock"
        subprocess.Popen(
            [sys.executable, "-m", "bench.null", str(socket)],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            env=env,
            start_new_session=True,
        )
        clusters.wait_for("the null engine", socket.exists, 30)
        content = clusters.fleet(prebuilt="off", early_wake="off", min_replicas=1, keep_alive_s=900)
        door = pick_port(None)
        content["gateway"]["listen"] = f"127.0.0.1:{door}"
        say("starting a cluster with the gateway and a bare application")
        with clusters.cluster(
            "gateway", content, app="bench.null:build", env={null.SOCKET: str(socket), **extra}
        ) as running:
            environment = {k: v for k, v in os.environ.items() if k != MARK}
            deployed = subprocess.run(
                [sys.executable, "-m", "bench.null", "deploy-bare", str(running.checkout.root)],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                env=environment,
                check=False,
            )
            if deployed.returncode:
                raise clusters.BenchError("the bare application can't be deployed")
            clusters.wait_for_templates(running.checkout.run_dir)  # so that it no longer imports meanwhile
            sides = {
                "engine alone": (Target(uds=str(socket)), "/v1/chat/completions"),
                "bare Serve": (running.target, "/bare"),
                "relight": (running.target, "/v1/chat/completions"),
                "relight, own door": (Target(port=door), "/v1/chat/completions"),
            }
            clusters.wait_for("the routes", lambda: _answers(sides), 60)
            for round_ in range(options.runs):
                say(f"round {round_ + 1} of {options.runs}")
                for work in WORKS:
                    for level in levels:
                        count = work.requests.get(level, level * _ELSE_REQUESTS_PER_WORKER)
                        for side in sides if round_ % 2 == 0 else reversed(sides):
                            target, path = sides[side]
                            data = [request(path, json.dumps(work.body).encode())] * count
                            before = usage.cpu_by_kind(running.processes())
                            load = asyncio.run(closed_loop(target, data, level))
                            used = usage.cpu_between(before, usage.cpu_by_kind(running.processes()))
                            loads.setdefault((work.key, side, level), []).append((load, used))
    return {"environment": extra, "rows": _results(loads)}


def _answers(sides: dict[str, tuple[Target, str]]) -> bool:
    from bench.client import RequestFailed, one

    for target, path in sides.values():
        for work in WORKS:
            try:
                asyncio.run(one(target, request(path, json.dumps(work.body).encode()), 30))
            except RequestFailed:
                return False
    return True


def _results(
    loads: dict[tuple[str, str, int], list[tuple[Load, dict[str, float]]]],
) -> list[dict[str, Any]]:
    titles = {work.key: work.title for work in WORKS}
    rows: list[dict[str, Any]] = []
    for (work, side, level), done in loads.items():
        first = [t.first_token_s for load, _ in done for t in load.timings]
        cpu: dict[str, list[float]] = {}
        for load, used in done:
            for kind, seconds in used.items():
                cpu.setdefault(kind, []).append(seconds / len(load.timings) * 1000)
        rows.append(
            {
                "work": work,
                "title": titles[work],
                "side": side,
                "concurrency": level,
                "requests_per_s": summary([len(load.timings) / load.wall_s for load, _ in done]),
                "first_s": {"median": statistics.median(first), "p95": percentile(first, 0.95)},
                "total_s": statistics.median(t.total_s for load, _ in done for t in load.timings),
                "client_cpu_share": max(load.client_cpu_s / load.wall_s for load, _ in done),
                "cpu_ms_per_request": {k: round(statistics.median(v), 2) for k, v in cpu.items()},
            }
        )
    for row in rows:
        same = {
            r["side"]: r for r in rows if (r["work"], r["concurrency"]) == (row["work"], row["concurrency"])
        }
        bare, alone = same["bare Serve"], same["engine alone"]
        row["added_first_ms"] = (row["first_s"]["median"] - alone["first_s"]["median"]) * 1000
        row["requests_to_bare_serve"] = ratio(
            row["requests_per_s"]["median"], bare["requests_per_s"]["median"]
        )
    return sorted(rows, key=lambda r: (r["work"], r["concurrency"], r["side"]))


def text(result: dict[str, Any]) -> str:
    """For people."""
    head = ["work", "side", "at once", "n", "requests/s", "min", "max", "first byte ms", "p95", "added ms"]
    head += ["whole ms", "to bare Serve", "client's CPU", "processor time, ms a request"]
    lines = [
        [
            row["title"],
            row["side"],
            row["concurrency"],
            row["requests_per_s"]["n"],
            *(row["requests_per_s"][k] for k in ("median", "min", "max")),
            row["first_s"]["median"] * 1000,
            row["first_s"]["p95"] * 1000,
            row["added_first_ms"],
            row["total_s"] * 1000,
            row["requests_to_bare_serve"],
            f"{row['client_cpu_share']:.0%}",
            ", ".join(f"{kind} {ms}" for kind, ms in row["cpu_ms_per_request"].items()),
        ]
        for row in result["rows"]
    ]
    settings = [f"with {name}={value}" for name, value in result["environment"].items()]
    return "\n".join([*settings, table(head, lines)])
