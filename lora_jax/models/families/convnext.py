"""ConvNeXt (arXiv:2201.03545) as transformers has it, and as timm does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config.doors import FAMILIES
from ...errors import InputError
from ..convolutional import ConvNext, ConvNextConfig
from .base import Family, Weight, activation, norms, projections, size
from .images import architecture, convolution, image_head, sizes, timm_options

# timm's name -> (channels of the first stage, which every further one doubles; blocks of each stage).
_TIMM = {
    "convnext_tiny": (96, (3, 3, 9, 3)),
    "convnext_small": (96, (3, 3, 27, 3)),
    "convnext_base": (128, (3, 3, 27, 3)),
    "convnext_large": (192, (3, 3, 27, 3)),
    "convnext_xlarge": (256, (3, 3, 27, 3)),
}


def _config(hf: Mapping[str, Any], dtype: Any) -> ConvNextConfig:
    widths, depths = sizes(hf, "hidden_sizes", (96, 192, 384, 768)), sizes(hf, "depths", (3, 3, 9, 3))
    if len(widths) != len(depths):
        raise InputError(f"config.json: hidden_sizes has {len(widths)} numbers and depths {len(depths)}.")
    shape = {"patch": size(hf, "patch_size", 4), "channels": size(hf, "num_channels", 3), "scaled": hf.get("layer_scale_init_value", 1) > 0}
    act, eps = activation(hf, "hidden_act", "gelu"), hf.get("layer_norm_eps", 1e-12)
    return ConvNextConfig(widths, depths, activation=act, norm_eps=eps, dtype=dtype, **shape)


def _timm_config(hf: Mapping[str, Any], dtype: Any) -> ConvNextConfig:
    width, depths = _TIMM[architecture(hf)]
    options = timm_options(hf, norm_eps=None)
    return ConvNextConfig(tuple(width * 2**i for i in range(4)), depths, channels=options.channels, norm_eps=1e-6, dtype=dtype)


def _table(config: ConvNextConfig, names: Mapping[str, str]) -> dict[str, Weight]:
    """Parameters by their names.

    Args:
        names: ours -> theirs, `{s}` standing for the stage and `{n}` for the block in it.
    """
    table = convolution("stem_conv", names["stem_conv"], bias=True) | norms({"stem_norm": names["stem_norm"]})
    table |= norms({"final_norm": names["final_norm"]})
    places = [(stage, number) for stage, depth in enumerate(config.depths) for number in range(depth)]
    for i, (stage, number) in enumerate(places):
        own = {ours: theirs.format(s=stage, n=number) for ours, theirs in names.items()}
        if config.begins[i]:
            table |= norms({f"blocks.{i}.down_norm": own["down_norm"]}) | convolution(f"blocks.{i}.down", own["down"], bias=True)
        table |= convolution(f"blocks.{i}.depthwise", own["depthwise"], bias=True) | norms({f"blocks.{i}.norm": own["norm"]})
        table |= projections({f"blocks.{i}.{part}": own[part] for part in ("up_proj", "down_proj")}, bias=True)
        if config.scaled:
            table[f"blocks.{i}.gain"] = Weight(own["gain"])
    return table


_NAMES = {
    "stem_conv": "embeddings.patch_embeddings", "stem_norm": "embeddings.layernorm", "final_norm": "layernorm",
    "down_norm": "encoder.stages.{s}.downsampling_layer.0", "down": "encoder.stages.{s}.downsampling_layer.1",
    "depthwise": "encoder.stages.{s}.layers.{n}.dwconv", "norm": "encoder.stages.{s}.layers.{n}.layernorm",
    "up_proj": "encoder.stages.{s}.layers.{n}.pwconv1", "down_proj": "encoder.stages.{s}.layers.{n}.pwconv2",
    "gain": "encoder.stages.{s}.layers.{n}.layer_scale_parameter",
}  # fmt: skip
_TIMM_NAMES = {
    "stem_conv": "stem.0", "stem_norm": "stem.1", "final_norm": "head.norm",
    "down_norm": "stages.{s}.downsample.0", "down": "stages.{s}.downsample.1",
    "depthwise": "stages.{s}.blocks.{n}.conv_dw", "norm": "stages.{s}.blocks.{n}.norm",
    "up_proj": "stages.{s}.blocks.{n}.mlp.fc1", "down_proj": "stages.{s}.blocks.{n}.mlp.fc2", "gain": "stages.{s}.blocks.{n}.gamma",
}  # fmt: skip


FAMILIES.register(
    "convnext",
    Family(
        "vision", _config, lambda config: _table(config, _NAMES), architecture="ConvNext", prefixes=("", "convnext."),
        heads=image_head("classifier"), model=ConvNext,
    ),
)  # fmt: skip
FAMILIES.register(
    "timm_convnext",
    Family(
        "vision", _timm_config, lambda config: _table(config, _TIMM_NAMES), architecture="TimmWrapper", heads=image_head("head.fc"),
        model=ConvNext, timm=tuple(_TIMM),
    ),
)  # fmt: skip
