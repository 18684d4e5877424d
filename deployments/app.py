"""The composition root: a fleet file becomes one Serve application.

`serve run deployments.app:build fleet=fleet.yaml`
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from autoscaling.core.codec import to_json, to_plain
from autoscaling.live.controller import Controller
from autoscaling.live.labels import ACCELERATOR
from autoscaling.live.setup import ControllerSetup, ModelSetup
from deployments.engine.protocol import EngineSpec, default_run_dir
from deployments.fleet import Fleet, Model, deployment_name, load_fleet, parse_fleet
from deployments.model import ModelReplica
from deployments.scaling import scaling_spec

if TYPE_CHECKING:
    from deployments.gateway.door import Door

log = logging.getLogger("ray.serve")

# How soon Serve sees that somebody waits. Its metrics of a waiting handle are those of the last period: the defaults
# (10 s) cost a dark model 13 s before anything is even started.
METRICS_INTERVAL_S = 0.2
LOOK_BACK_S = 1.0
# A gateway's requests are bounded by its own queues, model by model; Serve's bound would answer in another shape.
GATEWAY_MAX_ONGOING = 100_000
# vLLM takes 92 % of the memory of the machine for its KV cache on a CPU unless it is told otherwise.
DEFAULT_CPU_KV_CACHE_GIB = "1"
REQUEST_ID = b"x-request-id"
MOST_REPLICAS = 1000
LOOK_AT_NODES_EVERY_S = 5.0
# Serve's own default router, by the module that it is in. Serve pickles a router's module by value into each
# deployment's settings, and each replica hands those back when it is up: by the default path, which names the package,
# they are 110 kB, which Ray keeps as an object on the replica's node, and a node that holds an object is never idle.
# Serve lets go of it with the replica, or when its garbage collector comes by, which may be never.
ROUTER = "ray.serve._private.request_router.pow_2_router:PowerOfTwoChoicesRequestRouter"


@dataclass(frozen=True, slots=True)
class _Place:
    node_id: str
    raylet_pid: int
    run_dir: Path


def engine_spec(
    model: Model, telemetry_argv: tuple[str, ...] = (), env: dict[str, str] | None = None
) -> EngineSpec:
    """What the engine host needs of a model of the fleet."""
    environment = {**(env or {}), **model.env}
    # Also with GPUs, since those of a pretended node are none; vLLM for CUDA does not read it.
    if "kv_cache_memory_bytes" not in {k.replace("-", "_") for k in model.engine}:
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", DEFAULT_CPU_KV_CACHE_GIB)
    return EngineSpec(
        model=model.id,
        names=(model.id, *model.aliases),
        source=model.source,
        argv=(*telemetry_argv, *model.argv()),
        env=tuple(sorted(environment.items())),
        gpus=model.resources.gpus,
        park=model.scaling.park,
        start_deadline_s=model.limits.start_deadline_s,
        drain_deadline_s=model.limits.drain_deadline_s,
    )


def controller_setup(fleet: Fleet, specs: Mapping[str, EngineSpec]) -> ControllerSetup:
    """The controller's share of the fleet file."""
    section = fleet.controller
    models = [
        ModelSetup(
            id=model.id,
            aliases=tuple(model.aliases),
            deployment=deployment_name(model.id),
            spec=scaling_spec(model),
            schedules=tuple(s.model_dump(mode="json") for s in model.scaling.schedules),
            resources=_resources(model),
            accelerator_types=tuple(model.resources.accelerator_types),
            engine=specs[model.id].to_json(),
            own_template=fleet.engine_host.prebuilt == "auto" and not model.resources.gpus,
            can_park=model.scaling.park,
            inter_token_slo_s=model.scaling.inter_token_slo_s,
        )
        for model in fleet.models
    ]
    return ControllerSetup(
        models=tuple(models),
        mode=section.mode,
        store=section.store,
        tick_s=section.tick_s,
        plan_every_s=section.plan_every_s,
        plan_expires_s=section.plan_expires_s,
        node_wait_s=section.node_wait_s,
        gpu_budget=section.gpu_budget,
        spend_gpu_s_per_day=section.spend_gpu_s_per_day,
        shadow=section.shadow.model_dump(mode="json") if section.shadow else None,
        host_config=host_config(fleet),
    )


