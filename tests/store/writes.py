"""A process that writes until it is killed: `python -m tests.store.writes URL`. Says each second that it has given."""

from __future__ import annotations

import sys
import time

from autoscaling.live.clock import SystemClock
from autoscaling.live.records import TrafficRow
from autoscaling.live.store import Store


def main() -> None:
    store = Store.open(sys.argv[1], clock=SystemClock())
    store.start()
    print("ready", flush=True)
    while True:
        # As fast as time: the bound that is tested is one of time.
        now = time.time()
        store.add_traffic([TrafficRow(f"m{i}", int(now), 1) for i in range(50)])
        print(f"{now:.3f}", flush=True)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
