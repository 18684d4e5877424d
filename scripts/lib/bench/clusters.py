"""The life of what is measured: each cluster has a folder, ports and a mark of its own, and ends by its processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.client import Target
from deployments.engine.protocol import EngineSpec
from deployments.local import processes
from deployments.local.http import get_json
from deployments.local.state import MARK, Checkout, pick_port

MODEL = "smollm2-135m"
HERE = Checkout.here()
HOME = HERE.state_dir / "bench"
_LIB = Path(__file__).resolve().parents[1]


class BenchError(Exception):
    """Why nothing could be measured; its text is all that the person sees."""


def say(text: str) -> None:
    """Progress goes to stderr: stdout is the result's."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# The model that is measured


def fleet(
    *,
    keep_alive_s: float = 1,
    park_memory_bytes: int = 0,
    prebuilt: str = "auto",
    early_wake: str = "auto",
    min_replicas: int = 0,
) -> dict[str, Any]:
    """fleet.yaml with its chat model alone, and what a row changes."""
    from deployments.fleet import load_fleet

    model = load_fleet(HERE.root / "fleet.yaml").resolve(MODEL)
    if model is None:
        raise BenchError(f"fleet.yaml has no model {MODEL} any more")
    entry = model.model_dump(mode="json", exclude_unset=True)
    entry["scaling"] = {
        "min_replicas": min_replicas,
        "max_replicas": 1,
        # What is measured here is the engine's way, not who decides: nothing but this time takes it away.
        "policy": "keep-alive",
        "keep_alive_s": keep_alive_s,
    }
    return {
        "models": [entry],
        "gateway": {"early_wake": early_wake},
        "engine_host": {"park_memory_bytes": park_memory_bytes, "prebuilt": prebuilt},
    }


def spec() -> EngineSpec:
    """What the engine host is asked for: the fleet's model, as the deployed application would describe it."""
    from deployments.app import engine_spec
    from deployments.fleet import parse_fleet

    return engine_spec(parse_fleet(fleet()).models[0])


def model_folder() -> Path:
    """The weights as vLLM loads them, brought here if they are not."""
    command = [sys.executable, "-m", "deployments.engine.sources", spec().source, "--json"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False, text=True)
    for line in reversed(done.stdout.splitlines()):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return Path(json.loads(line)["path"])
    raise BenchError(f"the weights of {MODEL} can't be brought to this machine")


def read_into_page_cache(folder: Path) -> None:
    """So that no run measures the disk. The flat copy that prebuilt templates map lies beside the models."""
    flat = folder.parent.parent / "mapped"
    for path in [*folder.rglob("*"), *flat.glob("*.weights")]:
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


# Clusters


@dataclass(frozen=True)
class Running:
    """A cluster that answers."""

    checkout: Checkout
    port: int

    @property
    def target(self) -> Target:
        return Target(port=self.port)

    def status(self) -> Any:
        return get_json(f"http://127.0.0.1:{self.port}/relight/v1/status", timeout_s=10)

    def processes(self) -> list[processes.Process]:
        return processes.ours(self.checkout.run_dir)


def _checkout(name: str) -> Checkout:
    checkout = Checkout(HOME / name)
    checkout.root.mkdir(parents=True, exist_ok=True)
    return checkout


def end(checkout: Checkout) -> None:
    """What scripts/down does, and quietly. The logs stay in the cluster's folder."""
    processes.end(checkout.run_dir)
    logs = checkout.run_dir / "ray" / "session_latest" / "logs"
    with contextlib.suppress(OSError, shutil.Error):
        if logs.is_dir():
            shutil.rmtree(checkout.root / "last-logs", ignore_errors=True)
            shutil.copytree(logs.resolve(), checkout.root / "last-logs", ignore_dangling_symlinks=True)
    shutil.rmtree(checkout.run_dir, ignore_errors=True)


def end_all() -> None:
    """Whatever an earlier run that was killed has left."""
    for folder in HOME.iterdir() if HOME.is_dir() else ():
        if folder.is_dir() and processes.ours(Checkout(folder).run_dir):
            say(f"ending what an earlier run left of {folder.name}")
            end(Checkout(folder))


