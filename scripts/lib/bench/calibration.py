"""What the simulator must know of a live cluster: what a start, a decision and a stop take there.

A model of its own is asked while it is dark, alone and by several at once in turn, then once more, idles for its
keep-alive, and goes dark, several times over. An engine that was just lit is slower than one that has run for long (its
weights are read in as they are used, and repacked between its first requests), and shares the cores with Ray: so what
answers take is measured here too, and the rates of the engine alone give the shape only.
"""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from autoscaling.core.types import Rung
from autoscaling.sim.profile import Engine, Profile, Start
from bench.client import Timing
from bench.clusters import BenchError, say
from bench.replica_watch import Watch, life

_QUEUE = re.compile(r"\bqueue;dur=([\d.]+)")
SETTLE_S = 20.0
"""Dark before each cycle, about as long as in traffic: what has not been used for a while takes longer to start."""


@dataclass(frozen=True, slots=True)
class Cycle:
    """One way from dark to dark, in seconds."""

    wake_s: float
    """From the request to Serve's beginning of a start."""
    wait_s: float
    """From the requests to a replica's beginning with them, the median."""
    batch: int
    """Requests at once."""
    answer_s: float
    """From there to the ends of the answers, the median."""
    handoff_s: float
    """What a further request waited while the replica was there."""
    overdue_s: float
    """From when the keep-alive was over to Serve's letting the replica go."""
    stop_s: float
    """From there to the replica's end."""


def waited_s(timing: Timing) -> float:
    """From a request's coming to an engine's being given it, as the gateway tells."""
    found = _QUEUE.search(timing.headers["server-timing"])
    if found is None:
        raise BenchError(
            f"server-timing: {timing.headers['server-timing']!r} does not say queue;dur=MILLISECONDS"
        )
    return float(found[1]) / 1e3


async def cycle(
    watch: Watch, model: str, ask: Callable[[], Awaitable[Timing]], keep_alive_s: float, batch: int
) -> Cycle:
    """From dark to dark. Raises RequestFailed, BenchError."""
    timings = await asyncio.gather(*(ask() for _ in range(batch)))
    warm = await ask()
    idle_s = warm.done_s
    await asyncio.sleep(max(0.0, idle_s + keep_alive_s - time.time()))
    await watch.dark(model)
    sent_s = min(timing.sent_s for timing in timings)
    lived = life(watch.samples[model], sent_s)
    return Cycle(
        wake_s=lived.begun_s - sent_s,
        wait_s=statistics.median(waited_s(timing) for timing in timings),
        batch=batch,
        answer_s=statistics.median(timing.total_s - waited_s(timing) for timing in timings),
        handoff_s=waited_s(warm),
        overdue_s=lived.let_go_s - idle_s - keep_alive_s,
        stop_s=lived.gone_s - lived.let_go_s,
    )


async def cycles(  # noqa: PLR0917 - called once
    watch: Watch,
    model: str,
    ask: Callable[[], Awaitable[Timing]],
    keep_alive_s: float,
    numbers: range,
    batch: int,
) -> list[Cycle]:
    """One after another: those of even number a single request, the others `batch` at once."""
    found: list[Cycle] = []
    for i in numbers:
        # Serve's loop ended the replica before: after a whole number of its turns each request would meet the same part
        # of one, which traffic does not.
        await asyncio.sleep(SETTLE_S + random.Random(i).random())
        found.append(await cycle(watch, model, ask, keep_alive_s, batch if i % 2 else 1))
        one = found[-1]
        say(
            f"calibration {i + 1}: waited {one.wait_s:.2f} s, the start began after {one.wake_s:.2f} s,"
            f" answered {one.batch} in {one.answer_s:.2f} s, let go {one.overdue_s:.2f} s after the keep-alive,"
            f" which took {one.stop_s:.2f} s"
        )
    return found


def rated(engine: Engine, work_s: float, found: Sequence[Cycle]) -> Engine:
    """The engine's rates at the level of the answers in the cycles, of `work_s` each by those rates.

    By how much a batch slows grows in the same proportion at every size.
    """
    alone_s = statistics.median(c.answer_s for c in found if c.batch == 1)
    together = [c for c in found if c.batch > 1]
    slowdown = engine.slowdown
    if together:
        batch = together[0].batch
        ratio = max(1.0, statistics.median(c.answer_s for c in together) / alone_s)
        known = engine.slowdowns()[1:]
        at = float(known[min(batch, len(known)) - 1])
        if at > 1.0:
            slowdown = tuple(
                round(1.0 + (float(each) - 1.0) * (ratio - 1.0) / (at - 1.0), 4) for each in known
            )
        else:
            slowdown = tuple(1.0 + (ratio - 1.0) * i / (batch - 1) for i in range(engine.concurrency))
    slower = alone_s / work_s
    return replace(
        engine,
        prefill_tokens_per_s=engine.prefill_tokens_per_s / slower,
        decode_s=engine.decode_s * slower,
        slowdown=slowdown,
    )


def calibrated(profile: Profile, found: Sequence[Cycle], tick_s: float, work_s: float) -> Profile:
    """The profile with what the cycles say of starts, answers, decisions and stops.

    What a request waits is what it waited there, one of the cycles' each time. A decision falls on the first tick after
    the keep-alive, half a tick later on average, which the simulator has by itself.
    """
    wake_s = max(0.0, min(statistics.median(c.wake_s for c in found), *(c.wait_s for c in found)))
    return replace(
        profile,
        engine=rated(profile.engine, work_s, found),
        starts={Rung.TEMPLATE: Start(tuple(round(c.wait_s - wake_s, 4) for c in found))},
        base=Rung.TEMPLATE,
        handoff_s=statistics.median(c.handoff_s for c in found),
        wake_s=wake_s,
        apply_s=max(0.0, statistics.fmean(c.overdue_s for c in found) - tick_s / 2),
        stop_s=max(0.0, statistics.fmean(c.stop_s for c in found)),
    )
