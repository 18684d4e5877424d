"""What every forked engine does, whichever template it came from: detach, report, be held, serve vLLM's own server."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from deployments.engine.keeper import Keeper

# A killed host is back within seconds; a replica that was to hold this engine may still be downloading its image.
HOLDER_GRACE_S = 10.0
FIRST_HOLDER_GRACE_S = 60.0

# vLLM says in its log how long its phases took. A message that no longer matches costs a phase its row, nothing else.
_PHASE_LOGS = (
    ("config", "Initializing a V1 LLM engine", ""),
    ("weights", "Loading weights took", r"took ([\d.]+) s"),
    ("warm_up", "init engine (profile, create kv cache, warmup model) took", r"took ([\d.]+) s"),
)
_ROOT_CAUSE = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)): (.+)$")
# As argparse prints it; its own source, in the traceback below, is indented.
_ARGPARSE_ERROR = re.compile(r"^\S.*: error: (.+)$")


class StatusReporter:
    """Writes the engine's phases and failure to the host. One line each, so that forked children may share it."""

    def __init__(self, fd: int, requested_s: float) -> None:
        self._fd = fd
        self._last_s = requested_s
        self._lock = threading.Lock()

    def phase(self, name: str, duration_s: float | None = None) -> None:
        """Phase `name` ended now; it took `duration_s`, or as long as it is since the last phase ended."""
        now_s = time.time()
        with self._lock:
            start_s = self._last_s if duration_s is None else now_s - duration_s
            self._last_s = now_s
        self._write({"event": "phase", "name": name, "start_s": start_s, "duration_s": now_s - start_s})

    def failed(self, reason: str) -> None:
        self._write({"event": "failed", "reason": reason})

    def event(self, name: str, **values: Any) -> None:
        self._write({"event": name, **values})

    def _write(self, message: Mapping[str, Any]) -> None:
        try:
            os.write(self._fd, json.dumps(message).encode() + b"\n")
        except OSError:
            # The host died; its successor learns what it needs from the registry and from our sockets.
            return


def watch_phase_logs(reporter: StatusReporter) -> None:
    """Report the phases that vLLM's log tells of, in this process and in those that it forks.

    By the factory of log records, not by a handler: vLLM sets its handlers anew with every engine's configuration.
    """
    make = logging.getLogRecordFactory()

    def make_and_look(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if record.name.startswith("vllm"):
            for name, start, seconds in _PHASE_LOGS:
                if str(record.msg).startswith(start):
                    found = re.search(seconds, record.getMessage()) if seconds else None
                    reporter.phase(name, float(found[1]) if found else None)
        return record

    logging.setLogRecordFactory(make_and_look)


def root_cause(error: BaseException, log: Path) -> str:
    """The engine's own reason: the first exception of its log's last traceback, or the error itself.

    vLLM's API server only says that its engine core failed; the reason stands in the core's log, above.
    """
    lines = _tail(log)
    if isinstance(error, SystemExit):
        for line in reversed(lines):
            if found := _ARGPARSE_ERROR.search(line):
                return found[1].strip()
    own = "".join(traceback.format_exception_only(error)).strip()
    if isinstance(error, SystemExit) or "See root cause above" in own:
        causes = [f"{m[1]}: {m[2].strip()}" for line in lines if (m := _ROOT_CAUSE.search(line))]
        causes = [c for c in causes if "See root cause above" not in c and not c.startswith("SystemExit")]
        if causes:
            return causes[-1]
    return own or type(error).__name__


def _tail(log: Path, size_bytes: int = 1 << 16) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - size_bytes))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def run_engine(
    message: Mapping[str, Any],
    http: socket.socket,
    control: socket.socket,
    status_fd: int,
    serve: Callable[[socket.socket, StatusReporter], None],
) -> NoReturn:
    """The forked child: becomes an engine and never returns.

    `message` is the host's fork message: engine_id, log, env, gpu_ids, requested_s.
    """
    code = 1
    log = Path(message["log"])
    reporter = StatusReporter(status_fd, message["requested_s"])
    try:
        # Its own process group: the keeper and the host end it with all that it started.
        os.setsid()
        reporter.event("born", pid=os.getpid())
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        os.close(log_fd)
        _name_process(f"relight-engine {message['model']} {message['engine_id']}")
        os.environ.update(message["env"])
        # Also where it is none: the host has the environment of who started it, maybe a replica with devices.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(message["gpu_ids"])
        Keeper(
            control, message["engine_id"], grace_s=HOLDER_GRACE_S, first_grace_s=FIRST_HOLDER_GRACE_S
        ).start()
        reporter.phase("fork")
        serve(http, reporter)
        code = 0
    except BaseException as error:  # noqa: BLE001 - this is the process's last frame: every end is reported
        traceback.print_exc()
        sys.stderr.flush()
        reporter.failed(root_cause(error, log))
    finally:
        # Not sys.exit: the template's exit handlers and threads are not ours to run.
        os._exit(code)


def _name_process(title: str) -> None:
    try:
        import setproctitle
    except ImportError:
        return
    setproctitle.setproctitle(title)


def parse_arguments(argv: list[str]) -> Any:
    """What vLLM's command line makes of `argv`, but `seed` is None where the user gives none. Exits if it is wrong."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    parser.set_defaults(seed=None)
    args = parser.parse_args(argv)
    validate_parsed_serve_args(args)
    return args


def start_seed(given: int | None) -> int:
    """The seed of one start: what the user gave, or drawn.

    vLLM's default is the same at each start, and here each wake is one. It has to be vLLM's argument, and not the
    state of a generator, where several processes run a model: they must all draw the same.
    """
    return secrets.randbits(32) if given is None else given


def serve_forked(argv: list[str], http: socket.socket, reporter: StatusReporter) -> None:
    """Serve vLLM's own OpenAI server on `http`, as its command line would: the plain start.

    Stands on vLLM's command line and on the server function behind it, nothing deeper.
    """
    import uvloop
    from vllm.entrypoints.launchers.api_server import entry

    watch_phase_logs(reporter)
    _fork_on_cpu()
    args = parse_arguments(argv)
    args.seed = start_seed(args.seed)
    uvloop.run(entry.run_server_worker(f"unix:{http.getsockname()}", http, args))


def _fork_on_cpu() -> None:
    """Let vLLM fork its engine core on a CPU, where its platform code insists on spawn and so on importing all again.

    A version of vLLM that keeps this elsewhere starts slower, and still starts.
    """
    import multiprocessing

    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    # One executor process less: the engine core runs the model itself.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and "get_mp_context" in vars(module):
            module.get_mp_context = lambda: multiprocessing.get_context("fork")  # type: ignore[attr-defined]
