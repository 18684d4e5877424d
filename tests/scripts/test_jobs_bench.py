"""Jobs at fixed times of the day, as the measure of them has it: met without anything that is set."""

from __future__ import annotations

import argparse

from bench import jobs


def test_runs_at_fixed_times_hardly_wait_and_cost_little_more_than_their_starts() -> None:
    options = argparse.Namespace(wait_cost=10.0, jitter_s="5", seed=1)
    rows = [row for row in jobs.measure(options)["rows"] if row["policy"] == "predictive"]
    assert {row["jobs"] for row in rows} == set(jobs.PATTERNS)
    for row in rows:
        assert row["waited_s_per_run"] < 2.0, row
        assert row["gpu_s_per_run"] < 2 * (jobs.START_S + jobs.WORK_S), row
