"""Llama 1 to 3.3 (arXiv:2302.13971) and what is saved in its form, SmolLM2 among it; and the form itself, which most decoders share.

Of one setting or two beside Llama's own: Granite 3, OLMo 2, Phi-3 and SmolLM3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...config.doors import FAMILIES
from ...errors import InputError
from ...weights.checkpoint import GGUFArchitecture, GGUFWeight
from ..decoder import DecoderConfig
from ..layers import BlockConfig, LayerType
from .base import Family, Weight, activation, decoder_heads, only, projections, rotary, size

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


def decoder(hf: Mapping[str, Any], block: BlockConfig, types: Sequence[LayerType], *, tied: bool = False, **options: Any) -> DecoderConfig:
    """The decoder of such layers. `tied` is the family's default."""
    depth, vocab = size(hf, "num_hidden_layers"), size(hf, "vocab_size")
    return DecoderConfig(block, depth, vocab, tuple(types), hf.get("tie_word_embeddings", tied), **options)


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


def layer_type_names(hf: Mapping[str, Any], usual: Callable[[int], str]) -> list[str]:
    """Each layer's type as the config names it: `full_attention` or `sliding_attention`.

    Args:
        usual: a layer's type, where the config doesn't say.
    """
    depth = size(hf, "num_hidden_layers")
    types = hf.get("layer_types")
    types = [usual(i) for i in range(depth)] if types is None else types
    for kind in types:
        only({"layer_types": kind}, "layer_types", "full_attention", "sliding_attention")
    if len(types) != depth:
        raise InputError(f"config.json: layer_types names {len(types)} layers, and num_hidden_layers = {depth}.")
    return types


def layer_types(hf: Mapping[str, Any], types: Mapping[str, LayerType], usual: Callable[[int], str]) -> list[LayerType]:
    """Each layer's type, by its name in the config."""
    return [types[name] for name in layer_type_names(hf, usual)]


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


