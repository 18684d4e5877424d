"""Serve's own commands, as the README shows them, on a cluster that was started by hand."""

from __future__ import annotations

import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deployments.local import processes
from deployments.local.serving import head_env
from deployments.local.state import NODE_ADDRESS, Checkout, pick_port
from tests.fakes.otlp import OtlpReceiver, Received, Span
from tests.live.conftest import CHAT, EMBED, scaling
from tests.live.lab import ROOT, Relight, kill, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
SERVE = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()"]


class ByHand:
    """A Ray with a dashboard, and Serve's commands for it."""

    def __init__(self, root: Path, collector: OtlpReceiver) -> None:
        self.checkout = Checkout(root)
        self.checkout.make_dirs()
        self.root = root
        self.relight = Relight(root)
        self.ray_port, self.dashboard_port = pick_port(None), pick_port(None)
        self.environment = {
            **head_env(self.checkout),
            "RELIGHT_DATA": str(root / "data"),
            "PYTHONPATH": str(ROOT),
            "RAY_ADDRESS": f"{NODE_ADDRESS}:{self.ray_port}",
            "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{self.dashboard_port}",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }
        fleet = {
            "models": [
                {"id": "embed", **EMBED, "scaling": scaling()},
                {"id": "chat", **CHAT, "scaling": scaling()},
            ],
            "engine_host": {"prebuilt": "off"},
        }
        (root / "fleet.yaml").write_text(yaml.safe_dump(fleet))

    def run(self, *command: str, environment: dict[str, str] | None = None) -> str:
        """A command to its end."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=environment or self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def start(self) -> None:
        """`ray start`, then Serve's proxy on a port of ours."""
        without = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        self.run(
            *(*RAY, "start", "--head", f"--node-ip-address={NODE_ADDRESS}", f"--port={self.ray_port}"),
            *("--include-dashboard=true", f"--dashboard-port={self.dashboard_port}", "--num-cpus=8"),
            *("--disable-usage-stats", f"--temp-dir={self.checkout.run_dir / 'ray'}"),
            *(f"--ray-client-server-port={pick_port(None)}", "--dashboard-agent-listen-port=0"),
            *("--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=200000000"),
            environment=without,
        )
        self.run(*SERVE, "start", "--http-host=127.0.0.1", f"--http-port={self.relight.port}")

    def serves(self) -> None:
        """The model answers."""
        until("the gateway", lambda: self.relight.request("GET", "/v1/models").status == 200)
        answer = self.relight.embed("embed")
        assert answer.status == 200, answer


@pytest.fixture
def collector() -> Iterator[OtlpReceiver]:
    """Where the standard OTEL_* variables send traces and metrics."""
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture
def by_hand(tmp_path: Path, collector: OtlpReceiver) -> Iterator[ByHand]:
    """The cluster, which ends with all that is marked as its own."""
    cluster = ByHand(tmp_path, collector)
    try:
        cluster.start()
        yield cluster
    finally:
        processes.end(cluster.checkout.run_dir)
        assert processes.ours(cluster.checkout.run_dir) == []
        shutil.rmtree(cluster.checkout.run_dir)


def traces_one_request(relight: Relight, received: Received) -> None:
    """The trace that the client began goes through the gateway, the wait and its phases, and vLLM."""
    trace_id, client_span_id = secrets.token_hex(16), secrets.token_hex(8)
    body = {"model": "chat", "prompt": "The capital of France is", "max_tokens": 4}
    headers = {"traceparent": f"00-{trace_id}-{client_span_id}-01"}
    assert relight.request("POST", "/v1/completions", body, headers).status == 200

    def spans() -> dict[str, Span]:
        return {s.name: s for s in list(received.spans) if s.trace_id == trace_id}

    def whole() -> dict[str, Span] | None:
        found = spans()
        return found if {"POST /v1/completions", "relight.wait", "llm_request"} <= set(found) else None

    found = until("the trace of one request", whole)
    request, wait, engine = (found[n] for n in ("POST /v1/completions", "relight.wait", "llm_request"))
    assert request.parent_id == client_span_id
    assert wait.parent_id == request.span_id
    phases = [s for s in found.values() if s.name.startswith("relight.cold_start.")]
    assert {s.parent_id for s in phases} == {wait.span_id}
    assert {"relight.cold_start.fork", "relight.cold_start.weights"} <= {s.name for s in phases}
    assert engine.parent_id in {s.span_id for s in found.values()}
    assert (request.resource["service.name"], request.attributes["gen_ai.request.model"]) == (
        "relight",
        "chat",
    )


def test_serve_run_and_serve_deploy(by_hand: ByHand, collector: OtlpReceiver) -> None:
    """`serve run` with a fleet file, traced; then `serve deploy` of a config file that names it."""
    running = subprocess.Popen(
        [*SERVE, "run", "deployments.app:build", "fleet=fleet.yaml"],
        cwd=by_hand.root,
        env=by_hand.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Where the tests run in the background of a shell, children inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads yet
    )
    by_hand.serves()
    traces_one_request(by_hand.relight, collector.received)
    (process,) = [p for p in processes.ours(by_hand.checkout.run_dir) if p.pid == running.pid]
    kill(process, signal.SIGINT)
    running.wait(60)

    config = by_hand.root / "serve.yaml"
    application = {
        "name": "default",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": {"fleet": str(by_hand.root / "fleet.yaml")},
    }
    http_options = {"host": "127.0.0.1", "port": by_hand.relight.port}
    document = {"proxy_location": "HeadOnly", "http_options": http_options, "applications": [application]}
    config.write_text(yaml.safe_dump(document))
    by_hand.run(*SERVE, "deploy", str(config))
    by_hand.serves()
    assert "RUNNING" in by_hand.run(*SERVE, "status")
