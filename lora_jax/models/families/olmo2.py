"""OLMo 2 (arXiv:2501.00656): Llama with norms on the output of each branch, and over all queries and all keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..decoder import DecoderConfig
from ..layers import LayerKind
from .base import Family
from .llama import ROOT, block, decoder, full_rotary, weights


def _config(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    layer = block(hf, dtype, norm_at="output", qk_norm="whole", norm_eps=hf.get("rms_norm_eps", 1e-5), mlp_bias=False)
    return decoder(hf, layer, [LayerKind(rotary=full_rotary(hf, layer))])


FAMILY = Family("decoder", _config, weights, root=ROOT)