def _resources(model: Model) -> dict[str, float]:
    resources = {"CPU": float(model.resources.cpus), "GPU": float(model.resources.gpus)}
    return {name: amount for name, amount in {**resources, **model.resources.custom}.items() if amount}


def autoscaling_config(model: Model) -> AutoscalingConfig:
    """Serve's settings, so that it passes our policy's decisions through: hysteresis lives once, in the core.

    The bounds are those of the policy too, which overrides may move at run time; Serve's own would clip them.
    """
    from ray.serve.config import AutoscalingPolicy

    return AutoscalingConfig(
        min_replicas=0,
        initial_replicas=model.scaling.min_replicas or None,
        max_replicas=max(MOST_REPLICAS, model.scaling.max_replicas),
        target_ongoing_requests=model.scaling.target_ongoing_requests,
        metrics_interval_s=METRICS_INTERVAL_S,
        look_back_period_s=LOOK_BACK_S,
        upscaling_factor=1.0,
        downscaling_factor=1.0,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        downscale_to_zero_delay_s=0.0,
        policy=AutoscalingPolicy(
            policy_function="autoscaling.live.policy:RelightPolicy",
            policy_kwargs={"model": model.id, "spec": to_json(scaling_spec(model))},
        ),
    )


def warm_on_this_node(message: Mapping[str, Any]) -> dict[str, Any]:
    """Ask the engine host of the node that this runs on, in a process of Ray's; see `Host.warm`."""
    import ray

    from deployments.engine.client import warm

    run_dir = default_run_dir(ray.get_runtime_context().get_node_id())
    return asyncio.run(warm(run_dir, os.getppid(), message))


def host_config(fleet: Fleet) -> dict[str, Any]:
    """The engine host's share of the fleet file."""
    return fleet.engine_host.model_dump(mode="json")


