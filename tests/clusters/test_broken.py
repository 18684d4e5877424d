"""Broken variants of the files: each is refused, and the message says where, what, and what would be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from deployments.errors import ConfigError
from deployments.fleet import Fleet, parse_fleet
from tests.clusters.conftest import CONFIGS, errors_of, parsed, problems_of

Broken = Callable[[dict[str, Any]], object]
TYPES = "available_node_types"


def _types(d: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = d[TYPES]
    return found


def _spec(d: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = d["spec"]["rayClusterConfig"]
    return found


def _group(d: dict[str, Any], name: str) -> dict[str, Any]:
    return next(g for g in _spec(d)["workerGroupSpecs"] if g["groupName"] == name)


def _swap_key(mapping: dict[str, Any], old: str, new: str) -> None:
    mapping[new] = mapping.pop(old)


def _drop(mapping: dict[str, Any], *names: str) -> None:
    for name in names:
        del mapping[name]


def _run_options(d: dict[str, Any], old: str, new: str) -> None:
    d["docker"]["run_options"] = [o.replace(old, new) for o in d["docker"]["run_options"]]


AWS: list[tuple[str, Broken, str]] = [
    (
        "a typo at the top",
        lambda d: _swap_key(d, "max_workers", "max_worker"),
        "f: max_worker: unknown key; did you mean 'max_workers'?",
    ),
    (
        "a typo in a node type",
        lambda d: _swap_key(_types(d)["l4-spot"], "idle_timeout_s", "idle_timout_s"),
        f"f: {TYPES}.l4-spot.idle_timout_s: unknown key; did you mean 'idle_timeout_s'?",
    ),
    (
        "a typo in what EC2 gets",
        lambda d: _swap_key(_types(d)["l4-spot"]["node_config"], "InstanceType", "InstanceTyp"),
        f"f: {TYPES}.l4-spot.node_config.InstanceTyp: unknown key; did you mean 'InstanceType'?",
    ),
    (
        "a typo deep in what EC2 gets",
        lambda d: _types(d)["l4-spot"]["node_config"]["BlockDeviceMappings"][0]["Ebs"].update(VolumeSiz=3),
        f"f: {TYPES}.l4-spot.node_config.BlockDeviceMappings[0].Ebs.VolumeSiz: unknown key; did you mean "
        "'VolumeSize'?",
    ),
    (
        "a type of EC2's that is another",
        lambda d: _types(d)["l4-spot"]["node_config"].update(ImageId=7),
        f"f: {TYPES}.l4-spot.node_config.ImageId: 7 is not of type str",
    ),
    (
        "a wrong type",
        lambda d: d.update(max_workers="7"),
        "f: max_workers: '7' is not of type integer",
    ),
    (
        "a head that is not there",
        lambda d: d.update(head_node_type="hed"),
        "f: Ray refuses it: `head_node_type` must be one of `available_node_types`.",
    ),
    (
        "no image",
        lambda d: _drop(d["docker"], "head_image"),
        "f: Ray refuses it: Must provide a container & image name",
    ),
    (
        "a model that fits nowhere",
        lambda d: [
            t["resources"].update(GPU=0) for n, t in _types(d).items() if n.startswith(("h100", "a100"))
        ],
        f"f: {TYPES}: the model qwen3-14b fits on none of them: ",
    ),
    (
        "spot alone",
        lambda d: _drop(_types(d), "l4-ondemand", "a10g-ondemand"),
        f"f: {TYPES}.l4-spot: spot without a fallback: when l4-spot can't be had, qwen3-8b fits on no on-demand "
        "type; add one",
    ),
    (
        "nodes that leave before models do",
        lambda d: _types(d)["h100-spot"].update(idle_timeout_s=60),
        f"f: {TYPES}.h100-spot.idle_timeout_s: 60 s is shorter than the keep_alive_s of qwen3-14b (300 s): the node "
        "h100-spot would go sooner than a model that idles on it may; set at least 300 s",
    ),
    (
        "the same, said once for all",
        lambda d: (_types(d)["h100-spot"].pop("idle_timeout_s"), d.update(idle_timeout_minutes=1)),
        "f: idle_timeout_minutes: 60 s is shorter than the keep_alive_s of qwen3-14b (300 s)",
    ),
    (
        "too few nodes in all",
        lambda d: d.update(max_workers=1),
        "f: max_workers: 1 is not at least 4, which the max_replicas of qwen3-8b (4) take",
    ),
    (
        "too few of a type",
        lambda d: (
            [t.update(max_workers=1) for n, t in _types(d).items() if n.startswith(("l4", "a10g-s"))]
            + [_types(d).pop("a10g-ondemand"), _types(d)["a10g-spot"].update(max_workers=1)]
        ),
        f"f: {TYPES}.l4-spot.max_workers: l4-spot, l4-ondemand, a10g-spot hold 3 replicas of qwen3-8b, whose "
        "max_replicas is 4: raise it",
    ),
    (
        "GPUs that a machine does not have",
        lambda d: _types(d)["l4-spot"]["resources"].update(GPU=4),
        f"f: {TYPES}.l4-spot.resources.GPU: 4 is more than a g6.xlarge has (1)",
    ),
    (
        "CPUs that a machine does not have",
        lambda d: _types(d)["l4-spot"]["resources"].update(CPU=64),
        f"f: {TYPES}.l4-spot.resources.CPU: 64 is more than a g6.xlarge has (4)",
    ),
    (
        "another machine than the label says",
        lambda d: _types(d)["l4-spot"]["node_config"].update(InstanceType="g5.xlarge"),
        f"f: {TYPES}.l4-spot.labels: L4 is not the GPU of a g5.xlarge (A10G)",
    ),
    (
        "a label that another says otherwise",
        lambda d: _types(d)["l4-spot"]["labels"].update({"ray.io/accelerator-type": "T4"}),
        f"f: {TYPES}.l4-spot.labels: the label 'T4' and the resource accelerator_type disagree: L4, T4",
    ),
    (
        "a spot machine that calls itself firm",
        lambda d: _types(d)["l4-spot"]["labels"].update({"ray.io/market-type": "on-demand"}),
        f"f: {TYPES}.l4-spot.labels[{'ray.io/market-type'!r}]: 'on-demand' is not 'spot', as it is asked for",
    ),
    (
        "GPUs without a label",
        lambda d: (
            _types(d)["l4-spot"].pop("labels"),
            _types(d)["l4-spot"]["resources"].pop("accelerator_type:L4"),
        ),
        f"f: {TYPES}.l4-spot.labels: a node with GPUs needs the label ray.io/accelerator-type",
    ),
    (
        "no token",
        lambda d: _run_options(d, "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
        "f: docker.run_options: whoever reaches Ray's ports can run anything on the cluster: set RAY_AUTH_MODE=token",
    ),
    (
        "no security group",
        lambda d: d["provider"].pop("security_group"),
        "f: provider.security_group.GroupName: head, cpu-spot",
    ),
    (
        "an open security group",
        lambda d: d["provider"]["security_group"].update(
            IpPermissions=[
                {
                    "FromPort": 8000,
                    "ToPort": 8000,
                    "IpProtocol": "tcp",
                    "IpRanges": [{"CidrIp": "0.0.0.0/0"}],
                }
            ]
        ),
        "f: provider.security_group.IpPermissions[0]: 0.0.0.0/0 is the whole internet; say who may come",
    ),
    (
        "a file that stays in the container as it was",
        lambda d: d["file_mounts"].update({"/home/ray/serve": "./serve/serve.yaml"}),
        "f: file_mounts['/home/ray/serve']: './serve/serve.yaml' is a file, and of that Docker shows a container",
    ),
    (
        "nodes given up before they can be there",
        lambda d: d["docker"].update(
            head_run_options=[
                o.replace("ALLOCATE_STATUS_TIMEOUT_S=600", "ALLOCATE_STATUS_TIMEOUT_S=120")
                for o in d["docker"]["head_run_options"]
            ]
        ),
        "f: RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S=120 gives nodes up before they can be there: they "
        "take 300 s",
    ),
]


@pytest.mark.parametrize(("broken", "message"), [c[1:] for c in AWS], ids=[c[0] for c in AWS])
def test_aws(broken: Broken, message: str) -> None:
    document = parsed("aws.yaml")
    broken(document)
    errors = errors_of(document)
    assert any(e.startswith(message) for e in errors), errors


KUBE: list[tuple[str, Broken, str]] = [
    (
        "a typo that Kubernetes would drop",
        lambda d: _swap_key(_group(d, "l4-spot"), "minReplicas", "minReplica"),
        "f: spec.rayClusterConfig.workerGroupSpecs[2].minReplica: unknown key; did you mean 'minReplicas'?",
    ),
    (
        "a typo in a pod",
        lambda d: _swap_key(
            _group(d, "l4-spot")["template"]["spec"]["containers"][0], "lifecycle", "lifecicle"
        ),
        "f: spec.rayClusterConfig.workerGroupSpecs[2].template.spec.containers[0].lifecicle: unknown key; did you "
        "mean 'lifecycle'?",
    ),
    (
        "a backend that is none",
        lambda d: _spec(d)["gcsFaultToleranceOptions"].update(backend="etcd"),
        "f: spec.rayClusterConfig.gcsFaultToleranceOptions.backend: 'etcd' is not one of 'redis', 'rocksdb'",
    ),
    (
        "the old autoscaler",
        lambda d: _spec(d)["autoscalerOptions"].update(version="v1"),
        "f: spec.rayClusterConfig.autoscalerOptions.version: 'v1' is not 'v2'",
    ),
    (
        "no autoscaler",
        lambda d: _spec(d).pop("enableInTreeAutoscaling"),
        "f: spec.rayClusterConfig.enableInTreeAutoscaling: must be true",
    ),
    (
        "another Ray",
        lambda d: _spec(d).update(rayVersion="2.46.0"),
        "f: spec.rayClusterConfig.rayVersion: '2.46.0' is not '2.60.0', which the images have",
    ),
    (
        "labels that are ignored",
        lambda d: _group(d, "l4-spot").update(rayStartParams={"labels": "a=b"}),
        "f: spec.rayClusterConfig.workerGroupSpecs[2].rayStartParams.labels: Ray's autoscaler ignores labels here",
    ),
    (
        "no token",
        lambda d: _spec(d)["authOptions"].update(mode="disabled"),
        "f: spec.rayClusterConfig.authOptions.mode: whoever reaches Ray's ports can run anything on the cluster",
    ),
    (
        "groups that leave before models do",
        lambda d: _group(d, "h100-ondemand").update(idleTimeoutSeconds=60),
        "f: spec.rayClusterConfig.workerGroupSpecs[11].idleTimeoutSeconds: 60 s is shorter than the keep_alive_s",
    ),
    (
        "a port that KubeRay drops",
        lambda d: d["spec"]["serveService"]["spec"]["ports"][0].update(name="http"),
        "f: spec.serveService.spec.ports[0].name: 'http' is none of serve, serve-gateway: KubeRay drops a port",
    ),
    (
        "a selector that KubeRay replaces",
        lambda d: d["spec"]["serveService"]["spec"].update(selector={"ray.io/node-type": "head"}),
        "f: spec.serveService.spec.selector: KubeRay puts its own in its place",
    ),
    (
        "spot alone",
        lambda d: _spec(d).update(
            workerGroupSpecs=[g for g in _spec(d)["workerGroupSpecs"] if "ondemand" not in g["groupName"]]
        ),
        "f: spec.rayClusterConfig.workerGroupSpecs[0]: spot without a fallback: when cpu-spot can't be had, "
        "bge-small fits on no on-demand type; add one",
    ),
    (
        "no CPUs said",
        lambda d: (
            _group(d, "l4-spot").pop("resources"),
            _group(d, "l4-spot")["template"]["spec"]["containers"][0].pop("resources"),
        ),
        "f: spec.rayClusterConfig: Ray's autoscaler refuses it: Autoscaler failed to detect `CPU` resources for group "
        "l4-spot.",
    ),
]


@pytest.mark.parametrize(("broken", "message"), [c[1:] for c in KUBE], ids=[c[0] for c in KUBE])
def test_kuberay(broken: Broken, message: str) -> None:
    document = parsed("kuberay/rayservice.yaml")
    broken(document)
    errors = errors_of(document)
    assert any(e.startswith(message) for e in errors), errors


def _deployment(d: dict[str, Any], index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = d["applications"][0]["deployments"][index]
    return found


SERVE: list[tuple[str, Broken, str]] = [
    (
        "a typo that Serve ignores",
        lambda d: _deployment(d).update(max_ongoing_request=3),
        "applications[0].deployments[0].max_ongoing_request: unknown key; did you mean 'max_ongoing_requests'?",
    ),
    (
        "a typo in autoscaling_config, which Serve ignores too",
        lambda d: _deployment(d).update(autoscaling_config={"min_replica": 1}),
        "applications[0].deployments[0].autoscaling_config.min_replica: unknown key; did you mean 'min_replicas'?",
    ),
    (
        "a value that is none of Serve's",
        lambda d: d.update(proxy_location="HeadOnlyy"),
        "proxy_location: 'HeadOnlyy': ",
    ),
    (
        "a deployment that is not there",
        lambda d: _deployment(d).update(name="gatewy"),
        "applications[0].deployments[0].name: 'gatewy' is none of this application's: controller, gateway, ",
    ),
    (
        "an argument that is none",
        lambda d: d["applications"][0]["args"].update(flet="x"),
        "applications[0].args.flet: unknown key; did you mean 'fleet'?",
    ),
    (
        "a fleet that is wrong",
        lambda d: d["applications"][0]["args"]["fleet"]["models"][0].update(sorce="x"),
        "applications[0].args.fleet: models[0].sorce: unknown key; did you mean 'source'?",
    ),
]


@pytest.mark.parametrize(("broken", "message"), [c[1:] for c in SERVE], ids=[c[0] for c in SERVE])
@pytest.mark.parametrize("inside", [False, True], ids=["serve.yaml", "RayService"])
def test_serve(broken: Broken, message: str, inside: bool) -> None:
    service = parsed("kuberay/rayservice.yaml")
    document = yaml.safe_load(service["spec"]["serveConfigV2"]) if inside else parsed("serve/serve.yaml")
    broken(document)
    if inside:
        service["spec"]["serveConfigV2"] = yaml.safe_dump(document)
        errors = errors_of(service)
        message = f"f: spec.serveConfigV2: {message}"
    else:
        errors = errors_of(document)
        message = f"f: {message}"
    assert any(e.startswith(message) for e in errors), errors


def test_proxies_that_hold_gpu_nodes() -> None:
    """An error where nodes come and go, a note where only Serve's file is known."""
    message = "proxy_location: 'EveryNode' puts a proxy on every node, which holds each GPU node half a minute longer"
    document = parsed("serve/serve.yaml")
    del document["proxy_location"]
    notes = [p.line("f") for p in problems_of(document) if p.note]
    assert errors_of(document) == [] and any(n.startswith(f"f: {message}") for n in notes), notes
    service = parsed("kuberay/rayservice.yaml")
    service["spec"]["serveConfigV2"] = yaml.safe_dump(document)
    assert any(e.startswith(f"f: spec.serveConfigV2: {message}") for e in errors_of(service))


