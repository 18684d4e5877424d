"""Prewarming, live: the real engine behind a real cluster, with traffic that comes and goes.

Two patterns, each sent to one model for every policy that is compared, at the same time, so that all meet the same
machine. `on-off`: a burst every period, with a jitter. `poisson`: single requests with exponential gaps. The first
cycles are for learning and are not scored. All models are the same one under several names.

GPU-seconds are counted here, from what Serve says of its replicas once a second (starting, running and stopping ones),
not from Relight's own accounts, which are printed beside them. A model without GPUs counts as one GPU.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench import clusters, prewarm_simulated
from bench.client import RequestFailed, Timing, chat, one
from bench.clusters import say
from bench.numbers import percentile, ratio, table

PROMPT = "Say hello."
TOKENS = 4
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Row:
    """One policy under one pattern: a model of the fleet."""

    pattern: str
    policy: str
    scaling: Mapping[str, Any]

    @property
    def model(self) -> str:
        return f"{self.pattern}-{self.policy}".replace(" ", "-")


@dataclass
class Tally:
    """What one model did while it was scored."""

    timings: list[Timing] = field(default_factory=list)
    bursts: list[bool] = field(default_factory=list)
    """For each burst: whether its first request found a replica."""
    failed: int = 0
    gpu_s: float = 0.0


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--patterns", default="on-off,poisson", help="which patterns (default: on-off,poisson)"
    )
    parser.add_argument("--period-s", type=float, default=120.0, help="of the bursts (default: 120)")
    parser.add_argument("--jitter-s", type=float, default=1.0, help="of a burst's beginning (default: 1)")
    parser.add_argument("--cycles", type=int, default=10, help="bursts that are scored (default: 10)")
    parser.add_argument("--learn-cycles", type=int, default=5, help="bursts before those (default: 5)")
    parser.add_argument("--burst-requests", type=int, default=8, help="a second apart (default: 8)")
    parser.add_argument("--mean-gap-s", type=float, default=45.0, help="of the Poisson pattern (default: 45)")
    parser.add_argument(
        "--wait-cost", type=float, default=10.0, help="of the predictive policy (default: 10)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--simulated",
        type=int,
        default=0,
        metavar="RUNS",
        help="the Poisson pattern alone, so many times, in the simulator instead of live",
    )
    parser.add_argument(
        "--start-s", type=float, default=4.0, help="what a start takes in the simulator (default: 4)"
    )


def rows(options: Namespace) -> list[Row]:
    """The models. Idle times of `keep-alive` go from none at all to beyond the break-even: its curve can be read."""
    predictive = {"policy": "predictive", "wait_cost": options.wait_cost}
    found = []
    if "on-off" in options.patterns:
        found += [
            Row("on-off", "predictive", predictive),
            Row("on-off", "reactive", {"policy": "reactive", "keep_alive_s": 10}),
        ]
    if "poisson" in options.patterns:
        found += [
            Row("poisson", "predictive", predictive),
            *(
                Row("poisson", f"keep-alive {idle_s}", {"policy": "keep-alive", "keep_alive_s": idle_s})
                for idle_s in (0, 10, 30)
            ),
        ]
    if not found:
        raise clusters.BenchError(f"--patterns {options.patterns}: on-off and poisson are known")
    return found


def fleet(models: list[Row], store: str) -> dict[str, Any]:
    """All with the default model's engine. Replicas start through Serve, as they must on GPUs."""
    base = clusters.fleet(early_wake="off")
    (entry,) = base["models"]
    base["models"] = [
        {**entry, "id": row.model, "aliases": [], "scaling": {"max_replicas": 1, **row.scaling}}
        for row in models
    ]
    base["controller"] = {"store": store}
    return base


def on_off(options: Namespace, rng: random.Random, begin_s: float) -> Iterator[tuple[int, list[float]]]:
    """(cycle, times of its requests)."""
    for cycle in range(options.learn_cycles + options.cycles):
        first_s = begin_s + cycle * options.period_s + rng.uniform(0, options.jitter_s)
        yield cycle, [first_s + i for i in range(options.burst_requests)]


