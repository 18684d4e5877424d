"""What the simulator must know of a live cluster: what a start, a decision and a stop take there.

A model of its own is asked while it is dark, then a few times more, idles for its keep-alive, and goes dark, several
times over.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from autoscaling.core.types import Rung
from autoscaling.sim.profile import Profile, Start
from bench.client import Timing
from bench.clusters import BenchError, say
from bench.replica_watch import Watch, life

_QUEUE = re.compile(r"\bqueue;dur=([\d.]+)")
WARM_REQUESTS = 2
SETTLE_S = 6.0
"""The node's template has forked and calmed down by then."""


@dataclass(frozen=True, slots=True)
class Cycle:
    """One way from dark to dark, in seconds."""

    wake_s: float
    """From the request to Serve's beginning of a start."""
    wait_s: float
    """From the request to a replica's beginning with it."""
    answer_s: float
    """From there to the end of the answer."""
    handoff_s: tuple[float, ...]
    """What further requests waited while the replica was there."""
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


async def cycle(watch: Watch, model: str, ask: Callable[[], Awaitable[Timing]], keep_alive_s: float) -> Cycle:
    """From dark to dark. Raises RequestFailed, BenchError."""
    timing = await ask()
    warm = [await ask() for _ in range(WARM_REQUESTS)]
    idle_s = warm[-1].done_s
    await asyncio.sleep(max(0.0, idle_s + keep_alive_s - time.time()))
    await watch.dark(model)
    lived = life(watch.samples[model], timing.sent_s)
    wait_s = waited_s(timing)
    return Cycle(
        wake_s=lived.begun_s - timing.sent_s,
        wait_s=wait_s,
        answer_s=timing.total_s - wait_s,
        handoff_s=tuple(waited_s(each) for each in warm),
        overdue_s=lived.let_go_s - idle_s - keep_alive_s,
        stop_s=lived.gone_s - lived.let_go_s,
    )


async def cycles(
    watch: Watch, model: str, ask: Callable[[], Awaitable[Timing]], keep_alive_s: float, count: int
) -> list[Cycle]:
    found = []
    for i in range(count):
        await asyncio.sleep(SETTLE_S)
        found.append(await cycle(watch, model, ask, keep_alive_s))
        one = found[-1]
        say(
            f"calibration {i + 1} of {count}: waited {one.wait_s:.2f} s, the start began after {one.wake_s:.2f} s,"
            f" let go {one.overdue_s:.2f} s after the keep-alive, which took {one.stop_s:.2f} s"
        )
    return found


def calibrated(profile: Profile, found: Sequence[Cycle], tick_s: float) -> Profile:
    """The profile with what the cycles say of starts, decisions and stops.

    What a request waits is what it waited there, one of the cycles' each time. A decision falls on the first tick after
    the keep-alive, half a tick later on average, which the simulator has by itself.
    """
    wake_s = max(0.0, min(statistics.median(c.wake_s for c in found), *(c.wait_s for c in found)))
    return replace(
        profile,
        starts={Rung.TEMPLATE: Start(tuple(round(c.wait_s - wake_s, 4) for c in found))},
        base=Rung.TEMPLATE,
        handoff_s=statistics.median(each for c in found for each in c.handoff_s),
        wake_s=wake_s,
        apply_s=max(0.0, statistics.fmean(c.overdue_s for c in found) - tick_s / 2),
        stop_s=max(0.0, statistics.fmean(c.stop_s for c in found)),
    )
