"""What no schema says: does the fleet fit, has spot a fallback, do the times agree, what stays lit, what is open.

Each check yields problems; a note is something to know that does not make the file wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from autoscaling.clusters.catalog import Machines
from autoscaling.clusters.fit import misfit, per_node
from autoscaling.clusters.nodes import ACCELERATOR_LABEL, MARKET_LABEL, NODE_START_S
from autoscaling.clusters.problems import Problem
from autoscaling.clusters.view import Cluster, Node
from deployments.fleet import Fleet, Model

READY_TIMEOUT = "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"


def check_cluster(
    cluster: Cluster, fleet: Fleet | None, machines: Machines | None, *, node_start_s: float = NODE_START_S
) -> Iterator[Problem]:
    """All checks of a cluster; those of the fleet only where there is one."""
    yield from _machines(cluster, machines)
    yield from _spot_has_a_fallback(cluster, fleet)
    yield from _closed(cluster)
    yield from _what_stays_lit(cluster)
    yield from _node_times(cluster, node_start_s)
    if fleet is not None:
        yield from _fleet_fits(cluster, fleet, machines)
        yield from _fleet_times(cluster, fleet, node_start_s)
        yield from _folders(cluster, fleet)


# --- the fleet ----------------------------------------------------------------------------------------------


def _misfit(model: Model, node: Node) -> str | None:
    return misfit(model, node.resources, node.accelerators)


def _fleet_fits(cluster: Cluster, fleet: Fleet, machines: Machines | None) -> Iterator[Problem]:
    nodes = [n for n in cluster.workers if n.max_workers > 0]
    if cluster.provider == "local" or not cluster.workers:
        return
    if cluster.head is not None:
        nodes.append(cluster.head)
    for model in fleet.models:
        fitting = [n for n in nodes if _misfit(model, n) is None]
        if not fitting:
            reasons = "; ".join(f"{n.name} {_misfit(model, n)}" for n in nodes)
            place = cluster.workers[0].place[:-1]
            yield Problem(place, f"the model {model.id} fits on none of them: {reasons}")
            continue
        yield from _enough(cluster, model, fitting)
        missing = [
            kind
            for kind in model.resources.accelerator_types
            if not any(kind in n.accelerators for n in fitting)
            and (machines is None or kind in machines.accelerators)
        ]
        if missing:
            text = f"the model {model.id} may use {', '.join(missing)} as well, and no node here has that"
            yield Problem(cluster.workers[0].place[:-1], text, note=True)


def _enough(cluster: Cluster, model: Model, fitting: Sequence[Node]) -> Iterator[Problem]:
    """Whether there can be as many nodes as the model's replicas take."""
    wanted = max(model.scaling.max_replicas, *(s.replicas for s in model.scaling.schedules), 0)
    most = sum(n.max_workers * per_node(model, n.resources) for n in fitting if n is not cluster.head)
    most += sum(per_node(model, n.resources) for n in fitting if n is cluster.head)
    if most < wanted:
        place = fitting[0].place
        key = "maxReplicas" if cluster.provider == "kuberay" else "max_workers"
        names = ", ".join(n.name for n in fitting)
        text = f"{names} hold {most} replicas of {model.id}, whose max_replicas is {wanted}: raise it"
        yield Problem((*place, key), text)
    largest = max(per_node(model, n.resources) for n in fitting)
    if cluster.max_workers is not None and cluster.max_workers < math.ceil(wanted / largest):
        text = (
            f"{cluster.max_workers} is not at least {math.ceil(wanted / largest)}, which the max_replicas of "
            f"{model.id} ({wanted}) take"
        )
        yield Problem(("max_workers",), text)


def _fleet_times(cluster: Cluster, fleet: Fleet, node_start_s: float) -> Iterator[Problem]:
    dynamic = [n for n in cluster.workers if n.max_workers > n.min_workers]
    # What is pretended starts in seconds, and is to be tried in seconds.
    if cluster.provider == "external" or not dynamic:
        return
    wait_s = fleet.controller.node_wait_s
    if wait_s < node_start_s:
        text = (
            f"fleet: controller.node_wait_s: {wait_s:g} is less than the {node_start_s:g} s that a node takes to start "
            f"(--node-start), so that the next kind of node would be started, and paid for, while the first is on its "
            f"way; say at least {node_start_s:g}"
        )
        yield Problem((), text)
    for index, model in enumerate(fleet.models):
        fitting = [n for n in dynamic if _misfit(model, n) is None]
        if not fitting:
            continue
        keep_s, deadline_s = model.scaling.keep_alive_s, model.limits.request_deadline_s
        for node in fitting:
            if node.idle_timeout_s is not None and node.idle_timeout_s < keep_s:
                text = (
                    f"{node.idle_timeout_s:g} s is shorter than the keep_alive_s of {model.id} ({keep_s:g} s): the "
                    f"node {node.name} would go sooner than a model that idles on it may; set at least {keep_s:g} s"
                )
                yield Problem(node.idle_place, text)
        if deadline_s <= node_start_s and model.scaling.min_replicas == 0:
            text = (
                f"fleet: models[{index}].limits.request_deadline_s: {deadline_s:g} is not greater than the "
                f"{node_start_s:g} s that a node takes to start (--node-start), so that no request for {model.id} "
                "would see the end of a cold start; with the engine's own start, twice that is a beginning"
            )
            yield Problem(fitting[0].place, text)


