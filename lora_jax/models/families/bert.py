"""BERT (arXiv:1810.04805) and what is saved in its form, MiniLM and most sentence encoders among it.

RoBERTa (arXiv:1907.11692), XLM-RoBERTa (arXiv:1911.02116) and CamemBERT count positions from the padding's id on. DistilBERT
(arXiv:1910.01108) has half the layers, other names, no token types and no pooler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ..encoder import EncoderConfig
from ..layers import HeadShape
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


def _roberta_config(hf: Mapping[str, Any], dtype: Any) -> EncoderConfig:
    only(hf, "is_decoder", False)
    return config_of(hf, dtype, padding_idx=size(hf, "pad_token_id", 1, least=0))


def _roberta_heads(_: Mapping[str, Any]) -> dict[str, Head]:
    # Its classifier has a dense layer of its own and leaves the pooler aside.
    modules = {"pre_classifier": "classifier.dense", "classifier": "classifier.out_proj"}
    return encoder_heads(Head(HeadShape(activation="tanh"), modules))


_DISTIL_LAYER = "transformer.layer.{i}."


def _distilbert_config(hf: Mapping[str, Any], dtype: Any) -> EncoderConfig:
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


def _distilbert_weights(_: EncoderConfig) -> dict[str, Weight]:
    attention = zip("qkvo", ("q", "k", "v", "out"), strict=True)
    linears = {f"layers.attn.{ours}_proj": f"{_DISTIL_LAYER}attention.{theirs}_lin" for ours, theirs in attention}
    linears |= {"layers.mlp.up_proj": _DISTIL_LAYER + "ffn.lin1", "layers.mlp.down_proj": _DISTIL_LAYER + "ffn.lin2"}
    names = {
        "embed_norm": "embeddings.LayerNorm",
        "layers.attn_norm": _DISTIL_LAYER + "sa_layer_norm",
        "layers.mlp_norm": _DISTIL_LAYER + "output_layer_norm",
    }
    tables = {"embed": "embeddings.word_embeddings", "position_embed": "embeddings.position_embeddings"}
    return projections(linears, bias=True) | norms(names) | embeddings(tables)


def _distilbert_heads(_: Mapping[str, Any]) -> dict[str, Head]:
    return encoder_heads(Head(HeadShape(activation="relu"), {"pre_classifier": "pre_classifier", "classifier": "classifier"}))


BERT = Family(
    "encoder",
    config_of,
    weights_of,
    architecture="Bert",
    prefixes=("", "bert."),
    heads=lambda _: encoder_heads(Head(HeadShape(pooler=True), {"classifier": "classifier"})),
)
ROBERTA = Family("encoder", _roberta_config, weights_of, architecture="Roberta", prefixes=("", "roberta."), heads=_roberta_heads)
DISTILBERT = Family(
    "encoder",
    _distilbert_config,
    _distilbert_weights,
    architecture="DistilBert",
    prefixes=("", "distilbert."),
    heads=_distilbert_heads,
)

FAMILIES.register("bert", BERT)
FAMILIES.register("roberta", ROBERTA)
FAMILIES.register("xlm-roberta", dataclasses.replace(ROBERTA, architecture="XLMRoberta"))
FAMILIES.register("camembert", dataclasses.replace(ROBERTA, architecture="Camembert"))
FAMILIES.register("distilbert", DISTILBERT)
