"""A whole Relight of the test's own: real Ray, real engines, real models, asked over HTTP.

`Relight` is a local cluster in a folder of its own, so that one of this checkout stays as it is. Nothing here sleeps
for a time that something is hoped to take: `until` asks until what is waited for is so, and says what was so when it
gave up.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from deployments.local import processes
from deployments.local.processes import Process
from deployments.local.serving import head_env
from deployments.local.state import Checkout, Cluster, pick_port

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 90.0

COMMAND = """
import sys
from pathlib import Path
from deployments.local import __main__ as command
from deployments.local.state import Checkout
Checkout.here = classmethod(lambda cls: cls(Path({root!r})))
sys.exit(command.main(sys.argv[1:]))
"""

T = TypeVar("T")


def until(
    what: str, look: Callable[[], T | bool | None], *, patience_s: float = PATIENCE_S, every_s: float = 0.1
) -> T:
    """What `look` returns once that is neither None nor False; fails, with what was last, after `patience_s`."""
    deadline_s = time.monotonic() + patience_s
    last: object = None
    while True:
        try:
            last = look()
            if last is not None and last is not False:
                return last  # type: ignore[return-value]
        except (OSError, LookupError, AssertionError, http.client.HTTPException) as error:
            last = error
        if time.monotonic() > deadline_s:
            raise AssertionError(f"waited {patience_s:.0f} s in vain for: {what} (last: {last!r})")
        time.sleep(every_s)


@dataclass(frozen=True)
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """The first header of that name."""
        return next((v for k, v in self.headers if k.lower() == name), None)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class UnixConnection(http.client.HTTPConnection):
    """To a server on a unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("engine", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """One request, one whole answer."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json"} if data else {}
    try:
        connection.request(method, target, data, {**sent, **(headers or {})})
        response = connection.getresponse()
        return Answer(response.status, response.getheaders(), response.read())
    finally:
        connection.close()


class Relight:
    """A local cluster of the test's own; `up` starts it or brings a changed fleet to it."""

    def __init__(self, root: Path) -> None:
        self.checkout = Checkout(root)
        self.fleet_file = root / "fleet.yaml"
        self.data = root / "data"
        self.port = pick_port(None)
        self._ray_side: subprocess.Popen[str] | None = None

    # Its life

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """One of `scripts/up` and `scripts/down`, running."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RELIGHT_DATA": str(self.data)}
        for name in ("RELIGHT_APP", "RELIGHT_CONTROL_TOKEN", "RELIGHT_TOKEN"):
            environment.pop(name, None)
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND.format(root=str(self.checkout.root)), *arguments],
            env=environment,
            cwd=self.checkout.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> str:
        """The same, to its end; returns what it printed."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        return output

    def up(self, fleet: Mapping[str, Any]) -> str:
        """Bring this fleet up."""
        self.fleet_file.write_text(yaml.safe_dump(dict(fleet), sort_keys=False))
        return self.run("up", "--fleet", str(self.fleet_file), "--port", str(self.port))

    def down(self) -> None:
        """End it all."""
        if self._ray_side is not None:
            self._ray_side.kill()
            self._ray_side.wait()
            self._ray_side = None
        self.run("down")

    @property
    def cluster(self) -> Cluster:
        cluster = self.checkout.load()
        assert cluster is not None
        return cluster

    @property
    def environment(self) -> dict[str, str]:
        """That of `ray start`, for a command of Ray's or Serve's on this cluster."""
        return {**head_env(self.checkout), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": self.cluster.ray_address}

    def ray(self, question: str) -> Any:
        """See `ray_side.answer`."""
        if self._ray_side is None:
            # Without the mark: what asks the cluster is no part of it.
            environment = {k: v for k, v in self.environment.items() if not k.startswith("RELIGHT_")}
            self._ray_side = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("ray_side.py")), self.cluster.ray_address],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._ray_side.stdin is not None and self._ray_side.stdout is not None
        self._ray_side.stdin.write(question + "\n")
        self._ray_side.stdin.flush()
        for line in self._ray_side.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise AssertionError(f"nobody answered {question!r}")

    # Its processes

    def processes(self, title: str = "") -> list[Process]:
        """Those whose command line holds `title`."""
        return [p for p in processes.ours(self.checkout.run_dir) if title in p.command]

    def engines(self, model: str = "") -> list[Process]:
        """Processes that serve a model."""
        return self.processes(f"relight-engine {model}")

    def process(self, title: str) -> Process:
        """The one that is called so, once there is one."""
        return until(f"a process {title!r}", lambda: next(iter(self.processes(title)), None))

    # HTTP

    def request(
        self,
        method: str,
        target: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 120.0,
    ) -> Answer:
        """One request to the gateway."""
        return ask(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s),
            method,
            target,
            body,
            headers,
        )

    def complete(self, model: str, prompt: str = "The capital of France is", **options: Any) -> Answer:
        """A completion at temperature 0."""
        body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, **options}
        return self.request("POST", "/v1/completions", body)

    def embed(self, model: str, text: str = "One, two, three") -> Answer:
        """An embedding."""
        return self.request("POST", "/v1/embeddings", {"model": model, "input": text})

    @contextlib.contextmanager
    def stream(
        self, body: Mapping[str, Any], target: str = "/v1/completions"
    ) -> Iterator[http.client.HTTPResponse]:
        """A streamed answer; leaving the block hangs up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            data = json.dumps({**body, "stream": True})
            connection.request("POST", target, data, {"content-type": "application/json"})
            yield connection.getresponse()
        finally:
            # The socket itself: a response that is not read to its end holds it open.
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()

    @staticmethod
    def first_event(response: http.client.HTTPResponse) -> bytes:
        """The first line of data: comments tell of the wait before it, for as long as there is one."""
        for line in response:
            if line.strip() and not line.startswith(b":"):
                return line
        raise AssertionError("the stream ended without data")

    # Its state

    def status(self) -> Any:
        answer = self.request("GET", "/relight/v1/status", timeout_s=20)
        assert answer.status == 200, answer
        return answer.json

    def control(self, method: str, route: str, body: Any = None) -> Any:
        """The answer of the control API, asked with the cluster's own token."""
        token = (self.data / "control-token").read_text().strip()
        answer = self.request(
            method, f"/relight/v1/{route}", body, {"authorization": f"Bearer {token}"}, timeout_s=30
        )
        assert answer.status == 200, answer
        return answer.json

    def model(self, model: str) -> Any:
        """The model's row of the status."""
        return next(m for m in self.status()["models"] if m["id"] == model)

    def engine(self, model: str) -> Any:
        """The model's engine in the status; None if it has none."""
        found = [e for n in self.status()["nodes"] for e in n["engines"] if e["model"] == model]
        return found[0] if found else None

    def ready_engine(self, model: str) -> Any:
        """The engine of a model that is lit, once a replica holds it."""

        def look() -> Any:
            engine = self.engine(model)
            return engine if engine and engine["state"] == "ready" and engine["held"] else None

        return until(f"an engine of {model} that is ready", look)

    def templates_ready(self, *models: str) -> None:
        """Wait until these models start from templates of their own."""

        def built() -> bool:
            found = {
                t["model"]: t["state"]
                for node in self.status()["nodes"]
                for t in node["templates"]
                if t["pid"]
            }
            return all(found.get(model) == "ready" for model in models)

        until(f"templates of {models}", built, patience_s=180)

    def dark(self, *models: str, state: str = "dark") -> None:
        """Wait until these models are dark: no replica, and no engine but a parked one."""
        for model in models:

            def look(model: str = model) -> bool:
                row, engine = self.model(model), self.engine(model)
                replicas = sum(row["replicas_by_state"].values())
                return row["state"] == state and not replicas and (engine is None or engine["state"] == state)

            until(f"{model} to be {state}", look)
            if state == "dark":
                until(f"{model} to have no engine process", lambda model=model: not self.engines(model + " "))

    def engine_metric(self, model: str, name: str) -> float:
        """A metric of vLLM's own, from the engine itself."""
        page = ask(UnixConnection(self.ready_engine(model)["http"], 20), "GET", "/metrics").body.decode()
        lines = [line for line in page.splitlines() if line.startswith(name)]
        assert lines, page
        return sum(float(line.rpartition(" ")[2]) for line in lines)


def _is_gone(pid: int) -> bool:
    """Or has only not been waited for yet, which may be for a process that has other things to do."""
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True


def kill(process: Process, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process, and wait for its end if that was SIGKILL."""
    descriptor = os.pidfd_open(process.pid)
    try:
        signal.pidfd_send_signal(descriptor, number)
        if number is signal.SIGKILL:
            until(f"{process.command} to be gone", lambda: _is_gone(process.pid))
    finally:
        os.close(descriptor)
