"""Qwen 2, 2.5 (arXiv:2407.10671): Llama with biases on queries, keys and values. Qwen 3 (arXiv:2505.09388): with norms in their place.

Qwen 3 also comes as a mixture of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ...weights.checkpoint import GGUFArchitecture
from ..decoder import DecoderConfig
from ..layers import BlockConfig, LayerType
from .base import Family, Weight, only, size
from .llama import (
    GGUF_BIASES,
    GGUF_NORMS,
    GGUF_QK_NORMS,
    HEADS,
    ROOT,
    block,
    decoder,
    full_rotary,
    gguf_weights,
    layer_types,
    weights,
    window,
)
from .mistral import expert_weights, experts


def windowed(hf: Mapping[str, Any]) -> int | None:
    """The window of the layers that have one; None where the config doesn't use it."""
    return window(hf, 4096) if hf.get("use_sliding_window", False) else None


def _decoder(hf: Mapping[str, Any], layer: BlockConfig) -> DecoderConfig:
    width, first = windowed(hf), size(hf, "max_window_layers", 28, least=0)

    def usual(layer: int) -> str:
        return "sliding_attention" if width is not None and layer >= first else "full_attention"

    rotary = full_rotary(hf, layer)
    types = {"full_attention": LayerType(rotary=rotary), "sliding_attention": LayerType(width, rotary)}
    return decoder(hf, layer, layer_types(hf, types, usual))


def _qwen2(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    return _decoder(hf, block(hf, dtype, qkv_bias=True, out_bias=False, mlp_bias=False))


def _qwen3(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    return _decoder(hf, block(hf, dtype, head_dim=size(hf, "head_dim", 128), qk_norm="head", mlp_bias=False))


def _qwen3_moe(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    only(hf, "decoder_sparse_step", 1)  # every layer has experts: the layers of a stack are of one shape
    only(hf, "mlp_only_layers", None, [])
    chosen = experts(hf, "num_experts", usual=128, used=8, hidden=size(hf, "moe_intermediate_size", 768))
    normed = hf.get("norm_topk_prob", False)
    layer = block(hf, dtype, head_dim=size(hf, "head_dim", 128), qk_norm="head", mlp_bias=False, experts_normed=normed, **chosen)
    return decoder(hf, layer, [LayerType(windowed(hf), full_rotary(hf, layer))])


def _moe_weights(config: DecoderConfig) -> dict[str, Weight]:
    return weights(config) | expert_weights("mlp", ("gate_proj", "up_proj", "down_proj"))


_GGUF2 = GGUFArchitecture("qwen2", "qwen2", gguf_weights())
_GGUF3 = GGUFArchitecture("qwen3", "qwen3", gguf_weights(GGUF_NORMS | GGUF_QK_NORMS), {"attention_bias": GGUF_BIASES["attention_bias"]})
QWEN2 = Family("decoder", _qwen2, weights, architecture="Qwen2", root=ROOT, heads=HEADS, gguf=_GGUF2)
QWEN3 = Family("decoder", _qwen3, weights, architecture="Qwen3", root=ROOT, heads=HEADS, gguf=_GGUF3)

FAMILIES.register("qwen2", QWEN2)
FAMILIES.register("qwen3", QWEN3)
FAMILIES.register("qwen3_moe", Family("decoder", _qwen3_moe, _moe_weights, architecture="Qwen3Moe", root=ROOT, heads=HEADS))
