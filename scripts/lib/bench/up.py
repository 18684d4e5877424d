"""`python -m bench.up ROOT FLEET PORT APP`: starts one cluster of a benchmark. Run by `bench.clusters.cluster`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from deployments.local import serving
from deployments.local.cluster import Wanted, up
from deployments.local.state import Checkout

# What finding its processes again needs, and nothing that makes Ray faster.
_UNTUNED = {"SPT_NOENV": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("fleet", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("app")
    parser.add_argument("--ray-defaults", action="store_true", help="without deployments/ray_env.py")
    parser.add_argument("--timeout", type=float, default=600.0)
    options = parser.parse_args()
    if options.ray_defaults:
        vars(serving)["ray_env"] = lambda: dict(_UNTUNED)
    # Whoever measures asks the engine host itself (`clusters.wait_for_templates`), where templates matter at all.
    vars(serving)["_wait_for_templates"] = lambda *_: None
    os.environ["RELIGHT_APP"] = options.app
    up(Wanted(options.fleet, port=options.port, timeout_s=options.timeout), Checkout(options.root))


if __name__ == "__main__":
    main()
