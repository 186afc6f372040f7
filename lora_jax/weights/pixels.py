"""What a vision checkpoint says of the images it is given: size, crop, interpolation, mean and deviation.

Hugging Face's folders say it in `preprocessor_config.json`, timm's in the `pretrained_cfg` of `config.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, warn
from .checkpoint import read_json

# Of ImageNet's training images, red, green and blue.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of Pillow's numbers


@dataclasses.dataclass(frozen=True)
class PixelSpec:
    """How an image becomes what a model is given: resized, the centre cut out, and (value / 255 - mean) / std of each channel.

    Attributes:
        size: (height, width) of what the model is given.
        mean, std: of each channel; there are as many channels as numbers.
        crop_pct: the image is resized to `size` divided by this, and the centre cut out.
        squash: whether resizing may change the ratio of the sides; else the short side gets the size, and the long one keeps the ratio.
        interpolation: of the resizing, of `INTERPOLATIONS`.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_pct: float = 1.0
    squash: bool = False
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(f"interpolation '{self.interpolation}' is not supported (only {', '.join(INTERPOLATIONS)}).")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise InputError(f"mean has {len(self.mean)} numbers and std {len(self.std)}; both have 1 (grey) or 3 (red, green, blue).")
        if min(self.size) < 1 or not 0 < self.crop_pct <= 1 or min(self.std) <= 0:
            raise InputError(f"size {self.size}, crop_pct {self.crop_pct} or std {self.std} is out of range.")

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (red, green, blue)."""
        return len(self.mean)

    @property
    def resized(self) -> tuple[int, int]:
        """(height, width) before the centre is cut out; rounded down, as timm does.

        >>> PixelSpec((224, 224), crop_pct=0.875).resized, PixelSpec((112, 112), crop_pct=224 / 256).resized
        ((256, 256), (128, 128))
        """
        height, width = (int(side / self.crop_pct + 1e-6) for side in self.size)
        return height, width

    def at(self, size: tuple[int, int]) -> PixelSpec:
        """The same at another size."""
        return dataclasses.replace(self, size=size)


def read_pixel_spec(folder: Path, config: Mapping[str, Any], *, channels: int = 3) -> PixelSpec:
    """What a checkpoint's folder says.

    Args:
        folder: of the checkpoint.
        config: its `config.json`.
        channels: that the model takes.

    Raises:
        InputError: a file is damaged, or says something that no image can be.
    """
    found: Mapping[str, Any] | None = None
    for name, inner in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            file = folder / name
            found = read_json(file, "how images are prepared")
            found = found if inner is None else found.get(inner)
            if isinstance(found, Mapping):
                return _checked(lambda found=found: _of_processor(found, _side(config)), str(file), channels)
    if isinstance(config.get("pretrained_cfg"), Mapping):
        return _checked(lambda: _of_timm(config["pretrained_cfg"]), f"{folder / 'config.json'}: pretrained_cfg", channels)
    warn(f"{folder}: no preprocessor_config.json says how images are prepared: ImageNet's mean and deviation are taken.")
    spec = PixelSpec(_side(config))
    return spec if channels == 3 else dataclasses.replace(spec, mean=(0.5,), std=(0.5,))


def _checked(read: Any, where: str, channels: int) -> PixelSpec:
    try:
        spec = read()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise InputError(f"{where}: cannot be understood ({error}).") from None
    if spec.channels != channels:
        raise InputError(f"{where}: mean has {spec.channels} numbers, but the model takes {channels} channels.")
    return spec


def _side(config: Mapping[str, Any]) -> tuple[int, int]:
    found = config.get("image_size") or (config.get("vision_config") or {}).get("image_size") or 224
    return _pair(found)


def _pair(value: Any) -> tuple[int, int]:
    """(height, width) of a number or two of them."""
    height, width = (value, value) if isinstance(value, int | float) else value
    return int(height), int(width)


# Processors whose plain number as a size is the short side's; of all others it is that of both.
_SHORT_SIDE = ("CLIP", "Bit", "ConvNext", "Levit", "PoolFormer", "PVT")
# From so large a size on, ConvNeXt's processor resizes to it without cutting anything off.
_CONVNEXT_WHOLE = 384


def _of_processor(found: Mapping[str, Any], model: tuple[int, int]) -> PixelSpec:
    """Of an image processor of transformers.

    Args:
        model: the size in the model's config, for a processor that resizes nothing.
    """
    kind = str(found.get("image_processor_type") or found.get("feature_extractor_type") or "")
    size: Any = found.get("size") if found.get("do_resize", True) else None
    size = {"height": model[0], "width": model[1]} if size is None else size
    if not isinstance(size, Mapping):
        short = any(name in kind for name in _SHORT_SIDE)
        size = {"shortest_edge": int(size)} if short else dict(zip(("height", "width"), _pair(size), strict=True))
    squash = "shortest_edge" not in size
    resized = _pair((size["height"], size["width"]) if squash else size["shortest_edge"])
    cropped, crop_pct = resized, 1.0
    if found.get("do_center_crop"):
        crop = found.get("crop_size", resized)
        cropped = _pair((crop["height"], crop["width"]) if isinstance(crop, Mapping) else crop)
        crop_pct = min(1.0, cropped[0] / resized[0])
    elif found.get("crop_pct") and not squash:
        squash = resized[0] >= _CONVNEXT_WHOLE
        crop_pct = 1.0 if squash else float(found["crop_pct"])
    mean, std = ([0.0] * 3, [1.0] * 3) if not found.get("do_normalize", True) else (found.get("image_mean"), found.get("image_std"))
    mean, std = _numbers(mean, IMAGENET_MEAN), _numbers(std, IMAGENET_STD)
    if found.get("include_top"):  # EfficientNet's processor divides by the deviation a second time
        std = tuple(s * s for s in std)
    # value * factor - offset, less mean, by std, in terms of value / 255
    factor = 255 * float(found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 1.0)
    offset = 1.0 if found.get("rescale_offset") else 0.0
    mean, std = tuple((m + offset) / factor for m in mean), tuple(s / factor for s in std)
    resample = found.get("resample", 2 if squash else 3)
    interpolation = INTERPOLATIONS[resample] if isinstance(resample, int) else str(resample).lower()
    return PixelSpec(cropped, _plain(mean), _plain(std), crop_pct, squash, interpolation)


def _of_timm(found: Mapping[str, Any]) -> PixelSpec:
    _, height, width = found.get("input_size", (3, 224, 224))
    mean, std = _numbers(found.get("mean"), IMAGENET_MEAN), _numbers(found.get("std"), IMAGENET_STD)
    interpolation = found.get("interpolation", "bicubic")
    return PixelSpec(
        (int(height), int(width)),
        mean,
        std,
        float(found.get("crop_pct") or 0.875),
        found.get("crop_mode") == "squash",
        "bicubic" if interpolation == "random" else interpolation,
    )


def _numbers(value: Sequence[float] | float | None, default: tuple[float, ...]) -> tuple[float, ...]:
    if value is None:
        return default
    return tuple(float(v) for v in ([value] if isinstance(value, int | float) else value))


def _plain(values: Sequence[float]) -> tuple[float, ...]:
    """Without the last bits that dividing by 255 and multiplying again has changed."""
    return tuple(float(f"{v:.12g}") for v in values)
