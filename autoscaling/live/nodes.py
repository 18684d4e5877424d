"""The cluster's nodes: which are there, which could run a model, and asking the autoscaler for more."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoscaling.core.types import Decision, Rung
from autoscaling.live.labels import ACCELERATOR, Labels
from autoscaling.live.node_waits import labels_of
from autoscaling.live.plan_store import kv_get, kv_put
from autoscaling.live.setup import ModelSetup
from autoscaling.ports import Clock

log = logging.getLogger("ray.serve")

REASSERT_S = 20.0
"""How often the autoscaler is told again what it was told: it forgets when the head restarts."""
LEASE_S = 3 * REASSERT_S
"""How long nodes are held ahead when nobody says any more that they are wanted: the controller was killed for good."""
LEASE_KEY = b"nodes"


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive."""

    id: str
    resources: Mapping[str, float]
    labels: Labels = field(default_factory=dict)

    @property
    def gpus(self) -> float:
        """Those that it has, used or not."""
        return self.resources.get("GPU", 0.0)


def fits(node: Node, model: ModelSetup) -> bool:
    """Whether a replica of the model could run on the node if the node were empty."""
    if any(node.resources.get(name, 0.0) < amount for name, amount in model.resources.items()):
        return False
    kinds = model.accelerator_types
    if not kinds or node.labels.get(ACCELERATOR) in kinds:
        return True
    return any(node.resources.get(f"accelerator_type:{kind}", 0.0) > 0 for kind in kinds)


def alive_nodes() -> list[Node]:
    """Ray's nodes as they are now. Needs a connection to Ray."""
    import ray

    return [
        Node(
            node["NodeID"],
            {name: float(amount) for name, amount in node["Resources"].items()},
            dict(node.get("Labels") or {}),
        )
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


def failed_launches() -> dict[str, float]:
    """Node type -> when it was last asked for in vain (Unix time). Needs a connection to Ray.

    Empty with the autoscaler's first version, which itself puts back a type that can't be had.
    """
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    if not is_autoscaler_v2():
        return {}
    found: dict[str, float] = {}
    for launch in get_cluster_status(internal_kv_get_gcs_client().address).failed_launches:
        kind = launch.ray_node_type_name
        found[kind] = max(found.get(kind, 0.0), float(launch.failed_ts_s or 0))
    return found


@dataclass(frozen=True, slots=True)
class Bundle:
    """Room for one replica, on a node with these labels."""

    resources: Mapping[str, float]
    labels: Labels = field(default_factory=dict)


def bundles(
    models: Mapping[str, ModelSetup],
    decisions: Iterable[Decision],
    *,
    unplaced: Callable[[str], int] = lambda _: 0,
    instead: Callable[[str], Labels | None] = lambda _: None,
) -> list[Bundle]:
    """What the cluster must have room for; empty if nobody waits for a node that replicas would not ask for anyway.

    A request to Ray's autoscaler is for the whole cluster, what runs included, so that once one model is to have a
    node ahead of its replicas, all replicas stand in it. `unplaced` replicas of a model that waits in vain are to be on
    the nodes that are asked for `instead`.
    """
    found: list[Bundle] = []
    ahead = False
    for decision in decisions:
        model = models.get(decision.model)
        if model is None:
            continue
        count, other = decision.replicas or 0, instead(decision.model)
        lacking = min(count, unplaced(decision.model)) if other is not None else 0
        if not count and Rung.NODE <= decision.rung < Rung.SERVING:
            count, ahead = 1, True
            lacking = 1 if other is not None else 0
        ahead = ahead or lacking > 0
        found += [Bundle(model.resources, labels_of(model))] * (count - lacking)
        if other is not None:
            found += [Bundle(model.resources, other)] * lacking
    return found if ahead else []


class NodeRequests:
    """The one who asks the autoscaler for nodes: the last call of the whole cluster wins.

    Ray holds a request until the next one, also when who made it is dead. So it is made under a lease, which
    `NodeLease` ends where it is not renewed; a successor takes back what it does not want itself.
    """

    def __init__(
        self,
        request: Callable[[list[Bundle]], None],
        *,
        get: Callable[[bytes], bytes | None] = kv_get,
        put: Callable[[bytes, bytes], None] = kv_put,
    ) -> None:
        self._request = request
        self._get = get
        self._put = put
        self._asked: Sequence[Bundle] | None = None
        self._asked_s = 0.0

    def ask(self, monotonic_s: float, wanted: list[Bundle]) -> None:
        """Say what the cluster must have room for, when that is new, or was said some time ago.

        Raises what Ray raises; then it is said at the next call.
        """
        if self._asked is None and not wanted and not self._get(LEASE_KEY):
            self._asked = ()  # nobody before us asked for anything: what others ask for is theirs
        due = monotonic_s - self._asked_s >= REASSERT_S
        if self._asked is not None and wanted == list(self._asked) and not (due and wanted):
            return
        if wanted:
            # First, so that a request whose maker dies here ends as well.
            self._put(LEASE_KEY, f"{monotonic_s}".encode())
        self._request(wanted)
        if not wanted:
            self._put(LEASE_KEY, b"")
        self._asked, self._asked_s = wanted, monotonic_s


class NodeLease:
    """Ends a request for nodes that nobody renews. Runs in Serve's controller, which outlives ours."""

    def __init__(
        self,
        clock: Clock,
        *,
        get: Callable[[bytes], bytes | None] = kv_get,
        put: Callable[[bytes, bytes], None] = kv_put,
        request: Callable[[list[Bundle]], None] | None = None,
    ) -> None:
        self._clock = clock
        self._get = get
        self._put = put
        self._request = request or request_nodes
        self._seen: bytes | None = None
        self._since_s = 0.0

    def look(self) -> None:
        """Call it every few seconds. Raises what Ray raises."""
        text, now_s = self._get(LEASE_KEY), self._clock.monotonic_s()
        if text != self._seen:
            self._seen, self._since_s = text, now_s
        elif text and now_s - self._since_s >= LEASE_S:
            log.warning(
                "nodes that were asked for ahead are let go: nobody has wanted them for %.0f s", LEASE_S
            )
            self._request([])
            self._put(LEASE_KEY, b"")


def request_nodes(wanted: list[Bundle]) -> None:
    """Ray's own call. Needs a connection to Ray."""
    from ray.autoscaler.sdk import request_resources

    request_resources(
        bundles=[dict(bundle.resources) for bundle in wanted],
        bundle_label_selectors=[dict(bundle.labels) for bundle in wanted],
    )


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
        working = here.options(scheduling_strategy=strategy).remote(*arguments)
        try:
            answer: dict[str, Any] = ray.get(working, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            # Else it would still be granted what it waits for, some time, and nobody would know.
            ray.cancel(working, force=True)
            raise
        return answer


def _warm_on_gpus(
    warm: Callable[[Mapping[str, Any]], dict[str, Any]], message: Mapping[str, Any]
) -> dict[str, Any]:
    import ray

    granted = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    return warm({**message, "gpu_ids": [str(gpu) for gpu in granted]})
