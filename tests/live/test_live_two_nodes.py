"""A second node on the same machine: the bytes go through the tunnel."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.live.lab import Relight, UnixConnection, ask, kill, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BODY = {"model": "far", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}


def start_node(relight: Relight, resources: dict[str, float]) -> str:
    """Another node of the cluster, with resources that no other has. Returns its id."""
    known = set(relight.ray("nodes"))
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        f"--address={relight.cluster.ray_address}",
    ]
    command += ["--node-ip-address=127.0.0.3", "--num-cpus=2", "--resources", json.dumps(resources)]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    command += ["--object-store-memory=100000000", "--disable-usage-stats"]
    done = subprocess.run(
        command, env=relight.environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (node,) = until("the second node", lambda: set(relight.ray("nodes")) - known)
    return node


@pytest.fixture(scope="module")
def second(relight: Relight) -> Iterator[str]:
    """The id of a node that has the resource `far`, which no other has."""
    raylets = {p.pid for p in relight.processes("raylet/raylet")}
    yield start_node(relight, {"far": 1})
    for process in relight.processes("raylet/raylet"):
        if process.pid not in raylets:
            kill(process)
    until("the second node's host to be gone", lambda: len(relight.processes("relight-host")) == 1)
    until("its engines to be gone", lambda: not relight.engines("far "))


def test_requests_are_served_through_the_tunnel(relight: Relight, second: str) -> None:
    """Plain and streamed, byte for byte as the engine on the other node gives them."""
    plain = relight.request("POST", "/v1/completions", BODY)
    assert plain.status == 200, plain
    assert plain.json["choices"][0]["text"].startswith(" Paris")
    node = next(n for n in relight.status()["nodes"] if n["id"] == second)
    engine = node["engines"][0]
    assert engine["model"] == "far"
    direct = ask(UnixConnection(engine["http"], 60), "POST", "/v1/completions", BODY)
    assert direct.json["choices"] == plain.json["choices"]
    with relight.stream({**BODY, "max_tokens": 20}) as response:
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_hanging_up_reaches_the_other_node(relight: Relight, second: str) -> None:
    """The generation is aborted there."""
    with relight.stream({**BODY, "max_tokens": 2000, "ignore_eos": True}) as response:
        assert relight.first_event(response).startswith(b"data: ")
        engine = relight.engine("far")
        connection = lambda: UnixConnection(engine["http"], 60)  # noqa: E731
        assert b"vllm:num_requests_running{" in ask(connection(), "GET", "/metrics").body

    def idle() -> bool:
        page = ask(connection(), "GET", "/metrics").body.decode()
        running = [line for line in page.splitlines() if line.startswith("vllm:num_requests_running{")]
        assert running
        return all(line.endswith(" 0.0") for line in running)

    until("the generation to be aborted", idle)


def test_it_goes_dark_on_the_other_node(relight: Relight, second: str) -> None:
    """No replica, no engine, and all that the node has is free."""
    relight.dark("far")

    def free() -> bool:
        found = relight.ray("resources")
        return bool(found["available"].get("far") == found["total"]["far"] == 1)

    until("the resource to be free", free)
