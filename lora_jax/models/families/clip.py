"""The vision towers of CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343), out of a whole model or saved by themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ...errors import InputError
from ..vision_transformer import VisionTransformer, VisionTransformerConfig
from .base import Family, Weight, norms, projections, size
from .vit import image_head, patches, pre_norm_block

_LAYER = "encoder.layers.{i}."


def _tower(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the vision tower in that of the whole model, or of the tower itself."""
    found = hf.get("vision_config", hf)
    if not isinstance(found, Mapping):
        raise InputError("config.json: vision_config should be an object.")
    return found


# What transformers leaves out of a file where it is the family's default.
_SIZES = {"hidden_size": 768, "num_attention_heads": 12}


def _clip(hf: Mapping[str, Any], dtype: Any) -> VisionTransformerConfig:
    hf = {**_SIZES, **_tower(hf)}
    block = pre_norm_block(hf, size(hf, "intermediate_size", 3072), dtype, act="quick_gelu", eps=1e-5)
    options: dict[str, Any] = {"patch_bias": False, "entry_norm": True, "final_norm": False, "boxed": False}
    return VisionTransformerConfig(block, size(hf, "num_hidden_layers", 12), **patches(hf, 32), **options)


def _siglip(hf: Mapping[str, Any], dtype: Any) -> VisionTransformerConfig:
    hf = {**_SIZES, **_tower(hf)}
    block = pre_norm_block(hf, size(hf, "intermediate_size", 3072), dtype, act="gelu_pytorch_tanh")
    return VisionTransformerConfig(block, size(hf, "num_hidden_layers", 12), **patches(hf, 16), class_token=False, boxed=False)


def _weights(config: VisionTransformerConfig) -> dict[str, Weight]:
    own = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}
    linears = {f"layers.attn.{ours}": f"{_LAYER}self_attn.{theirs}" for ours, theirs in own.items()}
    linears |= {"layers.mlp.up_proj": _LAYER + "mlp.fc1", "layers.mlp.down_proj": _LAYER + "mlp.fc2"}
    table = projections({"patch_embed": "embeddings.patch_embedding"}, bias=config.patch_bias) | projections(linears, bias=True)
    table["position_embed"] = Weight("embeddings.position_embedding.weight")
    if config.class_token:
        table["class_token"] = Weight("embeddings.class_embedding")
    outer = {"entry_norm": "pre_layrnorm"} if config.entry_norm else {"final_norm": "post_layernorm"}
    return table | norms({"layers.attn_norm": _LAYER + "layer_norm1", "layers.mlp_norm": _LAYER + "layer_norm2", **outer})


# What makes one vector of the hidden states in contrastive training: no part of them.
_CLIP = Family(
    "vision",
    _clip,
    _weights,
    architecture="CLIP",
    language_model="CLIPVisionModel",
    prefixes=("", "vision_model."),
    heads=lambda _: image_head("mean"),
    model=VisionTransformer,
    carried=r"post_layernorm\..*",
)
_SIGLIP = dataclasses.replace(_CLIP, config=_siglip, architecture="Siglip", language_model="SiglipVisionModel", carried=r"head\..*")

FAMILIES.register("clip", _CLIP)
FAMILIES.register("siglip", _SIGLIP)
# Saved by themselves: transformers' classifier asks for the config of a whole model.
FAMILIES.register("clip_vision_model", dataclasses.replace(_CLIP, heads=lambda _: {}))
FAMILIES.register("siglip_vision_model", dataclasses.replace(_SIGLIP, heads=lambda _: {}))
