"""ResNet (arXiv:1512.03385) as transformers has it, and as timm does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ...errors import InputError
from ..convolutional import ResNet, ResNetBlock, ResNetConfig
from .base import Family, Weight, activation, only, size
from .images import architecture, batch_norm, convolution, image_head, sizes, timm_options

# timm's name -> (blocks of each stage, whether these have three convolutions).
_TIMM = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet26": ((2, 2, 2, 2), True),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}


def _blocks(widths: tuple[int, ...], depths: tuple[int, ...], stem: int, *, three: bool, first: int = 1, early: bool = False) -> Any:
    """The blocks of all stages; `first` is the stride of the first stage, those of the others are 2."""
    found, inputs = [], stem
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for i in range(depth):
            stride = (2 if stage else first) if i == 0 else 1
            found.append(ResNetBlock(inputs, width, width // 4 if three else None, stride, early))
            inputs = width
    return tuple(found)


def _config(hf: Mapping[str, Any], dtype: Any) -> ResNetConfig:
    only(hf, "layer_type", "basic", "bottleneck")
    widths, depths = sizes(hf, "hidden_sizes", (256, 512, 1024, 2048)), sizes(hf, "depths", (3, 4, 6, 3))
    if len(widths) != len(depths):
        raise InputError(f"config.json: hidden_sizes has {len(widths)} numbers and depths {len(depths)}.")
    stem, three = size(hf, "embedding_size", 64), hf.get("layer_type", "bottleneck") == "bottleneck"
    options = {"first": 2 if hf.get("downsample_in_first_stage") else 1, "early": bool(hf.get("downsample_in_bottleneck"))}
    blocks = _blocks(widths, depths, stem, three=three, **options)
    return ResNetConfig(blocks, stem, size(hf, "num_channels", 3), activation(hf, "hidden_act", "relu"), dtype=dtype)


def _timm_config(hf: Mapping[str, Any], dtype: Any) -> ResNetConfig:
    depths, three = _TIMM[architecture(hf)]
    options = timm_options(hf, norm_eps=1e-5)
    widths = tuple((256 if three else 64) * 2**stage for stage in range(4))
    return ResNetConfig(_blocks(widths, depths, 64, three=three), 64, options.channels, norm_eps=options.norm_eps, dtype=dtype)


def _places(config: ResNetConfig) -> list[tuple[int, int]]:
    """(stage, number in it) of each block: a stage begins where the channels change."""
    found: list[tuple[int, int]] = []
    for i, block in enumerate(config.blocks):
        begins = i == 0 or block.projects
        stage, number = found[-1] if found else (-1, 0)
        found.append((stage + 1, 0) if begins else (stage, number + 1))
    return found


def _weights(config: ResNetConfig) -> dict[str, Weight]:
    table = convolution("stem_conv", "embedder.embedder.convolution") | batch_norm("stem_norm", "embedder.embedder.normalization")
    for i, ((stage, number), block) in enumerate(zip(_places(config), config.blocks, strict=True)):
        theirs = f"encoder.stages.{stage}.layers.{number}"
        for j in range(len(block.convolutions)):
            table |= convolution(f"blocks.{i}.conv{j + 1}", f"{theirs}.layer.{j}.convolution")
            table |= batch_norm(f"blocks.{i}.norm{j + 1}", f"{theirs}.layer.{j}.normalization")
        if block.projects:
            table |= convolution(f"blocks.{i}.shortcut", f"{theirs}.shortcut.convolution")
            table |= batch_norm(f"blocks.{i}.shortcut_norm", f"{theirs}.shortcut.normalization")
    return table


def _timm_weights(config: ResNetConfig) -> dict[str, Weight]:
    table = convolution("stem_conv", "conv1") | batch_norm("stem_norm", "bn1")
    for i, ((stage, number), block) in enumerate(zip(_places(config), config.blocks, strict=True)):
        theirs = f"layer{stage + 1}.{number}"
        for j in range(1, len(block.convolutions) + 1):
            table |= convolution(f"blocks.{i}.conv{j}", f"{theirs}.conv{j}") | batch_norm(f"blocks.{i}.norm{j}", f"{theirs}.bn{j}")
        if block.projects:
            table |= convolution(f"blocks.{i}.shortcut", f"{theirs}.downsample.0")
            table |= batch_norm(f"blocks.{i}.shortcut_norm", f"{theirs}.downsample.1")
    return table


_SHARED: dict[str, Any] = {"model": ResNet, "carried": r".*\.num_batches_tracked"}
FAMILIES.register(
    "resnet",
    Family(
        "vision", _config, _weights, architecture="ResNet", prefixes=("", "resnet."), heads=image_head("classifier.1"), **_SHARED
    ),
)  # fmt: skip
FAMILIES.register(
    "timm_resnet",
    Family("vision", _timm_config, _timm_weights, architecture="TimmWrapper", heads=image_head("fc"), timm=tuple(_TIMM), **_SHARED),
)
