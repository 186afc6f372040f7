"""BERT (arXiv:1810.04805) and what is saved in its form, MiniLM and most sentence encoders among it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..encoder import EncoderConfig
from ..layers import BlockConfig
from . import Family, Weight, only, projections, required

_LAYER = "encoder.layer.{i}."


def _config(hf: Mapping[str, Any], dtype: Any) -> EncoderConfig:
    only(hf, "position_embedding_type", "absolute", None)
    only(hf, "hidden_act", "gelu", "gelu_new", "relu", "silu")
    width, heads = required(hf, "hidden_size"), required(hf, "num_attention_heads")
    activation = hf.get("hidden_act", "gelu")
    block = BlockConfig(
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        hidden=required(hf, "intermediate_size"),
        activation="gelu_tanh" if activation == "gelu_new" else activation,
        gated=False,
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        norm_first=False,
        attention_bias=True,
        mlp_bias=True,
        dtype=dtype,
    )
    return EncoderConfig(
        block,
        depth=required(hf, "num_hidden_layers"),
        vocab=required(hf, "vocab_size"),
        positions=hf.get("max_position_embeddings", 512),
        token_types=hf.get("type_vocab_size", 2),
        pooler=True,
    )


def _weights(config: EncoderConfig) -> dict[str, Weight]:
    linears = {
        "layers.attn.q_proj": _LAYER + "attention.self.query",
        "layers.attn.k_proj": _LAYER + "attention.self.key",
        "layers.attn.v_proj": _LAYER + "attention.self.value",
        "layers.attn.o_proj": _LAYER + "attention.output.dense",
        "layers.mlp.up_proj": _LAYER + "intermediate.dense",
        "layers.mlp.down_proj": _LAYER + "output.dense",
    }
    if config.pooler:
        linears["pooler"] = "pooler.dense"
    table = projections(linears, bias=True)
    norms = {
        "embed_norm": "embeddings.LayerNorm",
        "layers.attn_norm": _LAYER + "attention.output.LayerNorm",
        "layers.mlp_norm": _LAYER + "output.LayerNorm",
    }
    for ours, theirs in norms.items():
        table |= {f"{ours}.scale": Weight(f"{theirs}.weight"), f"{ours}.bias": Weight(f"{theirs}.bias")}
    for ours, theirs in {"embed": "word", "position_embed": "position", "type_embed": "token_type"}.items():
        table[f"{ours}.embedding"] = Weight(f"embeddings.{theirs}_embeddings.weight")
    return table


FAMILY = Family("encoder", _config, _weights, prefixes=("", "bert."), ignored=("position_ids", "cls.", "classifier."))
