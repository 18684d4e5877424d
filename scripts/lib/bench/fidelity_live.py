"""The live side of `fidelity`: a running cluster is calibrated, then asked at given times, one model after another."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import statistics
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from bench import calibration, engine_profile
from bench.calibration import Cycle, waited_s
from bench.client import RequestFailed, Timing, one, request
from bench.clusters import Running, say
from bench.numbers import percentile
from bench.replica_watch import Sample, Watch, held_s

CALIBRATION = "calibration"
"""The model that is calibrated with."""
WORDS = 16
"""Of a prompt."""
TIMEOUT_S = 120.0
SAME_START_S = 0.5
"""Who waited for one start was given its engine within that time."""


@dataclasses.dataclass
class Live:
    """What one model did, and what was measured just before and after."""

    cycles: list[Cycle]
    begin_s: float
    """Unix time of the traffic's second 0."""
    timings: list[Timing] = dataclasses.field(default_factory=list)
    failed: int = 0
    samples: list[Sample] = dataclasses.field(default_factory=list)
    gpu_s: float = 0.0


class Asker:
    """Makes requests, each with a prompt of its own."""

    def __init__(self, running: Running, output_tokens: int, seed: int) -> None:
        self._running = running
        self._output_tokens = output_tokens
        self._drawn = random.Random(seed)

    async def ask(self, model: str) -> Timing:
        """Not streamed: the head of a stream that was held long does not say how long. Raises RequestFailed."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": engine_profile.prompt_of(self._drawn, WORDS)}],
            "temperature": 0,
            "max_tokens": self._output_tokens,
            "ignore_eos": True,
        }
        data = request("/v1/chat/completions", json.dumps(body).encode())
        return await one(self._running.target, data, TIMEOUT_S)

    def input_tokens(self, model: str) -> int:
        """Of a prompt; all are nearly alike."""
        prompts = [engine_profile.prompt_of(random.Random(i), WORDS) for i in range(5)]
        return round(
            statistics.median(engine_profile.tokens(self._running.target, p, model) for p in prompts)
        )


async def drive(
    options: Namespace, running: Running, traffic: Mapping[str, Sequence[float]]
) -> tuple[dict[str, Live], int]:
    """(model -> what it did, input tokens of a request), one model after another, each asked at its own times."""
    asker = Asker(running, options.output_tokens, options.seed)
    found: dict[str, Live] = {}
    half = options.cycles // 2
    async with Watch(running) as watch:
        input_tokens = await _lit_once(asker, watch, [CALIBRATION, *traffic])

        async def calibrate(number: int) -> list[Cycle]:
            return await calibration.cycles(
                watch,
                CALIBRATION,
                lambda: asker.ask(CALIBRATION),
                options.keep_alive_s,
                range(number * half, (number + 1) * half),
                options.burst_requests,
            )

        # On either side: a machine whose speed changes is met halfway.
        before = await calibrate(0)
        for number, (model, times) in enumerate(traffic.items(), 1):
            await watch.dark(model)
            found[model] = live = Live(before, time.time() + 1)
            await _send(asker, model, times, live, options.minutes * 60)
            await watch.dark(model)
            await _lit_once(asker, watch, [CALIBRATION])
            after = await calibrate(number)
            live.cycles = before + after
            live.samples = watch.samples[model]
            live.gpu_s = held_s(live.samples, live.begin_s, live.begin_s + options.minutes * 60)
            before = after
    return found, input_tokens


async def _lit_once(asker: Asker, watch: Watch, models: Sequence[str]) -> int:
    """What a model does at its first start only, or at the first for many minutes, is over then.

    Returns the tokens of a prompt.
    """
    tokens = 0
    for model in models:
        say(f"{model}: lit once, unscored")
        await asker.ask(model)
        tokens = await asyncio.to_thread(asker.input_tokens, model)
    for model in models:
        await watch.dark(model)
    return tokens


async def _send(asker: Asker, model: str, times: Sequence[float], live: Live, span_s: float) -> None:
    async def send(at_s: float) -> None:
        await asyncio.sleep(max(0.0, live.begin_s + at_s - time.time()))
        try:
            live.timings.append(await asker.ask(model))
        except (RequestFailed, OSError) as error:
            live.failed += 1
            say(f"{model}: {error}")

    sending = asyncio.gather(*(send(at_s) for at_s in times))
    while (left_s := live.begin_s + span_s - time.time()) > 0:
        say(f"{model}: {len(live.timings)} of {len(times)} answered, {left_s:.0f} s to go")
        await asyncio.sleep(min(60.0, left_s))
    await sending
    # A sample past the end is what the last moments are counted with.
    await asyncio.sleep(1)


def cold_starts(given_s: Sequence[float]) -> int:
    """How many starts were waited for by those who were given a new engine at these moments.

    All who wait for one start are given its engine at nearly the same time.
    """
    count, last_s = 0, -float("inf")
    for at_s in sorted(given_s):
        count += at_s > last_s + SAME_START_S
        last_s = at_s
    return count


def seen(live: Live) -> dict[str, Any]:
    """The figures that are compared, as the simulator names them; `wait_s` of each request."""
    cold = [t for t in live.timings if t.headers["x-relight-cold-start"] == "true"]
    waits = [waited_s(t) for t in live.timings]
    return {
        "requests": len(live.timings),
        "failed": live.failed,
        "cold_requests": len(cold),
        "cold_starts": cold_starts([t.sent_s + waited_s(t) for t in cold]),
        "wait_p50_s": percentile(waits, 0.5),
        "wait_p95_s": percentile(waits, 0.95),
        "gpu_s": live.gpu_s,
        "wait_s": [round(wait_s, 4) for wait_s in waits],
    }


def seen_together(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of several models: counts and GPU-seconds summed, waiting over all requests."""
    waits = [wait_s for row in rows for wait_s in row["wait_s"]]
    summed = ("requests", "failed", "cold_requests", "cold_starts", "gpu_s")
    return {name: sum(row[name] for row in rows) for name in summed} | {
        "wait_p50_s": percentile(waits, 0.5),
        "wait_p95_s": percentile(waits, 0.95),
    }
