"""GPT-2 (learned positions, weights stored as (in, out)) and GPT-NeoX (arXiv:2204.06745; Pythia): layer norms, biases everywhere.

GPT-NeoX runs attention and MLP side by side, and rotates a part of each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ...weights.checkpoint import GGUFArchitecture, GGUFWeight
from ..decoder import DecoderConfig
from ..layers import BlockConfig, LayerType
from .base import Family, Weight, activation, decoder_heads, embeddings, norms, only, projections, rotary, size, width_and_heads

_LAYER = "transformer.h.{i}."
_LINEARS = {
    "layers.attn.qkv_proj": _LAYER + "attn.c_attn",
    "layers.attn.o_proj": _LAYER + "attn.c_proj",
    "layers.mlp.up_proj": _LAYER + "mlp.c_fc",
    "layers.mlp.down_proj": _LAYER + "mlp.c_proj",
}
_NORMS = {"layers.attn_norm": _LAYER + "ln_1", "layers.mlp_norm": _LAYER + "ln_2", "final_norm": "transformer.ln_f"}
_EMBEDDINGS = {"embed": "transformer.wte", "position_embed": "transformer.wpe"}


def _config(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    only(hf, "scale_attn_by_inverse_layer_idx", False)
    only(hf, "add_cross_attention", False)
    width, heads = width_and_heads(hf, "n_embd", "n_head")
    block = BlockConfig(
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        hidden=size(hf, "n_inner", 4 * width),
        activation=activation(hf, "activation_function", "gelu_new"),
        gated=False,
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qkv="joined",
        attention_scale=None if hf.get("scale_attn_weights", True) else 1.0,
        dtype=dtype,
    )
    depth, vocab, positions = (size(hf, key) for key in ("n_layer", "vocab_size", "n_positions"))
    return DecoderConfig(block, depth, vocab, (LayerType(),), hf.get("tie_word_embeddings", True), positions)


def _weights(config: DecoderConfig) -> dict[str, Weight]:
    table = projections(_LINEARS, bias=True, transpose=False) | norms(_NORMS) | embeddings(_EMBEDDINGS)
    return table if config.tied else table | projections({"lm_head": "lm_head"}, bias=False)


def _gguf_config(settings: Any, config: dict[str, Any]) -> dict[str, Any]:
    names = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "intermediate_size": "n_inner"}
    names |= {"max_position_embeddings": "n_positions", "layer_norm_eps": "layer_norm_epsilon"}
    gone = ("num_key_value_heads", "head_dim", "hidden_act")
    renamed = {names.get(key, key): value for key, value in config.items() if key not in gone}
    return renamed | {"activation_function": "gelu_new"}


_GGUF = {
    "token_embd": GGUFWeight("transformer.wte"),
    "position_embd": GGUFWeight("transformer.wpe"),
    "output_norm": GGUFWeight("transformer.ln_f"),
    "output": GGUFWeight("lm_head"),
    "blk.{i}.attn_norm": GGUFWeight(_LAYER + "ln_1"),
    "blk.{i}.attn_qkv": GGUFWeight(_LAYER + "attn.c_attn", transposed=True),
    "blk.{i}.attn_output": GGUFWeight(_LAYER + "attn.c_proj", transposed=True),
    "blk.{i}.ffn_norm": GGUFWeight(_LAYER + "ln_2"),
    "blk.{i}.ffn_up": GGUFWeight(_LAYER + "mlp.c_fc", transposed=True),
    "blk.{i}.ffn_down": GGUFWeight(_LAYER + "mlp.c_proj", transposed=True),
}

GPT2 = Family(
    "decoder",
    _config,
    _weights,
    architecture="GPT2",
    language_model="GPT2LMHeadModel",
    root="transformer.",
    heads=decoder_heads(tokens="classifier"),
    gguf=GGUFArchitecture("gpt2", "gpt2", _GGUF, layer_norms=True, rotary="none", config=_gguf_config),
)

FAMILIES.register("gpt2", GPT2)


_NEOX_LAYER = "gpt_neox.layers.{i}."
_ATTENTION = {"layers.attn.qkv_proj": _NEOX_LAYER + "attention.query_key_value", "layers.attn.o_proj": _NEOX_LAYER + "attention.dense"}
_MLP = {"layers.mlp.up_proj": _NEOX_LAYER + "mlp.dense_h_to_4h", "layers.mlp.down_proj": _NEOX_LAYER + "mlp.dense_4h_to_h"}
_NEOX_NORMS = {
    "layers.attn_norm": _NEOX_LAYER + "input_layernorm",
    "layers.mlp_norm": _NEOX_LAYER + "post_attention_layernorm",
    "final_norm": "gpt_neox.final_layer_norm",
}


def _neox_config(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
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


def _neox_weights(config: DecoderConfig) -> dict[str, Weight]:
    table = projections(_ATTENTION, bias=config.block.qkv_bias) | projections(_MLP, bias=True)
    table |= norms(_NEOX_NORMS) | embeddings({"embed": "gpt_neox.embed_in"})
    return table if config.tied else table | {"lm_head.kernel": Weight("embed_out.weight", True, called="lm_head.weight")}


def _gguf_neox_config(settings: Any, config: dict[str, Any]) -> dict[str, Any]:
    renamed = {key: value for key, value in config.items() if key not in ("num_key_value_heads", "head_dim", "partial_rotary_factor")}
    renamed |= {"hidden_act": "gelu", "use_parallel_residual": settings.get("use_parallel_residual", bool, True)}
    return renamed | {"rotary_pct": config.get("partial_rotary_factor", 1.0)}


def _gguf_neox_settings(config: DecoderConfig) -> dict[str, Any]:
    return {"use_parallel_residual": config.block.parallel}


_GGUF_NEOX = {
    "token_embd": GGUFWeight("gpt_neox.embed_in"),
    "output_norm": GGUFWeight("gpt_neox.final_layer_norm"),
    "output": GGUFWeight("embed_out"),
    "blk.{i}.attn_norm": GGUFWeight(_NEOX_LAYER + "input_layernorm"),
    "blk.{i}.attn_qkv": GGUFWeight(_NEOX_LAYER + "attention.query_key_value", thirds="num_attention_heads"),
    "blk.{i}.attn_output": GGUFWeight(_NEOX_LAYER + "attention.dense"),
    "blk.{i}.ffn_norm": GGUFWeight(_NEOX_LAYER + "post_attention_layernorm"),
    "blk.{i}.ffn_up": GGUFWeight(_NEOX_LAYER + "mlp.dense_h_to_4h"),
    "blk.{i}.ffn_down": GGUFWeight(_NEOX_LAYER + "mlp.dense_4h_to_h"),
}

FAMILIES.register(
    "gpt_neox",
    Family(
        "decoder",
        _neox_config,
        _neox_weights,
        architecture="GPTNeoX",
        root="gpt_neox.",
        heads=decoder_heads(tokens="classifier"),
        gguf=GGUFArchitecture(
            "gptneox",
            "gpt_neox",
            _GGUF_NEOX,
            {"attention_bias": "blk.0.attn_qkv.bias"},
            layer_norms=True,
            rotary="part",
            config=_gguf_neox_config,
            settings=_gguf_neox_settings,
        ),
    ),
)
