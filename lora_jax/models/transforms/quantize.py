"""Quantisation: the weights of linear layers, and if asked for the table of tokens, are held in 8 or 4 bits (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

from typing import Any, Literal

from flax import nnx
from pydantic import Field, model_validator

from ...config.doors import TRANSFORMS
from ...config.schema import TransformConfig
from ...config.types import PositiveInt, size_text
from ...errors import InputError
from ...weights.four_bit import FourBit
from ...weights.quantized import QuantFormat, WholeNumbers
from ..quantized import TABLES, held_bytes, quantized
from ..stored import put
from .base import BaseTransform, TransformContext
from .weights import LinearLayer, linear_layers

KEY = "model.transforms: quantize"
# The projection to the vocabulary that has weights of its own.
PROJECTION = "lm_head"


class QuantizeConfig(TransformConfig):
    kind: Literal["quantize"] = Field(
        description="Holds weights in 8 or 4 bits; they are dequantised a layer at a time where they are used."
    )
    format: Literal["nf4", "fp4", "int8", "int4"] = Field(
        default="nf4", description="nf4 and fp4 are bitsandbytes' (16 values by the largest magnitude of a block); int8, int4: symmetric."
    )
    block: PositiveInt | Literal["channel"] = Field(
        default=64, description="Weights that share a scale, along a layer's inputs. channel: all of an output's (int8 and int4)."
    )
    double: bool | None = Field(
        default=None, description="Double quantisation: the scales of nf4 and fp4 are held in 8 bits themselves. Default: they are."
    )
    embeddings: bool = Field(
        default=False, description="The table of tokens as well, and with it the projection to the vocabulary where that is tied to it."
    )
    skip: list[str] = Field(
        default_factory=lambda: [PROJECTION],
        description="Linear layers to leave as they are: whole names or their ends. Heads and the routers of mixtures always are.",
    )

    @model_validator(mode="after")
    def _fits(self) -> QuantizeConfig:
        if self.format.startswith("int") and self.double is not None:
            raise ValueError(f"'double' quantises the scales of nf4 and fp4, not of {self.format}")
        if self.block == "channel" and not self.format.startswith("int"):
            raise ValueError(f"'block: channel' is for int8 and int4; {self.format} has blocks")
        return self

    def form(self) -> QuantFormat:
        """The format."""
        if self.format in ("nf4", "fp4"):
            assert self.block != "channel"
            return FourBit(self.format, self.block, self.double is not False)
        return WholeNumbers(int(self.format[3:]), None if self.block == "channel" else self.block)


class Quantize(BaseTransform):
    """Codes and scales in place of each weight."""

    section = QuantizeConfig

    def apply(self, model: Any, section: QuantizeConfig, context: TransformContext) -> Any:
        form, modules = section.form(), dict(nnx.iter_modules(model))
        layers = linear_layers(model, [name for name in section.skip if name != PROJECTION], KEY)
        head = modules.get((PROJECTION,))
        if isinstance(head, nnx.Linear) and PROJECTION not in section.skip:
            layers.append(LinearLayer(PROJECTION, (PROJECTION,), head))
        for layer in layers:
            inputs, outputs = layer.shape
            form.check(outputs, inputs, f"{KEY}.block: {layer.name}")
        if section.embeddings:
            tables = [LinearLayer(".".join(map(str, path)), path, m) for path, m in modules.items() if path and path[-1] in TABLES]
            if not tables:
                raise InputError(f"{KEY}.embeddings: the model has no table of tokens.")
            for table in tables:
                rows, width = table.module.embedding.shape
                form.check(rows, width, f"{KEY}.block: {table.name}")
            layers += tables
        before = held_bytes(model)
        for layer in layers:
            put(model, layer.path, quantized(layer.module, form, mesh=context.mesh))
        sizes = f"the base's {size_text(before)} became {size_text(held_bytes(model))}"
        context.notes.append(f"quantised ({form.label}): {len(layers)} kinds of layers; {sizes}.")
        return model

    def shapes(self, model: Any, section: QuantizeConfig) -> Any:
        return self.apply(model, section, TransformContext(""))


TRANSFORMS.register("quantize", Quantize())
