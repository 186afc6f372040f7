"""GPT-NeoX (arXiv:2204.06745), and the Pythia models: attention and MLP side by side, a part of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ..decoder import DecoderConfig
from ..layers import BlockConfig, LayerType
from .base import Family, Weight, activation, decoder_heads, embeddings, norms, projections, size, width_and_heads
from .rope import rotary

_LAYER = "gpt_neox.layers.{i}."
_ATTENTION = {"layers.attn.qkv_proj": _LAYER + "attention.query_key_value", "layers.attn.o_proj": _LAYER + "attention.dense"}
_MLP = {"layers.mlp.up_proj": _LAYER + "mlp.dense_h_to_4h", "layers.mlp.down_proj": _LAYER + "mlp.dense_4h_to_h"}
_NORMS = {
    "layers.attn_norm": _LAYER + "input_layernorm",
    "layers.mlp_norm": _LAYER + "post_attention_layernorm",
    "final_norm": "gpt_neox.final_layer_norm",
}


def _config(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    width, heads = width_and_heads(hf)
    bias = hf.get("attention_bias", True)
    block = BlockConfig(
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        hidden=size(hf, "intermediate_size"),
        activation=activation(hf, "hidden_act", "gelu"),
        gated=False,
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        parallel=hf.get("use_parallel_residual", True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        qkv="per_head",
        dtype=dtype,
    )
    positions = rotary(hf, block.head_dim, theta=hf.get("rotary_emb_base", 10000.0), fraction=hf.get("rotary_pct", 0.25))
    depth, vocab = size(hf, "num_hidden_layers"), size(hf, "vocab_size")
    return DecoderConfig(block, depth, vocab, (LayerType(rotary=positions),), hf.get("tie_word_embeddings", False))


def _weights(config: DecoderConfig) -> dict[str, Weight]:
    table = projections(_ATTENTION, bias=config.block.qkv_bias) | projections(_MLP, bias=True)
    table |= norms(_NORMS) | embeddings({"embed": "gpt_neox.embed_in"})
    return table if config.tied else table | {"lm_head.kernel": Weight("embed_out.weight", True, called="lm_head.weight")}


FAMILIES.register(
    "gpt_neox",
    Family("decoder", _config, _weights, architecture="GPTNeoX", root="gpt_neox.", heads=decoder_heads(tokens="classifier")),
)
