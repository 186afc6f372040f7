"""SmolLM3: Llama with layers here and there that have no rotary positions (arXiv:2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import InputError
from ..decoder import DecoderConfig
from ..layers import LayerKind
from .base import Family, decoder_heads, size
from .llama import ROOT, block, decoder, full_rotary, layer_types, weights, window


def _config(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    layer, depth = block(hf, dtype), size(hf, "num_hidden_layers")
    rotary = full_rotary(hf, layer, theta=2000000.0)
    every = size(hf, "no_rope_layer_interval", 4)
    turned = hf.get("no_rope_layers")  # 1 where there are rotary positions
    turned = [(i + 1) % every != 0 for i in range(depth)] if turned is None else turned
    if len(turned) < depth:
        raise InputError(f"config.json: no_rope_layers speaks of {len(turned)} layers, and there are {depth}.")
    width = window(hf, None) if hf.get("use_sliding_window", False) else None
    types = layer_types(hf, lambda i: "full_attention" if turned[i] or width is None else "sliding_attention")
    kinds = [
        LayerKind(width if kind == "sliding_attention" else None, rotary if with_rotary else None)
        for kind, with_rotary in zip(types, turned, strict=False)
    ]
    return decoder(hf, layer, kinds, tied=True)


FAMILY = Family("decoder", _config, weights, root=ROOT, heads=decoder_heads(renamed=(ROOT, "transformer.")))
