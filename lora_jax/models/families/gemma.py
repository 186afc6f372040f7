"""Gemma 1, 2 and 3 (arXiv:2403.08295, 2408.00118, 2503.19786), the text models.

All scale their embeddings and count norms' weights from 1. Gemma 2 has norms on both ends of a branch, caps scores and logits, and a
window in every other layer; Gemma 3 has norms on queries and keys in place of the caps, and another rotary base in its windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ...errors import InputError
from ...weights.checkpoint import GGUFArchitecture
from ..decoder import DecoderConfig
from ..layers import BlockConfig, LayerType
from .base import Family, activation, only, size
from .llama import GGUF_BOTH_NORMS, GGUF_QK_NORMS, ROOT, block, decoder, full_rotary, gguf_weights, layer_types, weights, window


def _block(hf: Mapping[str, Any], dtype: Any, **options: Any) -> BlockConfig:
    only(hf, "use_bidirectional_attention", None, False)
    return block(hf, dtype, head_dim=size(hf, "head_dim", 256), norm_offset=1.0, mlp_bias=False, **options)


def _later_block(hf: Mapping[str, Any], dtype: Any, **options: Any) -> BlockConfig:
    act, scale = activation(hf, "hidden_activation", "gelu_pytorch_tanh"), size(hf, "query_pre_attn_scalar", 256) ** -0.5
    return _block(hf, dtype, activation=act, attention_scale=scale, norm_at="both", **options)


def _decoder(hf: Mapping[str, Any], layer: BlockConfig, types: Any, **options: Any) -> DecoderConfig:
    return decoder(hf, layer, types, tied=True, embed_scale=layer.width**0.5, **options)


def _gemma(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    # The first configs say `gelu` and mean its tanh approximation, which is what the models were trained with.
    act = activation(hf, "hidden_act", "gelu_pytorch_tanh")
    layer = _block(hf, dtype, activation="gelu_tanh" if act == "gelu" else act)
    return _decoder(hf, layer, [LayerType(rotary=full_rotary(hf, layer))])


def _gemma2(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    layer = _later_block(hf, dtype, softcap=hf.get("attn_logit_softcapping", 50.0))
    rotary = full_rotary(hf, layer)
    types = {"full_attention": LayerType(rotary=rotary), "sliding_attention": LayerType(window(hf, 4096), rotary)}
    found = layer_types(hf, types, lambda i: "full_attention" if i % 2 else "sliding_attention")
    return _decoder(hf, layer, found, logit_softcap=hf.get("final_logit_softcapping", 30.0))


def _gemma3(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    only(hf, "attn_logit_softcapping", None)
    layer = _later_block(hf, dtype, qk_norm="head")
    local = hf
    if "sliding_attention" not in (hf.get("rope_parameters") or {}):  # configs from before transformers 5
        local = {k: v for k, v in hf.items() if k not in ("rope_scaling", "rope_parameters", "rope_theta")}
        local["rope_theta"] = hf.get("rope_local_base_freq")
    types = {
        "full_attention": LayerType(rotary=full_rotary(hf, layer, layer="full_attention", theta=1000000.0)),
        "sliding_attention": LayerType(window(hf, 4096), full_rotary(local, layer, layer="sliding_attention")),
    }
    every = size(hf, "sliding_window_pattern", size(hf, "_sliding_window_pattern", 6))
    found = layer_types(hf, types, lambda i: "sliding_attention" if (i + 1) % every else "full_attention")
    return _decoder(hf, layer, found, logit_softcap=hf.get("final_logit_softcapping"))


_GELU = "gelu_pytorch_tanh"


def _gguf_gemma(settings: Any, config: dict[str, Any]) -> dict[str, Any]:
    return config | {"hidden_act": _GELU}


def _gguf_later(settings: Any, config: dict[str, Any], *, largest: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share.

    Args:
        largest: layers of the largest model, whose scores are scaled by the width over the heads (llama.cpp knows it by its depth too).
    """
    scalar = config["hidden_size"] // config["num_attention_heads"] if config["num_hidden_layers"] == largest else config["head_dim"]
    config = {key: value for key, value in config.items() if key != "hidden_act"}
    return config | {"hidden_activation": _GELU, "query_pre_attn_scalar": scalar}