def only_node_that_fits(model: Model, node_id: str, nodes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a replica of `model` can land on this one of Ray's `nodes` alone: starting its engine is not in vain.

    An engine on GPUs has to wait for those that Ray grants to its replica.
    """
    if model.resources.gpus:
        return False
    needed = _resources(model)
    fitting = [
        node["NodeID"]
        for node in nodes
        if node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in needed.items())
    ]
    return fitting == [node_id]


class EarlyWakes:
    """The models whose engines a gateway on this node may light before their replicas are there.

    None until Ray's nodes are known. Ray is asked in a thread: while the GCS is away it takes 15 s to fail, in which
    every stream would stand still. Until it answers again, what it said last counts.
    """

    def __init__(self, models: Sequence[Model], node_id: str) -> None:
        self._models = models
        self._node_id = node_id
        self._fitting: frozenset[str] = frozenset()

    def __call__(self, spec: EngineSpec) -> bool:
        return spec.model in self._fitting

    async def look(self) -> None:
        """Ask Ray once."""
        import ray

        try:
            nodes = await asyncio.to_thread(ray.nodes)
        except Exception:
            log.exception("Ray does not tell its nodes")
            return
        fitting = (m.id for m in self._models if only_node_that_fits(m, self._node_id, nodes))
        self._fitting = frozenset(fitting)

    async def follow(self) -> None:
        """Ask Ray for ever."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_AT_NODES_EVERY_S)


@serve.ingress()
class GatewayDeployment:
    """The ingress: `deployments.gateway` over Serve handles."""

    def __init__(
        self,
        fleet: dict[str, Any],
        specs: list[dict[str, Any]],
        otel: dict[str, str],
        controller: DeploymentHandle,
        **models: DeploymentHandle,
    ) -> None:
        import ray

        self._fleet = parse_fleet(fleet, "fleet")
        # As the replicas have them: an engine that the gateway asks for must be one that a replica can take over.
        self._specs = {s["model"]: EngineSpec.from_json(s) for s in specs}
        self._environ = {**os.environ, **otel}
        self._controller = controller
        self._handles = {m.id: models[_argument(m.id)] for m in self._fleet.models}
        node_id = ray.get_runtime_context().get_node_id()
        self._place = _Place(node_id, os.getppid(), default_run_dir(node_id))

    def __serve_build_asgi_app__(self) -> Any:
        return LateGateway(self._build, self._open_door, self._flush, self._report)

    def _open_door(self, gateway: Any) -> Any:
        """The gateway's own listening socket, if the fleet wants one."""
        from deployments.gateway.door import Door

        listen = self._fleet.gateway.listen
        drain_s = max(m.limits.drain_deadline_s for m in self._fleet.models)
        return Door(gateway, listen, self._place.run_dir, drain_s, gateway.close) if listen else None

    def _flush(self) -> None:
        self._telemetry.shutdown()

    async def _report(self) -> None:
        await self._reports.close()

    def _build(self) -> Any:
        from deployments.gateway.app import build_gateway
        from deployments.gateway.handles import push_metrics_in_time
        from deployments.gateway.leases import ServeEngines
        from deployments.gateway.observe import SystemClock
        from deployments.gateway.traffic import TrafficCounter
        from deployments.telemetry import build_telemetry

        fleet = self._fleet
        instance = serve.get_replica_context().replica_id.unique_id
        self._telemetry = build_telemetry(fleet.telemetry, self._environ, role="gateway", instance=instance)
        early_wakes = EarlyWakes(
            fleet.models if fleet.gateway.early_wake == "auto" else (), self._place.node_id
        )
        clock = SystemClock()
        traffic = TrafficCounter(self._specs, clock)
        for handle in self._handles.values():
            push_metrics_in_time(handle, LOOK_BACK_S)
        engines = ServeEngines(
            self._specs,
            self._handles,
            self._controller,
            self._place,
            {**host_config(fleet), "listen": fleet.gateway.listen},  # other doors are closed
            early_wake=early_wakes,
            max_ongoing={m.id: m.scaling.max_ongoing_requests for m in fleet.models},
            counts=lambda: {m: (a.queued, a.in_flight) for m, a in gateway.proxy.counts().items()},
            traffic=traffic,
            clock=clock,
        )
        gateway = build_gateway(fleet, engines, self._telemetry, clock=clock, traffic=traffic)
        engines.start()
        self._reports = engines.reports
        self._following_nodes = asyncio.ensure_future(early_wakes.follow())
        return gateway


class LateGateway:
    """Builds the application on the event loop that serves it, at its lifespan's start.

    Serve's own middleware gives every request an `x-request-id` and appends it to every answer; the gateway's, which is
    the same, is left out, since a client would read two as one: "id, id".
    """

    def __init__(
        self,
        build: Callable[[], Any],
        open_door: Callable[[Any], Door | None],
        flush: Callable[[], None],
        report: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._build = build
        self._open_door = open_door
        self._flush = flush  # sends what telemetry is queued; blocks
        self._report = report  # tells the controller what is untold
        self._app: Any = None
        self._door: Door | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._app is None:
            self._app = self._build()
            self._door = self._open_door(self._app)
        if scope["type"] == "lifespan":

            async def receive_and_drain() -> Any:
                message = await receive()
                # Serve waits for the requests that came through its proxy; those of the door it does not know.
                if message["type"] == "lifespan.shutdown":
                    if self._door is not None:
                        await self._door.close()
                    last: list[Awaitable[None]] = [asyncio.to_thread(self._flush)]
                    if self._report is not None:
                        last.append(self._report())
                    await asyncio.gather(*last)
                return message

            await self._app(scope, receive_and_drain, send)
            return
        if scope["type"] != "http" or not any(name == REQUEST_ID for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
            return

        async def send_without_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name.lower() != REQUEST_ID]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_without_id)


def _argument(model_id: str) -> str:
    return "m_" + model_id.encode().hex()


def build_from_fleet(fleet: Fleet) -> serve.Application:
    """One application: the gateway, the controller, and one deployment for each model."""
    from deployments.telemetry import engine_otel_args, settings

    # The OTEL_* variables of whoever deploys count, also where Ray was started without them.
    otel = {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}
    argv, env = engine_otel_args(settings(fleet.telemetry, os.environ))
    config = host_config(fleet)
    specs = {m.id: engine_spec(m, tuple(argv), dict(env)) for m in fleet.models}
    handles = {_argument(m.id): _model_deployment(fleet, m, specs[m.id], config) for m in fleet.models}
    controller = (
        serve.deployment(Controller)
        .options(
            name="controller",
            num_replicas=1,
            max_ongoing_requests=1000,
            ray_actor_options=_off_accelerators(fleet),
            # One that was killed is missed at the next check, and plans expire meanwhile.
            health_check_period_s=2,
            health_check_timeout_s=30,
            graceful_shutdown_timeout_s=10,
            graceful_shutdown_wait_loop_s=0.2,
        )
        .bind(
            to_plain(controller_setup(fleet, specs)), warm_on_this_node, fleet.engine_host.park_memory_bytes
        )
    )
    gateway: dict[str, Any] = {"num_replicas": fleet.gateway.replicas}
    if fleet.gateway.max_replicas > fleet.gateway.replicas:
        gateway = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=fleet.gateway.replicas,
                max_replicas=fleet.gateway.max_replicas,
                target_ongoing_requests=1000,
            )
        }
    application: serve.Application = (
        serve.deployment(GatewayDeployment)
        .options(
            name="gateway",
            max_ongoing_requests=GATEWAY_MAX_ONGOING,
            ray_actor_options=_off_accelerators(fleet),
            # Telemetry and reports, side by side, take at most 5 s to leave once the requests are drained.
            graceful_shutdown_timeout_s=max(m.limits.drain_deadline_s for m in fleet.models) + 10,
            graceful_shutdown_wait_loop_s=0.5,
            health_check_period_s=5,
            **gateway,
        )
        .bind(
            fleet.model_dump(mode="json"), [s.to_json() for s in specs.values()], otel, controller, **handles
        )
    )
    return application


