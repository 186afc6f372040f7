"""Gemma 1, 2 and 3 (arXiv:2403.08295, 2408.00118, 2503.19786), the text models.

All scale their embeddings and count norms' weights from 1. Gemma 2 has norms on both ends of a branch, caps scores and logits, and a
window in every other layer; Gemma 3 has norms on queries and keys in place of the caps, and another rotary base in its windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ..decoder import DecoderConfig
from ..layers import BlockConfig, LayerType
from .base import Family, activation, only, size
from .llama import ROOT, block, decoder, full_rotary, layer_types, weights, window


def _block(hf: Mapping[str, Any], dtype: Any, **options: Any) -> BlockConfig:
    only(hf, "use_bidirectional_attention", None, False)
    return block(hf, dtype, head_dim=size(hf, "head_dim", 256), norm_offset=1.0, mlp_bias=False, **options)


def _later_block(hf: Mapping[str, Any], dtype: Any, **options: Any) -> BlockConfig:
    act, scale = activation(hf, "hidden_activation", "gelu_pytorch_tanh"), size(hf, "query_pre_attn_scalar", 256) ** -0.5
    return _block(hf, dtype, activation=act, attention_scale=scale, norm_at="both", **options)


def _decoder(hf: Mapping[str, Any], layer: BlockConfig, types: Any, **options: Any) -> DecoderConfig:
    return decoder(hf, layer, types, tied=True, embed_scale=layer.width**0.5, **options)


def _gemma(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    # The first configs say `gelu` and mean its tanh approximation, which is what the models were trained with.
    act = activation(hf, "hidden_act", "gelu_pytorch_tanh")
    layer = _block(hf, dtype, activation="gelu_tanh" if act == "gelu" else act)
    return _decoder(hf, layer, [LayerType(rotary=full_rotary(hf, layer))])


def _gemma2(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    layer = _later_block(hf, dtype, softcap=hf.get("attn_logit_softcapping", 50.0))
    rotary = full_rotary(hf, layer)
    types = {"full_attention": LayerType(rotary=rotary), "sliding_attention": LayerType(window(hf, 4096), rotary)}
    found = layer_types(hf, types, lambda i: "full_attention" if i % 2 else "sliding_attention")
    return _decoder(hf, layer, found, logit_softcap=hf.get("final_logit_softcapping", 30.0))


def _gemma3(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    only(hf, "attn_logit_softcapping", None)
    layer = _later_block(hf, dtype, qk_norm="head")
    local = hf
    if "sliding_attention" not in (hf.get("rope_parameters") or {}):  # configs from before transformers 5
        local = {k: v for k, v in hf.items() if k not in ("rope_scaling", "rope_parameters", "rope_theta")}
        local["rope_theta"] = hf.get("rope_local_base_freq")
    types = {
        "full_attention": LayerType(rotary=full_rotary(hf, layer, layer="full_attention", theta=1000000.0)),
        "sliding_attention": LayerType(window(hf, 4096), full_rotary(local, layer, layer="sliding_attention")),
    }
    every = size(hf, "sliding_window_pattern", size(hf, "_sliding_window_pattern", 6))
    found = layer_types(hf, types, lambda i: "sliding_attention" if (i + 1) % every else "full_attention")
    return _decoder(hf, layer, found, logit_softcap=hf.get("final_logit_softcapping"))


FAMILIES.register("gemma", Family("decoder", _gemma, weights, architecture="Gemma", root=ROOT))
FAMILIES.register("gemma2", Family("decoder", _gemma2, weights, architecture="Gemma2", root=ROOT))
FAMILIES.register(
    "gemma3_text",
    Family("decoder", _gemma3, weights, architecture="Gemma3Text", language_model="Gemma3ForCausalLM", root=ROOT),
)
