"""What each kind of file can get wrong by itself and no schema says: what it opens, what holds nodes, what is unfilled.

Each check yields problems; a note is something to know that does not make the file wrong.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from autoscaling.clusters.problems import Place, Problem
from autoscaling.clusters.render import OWNER, PROJECT, RAY_VERSION
from deployments.config_text import show
from deployments.fleet import deployment_name

ON_HEAD = "node:__internal_head__"
"""The resource that Ray gives to the head alone."""
PRETENDED_HEAD = "ray.head.default"
EVERYBODY = ("0.0.0.0/0", "::/0")
_ABSENT: tuple[int | None, Mapping[str, Any]] = (None, {})

# --- a provider's own ---------------------------------------------------------------------------------------


def check_ray(document: Mapping[str, Any]) -> Iterator[Problem]:
    """What only a file for `ray up` can get wrong."""
    provider = document["provider"]
    if provider.get("type") == "aws":
        yield from _security_groups(document)
    if provider.get("type") == "azure" and not provider.get("use_internal_ips"):
        text = "Ray's security group lets everybody reach port 22: set it to true, so that no machine has an address"
        yield Problem(("provider", "use_internal_ips"), text)
    if provider.get("type") == "gcp" and not provider.get("project_id"):
        yield Problem(("provider", "project_id"), "is missing: Ray asks Google for no other")

    module = str(provider.get("module", ""))
    if module.endswith(".FakeMultiNodeProvider") and document.get("head_node_type") != PRETENDED_HEAD:
        text = (
            f"must be {PRETENDED_HEAD!r}: Ray's pretended provider says that of the head whatever stands here, and by "
            "another name the autoscaler starts nothing"
        )
        yield Problem(("head_node_type",), text)


def check_mounts(document: Mapping[str, Any], files: Collection[str]) -> Iterator[Problem]:
    """What does not follow a change, of what a file for `ray up` sends into containers. `files` are those beside it."""
    if not (document.get("docker") or {}).get("container_name"):
        return
    for remote, local in (document.get("file_mounts") or {}).items():
        if str(local) in files:
            text = (
                f"{show(local)} is a file, and of that Docker shows a container for ever what it was when that "
                "began, so that no later `ray up` brings another; send the folder that it is in"
            )
            yield Problem(("file_mounts", str(remote)), text)


def check_cloudformation(document: Mapping[str, Any]) -> Iterator[Problem]:
    """A template's security groups. The rest of it is CloudFormation's own to check."""
    for name, resource in (document.get("Resources") or {}).items():
        properties = resource.get("Properties") or {}
        rules = properties.get("SecurityGroupIngress") or []
        if resource.get("Type") == "AWS::EC2::SecurityGroupIngress":
            rules = [properties]
        for rule in rules:
            for wide in (rule.get("CidrIp"), rule.get("CidrIpv6")):
                if wide in EVERYBODY:
                    yield Problem(("Resources", name), f"{wide} is the whole internet; say who may come")


def _security_groups(document: Mapping[str, Any]) -> Iterator[Problem]:
    group = document["provider"].get("security_group") or {}
    types = document.get("available_node_types") or {}
    without = [n for n, t in types.items() if not (t.get("node_config") or {}).get("SecurityGroupIds")]
    if without and not group.get("GroupName"):
        text = (
            f"{', '.join(without)} {'has' if len(without) == 1 else 'have'} no SecurityGroupIds, and Ray would make a "
            "group whose port 22 the whole internet reaches; name one that is closed (aws-foundation.yaml makes it)"
        )
        yield Problem(("provider", "security_group", "GroupName"), text)
    elif without:
        text = "Ray uses the group of this name if it is there and has rules, else makes an open one: make it first"
        yield Problem(("provider", "security_group", "GroupName"), text, note=True)
    for index, rule in enumerate(group.get("IpPermissions") or []):
        for wide in [r.get("CidrIp") for r in rule.get("IpRanges", [])] + [
            r.get("CidrIpv6") for r in rule.get("Ipv6Ranges", [])
        ]:
            if wide in EVERYBODY:
                place = ("provider", "security_group", "IpPermissions", index)
                yield Problem(place, f"{wide} is the whole internet; say who may come")


def check_kuberay(document: Mapping[str, Any]) -> Iterator[Problem]:
    """What only a RayService or RayCluster can get wrong."""
    service = document["kind"] == "RayService"
    base: Place = ("spec", "rayClusterConfig") if service else ("spec",)
    spec = document["spec"]["rayClusterConfig"] if service else document["spec"]
    groups = spec.get("workerGroupSpecs") or []
    if any(g.get("maxReplicas", 1) > g.get("minReplicas", 0) for g in groups):
        if spec.get("enableInTreeAutoscaling") is not True:
            text = "must be true: without Ray's autoscaler no group ever leaves its minimum"
            yield Problem((*base, "enableInTreeAutoscaling"), text)
        if (version := (spec.get("autoscalerOptions") or {}).get("version")) != "v2":
            text = f"{show(version)} is not 'v2': v1 knows no labels, priorities and idle time-outs of groups"
            yield Problem((*base, "autoscalerOptions", "version"), text)
    if spec.get("rayVersion") != RAY_VERSION:
        yield Problem(
            (*base, "rayVersion"),
            f"{show(spec.get('rayVersion'))} is not {RAY_VERSION!r}, which the images have",
        )
    if not spec.get("gcsFaultToleranceOptions"):
        text = "is missing: when the head's pod goes, so does the cluster"
        yield Problem((*base, "gcsFaultToleranceOptions"), text, note=True)
    if service:
        yield from _serve_service(document["spec"].get("serveService"), spec)
    for index, group in enumerate(groups):
        if (group.get("rayStartParams") or {}).get("labels"):
            text = "Ray's autoscaler ignores labels here; put them under the group's `labels`"
            yield Problem((*base, "workerGroupSpecs", index, "rayStartParams", "labels"), text)


def _serve_service(given: Mapping[str, Any] | None, cluster: Mapping[str, Any]) -> Iterator[Problem]:
    """What KubeRay does not take over of the service by which clients come."""
    wanted: Mapping[str, Any] = (given or {}).get("spec") or {}
    place: Place = ("spec", "serveService", "spec")
    if wanted.get("selector"):
        yield Problem((*place, "selector"), "KubeRay puts its own in its place; leave it out")
    containers = cluster["headGroupSpec"]["template"]["spec"].get("containers") or [{}]
    names = [str(port.get("name")) for port in containers[0].get("ports") or []]
    served = [name for name in names if name == "serve" or name.startswith("serve-")]
    for index, port in enumerate(wanted.get("ports") or []):
        if served and port.get("name") not in served:
            text = (
                f"{show(port.get('name'))} is none of {', '.join(served)}: KubeRay drops a port whose name, `serve` or "
                "`serve-...`, no port of the head's container has"
            )
            yield Problem((*place, "ports", index, "name"), text)


# --- Serve --------------------------------------------------------------------------------------------------


def check_serve(document: Mapping[str, Any], *, cluster: bool, place: Place = ()) -> Iterator[Problem]:
    """What holds nodes, and what is named that is not there. `cluster` says that nodes come and go."""
    location = document.get("proxy_location", "EveryNode")
    if location == "EveryNode":
        text = f"{show(location)} puts a proxy on every node, which holds each GPU node half a minute longer; HeadOnly"
        yield Problem((*place, "proxy_location"), text, note=not cluster)
    for index, application in enumerate(document.get("applications", [])):
        here: Place = (*place, "applications", index)
        if application.get("runtime_env"):
            text = "a replica with a runtime_env starts from nothing instead of in an idle worker: put it in the image"
            yield Problem((*here, "runtime_env"), text, note=True)
        if application.get("import_path") == "deployments.app:build":
            yield from _relight(application, here)


def _relight(application: Mapping[str, Any], here: Place) -> Iterator[Problem]:
    given = {d.get("name"): (i, d) for i, d in enumerate(application.get("deployments") or [])}
    known = {"gateway", "controller"}
    if isinstance(fleet := (application.get("args") or {}).get("fleet"), Mapping):
        ids = [str(m.get("id")) for m in fleet.get("models", []) if isinstance(m, Mapping)]
        names = {*known, *map(deployment_name, ids)}
        for name, (index, _) in given.items():
            if name not in names:
                text = f"{show(name)} is none of this application's: {', '.join(sorted(names))}"
                yield Problem((*here, "deployments", index, "name"), text)
    for name in sorted(known):
        at_index, deployment = given.get(name, _ABSENT)
        options = deployment.get("ray_actor_options") or {}
        if ON_HEAD in (options.get("resources") or {}) or options.get("label_selector"):
            continue
        at: Place = (*here, "deployments", *(() if at_index is None else (at_index,)))
        text = (
            f"{name} may land on a worker node, which is then never idle; ray_actor_options: "
            f'{{num_cpus: 0, resources: {{"{ON_HEAD}": 0.001}}}} keep it on the head'
        )
        yield Problem(at, text, note=True)


# --- what is left to fill in --------------------------------------------------------------------------------


def placeholders(value: Any, place: Place = ()) -> Iterator[Problem]:
    """Where a rendered file waits for a name of yours. Each once."""
    seen: set[str] = set()
    for at, text in _strings(value, place):
        for word, what in (
            (OWNER, "the registry of your images (render --image)"),
            (PROJECT, "your project (render --project)"),
        ):
            if re.search(rf"\b{word}\b", text) and word not in seen:
                seen.add(word)
                yield Problem(at, f"{show(text)}: {word} stands for {what}, here and below", note=True)


def _strings(value: Any, place: Place) -> Iterator[tuple[Place, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield from _strings(below, (*place, str(key)))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _strings(below, (*place, index))
