"""The node's template process: it has imported torch and vLLM, holds no weights and no device, and forks engines.

Importing is most of a plain start's time; a fork pays it once a node. The process has one thread and never touches
a CUDA device: both are what makes the fork safe. It answers its host over one SOCK_SEQPACKET channel and ends when
the host does; the engines that it forked live on (deployments/engine/keeper.py).

Run by the host: `python -m deployments.engine.template CHANNEL_FD`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from deployments.engine.process import StatusReporter, run_engine, serve_forked
from deployments.engine.protocol import receive_with_fds, send_with_fds

# A fork copies the caller's thread and no other: these libraries would start pools of their own at import.
SINGLE_THREAD_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # OpenMP's threads wait for each other by spinning. Where anything else runs on the cores, as Ray does while it
    # starts the replica, a spinning thread keeps the one it waits for from running: decoding at a tenth of the speed.
    "GOMP_SPINCOUNT": "1000",
}

# What a first start of vLLM's server imports, at the latest. A module that is gone in another version is skipped.
PRELOAD = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.v1.structured_output",
    "vllm.v1.core.sched.scheduler",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.v1.pool.flash_maxsim",
    "vllm.triton_utils.dispatcher",
    "compressed_tensors.compressors",
    "compressed_tensors.transform",
    "vllm.renderers.hf",
    "vllm.plugins.lora_resolvers.filesystem_resolver",
    "vllm.plugins.lora_resolvers.hf_hub_resolver",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.generate.structured_decisions.api_router",
    "vllm.entrypoints.generate.generative_scoring.api_router",
    "vllm.entrypoints.openai.models.api_router",
    "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.cohere.api_router",
    "vllm.entrypoints.serve.elastic_ep.api_router",
    "vllm.entrypoints.serve.instrumentator.metrics",
    "vllm.entrypoints.serve.instrumentator.offline_docs",
    "vllm.entrypoints.serve.lora.api_router",
    "vllm.entrypoints.serve.profile.api_router",
    "vllm.entrypoints.serve.tokenize.api_router",
    "vllm.entrypoints.serve.utils.fingerprint",
    "vllm.entrypoints.scale_out.derender.api_router",
    "vllm.entrypoints.scale_out.render.api_router",
    "vllm.entrypoints.scale_out.token_in_token_out.api_router",
    "model_hosting_container_standards.sagemaker",
    "model_hosting_container_standards.common.custom_code_ref_resolver",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.auto.processing_auto",
    "setproctitle",
    "uvloop",
    "uvicorn.lifespan.on",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.http.httptools_impl",
    "uvicorn.protocols.websockets.auto",
    "uvicorn.protocols.websockets.websockets_sansio_impl",
)
PRELOAD_CPU = (
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.attention.backends.cpu_attn",
)

Serve = Callable[[Mapping[str, Any], socket.socket, StatusReporter], None]


def _keep_kernels_together() -> None:
    """One folder for what Triton compiles, whoever compiles it.

    Unless it is named, torch's compiler names one of its own in every process that compiles a model, and Triton keeps
    the kernels that all models share there: a start that only loads what was compiled before doesn't find them.
    """
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path("~/.triton/cache").expanduser()))


def preload() -> str:
    """Import all that an engine needs; returns the kind of device that vLLM found ("cpu", "cuda", or "").

    Must not start a thread or touch a device.
    """
    with contextlib.suppress(ImportError):
        import setproctitle

        # It finds the title's place by the environment's first variable, and forgoes titles if that was moved before.
        setproctitle.getproctitle()
    for name, value in SINGLE_THREAD_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _keep_kernels_together()
    # vLLM's command line chooses spawn, which would import everything again in the engine core.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # its monitor is a thread
    # As where the environment is activated: what compiles at run time looks for ninja on the path.
    os.environ["PATH"] = os.pathsep.join(
        [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)]
    )
    for name in PRELOAD:
        _import(name)
    _inspect_in_forks()
    _unseeded_span_ids()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for name in PRELOAD_CPU:
            _import(name)
        _register_kernels(current_platform)
        _rank_uncompiled()
    elif current_platform.is_cuda():
        _choose_sampler()
    return str(current_platform.device_type)


def _choose_sampler() -> None:
    """vLLM's sampler on CUDA compiles itself at the first start, which fails where there is no CUDA toolkit.

    vLLM says itself whether it can, and then takes that sampler all the same.
    """
    try:
        from vllm.utils.flashinfer import has_flashinfer
    except ImportError:
        return
    if not has_flashinfer():
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")


def _inspect_in_forks() -> None:
    """Let vLLM look at a model's class in a fork: it starts a Python for that, which imports all of vLLM again.

    It does so once for each architecture and node, and for the same reason: whatever the class does as it is
    imported is not done to the engine. A version that keeps this elsewhere does as it does.
    """
    registry = sys.modules.get("vllm.model_executor.models.registry")
    anew = getattr(registry, "_run_in_subprocess", None)
    if anew is None:
        return

    def forked(work: Callable[[], Any]) -> Any:
        try:
            return run_in_fork(work)
        except Exception as error:  # noqa: BLE001 - whatever it is, there is vLLM's own way
            print(f"no look at the model in a fork: {error}", flush=True)
            return anew(work)

    registry._run_in_subprocess = forked  # type: ignore[union-attr]


def _unseeded_span_ids() -> None:
    """Span ids come from the operating system, here and in what is forked from here.

    OpenTelemetry draws them from `random`, which vLLM seeds: the spans of all engines would have the same ones. A
    version that keeps this elsewhere does as it does.
    """
    ids: Any = sys.modules.get("opentelemetry.sdk.trace.id_generator")
    if hasattr(ids, "random"):
        ids.random = random.SystemRandom()


def run_in_fork(work: Callable[[], Any]) -> Any:
    """What `work` returns, done in a fork of this process. Raises ChildProcessError where it returns nothing."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with os.fdopen(writing, "wb") as result:
                result.write(pickle.dumps(work()))
        except BaseException:  # noqa: BLE001 - last frame of this process
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as result:
        data = result.read()
    with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored the kernel has reaped it
        os.waitpid(pid, 0)
    if not data:
        raise ChildProcessError(f"process {pid} ended without a result")
    return pickle.loads(data)


