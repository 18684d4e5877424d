"""up and down of real clusters, with the smallest application in place of the fleet's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.local import processes
from deployments.local.http import get_json
from deployments.local.state import Checkout, pick_port

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

# `python -m deployments.local` for a checkout of the test's own: a cluster of this one stays as it is.
COMMAND = """
import sys
from pathlib import Path
from deployments.local import __main__ as command
from deployments.local.state import Checkout
Checkout.here = classmethod(lambda cls: cls(Path({root!r})))
sys.exit(command.main(sys.argv[1:]))
"""


class Local:
    """A checkout of the test's own, with its cluster."""

    def __init__(self, root: Path) -> None:
        self.checkout = Checkout(root)
        self.port = pick_port(None)
        self.fleet = root / "fleet.yaml"
        self.fleet.write_text("first")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        code = COMMAND.format(root=str(self.checkout.root))
        environment = {
            **os.environ,
            "RELIGHT_APP": "stub_app:build",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)]),
        }
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=environment,
            cwd=self.checkout.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, expect: int = 0) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == expect, output
        return output

    def up(self, *arguments: str, expect: int = 0) -> str:
        return self.run("up", "--fleet", str(self.fleet), "--port", str(self.port), *arguments, expect=expect)

    def get(self) -> Any:
        return get_json(f"http://127.0.0.1:{self.port}/anything", timeout_s=10)

    @property
    def pids(self) -> set[int]:
        return {process.pid for process in processes.ours(self.checkout.run_dir)}


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    local = Local(tmp_path)
    yield local
    local.run("down")
    assert local.pids == set()


@pytest.fixture
def foreign_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Another Ray of the same user on this machine; its environment is what a client of it needs."""
    # pytest's own folders are too deep for Ray's sockets.
    temporary = Path(f"/tmp/foreign-ray-{os.getpid()}")
    port = pick_port(None)
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"127.0.0.1:{port}"}
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    started = subprocess.Popen(
        [
            *(
                *ray,
                "start",
                "--head",
                "--block",
                "--num-cpus=1",
                f"--port={port}",
                f"--temp-dir={temporary}",
            ),
            *(
                "--include-dashboard=false",
                "--disable-usage-stats",
                f"--ray-client-server-port={pick_port(None)}",
            ),
            *("--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"),
        ],
        env={name: value for name, value in environment.items() if name != "RAY_ADDRESS"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert _foreign_ray_computes(environment)
    yield environment
    started.send_signal(signal.SIGTERM)
    started.wait(30)
    subprocess.run(["rm", "-rf", str(temporary)], check=True)


def _foreign_ray_computes(environment: dict[str, str]) -> bool:
    code = (
        "import ray; ray.init(log_to_driver=False, logging_level='ERROR');"
        "print(ray.get(ray.remote(lambda: 6 * 7).remote(), timeout=60))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=90, check=False
    )
    return done.stdout.strip() == "42"


def test_up_twice_at_once_up_again_changed_down_and_down_again(
    local: Local, foreign_ray: dict[str, str]
) -> None:
    """One cluster, whose life leaves another Ray of this machine alone."""
    arguments = ("up", "--fleet", str(local.fleet), "--port", str(local.port))
    both = [local.start(*arguments), local.start(*arguments)]
    outputs = [process.communicate(timeout=120)[0] for process in both]

    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("which is at work on this checkout" in output for output in outputs) == 1
    assert sum("Starting Ray: done" in output for output in outputs) == 1
    state = json.loads((local.checkout.state_dir / "cluster.json").read_text())
    assert state["port"] == local.port
    for output in outputs:
        assert f"Relight is up at http://127.0.0.1:{local.port}" in output
        assert '"model": "stub"' in output
    assert local.get()["fleet"] == "first"

    before = local.pids
    output = local.up()
    assert "Relight is up" in output
    assert "Starting Ray" not in output
    assert local.pids == before

    local.fleet.write_text("second")
    local.up()
    assert local.get()["fleet"] == "second"

    assert "--port" in local.run("up", "--fleet", str(local.fleet), "--port", "1", expect=1)

    assert "done" in local.run("down")
    assert local.pids == set()
    assert not local.checkout.run_dir.exists()
    assert (local.checkout.state_dir / "last-logs").is_dir()
    assert local.run("down") == "Nothing is up.\n"
    assert _foreign_ray_computes(foreign_ray)


def test_an_up_that_was_killed_is_repaired_by_the_next(local: Local) -> None:
    first = local.start("up", "--fleet", str(local.fleet), "--port", str(local.port))
    deadline = time.monotonic() + 60
    while not local.pids and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()
    first.communicate()
    assert local.pids

    local.up()
    assert local.get()["fleet"] == "first"


def test_an_application_that_cannot_start_says_why(local: Local) -> None:
    local.fleet.write_text("broken")
    output = local.up(expect=1)
    assert "scripts/up: the application does not start" in output
    assert "this fleet is broken" in output

    local.fleet.write_text("mended")
    local.up()
    assert local.get()["fleet"] == "mended"
