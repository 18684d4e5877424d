"""What the node's template does to vLLM before it forks, and what each start draws anew."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from deployments.engine import prebuilt, process, template
from deployments.engine.process import StatusReporter
from deployments.engine.protocol import receive_with_fds

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

REGISTRY = "vllm.model_executor.models.registry"


def module(monkeypatch: pytest.MonkeyPatch, name: str, **values: Any) -> ModuleType:
    """A module of that name, imported as far as anyone can tell."""
    made = ModuleType(name)
    vars(made).update(values)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def fail() -> None:
    raise ValueError("no such class")


def test_work_is_done_in_another_process() -> None:
    """And its result comes back, however large."""
    pid, data = template.run_in_fork(lambda: (os.getpid(), b"x" * 2_000_000))
    assert pid != os.getpid() and len(data) == 2_000_000


@pytest.mark.parametrize("work", [fail, lambda: os._exit(3), lambda: lambda: None])
def test_a_fork_that_returns_nothing(work: Callable[[], Any]) -> None:
    """It raised, it ended, or its result can't be pickled."""
    with pytest.raises(ChildProcessError, match="without a result"):
        template.run_in_fork(work)


def test_models_are_looked_at_in_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own way, a Python of its own, is left for what does not work so."""
    registry = module(monkeypatch, REGISTRY, _run_in_subprocess=lambda work: "a new Python")
    template._inspect_in_forks()
    assert registry._run_in_subprocess(os.getpid) not in (os.getpid(), "a new Python")
    assert registry._run_in_subprocess(fail) == "a new Python"


def test_all_starts_keep_kernels_in_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own, or Triton's usual one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    template._keep_kernels_together()
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("HOME", "/home/somebody")
    template._keep_kernels_together()
    assert os.environ["TRITON_CACHE_DIR"] == "/home/somebody/.triton/cache"


def test_spans_have_ids_that_no_seed_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every process that is forked from a template."""

    def ids() -> set[int]:
        template.preload()
        random.seed(0)
        span = TracerProvider().get_tracer("vllm").start_span("request").get_span_context()
        return {span.trace_id, span.span_id}

    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_type="")
    module(monkeypatch, "vllm.platforms", current_platform=platform)
    monkeypatch.setattr(template, "PRELOAD", ())
    assert len(template.run_in_fork(ids) | template.run_in_fork(ids)) == 4


def test_a_thread_that_is_ending_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was joined may still be there for the kernel; one that stays is told of."""
    before, ends = len(list(Path("/proc/self/task").iterdir())), threading.Event()
    thread = threading.Thread(target=ends.wait)
    thread.start()
    monkeypatch.setattr(prebuilt, "THREADS_END_S", 0.0)
    assert not prebuilt.threads_end(before)
    monkeypatch.setattr(prebuilt, "THREADS_END_S", 60.0)
    monkeypatch.setattr(prebuilt.time, "sleep", lambda _: ends.set())
    assert prebuilt.threads_end(before)


def test_processes_have_titles_whichever_variable_comes_first() -> None:
    """Nobody says in which order a cluster's processes get them, and the search path is changed before."""
    code = (
        "import sys\nfrom types import ModuleType, SimpleNamespace\nfrom pathlib import Path\n"
        "from deployments.engine import process, template\n"
        "platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_type='')\n"
        "sys.modules['vllm'], found = ModuleType('vllm'), ModuleType('vllm.platforms')\n"
        "found.current_platform, sys.modules['vllm.platforms'] = platform, found\n"
        "template.PRELOAD = ()\ntemplate.preload()\nprocess._name_process('relight-engine m')\n"
        "print(Path('/proc/self/cmdline').read_text())"
    )
    root = str(Path(template.__file__).parents[2])
    environment = {"PATH": os.defpath, "SPT_NOENV": "1", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("relight-engine m"), done


def test_versions_that_keep_these_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, REGISTRY)
    template._inspect_in_forks()
    module(monkeypatch, "opentelemetry.sdk.trace.id_generator")
    template._unseeded_span_ids()
    monkeypatch.delitem(sys.modules, "opentelemetry.sdk.trace.id_generator")
    template._unseeded_span_ids()


