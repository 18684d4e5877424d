"""A template for one model: vLLM's engine and server built ahead, weights mapped but not resident, warmed, forked.

A fork of it answers in a fifth of a second. It leans on vLLM's internals, so it serves only after a self-test has
shown that a fork gives the same answers as the engine that was built; whatever fails here, the host falls back to
the plain start (`serve_forked`) and says why. Only for one process on a CPU: an engine on CUDA must not be built
before its device is granted.

What makes the fork possible, one by one:
- the engine core runs in this process, so that there is no second process to fork (`InProcessCore`);
- torch's process group of one member uses the `fake` backend: gloo would hold threads and sockets;
- the engine's and the server's threads are joined before the fork, and thread pools forget threads that are gone;
- pages of the KV cache and of the weights are given back: the mappings stay, the memory does not.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread as thread_pools
import contextlib
import ctypes
import gc
import hashlib
import http.client
import json
import mmap
import os
import queue
import random
import signal
import socket
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from deployments.engine.process import (
    StatusReporter,
    parse_arguments,
    root_cause,
    start_seed,
    watch_phase_logs,
)
from deployments.engine.protocol import send_with_fds
from deployments.engine.template import serve_channel

MADV_DONTNEED = 4
WARM_TOKENS = 8
LARGE_BYTES = 1 << 26
OTEL_THREAD = "OtelBatch"
THREADS_END_S = 5.0
# The server's thread and the core's share the interpreter's lock. A torch operation gives it away and takes it back;
# at Python's default (5 ms) each time that the server is busy costs the core that long.
SWITCH_INTERVAL_S = 0.0002

_pools: weakref.WeakSet[thread_pools.ThreadPoolExecutor] = weakref.WeakSet()


class Unsupported(Exception):
    """This model can't be prebuilt; the message says why."""


