"""Writes cluster files from a choice of nodes: Jinja2 templates (`templates/`), whose comments say why."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from autoscaling.clusters.nodes import NODE_START_S, Choice, NodeType
from deployments.fleet import Fleet
from deployments.ray_env import RAY_ENV

CACHE = "/mnt/relight"
HOME = "/home/ray"
OWNER = "OWNER"
"""Stands for the registry of whoever builds the images; `relight cluster validate` says that it is to be filled in."""
PROJECT = "PROJECT"
RAY_VERSION = "2.60.0"
FAKE_HEAD_ID = "f" * 51 + "00000"
"""The id by which Ray's pretended provider knows the head."""
UPDATE_S = 1
"""How often Ray's autoscaler looks. Its default is 5 s, which a cold start would wait for."""
REQUEST_TIMEOUT_S = 60
"""How long a provider may take to say whether a node can be had."""

_TEMPLATES = {
    "aws": {"aws.yaml": "aws.yaml.j2"},
    "gcp": {"gcp.yaml": "gcp.yaml.j2"},
    "azure": {"azure.yaml": "azure.yaml.j2"},
    "local": {"local.yaml": "local.yaml.j2"},
    "fake": {"fake-gpu.yaml": "fake-gpu.yaml.j2"},
    "kuberay": {
        "kuberay/rayservice.yaml": "rayservice.yaml.j2",
        "kuberay/raycluster.yaml": "raycluster.yaml.j2",
    },
}
_MOUNT = (
    'd={cache}; sudo mkdir -p "$d"; if ! mountpoint -q "$d"; then '
    'if [ -d /opt/dlami/nvme ]; then sudo mount --bind /opt/dlami/nvme "$d"; else '
    "disk=$(lsblk -dnpo NAME,MODEL | awk '/Instance Storage|nvme_card|NVMe Direct Disk/ {{print $1; exit}}'); "
    '[ -z "$disk" ] || {{ sudo mkfs.ext4 -qF "$disk" && sudo mount "$disk" "$d"; }}; fi; fi; '
    'sudo mkdir -p "$d" "$HOME/relight-data" && sudo chown 1000:1000 "$d" "$HOME/relight-data"'
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is said on the command line."""

    command: str
    """How this file is made again; it goes into its first comment."""
    fleet_file: str = "fleet.yaml"
    name: str = "relight"
    region: str | None = None
    """None takes the catalogue's."""
    image: str = f"ghcr.io/{OWNER}/relight"
    """The images' repository; their tags are `cpu` and `cuda`."""
    project: str = PROJECT
    """Google's project."""
    security_group: str | None = None
    gcs: str = "127.0.0.1:6379"
    redis: str = "redis:6379"
    node_start_s: float = NODE_START_S


def render(fleet: Fleet, choice: Choice, wanted: Wanted) -> dict[str, str]:
    """File name -> text, for the choice's provider. `serve/serve.yaml` is among them except on Kubernetes."""
    env = Environment(
        loader=PackageLoader("autoscaling.clusters"),
        undefined=StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=True,
        autoescape=False,
    )
    env.filters |= {"y": _yaml, "g": lambda v: f"{v:g}", "usd": lambda v: f"{v:.2f}"}
    env.policies["json.dumps_kwargs"] = {}
    options = _options(fleet, choice, wanted)
    context: dict[str, Any] = {"o": options, "c": choice}
    if choice.provider == "kuberay":
        context["c"] = _for_kubernetes(choice)
        context["serve"] = env.get_template("serve.yaml.j2").render(**context, standalone=False).rstrip("\n")
    files = {
        name: env.get_template(template).render(**context)
        for name, template in _TEMPLATES[choice.provider].items()
    }
    if choice.provider != "kuberay":
        files["serve/serve.yaml"] = env.get_template("serve.yaml.j2").render(**context, standalone=True)
    return {name: text.strip() + "\n" for name, text in files.items()}


def _yaml(value: Any) -> str:
    """A value as YAML in one line. JSON is YAML."""
    return json.dumps(value, ensure_ascii=False)


def _options(fleet: Fleet, choice: Choice, wanted: Wanted) -> Mapping[str, Any]:
    ray = [(name, s.value, s.reason) for name, s in RAY_ENV.items()]
    token = ("RAY_AUTH_MODE", "token", "Nothing talks to Ray without the token.")
    caches = [
        ("RELIGHT_CACHE", f"{CACHE}/models", "Weights, on the node's fastest disk."),
        ("VLLM_CACHE_ROOT", f"{CACHE}/vllm", "What vLLM compiled: the next start of the model finds it."),
        ("TRITON_CACHE_DIR", f"{CACHE}/triton", "And Triton's kernels."),
        ("HF_HOME", f"{CACHE}/huggingface", "The hub's own cache."),
    ]
    node_env = [(n, v, _sentence(r)) for n, v, r in [token, *ray, *caches]]
    ready_s = math.ceil(2 * wanted.node_start_s)
    autoscaler = [
        (
            "AUTOSCALER_UPDATE_INTERVAL_S",
            str(UPDATE_S),
            "How often the autoscaler looks; 5 s by default, which a cold start would wait for.",
        ),
        (
            "RAY_AUTOSCALER_RECONCILE_REQUEST_STATUS_TIMEOUT_S",
            str(REQUEST_TIMEOUT_S),
            "A provider that does not say within a minute whether there is a node has none; 10 minutes by default.",
        ),
        (
            "RAY_AUTOSCALER_RECONCILE_MAX_NUM_RETRY_REQUEST_TO_ALLOCATE",
            "0",
            "And is not asked three times more before the next type is tried.",
        ),
        (
            "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S",
            str(ready_s),
            "A node that is not in the cluster after twice its usual start is given up; an hour by default.",
        ),
    ]
    return {
        "command": wanted.command,
        "fleet_file": wanted.fleet_file,
        "name": wanted.name,
        "region": wanted.region or choice.machines.region,
        "project": wanted.project,
        "security_group": wanted.security_group,
        "gcs": wanted.gcs,
        "redis": wanted.redis,
        "node_start_s": wanted.node_start_s,
        "cpu_image": f"{wanted.image}:cpu",
        "cuda_image": f"{wanted.image}:cuda",
        "cache": CACHE,
        "home": HOME,
        "ray_version": RAY_VERSION,
        "fake_head_id": FAKE_HEAD_ID,
        "node_env": node_env,
        # The operator sets the token's mode itself.
        "node_env_kube": node_env[1:],
        "head_env": autoscaler,
        "autoscaler_env": autoscaler,
        "mount_command": _MOUNT.format(cache=CACHE),
        "image_id": "resolve:ssm:/aws/service/deeplearning/ami/x86_64/"
        "base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id",
        "source_image": "projects/deeplearning-platform-release/global/images/family/"
        "common-cu129-ubuntu-2404-nvidia-580",
        "drain_s": math.ceil(max(m.limits.drain_deadline_s for m in fleet.models)) + 30,
        "fleet_json": fleet.model_dump(mode="json", exclude_unset=True),
    }


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


@dataclass(frozen=True, slots=True)
class _Kube:
    """A choice as Kubernetes takes it: quantities are strings."""

    choice: Choice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.choice, name)

    @property
    def types(self) -> tuple[_KubeType, ...]:
        return tuple(_KubeType(t) for t in self.choice.types)


@dataclass(frozen=True, slots=True)
class _KubeType:
    type: NodeType

    def __getattr__(self, name: str) -> Any:
        return getattr(self.type, name)

    @property
    def kube_resources(self) -> dict[str, str]:
        return {name: str(amount) for name, amount in self.type.resources.items()}

    @property
    def kube_limits(self) -> dict[str, str]:
        shape = self.type.shape
        gpus = {"nvidia.com/gpu": str(shape.gpus)} if shape.gpus else {}
        return {"cpu": str(shape.cpus), "memory": f"{shape.memory_gib:g}Gi", **gpus}


def _for_kubernetes(choice: Choice) -> _Kube:
    return _Kube(choice)
