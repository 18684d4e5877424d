"""A provider of pretended nodes that behaves as clouds do. Runs in the autoscaler's process.

Its options in the autoscaler's file: types named in `scarce` are taken orders for, and never come; orders for those in
`refused` fail at once; and where `ledger` names a file, nodes are known again by a provider that comes later, as a
cloud knows its machines when the head is another.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE


class CloudProvider(FakeMultiNodeProvider):  # type: ignore[misc] # Ray has no types
    """See the module."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        ledger = provider_config.get("ledger")
        self._ledger = Path(ledger) if ledger else None
        if self._ledger is not None and self._ledger.exists():
            known = json.loads(self._ledger.read_text())
            self._next_node_id = known["last"]
            for node_id, entry in known["nodes"].items():
                node = Survivor(entry["pids"])
                if node.is_alive():
                    self._nodes[node_id] = {"tags": entry["tags"], "node": node}

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        kind = tags[TAG_RAY_USER_NODE_TYPE]
        if kind in self.provider_config.get("refused", ()):
            raise RuntimeError(f"there is no capacity for {kind} in this zone")
        if kind not in self.provider_config.get("scarce", ()):
            super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
            self._write()

    def terminate_node(self, node_id: str) -> None:
        super().terminate_node(node_id)
        self._write()

    def _write(self) -> None:
        if self._ledger is None:
            return
        with self.lock:
            nodes = {
                node_id: {"tags": entry["tags"], "pids": pids(entry["node"])}
                for node_id, entry in self._nodes.items()
                if "node" in entry
            }
            self._ledger.write_text(json.dumps({"last": self._next_node_id, "nodes": nodes}))


class Survivor:
    """A node that was started by a provider before. `processes` are its own, the raylet first."""

    def __init__(self, processes: list[int]) -> None:
        self.processes = processes

    def is_alive(self) -> bool:
        """Whether its raylet runs."""
        try:
            return "raylet" in Path(f"/proc/{self.processes[0]}/cmdline").read_text()
        except OSError:
            return False

    def kill_all_processes(self, **_: Any) -> None:
        """As Ray's `Node` has it."""
        for pid in self.processes:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGTERM)


def pids(node: Any) -> list[int]:
    """A node's processes, the raylet first."""
    if isinstance(node, Survivor):
        return node.processes
    found = sorted(node.all_processes.items(), key=lambda item: item[0] != "raylet")
    return [info.process.pid for _, infos in found for info in infos]
