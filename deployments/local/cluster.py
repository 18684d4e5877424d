"""`up` and `down`, in the order in which they do things."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from deployments.local import processes
from deployments.local.console import Step
from deployments.local.http import get_json
from deployments.local.lock import exclusive
from deployments.local.state import (
    DEFAULT_APP,
    Checkout,
    Cluster,
    ClusterError,
    bind_error,
    pick_port,
    port_is_free,
)

_DEFAULT_PORT = 8000
# Logical: replicas ask Ray for CPUs so that it can place them, not because they use them.
_LEAST_CPUS = 8


@dataclass(frozen=True)
class Wanted:
    """The command line, with None for what was not said."""

    fleet: Path
    host: str | None = None
    port: int | None = None
    ray_port: int | None = None
    num_cpus: int | None = None
    timeout_s: float = 600.0


def up(wanted: Wanted, checkout: Checkout) -> None:
    app = os.environ.get("RELIGHT_APP", DEFAULT_APP)
    fleet = wanted.fleet.resolve()
    if app == DEFAULT_APP and not fleet.is_file():
        raise ClusterError(f"there is no fleet file {wanted.fleet}")
    checkout.state_dir.mkdir(mode=0o700, exist_ok=True)
    with exclusive(checkout.lock_file, "up or down"):
        checkout.make_dirs()
        content = fleet.read_bytes() if fleet.is_file() else b""
        served = hashlib.sha256(f"{app}\n{fleet}\n".encode() + content).hexdigest()
        cluster = running(checkout)
        if cluster is not None:
            _refuse_other_ports(wanted, cluster)
            if cluster.code != checkout.code_fingerprint():
                print("Relight's code is newer than this cluster; scripts/down && scripts/up runs it.")
        if cluster is None or cluster.served != served or not _serving().answers(cluster):
            # What is wrong with the fleet file is said before anything starts.
            downloads = _packaged_models(fleet) if app == DEFAULT_APP else []
            cluster = cluster or _start(wanted, checkout)
            for source, cache_dir, budget_bytes in downloads:
                _serving().prepare_model(source, cache_dir, budget_bytes, checkout.root)
            cluster = replace(cluster, app=app, fleet=str(fleet) if fleet.is_file() else "", served="")
            checkout.save(cluster)
            _serving().deploy(checkout, cluster, timeout_s=wanted.timeout_s)
            cluster = replace(cluster, served=served)
            checkout.save(cluster)
        _greet(checkout, cluster)


def down(checkout: Checkout) -> None:
    if not checkout.state_dir.is_dir() and not checkout.run_dir.exists():
        print("Nothing is up.")
        return
    checkout.state_dir.mkdir(mode=0o700, exist_ok=True)
    with exclusive(checkout.lock_file, "up or down"):
        _end(checkout)


def running(checkout: Checkout) -> Cluster | None:
    """The cluster, if its head is whole; a half-started or half-ended one is none."""
    commands = [process.command for process in processes.ours(checkout.run_dir)]
    whole = all(any(name in command for command in commands) for name in ("gcs_server", "raylet/raylet"))
    return checkout.load() if whole else None


def _start(wanted: Wanted, checkout: Checkout) -> Cluster:
    if processes.ours(checkout.run_dir):
        print("A cluster of this checkout was left half started or half ended; ending that first.")
        _end(checkout)
        checkout.make_dirs()
    before = checkout.load()
    host = wanted.host or "127.0.0.1"
    port = wanted.port or _DEFAULT_PORT
    if error := bind_error(host, port):
        raise ClusterError(_not_ours(host, port, error))
    if wanted.ray_port and not port_is_free("127.0.0.1", wanted.ray_port):
        holder = processes.listener(wanted.ray_port) or "a process of another user"
        raise ClusterError(f"port {wanted.ray_port} is taken by {holder}; choose another with --ray-port")
    cluster = Cluster(
        ray_port=wanted.ray_port or pick_port(before.ray_port if before else None),
        client_port=pick_port(before.client_port if before else None),
        host=host,
        port=port,
        num_cpus=wanted.num_cpus or max(_LEAST_CPUS, os.cpu_count() or 1),
        code=checkout.code_fingerprint(),
    )
    # Saved before it starts, so that an `up` killed from here on leaves its ports known.
    checkout.save(cluster)
    _serving().start_head(checkout, cluster)
    return cluster


def _not_ours(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        holder = processes.listener(port) or "a process of another user"
        return f"port {port} on {host} is taken by {holder}; choose another with --port or RELIGHT_PORT"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} is not for this user ({error.strerror}); choose one of 1024 or more with --port"
    return f"--host: {host} is no address of this machine ({error.strerror})"


def _refuse_other_ports(wanted: Wanted, cluster: Cluster) -> None:
    for option, asked, present in (
        ("--host", wanted.host, cluster.host),
        ("--port", wanted.port, cluster.port),
        ("--ray-port", wanted.ray_port, cluster.ray_port),
        ("--num-cpus", wanted.num_cpus, cluster.num_cpus),
    ):
        if asked is not None and asked != present:
            raise ClusterError(
                f"it is up already with {option} {present}; to change that, scripts/down first"
            )


def _end(checkout: Checkout) -> None:
    if processes.ours(checkout.run_dir):
        with Step("Ending Ray, Serve and the engines") as step:
            try:
                processes.end(checkout.run_dir, note=step.note)
            except TimeoutError as error:
                raise ClusterError(f"some processes do not end: {error}") from error
    else:
        print("Nothing is up.")
    cluster = checkout.load()
    if cluster is not None:
        checkout.save(replace(cluster, served=""))
    # Of Ray's session (sockets, spilled objects, logs) the logs stay, for a look afterwards.
    _keep_last_logs(checkout)
    shutil.rmtree(checkout.run_dir, ignore_errors=True)


def _keep_last_logs(checkout: Checkout) -> None:
    logs = checkout.run_dir / "ray" / "session_latest" / "logs"
    if logs.is_dir():
        kept = checkout.state_dir / "last-logs"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(logs.resolve(), kept, symlinks=True, ignore_dangling_symlinks=True)


def _packaged_models(fleet: Path) -> list[tuple[str, str | None, int | None]]:
    """Models that come in Python packages, with the folder for weights and how many bytes these may take.

    These are turned into what vLLM loads here, where one sees it happen, and not in a first cold start.
    """
    from deployments.errors import ConfigError
    from deployments.fleet import load_fleet

    try:
        read = load_fleet(fleet)
    except ConfigError as error:
        raise ClusterError(error.message) from None
    sources = {model.source for model in read.models if model.source.startswith("package://")}
    host = read.engine_host
    return [(source, host.cache_dir, host.cache_budget_bytes) for source in sorted(sources)]


def _greet(checkout: Checkout, cluster: Cluster) -> None:
    found = processes.ours(checkout.run_dir)
    size = processes.memory_bytes(found) / 2**20
    print(f"\nRelight is up at {cluster.endpoint} ({len(found)} processes, {size:.0f} MB of memory).")
    model = _first_model(cluster)
    if model:
        # A small model that is not told to stop may go on to the end of its context.
        asked = [{"role": "user", "content": "Say hello."}]
        body = json.dumps({"model": model, "messages": asked, "max_tokens": 64})
        print(f"\n  curl {cluster.endpoint}/v1/chat/completions \\")
        print(f"    -H 'content-type: application/json' -d '{body}'\n")
    print("  scripts/down ends it; relight status shows the models.")


def _first_model(cluster: Cluster) -> str | None:
    try:
        return str(get_json(f"{cluster.endpoint}/v1/models", timeout_s=5)["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _serving() -> ModuleType:
    # `down` and an `up` that finds everything as it should be need no Ray, and so no environment.
    from deployments.local import serving

    return serving
