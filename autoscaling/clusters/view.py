"""A cluster file as our checks see it: the same whether it is for `ray up` or for KubeRay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoscaling.clusters.catalog import Market
from autoscaling.clusters.nodes import ACCELERATOR_LABEL, MARKET_LABEL
from autoscaling.clusters.problems import Place

_ACCELERATOR = "accelerator_type:"
_HOST, _RECLAIM = "node_start", "node_reclaim"


@dataclass(frozen=True, slots=True)
class Node:
    """A type of node, or a worker group."""

    name: str
    place: Place
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    min_workers: int
    max_workers: int
    idle_timeout_s: float | None
    """None where nothing is said for the type nor for all."""
    idle_place: Place
    spot: bool | None
    """What the provider is asked for; None where that can't be seen."""
    machine: str | None = None
    """The provider's name of the machine."""
    environ: Mapping[str, str] = field(default_factory=dict)
    starts_host: bool = True
    """Whether the engine host starts with the node, or that can't be seen."""
    hears_notice: bool = True
    """Whether Ray is told when the cloud takes the node back, or that can't be seen."""

    @property
    def market(self) -> Market:
        spot = self.spot if self.spot is not None else self.labels.get(MARKET_LABEL) == "spot"
        return "spot" if spot else "on-demand"

    @property
    def accelerators(self) -> frozenset[str]:
        """Of which type its GPUs are, by resource or by label."""
        kinds = {n.removeprefix(_ACCELERATOR) for n in self.resources if n.startswith(_ACCELERATOR)}
        if self.labels.get(ACCELERATOR_LABEL):
            kinds.add(self.labels[ACCELERATOR_LABEL])
        return frozenset(kinds)

    @property
    def gpus(self) -> float:
        return self.resources.get("GPU", 0.0)


@dataclass(frozen=True, slots=True)
class Cluster:
    """The whole of a cluster file."""

    provider: str
    head: Node | None
    workers: tuple[Node, ...]
    max_workers: int | None
    token: bool | None
    """Whether Ray asks for a token; None where that can't be seen."""
    token_place: Place
    autoscaler_environ: Mapping[str, str]
    serve: Any = None
    """The Serve config in it, if any."""
    serve_place: Place = ()


# --- ray up -------------------------------------------------------------------------------------------------


def of_ray(document: Mapping[str, Any]) -> Cluster:
    """From a file for `ray up` that its schema has passed."""
    provider = str(document["provider"].get("type"))
    types = document.get("available_node_types") or {}
    head = document.get("head_node_type")
    docker = document.get("docker") or {}
    shared = _environ([*docker.get("run_options", [])], document.get("worker_start_ray_commands", []))
    of_head = _environ(
        [*docker.get("run_options", []), *docker.get("head_run_options", [])],
        document.get("head_start_ray_commands", []),
    )
    commands = document.get("worker_start_ray_commands", [])
    host, hears = (any(f"deployments.{module}" in c for c in commands) for module in (_HOST, _RECLAIM))
    default_idle = document.get("idle_timeout_minutes")
    managed = provider != "external"
    nodes = {
        name: _ray_node(
            name,
            node,
            provider,
            default_idle_s=60 * default_idle if default_idle is not None else 300.0,
            environ={**shared, **_environ((node.get("docker") or {}).get("worker_run_options", []), [])},
            host=host or not managed or not commands,
            hears=hears or not managed or not commands,
        )
        for name, node in types.items()
    }
    token = None
    if managed:
        both = [of_head] if provider == "local" else [of_head, shared]
        token = all(environ.get("RAY_AUTH_MODE") == "token" for environ in both)
    return Cluster(
        provider=provider,
        head=nodes.get(head) if head else None,
        workers=tuple(node for name, node in nodes.items() if name != head),
        max_workers=document.get("max_workers"),
        token=token,
        token_place=("docker", "run_options") if docker else ("head_start_ray_commands",),
        autoscaler_environ=of_head,
    )


def _ray_node(
    name: str,
    node: Mapping[str, Any],
    provider: str,
    *,
    default_idle_s: float,
    environ: Mapping[str, str],
    host: bool,
    hears: bool,
) -> Node:
    config = node.get("node_config") or {}
    place: Place = ("available_node_types", name)
    own = node.get("idle_timeout_s")
    return Node(
        name=name,
        place=place,
        resources={key: float(value) for key, value in (node.get("resources") or {}).items()},
        labels=dict(node.get("labels") or {}),
        min_workers=node.get("min_workers", 0),
        max_workers=node.get("max_workers", 10**9),
        idle_timeout_s=float(own) if own is not None else default_idle_s,
        idle_place=(*place, "idle_timeout_s") if own is not None else ("idle_timeout_minutes",),
        spot=_spot(config, provider),
        machine=_machine(config, provider),
        environ=environ,
        starts_host=host,
        hears_notice=hears,
    )


