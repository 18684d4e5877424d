"""How a node is told to bring a model's weights, and vLLM to serve it."""

from __future__ import annotations

import os
import re
import sys
from itertools import pairwise

from deployments.engine.protocol import EngineSpec

STOP_GRACE_S = 5.0
"""For how long an engine that is to end may finish what it answers."""


def bring(source: str, cache_dir: str | None, budget_bytes: int | None) -> list[str]:
    """The command that brings weights to this node's cache. None: as the cache has it (`sources.ModelCache`)."""
    command = [sys.executable, "-m", "deployments.engine.sources", source]
    if cache_dir is not None:
        command += ["--cache-dir", cache_dir]
    if budget_bytes is not None:
        command += ["--budget-bytes", str(budget_bytes)]
    return command


def argv(spec: EngineSpec, path: str, *, sleeps: bool = False) -> list[str]:
    own = ["--model", path, "--served-model-name", *spec.names]
    own += ["--shutdown-timeout", str(int(STOP_GRACE_S)), "--disable-uvicorn-access-log"]
    if sleeps:
        own.append("--enable-sleep-mode")
    tensor, rest = divmod(
        spec.gpus, _size(spec, "--pipeline-parallel-size") * _size(spec, "--data-parallel-size")
    )
    if tensor > 1 and not rest and "--tensor-parallel-size" not in spec.argv:
        own += ["--tensor-parallel-size", str(tensor)]
    return [*own, *spec.argv]


def _size(spec: EngineSpec, flag: str) -> int:
    """A kind of parallelism that the model's own arguments ask for; what is no number vLLM refuses."""
    value = dict(pairwise(spec.argv)).get(flag, "1")
    return max(1, int(value)) if value.isdecimal() else 1


def threads_for(spec: EngineSpec) -> int:
    """As OpenMP reads it: a number for each level of nesting, the outermost first; what is none is ignored."""
    wanted = dict(spec.env).get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return (int(wanted) if wanted.isdecimal() else 0) or len(os.sched_getaffinity(0))


def slug(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", model)[:24].strip("-").lower() or "model"


__all__ = ["STOP_GRACE_S", "argv", "bring", "slug", "threads_for"]
