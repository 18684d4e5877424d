"""The environment of every Ray process of a cluster that serves Relight, in one place.

Ray and Serve read these when their processes start, so they belong to `ray start` (scripts/up sets them; in
cluster-configs/ they stand in the head's and the workers' commands). They must never go through a
`runtime_env`: a worker whose runtime_env is not empty is started from nothing, and a cold start waits for it.

Ray's worker pool is left at its defaults. Idle workers belong to the job for which they were started, and
that of scripts/up is over when the cluster is up: with RAY_enable_worker_prestart, RAY_preload_python_modules
or a larger RAY_num_workers_soft_limit there were none either, and replicas started no sooner.
"""

from __future__ import annotations

from typing import NamedTuple


class Setting(NamedTuple):
    value: str
    reason: str


RAY_ENV: dict[str, Setting] = {
    "RAY_worker_niceness": Setting(
        "0",
        "Ray runs workers at nice 15; ours answer requests, and would lose to any batch job on the machine",
    ),
    "RAY_USAGE_STATS_ENABLED": Setting("0", "a self-hosted cluster reports to nobody"),
    "SPT_NOENV": Setting(
        "1",
        "keeps setproctitle from overwriting /proc/PID/environ, by which scripts/down knows its processes",
    ),
}


def ray_env() -> dict[str, str]:
    """Names and values alone, ready for a process's environment."""
    return {name: setting.value for name, setting in RAY_ENV.items()}
