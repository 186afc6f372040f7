"""Llama 1 to 3.3 (arXiv:2302.13971) and what is saved in its form, SmolLM2 among it; and the form itself, which most decoders share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import InputError
from ..decoder import DecoderConfig
from ..layers import BlockConfig, LayerKind
from .base import Family, Weight, activation, decoder_heads, only, projections, size
from .rope import rotary

ROOT = "model."
LAYER = ROOT + "layers.{i}."

# Where a block's norms stand (`BlockConfig.norm_at`) -> ours and Hugging Face's names for them.
_NORMS = {
    "input": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "output": {"attn_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"},
    "both": {
        "attn_norm": "input_layernorm",
        "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
}


def block(hf: Mapping[str, Any], dtype: Any, **options: Any) -> BlockConfig:
    """A gated layer with RMS norms, in Hugging Face's usual keys; `options` are what a family has otherwise."""
    width, heads = size(hf, "hidden_size"), size(hf, "num_attention_heads")
    kv_heads = size(hf, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise InputError(f"config.json: num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}.")
    usual = {
        "width": width,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": size(hf, "head_dim", width // heads),
        "hidden": size(hf, "intermediate_size"),
        "activation": activation(hf, "hidden_act", "silu"),
        "gated": True,
        "norm": "rms",
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "qkv_bias": hf.get("attention_bias", False),
        "out_bias": hf.get("attention_bias", False),
        "mlp_bias": hf.get("mlp_bias", False),
        "dtype": dtype,
    }
    return BlockConfig(**usual | options)


def decoder(hf: Mapping[str, Any], block: BlockConfig, kinds: Sequence[LayerKind], *, tied: bool = False, **options: Any) -> DecoderConfig:
    """The decoder of such layers. `tied` is the family's default."""
    depth, vocab = size(hf, "num_hidden_layers"), size(hf, "vocab_size")
    return DecoderConfig(block, depth, vocab, tuple(kinds), hf.get("tie_word_embeddings", tied), **options)


def full_rotary(hf: Mapping[str, Any], block: BlockConfig, **options: Any) -> Any:
    """`rotary`, of a family that turns whole heads."""
    settings = hf.get("rope_parameters") or {}
    for where in (hf, settings):
        only(where, "partial_rotary_factor", None, 1.0)
    return rotary(hf, block.head_dim, **options)


def window(hf: Mapping[str, Any], default: int | None) -> int | None:
    """How many tokens a query sees, itself among them; None for all before it. `default` is where the config doesn't say."""
    value = hf.get("sliding_window", default)
    return None if value is None else size({"sliding_window": value}, "sliding_window")


def layer_types(hf: Mapping[str, Any], usual: Callable[[int], str]) -> list[str]:
    """What the config calls each layer's kind of attention: `full_attention` or `sliding_attention`.

    Args:
        usual: a layer's kind, where the config doesn't say.
    """
    depth = size(hf, "num_hidden_layers")
    types = hf.get("layer_types")
    types = [usual(i) for i in range(depth)] if types is None else types
    for kind in types:
        only({"layer_types": kind}, "layer_types", "full_attention", "sliding_attention")
    if len(types) != depth:
        raise InputError(f"config.json: layer_types names {len(types)} layers, and num_hidden_layers = {depth}.")
    return types


def layer_kinds(hf: Mapping[str, Any], kinds: Mapping[str, LayerKind], usual: Callable[[int], str]) -> list[LayerKind]:
    """Each layer's kind, by what `layer_types` calls it."""
    return [kinds[kind] for kind in layer_types(hf, usual)]


def weights(config: DecoderConfig) -> dict[str, Weight]:
    """The names that follow from a decoder's options."""
    cfg = config.block
    attention = ("q", "k", "v") if cfg.qkv == "separate" else ("qkv",)
    mlp = () if cfg.experts is not None else ("gate_up", "down") if cfg.joined_gate else ("gate", "up", "down")
    table = projections({f"layers.attn.{p}_proj": f"{LAYER}self_attn.{p}_proj" for p in attention}, bias=cfg.qkv_bias)
    table |= projections({"layers.attn.o_proj": f"{LAYER}self_attn.o_proj"}, bias=cfg.out_bias)
    table |= projections({f"layers.mlp.{p}_proj": f"{LAYER}mlp.{p}_proj" for p in mlp}, bias=cfg.mlp_bias)
    table |= {f"layers.{ours}.scale": Weight(f"{LAYER}{theirs}.weight") for ours, theirs in _NORMS[cfg.norm_at].items()}
    if cfg.qk_norm is not None:
        table |= {f"layers.attn.{p}_norm.scale": Weight(f"{LAYER}self_attn.{p}_norm.weight") for p in "qk"}
    table |= {"embed.embedding": Weight(ROOT + "embed_tokens.weight"), "final_norm.scale": Weight(ROOT + "norm.weight")}
    if not config.tied:
        table["lm_head.kernel"] = Weight("lm_head.weight", transpose=True)
    return table


def _config(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    layer = block(hf, dtype)
    return decoder(hf, layer, [LayerKind(rotary=full_rotary(hf, layer))])


FAMILY = Family("decoder", _config, weights, root=ROOT, heads=decoder_heads(renamed=(ROOT, "transformer.")))
