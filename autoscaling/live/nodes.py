"""The cluster's nodes: which are there, which could run a model, and asking the autoscaler for more."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoscaling.core.types import Decision, Rung
from autoscaling.live.setup import ModelSetup

log = logging.getLogger("ray.serve")

REASSERT_S = 60.0
"""How often the autoscaler is told again what it was told: it forgets when the head restarts."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive."""

    id: str
    resources: Mapping[str, float]

    @property
    def gpus(self) -> float:
        """Those that it has, used or not."""
        return self.resources.get("GPU", 0.0)


def fits(node: Node, model: ModelSetup) -> bool:
    """Whether a replica of the model could run on the node if the node were empty."""
    if any(node.resources.get(name, 0.0) < amount for name, amount in model.resources.items()):
        return False
    kinds = model.accelerator_types
    return not kinds or any(node.resources.get(f"accelerator_type:{kind}", 0.0) > 0 for kind in kinds)


def alive_nodes() -> list[Node]:
    """Ray's nodes as they are now. Needs a connection to Ray."""
    import ray

    return [
        Node(node["NodeID"], {name: float(amount) for name, amount in node["Resources"].items()})
        for node in ray.nodes()
        if node["Alive"]
    ]


def has_autoscaler(node_ids: Iterable[str]) -> bool:
    """Whether something starts and ends nodes of this cluster. Needs a connection to Ray.

    A cluster without one runs a monitor too, which names every node's type after the node itself.
    """
    from ray.autoscaler._private.util import format_readonly_node_type

    own = {format_readonly_node_type(node_id) for node_id in node_ids}
    return any(kind not in own for kind in _node_types())


def _node_types() -> set[str]:
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get, internal_kv_get_gcs_client

    if is_autoscaler_v2():
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(internal_kv_get_gcs_client().address)
        return {node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)}
    text = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    report = json.loads(text).get("autoscaler_report") if text else None
    return set((report or {}).get("active_nodes", {}))


def bundles(models: Mapping[str, ModelSetup], decisions: Iterable[Decision]) -> list[dict[str, float]]:
    """What the cluster must have room for; empty if nobody waits for a node that replicas would not ask for anyway.

    A request to Ray's autoscaler is for the whole cluster, what runs included, so that once one model is to have a
    node ahead of its replicas, all replicas stand in it.
    """
    found: list[dict[str, float]] = []
    ahead = False
    for decision in decisions:
        model = models.get(decision.model)
        if model is None:
            continue
        count = decision.replicas or 0
        if not count and Rung.NODE <= decision.rung < Rung.SERVING:
            count, ahead = 1, True
        found += [dict(model.resources)] * count
    return found if ahead else []


class NodeRequests:
    """The one who asks the autoscaler for nodes: the last call of the whole cluster wins."""

    def __init__(self, request: Callable[[list[dict[str, float]]], None]) -> None:
        self._request = request
        self._asked: Sequence[Mapping[str, float]] = ()
        self._asked_s: float | None = None

    def ask(self, monotonic_s: float, wanted: list[dict[str, float]]) -> None:
        """Say what the cluster must have room for, when that is new, or was said a minute ago."""
        due = self._asked_s is None or monotonic_s - self._asked_s >= REASSERT_S
        if wanted == list(self._asked) and not (due and wanted):
            return
        self._request(wanted)
        self._asked, self._asked_s = wanted, monotonic_s


def request_nodes(wanted: list[dict[str, float]]) -> None:
    """Ray's own call. Needs a connection to Ray."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=wanted)


class Warming:
    """Has engine hosts bring models to rungs. On this node directly, elsewhere by a task that is gone when it is done.

    `warm(message)` talks to the host of the node on which it runs, and returns what that says.
    """

    def __init__(self, warm: Callable[[Mapping[str, Any]], dict[str, Any]], node_id: str) -> None:
        self._warm = warm
        self._node_id = node_id

    def __call__(
        self, node_id: str, message: Mapping[str, Any], gpus: int, timeout_s: float
    ) -> dict[str, Any]:
        """The host's answer. Raises whatever kept it from answering."""
        if node_id == self._node_id and not gpus:
            return self._warm(message)
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # No actor, which would keep the node for ever, and no CPU, which a replica may need. An engine that loads on
        # GPUs takes those that Ray grants to this task, for as long as it loads.
        here = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(_warm_on_gpus if gpus else self._warm)
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        arguments = (self._warm, message) if gpus else (message,)
        answer: dict[str, Any] = ray.get(
            here.options(scheduling_strategy=strategy).remote(*arguments), timeout=timeout_s
        )
        return answer


def _warm_on_gpus(
    warm: Callable[[Mapping[str, Any]], dict[str, Any]], message: Mapping[str, Any]
) -> dict[str, Any]:
    import ray

    granted = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    return warm({**message, "gpu_ids": [str(gpu) for gpu in granted]})