class InProcessCore:
    """vLLM's engine core in this process, behind the interface of its asynchronous client.

    Before `start` every call runs in place (the template has no threads); after it, on the core's own thread.
    """

    def __init__(self, vllm_config: Any, executor_class: Any, log_stats: bool, **_: Any) -> None:
        from vllm.v1.engine.core import EngineCore

        self.vllm_config = vllm_config
        self.engine_core = EngineCore(vllm_config, executor_class, log_stats)
        self.engine_ranks_managed = [0]
        self.engines_running = False
        self.resources = types.SimpleNamespace(engine_dead=False)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] | None = None
        self._outbox: asyncio.Queue[Any] | None = None
        self.idle_work: list[Callable[[], None]] = []  # done one at a time, when no request is running

    def start(self, loop: asyncio.AbstractEventLoop, threads: int) -> None:
        """Start the core's thread; `threads` is how many torch may use."""
        self._loop = loop
        self._inbox = queue.SimpleQueue()
        self._outbox = asyncio.Queue()
        self.stepped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(threads,), daemon=True, name="EngineCore")
        self._thread.start()

    def stop(self) -> None:
        """Join the core's thread."""
        assert self._inbox is not None
        self._inbox.put(None)
        self._thread.join()
        self._inbox = None

    def _run(self, threads: int) -> None:
        import torch

        # vLLM replaces torch.set_num_threads by a refusal once the worker's device is up.
        _set_num_threads(threads)
        core, inbox = self.engine_core, self._inbox
        assert inbox is not None
        try:
            with torch.inference_mode():
                while self._take(core, inbox):
                    if not core.scheduler.has_requests():
                        continue
                    outputs, executed = core.step_fn()
                    core.post_step(executed)
                    if executed and not self.stepped.is_set():
                        self._loop.call_soon_threadsafe(self.stepped.set)
                    for output in (outputs or {}).values():
                        self._give(output)
                    if not executed:
                        time.sleep(0.001)  # a grammar is still compiling: let its thread have the lock
        except BaseException as error:  # noqa: BLE001 - the thread's last frame; the server is told and ends
            import traceback

            traceback.print_exc()
            self.resources.engine_dead = True
            self._give(error)

    def _take(self, core: Any, inbox: queue.SimpleQueue[Callable[[], None] | None]) -> bool:
        """Run what was asked for. Blocks while there is nothing to do; False: stop."""
        while True:
            busy = core.scheduler.has_requests()
            try:
                call = inbox.get(block=not busy and not self.idle_work)
            except queue.Empty:
                if busy:
                    return True
                self.idle_work.pop()()
                continue
            if call is None:
                return False
            call()

    def _give(self, output: Any) -> None:
        assert self._outbox is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(self._outbox.put_nowait, output)

    async def get_output_async(self) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        assert self._outbox is not None
        output = await self._outbox.get()
        if isinstance(output, BaseException):
            raise EngineDeadError from output
        return output

    async def add_request_async(self, request: Any) -> None:
        core = self.engine_core

        def add() -> None:
            try:
                prepared, wave = core.preprocess_add_request(request)
                core.add_request(prepared, wave)
            except Exception:  # noqa: BLE001 - as vLLM's own core: this request fails, the engine goes on
                import traceback

                traceback.print_exc()
                self._give(_error_output(request.request_id))

        self._post(add)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        if request_ids and not self.resources.engine_dead:
            self._post(lambda: self.engine_core.abort_requests(request_ids))

    def _post(self, call: Callable[[], None]) -> None:
        if self._inbox is None:
            call()
        else:
            self._inbox.put(call)

    async def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._inbox is None:
            return function(*args, **kwargs)
        future = self._loop.create_future()

        def settle(setter: Callable[[Any], None], value: Any) -> None:
            def if_wanted() -> None:
                if not future.done():
                    setter(value)

            self._loop.call_soon_threadsafe(if_wanted)

        def run() -> None:
            try:
                settle(future.set_result, function(*args, **kwargs))
            except Exception as error:  # noqa: BLE001 - handed to the caller
                settle(future.set_exception, error)

        self._inbox.put(run)
        return await future

    def dp_engines_running(self) -> bool:
        return False

    def get_kv_event_sources(self) -> dict[int, Any]:
        return {}

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to end: the core dies with its process."""

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("_async"):
            raise AttributeError(name)
        function = getattr(self.engine_core, name.removesuffix("_async"))

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self._call(function, *args, **kwargs)

        return call


def _error_output(request_id: str) -> Any:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    return EngineCoreOutputs(
        outputs=[EngineCoreOutput(request_id=request_id, new_token_ids=[], finish_reason=FinishReason.ERROR)]
    )


def _set_num_threads(threads: int) -> None:
    import torch

    getattr(torch, "_relight_set_num_threads", torch.set_num_threads)(threads)


class ModelTemplate:
    """One model's engine and server, built and warmed once, then given its memory back."""

    def __init__(self, argv: list[str], flat: Path, threads: int, *, forks: bool = True) -> None:
        """Build. `flat` is the file of mapped weights; `threads` what an engine may use. Raises `Unsupported`.

        With `forks`, it is also warmed, and left without threads and without the memory that a fork gets anew.
        """
        import torch
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.core_client import EngineCoreClient

        from deployments.engine import mapped_weights

        if not current_platform.is_cpu():
            raise Unsupported("an engine on CUDA is not built before its device is granted")
        self._threads = threads
        torch._relight_set_num_threads = torch.set_num_threads
        # One thread until the fork: OpenMP's pool would not survive it.
        torch.set_num_threads(1)
        _track_thread_pools()
        _fake_process_group()
        mapped_weights.flat_file = flat
        self.args = parse_arguments(argv)
        self._seed: int | None = self.args.seed
        self.args.seed = start_seed(self._seed)
        if self.args.load_format not in ("auto", "safetensors", mapped_weights.LOAD_FORMAT):
            raise Unsupported(f"load_format {self.args.load_format!r} has a loader of its own")
        self.args.load_format = mapped_weights.LOAD_FORMAT
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        engine_args = AsyncEngineArgs.from_cli_args(self.args)
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        if config.parallel_config.world_size > 1 or config.quant_config is not None:
            raise Unsupported("only one process, and weights that are not quantized, are prebuilt")
        EngineCoreClient.make_async_mp_client = staticmethod(InProcessCore)
        if not config.model_config.is_multimodal_model:
            _skip_missing_processor(Path(config.model_config.model))
        with _untouched_zeros():
            self.llm = AsyncLLM.from_vllm_config(
                config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                enable_log_requests=engine_args.enable_log_requests,
                disable_log_stats=engine_args.disable_log_stats,
            )

        async def build() -> None:
            self.tasks = tuple(await self.llm.get_supported_tasks())
            self.app = build_app(self.args, self.tasks, self.llm.model_config)
            await init_app_state(self.llm, self.app.state, self.args, self.tasks)

        asyncio.run(build())
        self.core: InProcessCore = self.llm.engine_core
        self._runner = self.core.engine_core.model_executor.driver_worker.worker.model_runner
        if forks:
            self.expected = self._warm()
            self._give_memory_back()

    @property
    def name(self) -> str:
        return str(self.args.served_model_name[0])

    def _warm(self) -> list[bytes]:
        """Serve the probe requests once through the whole stack, on one thread; returns what they answered."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("")  # an abstract name: nothing to clean up
            listener.listen(8)
            address = listener.getsockname()
            answers: list[bytes] = []
            errors: list[BaseException] = []

            def ask() -> None:
                try:
                    answers.extend(probe(address, self.name, self.tasks))
                except BaseException as error:  # noqa: BLE001 - raised again below, in the builder's thread
                    errors.append(error)
                finally:
                    self._server.should_exit = True

            asker = threading.Thread(target=ask)

            async def serve() -> None:
                self._prepare_server("off")
                self.core.start(asyncio.get_running_loop(), 1)
                asker.start()
                await self._server.serve(sockets=[listener])
                if self.llm.output_handler is not None:
                    self.llm.output_handler.cancel()
                    self.llm.output_handler = None

            asyncio.run(serve())
            asker.join()
            self.core.stop()
        join_thread_pools()
        if errors:
            raise errors[0]
        return answers

    def _prepare_server(self, lifespan: Literal["on", "off"]) -> None:
        import uvicorn
        from vllm import envs

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Any:
                yield  # the process has handlers of its own; in the template there are none

        self._server = Server(
            uvicorn.Config(
                self.app,
                log_level=self.args.uvicorn_log_level,
                access_log=not self.args.disable_uvicorn_access_log,
                lifespan=lifespan,
                timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
            )
        )
        self.app.state.server = self._server

    def _give_memory_back(self) -> None:
        """Drop the pages of KV cache and weights. Zeroed KV pages are right only with an empty prefix cache."""
        import torch

        from deployments.engine import mapped_weights

        core = self.core.engine_core
        if not core.reset_prefix_cache():
            raise Unsupported("the prefix cache could not be emptied")
        seen: set[int] = set()
        for cache in getattr(self._runner, "kv_caches", []):
            for tensor in cache if isinstance(cache, list | tuple) else [cache]:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    _drop_pages(storage.data_ptr(), storage.nbytes())
        for mapped in mapped_weights.maps:
            _drop_pages(torch.frombuffer(mapped, dtype=torch.uint8).data_ptr(), len(mapped))
        gc.collect()

    def serve(self, message: Mapping[str, Any], http: socket.socket, reporter: StatusReporter) -> None:
        """In the forked child: start the core's thread and serve until SIGTERM, which drains."""
        from vllm.utils.torch_utils import set_random_seed

        reset_thread_pools()
        # The generators are as the template left them, in every fork.
        set_random_seed(start_seed(self._seed))
        reporter.phase("config", 0.0)
        reporter.phase("weights", 0.0)  # mapped: read as they are used, within the first token
        self.run(http)

    def run(self, http: socket.socket) -> None:
        """Serve on `http` until SIGTERM."""
        import uvloop

        sys.setswitchinterval(SWITCH_INTERVAL_S)
        # The core's seed is the server's as well in one process; some ids of tool calls are drawn with it.
        random.seed()

        async def run() -> None:
            loop = asyncio.get_running_loop()
            self._prepare_server("on")
            self.core.start(loop, self._threads)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, lambda: setattr(self._server, "should_exit", True))
            self._repacking = loop.create_task(self._repack_after_first_tokens())
            await self._server.serve(sockets=[http])

        uvloop.run(run())

    async def _repack_after_first_tokens(self) -> None:
        """Once requests have been answered, give each linear layer its oneDNN-packed weight, between requests.

        Mapped weights in their plain layout decode a third slower; packing them at the start would delay the first
        token. On a busy engine the work is spread: one layer every so many steps.
        """
        layers = repackable_layers(self._runner.model)
        await self.core.stepped.wait()

        def pack_next() -> None:
            if layers:
                repack(layers.pop())

        self.core.idle_work.extend([pack_next] * len(layers))
        self.core._post(lambda: None)
        while layers and not self.core.resources.engine_dead:
            await asyncio.sleep(0.02)
            if self.core.engine_core.scheduler.has_requests():
                self.core._post(pack_next)


