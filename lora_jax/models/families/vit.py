"""ViT (arXiv:2010.11929) and what is saved in its form: DeiT (arXiv:2012.12877), which has a token for distillation as well."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ...errors import InputError
from ..layers import BlockConfig, HeadShape
from ..vision_transformer import VisionTransformer, VisionTransformerConfig
from .base import Family, Head, Weight, activation, norms, projections, size, width_and_heads

_LAYER = "encoder.layer.{i}."
# Ours -> (in files, in transformers' module).
_LINEARS = {
    "layers.attn.q_proj": ("attention.attention.query", "attention.q_proj"),
    "layers.attn.k_proj": ("attention.attention.key", "attention.k_proj"),
    "layers.attn.v_proj": ("attention.attention.value", "attention.v_proj"),
    "layers.attn.o_proj": ("attention.output.dense", "attention.o_proj"),
    "layers.mlp.up_proj": ("intermediate.dense", "mlp.fc1"),
    "layers.mlp.down_proj": ("output.dense", "mlp.fc2"),
}


def sides(hf: Mapping[str, Any], key: str, default: int) -> tuple[int, int]:
    """(height, width) at a key that holds a whole number or two of them."""
    value = hf.get(key)
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2:
        raise InputError(f"config.json: {key} = {value!r} should be a whole number, or two of them.")
    height, width = (size({key: one}, key, default) for one in pair)
    return height, width


def patches(hf: Mapping[str, Any], patch: int, image: int = 224) -> dict[str, Any]:
    """`patch`, `grid` and `channels` of a `VisionTransformerConfig`; the family's defaults are given."""
    of_patch, of_image = sides(hf, "patch_size", patch), sides(hf, "image_size", image)
    grid = tuple(whole // part for whole, part in zip(of_image, of_patch, strict=True))
    if 0 in grid:
        raise InputError(f"config.json: image_size = {hf.get('image_size')} is smaller than patch_size = {hf.get('patch_size')}.")
    return {"patch": of_patch, "grid": grid, "channels": size(hf, "num_channels", 3)}


def pre_norm_block(hf: Mapping[str, Any], hidden: int, dtype: Any, *, act: str = "gelu", eps: float = 1e-6, **options: Any) -> BlockConfig:
    """The layer that vision transformers share: norms on the inputs, biases everywhere, a plain MLP.

    Args:
        hidden: width of the MLP's hidden layer.
        act, eps: the family's default activation and epsilon.
        options: what else of a `BlockConfig`.
    """
    width, heads = width_and_heads(hf)
    same = {"width": width, "heads": heads, "kv_heads": heads, "head_dim": width // heads, "hidden": hidden, "dtype": dtype}
    same |= {"activation": activation(hf, "hidden_act", act), "gated": False, "norm": "layer", "norm_eps": hf.get("layer_norm_eps", eps)}
    return BlockConfig(**{**same, "qkv_bias": hf.get("qkv_bias", True), "out_bias": True, "mlp_bias": True, **options})


def _config(hf: Mapping[str, Any], dtype: Any) -> VisionTransformerConfig:
    block = pre_norm_block(hf, size(hf, "intermediate_size", 3072), dtype, eps=1e-12)
    return VisionTransformerConfig(block, size(hf, "num_hidden_layers"), **patches(hf, 16))


def _deit_config(hf: Mapping[str, Any], dtype: Any) -> VisionTransformerConfig:
    return dataclasses.replace(_config(hf, dtype), distillation_token=True)


def embedded() -> dict[str, Weight]:
    """Patches, tokens and positions under the names that most families have."""
    table = projections({"patch_embed": "embeddings.patch_embeddings.projection"}, bias=True)
    return table | {"class_token": Weight("embeddings.cls_token"), "position_embed": Weight("embeddings.position_embeddings")}


def renamed(linears: Mapping[str, tuple[str, str]], stored: str, called: str, *, bias: bool = True) -> dict[str, Weight]:
    """Linear layers that a file and transformers' module call differently: ours -> (file's, module's), after what each begins with."""
    found = {}
    for ours, (theirs, module) in linears.items():
        found[f"{ours}.kernel"] = Weight(f"{stored}{theirs}.weight", True, called=f"{called}{module}.weight")
        if bias:
            found[f"{ours}.bias"] = Weight(f"{stored}{theirs}.bias", called=f"{called}{module}.bias")
    return found


def _weights(config: VisionTransformerConfig) -> dict[str, Weight]:
    table = embedded() | renamed(_LINEARS, _LAYER, "layers.{i}.")
    if config.distillation_token:
        table["distillation_token"] = Weight("embeddings.distillation_token")
    for ours, theirs in (("layers.attn_norm", "layernorm_before"), ("layers.mlp_norm", "layernorm_after")):
        for leaf, name in (("scale", "weight"), ("bias", "bias")):
            table[f"{ours}.{leaf}"] = Weight(f"{_LAYER}{theirs}.{name}", called=f"layers.{{i}}.{theirs}.{name}")
    table |= norms({"final_norm": "layernorm"})
    return table if config.block.qkv_bias else without_qkv_bias(table)


def without_qkv_bias(table: dict[str, Weight]) -> dict[str, Weight]:
    """The table without the biases of queries, keys and values."""
    return {path: weight for path, weight in table.items() if path not in {f"layers.attn.{n}_proj.bias" for n in "qkv"}}


def image_head(reads: str) -> dict[str, Head]:
    """A linear layer of this on `reads` (`HeadShape`), as transformers has it."""
    return {"image_classification": Head(HeadShape(reads), {"classifier": "classifier"})}


# A pooler, and the token in place of patches that pretraining hid.
_CARRIED = r"pooler\.dense\..*|embeddings\.mask_token"
VIT = Family(
    "vision",
    _config,
    _weights,
    architecture="ViT",
    prefixes=("", "vit."),
    heads=lambda _: image_head("first"),
    model=VisionTransformer,
    carried=_CARRIED,
)

FAMILIES.register("vit", VIT)
FAMILIES.register("deit", dataclasses.replace(VIT, config=_deit_config, architecture="DeiT", prefixes=("", "deit.")))