def poisson(options: Namespace, rng: random.Random, begin_s: float, end_s: float) -> list[float]:
    times, at_s = [], begin_s
    while (at_s := at_s + rng.expovariate(1.0 / options.mean_gap_s)) < end_s:
        times.append(at_s)
    return times


async def _drive(options: Namespace, running: clusters.Running, models: list[Row]) -> dict[str, Tally]:
    tallies = {row.model: Tally() for row in models}
    begin_s = time.time() + 10
    scored_s = begin_s + options.learn_cycles * options.period_s - 10
    end_s = scored_s + options.cycles * options.period_s
    rng = random.Random(options.seed)
    arrivals = poisson(options, rng, begin_s, end_s)
    bursts = list(on_off(options, rng, begin_s))
    say(
        f"{(end_s - time.time()) / 60:.0f} minutes, of which the last {(end_s - scored_s) / 60:.0f} are scored"
    )

    async def send(model: str, at_s: float, *, first: bool) -> None:
        await asyncio.sleep(max(0.0, at_s - time.time()))
        tally = tallies[model]
        try:
            timing = await one(running.target, chat(model, PROMPT, TOKENS), TIMEOUT_S)
        except (RequestFailed, OSError) as error:
            tally.failed += at_s >= scored_s
            say(f"{model}: {error}")
            return
        if at_s >= scored_s:
            tally.timings.append(timing)
            if first:
                tally.bursts.append(timing.headers.get("x-relight-cold-start") == "false")

    async def watch() -> None:
        last_s = time.time()
        while (now_s := time.time()) < end_s:
            status = await asyncio.to_thread(running.status)
            for model in status["models"]:
                held = sum(n for state, n in model["replicas_by_state"].items())
                tallies[model["id"]].gpu_s += held * max(0.0, now_s - max(last_s, scored_s))
            last_s = now_s
            await asyncio.sleep(1)

    async def progress() -> None:
        for cycle, times in bursts:
            await asyncio.sleep(max(0.0, times[-1] + options.period_s / 2 - time.time()))
            hits = {m: f"{sum(t.bursts)}/{len(t.bursts)}" for m, t in tallies.items() if t.bursts}
            say(f"cycle {cycle + 1} of {len(bursts)}: first request met a replica: {hits}")

    work = []
    # Half a period apart, so that two cold starts of the same burst don't share the cores.
    shift_s = 0.0
    for row in models:
        if row.pattern == "on-off":
            for _, times in bursts:
                work += [send(row.model, at_s + shift_s, first=i == 0) for i, at_s in enumerate(times)]
            shift_s += options.period_s / 2
        else:
            work += [send(row.model, at_s, first=False) for at_s in arrivals]
    watching = asyncio.ensure_future(watch())
    telling = asyncio.ensure_future(progress())
    await asyncio.gather(*work)
    await watching
    telling.cancel()
    return tallies


def measure(options: Namespace) -> dict[str, Any]:
    if options.simulated:
        return _simulated(options)
    models = rows(options)
    folder = clusters.HOME / "prewarm"
    folder.mkdir(parents=True, exist_ok=True)
    url = f"sqlite:///{folder / f'history-{int(time.time())}.db'}"
    with clusters.cluster("prewarm", fleet(models, url)) as running:
        clusters.wait_for_templates(running.checkout.run_dir)
        tallies = asyncio.run(_drive(options, running, models))
    accounts, prewarms = _accounts(url)
    result = []
    for row in models:
        tally = tallies[row.model]
        waits = [t.first_token_s for t in tally.timings]
        cold = [t for t in tally.timings if t.headers.get("x-relight-cold-start") == "true"]
        result.append(
            {
                "pattern": row.pattern,
                "policy": row.policy,
                "requests": len(tally.timings),
                "failed": tally.failed,
                "bursts": len(tally.bursts),
                "bursts_ready": sum(tally.bursts),
                "cold_requests": len(cold),
                "waited_s": sum(int(t.headers.get("x-relight-wait-ms", 0)) for t in tally.timings) / 1e3,
                "first_token_p50_s": percentile(waits, 0.5) if waits else None,
                "first_token_p95_s": percentile(waits, 0.95) if waits else None,
                "gpu_s": tally.gpu_s,
                "accounts_gpu_s": accounts.get(row.model),
                "prewarms": len(prewarms.get(row.model, [])),
                "prewarms_hit": sum(p.hit_s is not None for p in prewarms.get(row.model, [])),
            }
        )
    return {"options": {k: v for k, v in vars(options).items() if k != "json"}, "rows": result}


