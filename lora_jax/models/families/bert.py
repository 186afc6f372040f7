"""BERT (arXiv:1810.04805) and what is saved in its form, MiniLM and most sentence encoders among it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..encoder import EncoderConfig
from ..head_shape import HeadShape
from .base import Family, Head, Weight, embeddings, encoder_heads, norms, only, post_norm_block, projections, size, width_and_heads

_LAYER = "encoder.layer.{i}."
LINEARS = {
    "layers.attn.q_proj": _LAYER + "attention.self.query",
    "layers.attn.k_proj": _LAYER + "attention.self.key",
    "layers.attn.v_proj": _LAYER + "attention.self.value",
    "layers.attn.o_proj": _LAYER + "attention.output.dense",
    "layers.mlp.up_proj": _LAYER + "intermediate.dense",
    "layers.mlp.down_proj": _LAYER + "output.dense",
}
NORMS = {
    "embed_norm": "embeddings.LayerNorm",
    "layers.attn_norm": _LAYER + "attention.output.LayerNorm",
    "layers.mlp_norm": _LAYER + "output.LayerNorm",
}
EMBEDDINGS = {
    "embed": "embeddings.word_embeddings",
    "position_embed": "embeddings.position_embeddings",
    "type_embed": "embeddings.token_type_embeddings",
}


def config_of(hf: Mapping[str, Any], dtype: Any, *, padding_idx: int | None = None) -> EncoderConfig:
    """The config of a model of BERT's form."""
    only(hf, "position_embedding_type", "absolute", None)
    block = post_norm_block(
        *width_and_heads(hf),
        size(hf, "intermediate_size"),
        hf.get("hidden_act", "gelu"),
        hf.get("layer_norm_eps", 1e-12),
        dtype,
    )
    return EncoderConfig(
        block,
        depth=size(hf, "num_hidden_layers"),
        vocab=size(hf, "vocab_size"),
        positions=size(hf, "max_position_embeddings", 512),
        token_types=size(hf, "type_vocab_size", 2, least=0),
        pooler=True,
        padding_idx=padding_idx,
    )


def weights_of(config: EncoderConfig) -> dict[str, Weight]:
    """Where the parameters of a model of BERT's form come from."""
    linears = LINEARS | {"pooler": "pooler.dense"} if config.pooler else LINEARS
    return projections(linears, bias=True) | norms(NORMS) | embeddings(EMBEDDINGS)


FAMILY = Family(
    "encoder",
    config_of,
    weights_of,
    prefixes=("", "bert."),
    heads=lambda _: encoder_heads(Head(HeadShape(pooler=True), {"classifier": "classifier"})),
)