@contextlib.contextmanager
def cluster(
    name: str,
    content: Mapping[str, Any],
    *,
    app: str = "deployments.app:build",
    python: str = sys.executable,
    env: Mapping[str, str] | None = None,
    ray_defaults: bool = False,
    timeout_s: float = 600,
) -> Iterator[Running]:
    """A local cluster with `app` built from `content`. It is gone when this ends, however it ends.

    Started as scripts/up starts one, in a process of its own: Ray's driver keeps too much of its last cluster.
    """
    checkout = _checkout(name)
    end(checkout)
    file = checkout.root / "fleet.json"
    file.write_text(json.dumps(content, indent=2))
    port = pick_port(None)
    command = [python, "-m", "bench.up", str(checkout.root), str(file), str(port), app]
    try:
        with (checkout.root / "up.log").open("w") as log:
            done = subprocess.run(
                [*command, *(["--ray-defaults"] if ray_defaults else []), "--timeout", str(timeout_s)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ray's workers inherit the path, and find the benchmark's own deployments by it.
                env={**os.environ, "PYTHONPATH": str(_LIB), **(env or {})},
                cwd=checkout.root,
                check=False,
            )
        if done.returncode:
            tail = "\n".join((checkout.root / "up.log").read_text().splitlines()[-15:])
            raise BenchError(
                f"the cluster {name} did not start (all of it is in {checkout.root}/up.log):\n{tail}"
            )
        yield Running(checkout, port)
    finally:
        end(checkout)


@contextlib.contextmanager
def marked(name: str) -> Iterator[tuple[Checkout, dict[str, str]]]:
    """For processes without Ray: a run directory, and the environment by which they are found and ended."""
    checkout = _checkout(name)
    end(checkout)
    checkout.run_dir.mkdir(mode=0o700, exist_ok=True)
    try:
        yield checkout, {**os.environ, MARK: str(checkout.run_dir), "SPT_NOENV": "1"}
    finally:
        end(checkout)


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float, every_s: float = 0.25) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError, ValueError, LookupError):
            if condition():
                return
        if time.monotonic() > deadline_s:
            raise BenchError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(every_s)


def host_status(run_dir: Path) -> Any:
    """What the engine host of a cluster says of itself. Raises OSError while there is none."""
    import socket

    path = next(iter(run_dir.rglob("host.sock")), None)
    if path is None:
        raise FileNotFoundError("host.sock")
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rwb") as stream:
        connection.connect(str(path))
        stream.write(b'{"op":"status"}\n')
        stream.flush()
        return json.loads(stream.readline())


def wait_for_templates(run_dir: Path, timeout_s: float = 300) -> None:
    """Until the node's template is there, and each model's is ready or will not be."""

    def ready() -> bool:
        status = host_status(run_dir)
        if any(m["template"]["state"] == "failed" for m in status["models"]):
            raise BenchError(f"a model's template failed: {status['models']}")
        return bool(
            status["template"]["ready"]
            and status["models"]
            and all(m["template"]["state"] in ("ready", "off") for m in status["models"])
        )

    wait_for("templates", ready, timeout_s)


def wait_until_dark(running: Running, *, parked: bool = False, settle_s: float = 2.0) -> None:
    """0 replicas, and no engine but a parked one where one is wanted; then `settle_s` for the machine to calm down."""

    def dark() -> bool:
        model = running.status()["models"][0]
        engines = [e for n in running.status()["nodes"] for e in n["engines"]]
        commands = [p.command for p in running.processes()]
        wanted = ["parked"] if parked else []
        return (
            not model["replicas"]
            and not any(model["replicas_by_state"].values())
            and [e["state"] for e in engines] == wanted
            and sum(c.startswith("relight-engine") for c in commands) == len(wanted)
            and not any("ServeReplica:default:model-" in c for c in commands)
        )

    wait_for("the model does not go dark" if not parked else "no engine is parked", dark, 120, 0.5)
    time.sleep(settle_s)


def worker() -> None:
    """For the processes of a pool: they are ended by their parent, without a word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
