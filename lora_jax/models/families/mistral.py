"""Mistral (arXiv:2310.06825): Llama with a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..decoder import DecoderConfig
from ..layers import LayerKind
from .base import Family, only
from .llama import ROOT, block, decoder, full_rotary, weights, window


def _config(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    for kind in hf.get("layer_types") or ():
        only({"layer_types": kind}, "layer_types", "sliding_attention")  # with others it is a Ministral
    layer = block(hf, dtype, qkv_bias=False, out_bias=False, mlp_bias=False)
    return decoder(hf, layer, [LayerKind(window(hf, 4096), full_rotary(hf, layer))])


FAMILY = Family("decoder", _config, weights, root=ROOT)
