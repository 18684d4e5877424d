"""`python -m deployments.node_start`: starts this node's engine host as soon as its raylet runs.

For the commands that start a node (cluster-configs/): without it the host starts with the node's first replica, which
then waits until the template has imported torch and vLLM. Imports no Ray: the raylet's command line says its id.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from deployments.engine.client import ensure_host
from deployments.engine.protocol import default_run_dir

_NODE_ID = ("--node_id=", "--node-id=")
_LABELS = "--labels="
_MARKET = "ray.io/market-type"


@dataclass(frozen=True, slots=True)
class Raylet:
    """A raylet of this user on this machine."""

    pid: int
    node_id: str
    market: str = ""
    """`spot` or `on-demand`; empty where its labels don't say."""


def raylets(processes: Iterable[tuple[int, list[str]]]) -> list[Raylet]:
    """The raylets among (process id, command line)s."""
    found = []
    for pid, command in processes:
        if not command or Path(command[0]).name != "raylet":
            continue
        ids = [part.partition("=")[2] for part in command[1:] if part.startswith(_NODE_ID)]
        found += [Raylet(pid, node_id, _market(command)) for node_id in ids[:1]]
    return found


def _market(command: list[str]) -> str:
    for part in command:
        if part.startswith(_LABELS) and (text := part.removeprefix(_LABELS)):
            return str(json.loads(text).get(_MARKET, ""))
    return ""


def _processes() -> list[tuple[int, list[str]]]:
    me = os.getuid()
    return [
        (p.info["pid"], p.info["cmdline"] or [])
        for p in psutil.process_iter(["pid", "cmdline", "uids"])
        if p.info["uids"] is not None and p.info["uids"].real == me
    ]


def find_raylets() -> list[Raylet]:
    """Those of this user on this machine."""
    return raylets(_processes())


def start(wait_s: float) -> list[Raylet]:
    """Start the engine hosts of this machine's raylets, waiting for the first raylet for `wait_s` seconds.

    Returns those raylets; none where none came. Raises OSError or TimeoutError where a host does not start.
    """
    deadline_s = time.monotonic() + wait_s
    while not (found := find_raylets()) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    for raylet in found:
        # A host that a replica starts has the raylet's environment; this one must be no other.
        os.environ.update(psutil.Process(raylet.pid).environ())
        asyncio.run(ensure_host(default_run_dir(raylet.node_id), raylet.pid))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m deployments.node_start", description=__doc__)
    parser.add_argument(
        "--wait-s", type=float, default=30.0, help="how long to wait for a raylet (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        found = start(options.wait_s)
    except (OSError, TimeoutError, psutil.Error) as error:
        print(f"node_start: the engine host does not start: {error}", file=sys.stderr)
        return 1
    if not found:
        print(f"node_start: no raylet within {options.wait_s:g} s; start Ray first", file=sys.stderr)
        return 1
    for raylet in found:
        print(f"node_start: the engine host of node {raylet.node_id[:12]} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
