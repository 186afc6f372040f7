"""YOLOS (arXiv:2106.00666): a vision transformer whose last tokens each find an object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ..layers import HeadShape
from ..vision_transformer import VisionTransformer, VisionTransformerConfig
from .base import Family, Head, Weight, norms, projections, size
from .vit import embedded, patches, pre_norm_block, without_qkv_bias

_LAYER = "encoder.layer.{i}."
_LINEARS = {
    "layers.attn.q_proj": _LAYER + "attention.attention.query",
    "layers.attn.k_proj": _LAYER + "attention.attention.key",
    "layers.attn.v_proj": _LAYER + "attention.attention.value",
    "layers.attn.o_proj": _LAYER + "attention.output.dense",
    "layers.mlp.up_proj": _LAYER + "intermediate.dense",
    "layers.mlp.down_proj": _LAYER + "output.dense",
}
_PREDICTORS = {"class_predictor": "class_labels_classifier", "box_predictor": "bbox_predictor"}


def _config(hf: Mapping[str, Any], dtype: Any) -> VisionTransformerConfig:
    block = pre_norm_block(hf, size(hf, "intermediate_size", 3072), dtype, eps=1e-12)
    grid = patches({"image_size": [512, 864], **hf}, 16)
    return VisionTransformerConfig(
        block,
        size(hf, "num_hidden_layers"),
        **grid,
        detection_tokens=size(hf, "num_detection_tokens", 100),
        layer_positions=bool(hf.get("use_mid_position_embeddings", True)),
    )


def _weights(config: VisionTransformerConfig) -> dict[str, Weight]:
    table = embedded() | projections(_LINEARS, bias=True)
    table |= {"detection_tokens": Weight("embeddings.detection_tokens")}
    if config.layer_positions:
        table["layer_position_embed"] = Weight("encoder.mid_position_embeddings")
    table |= norms(
        {"layers.attn_norm": _LAYER + "layernorm_before", "layers.mlp_norm": _LAYER + "layernorm_after", "final_norm": "layernorm"}
    )
    return table if config.block.qkv_bias else without_qkv_bias(table)


def _heads(_: Mapping[str, Any]) -> dict[str, Head]:
    modules = {f"{ours}.layers_{n}": f"{theirs}.layers.{n}" for ours, theirs in _PREDICTORS.items() for n in range(3)}
    return {"object_detection": Head(HeadShape("each", activation="relu"), modules)}


FAMILIES.register(
    "yolos",
    Family(
        "vision",
        _config,
        _weights,
        architecture="Yolos",
        prefixes=("", "vit."),
        heads=_heads,
        model=VisionTransformer,
        carried=r"pooler\.dense\..*",
    ),
)
