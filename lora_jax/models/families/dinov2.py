"""DINOv2 (arXiv:2304.07193), and with register tokens (arXiv:2309.16588): what each layer adds is scaled, the largest has gated MLPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ..vision_transformer import VisionTransformer, VisionTransformerConfig
from .base import Family, Weight, norms, projections, size
from .vit import embedded, image_head, patches, pre_norm_block, renamed, without_qkv_bias

_LAYER = "encoder.layer.{i}."
_ATTENTION = {
    "layers.attn.q_proj": ("attention.attention.query", "attention.q_proj"),
    "layers.attn.k_proj": ("attention.attention.key", "attention.k_proj"),
    "layers.attn.v_proj": ("attention.attention.value", "attention.v_proj"),
    "layers.attn.o_proj": ("attention.output.dense", "attention.o_proj"),
}


def _config(hf: Mapping[str, Any], dtype: Any) -> VisionTransformerConfig:
    hidden = int(size(hf, "hidden_size") * (hf.get("mlp_ratio") or 4))
    options: dict[str, Any] = {"layer_scale": True}
    if hf.get("use_swiglu_ffn"):
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        options |= {"gated": True, "joined_gate": True, "activation": "silu"}
    return VisionTransformerConfig(pre_norm_block(hf, hidden, dtype, **options), size(hf, "num_hidden_layers"), **patches(hf, 14))


def _config_with_registers(hf: Mapping[str, Any], dtype: Any) -> VisionTransformerConfig:
    own = patches(hf, 16)
    return dataclasses.replace(_config(hf, dtype), registers=size(hf, "num_register_tokens", 4, least=0), antialias=True, **own)


def _weights(config: VisionTransformerConfig) -> dict[str, Weight]:
    table = embedded() | renamed(_ATTENTION, _LAYER, _LAYER)
    if config.block.gated:
        # Gate and up lie in one tensor of the file, and in two modules of transformers.
        mlp = {"layers.mlp.gate_up_proj": _LAYER + "mlp.weights_in"}
        table |= projections(mlp, bias=True) | renamed({"layers.mlp.down_proj": ("mlp.weights_out", "mlp.down_proj")}, _LAYER, _LAYER)
    else:
        table |= projections({"layers.mlp.up_proj": _LAYER + "mlp.fc1", "layers.mlp.down_proj": _LAYER + "mlp.fc2"}, bias=True)
    table |= norms({"layers.attn_norm": _LAYER + "norm1", "layers.mlp_norm": _LAYER + "norm2", "final_norm": "layernorm"})
    table |= {f"layers.{part}_scale": Weight(f"{_LAYER}layer_scale{n}.lambda1") for n, part in enumerate(("attn", "mlp"), 1)}
    if config.registers:
        table["register_tokens"] = Weight("embeddings.register_tokens")
    return table if config.block.qkv_bias else without_qkv_bias(table)


DINOV2 = Family(
    "vision",
    _config,
    _weights,
    architecture="Dinov2",
    prefixes=("", "dinov2."),
    heads=lambda _: image_head("first_mean"),
    model=VisionTransformer,
    carried=r"embeddings\.mask_token",
)
_REGISTERS = dataclasses.replace(
    DINOV2, config=_config_with_registers, architecture="Dinov2WithRegisters", prefixes=("", "dinov2_with_registers.")
)

FAMILIES.register("dinov2", DINOV2)
FAMILIES.register("dinov2_with_registers", _REGISTERS)
