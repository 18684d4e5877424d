"""A node's template without torch and vLLM: forks tiny HTTP servers, at once. Run by the host in place of its own.

What an engine does is said by its environment: STUB_FAIL (it can't start, for this reason), STUB_SLOW_S (how long until
it is ready), STUB_CRASH (it ends at once, without a word), STUB_FAIL_MAPPED (it can't be built from mapped weights, for
this reason), STUB_FAIL_TEMPLATE (its template can't be built, for this reason), STUB_BUILDS (a file that gets a line
for each build of it), STUB_METRICS (the file of its metrics page). What the node's vLLM is for is STUB_DEVICE of the
host's own. A model's own template is one more of these processes, with a flat file of its own.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NoReturn

from deployments.engine import prebuilt
from deployments.engine.process import StatusReporter
from deployments.engine.protocol import send_with_fds
from deployments.engine.template import serve_channel


class _Handler(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        body = json.dumps({"path": self.path, "pid": os.getpid(), "devices": devices}).encode()
        if self.path == "/metrics" and (page := os.environ.get("STUB_METRICS")):
            body = Path(page).read_bytes()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _answer

    def address_string(self) -> str:
        return "unix"


class _Server(HTTPServer):
    def __init__(self, listener: socket.socket) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, _ = self.socket.accept()
        return connection, ("unix", 0)


def serve(message: Mapping[str, Any], http: socket.socket, reporter: StatusReporter) -> None:
    """The engine: as its environment says. It leaves a file where vLLM's processes meet, as vLLM does."""
    (Path(os.environ["VLLM_RPC_BASE_PATH"]) / "left-behind").touch()
    if os.environ.get("STUB_CRASH"):
        os._exit(9)
    if reason := os.environ.get("STUB_FAIL"):
        raise RuntimeError(reason)
    if message.get("flat") and (reason := os.environ.get("STUB_FAIL_MAPPED")):
        raise RuntimeError(reason)
    time.sleep(float(os.environ.get("STUB_SLOW_S", "0")))
    reporter.phase("weights")
    _Server(http).serve_forever()


def model_template(message: Mapping[str, Any], channel: socket.socket) -> NoReturn:
    """Built at once, from no weights; noted, and refused, as the model's environment says."""
    environment = message["env"]
    if builds := environment.get("STUB_BUILDS"):
        with Path(builds).open("a") as file:
            file.write("built\n")
    if reason := environment.get("STUB_FAIL_TEMPLATE"):
        send_with_fds(channel, {"event": "template_failed", "reason": reason})
        os._exit(1)
    Path(message["log"]).touch()
    flat = Path(message["flat_dir"]) / f"{message['model']}.weights"
    flat.parent.mkdir(parents=True, exist_ok=True)
    flat.touch()
    ready = {"event": "template_ready", "seconds": 0.0, "threads": 1, "flat": str(flat)}
    send_with_fds(channel, ready)
    serve_channel(channel, serve)


def main() -> None:
    """Ready at once."""
    prebuilt.model_template = model_template
    channel = socket.socket(fileno=int(sys.argv[1]))
    ready = {"event": "template_ready", "seconds": 0.0, "threads": 1}
    send_with_fds(channel, {**ready, "device": os.environ.get("STUB_DEVICE", "cpu")})
    serve_channel(channel, serve)


if __name__ == "__main__":
    main()
