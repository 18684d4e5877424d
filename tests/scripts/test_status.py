"""`relight status` against a gateway that a test answers for."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from autoscaling.commands import status
from autoscaling.commands.failures import Commands
from deployments.local.state import Checkout

ANSWER: dict[str, Any] = {
    "models": [
        {
            "id": "smollm2",
            "aliases": ["small", "[bold]"],
            "state": "ready",
            "replicas": 1,
            "queued": 0,
            "in_flight": 3,
            "last_cold_start": {
                "kind": "fork",
                "total_s": 2.314,
                "phases": [
                    {"name": "load", "start_s": 0.9, "duration_s": 1.2},
                    {"name": "place", "start_s": 0.0, "duration_s": 0.9},
                    {"name": "nothing", "start_s": 0.0, "duration_s": 0.0},
                ],
            },
            "reason": "someone asked",
        },
        {"id": "dark-one", "aliases": [], "state": "dark", "replicas": 0, "queued": 0, "in_flight": 0},
    ],
    "nodes": [{}],
    "gateways": 2,
}


class Gateway:
    def __init__(self) -> None:
        self.code = 200
        self.body = json.dumps(ANSWER)
        self.address = ""


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    state = Gateway()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(state.code if self.path == "/relight/v1/status" else 404)
            self.end_headers()
            self.wfile.write(state.body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def run(*arguments: str, columns: str | None = "160") -> Any:
    app = typer.Typer(cls=Commands)
    app.callback()(lambda: None)
    status.register(app)
    return CliRunner().invoke(app, ["status", *arguments], env={"COLUMNS": columns})


def test_the_table_shows_every_model(gateway: Gateway) -> None:
    result = run("--address", gateway.address + "/")
    assert result.exit_code == 0, result.output
    assert "smollm2, small, [bold]" in result.output
    assert "2.31 s fork: place 0.90, load 1.20" in result.output
    assert "nothing" not in result.output
    assert "someone asked" in result.output
    assert "1 node, 2 gateways" in result.output


def test_what_ails_the_controller_is_below_the_table(gateway: Gateway) -> None:
    """Models serve without it, so that the table alone looks well."""
    health = {
        "ok": False,
        "store": {"ok": False, "error": "disk I/O error"},
        "forecaster": {"ok": True, "error": None},
        "errors": {"warm smollm2": "there is no [template]"},
    }
    gateway.body = json.dumps({**ANSWER, "controller": health})
    said = run("--address", gateway.address).output.splitlines()
    assert [line.rstrip() for line in said[-2:]] == [
        "controller: store: disk I/O error",
        "controller: warm smollm2: there is no [template]",
    ]
    gateway.body = json.dumps({**ANSWER, "controller": {**health, "ok": True}})
    assert "controller" not in run("--address", gateway.address).output


def test_json_is_what_the_gateway_said(gateway: Gateway) -> None:
    assert json.loads(run("--json", "--address", gateway.address).output) == ANSWER


def test_a_proxy_in_the_environment_is_not_asked(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert run("--address", gateway.address).exit_code == 0


def test_where_nothing_answers_one_line_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    result = run("--address", address)
    assert result.exit_code == 3
    assert result.output == f"Nothing answers at {address}; scripts/up starts it.\n"


@pytest.mark.parametrize(
    ("code", "body"), [(404, "{}"), (500, "{}"), (200, "<html>"), (200, "[]"), (200, '{"models": 1}')]
)
def test_something_else_on_the_port_is_told_apart(gateway: Gateway, code: int, body: str) -> None:
    gateway.code, gateway.body = code, body
    result = run("--address", gateway.address)
    assert result.exit_code == 3
    assert "answers, but not as Relight does" in result.output


@pytest.mark.parametrize(
    "address", ["localhost:8000", "http://", "http://127.0.0.1:abc", "http://a b", "http://[a"]
)
def test_what_is_no_address_is_a_wrong_value(address: str) -> None:
    result = run("--address", address)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is not an address" in result.stderr and "http://" in result.stderr


def test_what_speaks_no_http_is_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        result = run("--address", f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    assert result.exit_code == 3
    assert "answers, but not as Relight does" in result.stderr


def test_a_watch_for_programs_goes_on_after_a_restart(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that restarts ends no watch; what is wrong is said once, and not among the JSON."""
    codes = iter([503, 503, 200])

    def second_later(_: float) -> None:
        code = next(codes, None)
        if code is None:
            raise KeyboardInterrupt
        gateway.code = code

    monkeypatch.setattr(status.time, "sleep", second_later)
    result = run("--watch", "--json", "--address", gateway.address)
    assert result.exit_code == 0
    assert [json.loads(line) for line in result.stdout.splitlines()] == [ANSWER, ANSWER]
    assert result.stderr.count("HTTP 503") == 1


def test_a_watch_breaks_no_line_for_who_reads_lines(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", interrupted)
    why = "it waits for a node " * 10
    gateway.body = json.dumps({**ANSWER, "models": [{**ANSWER["models"][0], "reason": why}]})
    result = run("--watch", "--address", gateway.address, columns=None)
    assert result.exit_code == 0
    _, row, _ = result.stdout.splitlines()
    assert row.startswith("smollm2") and row.rstrip().endswith(why.rstrip())


def test_the_default_address_is_the_port_that_one_chose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Checkout, "here", lambda: Checkout(tmp_path))
    monkeypatch.delenv("RELIGHT_ADDRESS", raising=False)
    monkeypatch.delenv("RELIGHT_PORT", raising=False)
    assert status.default_address() == "http://127.0.0.1:8000"
    monkeypatch.setenv("RELIGHT_PORT", "8123")
    assert status.default_address() == "http://127.0.0.1:8123"
    monkeypatch.setenv("RELIGHT_ADDRESS", "http://gpu-box:8000")
    assert status.default_address() == "http://gpu-box:8000"
