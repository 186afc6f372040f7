"""What the families of convolutional nets are written with: names of their weights, and readers of timm's config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import InputError, hint
from ..layers import HeadShape
from .base import Head, Weight, required, size


def convolution(ours: str, theirs: str, *, bias: bool = False) -> dict[str, Weight]:
    """A convolution's kernel, and bias: our module path -> the file's."""
    table = {f"{ours}.kernel": Weight(f"{theirs}.weight", transpose=True)}
    return table | ({f"{ours}.bias": Weight(f"{theirs}.bias")} if bias else {})


def batch_norm(ours: str, theirs: str) -> dict[str, Weight]:
    """A batch norm's parameters and running statistics, likewise."""
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return {f"{ours}.{name}": Weight(f"{theirs}.{own}") for name, own in names.items()}


def image_head(module: str) -> Callable[[Mapping[str, Any]], dict[str, Head]]:
    """A linear layer, called so, on the mean over an image."""
    return lambda _: {"image_classification": Head(HeadShape("mean"), {"classifier": module})}


def sizes(hf: Mapping[str, Any], key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """`hf[key]`, a list of whole numbers of at least 1."""
    found = required(hf, key) if default is None or hf.get(key) is not None else default
    if not isinstance(found, list | tuple) or not found:
        raise InputError(f"config.json: {key} = {found!r} should be a list of whole numbers.")
    return tuple(size({key: n}, key) for n in found)


def architecture(hf: Mapping[str, Any]) -> str:
    """timm's name, without the tag of its weights (`.in1k`)."""
    return hf["architecture"].partition(".")[0]


@dataclasses.dataclass(frozen=True)
class TimmOptions:
    """What a config of timm says beside the name of the architecture.

    Attributes:
        channels: of an image.
        norm_eps: of the batch norms.
        same: whether TensorFlow's "same" padding is used.
    """

    channels: int
    norm_eps: float
    same: bool


def timm_options(hf: Mapping[str, Any], *, norm_eps: float | None, same: bool = False) -> TimmOptions:
    """Reads `pretrained_cfg` and `model_args`.

    Args:
        hf: timm's `config.json`.
        norm_eps: the architecture's own; None where it has no batch norm.
        same: the architecture's own padding.

    Raises:
        InputError: an option that is not supported.
    """
    args = hf.get("model_args") or {}
    known = ("in_chans", "num_classes", *(() if norm_eps is None else ("bn_eps", "pad_type")))
    for key in args:
        if key not in known:
            raise InputError(f"config.json: model_args.{key} is not supported. {hint(key, known)} Known: {', '.join(known)}.")
    pad = args.get("pad_type") or ("same" if same else "")
    if pad not in ("", "symmetric", "same"):
        raise InputError(f"config.json: model_args.pad_type = {pad!r} is not supported (only 'same' and '').")
    image = (hf.get("pretrained_cfg") or {}).get("input_size") or (3,)
    channels = size({"in_chans": args.get("in_chans", image[0])}, "in_chans")
    eps = args.get("bn_eps", norm_eps)
    return TimmOptions(channels, 0.0 if eps is None else float(eps), pad == "same")