def _register_kernels(platform: Any) -> None:
    """What each of vLLM's workers does first, once for all: it looks through every module there is.

    A version without it does nothing here, and its workers do what they do.
    """
    register = getattr(platform, "register_triton_kernel_overrides", None)
    if register is None:
        return
    register()
    type(platform).register_triton_kernel_overrides = classmethod(lambda _: None)


def _rank_uncompiled() -> None:
    """The rank of a token among all as plain PyTorch, where vLLM compiles two operations into one on first use.

    On a CPU they take microseconds, the compiler seconds, in which the engine answers nobody; and as engines are forked
    anew at each wake, each would compile again. A version that keeps this elsewhere does as it does.
    """
    name = "batched_count_greater_than"
    for module in ("vllm.v1.sample.ops.logprobs", "vllm.v1.sample.sampler"):
        compiled = getattr(sys.modules.get(module), name, None)
        plain = getattr(compiled, "_torchdynamo_orig_callable", None)
        if plain is not None:
            setattr(sys.modules[module], name, plain)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        # Gone in this version, or a library of the machine is missing: its engines would say so one by one.
        print(f"template: {name} can't be imported: {error}", flush=True)


def fork_engine(
    channel: socket.socket,
    message: Mapping[str, Any],
    fds: list[int],
    serve: Serve,
) -> int:
    """Fork one engine from this process; returns its pid. `fds` are [http, control, status], owned by the child."""
    pid = os.fork()
    if pid == 0:
        channel.close()
        http, control = socket.socket(fileno=fds[0]), socket.socket(fileno=fds[1])
        run_engine(message, http, control, fds[2], lambda sock, reporter: serve(message, sock, reporter))
    return pid


def serve_channel(channel: socket.socket, serve: Serve) -> NoReturn:
    """Fork what the host asks for, until the host is gone."""
    # Children are reaped by the kernel: the host learns of their end through their status descriptor and pidfd.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    # Pages of objects that exist now stay shared with the engines: the collector no longer writes to them.
    gc.freeze()
    while True:
        try:
            received = receive_with_fds(channel)
        except OSError:
            received = None
        if received is None:
            os._exit(0)
        message, fds = received
        try:
            if message["op"] == "fork":
                pid = fork_engine(channel, message, fds, serve)
            else:
                pid = _fork_model_template(channel, message, fds)
            send_with_fds(channel, {"event": "forked", "engine_id": message["engine_id"], "pid": pid})
        except OSError as error:
            send_with_fds(
                channel, {"event": "fork_failed", "engine_id": message["engine_id"], "reason": str(error)}
            )
        finally:
            for fd in fds:
                os.close(fd)


def _fork_model_template(channel: socket.socket, message: Mapping[str, Any], fds: list[int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        from deployments.engine.prebuilt import model_template

        channel.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        model_template(message, socket.socket(fileno=fds[0]))
    except BaseException:  # noqa: BLE001 - last frame of this process: print, then end without the parent's handlers
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


def _serve(message: Mapping[str, Any], http: socket.socket, reporter: StatusReporter) -> None:
    if message.get("flat"):
        from deployments.engine.prebuilt import serve_mapped

        serve_mapped(message, http, reporter)
    else:
        serve_forked(list(message["argv"]), http, reporter)


def main() -> None:
    """Entry point of the node's template."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    started_s = time.time()
    device = preload()
    threads = len(list(Path("/proc/self/task").iterdir()))
    seconds = time.time() - started_s
    send_with_fds(
        channel, {"event": "template_ready", "seconds": seconds, "threads": threads, "device": device}
    )
    serve_channel(channel, _serve)


if __name__ == "__main__":
    main()
