"""IBM's Granite 3: Llama with a multiplier on embeddings, scores, residual branches and logits (arXiv:2405.04324)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..decoder import DecoderConfig
from ..layers import LayerKind
from .base import Family
from .llama import ROOT, block, decoder, full_rotary, weights


def _config(hf: Mapping[str, Any], dtype: Any) -> DecoderConfig:
    scales = {"attention_scale": hf.get("attention_multiplier", 1.0), "residual_scale": hf.get("residual_multiplier", 1.0)}
    layer = block(hf, dtype, **scales)
    embed, logits = hf.get("embedding_multiplier", 1.0), 1 / hf.get("logits_scaling", 1.0)
    return decoder(hf, layer, [LayerKind(rotary=full_rotary(hf, layer))], embed_scale=embed, logit_scale=logits)


FAMILY = Family("decoder", _config, weights, root=ROOT)