def test_what_may_land_on_a_worker_is_noted() -> None:
    document = parsed("serve/serve.yaml")
    del _deployment(document)["ray_actor_options"]
    del document["applications"][0]["deployments"][1]
    notes = [p.line("f") for p in problems_of(document) if p.note]
    assert errors_of(document) == []
    for place, name in (("deployments[0]", "gateway"), ("deployments", "controller")):
        assert any(
            n.startswith(f"f: applications[0].{place}: {name} may land on a worker node") for n in notes
        )


def _changed(fleet: Fleet, index: int, **changes: dict[str, Any]) -> Fleet:
    document = fleet.model_dump(mode="json")
    for section, values in changes.items():
        document["models"][index][section].update(values)
    return parse_fleet(document)


def test_a_deadline_that_no_node_meets(fleet: Fleet) -> None:
    hasty = _changed(fleet, 0, limits={"request_deadline_s": 120.0})
    errors = errors_of(parsed("aws.yaml"), fleet=hasty)
    assert len(errors) == 1
    assert (
        "fleet: models[0].limits.request_deadline_s: 120 is not greater than the 300 s that a node"
        in errors[0]
    )
    # Where nodes are measured to be quicker, it is right; and where the model is never dark.
    assert errors_of(parsed("aws.yaml"), fleet=hasty, node_start_s=90) == []
    lit = _changed(hasty, 0, scaling={"min_replicas": 1})
    assert errors_of(parsed("aws.yaml"), fleet=lit) == []


