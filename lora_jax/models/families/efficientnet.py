"""EfficientNet (arXiv:1905.11946) as transformers has it; as timm does, with EfficientNet-Lite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ...errors import InputError
from ..convolution import Padding, even
from ..convolutional import EfficientNet, EfficientNetConfig, MobileBlock
from .base import Family, Weight, activation, only, size
from .images import architecture, batch_norm, convolution, image_head, sizes, timm_options

# Stages: kernel, stride, expansion, channels, blocks.
_STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1))
# Variant -> (factor of the channels, of the blocks).
_SCALES = {
    "b0": (1.0, 1.0), "b1": (1.0, 1.1), "b2": (1.1, 1.2), "b3": (1.2, 1.4), "b4": (1.4, 1.8), "b5": (1.6, 2.2), "b6": (1.8, 2.6),
    "b7": (2.0, 3.1), "b8": (2.2, 3.6), "lite0": (1.0, 1.0), "lite1": (1.0, 1.1), "lite2": (1.1, 1.2), "lite3": (1.2, 1.4),
    "lite4": (1.4, 1.8),
}  # fmt: skip
_TIMM = tuple(f"{prefix}efficientnet_{variant}" for prefix in ("", "tf_") for variant in _SCALES)


def rounded(channels: float, factor: float, divisor: int = 8) -> int:
    """Channels times a factor, as a multiple of the divisor, and at least nine tenths of it.

    >>> rounded(32, 1.0), rounded(320, 1.1), rounded(24, 1.2)
    (32, 352, 32)
    """
    wanted = channels * factor
    found = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
    return found + divisor if found < 0.9 * wanted else found


def _config(hf: Mapping[str, Any], dtype: Any) -> EfficientNetConfig:
    only(hf, "pooling_type", "mean")
    width, depth, divisor = hf.get("width_coefficient", 2.0), hf.get("depth_coefficient", 3.1), size(hf, "depth_divisor", 8)
    keys = ("kernel_sizes", "strides", "expand_ratios", "in_channels", "out_channels", "num_block_repeats")
    kernels, strides, ratios, inputs, outputs, repeats = (sizes(hf, key) for key in keys)
    if len({len(kernels), len(strides), len(ratios), len(inputs), len(outputs), len(repeats)}) > 1:
        raise InputError(f"config.json: {', '.join(keys)} should have as many numbers each.")
    square = set(hf.get("depthwise_padding") or ())
    found: list[MobileBlock] = []
    for kernel, stride, ratio, first, last, count in zip(kernels, strides, ratios, inputs, outputs, repeats, strict=True):
        for i in range(math.ceil(depth * count)):
            own = rounded(last if i else first, width, divisor)
            # What transformers pads where it halves: TensorFlow's "same" of an even size, whatever the size is.
            padding = even(kernel // 2 - 1, kernel // 2) if stride == 2 and i == 0 and len(found) not in square else even(kernel // 2)
            if (stride if i == 0 else 1) not in (1, 2):
                raise InputError(f"config.json: strides = {list(strides)} are not supported (only 1 and 2).")
            squeeze = max(1, int(own * hf.get("squeeze_expansion_ratio", 0.25)))
            out = rounded(last, width, divisor)
            found.append(MobileBlock(own, own * ratio, out, ratio != 1, kernel, stride if i == 0 else 1, padding, squeeze, i > 0))
    top = rounded(1280, width, divisor)
    if size(hf, "hidden_dim", 2560) != top:
        raise InputError(f"config.json: hidden_dim = {hf.get('hidden_dim', 2560)} is not the {top} channels of the last convolution.")
    options = {"activation": activation(hf, "hidden_act", "swish"), "norm_eps": hf.get("batch_norm_eps", 1e-3)}
    options |= {"norm_momentum": hf.get("batch_norm_momentum", 0.99), "dtype": dtype}
    return EfficientNetConfig(tuple(found), rounded(32, width, divisor), even(0, 1), top, size(hf, "num_channels", 3), **options)


def _timm_config(hf: Mapping[str, Any], dtype: Any) -> EfficientNetConfig:
    name = architecture(hf)
    tensorflow, lite = name.startswith("tf_"), "lite" in name
    width, depth = _SCALES[name.rpartition("_")[2]]
    options = timm_options(hf, norm_eps=1e-3 if tensorflow else 1e-5, same=tensorflow)

    def pads(kernel: int) -> Padding:
        return "SAME" if options.same else even(kernel // 2)

    found: list[MobileBlock] = []
    inputs = stem = 32 if lite else rounded(32, width)
    for stage, (kernel, stride, ratio, channels, count) in enumerate(_STAGES):
        fixed = lite and stage in (0, len(_STAGES) - 1)  # Lite leaves the first and the last stage as deep as they are
        outputs = rounded(channels, width)
        for i in range(count if fixed else math.ceil(count * depth)):
            first = stride if i == 0 else 1
            squeeze = None if lite else max(1, round(inputs / 4))
            residual = first == 1 and inputs == outputs
            found.append(MobileBlock(inputs, inputs * ratio, outputs, ratio != 1, kernel, first, pads(kernel), squeeze, residual))
            inputs = outputs
    top = 1280 if lite else rounded(1280, width)
    act = "relu6" if lite else "silu"
    return EfficientNetConfig(tuple(found), stem, pads(3), top, options.channels, act, options.norm_eps, dtype=dtype)


def _weights(config: EfficientNetConfig) -> dict[str, Weight]:
    table = convolution("stem_conv", "embeddings.convolution") | batch_norm("stem_norm", "embeddings.batchnorm")
    for i, block in enumerate(config.blocks):
        ours, theirs = f"blocks.{i}", f"encoder.blocks.{i}"
        if block.expands:
            table |= convolution(f"{ours}.expand", f"{theirs}.expansion.expand_conv")
            table |= batch_norm(f"{ours}.expand_norm", f"{theirs}.expansion.expand_bn")
        table |= convolution(f"{ours}.depthwise", f"{theirs}.depthwise_conv.depthwise_conv")
        table |= batch_norm(f"{ours}.depthwise_norm", f"{theirs}.depthwise_conv.depthwise_norm")
        if block.squeeze is not None:
            table |= convolution(f"{ours}.squeeze", f"{theirs}.squeeze_excite.reduce", bias=True)
            table |= convolution(f"{ours}.excite", f"{theirs}.squeeze_excite.expand", bias=True)
        table |= convolution(f"{ours}.project", f"{theirs}.projection.project_conv")
        table |= batch_norm(f"{ours}.project_norm", f"{theirs}.projection.project_bn")
    return table | convolution("top_conv", "encoder.top_conv") | batch_norm("top_norm", "encoder.top_bn")


def _timm_weights(config: EfficientNetConfig) -> dict[str, Weight]:
    table = convolution("stem_conv", "conv_stem") | batch_norm("stem_norm", "bn1")
    stage, number, before = -1, 0, None
    for i, block in enumerate(config.blocks):
        same = before is not None and block.residual and block.stride == 1
        stage, number = (stage, number + 1) if same else (stage + 1, 0)
        ours, theirs, before = f"blocks.{i}", f"blocks.{stage}.{number}", block
        # Without expansion the last convolution has the name that the first has otherwise.
        names = ["conv_pw", "conv_dw", "conv_pwl"] if block.expands else ["conv_dw", "conv_pw"]
        parts = ["expand", "depthwise", "project"] if block.expands else ["depthwise", "project"]
        for j, (part, name) in enumerate(zip(parts, names, strict=True), 1):
            table |= convolution(f"{ours}.{part}", f"{theirs}.{name}") | batch_norm(f"{ours}.{part}_norm", f"{theirs}.bn{j}")
        if block.squeeze is not None:
            table |= convolution(f"{ours}.squeeze", f"{theirs}.se.conv_reduce", bias=True)
            table |= convolution(f"{ours}.excite", f"{theirs}.se.conv_expand", bias=True)
    return table | convolution("top_conv", "conv_head") | batch_norm("top_norm", "bn2")


_SHARED: dict[str, Any] = {"model": EfficientNet, "carried": r".*\.num_batches_tracked", "heads": image_head("classifier")}
_OWN: dict[str, Any] = {"architecture": "EfficientNet", "prefixes": ("", "efficientnet.")}
FAMILIES.register("efficientnet", Family("vision", _config, _weights, **_OWN, **_SHARED))
FAMILIES.register("timm_efficientnet", Family("vision", _timm_config, _timm_weights, architecture="TimmWrapper", timm=_TIMM, **_SHARED))
