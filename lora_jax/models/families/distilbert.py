"""DistilBERT (arXiv:1910.01108): BERT with half the layers, other names, no token types and no pooler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..encoder import EncoderConfig
from ..head_shape import HeadShape
from .base import Family, Head, Weight, embeddings, encoder_heads, norms, post_norm_block, projections, size, width_and_heads

_LAYER = "transformer.layer.{i}."


def _config(hf: Mapping[str, Any], dtype: Any) -> EncoderConfig:
    # The norms' epsilon is no part of its config.
    sizes = *width_and_heads(hf, "dim", "n_heads"), size(hf, "hidden_dim")
    block = post_norm_block(*sizes, hf.get("activation", "gelu"), 1e-12, dtype)
    return EncoderConfig(
        block,
        depth=size(hf, "n_layers"),
        vocab=size(hf, "vocab_size"),
        positions=size(hf, "max_position_embeddings", 512),
        token_types=0,
        pooler=False,
    )


def _weights(_: EncoderConfig) -> dict[str, Weight]:
    linears = {
        f"layers.attn.{ours}_proj": f"{_LAYER}attention.{theirs}_lin" for ours, theirs in zip("qkvo", ("q", "k", "v", "out"), strict=True)
    }
    linears |= {"layers.mlp.up_proj": _LAYER + "ffn.lin1", "layers.mlp.down_proj": _LAYER + "ffn.lin2"}
    names = {
        "embed_norm": "embeddings.LayerNorm",
        "layers.attn_norm": _LAYER + "sa_layer_norm",
        "layers.mlp_norm": _LAYER + "output_layer_norm",
    }
    tables = {"embed": "embeddings.word_embeddings", "position_embed": "embeddings.position_embeddings"}
    return projections(linears, bias=True) | norms(names) | embeddings(tables)


def _heads(_: Mapping[str, Any]) -> dict[str, Head]:
    modules = {"pre_classifier": "pre_classifier", "classifier": "classifier"}
    return encoder_heads(Head(HeadShape(activation="relu"), modules))


FAMILY = Family(
    "encoder",
    _config,
    _weights,
    prefixes=("", "distilbert."),
    heads=_heads,
)
