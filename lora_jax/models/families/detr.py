"""DETR (arXiv:2005.12872): a transformer that finds objects in the feature map of a convolutional net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ...errors import InputError
from ..detr import Detr, DetrConfig
from ..layers import BlockConfig, HeadShape
from . import find_family
from .base import Family, Head, Weight, activation, norms, only, projections, size, width_and_heads

_BACKBONE = "backbone.conv_encoder.model."
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}


def _block(hf: Mapping[str, Any], dtype: Any, half: str) -> BlockConfig:
    width, heads = width_and_heads({"d_model": 256, f"{half}_attention_heads": 8, **hf}, "d_model", f"{half}_attention_heads")
    return BlockConfig(
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        hidden=size(hf, f"{half}_ffn_dim", 2048),
        activation=activation(hf, "activation_function", "relu"),
        gated=False,
        norm="layer",
        norm_eps=1e-5,  # no part of the config
        norm_at="residual",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        cross=half == "decoder",
        dtype=dtype,
    )


def _net(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the convolutional net: Hugging Face's, or timm's by its name, as older files have it."""
    own = hf.get("backbone_config")
    if own is not None and not isinstance(own, dict):
        raise InputError(f"config.json: backbone_config = {own!r} should be an object.")
    if own is None or own.get("model_type") == "timm_backbone":
        channels = hf.get("num_channels", 3)
        return {"architecture": (own or hf).get("backbone") or "resnet50", "pretrained_cfg": {"input_size": [channels, 224, 224]}}
    return own


def _config(hf: Mapping[str, Any], dtype: Any) -> DetrConfig:
    only(hf, "position_embedding_type", "sine")
    if hf.get("dilation"):
        raise InputError("config.json: dilation = true is not supported.")
    net = _net(hf)
    family = find_family(net, "config.json: backbone_config")
    return DetrConfig(
        family.config(net, dtype),
        family.model,
        _block(hf, dtype, "encoder"),
        _block(hf, dtype, "decoder"),
        encoder_depth=size(hf, "encoder_layers", 6),
        depth=size(hf, "decoder_layers", 6),
        queries=size(hf, "num_queries", 100),
        timm="architecture" in net,
    )


def _weights(config: DetrConfig) -> dict[str, Weight]:
    named = [f for f in FAMILIES.all().values() if f.model is config.net and bool(f.timm) == config.timm]
    table = {f"backbone.{path}": w.under(lambda n: _BACKBONE + n) for path, w in named[0].weights(config.backbone).items()}
    table |= {"input_proj.kernel": Weight("input_projection.weight", transpose=True), "input_proj.bias": Weight("input_projection.bias")}
    table["query_embed"] = Weight("query_position_embeddings.weight")
    for half in ("encoder", "decoder"):
        layer = f"{half}.layers.{{i}}."
        branches = {"attn": "self_attn"} | ({"cross_attn": "encoder_attn"} if half == "decoder" else {})
        linears = {f"{half}.layers.{a}.{p}": f"{layer}{b}.{q}" for a, b in branches.items() for p, q in _ATTENTION.items()}
        linears |= {f"{half}.layers.mlp.up_proj": f"{layer}fc1", f"{half}.layers.mlp.down_proj": f"{layer}fc2"}
        names = {f"{half}.layers.{a}_norm": f"{layer}{b}_layer_norm" for a, b in branches.items()}
        names[f"{half}.layers.mlp_norm"] = f"{layer}final_layer_norm"
        table |= projections(linears, bias=True) | norms(names)
    return table | norms({"final_norm": "decoder.layernorm"})


def _heads(_: Mapping[str, Any]) -> dict[str, Head]:
    modules = {"class_predictor.layers_0": "class_labels_classifier"}
    modules |= {f"box_predictor.layers_{n}": f"bbox_predictor.layers.{n}" for n in range(3)}
    return {"object_detection": Head(HeadShape("each"), modules)}


FAMILIES.register(
    "detr",
    Family(
        "vision",
        _config,
        _weights,
        architecture="Detr",
        prefixes=("", "model."),
        heads=_heads,
        model=Detr,
        carried=r".*\.num_batches_tracked",
    ),
)
