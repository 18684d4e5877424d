"""`python -m deployments.local up|down`: what scripts/up (after the install) and scripts/down run."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from deployments.local.cluster import Wanted, down, up
from deployments.local.state import Checkout, ClusterError


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (1 to 65535)")
    return int(text)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of CPUs (1 or more)")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="scripts")
    verbs = top.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser(
        "up",
        prog="scripts/up",
        description="Installs what is pinned, starts Ray and the fleet on this machine, and waits until it "
        "answers. Run again, it applies a changed fleet file and is otherwise harmless.",
    )
    verb.add_argument(
        "--fleet",
        type=Path,
        default=Path("fleet.yaml"),
        help="the fleet file (default: the checkout's fleet.yaml)",
    )
    verb.add_argument("--host", help="address that HTTP listens on (default: 127.0.0.1)")
    verb.add_argument("--port", type=_port, default=None, help="HTTP port (default: RELIGHT_PORT, else 8000)")
    verb.add_argument("--ray-port", type=_port, help="Ray's port (default: a free one, the same every time)")
    verb.add_argument("--num-cpus", type=_positive, help="logical CPUs (default: the cores, at least 8)")
    verb.add_argument(
        "--timeout", type=_seconds, default=600.0, metavar="S", help="how long to wait (default: 600)"
    )
    verbs.add_parser("down", prog="scripts/down", description="Ends what scripts/up started, nothing else.")
    return top


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    checkout = Checkout.here()
    try:
        if options.verb == "down":
            down(checkout)
            return 0
        fleet: Path = options.fleet
        if str(fleet) == "fleet.yaml" and not fleet.is_file():
            fleet = checkout.root / fleet
        port = options.port
        if port is None and (named := os.environ.get("RELIGHT_PORT")):
            try:
                port = _port(named)
            except argparse.ArgumentTypeError as error:
                raise ClusterError(f"RELIGHT_PORT: {error}") from None
        up(
            Wanted(
                fleet=fleet,
                host=options.host,
                port=port,
                ray_port=options.ray_port,
                num_cpus=options.num_cpus,
                timeout_s=options.timeout,
            ),
            checkout,
        )
    except ClusterError as error:
        print(f"{parser().prog}/{options.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{parser().prog}/{options.verb}: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
