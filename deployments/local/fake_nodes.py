"""A Ray on this machine whose autoscaler starts and ends raylets that are told how many GPUs they have.

Everything but the GPUs is real: the autoscaler (v2), the raylets, Serve, the engines. An engine for a pretended GPU is
the CPU build's, which is told of no GPU and uses none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.local.serving import head_env
from deployments.local.state import NODE_ADDRESS, Checkout, Cluster, pick_port

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
# Ray's provider says of the head that it is of this type, whatever the file calls it.
HEAD_TYPE = "ray.head.default"
_STORE_BYTES = 100_000_000


@dataclass(frozen=True)
class NodeType:
    """One that the autoscaler may start."""

    name: str
    accelerator: str | None = None
    gpus: int = 1
    cpus: int = 8
    max_nodes: int = 2
    priority: int = 0
    market: str = "on-demand"
    idle_timeout_s: float = 5.0

    def entry(self) -> dict[str, Any]:
        """As the file for Ray's autoscaler has it."""
        resources: dict[str, float] = {"CPU": self.cpus, "object_store_memory": _STORE_BYTES}
        labels = {"ray.io/market-type": self.market}
        if self.accelerator is not None:
            resources |= {"GPU": self.gpus, f"accelerator_type:{self.accelerator}": 1}
            labels["ray.io/accelerator-type"] = self.accelerator
        return {
            "min_workers": 0,
            "max_workers": self.max_nodes,
            "priority": self.priority,
            "idle_timeout_s": self.idle_timeout_s,
            "resources": resources,
            "labels": labels,
            "node_config": {},
        }


def config(
    gcs_address: str, types: Iterable[NodeType], *, provider: str = PROVIDER, **options: Any
) -> dict[str, Any]:
    """The file for Ray's autoscaler. `options` are the provider's own."""
    kinds = list(types)
    return {
        "cluster_name": "relight-fake",
        "max_workers": sum(kind.max_nodes for kind in kinds),
        "upscaling_speed": 100,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": provider,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": gcs_address,
            **options,
        },
        "auth": {},
        "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "max_workers": 0, "node_config": {}},
            **{kind.name: kind.entry() for kind in kinds},
        },
        **{name: [] for name in _COMMANDS},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


_COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


def environment(checkout: Checkout, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """That of the head; its nodes inherit it."""
    return {
        **head_env(checkout),
        "RAY_enable_autoscaler_v2": "1",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        # As `ray up` and KubeRay say it: by a type of the file it is known that something starts nodes here.
        "RAY_NODE_TYPE_NAME": HEAD_TYPE,
        **(extra or {}),
    }


def start_head(
    checkout: Checkout,
    port: int,
    types: Iterable[NodeType],
    *,
    provider: str = PROVIDER,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> Cluster:
    """Start the head, which has no CPU for replicas, and its autoscaler. Saved as the checkout's cluster.

    HTTP is to listen on `port`. Raises CalledProcessError where Ray does not start; its output is in ray-start.log.
    """
    checkout.make_dirs()
    cluster = Cluster(
        ray_port=pick_port(None),
        client_port=pick_port(None),
        host="127.0.0.1",
        port=port,
        num_cpus=0,
        code=checkout.code_fingerprint(),
    )
    checkout.save(cluster)
    file = checkout.state_dir / "autoscaler.json"
    file.write_text(json.dumps(config(cluster.ray_address, types, provider=provider, **options), indent=2))
    start_ray(checkout, cluster, file, env)
    return cluster


def start_ray(checkout: Checkout, cluster: Cluster, file: Path, env: Mapping[str, str] | None = None) -> None:
    """`ray start --head` with an autoscaler's file, also once more after the head has gone."""
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"),
        *(f"--node-ip-address={NODE_ADDRESS}", f"--port={cluster.ray_port}", "--num-cpus=0", "--num-gpus=0"),
        f"--ray-client-server-port={cluster.client_port}",
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
        *(f"--temp-dir={checkout.run_dir / 'ray'}", f"--object-store-memory={_STORE_BYTES}"),
        *("--include-dashboard=false", f"--autoscaling-config={file}"),
    ]
    with (checkout.state_dir / "ray-start.log").open("a") as log:
        subprocess.run(
            command,
            env=environment(checkout, env),
            cwd=checkout.root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            check=True,
        )


def deploy(
    checkout: Checkout, fleet_file: Path, *, env: Mapping[str, str] | None = None, timeout_s: float = 120.0
) -> None:
    """Put the application on the checkout's cluster. In a process of its own, since it connects to Ray."""
    code = (
        "import sys\nfrom dataclasses import replace\nfrom pathlib import Path\n"
        "from deployments.local import serving\nfrom deployments.local.state import DEFAULT_APP, Checkout\n"
        "checkout = Checkout(Path(sys.argv[1]))\n"
        "cluster = replace(checkout.load(), app=DEFAULT_APP, fleet=sys.argv[2])\n"
        "checkout.save(cluster)\n"
        "vars(serving)['_wait_for_templates'] = lambda *_: None  # of nodes that are not there\n"
        "serving.deploy(checkout, cluster, timeout_s=float(sys.argv[3]))\n"
    )
    with (checkout.state_dir / "deploy.log").open("a") as log:
        subprocess.run(
            [sys.executable, "-c", code, str(checkout.root), str(fleet_file), str(timeout_s)],
            env=environment(checkout, env),
            cwd=checkout.root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )
