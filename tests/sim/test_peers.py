"""One replay over several processes gives what one process gives, and leaves none of them behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoscaling.core.types import Rung
from autoscaling.sim import compare
from autoscaling.sim.compare import ORACLE, Base, Variant, as_given, simulate
from autoscaling.sim.peers import Killed, Peers, shared
from autoscaling.sim.profile import Start
from autoscaling.sim.replay import Setup
from autoscaling.sim.report import Report
from autoscaling.traces import Row, TraceError
from tests.sim import lab


def rows(models: int = 5, days: float = 1.0) -> list[Row]:
    """Timers, bursts and chance, of models that begin one after the other."""
    random = np.random.default_rng(4)
    found: list[Row] = []
    for i in range(models):
        times = np.cumsum(random.gamma(0.5 + i, 700.0 / (0.5 + i), int(days * 86400 / 700)))
        found += lab.requests(times[times > i * 7000.0].tolist(), model=f"m{i}")
    return sorted(found, key=lambda row: row.time_s)


SETUP = Setup(
    lab.profile(starts={Rung.TEMPLATE: Start((10.0, 30.0, 50.0))}, start_failures=0.1),
    measure_from_s=21600.5,
    sample_s=3600.0,
)
BASE = Base(rows(), SETUP, spec=lab.spec())


def said(report: Report) -> dict[str, Any]:
    return {**report.to_plain(), "took_s": 0, "timeline": dict(report.timeline)}


@pytest.mark.parametrize("policy", ["predictive", "keep-alive", ORACLE])
def test_the_report_is_the_same(policy: str) -> None:
    """To the last digit: with what the fleet teaches its models, samples, and models that come later."""
    variant = Variant(policy, {"wait_cost": 30.0})
    one = said(simulate(BASE, variant))
    assert one["total"]["requests"] > 250
    assert one == said(simulate(BASE, variant, processes=3))


def test_so_with_each_model_its_own_policy() -> None:
    """One of which nothing is asked, and one that the fleet does not have."""
    policies = {"m0": "predictive", "m1": "keep-alive", "m2": "predictive", "idle": "keep-alive", "m3": "kpa"}
    base = replace(BASE, specs={name: lab.spec(name, policy=policy) for name, policy in policies.items()})
    one = as_given(base)
    assert one.policy == "mixed" and [each.model for each in one.models] == list(policies)
    assert ": 83 of the requests, of 1 model: m4 (83)" in " ".join(one.notes)
    assert said(one) == said(as_given(base, processes=2))


def test_models_that_share_gpus_stay_together() -> None:
    base = replace(
        BASE,
        setup=replace(SETUP, profile=replace(SETUP.profile, gpus=2.0)),
        specs={f"m{i}": lab.spec(f"m{i}") for i in range(5)},
    )
    variant = Variant("keep-alive", {"keep_alive_s": 300.0})
    assert said(simulate(base, variant)) == said(simulate(base, variant, processes=4))


def test_so_is_what_its_reader_should_know() -> None:
    """Named in the order of the trace, whichever process it was: who was never answered."""
    base = replace(BASE, setup=Setup(lab.profile(deadline_s=1e12)), spec=lab.spec(max_replicas=0))
    variant = Variant("keep-alive")
    one = simulate(base, variant)
    assert one.notes[-1].endswith("m0, m1, m2, m3, m4")
    assert said(one) == said(simulate(base, variant, processes=3))


def test_so_is_the_end_that_a_long_request_has() -> None:
    base = replace(BASE, trace=sorted([*rows(), Row(7e4, "m2", exec_s=5e5)], key=lambda row: row.time_s))
    one = said(simulate(base, Variant("keep-alive")))
    assert one["total"]["busy_gpu_s"] > 4e5
    assert one == said(simulate(base, Variant("keep-alive"), processes=3))


class Broken:
    """A source whose last row can't be read."""

    name, bad = "broken.csv", 0

    def rows(self) -> Iterator[Row]:
        yield from rows()
        raise TraceError("broken.csv, line 9: no number")


def test_a_bad_row_is_the_same_error() -> None:
    for processes in (1, 3):
        with pytest.raises(TraceError, match="line 9"):
            simulate(replace(BASE, trace=Broken()), Variant("keep-alive"), processes=processes)
    assert not multiprocessing.active_children()


def test_all_get_what_each_brings() -> None:
    def work(peers: Peers) -> list[Any]:
        first = peers.gather(peers.index * 10)
        return [first, peers.gather("x" * 10_000_000 * peers.index)]

    first, second = shared(work, 3)
    assert first == [0, 10, 20]
    assert [len(each) for each in second] == [0, 10_000_000, 20_000_000]
    assert not multiprocessing.active_children()


def test_what_fails_in_another_is_raised_here() -> None:
    def work(peers: Peers) -> None:
        if peers.index == 2:
            raise ValueError("of no use")
        peers.gather(1)

    with pytest.raises(RuntimeError, match="ValueError: of no use"):
        shared(work, 3)
    assert not multiprocessing.active_children()


def test_one_that_is_killed_ends_the_replay() -> None:
    def work(peers: Peers) -> None:
        if peers.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        peers.gather(1)

    with pytest.raises(RuntimeError, match="ended before it was done"):
        shared(work, 2)
    assert not multiprocessing.active_children()


def test_one_that_is_killed_as_it_is_answered_ends_the_replay() -> None:
    """Not only while it works: what it is told then has nowhere to go."""

    def work(peers: Peers) -> None:
        for _ in range(2):
            if peers.index == 1:
                peers._first.send(("", 1))  # type: ignore[attr-defined]
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.3)
            peers.gather(1)

    with pytest.raises(Killed):
        shared(work, 2)


def test_a_comparison_of_which_a_process_is_killed_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason, and none is left."""

    def killed(base: Base, variant: Variant) -> Report:
        if variant.settings["keep_alive_s"] == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return simulate(base, variant)

    monkeypatch.setattr(compare, "simulate", killed)
    variants = [Variant("keep-alive", {"keep_alive_s": each}) for each in (10.0, 20.0, 30.0)]
    with pytest.raises(Killed, match="--jobs 1 takes less"):
        compare.compare(Base(rows(), Setup()), variants, processes=2)
    assert not multiprocessing.active_children()


def test_the_first_one_gone_the_others_end() -> None:
    """Not only when they are terminated: whoever kills it leaves nothing behind."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def first() -> None:
        def work(peers: Peers) -> None:
            pids = peers.gather(os.getpid())
            if peers.index == 0:
                theirs.send(pids[1])
                os.kill(os.getpid(), signal.SIGKILL)
            peers.gather(0)

        shared(work, 2)

    process = context.Process(target=first)
    process.start()
    other = ours.recv()
    process.join()
    deadline_s = time.monotonic() + 20
    while running(other):
        assert time.monotonic() < deadline_s, f"process {other} lives on"
        time.sleep(0.01)


def running(pid: int) -> bool:
    """One that waits to be reaped does not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
