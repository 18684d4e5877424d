"""`python -m bench.node_watch ADDRESS`: tells of a cluster's nodes, one JSON line whenever they change."""

from __future__ import annotations

import json
import sys
import time

EVERY_S = 0.05


def main() -> None:
    """Until stdin's other end, or the cluster, is gone."""
    import ray

    ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
    last = None
    while True:
        nodes = {
            node["NodeID"]: {"gpus": node["Resources"].get("GPU", 0), "labels": node.get("Labels") or {}}
            for node in ray.nodes()
            if node["Alive"]
        }
        if nodes != last:
            print(json.dumps({"at_s": time.time(), "nodes": nodes}), flush=True)
            last = nodes
        time.sleep(EVERY_S)


if __name__ == "__main__":
    main()
