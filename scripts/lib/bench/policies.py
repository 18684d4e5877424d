"""Is the default policy the best? All of them on traces of real systems, learned on the first part, scored on the rest.

Three questions, each with its own bars: models that are mostly idle (sparse), the same with engines that can be parked
in host memory (ladder), and models that never are (dense). Nothing is tuned on the part that is scored, but for the
baselines, which get the best of their sweeps there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import (
    clusters,
    policies_bound,
    policies_bound_dense,
    policies_bound_ladder,
    policies_dense,
    policies_ladder,
    policies_sparse,
)
from bench.clusters import say

PARTS = ("sparse", "ladder", "dense")
BOUND, BOUND_LADDER = "bound", "ladder-bound"
"""What forbids a bar of the others; not among what is run if nothing is named."""

BOUND_DENSE = "bound, dense"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--traces", type=Path, default=Path("../shared/traces"), help="default: ../shared/traces"
    )
    parser.add_argument(
        "--parts",
        default=",".join(PARTS),
        help=f"default: {','.join(PARTS)}; also {BOUND} and {BOUND_LADDER}",
    )
    names = ",".join(policies_sparse.CASES)
    parser.add_argument("--sparse-traces", default=names, help=f"default: {names}")
    parser.add_argument(
        "--sparse-policies",
        default="",
        help=f"only these beside {' and '.join(policies_sparse.COMPARED)} (default: all)",
    )
    parser.add_argument("--processes", type=int, default=None, help="default: one for each core")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    parts = options.parts.split(",")
    if unknown := set(parts) - {*PARTS, BOUND, BOUND_LADDER}:
        raise clusters.BenchError(
            f"--parts: unknown {sorted(unknown)}; there are {', '.join((*PARTS, BOUND, BOUND_LADDER))}"
        )
    wanted = options.sparse_traces.split(",")
    if unknown := set(wanted) - set(policies_sparse.CASES):
        names = ", ".join(policies_sparse.CASES)
        raise clusters.BenchError(f"--sparse-traces: unknown {sorted(unknown)}; there are {names}")
    result: dict[str, Any] = {}
    if "sparse" in parts:
        say("sparse")
        beside = [each for each in options.sparse_policies.split(",") if each]
        known = {variant.policy for variant in policies_sparse.variants()}
        if unknown := set(beside) - known:
            raise clusters.BenchError(
                f"--sparse-policies: unknown {sorted(unknown)}; there are {', '.join(sorted(known))}"
            )
        result["sparse"] = policies_sparse.measure(options.traces, wanted, options.processes, beside)
    if "ladder" in parts:
        say("ladder")
        result["ladder"] = policies_ladder.measure(options.traces, wanted, options.processes)
    if BOUND_LADDER in parts:
        result[BOUND_LADDER] = policies_bound_ladder.measure(options.traces, wanted, options.processes)
    if BOUND in parts:
        result[BOUND] = policies_bound.measure(options.traces, wanted, options.processes)
        dense_names = [case.name for case in policies_dense.CASES]
        result[BOUND_DENSE] = policies_bound_dense.measure(options.traces, dense_names)
    if "dense" in parts:
        say("dense")
        own = argparse.ArgumentParser()
        policies_dense.arguments(own)
        dense = own.parse_args([])
        dense.traces = options.traces
        if options.processes is not None:
            dense.processes = options.processes
        result["dense"] = policies_dense.measure(dense)
    return result


def text(result: Mapping[str, Any]) -> str:
    shown: dict[str, Callable[[Any], str]] = {
        "sparse": policies_sparse.text,
        BOUND: policies_bound.text,
        BOUND_DENSE: policies_bound_dense.text,
        BOUND_LADDER: policies_bound_ladder.text,
        "ladder": policies_ladder.text,
        "dense": policies_dense.text,
    }
    return "\n\n".join(f"== {part} ==\n{of(result[part])}" for part, of in shown.items() if part in result)
