"""DeBERTa-v2 and -v3 (arXiv:2006.03654, arXiv:2111.09543): BERT's layers with disentangled attention over relative positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ...errors import InputError
from ..encoder import EncoderConfig
from ..layers import HeadShape
from ..positions import Relative
from .base import (
    Family,
    Head,
    Weight,
    activation,
    embeddings,
    encoder_heads,
    norms,
    only,
    post_norm_block,
    projections,
    size,
    width_and_heads,
)
from .bert import EMBEDDINGS, NORMS

_LAYER = "encoder.layer.{i}."
_SELF = _LAYER + "attention.self."
_LINEARS = {
    **{f"layers.attn.{short}_proj": f"{_SELF}{long}_proj" for short, long in (("q", "query"), ("k", "key"), ("v", "value"))},
    "layers.attn.o_proj": _LAYER + "attention.output.dense",
    "layers.mlp.up_proj": _LAYER + "intermediate.dense",
    "layers.mlp.down_proj": _LAYER + "output.dense",
}


def _config(hf: Mapping[str, Any], dtype: Any) -> EncoderConfig:
    width, heads = width_and_heads(hf)
    only(hf, "embedding_size", width)
    only(hf, "attention_head_size", width // heads)
    only(hf, "conv_groups", 1)
    convolution = hf.get("conv_kernel_size", 0)
    if not isinstance(convolution, int) or (convolution > 0 and convolution % 2 == 0):
        raise InputError(f"config.json: conv_kernel_size = {convolution!r} is not supported (only odd numbers, and 0).")
    scores = _scores(hf)
    block = post_norm_block(
        width, heads, size(hf, "intermediate_size"), hf.get("hidden_act", "gelu"), hf.get("layer_norm_eps", 1e-7), dtype
    )
    return EncoderConfig(
        # Each kind of scores has a share in the scale, whether there are relative positions or not.
        dataclasses.replace(block, attention_scale=(width // heads * (1 + len(scores))) ** -0.5, relative=_relative(hf, scores)),
        depth=size(hf, "num_hidden_layers"),
        vocab=size(hf, "vocab_size"),
        positions=size(hf, "max_position_embeddings", 512) if hf.get("position_biased_input", True) else 0,
        token_types=size(hf, "type_vocab_size", 0, least=0),
        pooler=False,
        relative_norm="layer_norm" in _words(hf, "norm_rel_ebd"),
        convolution=max(convolution, 0),
        convolution_activation=activation(hf, "conv_act", "tanh"),
    )


def _words(hf: Mapping[str, Any], key: str) -> list[str]:
    """What `config[key]` lists, as a list or joined by bars."""
    value = hf.get(key) or []
    return [word.strip() for word in value.lower().split("|")] if isinstance(value, str) else list(value)


def _scores(hf: Mapping[str, Any]) -> set[str]:
    scores = _words(hf, "pos_att_type")
    for kind in scores:
        only({"pos_att_type": kind}, "pos_att_type", "c2p", "p2c")
    return set(scores)


def _relative(hf: Mapping[str, Any], scores: set[str]) -> Relative | None:
    if not hf.get("relative_attention", False):
        return None
    if not scores:
        raise InputError("config.json: relative_attention is true, and pos_att_type names neither c2p nor p2c.")
    longest = hf.get("max_relative_positions", -1)
    longest = longest if longest >= 1 else size(hf, "max_position_embeddings", 512)
    buckets = max(0, hf.get("position_buckets", -1))
    if buckets and not 2 <= buckets < 2 * (longest - 1):
        raise InputError(f"config.json: position_buckets = {buckets} does not fit max_relative_positions = {longest}.")
    return Relative(longest, buckets, "c2p" in scores, "p2c" in scores, hf.get("share_att_key", False))


def _weights(config: EncoderConfig) -> dict[str, Weight]:
    linears, names, relative = dict(_LINEARS), dict(NORMS), config.block.relative
    table: dict[str, Weight] = {}
    if relative is not None:
        table["relative_embed"] = Weight("encoder.rel_embeddings.weight")
        if relative.c2p and not relative.shared:
            linears["layers.attn.pos_k_proj"] = _SELF + "pos_key_proj"
        if relative.p2c and not relative.shared:
            linears["layers.attn.pos_q_proj"] = _SELF + "pos_query_proj"
        if config.relative_norm:
            names["relative_norm"] = "encoder.LayerNorm"
    if config.convolution:
        table |= {"convolution.kernel": Weight("encoder.conv.conv.weight", transpose=True)}
        table |= {"convolution.bias": Weight("encoder.conv.conv.bias")}
        names["convolution_norm"] = "encoder.conv.LayerNorm"
    has = {"embed": True, "position_embed": config.positions, "type_embed": config.token_types}
    tables = {ours: theirs for ours, theirs in EMBEDDINGS.items() if has[ours]}
    return table | projections(linears, bias=True) | norms(names) | embeddings(tables)


def _heads(hf: Mapping[str, Any]) -> dict[str, Head]:
    act = activation(hf, "pooler_hidden_act", "gelu")
    return encoder_heads(Head(HeadShape(activation=act), {"pre_classifier": "pooler.dense", "classifier": "classifier"}))


# Version 3 is saved under this name too.
FAMILIES.register("deberta-v2", Family("encoder", _config, _weights, architecture="DebertaV2", prefixes=("", "deberta."), heads=_heads))
