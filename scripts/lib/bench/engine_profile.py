"""The rates of the real engine, as the simulator reads them: how fast a prompt is read, and how much a batch slows.

vLLM's own server runs alone. Prompts of several lengths, one at a time and each new (nothing comes from the prefix
cache), give the prefill rate as the slope of the time to the answer's first token. Then closed loops of one to
`--most` requests give what a request takes in a batch of each size, against alone: the simulator's `slowdown`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import statistics
import urllib.request
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np

from autoscaling.sim.profile import Engine, load_profile
from bench import clusters, overhead
from bench.client import Load, RequestFailed, Target, chat, closed_loop
from bench.clusters import HERE, MODEL, say
from bench.numbers import percentile, table

OUTPUT_TOKENS = 64
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = (32, 96, 160, 224, 288)
"""Words of the prompts that are read; tokens are what the engine counts."""
_TEXT = """time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend father
power hour game line end member law car city community name president team minute idea kid body"""
WORDS = _TEXT.split()


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--most", type=int, default=16, help="requests at once, at most (default: 16)")
    parser.add_argument("--requests", type=int, default=3, help="of each of those (default: 3)")
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE.state_dir / "engine-profile.json",
        help="the profile's file (default: %(default)s)",
    )


def measure(options: Namespace) -> dict[str, Any]:
    if not 1 <= options.most <= BATCHES[-1]:
        raise clusters.BenchError(f"--most: {options.most} is not from 1 to {BATCHES[-1]}")
    folder = clusters.model_folder()
    clusters.read_into_page_cache(folder)
    sizes = [b for b in BATCHES if b < options.most] + [options.most]
    drawn = random.Random(0)
    reads: list[tuple[float, float]] = []
    batches: dict[int, list[Load]] = {size: [] for size in sizes}
    say("starting vLLM's server")
    with overhead.SYSTEMS["vllm"](folder) as sides:
        target = sides[0].target
        asyncio.run(_batch(target, drawn, sizes[-1], 1))
        # Of the warming up, and of each run in turn: what else the machine does falls on all of them.
        for run in range(options.runs):
            say(f"run {run + 1} of {options.runs}")
            reads += asyncio.run(_reads(target, drawn))
            for size in sizes:
                batches[size].append(asyncio.run(_batch(target, drawn, size, options.requests)))
    result = _result(reads, batches)
    result["file"] = str(_written(options.out, result))
    return result


def prompt_of(drawn: random.Random, words: int) -> str:
    """Of so many words; begins differently each time, so that nothing comes from the prefix cache."""
    return " ".join(drawn.choice(WORDS) for _ in range(words))


async def _reads(target: Target, drawn: random.Random) -> list[tuple[float, float]]:
    """(tokens of a prompt, seconds to its answer's first token), one at a time."""
    found = []
    for words in drawn.sample(LENGTHS, len(LENGTHS)) * 2:
        prompt = prompt_of(drawn, words)
        load = await closed_loop(target, [chat(MODEL, prompt, 4)], 1)
        found.append((float(tokens(target, prompt)), load.timings[0].first_token_s))
    return found


def tokens(target: Target, prompt: str, model: str = MODEL) -> int:
    """As the engine counts them in a chat. Raises RequestFailed."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}]}).encode()
    asked = urllib.request.Request(
        f"http://127.0.0.1:{target.port}/tokenize", body, {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=30) as answer:
            return int(json.loads(answer.read())["count"])
    except (OSError, ValueError, KeyError) as error:
        raise RequestFailed(f"/tokenize: {error}") from error


async def _batch(target: Target, drawn: random.Random, size: int, each: int) -> Load:
    prompts = [prompt_of(drawn, 16) for _ in range(size * each)]
    return await closed_loop(target, [chat(MODEL, prompt, OUTPUT_TOKENS) for prompt in prompts], size)


def _result(reads: list[tuple[float, float]], batches: dict[int, list[Load]]) -> dict[str, Any]:
    tokens, seconds = np.asarray(reads).T
    # The median of what each length took, so that a hiccup does not bend the line.
    lengths = np.unique(tokens // 32)
    points = np.asarray(
        [(np.median(tokens[tokens // 32 == n]), np.median(seconds[tokens // 32 == n])) for n in lengths]
    )
    slope = float(np.polyfit(points[:, 0], points[:, 1], 1)[0])
    if slope <= 0:
        raise clusters.BenchError(
            "longer prompts took no longer: the machine was too busy, or the engine is too fast for these lengths"
        )
    rows = []
    for size, loads in batches.items():
        took = [timing.total_s for load in loads for timing in load.timings]
        between = [
            (timing.last_s - timing.first_s) / (OUTPUT_TOKENS - 1)
            for load in loads
            for timing in load.timings
        ]
        rows.append(
            {
                "batch": size,
                "requests": len(took),
                "request_s": statistics.median(took),
                "request_p95_s": percentile(took, 0.95),
                "between_tokens_s": statistics.median(between),
                "tokens_per_s": statistics.median(
                    len(load.timings) * OUTPUT_TOKENS / load.wall_s for load in loads
                ),
            }
        )
    alone = rows[0]["request_s"]
    for row in rows:
        row["slowdown"] = row["request_s"] / alone
    known = {int(row["batch"]): float(row["slowdown"]) for row in rows}
    most = max(known)
    slowdown = np.maximum.accumulate(np.interp(range(1, most + 1), list(known), list(known.values())))
    engine = Engine(
        concurrency=most,
        prefill_tokens_per_s=round(1.0 / slope, 1),
        decode_s=round(rows[0]["between_tokens_s"], 6),
        slowdown=tuple(round(float(each), 4) for each in slowdown),
    )
    return {"rows": rows, "prefill": [list(point) for point in points.tolist()], "engine": vars(engine)}


def _written(path: Path, result: dict[str, Any]) -> Path:
    """The file, once the simulator has read it back."""
    engine = {
        name: result["engine"][name]
        for name in ("concurrency", "prefill_tokens_per_s", "decode_s", "slowdown")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"engine": engine}, indent=2) + "\n", encoding="utf-8")
    read = dataclasses.asdict(load_profile(path).engine)
    if any(read[name] != (tuple(value) if name == "slowdown" else value) for name, value in engine.items()):
        raise clusters.BenchError(f"{path}: the simulator read back something else: {read}")
    return path


def text(result: dict[str, Any]) -> str:
    """For people."""
    engine = result["engine"]
    rows = [
        [
            row["batch"],
            row["requests"],
            row["request_s"],
            row["request_p95_s"],
            row["between_tokens_s"] * 1000,
            row["tokens_per_s"],
            row["slowdown"],
        ]
        for row in result["rows"]
    ]
    head = ["at once", "requests", "a request s", "p95 s", "between tokens ms", "tokens/s", "times slower"]
    points = ", ".join(f"{tokens:.0f}: {seconds * 1000:.0f}" for tokens, seconds in result["prefill"])
    return "\n".join(
        [
            table(head, rows),
            f"\nprompt tokens: milliseconds to the first token of the answer: {points}",
            f"prefill {engine['prefill_tokens_per_s']:.0f} tokens/s; a token alone {engine['decode_s'] * 1000:.1f} ms",
            f"written to {result['file']}: relight simulate TRACE --profile {result['file']}",
        ]
    )
