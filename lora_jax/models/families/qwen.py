"""Qwen 2, 2.5 (arXiv:2407.10671): Llama with biases on queries, keys and values. Qwen 3 (arXiv:2505.09388): with norms in their place.

Qwen 3 also comes as a mixture of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..decoder import DecoderConfig
from ..layers import BlockConfig, LayerKind
from .base import Family, Weight, decoder_heads, only, size
from .llama import ROOT, block, decoder, full_rotary, layer_kinds, weights, window
from .mixtral import expert_weights, experts


def windowed(hf: Mapping[str, Any]) -> int | None:
    """The window of the layers that have one; None where the config doesn't use it."""
    return window(hf, 4096) if hf.get("use_sliding_window", False) else None


def _decoder(hf: Mapping[str, Any], layer: BlockConfig) -> DecoderConfig:
    width, first = windowed(hf), size(hf, "max_window_layers", 28, least=0)

    def usual(layer: int) -> str:
        return "sliding_attention" if width is not None and layer >= first else "full_attention"

    rotary = full_rotary(hf, layer)
    kinds = {"full_attention": LayerKind(rotary=rotary), "sliding_attention": LayerKind(width, rotary)}
    return decoder(hf, layer, layer_kinds(hf, kinds, usual))


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
    return decoder(hf, layer, [LayerKind(windowed(hf), full_rotary(hf, layer))])


def _moe_weights(config: DecoderConfig) -> dict[str, Weight]:
    return weights(config) | expert_weights("mlp", ("gate_proj", "up_proj", "down_proj"))


QWEN2 = Family("decoder", _qwen2, weights, root=ROOT, heads=decoder_heads(renamed=(ROOT, "transformer.")))
QWEN3 = Family("decoder", _qwen3, weights, root=ROOT, heads=decoder_heads(renamed=(ROOT, "transformer.")))
QWEN3_MOE = Family("decoder", _qwen3_moe, _moe_weights, root=ROOT, heads=decoder_heads(renamed=(ROOT, "transformer.")))
