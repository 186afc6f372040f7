"""Phi-3, 3.5 and 4 (arXiv:2404.14219): Llama with one projection for queries, keys and values, and one for gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..decoder import DecoderConfig
from ..layers import LayerKind
from .base import Family
from .llama import ROOT, block, decoder, weights, window
from .rope import rotary


def _config(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    fused = {"qkv": "joined", "joined_gate": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False}
    layer = block(hf, dtype, norm_eps=hf.get("rms_norm_eps", 1e-5), **fused)
    scaling = hf.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("type") == "yarn":  # its name for longrope in early configs
        hf = {**hf, "rope_scaling": {**scaling, "type": "longrope"}}
    return decoder(hf, layer, [LayerKind(window(hf, None), rotary(hf, layer.head_dim))])


FAMILY = Family("decoder", _config, weights, root=ROOT)