def _folders(cluster: Cluster, fleet: Fleet) -> Iterator[Problem]:
    if cluster.provider in ("local", "external"):
        return
    for index, model in enumerate(fleet.models):
        if model.source.startswith(("/", "~", "file://")):
            text = f"fleet: models[{index}].source: {model.source!r} must be there on every node that runs {model.id}"
            yield Problem((), text, note=True)


# --- nodes --------------------------------------------------------------------------------------------------


def _machines(cluster: Cluster, machines: Machines | None) -> Iterator[Problem]:
    """Whether what a node says of itself is so."""
    for node in cluster.workers:
        label, kinds = node.labels.get(ACCELERATOR_LABEL), node.accelerators
        if len(kinds) > 1:
            text = (
                f"the label {label!r} and the resource accelerator_type disagree: {', '.join(sorted(kinds))}"
            )
            yield Problem((*node.place, "labels"), text)
        if node.gpus and not kinds:
            text = f"a node with GPUs needs the label {ACCELERATOR_LABEL}, by which models find it"
            yield Problem((*node.place, "labels"), text)
        said = node.labels.get(MARKET_LABEL)
        if node.spot is not None and said is not None and (said == "spot") != node.spot:
            really = "spot" if node.spot else "on-demand"
            yield Problem(
                (*node.place, "labels", MARKET_LABEL), f"{said!r} is not {really!r}, as it is asked for"
            )
    shapes = machines.shapes if machines is not None else {}
    for node in (*cluster.workers, *([cluster.head] if cluster.head else [])):
        shape = shapes.get(node.machine or "")
        if shape is None:
            continue
        place = (*node.place, "resources")
        if node.gpus > shape.gpus:
            yield Problem((*place, "GPU"), f"{node.gpus:g} is more than a {shape.name} has ({shape.gpus})")
        if node.resources.get("CPU", 0) > shape.cpus:
            cpus = node.resources["CPU"]
            yield Problem((*place, "CPU"), f"{cpus:g} is more than a {shape.name} has ({shape.cpus})")
        if shape.accelerator and node.accelerators and shape.accelerator not in node.accelerators:
            kinds_text = ", ".join(sorted(node.accelerators))
            yield Problem(
                (*node.place, "labels"),
                f"{kinds_text} is not the GPU of a {shape.name} ({shape.accelerator})",
            )


def _spot_has_a_fallback(cluster: Cluster, fleet: Fleet | None) -> Iterator[Problem]:
    firm = [n for n in cluster.workers if n.market == "on-demand" and n.max_workers > 0]
    for node in cluster.workers:
        if node.market != "spot" or node.max_workers == 0:
            continue
        if fleet is None:
            if any(_stands_in(node, other) for other in firm):
                continue
            yield Problem(node.place, f"spot without a fallback: no on-demand type has what {node.name} has")
            continue
        stranded = [
            model.id
            for model in fleet.models
            if _misfit(model, node) is None and not any(_misfit(model, other) is None for other in firm)
        ]
        if stranded:
            text = (
                f"spot without a fallback: when {node.name} can't be had, {', '.join(stranded)} "
                f"{'fits' if len(stranded) == 1 else 'fit'} on no on-demand type; add one"
            )
            yield Problem(node.place, text)


def _stands_in(node: Node, other: Node) -> bool:
    return node.accelerators <= other.accelerators and all(
        other.resources.get(name, 0.0) >= amount for name, amount in node.resources.items()
    )


def _what_stays_lit(cluster: Cluster) -> Iterator[Problem]:
    if cluster.head is not None and cluster.head.gpus and cluster.provider not in ("local", "external"):
        text = "the head is always on, so that its GPU is paid for while every model is dark; give it none"
        yield Problem((*cluster.head.place, "resources"), text, note=True)
    for node in cluster.workers:
        if node.min_workers:
            text = f"{node.min_workers} of {node.name} are paid for while every model is dark; 0 is"
            yield Problem((*node.place,), f"{text} what scales to zero", note=True)
        if not node.starts_host and node.gpus:
            text = (
                "the engine host starts with the first replica, not with the node: add "
                "`python -m deployments.node_start` after `ray start`"
            )
            yield Problem(node.place, text, note=True)
        if not node.hears_notice and node.market == "spot":
            how = (
                "a preStop hook with `python -m deployments.node_reclaim --in-s SECONDS`"
                if cluster.provider == "kuberay"
                else f"`python -m deployments.node_reclaim --provider {cluster.provider}` after `ray start`"
            )
            text = (
                f"Ray is not told when the cloud takes this spot machine back, and drains nothing: add {how}"
            )
            yield Problem(node.place, text, note=True)


def _node_times(cluster: Cluster, node_start_s: float) -> Iterator[Problem]:
    given = cluster.autoscaler_environ.get(READY_TIMEOUT)
    if given is not None and given.isdigit() and int(given) <= node_start_s:
        text = (
            f"{READY_TIMEOUT}={given} gives nodes up before they can be there: they take {node_start_s:g} s"
        )
        yield Problem((), text)


def _closed(cluster: Cluster) -> Iterator[Problem]:
    if cluster.token is False:
        text = (
            "whoever reaches Ray's ports can run anything on the cluster: set RAY_AUTH_MODE=token for the head and "
            "for the workers"
            if cluster.provider != "kuberay"
            else "whoever reaches Ray's ports can run anything on the cluster: set it to token"
        )
        yield Problem(cluster.token_place, text)
