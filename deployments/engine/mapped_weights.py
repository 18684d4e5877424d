"""A vLLM load format that maps weights instead of copying them.

The first load goes through vLLM's own loader, after which every parameter (in vLLM's fused layout and the target
data type) is written, page-aligned, to one flat file. Later loads map that file copy-on-write: no bytes are read until
a layer is used, and the page cache is shared by every engine of the node.

Registered through vLLM's public `register_model_loader`.
"""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

LOAD_FORMAT = "relight_mapped"
PAGE_BYTES = 4096

# Set by the model template before the engine is built: where the flat file of this model lives.
flat_file: Path | None = None
maps: list[mmap.mmap] = []


def write_flat(model: torch.nn.Module, path: Path) -> None:
    """Write every parameter to `path` and its index to `path`.json; complete or absent, whatever dies meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    index_partial = path.with_suffix(f".{os.getpid()}.index.partial")
    try:
        index_partial.write_text(json.dumps(_write_parameters(model, partial)))
        # The data is named last: where it is, its index is.
        index_partial.rename(path.with_suffix(".json"))
        partial.rename(path)
    finally:
        # What a full disk has cut short would keep it full.
        partial.unlink(missing_ok=True)
        index_partial.unlink(missing_ok=True)


def _write_parameters(model: torch.nn.Module, path: Path) -> dict[str, tuple[int, list[int], str]]:
    """Where each is in the file: offset, shape, data type."""
    index: dict[str, tuple[int, list[int], str]] = {}
    seen: dict[int, str] = {}
    with path.open("wb") as file:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            pointer = parameter.data_ptr()
            if pointer in seen:  # tied weights are stored once
                index[name] = index[seen[pointer]]
                continue
            seen[pointer] = name
            offset = -(-file.tell() // PAGE_BYTES) * PAGE_BYTES
            file.seek(offset)
            data = parameter.data.contiguous()
            file.write(data.view(-1).view(torch.uint8).numpy().data)
            index[name] = (offset, list(data.shape), str(data.dtype).removeprefix("torch."))
        file.truncate(-(-file.tell() // PAGE_BYTES) * PAGE_BYTES)
        file.flush()
        os.fsync(file.fileno())
    return index


def map_flat(model: torch.nn.Module, path: Path) -> None:
    """Make every parameter of `model` a view of the mapped file. Raises KeyError if the model has changed."""
    index = json.loads(path.with_suffix(".json").read_text())
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    maps.append(mapped)
    flat = torch.frombuffer(mapped, dtype=torch.uint8)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        offset, shape, dtype_name = index[name]
        dtype = getattr(torch, dtype_name)
        size_bytes = dtype.itemsize
        for length in shape:
            size_bytes *= length
        parameter.data = flat[offset : offset + size_bytes].view(dtype).view(shape)


@register_model_loader(LOAD_FORMAT)
class MappedLoader(BaseModelLoader):  # type: ignore[misc]
    """Loads through vLLM's default loader once, then maps."""

    def download_model(self, model_config: object) -> None:
        """Nothing to do: the engine host has resolved the source to a folder."""

    def load_weights(self, model: torch.nn.Module, model_config: object) -> None:
        # oneDNN would repack every weight into a private copy at load; engines do that when they have served.
        import vllm._custom_ops as ops

        ops._supports_onednn = False
        if flat_file is None:
            raise RuntimeError("no flat file chosen for this model")
        if not flat_file.exists():
            config = self.load_config.__class__(load_format="auto")
            DefaultModelLoader(config).load_weights(model, model_config)
            write_flat(model, flat_file)
        map_flat(model, flat_file)
