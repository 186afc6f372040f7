"""Llama (arXiv:2302.13971) and what is saved in its form, SmolLM2 among it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..decoder import DecoderConfig
from ..layers import BlockConfig
from . import Family, Weight, only, projections, required

_LAYER = "model.layers.{i}."


def _config(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    only(hf, "hidden_act", "silu")
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    only({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, "rope_type", "default")
    width, heads = required(hf, "hidden_size"), required(hf, "num_attention_heads")
    block = BlockConfig(
        width=width,
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or width // heads,
        hidden=required(hf, "intermediate_size"),
        activation="silu",
        gated=True,
        norm="rms",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        norm_first=True,
        attention_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        dtype=dtype,
    )
    return DecoderConfig(
        block,
        depth=required(hf, "num_hidden_layers"),
        vocab=required(hf, "vocab_size"),
        rope_theta=hf.get("rope_theta") or rope.get("rope_theta") or 10000.0,
        tied=hf.get("tie_word_embeddings", False),
    )


def _weights(config: DecoderConfig) -> dict[str, Weight]:
    attention = {f"layers.attn.{p}_proj": f"{_LAYER}self_attn.{p}_proj" for p in "qkvo"}
    mlp = {f"layers.mlp.{p}_proj": f"{_LAYER}mlp.{p}_proj" for p in ("gate", "up", "down")}
    table = projections(attention, bias=config.block.attention_bias) | projections(mlp, bias=config.block.mlp_bias)
    table |= {
        "embed.embedding": Weight("model.embed_tokens.weight"),
        "layers.attn_norm.scale": Weight(_LAYER + "input_layernorm.weight"),
        "layers.mlp_norm.scale": Weight(_LAYER + "post_attention_layernorm.weight"),
        "final_norm.scale": Weight("model.norm.weight"),
    }
    if not config.tied:
        table["lm_head.kernel"] = Weight("lm_head.weight", transpose=True)
    return table


FAMILY = Family("decoder", _config, _weights, ignored=("rotary_emb.inv_freq", "lm_head.weight"))