def repackable_layers(model: Any) -> list[Any]:
    """Linear layers whose weight vLLM would have packed for oneDNN had it not been mapped."""
    return [
        m
        for m in model.modules()
        if hasattr(m, "cpu_linear") and getattr(m, "weight", None) is not None and m.weight.ndim == 2
    ]


def repack(layer: Any) -> None:
    """What vLLM does at load (dispatch_cpu_unquantized_gemm): a oneDNN handler for the layer's weight."""
    import vllm._custom_ops as ops

    handler = ops.create_onednn_mm(layer.weight.t(), 32)
    layer.cpu_linear = lambda x, weight, bias: ops.onednn_mm(handler, x, bias)
    # The mapped original is read no more. If it is after all (tied weights), its pages come back from the file.
    _drop_pages(layer.weight.data_ptr(), layer.weight.nbytes)


def probe(address: str | bytes, model: str, tasks: tuple[str, ...]) -> list[bytes]:
    """Ask the server on this unix socket one question of each kind it serves; returns the deterministic answers.

    Raises RuntimeError if one is refused.
    """
    answers = []
    if "generate" in tasks:
        text = _post(
            address,
            "/v1/completions",
            {
                "model": model,
                "prompt": "One, two, three,",
                "max_tokens": WARM_TOKENS,
                "temperature": 0,
                "seed": 0,
            },
        )
        answers.append(json.dumps(json.loads(text)["choices"][0]["text"]).encode())
        chat = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        # A base model has no chat template: then this is a refusal, and nothing to warm.
        for stream in (False, True):
            _post(address, "/v1/chat/completions", {**chat, "stream": stream}, refusals=(400,))
    elif "embed" in tasks:
        body = _post(address, "/v1/embeddings", {"model": model, "input": "One, two, three"})
        vector = json.loads(body)["data"][0]["embedding"]
        answers.append(json.dumps([round(x, 3) for x in vector]).encode())
    else:
        answers.append(_post(address, "/health", None))
    return answers


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, address: str | bytes, timeout_s: float) -> None:
        super().__init__("engine", timeout=timeout_s)
        self._address = address

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._address)