def _gguf_layer_types(settings: Any, config: Mapping[str, Any], period: int) -> list[str]:
    """Each layer's type: all but the last of every `period` have a window, unless the file says otherwise."""
    depth, key = config["num_hidden_layers"], "attention.sliding_window_pattern"
    pattern = settings.get(key, (int, list), period)
    if isinstance(pattern, int):
        # llama.cpp takes 0 for a window in every layer.
        pattern = [not pattern or (i + 1) % pattern != 0 for i in range(depth)]
    if len(pattern) != depth:
        raise InputError(f"{settings.header.path}: '{settings.key(key)}' is of {len(pattern)} layers, and the model has {depth}.")
    return ["sliding_attention" if windowed else "full_attention" for windowed in pattern]


def _gguf_gemma2(settings: Any, config: dict[str, Any]) -> dict[str, Any]:
    base = settings.number("rope.freq_base_swa", config["rope_theta"])
    if base != config["rope_theta"]:
        raise InputError(f"{settings.header.path}: '{settings.key('rope.freq_base_swa')}' = {base} should be {config['rope_theta']}.")
    return _gguf_later(settings, config, largest=46) | {
        "attn_logit_softcapping": settings.number("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": settings.number("final_logit_softcapping", 30.0) or None,
        "sliding_window": settings.size("attention.sliding_window", 4096),
        "layer_types": _gguf_layer_types(settings, config, 2),
    }


def _gguf_gemma3(settings: Any, config: dict[str, Any]) -> dict[str, Any]:
    width = settings.get("attention.sliding_window", int, 0)  # left out of the file where no layer has one
    types = _gguf_layer_types(settings, config, 6)
    return _gguf_later(settings, config, largest=62) | {
        "final_logit_softcapping": settings.number("final_logit_softcapping", 0.0) or None,
        "sliding_window": width or 4096,
        "layer_types": types if width else ["full_attention"] * len(types),
        "rope_local_base_freq": settings.number("rope.freq_base_swa", 10000.0),
    }


def _gguf_windows(config: DecoderConfig, period: int) -> dict[str, Any]:
    """Their width, and which layers have one where that is not all but the last of every `period`."""
    windows = [one.window for one in config.layer_types]
    windowed = [one is not None for one in windows]
    found = {"attention.sliding_window": max(one or 0 for one in windows)} if any(windowed) else {}
    usual = windowed == [(i + 1) % period != 0 for i in range(len(windowed))]
    return found if usual else found | {"attention.sliding_window_pattern": windowed}


def _gguf_gemma2_settings(config: DecoderConfig) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": config.block.softcap, "final_logit_softcapping": config.logit_softcap}
    return {name: float(cap or 0.0) for name, cap in caps.items()} | _gguf_windows(config, 2)


def _gguf_gemma3_settings(config: DecoderConfig) -> dict[str, Any]:
    found = _gguf_windows(config, 6)
    if config.logit_softcap is not None:
        found["final_logit_softcapping"] = config.logit_softcap
    local = next((one.rotary for one in config.layer_types if one.window is not None), None)
    return found if local is None else found | {"rope.freq_base_swa": local.theta}


# llama.cpp's norms multiply by the weight as it stands: its converter adds the 1 that these models count from.
_GGUF_GEMMA = GGUFArchitecture("gemma", "gemma", gguf_weights(added=1.0), config=_gguf_gemma)
_GGUF_GEMMA2 = GGUFArchitecture(
    "gemma2", "gemma2", gguf_weights(GGUF_BOTH_NORMS, added=1.0), config=_gguf_gemma2, settings=_gguf_gemma2_settings, windows=True
)
_GGUF_GEMMA3 = GGUFArchitecture(
    "gemma3",
    "gemma3_text",
    gguf_weights(GGUF_BOTH_NORMS | GGUF_QK_NORMS, added=1.0),
    config=_gguf_gemma3,
    settings=_gguf_gemma3_settings,
    windows=True,
)

FAMILIES.register("gemma", Family("decoder", _gemma, weights, architecture="Gemma", root=ROOT, gguf=_GGUF_GEMMA))
FAMILIES.register("gemma2", Family("decoder", _gemma2, weights, architecture="Gemma2", root=ROOT, gguf=_GGUF_GEMMA2))
FAMILIES.register(
    "gemma3_text",
    Family(
        "decoder",
        _gemma3,
        weights,
        architecture="Gemma3Text",
        language_model="Gemma3ForCausalLM",
        root=ROOT,
        gguf=_GGUF_GEMMA3,
    ),
)