def test_a_next_node_that_is_asked_for_before_the_first_can_come(fleet: Fleet) -> None:
    document = fleet.model_dump(mode="json")
    document["controller"]["node_wait_s"] = 120
    hasty = parse_fleet(document)
    errors = errors_of(parsed("aws.yaml"), fleet=hasty)
    assert len(errors) == 1
    assert "fleet: controller.node_wait_s: 120 is less than the 300 s that a node takes to start" in errors[0]
    assert errors_of(parsed("aws.yaml"), fleet=hasty, node_start_s=120) == []
    # Pretended nodes start in seconds.
    assert errors_of(parsed("fake-gpu.yaml"), fleet=hasty) == []


def test_a_pretended_head_of_another_name(fleet: Fleet) -> None:
    fake = parsed("fake-gpu.yaml")
    fake["head_node_type"] = "head"
    _swap_key(_types(fake), "ray.head.default", "head")
    assert errors_of(fake, fleet=fleet)[0].startswith("f: head_node_type: must be 'ray.head.default': Ray's")


def test_a_fleet_that_fits_nowhere(fleet: Fleet) -> None:
    large = _changed(fleet, 0, resources={"gpus": 8, "accelerator_types": ["L4"]})
    errors = errors_of(parsed("aws.yaml"), fleet=large)
    assert any(
        e.startswith(f"f: {TYPES}: the model qwen3-8b fits on none of them: ")
        and "l4-spot has 1 GPU, not 8" in e
        for e in errors
    )