def test_what_a_request_for_logprobs_needs_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wake would pay the compiler anew; vLLM's sampler has a name of its own for it."""
    torch = pytest.importorskip("torch")

    def rank(x: object) -> object:
        return x

    compiled = torch.compile(rank)
    name = "batched_count_greater_than"
    holders = [
        module(monkeypatch, of, **{name: compiled})
        for of in ("vllm.v1.sample.ops.logprobs", "vllm.v1.sample.sampler")
    ]
    for _ in range(2):  # plain already, it stays
        template._rank_uncompiled()
        assert [getattr(holder, name) for holder in holders] == [rank, rank]
    delattr(holders[1], name)
    template._rank_uncompiled()
    assert not hasattr(holders[1], name)


@pytest.mark.parametrize(
    ("can", "said", "is_set"), [(False, None, "0"), (False, "1", "1"), (True, None, None)]
)
def test_a_sampler_that_needs_a_compiler(
    monkeypatch: pytest.MonkeyPatch, can: bool, said: str | None, is_set: str | None
) -> None:
    """It is turned off where there is none, unless somebody has said what to do."""
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", said or "")  # so that it is taken back afterwards
    if said is None:
        monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER")
    for name in ("vllm", "vllm.utils"):
        module(monkeypatch, name)
    module(monkeypatch, "vllm.utils.flashinfer", has_flashinfer=lambda: can)
    template._choose_sampler()
    assert os.environ.get("VLLM_USE_FLASHINFER_SAMPLER") == is_set


def test_a_models_template_sees_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None was granted for it, whatever its environment says."""

    def build(*_: Any) -> None:
        raise RuntimeError(f"devices: {os.environ['CUDA_VISIBLE_DEVICES']!r}")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(prebuilt, "ModelTemplate", build)
    monkeypatch.setattr(prebuilt, "flat_name", lambda _: "tiny")
    message = {"model": "tiny", "argv": [], "env": {}, "threads": 1, "flat_dir": ""}
    message["log"] = str(tmp_path / "log")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        with pytest.raises(ChildProcessError):
            template.run_in_fork(lambda: prebuilt.model_template(message, theirs))
        told = receive_with_fds(ours)
    assert told is not None and told[0]["reason"] == "RuntimeError: devices: ''"


REPORTER = StatusReporter(-1, 0.0)


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What engines were seeded with: a vLLM that serves nothing, whose `random` is left in a state of its seed."""

    def seed(value: int) -> None:
        drawn.append(value)
        random.seed(value)

    def parser(empty: ArgumentParser) -> ArgumentParser:
        empty.add_argument("--seed", type=int, default=0)
        return empty

    def run_server_worker(_: str, __: socket.socket, args: Namespace) -> None:
        seed(args.seed)

    drawn: list[int] = []
    launchers = "vllm.entrypoints.launchers"
    module(
        monkeypatch,
        f"{launchers}.cli_args",
        make_arg_parser=parser,
        validate_parsed_serve_args=lambda _: None,
    )
    module(monkeypatch, "vllm.utils.argparse_utils", FlexibleArgumentParser=ArgumentParser)
    module(monkeypatch, "vllm.utils.torch_utils", set_random_seed=seed)
    entry = module(monkeypatch, f"{launchers}.api_server.entry", run_server_worker=run_server_worker)
    module(monkeypatch, f"{launchers}.api_server", entry=entry)
    module(monkeypatch, "uvloop", run=lambda serving: serving and serving.close())
    for name in ("watch_phase_logs", "_fork_on_cpu"):
        monkeypatch.setattr(process, name, lambda *_: None)
    monkeypatch.setattr(sys, "setswitchinterval", lambda _: None)
    return drawn


def test_plain_starts_are_seeded_anew(seeds: list[int]) -> None:
    """Unless the user has said with what."""
    with socket.socket(socket.AF_UNIX) as http:
        for argv in ([], [], ["--seed", "0"], ["--seed", "7"]):
            process.serve_forked(argv, http, REPORTER)
    assert seeds[2:] == [0, 7] and len(set(seeds)) == 4


def test_forks_of_a_models_template_are_seeded_anew(seeds: list[int]) -> None:
    """Unless the user has said with what. What the server draws, as ids of tool calls, differs all the same."""
    built = prebuilt.ModelTemplate.__new__(prebuilt.ModelTemplate)
    by_servers = set()
    with socket.socket(socket.AF_UNIX) as http:
        for argv in ([], [], ["--seed", "7"], ["--seed", "7"]):
            built._seed = process.parse_arguments(argv).seed
            built.serve({}, http, REPORTER)
            by_servers.add(random.random())
    assert seeds[2:] == [7, 7] and len(set(seeds)) == 3
    assert len(by_servers) == 4