def _post(
    address: str | bytes, target: str, body: Mapping[str, Any] | None, refusals: tuple[int, ...] = ()
) -> bytes:
    connection = _UnixConnection(address, timeout_s=120)
    try:
        if body is None:
            connection.request("GET", target)
        else:
            connection.request("POST", target, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        data = response.read()
        if response.status != 200 and response.status not in refusals:
            raise RuntimeError(f"{target} answered {response.status}: {data[:500]!r}")
        return data
    finally:
        connection.close()


def model_template(message: Mapping[str, Any], channel: socket.socket) -> NoReturn:
    """Main of a model's template process: build, test itself, then fork engines for the host.

    `message`: argv, env, log, flat_dir, threads, model, engine_id (of the template).
    """
    log = Path(message["log"])
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(message["env"])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(f"relight-model-template {message['model']}")
    started_s = time.time()
    try:
        flat = Path(message["flat_dir"]) / f"{flat_name(message)}.weights"
        template = ModelTemplate(list(message["argv"]), flat, message["threads"])
        self_test(template)
        os.utime(flat)  # in use: the host removes what is old
    except BaseException as error:  # noqa: BLE001 - whatever it is, the host falls back to the plain start
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        send_with_fds(channel, {"event": "template_failed", "reason": root_cause(error, log)})
        os._exit(1)
    send_with_fds(
        channel,
        {
            "event": "template_ready",
            "seconds": time.time() - started_s,
            "threads": _threads(),
            "flat": str(flat),
        },
    )
    serve_channel(channel, template.serve)


def serve_mapped(message: Mapping[str, Any], http: socket.socket, reporter: StatusReporter) -> None:
    """In a fork of the node's template: build the engine in this process, from mapped weights, and serve.

    For a model whose template has passed its self-test and is not kept. `message`: argv, flat, threads.
    """
    watch_phase_logs(reporter)
    ModelTemplate(list(message["argv"]), Path(message["flat"]), message["threads"], forks=False).run(http)


def flat_name(message: Mapping[str, Any]) -> str:
    """Name of the flat file: what its bytes depend on."""
    import torch
    import vllm

    config = Path(message["argv"][message["argv"].index("--model") + 1])
    stamp = [
        (p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(config.glob("*")) if p.is_file()
    ]
    what = (str(config), stamp, message["argv"], vllm.__version__, torch.__version__)
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]


def self_test(template: ModelTemplate) -> None:
    """Fork once and compare: a fork must answer as the engine that was built. Raises `Unsupported`."""
    # OpenTelemetry's exporter restarts its thread in a forked child; no other thread is there afterwards.
    known = [t for t in threading.enumerate() if t.name.startswith(OTEL_THREAD)]
    if not threads_end(1 + len(known)):
        raise Unsupported(f"{_threads()} threads are running before the fork: {_thread_names()}")
    read, write = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen(8)
        address = listener.getsockname()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                os.close(read)
                template.serve({}, listener, StatusReporter(write, time.time()))
            except BaseException:  # noqa: BLE001 - the parent sees a refused connection; the reason is in the log
                import traceback

                traceback.print_exc()
            finally:
                os._exit(1)
        listener.close()
        os.close(write)
        try:
            answers = probe(address, template.name, template.tasks)
        finally:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(read)
    if answers != template.expected:
        raise Unsupported(f"a fork answered {answers!r}, the engine itself {template.expected!r}")


def _track_thread_pools() -> None:
    original = thread_pools.ThreadPoolExecutor.__init__

    def init(self: thread_pools.ThreadPoolExecutor, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _pools.add(self)

    thread_pools.ThreadPoolExecutor.__init__ = init  # type: ignore[method-assign]
    for known in gc.get_objects():
        if isinstance(known, thread_pools.ThreadPoolExecutor):
            _pools.add(known)


def join_thread_pools() -> None:
    """End the threads of every pool, leaving the pools usable."""
    for pool in list(_pools):
        was_shut_down = pool._shutdown
        pool._shutdown = True  # a worker leaves only a pool that is shut down
        pool._work_queue.put(None)  # type: ignore[arg-type]
        for thread in list(pool._threads):
            thread.join(5)
        pool._shutdown = was_shut_down
    reset_thread_pools()


def reset_thread_pools() -> None:
    """Make every pool forget its threads: after a fork they are not there."""
    for pool in list(_pools):
        pool._threads = set()
        pool._idle_semaphore = threading.Semaphore(0)
        pool._work_queue = queue.SimpleQueue()
        pool._shutdown_lock = threading.Lock()
    thread_pools._threads_queues.clear()  # type: ignore[attr-defined]


def _fake_process_group() -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init, new = dist.init_process_group, dist.new_group

    def init_process_group(*_: Any, world_size: int = 1, **__: Any) -> Any:
        if world_size != 1:
            raise Unsupported(f"a process group of {world_size}")
        return init(backend="fake", store=FakeStore(), world_size=1, rank=0)

    def new_group(ranks: Any = None, *_: Any, **__: Any) -> Any:
        return new(ranks, backend="fake")

    dist.init_process_group = init_process_group
    dist.new_group = new_group


def _skip_missing_processor(folder: Path) -> None:
    """Don't look for the chat template of a processor where there is none: the search loads the tokenizer again."""
    from vllm.renderers import hf

    files = ("processor_config.json", "preprocessor_config.json", "chat_template.json")
    if hasattr(hf, "_try_get_processor_chat_template") and not any((folder / f).exists() for f in files):
        hf._try_get_processor_chat_template = lambda *_, **__: None


@contextlib.contextmanager
def _untouched_zeros() -> Iterator[None]:
    """Large buffers of zeros (the KV cache) become mappings whose pages come when they are written."""
    import torch

    zeros = torch.zeros

    def mapped_zeros(*size: Any, **options: Any) -> Any:
        wanted = options.get("dtype") is torch.int8 and str(options.get("device", "cpu")) == "cpu"
        if wanted and len(size) == 1 and isinstance(size[0], int) and size[0] >= LARGE_BYTES:
            return torch.frombuffer(mmap.mmap(-1, size[0]), dtype=torch.int8)
        return zeros(*size, **options)

    torch.zeros = mapped_zeros
    try:
        yield
    finally:
        torch.zeros = zeros


_libc = ctypes.CDLL(None, use_errno=True)


def _drop_pages(address: int, size_bytes: int) -> None:
    start = -(-address // 4096) * 4096
    end = (address + size_bytes) // 4096 * 4096
    if end > start and _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise")


def threads_end(most: int) -> bool:
    """Whether no more than so many threads are left, within `THREADS_END_S`.

    Python lets a thread be joined somewhat before the kernel's own thread is gone.
    """
    until_s = time.monotonic() + THREADS_END_S
    while _threads() > most:
        if time.monotonic() >= until_s:
            return False
        time.sleep(0.01)
    return True


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def _thread_names() -> list[str]:
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