def test_other_providers(fleet: Fleet) -> None:
    azure = parsed("azure.yaml")
    azure["provider"]["use_internal_ips"] = False
    assert any(
        e.startswith("f: provider.use_internal_ips: Ray's security group lets") for e in errors_of(azure)
    )
    azure = parsed("azure.yaml")
    _swap_key(_types(azure)["h100-spot"]["node_config"]["azure_arm_parameters"], "vmSize", "vmsize")
    assert errors_of(azure)[0].endswith("azure_arm_parameters.vmsize: unknown key; did you mean 'vmSize'?")
    gcp = parsed("gcp.yaml")
    gcp["provider"]["project_id"] = None
    assert any(e.startswith("f: provider.project_id: is missing") for e in errors_of(gcp))
    gcp = parsed("gcp.yaml")
    _types(gcp)["l4-spot"]["node_config"]["scheduling"] = [{"preemptible": False}]
    assert any("'spot' is not 'on-demand', as it is asked for" in e for e in errors_of(gcp))


def test_the_foundation_stays_closed() -> None:
    document = parsed("aws-foundation.yaml")
    document["Resources"]["Group"]["Properties"]["SecurityGroupIngress"][0]["CidrIp"] = "0.0.0.0/0"
    assert errors_of(document) == ["f: Resources.Group: 0.0.0.0/0 is the whole internet; say who may come"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f: is empty"),
        ("a: 1\nb: [", "f: line "),
        (f"provider: {'9' * 5000}", "f: a value can't be read: "),
        ("provider: 2024-13-45", "f: a value can't be read: month must be in 1..12"),
        (
            "provider: {type: aws}\nprovider: {}",
            "f: line 2, column 1: the key 'provider' stands twice in one mapping",
        ),
        ("kind: ConfigMap", "f: is no cluster file: it has neither `provider:` (ray up)"),
        ("- 1", "f: is no cluster file"),
    ],
)
def test_what_is_no_cluster_file(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        problems_of(text)
    assert raised.value.message.startswith(message)


def test_notes_do_not_refuse(fleet: Fleet) -> None:
    document = parsed("aws.yaml")
    _types(document)["l4-ondemand"]["min_workers"] = 1
    document["worker_start_ray_commands"] = document["worker_start_ray_commands"][:-2]
    notes = [p.line("f") for p in problems_of(document, fleet=fleet) if p.note]
    assert errors_of(document, fleet=fleet) == []
    assert any("1 of l4-ondemand are paid for while every model is dark" in n for n in notes)
    assert any("python -m deployments.node_start" in n for n in notes)
    told = [n for n in notes if "python -m deployments.node_reclaim --provider aws" in n]
    assert told and all("-spot: Ray is not told when the cloud takes this spot" in n for n in told)
    assert any("OWNER stands for the registry of your images" in n for n in notes)


def test_a_pod_that_ends_without_draining(fleet: Fleet) -> None:
    document = parsed("kuberay/raycluster.yaml")
    notes = lambda: [p.line("f") for p in problems_of(document, fleet=fleet) if p.note]  # noqa: E731
    assert not any("node_reclaim" in n for n in notes())
    for group in document["spec"]["workerGroupSpecs"]:
        del group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]
    assert any("add a preStop hook with `python -m deployments.node_reclaim --in-s" in n for n in notes())


def test_files_say_what_is_left_to_fill_in() -> None:
    assert "ghcr.io/OWNER/relight" in (CONFIGS / "aws.yaml").read_text()