def _llama(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    layer = block(hf, dtype)
    return decoder(hf, layer, [LayerType(rotary=full_rotary(hf, layer))])


def _granite(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    """A multiplier on embeddings, scores, residual branches and logits (arXiv:2405.04324)."""
    scales = {"attention_scale": hf.get("attention_multiplier", 1.0), "residual_scale": hf.get("residual_multiplier", 1.0)}
    layer = block(hf, dtype, **scales)
    embed, logits = hf.get("embedding_multiplier", 1.0), 1 / hf.get("logits_scaling", 1.0)
    return decoder(hf, layer, [LayerType(rotary=full_rotary(hf, layer))], embed_scale=embed, logit_scale=logits)


def _olmo2(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    """Norms on the output of each branch, and over all queries and all keys (arXiv:2501.00656)."""
    layer = block(hf, dtype, norm_at="output", qk_norm="whole", norm_eps=hf.get("rms_norm_eps", 1e-5), mlp_bias=False)
    return decoder(hf, layer, [LayerType(rotary=full_rotary(hf, layer))])


def _phi3(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    """Phi-3, 3.5 and 4: one projection for queries, keys and values, and one for gate and up (arXiv:2404.14219)."""
    fused = {"qkv": "joined", "joined_gate": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False}
    layer = block(hf, dtype, norm_eps=hf.get("rms_norm_eps", 1e-5), **fused)
    scaling = hf.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("type") == "yarn":  # its name for longrope in early configs
        hf = {**hf, "rope_scaling": {**scaling, "type": "longrope"}}
    return decoder(hf, layer, [LayerType(window(hf, None), rotary(hf, layer.head_dim))])


def _smollm3(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    """Some layers have no rotary positions (arXiv:2501.18795)."""
    layer, depth = block(hf, dtype), size(hf, "num_hidden_layers")
    positions = full_rotary(hf, layer, theta=2000000.0)
    every = size(hf, "no_rope_layer_interval", 4)
    rotated = hf.get("no_rope_layers")  # 1 where there are rotary positions
    rotated = [(i + 1) % every != 0 for i in range(depth)] if rotated is None else rotated
    if len(rotated) < depth:
        raise InputError(f"config.json: no_rope_layers names {len(rotated)} layers, and num_hidden_layers = {depth}.")
    width = window(hf, None) if hf.get("use_sliding_window", False) else None
    names = layer_type_names(hf, lambda i: "full_attention" if rotated[i] or width is None else "sliding_attention")
    types = [
        LayerType(width if name == "sliding_attention" else None, positions if with_rotary else None)
        for name, with_rotary in zip(names, rotated, strict=False)
    ]
    return decoder(hf, layer, types, tied=True)


# What GGUF files call the modules. Norms are where a family has them.
_GGUF = {
    "token_embd": GGUFWeight(ROOT + "embed_tokens"),
    "output_norm": GGUFWeight(ROOT + "norm"),
    "output": GGUFWeight("lm_head"),
    "blk.{i}.attn_output": GGUFWeight(LAYER + "self_attn.o_proj"),
    "blk.{i}.ffn_down": GGUFWeight(LAYER + "mlp.down_proj"),
}
_GGUF_SEPARATE = {
    **{f"blk.{{i}}.attn_{p}": GGUFWeight(f"{LAYER}self_attn.{p}_proj") for p in "qkv"},
    **{f"blk.{{i}}.ffn_{p}": GGUFWeight(f"{LAYER}mlp.{p}_proj") for p in ("gate", "up")},
}
GGUF_NORMS = {"blk.{i}.attn_norm": "input_layernorm", "blk.{i}.ffn_norm": "post_attention_layernorm"}
_GGUF_OUTPUT_NORMS = {"blk.{i}.post_attention_norm": "post_attention_layernorm", "blk.{i}.post_ffw_norm": "post_feedforward_layernorm"}
GGUF_QK_NORMS = {f"blk.{{i}}.attn_{p}_norm": f"self_attn.{p}_norm" for p in "qk"}
GGUF_BOTH_NORMS = {**GGUF_NORMS, **_GGUF_OUTPUT_NORMS, "blk.{i}.ffn_norm": "pre_feedforward_layernorm"}
GGUF_BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}


def gguf_weights(norms: Mapping[str, str] = GGUF_NORMS, *, added: float = 0.0) -> dict[str, GGUFWeight]:
    """The modules of a decoder with separate projections, as GGUF files of most families have them.

    Args:
        norms: of a layer, GGUF's name -> Hugging Face's inside the layer.
        added: what llama.cpp's converter adds to the weights of all norms.
    """
    table = _GGUF | _GGUF_SEPARATE | {theirs: GGUFWeight(LAYER + ours, added=added) for theirs, ours in norms.items()}
    return table | {"output_norm": GGUFWeight(ROOT + "norm", added=added)}


def _gguf_pairs() -> dict[str, GGUFWeight]:
    """Likewise, of models that llama.cpp turns in pairs of neighbours: its converter moves the rows of queries and keys."""
    heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}
    return gguf_weights() | {f"blk.{{i}}.attn_{p}": GGUFWeight(f"{LAYER}self_attn.{p}_proj", pairs=key) for p, key in heads.items()}


def _gguf_granite(settings: Any, config: dict[str, Any]) -> dict[str, Any]:
    if not settings.get("rope.scaling.finetuned", bool, True):
        raise InputError(f"{settings.header.path}: a Granite without rotary positions is not supported.")
    return config | {
        # Where it is left out, or 0, llama.cpp scales scores as usual.
        "attention_multiplier": settings.number("attention.scale", 0.0) or config["head_dim"] ** -0.5,
        "embedding_multiplier": settings.number("embedding_scale", 1.0) or 1.0,
        "residual_multiplier": settings.number("residual_scale", 1.0) or 1.0,
        "logits_scaling": settings.number("logit_scale"),
    }


def _gguf_granite_settings(config: DecoderConfig) -> dict[str, Any]:
    scales = {"attention.scale": config.block.scale, "embedding_scale": config.embed_scale, "residual_scale": config.block.residual_scale}
    return scales | {"logit_scale": 1 / config.logit_scale}


def _gguf_olmo2(settings: Any, config: dict[str, Any]) -> dict[str, Any]:
    if settings.get("attention.sliding_window", int, 0):
        raise InputError(f"{settings.header.path}: an OLMo with windows of attention (OLMo 3) is not supported in GGUF.")
    return config


def _gguf_phi3(settings: Any, config: dict[str, Any]) -> dict[str, Any]:
    """The window is the original config's, though llama.cpp sees all tokens. transformers wants the trained length beside the scaling."""
    context = settings.size("rope.scaling.original_context_length", config["max_position_embeddings"])
    scaling = config["rope_scaling"]
    if scaling is not None:
        scaling = {key: value for key, value in scaling.items() if key != "original_max_position_embeddings"}
    more = {"rope_scaling": scaling, "original_max_position_embeddings": context}
    return config | more | {"sliding_window": settings.get("attention.sliding_window", int, 0) or None}


def _gguf_phi3_settings(config: DecoderConfig) -> dict[str, Any]:
    return {"attention.sliding_window": config.layer_types[0].window or 0}


_GGUF_FUSED = {
    "blk.{i}.attn_qkv": GGUFWeight(LAYER + "self_attn.qkv_proj"),
    "blk.{i}.ffn_up": GGUFWeight(LAYER + "mlp.gate_up_proj"),
    **{theirs: GGUFWeight(LAYER + ours) for theirs, ours in GGUF_NORMS.items()},
}

HEADS = decoder_heads(renamed=(ROOT, "transformer."))


GGUF_LLAMA = GGUFArchitecture("llama", "llama", _gguf_pairs(), GGUF_BIASES)
_GGUF_GRANITE = GGUFArchitecture("granite", "granite", _gguf_pairs(), GGUF_BIASES, config=_gguf_granite, settings=_gguf_granite_settings)
_GGUF_OLMO2 = GGUFArchitecture("olmo2", "olmo2", gguf_weights(_GGUF_OUTPUT_NORMS | GGUF_QK_NORMS), GGUF_BIASES, config=_gguf_olmo2)
_GGUF_PHI3 = GGUFArchitecture("phi3", "phi3", _GGUF | _GGUF_FUSED, rotary="part", config=_gguf_phi3, settings=_gguf_phi3_settings)
_GGUF_SMOLLM3 = GGUFArchitecture("smollm3", "smollm3", _gguf_pairs(), GGUF_BIASES)

FAMILIES.register("llama", Family("decoder", _llama, weights, architecture="Llama", root=ROOT, heads=HEADS, gguf=GGUF_LLAMA))
FAMILIES.register("granite", Family("decoder", _granite, weights, architecture="Granite", root=ROOT, gguf=_GGUF_GRANITE))
FAMILIES.register("olmo2", Family("decoder", _olmo2, weights, architecture="Olmo2", root=ROOT, gguf=_GGUF_OLMO2))
FAMILIES.register("phi3", Family("decoder", _phi3, weights, architecture="Phi3", root=ROOT, gguf=_GGUF_PHI3))
FAMILIES.register("smollm3", Family("decoder", _smollm3, weights, architecture="SmolLM3", root=ROOT, heads=HEADS, gguf=_GGUF_SMOLLM3))