def _simulated(options: Namespace) -> dict[str, Any]:
    scored_s = options.learn_cycles * options.period_s
    end_s = scored_s + options.cycles * options.period_s
    found = prewarm_simulated.measure(
        options.simulated,
        wait_cost=options.wait_cost,
        start_s=options.start_s,
        scored_s=scored_s,
        seed=options.seed,
        times=lambda rng: poisson(options, rng, 10.0, end_s),
        bursts=lambda rng: on_off(options, rng, 10.0),
    )
    return {"options": {k: v for k, v in vars(options).items() if k != "json"}, "rows": found}


def _accounts(url: str) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Relight's own count of the whole run, learning included: GPU-seconds of replicas, and prewarms, by model."""
    from autoscaling.live.clock import SystemClock
    from autoscaling.live.store import Store

    store = Store.open(url, clock=SystemClock())
    gpu_s: dict[str, float] = {}
    for row in store.usage("2000-01-01", "2999-12-31", None, "active"):
        gpu_s[row.model] = gpu_s.get(row.model, 0.0) + row.gpu_s.get("serving", 0.0)
    prewarms: dict[str, list[Any]] = {}
    for prewarm in store.prewarms(None, 0.0, 100_000):
        prewarms.setdefault(prewarm.model, []).append(prewarm)
    store.close()
    return gpu_s, prewarms


def text(result: Mapping[str, Any]) -> str:
    if result["options"]["simulated"]:
        return prewarm_simulated.text(result) + _equal(result)
    head = [
        "pattern", "policy", "requests", "failed", "bursts ready", "cold", "waited s",
        "first token p50", "p95", "GPU-s", "GPU-s x", "own count, all", "prewarms hit, all",
    ]  # fmt: skip
    base: dict[str, float] = {}
    for row in result["rows"]:
        if row["policy"] != "predictive":
            base.setdefault(row["pattern"], row["gpu_s"])
    lines = []
    for row in result["rows"]:
        ready = f"{row['bursts_ready']}/{row['bursts']}" if row["bursts"] else "-"
        lines.append(
            [
                row["pattern"],
                row["policy"],
                row["requests"],
                row["failed"],
                ready,
                row["cold_requests"],
                row["waited_s"],
                row["first_token_p50_s"],
                row["first_token_p95_s"],
                row["gpu_s"],
                ratio(row["gpu_s"], base.get(row["pattern"])),
                row["accounts_gpu_s"],
                f"{row['prewarms_hit']}/{row['prewarms']}",
            ]
        )
    return (
        table(head, lines)
        + "\n\nGPU-s x: over the first other policy of the pattern. waited s: for an engine, summed over requests."
        + _equal(result)
    )


def _equal(result: Mapping[str, Any]) -> str:
    """What keep-alive would have spent at the waiting of `predictive`: read off the line between its two neighbours."""
    points = sorted(
        (row["waited_s"], row["gpu_s"])
        for row in result["rows"]
        if row["pattern"] == "poisson" and row["policy"].startswith("keep-alive")
    )
    ours = next(
        (r for r in result["rows"] if r["pattern"] == "poisson" and r["policy"] == "predictive"), None
    )
    if ours is None or len(points) < 2:
        return ""
    waited_s = ours["waited_s"]
    for (low_w, low_g), (high_w, high_g) in itertools.pairwise(points):
        if low_w <= waited_s <= high_w and high_w > low_w:
            at = low_g + (high_g - low_g) * (waited_s - low_w) / (high_w - low_w)
            return (
                f"\nAt predictive's waiting ({waited_s:.1f} s) keep-alive spends {at:.0f} GPU-s, predictive "
                f"{ours['gpu_s']:.0f}: {ours['gpu_s'] / at:.2f} of it."
            )
    return f"\npredictive's waiting ({waited_s:.1f} s) is not between those of these keep-alives: nothing to compare."
