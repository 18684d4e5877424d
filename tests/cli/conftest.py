"""A control API on a real local HTTP server, and commands that are run against it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from typer.testing import CliRunner

from autoscaling.cli import app
from tests.control.lab import TOKEN, Lab


class Cluster(Lab):
    """A lab behind HTTP, as the gateway serves it, and the commands that talk to it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.asked: list[tuple[str, str]] = []
        self.instead: tuple[int, bytes] | None = None
        """Answered in place of the control API."""
        lab = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                url = urlsplit(self.path)
                lab.asked.append((self.command, unquote(url.path)))
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                # Like the gateway: the path is decoded before it is passed on.
                status, document = lab.control.handle(
                    self.command,
                    unquote(url.path),
                    dict(parse_qsl(url.query)),
                    body,
                    self.headers.get("authorization"),
                )
                if lab.instead is not None:
                    status, raw = lab.instead
                else:
                    raw = json.dumps(document, allow_nan=False).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_PUT = do_POST = do_DELETE = _answer

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.environ = {
            "RELIGHT_ADDRESS": self.address,
            "RELIGHT_TOKEN": TOKEN,
            "RELIGHT_DATA": str(folder / "data"),
            "RELIGHT_WHO": "ann@lab",
            "TZ": "Europe/Berlin",
            "COLUMNS": "200",
            "HOME": str(folder),
        }

    def run(self, *arguments: str, **environ: str) -> Any:
        """The result of `relight ARGUMENTS`."""
        return CliRunner().invoke(app, list(arguments), env={**self.environ, **environ})

    def says(self, *arguments: str, **environ: str) -> str:
        """What it prints; it must be done."""
        result = self.run(*arguments, **environ)
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    def json(self, *arguments: str) -> Any:
        """What it prints with --json."""
        return json.loads(self.says(*arguments, "--json"))

    def fails(self, code: int, *arguments: str, **environ: str) -> str:
        """What it says on stderr; stdout is empty."""
        result = self.run(*arguments, **environ)
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        return str(result.stderr)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    from autoscaling.commands import times

    cluster = Cluster(tmp_path)
    # The commands' clock is the controller's.
    from datetime import datetime

    monkeypatch.setattr(
        times, "now", lambda: datetime.fromtimestamp(cluster.clock.now_s(), times.local_zone())
    )
    thread = threading.Thread(target=cluster.server.serve_forever, args=(0.01,))
    thread.start()
    yield cluster
    cluster.server.shutdown()
    thread.join()
    cluster.server.server_close()
    cluster.store.close()


@pytest.fixture
def library_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The C library remembers TZ; it is told when that is as it was."""
    with monkeypatch.context() as patched:
        patched.delenv("TZ", raising=False)
        yield
    time.tzset()
