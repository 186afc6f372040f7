"""A base transform: rounds the weights of linear layers to a grid."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from lora_jax import register_transform
from lora_jax.config.schema import TransformConfig
from lora_jax.models.transforms.base import BaseTransform


class RoundSection(TransformConfig):
    kind: Literal["outside-round"] = Field(description="Rounds weights to a grid.")
    step: float = Field(gt=0, description="Distance of the grid's points.")


class Round(BaseTransform):
    section = RoundSection

    def apply(self, model, section, context):
        for path, variable in nnx.iter_graph(model):
            if isinstance(variable, nnx.Param) and path[-1] == "kernel":
                variable.set_value(jnp.round(variable[...] / section.step) * section.step)
        return model


register_transform("outside-round", Round())
