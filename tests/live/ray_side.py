"""What a test asks Ray, in a process of its own: one question a line on stdin, one answer a line on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

import ray
from ray import serve

STORE = "object_store_memory"


def answer(question: str) -> Any:
    """One answer, as JSON."""
    if question == "resources":
        return {"total": ray.cluster_resources(), "available": ray.available_resources()}
    if question == "nodes":
        return [n["NodeID"] for n in ray.nodes() if n["Alive"]]
    if question == "applications":
        return {
            name: {
                "status": str(a.status),
                "deployments": {d: str(v.status) for d, v in a.deployments.items()},
            }
            for name, a in serve.status().applications.items()
        }
    if question == "labels":
        return {n["NodeID"]: n["Labels"] for n in ray.nodes() if n["Alive"]}
    if question == "objects":
        free = ray._private.state.available_resources_per_node()
        return {
            n["NodeID"]: n["Resources"][STORE] - free[n["NodeID"]].get(STORE, 0.0)
            for n in ray.nodes()
            if n["Alive"] and n["NodeID"] in free
        }
    raise ValueError(question)


def main() -> None:
    """Connect to the cluster named in the arguments and answer until stdin closes."""
    ray.init(sys.argv[1], namespace="serve", log_to_driver=False, logging_level="ERROR")
    for line in sys.stdin:
        print("answer " + json.dumps(answer(line.strip())), flush=True)


if __name__ == "__main__":
    main()
