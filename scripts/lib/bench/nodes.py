"""GPU nodes on demand: from a request at no GPU node at all to its first token, and with the node asked for ahead.

On one machine that pretends: Ray's autoscaler (v2) really starts and ends raylets, which are told that they have a GPU
of the type L4; the engine behind is vLLM's CPU build with the fleet's small model. A cloud takes minutes where this
takes a second to bring a machine, so `node asked` and `node up` are a lower bound, and what a prewarmed node saves too.

Phases of a request: node asked (sent -> the autoscaler starts a node), node up (-> it is alive in the cluster), replica
(-> its process has begun its engine), engine (-> ready), first token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

from bench import clusters
from bench.client import Timing, chat, one
from bench.clusters import MODEL, BenchError, Running, say, wait_for
from bench.numbers import median_of, summary, table
from deployments.local import fake_nodes
from deployments.local.state import Checkout, Cluster, pick_port

PHASES = ("node asked", "node up", "replica", "engine", "first token")
TIMEOUT_S = 180.0
IDLE_S = 5.0
PREWARM_S = 600.0


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--idle-s", type=float, default=IDLE_S, help=f"the nodes' idle time-out (default: {IDLE_S:g})"
    )


class Watch:
    """What a process that is connected to Ray tells of the nodes."""

    def __init__(self, checkout: Checkout, cluster: Cluster) -> None:
        # Without the mark: what asks the cluster is no part of it.
        env = {k: v for k, v in fake_nodes.environment(checkout).items() if not k.startswith("RELIGHT_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.node_watch", cluster.ray_address],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.seen: list[tuple[float, set[str]]] = []
        """(Unix time, GPU nodes that are alive from then on)."""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith("{"):
                continue  # what Ray says of its nodes, to people
            told = json.loads(line)
            self.seen.append((told["at_s"], {n for n, of in told["nodes"].items() if of["gpus"]}))

    @property
    def gpu_nodes(self) -> set[str]:
        """Those that are alive now. Raises LookupError before anything was told."""
        return self.seen[-1][1]

    def up_s(self, since_s: float) -> float | None:
        """When the first GPU node came after a time."""
        return next((at_s for at_s, nodes in self.seen if at_s >= since_s and nodes), None)

    def gone_s(self, since_s: float) -> float | None:
        """When the last GPU node had gone after a time."""
        return next((at_s for at_s, nodes in self.seen if at_s >= since_s and not nodes), None)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _fleet() -> dict[str, Any]:
    fleet = clusters.fleet(early_wake="off", keep_alive_s=1)
    (entry,) = fleet["models"]
    entry["resources"] = {"gpus": 1, "cpus": 1, "accelerator_types": ["L4"]}
    # It is the CPU build's engine, which takes nearly all memory for its KV cache unless it is told otherwise.
    entry["env"] = {**entry.get("env", {}), "VLLM_CPU_KVCACHE_SPACE": "1"}
    entry["scaling"]["park"] = False
    return fleet


@contextlib.contextmanager
def _cluster(idle_s: float) -> Iterator[tuple[Running, Watch]]:
    checkout = Checkout(clusters.HOME / "nodes")
    checkout.root.mkdir(parents=True, exist_ok=True)
    clusters.end(checkout)
    file = checkout.root / "fleet.json"
    file.write_text(json.dumps(_fleet(), indent=2))
    # Ray's workers and the autoscaler inherit the path.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(clusters.HERE.root), str(clusters.HERE.root / "scripts/lib")]
    )
    watch = None
    try:
        l4 = fake_nodes.NodeType("l4", "L4", idle_timeout_s=idle_s)
        cluster = fake_nodes.start_head(checkout, pick_port(None), [l4])
        fake_nodes.deploy(checkout, file)
        watch = Watch(checkout, cluster)
        wait_for("nodes to be told of", lambda: bool(watch.seen), 30)
        # The head's own, which no model here starts from, takes a core for ten seconds.
        run_dir = checkout.run_dir
        wait_for("the head's template", lambda: clusters.host_status(run_dir)["template"]["ready"], 120)
        yield Running(checkout, cluster.port), watch
    except subprocess.CalledProcessError as error:
        raise BenchError(f"{error}: see {checkout.state_dir}") from None
    finally:
        if watch is not None:
            watch.close()
        clusters.end(checkout)


def _control(running: Running, method: str, route: str, body: Any = None) -> Any:
    token = (running.checkout.data_dir / "control-token").read_text().strip()
    request = urllib.request.Request(
        f"http://127.0.0.1:{running.port}/relight/v1/{route}",
        None if body is None else json.dumps(body).encode(),
        {"authorization": f"Bearer {token}", "content-type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def _raylets(running: Running) -> dict[int, float]:
    """Process id -> when it began."""
    found = {}
    for process in running.processes():
        if "raylet/raylet" in process.command:
            with contextlib.suppress(psutil.Error):
                found[process.pid] = psutil.Process(process.pid).create_time()
    return found


def _request(running: Running) -> Timing:
    return asyncio.run(one(running.target, chat(MODEL, "Say hello.", 4), TIMEOUT_S))


def _wait_for_no_node(running: Running, watch: Watch, since_s: float) -> float:
    """Until the model is dark and the node has gone; returns how long after the last replica that was."""

    def dark() -> bool:
        return not any(running.status()["models"][0]["replicas_by_state"].values())

    wait_for("the model does not go dark", dark, 120, 0.1)
    dark_s = time.time()
    wait_for("the node stays", lambda: watch.gone_s(since_s) is not None, 180, 0.05)
    wait_for("a raylet stays", lambda: len(_raylets(running)) == 1, 30, 0.1)
    return max(0.0, (watch.gone_s(since_s) or dark_s) - dark_s)


def _phases(running: Running, timing: Timing, raylet_s: float | None, up_s: float | None) -> dict[str, float]:
    """The way of one request, in seconds. A node that was there before the request took none of its time."""
    start = running.status()["models"][0]["last_cold_start"]
    if start is None or start["ready_s"] < timing.sent_s:
        raise BenchError(f"the request met an engine that was ready: {start}")
    ends = {p["name"]: p["start_s"] + p["duration_s"] for p in start["phases"]}
    times = [
        timing.sent_s,
        raylet_s or timing.sent_s,
        up_s or timing.sent_s,
        ends.get("replica", timing.sent_s),
        start["ready_s"],
        timing.first_s,
    ]
    # A step is over when it and all before it are.
    for i in range(1, len(times)):
        times[i] = max(times[i], times[i - 1])
    return {name: times[i + 1] - times[i] for i, name in enumerate(PHASES)}


def _cold(running: Running, watch: Watch) -> dict[str, Any]:
    """One request at no GPU node."""
    if watch.gpu_nodes:
        raise BenchError(f"GPU nodes before the request: {watch.gpu_nodes}")
    known = _raylets(running)
    timing = _request(running)
    up_s = watch.up_s(timing.sent_s)
    new = [at_s for pid, at_s in _raylets(running).items() if pid not in known]
    if up_s is None or not new:
        raise BenchError("the request was answered without a GPU node")
    phases = _phases(running, timing, min(new), up_s)
    gone = _wait_for_no_node(running, watch, timing.done_s)
    return {"first_token_s": timing.first_token_s, "phases": phases, "node_gone_s": gone}


def _prewarmed(running: Running, watch: Watch) -> dict[str, Any]:
    """The same with the node asked for, and warm, before the request; the time that takes is told too."""
    if watch.gpu_nodes:
        raise BenchError(f"GPU nodes before the prewarm: {watch.gpu_nodes}")
    asked_s = time.time()
    body = {"model": MODEL, "rung": "template", "for_s": PREWARM_S}
    prewarm = _control(running, "POST", "prewarms", body)["prewarm"]
    try:
        wait_for("the node that was asked for", lambda: bool(watch.gpu_nodes), 60, 0.02)
        node_s = (watch.up_s(asked_s) or asked_s) - asked_s

        def warm() -> bool:
            observed = _control(running, "GET", f"explain/{MODEL}")["observation"]
            return str(observed["rung"]).lower() in ("template", "3")

        wait_for("the node's template", warm, 180, 0.2)
        warm_s = time.time() - asked_s
        # Held well past its idle time-out, though nothing runs there.
        time.sleep(2)
        timing = _request(running)
        phases = _phases(running, timing, None, None)
    finally:
        _control(running, "DELETE", f"prewarms/{prewarm['id']}")
    gone = _wait_for_no_node(running, watch, timing.done_s)
    return {
        "first_token_s": timing.first_token_s,
        "phases": phases,
        "node_gone_s": gone,
        "node_s": node_s,
        "warm_s": warm_s,
    }


def measure(options: Namespace) -> dict[str, Any]:
    clusters.read_into_page_cache(clusters.model_folder())
    rows: dict[str, list[dict[str, Any]]] = {"no node": [], "node prewarmed": []}
    with _cluster(options.idle_s) as (running, watch):
        dark = {"gpu_nodes": len(watch.gpu_nodes), "raylets": len(_raylets(running))}
        for run in range(options.runs):
            for name, measured in (("no node", _cold), ("node prewarmed", _prewarmed)):
                row = measured(running, watch)
                say(f"run {run + 1}, {name}: first token after {row['first_token_s']:.2f} s")
                rows[name].append(row)
        dark["gpu_nodes_after"] = len(watch.gpu_nodes)
    result = {
        name: {
            "first_token_s": summary([r["first_token_s"] for r in found]),
            "phases_s": median_of(r["phases"] for r in found),
            "node_gone_s": summary([r["node_gone_s"] for r in found]),
            **{key: summary([r[key] for r in found]) for key in ("node_s", "warm_s") if key in found[0]},
        }
        for name, found in rows.items()
    }
    saved = [a["first_token_s"] - b["first_token_s"] for a, b in zip(*rows.values(), strict=True)]
    return {"idle_s": options.idle_s, "dark": dark, "rows": result, "saved_s": summary(saved)}


def text(result: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            row["first_token_s"]["median"],
            row["first_token_s"]["min"],
            row["first_token_s"]["max"],
            *(row["phases_s"][phase] for phase in PHASES),
            row["node_gone_s"]["median"],
        ]
        for name, row in result["rows"].items()
    ]
    head = ["request at", "first token", "min", "max", *PHASES, "node gone after"]
    warm = result["rows"]["node prewarmed"]
    dark = result["dark"]
    return (
        table(head, rows)
        + f"\n\nSeconds, medians. node gone after: the last replica; the idle time-out is {result['idle_s']:g} s."
        + f"\nA prewarmed node saves {result['saved_s']['median']:.2f} s (median)."
        + f" It was up {warm['node_s']['median']:.2f} s after it was asked for, and warm after"
        + f" {warm['warm_s']['median']:.2f} s."
        + f"\nDark: {dark['gpu_nodes']} GPU nodes before, {dark['gpu_nodes_after']} after;"
        + f" {dark['raylets']} raylet, the head's."
    )
