"""What the store costs: `python -m tests.store.bench_store [URL]`. Every model is busy in every second of two weeks."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from autoscaling.live.clock import SystemClock
from autoscaling.live.records import TrafficRow
from autoscaling.live.store import Store

MODELS = 1000
FILLED = 50
"""Models that get two weeks of history; what they take is the same for each."""
DAYS = 14


def history(now_s: float, bucket_s: int, span_s: float) -> Iterator[tuple[str, float, int, int, int, float]]:
    first = int((now_s - span_s) // bucket_s) * bucket_s
    for i in range(FILLED):
        for start_s in range(first, int(now_s), bucket_s):
            yield f"model-{i}", start_s, 3, 1000, 500, bucket_s * 0.5


def timed(what: str, count: int, begun: float) -> None:
    print(f"{what:<60} {1000 * (time.perf_counter() - begun) / count:9.3f} ms")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        url = sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{folder}/relight.db"
        clock = SystemClock()
        now_s = clock.now_s()
        store = Store.open(url, clock=clock)
        begun = time.perf_counter()
        rows = sum(
            store.import_traffic(history(now_s, bucket_s, span_s), bucket_s)
            for bucket_s, span_s in ((300, DAYS * 86400), (60, 2 * 86400), (1, 3600))
        )
        timed(f"import, {rows} rows, a thousand of them", rows // 1000, begun)
        store.close()

        begun = time.perf_counter()
        store = Store.open(url, clock=clock)
        timed("open", 1, begun)
        begun = time.perf_counter()
        for i in range(FILLED):
            store.traffic(f"model-{i}", now_s)
        timed("first read of a model's history, from the database", FILLED, begun)
        begun = time.perf_counter()
        for i in range(FILLED):
            store.traffic(f"model-{i}", now_s)
        timed("further read, from memory", FILLED, begun)
        megabytes = store.memory_bytes / FILLED * MODELS / 1e6
        print(f"{'history in memory of ' + str(MODELS) + ' models':<60} {megabytes:9.0f} MB")

        models = [f"model-{i}" for i in range(MODELS)]
        add = commit = 0.0
        for second in range(60):
            rows_of_second = [
                TrafficRow(model, int(now_s) - 60 + second, 3, 1000, 500, 0.5) for model in models
            ]
            begun = time.perf_counter()
            store.add_traffic(rows_of_second)
            add += time.perf_counter() - begun
            begun = time.perf_counter()
            store.flush()
            commit += time.perf_counter() - begun
        print(f"{'add one second of ' + str(MODELS) + ' models':<60} {1000 * add / 60:9.3f} ms")
        print(f"{'commit it':<60} {1000 * commit / 60:9.3f} ms")
        begun = time.perf_counter()
        store.close()
        timed("close, with the roll-up of that minute", 1, begun)
        if url.startswith("sqlite"):
            size = sum(file.stat().st_size for file in Path(folder).iterdir()) / FILLED * MODELS / 1e6
            print(f"{'on disk, of ' + str(MODELS) + ' models':<60} {size:9.0f} MB")


if __name__ == "__main__":
    main()
