"""What processes hold and use, by what they are."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from deployments.local.processes import Process

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

# The first that is found in a process's command line names it. Ray's own names begin with `ray::`.
_KINDS = (
    (r"^relight-engine", "engine"),
    (r"^relight-model-template (\S+)", "model template"),
    (r"deployments\.engine\.template", "node template"),
    (r"^relight-host", "engine host"),
    (r"deployments\.engine\.host", "engine host"),
    (r"^ray::ServeReplica:[^:]+:gateway", "gateway"),
    (r"^ray::ServeReplica:[^:]+:controller", "controller"),
    (r"^ray::ServeReplica:[^:]+:model-", "model replica"),
    (r"^ray::ServeReplica:[^:]+:(Bare|Trivial)", "bare deployment"),
    (r"^ray::ServeReplica:[^:]+:LLMServer", "LLMServer replica"),
    (r"^ray::ServeReplica", "other replica"),
    (r"^ray::ServeController", "Serve controller"),
    (r"^ray::(Proxy|HAProxy)", "Serve proxy"),
    (r"haproxy", "HAProxy"),
    (r"^ray::IDLE", "idle workers"),
    (r"gcs_server", "GCS"),
    (r"raylet/raylet", "raylet"),
    (r"^ray::DashboardAgent", "dashboard agent"),
    (r"dashboard/dashboard\.py", "dashboard (its minimal part)"),
    (r"^ray::RuntimeEnvAgent", "runtime_env agent"),
    (r"log_monitor", "log monitor"),
    (r"autoscaler/_private/monitor", "autoscaler's monitor"),
    (r"ray\.util\.client\.server", "Ray client server"),
    (r"EngineCore|VLLM::", "engine core"),
    (r"api_server", "vLLM's server"),
    (r"bench\.null", "null engine"),
    (r"^ray::RayWorkerWrapper|^ray::", "other Ray worker"),
)


def kind(command: str) -> str:
    for pattern, name in _KINDS:
        if re.search(pattern, command):
            return name
    return "other"


def pss_bytes(pid: int) -> int:
    """Proportional set size; 0 for a process that is gone."""
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def pss_by_kind(processes: Iterable[Process]) -> dict[str, int]:
    found: dict[str, int] = {}
    for process in processes:
        name = kind(process.command)
        found[name] = found.get(name, 0) + pss_bytes(process.pid)
    return found


def cpu_by_kind(processes: Iterable[Process]) -> dict[str, float]:
    """Processor seconds so far. Compare two readings of the same processes (`cpu_between`)."""
    found: dict[str, float] = {}
    for process in processes:
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = (_PROC / str(process.pid) / "stat").read_text().rpartition(")")[2].split()
            name = kind(process.command)
            found[name] = found.get(name, 0.0) + (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return found


def cpu_between(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What each kind used, without those that did next to nothing."""
    used = {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}
    return {
        n: round(s, 2) for n, s in sorted(used.items(), key=lambda item: -item[1]) if s >= 1 / _TICKS_PER_S
    }
