"""GGUF files of Hugging Face models, laid out as llama.cpp's converter (`conversion/*.py` there) lays them out.

It shares nothing with what reads them: names come from the gguf package's own table, and each change of the converter is made here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

# Hugging Face's model_type -> llama.cpp's architecture.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "granite": "granite",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
}
_PAIRS = ("llama", "granite", "smollm3")  # rotary positions turn neighbouring features


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    kinds: Mapping[str, GGMLQuantizationType] | None = None,
    extra: Mapping[str, Any] | None = None,
    name: str = "tiny",
) -> None:
    """Write a model.

    Args:
        config: what `config.json` says.
        tensors: under Hugging Face's names, in PyTorch's layout.
        kinds: how modules are quantised, by their name in GGUF (`blk.0.attn_q`) or its end (`attn_q`).
        extra: more metadata; replaces what is of the same key.
        name: `general.name`.
    """
    arch = ARCHITECTURES[config["model_type"]]
    heads = config.get("num_attention_heads", config.get("n_head"))
    depth = config.get("num_hidden_layers", config.get("n_layer"))
    kv_heads = config.get("num_key_value_heads") or heads
    number = next(number for number, text in gguf.MODEL_ARCH_NAMES.items() if text == arch)
    names = gguf.get_tensor_name_map(number, depth)
    writer = GGUFWriter(path, arch)
    writer.add_name(name)
    metadata = {f"{arch}.{key}": value for key, value in _settings(arch, config, heads, kv_heads).items()} | dict(extra or {})
    for key, value in metadata.items():
        _add(writer, key, value)
    tied = config.get("tie_word_embeddings", config["model_type"].startswith(("gemma", "gpt2", "smollm3")))
    for hf_name, value in tensors.items():
        if hf_name in ("lm_head.weight", "embed_out.weight") and tied:
            continue
        found = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert found is not None, hf_name
        value = _converted(arch, hf_name, value, heads, kv_heads)
        stem, asked = found.removesuffix(".weight"), kinds or {}
        kind = asked.get(stem, asked.get(stem.rpartition(".")[2])) if found.endswith(".weight") else None
        if kind is None:
            writer.add_tensor(found, np.ascontiguousarray(value))
        else:
            writer.add_tensor(found, gguf.quantize(value, kind), raw_dtype=kind)
    for key, values in _tables(config).items():
        writer.add_tensor(key, np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if config.get("rope_theta") is not None:
        found.setdefault("rope_theta", config["rope_theta"])
    return {**found, **found.get("full_attention", {})}


def _settings(arch: str, config: Mapping[str, Any], heads: int, kv_heads: int) -> dict[str, Any]:
    """What the converter's `set_gguf_parameters` writes."""
    width = config.get("hidden_size", config.get("n_embd"))
    rope = _rope(config)
    found = {
        "context_length": config.get("max_position_embeddings", config.get("n_positions")),
        "embedding_length": width,
        "block_count": config.get("num_hidden_layers", config.get("n_layer")),
        "feed_forward_length": config.get("n_inner") or 4 * width if arch == "gpt2" else config["intermediate_size"],
        "attention.head_count": heads,
    }
    if arch in ("gpt2", "gptneox"):
        found["attention.layer_norm_epsilon"] = float(config.get("layer_norm_epsilon", config.get("layer_norm_eps", 1e-5)))
        if arch == "gptneox":
            turned = config.get("rotary_pct", rope.get("partial_rotary_factor", 0.25))
            found["rope.dimension_count"] = int(turned * (width // heads))
            found["use_parallel_residual"] = config.get("use_parallel_residual", True)
        return found
    found |= {"attention.head_count_kv": kv_heads, "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"])}
    if arch != "gemma":
        found["rope.freq_base"] = float(rope.get("rope_theta", 10000.0))
    head_dim = config.get("head_dim")
    if arch not in ("phi3", "granite") and head_dim:
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch in _PAIRS:
        found |= {"vocab_size": config["vocab_size"], "rope.dimension_count": head_dim or width // heads}
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if kind == "yarn":
            found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if arch == "granite":
        scales = {"attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale"}
        scales |= {"residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"}
        found |= {theirs: float(config.get(ours, 1.0)) for ours, theirs in scales.items()}
    if arch == "gemma2":
        found |= {
            "attn_logit_softcapping": float(config["attn_logit_softcapping"] or 0.0),
            "final_logit_softcapping": float(config["final_logit_softcapping"] or 0.0),
            "attention.sliding_window": config["sliding_window"],
        }
    if arch == "gemma3":
        found["attention.sliding_window"] = config["sliding_window"]
        if config.get("final_logit_softcapping"):
            found["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    if arch == "phi3":
        original = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
        found |= {
            "rope.scaling.original_context_length": original,
            "rope.dimension_count": int(rope.get("partial_rotary_factor", 1.0) * width) // heads,
            "attention.sliding_window": config.get("sliding_window") or 0,
        }
        if "long_factor" in rope:
            scale = found["context_length"] / original
            found["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return found


def _tables(config: Mapping[str, Any]) -> dict[str, list[float]]:
    """What the converter's `generate_extra_tensors` writes."""
    rope = _rope(config)
    if "long_factor" in rope:
        return {"rope_factors_long.weight": rope["long_factor"], "rope_factors_short.weight": rope["short_factor"]}
    return {}


def _converted(arch: str, name: str, value: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """What the converter's `modify_tensors` makes of a tensor."""
    value = value.astype(np.float32)
    if arch in _PAIRS and ".self_attn.q_proj." in name:
        return _permuted(value, heads)
    if arch in _PAIRS and ".self_attn.k_proj." in name:
        return _permuted(value, kv_heads)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return value + 1
    if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return value.T
    if arch == "gptneox" and ".query_key_value." in name:
        by_head = value.reshape(heads, 3, -1, *value.shape[1:])
        return np.concatenate([by_head[:, i].reshape(-1, *value.shape[1:]) for i in range(3)])
    return value


def _permuted(value: np.ndarray, heads: int) -> np.ndarray:
    return value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