def _off_accelerators(fleet: Fleet) -> dict[str, Any]:
    """Where gateways, the controller and models without GPUs run: beside an accelerator only if there is no other room.

    Ray ends no node on which an actor lives, also one that takes no CPU.
    """
    from ray.util import accelerators

    known = {str(value) for name, value in vars(accelerators).items() if name.isupper()}
    named = {kind for model in fleet.models for kind in model.resources.accelerator_types}
    others = {ACCELERATOR: f"!in({','.join(sorted(known | named))})"}
    return {"num_cpus": 0, "label_selector": others, "fallback_strategy": [{"label_selector": {}}]}


def _model_deployment(
    fleet: Fleet, model: Model, spec: EngineSpec, config: dict[str, Any]
) -> serve.Application:
    scaling, resources = model.scaling, model.resources
    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
    if not resources.gpus:
        options = {**_off_accelerators(fleet), **options}
    if resources.custom:
        options["resources"] = dict(resources.custom)
    if len(resources.accelerator_types) == 1:
        options["accelerator_type"] = resources.accelerator_types[0]
    elif resources.accelerator_types:
        options["label_selector"] = {ACCELERATOR: f"in({','.join(resources.accelerator_types)})"}
    application: serve.Application = (
        serve.deployment(ModelReplica)
        .options(
            name=deployment_name(model.id),
            max_ongoing_requests=scaling.max_ongoing_requests,
            ray_actor_options=options,
            autoscaling_config=autoscaling_config(model),
            request_router_config=RequestRouterConfig(request_router_class=ROUTER),
            # Serve kills a replica that drains longer; a lease lasts as long as its generation.
            graceful_shutdown_timeout_s=model.limits.drain_deadline_s + 5,
            graceful_shutdown_wait_loop_s=0.2,
            health_check_period_s=10,
            health_check_timeout_s=60,
        )
        .bind(spec.to_json(), config)
    )
    return application


def build(args: dict[str, Any]) -> serve.Application:
    """`serve run deployments.app:build fleet=FILE [listen=HOST:PORT]`: the application of a fleet file.

    In a Serve config file, `args: {fleet: FILE}` or the fleet itself under `args: {fleet: {...}}`. `listen` is
    `gateway.listen` of the fleet file, and wins over it. Raises ConfigError for anything else.
    """
    from deployments.errors import ConfigError

    unknown = sorted(set(args) - {"fleet", "listen"})
    if unknown:
        raise ConfigError(
            f"deployments.app:build takes fleet=FILE and listen=HOST:PORT, not {', '.join(unknown)}"
        )
    source = args.get("fleet", "fleet.yaml")
    fleet = load_fleet(Path(source)) if isinstance(source, str) else parse_fleet(source, "args.fleet")
    if listen := args.get("listen"):
        document = fleet.model_dump(mode="json")
        document["gateway"]["listen"] = listen
        fleet = parse_fleet(document, "args")
    return build_from_fleet(fleet)
