"""ModernBERT (arXiv:2412.13663): an encoder with norms before, rotary positions, and layers that see all or a window of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ..encoder import EncoderConfig
from ..layers import BlockConfig, HeadShape, LayerType
from .base import Family, Head, Weight, activation, embeddings, norms, only, projections, rotary, size, width_and_heads
from .llama import layer_types

_LAYER = "layers.{i}."
# Name of a layer type -> the base of its rotary positions: the key of old configs, and the default.
_THETA = {"full_attention": ("global_rope_theta", 160000.0), "sliding_attention": ("local_rope_theta", 10000.0)}


def _config(hf: Mapping[str, Any], dtype: Any) -> EncoderConfig:
    width, heads = width_and_heads(hf)
    bias = bool(hf.get("attention_bias", False))
    block = BlockConfig(
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        hidden=size(hf, "intermediate_size"),
        activation=activation(hf, "hidden_activation", "gelu"),
        gated=True,
        joined_gate=True,
        norm="layer",
        norm_eps=hf.get("norm_eps", 1e-5),
        norm_bias=hf.get("norm_bias", False),
        first_norm=False,  # the embedding has just been normed
        qkv="joined",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
        dtype=dtype,
    )
    return EncoderConfig(
        block,
        depth=size(hf, "num_hidden_layers"),
        vocab=size(hf, "vocab_size"),
        positions=0,
        token_types=0,
        pooler=False,
        layer_types=_layer_types(hf, block.head_dim),
        final_norm=True,
    )


def _layer_types(hf: Mapping[str, Any], head_dim: int) -> tuple[LayerType, ...]:
    """One in so many layers sees all, the first among them; the others see half of `local_attention` to each side."""
    every, window = size(hf, "global_attn_every_n_layers", 3), size(hf, "local_attention", 128) // 2 + 1
    types = {
        name: LayerType(window if name == "sliding_attention" else None, rotary(hf, head_dim, layer=name, theta=hf.get(old) or default))
        for name, (old, default) in _THETA.items()
    }
    return tuple(layer_types(hf, types, lambda i: "sliding_attention" if i % every else "full_attention"))


def _weights(config: EncoderConfig) -> dict[str, Weight]:
    block = config.block
    attention = {"layers.attn.qkv_proj": _LAYER + "attn.Wqkv", "layers.attn.o_proj": _LAYER + "attn.Wo"}
    mlp = {"layers.mlp.gate_up_proj": _LAYER + "mlp.Wi", "layers.mlp.down_proj": _LAYER + "mlp.Wo"}
    names = {"embed_norm": "embeddings.norm", "layers.mlp_norm": _LAYER + "mlp_norm", "final_norm": "final_norm"}
    table = embeddings({"embed": "embeddings.tok_embeddings"}) | norms(names, bias=block.norm_bias)
    table |= norms({"layers.attn_norm": _LAYER + "attn_norm"}, bias=block.norm_bias, first=1)
    return table | projections(attention, bias=block.qkv_bias) | projections(mlp, bias=block.mlp_bias)


def _heads(hf: Mapping[str, Any]) -> dict[str, Head]:
    """Each kind reads through the same dense layer and norm."""
    only(hf, "classifier_pooling", "cls", "mean")
    shape = {
        "activation": activation(hf, "classifier_activation", "gelu"),
        "dense_bias": hf.get("classifier_bias", False),
        "norm": True,
        "norm_bias": hf.get("norm_bias", False),
    }
    modules = {"pre_classifier": "head.dense", "classifier_norm": "head.norm", "classifier": "classifier"}
    of_text = HeadShape("mean" if hf.get("classifier_pooling") == "mean" else "first", **shape)
    each = Head(HeadShape("each", **shape), modules)
    return {"classification": Head(of_text, modules), "token_classification": each, "question_answering": each}


FAMILIES.register("modernbert", Family("encoder", _config, _weights, architecture="ModernBert", prefixes=("", "model."), heads=_heads))