def _spot(config: Mapping[str, Any], provider: str) -> bool | None:
    if provider == "aws":
        return (config.get("InstanceMarketOptions") or {}).get("MarketType") == "spot"
    if provider == "azure":
        parameters = config.get("azure_arm_parameters") or {}
        return str(parameters.get("priority", "")).lower() in ("spot", "low")
    if provider == "gcp":
        given = config.get("scheduling") or {}
        # Ray's examples write a list of mappings.
        parts = given if isinstance(given, list) else [given]
        return any(p.get("provisioningModel") == "SPOT" or p.get("preemptible") is True for p in parts)
    return None


def _machine(config: Mapping[str, Any], provider: str) -> str | None:
    if provider == "aws":
        return config.get("InstanceType")
    if provider == "azure":
        return (config.get("azure_arm_parameters") or {}).get("vmSize")
    return config.get("machineType") if provider == "gcp" else None


def _environ(run_options: list[Any], commands: list[Any]) -> dict[str, str]:
    """What `--env NAME=VALUE` and `export NAME=VALUE` set."""
    found: dict[str, str] = {}
    for option in run_options:
        for name, value in re.findall(r"(?:--env|-e)[= ](\w+)=(\S*)", str(option)):
            found[name] = value
    for command in commands:
        for name, value in re.findall(r"(?:^|[\s;&])(?:export\s+)?(\w+)=([^\s;&]*)", str(command)):
            found[name] = value
    return found


# --- KubeRay ------------------------------------------------------------------------------------------------


def of_kuberay(document: Mapping[str, Any]) -> Cluster:
    """From a RayService or RayCluster that its schema has passed. `serve` is still text."""
    service = document["kind"] == "RayService"
    spec = document["spec"]["rayClusterConfig"] if service else document["spec"]
    base: Place = ("spec", "rayClusterConfig") if service else ("spec",)
    options = spec.get("autoscalerOptions") or {}
    idle_s = options.get("idleTimeoutSeconds", 60)
    workers = []
    for index, group in enumerate(spec.get("workerGroupSpecs") or []):
        place: Place = (*base, "workerGroupSpecs", index)
        workers.append(_group(group, group["groupName"], place, idle_s, (*base, "autoscalerOptions")))
    auth = spec.get("authOptions") or {}
    head = _group(spec["headGroupSpec"], "head", (*base, "headGroupSpec"), idle_s, base)
    by_hand = [n.environ.get("RAY_AUTH_MODE") == "token" for n in (head, *workers)]
    return Cluster(
        provider="kuberay",
        head=head,
        workers=tuple(workers),
        max_workers=None,
        token=auth.get("mode") == "token" or all(by_hand),
        token_place=(*base, "authOptions", "mode"),
        autoscaler_environ={e["name"]: e.get("value", "") for e in options.get("env", [])},
        serve=document["spec"].get("serveConfigV2") if service else None,
        serve_place=("spec", "serveConfigV2") if service else (),
    )


def _group(group: Mapping[str, Any], name: str, place: Place, idle_s: float, idle: Place) -> Node:
    from ray.autoscaler._private.kuberay.autoscaling_config import _get_ray_resources_from_group_spec

    pod = group["template"]["spec"]
    container = pod["containers"][0]
    labels = dict(group.get("labels") or {})
    market = (pod.get("nodeSelector") or {}).get(MARKET_LABEL)
    own = group.get("idleTimeoutSeconds")
    hooks = container.get("lifecycle") or {}
    start, stop = (
        " ".join(hooks.get(hook, {}).get("exec", {}).get("command", [])) for hook in ("postStart", "preStop")
    )
    hosts = max(1, group.get("numOfHosts", 1))
    return Node(
        name=name,
        place=place,
        # As Ray's autoscaler sees the group.
        resources={
            key: float(value)
            for key, value in _get_ray_resources_from_group_spec(dict(group), name == "head").items()
        },
        labels=labels,
        min_workers=group.get("minReplicas", 0) * hosts,
        max_workers=group.get("maxReplicas", 2**31 - 1) * hosts,
        idle_timeout_s=float(own if own is not None else idle_s),
        idle_place=(*place, "idleTimeoutSeconds") if own is not None else (*idle, "idleTimeoutSeconds"),
        spot=None if market is None else market == "spot",
        environ={e["name"]: e.get("value", "") for e in container.get("env", [])},
        starts_host=f"deployments.{_HOST}" in start,
        hears_notice=f"deployments.{_RECLAIM}" in stop,
    )
