"""Nodes that come and go: one machine on which Ray's autoscaler starts raylets that pretend to have GPUs.

The H100 is in the cluster's file, is what Ray takes first, and never comes. The A100 is refused at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml

from deployments.local.fake_nodes import NodeType, deploy, start_head
from deployments.local.processes import Process
from deployments.node_reclaim import drain
from deployments.node_start import Raylet
from tests.live.conftest import CHAT, EMBED, scaling
from tests.live.lab import ROOT, Relight, kill, until
from tests.live.test_live_kills import Load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PATIENCE_S = 6.0
CLIENTS = 2
"""Of a load beside which another node starts on the same two cores."""
TYPES = [
    NodeType("h100", "H100", priority=9, idle_timeout_s=4),
    NodeType("a100", "A100", priority=8, idle_timeout_s=4),
    NodeType("l4", "L4", max_nodes=3, idle_timeout_s=4),
]
FLEET: dict[str, Any] = {
    "models": [
        {
            "id": "chat",
            **CHAT,
            # A pretended GPU has the CPU build's engine, which takes all memory unless it is told otherwise.
            "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
            "resources": {"gpus": 1, "accelerator_types": ["H100", "L4"]},
            "scaling": scaling(keep_alive_s=2),
        },
        {
            "id": "embed",
            **EMBED,
            "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
            "resources": {"gpus": 1, "accelerator_types": ["L4"]},
            "scaling": scaling(keep_alive_s=2),
        },
        {
            "id": "choosy",
            **EMBED,
            "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
            "resources": {"gpus": 1, "accelerator_types": ["A100", "L4"]},
            "scaling": scaling(keep_alive_s=2),
        },
    ],
    "controller": {"node_wait_s": PATIENCE_S},
    "gateway": {"progress_after_s": 0.5, "progress_every_s": 0.5},
    "engine_host": {"prebuilt": "off"},
}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relight]:
    """The cluster, with no node but the head."""
    relight = Relight(tmp_path_factory.mktemp("nodes"))
    env = {"PYTHONPATH": str(ROOT), "RELIGHT_DATA": str(relight.data)}
    relight.fleet_file.write_text(yaml.safe_dump(FLEET))
    try:
        start_head(
            relight.checkout,
            relight.port,
            TYPES,
            provider="tests.fakes.nodes.CloudProvider",
            env=env,
            scarce=["h100"],
            refused=["a100"],
        )
        deploy(relight.checkout, relight.fleet_file, env=env)
        yield relight
    finally:
        relight.down()
        assert relight.processes() == []


def test_dark_is_no_gpu_node(nodes: Relight) -> None:
    """Gateway and controller run on the head, which has neither GPU nor a CPU for replicas."""
    assert len(nodes.processes("raylet/raylet")) == 1
    assert nodes.ray("resources")["total"].get("GPU", 0) == 0


def test_a_type_that_does_not_come_is_given_up_for_the_next(nodes: Relight) -> None:
    """Who waits is told, and so is the status; a model that takes only the other type waits for nothing."""
    body = {"model": "chat", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    comments, reasons = [], set()
    with nodes.stream(body) as response:
        for line in response:
            if line.startswith(b"data: "):
                break
            comments.append(line.decode())
            reasons.add(nodes.model("chat")["reason"])
        else:
            raise AssertionError(comments)
    told = [comment for comment in comments if "phase=node" in comment]
    assert any("waits for a node (H100 or L4)" in comment for comment in told), told
    assert any("no node came (H100)" in comment and "asking for L4" in comment for comment in told), told
    assert any(reason and "no node came (H100)" in reason for reason in reasons), reasons
    answer = nodes.embed("embed")
    assert (answer.status, answer.header("x-relight-cold-start")) == (200, "true"), answer
    kinds = {node: labels.get("ray.io/accelerator-type") for node, labels in nodes.ray("labels").items()}
    assert set(kinds.values()) - {None} == {"L4"}
    # A node on which Ray keeps an object is not idle, also when nothing runs there any more.
    held = {node: size for node, size in nodes.ray("objects").items() if kinds.get(node)}
    assert held and not any(held.values()), held


def test_nodes_that_are_reclaimed_or_killed_under_load_are_replaced(nodes: Relight) -> None:
    """What a cloud says two minutes before it takes a spot machine: the next node serves, and no request fails.

    Of one that is gone at once, requests that had no byte yet are served by the next node; nothing is lost.
    """
    load = Load(nodes, CLIENTS)
    with load.running():
        until("the load to be served", lambda: load.whole_since(0) >= CLIENTS, patience_s=120)
        where, raylet = serving_node(nodes, "chat")
        told_s = time.monotonic()
        drain(Raylet(raylet.pid, where), 120)
        until("another node to serve", lambda: node_of(nodes, "chat") != where, patience_s=120)
        moved_s = time.monotonic()
        until("its load to be served", lambda: load.whole_since(moved_s) >= CLIENTS)
        drained = list(load.outcomes)
        where, raylet = serving_node(nodes, "chat")
        kill(raylet)
        killed_s = time.monotonic()
        until(
            "requests after its death to be served",
            lambda: load.whole_since(killed_s) >= 2 * CLIENTS,
            patience_s=150,
        )
        assert node_of(nodes, "chat") != where
    assert [o for o in drained if told_s < o.begun_s < moved_s]
    assert not [o for o in drained if o.kind != "whole"], drained
    bad = [o for o in load.outcomes if o.kind in ("lost", "broken")]
    assert not bad, bad
    errors = [o for o in load.outcomes if o.kind == "error"]
    # Those in whose stream it died; they were told.
    assert len(errors) <= CLIENTS and not [o for o in errors if o.begun_s > killed_s], errors


def test_who_waits_for_anothers_gpu_is_told_and_gets_it(nodes: Relight) -> None:
    """A budget that a redeploy brings: no more than it says is lit, and no request of either model fails.

    When its turn has come, the type that is refused is given up at once, and not only after the time for which a type
    is waited for.
    """
    nodes.dark("chat", "embed", "choosy")
    fleet = {**FLEET, "controller": {**FLEET["controller"], "gpu_budget": 1}}
    nodes.fleet_file.write_text(yaml.safe_dump(fleet))
    deploy(nodes.checkout, nodes.fleet_file, env={"PYTHONPATH": str(ROOT), "RELIGHT_DATA": str(nodes.data)})
    enough, answers, lit, reasons = threading.Event(), [], set(), set()

    def ask_on() -> None:
        # Without a pause it would take the processors from the node that is to start.
        while not enough.wait(0.1):
            answers.append(nodes.embed("embed").status)

    body = {"model": "choosy", "input": "One, two, three"}
    told = "others hold those of controller.gpu_budget (1)"
    with ThreadPoolExecutor(2) as pool:
        asking = pool.submit(ask_on)
        try:
            until("the other to be served", lambda: len(answers) >= 2, patience_s=120)
            asked = pool.submit(nodes.request, "POST", "/v1/embeddings", body, timeout_s=240)
            until("who waits to be told", lambda: told in (nodes.model("choosy")["reason"] or ""))
            by_then = len(answers)
            until("the other to be served on", lambda: len(answers) >= by_then + 2)
            assert not asked.done() and lit_models(nodes) == {"embed"}
        finally:
            enough.set()
        # The other's last request may itself wait until this one's turn is over.
        while not asked.done():
            lit.add(frozenset(lit_models(nodes)))
            reasons.add(nodes.model("choosy")["reason"] or "")
        asking.result()
    assert asked.result().status == 200, asked.result()
    assert any("no node came (A100: launch failed)" in r and "asking for L4" in r for r in reasons), reasons
    assert frozenset(("embed", "choosy")) not in lit, lit
    assert set(answers) == {200}, answers


def test_at_the_end_no_gpu_node_is_left(nodes: Relight) -> None:
    """Every one has gone for being idle."""
    nodes.dark("chat", "embed", "choosy")
    until("the nodes to go", lambda: len(nodes.processes("raylet/raylet")) == 1)
    assert nodes.ray("resources")["total"].get("GPU", 0) == 0


def lit_models(relight: Relight) -> set[str]:
    """Those with a replica that is ready."""
    return {m["id"] for m in relight.status()["models"] if m["replicas_by_state"].get("RUNNING")}


def node_of(relight: Relight, model: str) -> str:
    """The node on which the model's newest engine serves."""

    def look() -> str | None:
        found = [
            (engine["ready_s"], node["id"])
            for node in relight.status()["nodes"]
            for engine in node["engines"]
            if engine["model"] == model and engine["ready_s"]
        ]
        return max(found)[1] if found else None

    return until(f"an engine of {model}", look)


def serving_node(relight: Relight, model: str) -> tuple[str, Process]:
    """The same, and its raylet."""
    where = node_of(relight, model)
    return where, next(p for p in relight.processes("raylet/raylet") if where in p.command)
