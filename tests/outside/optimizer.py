"""An optimizer outside of the library: the sign of the gradient (signSGD, arXiv:1802.04434), times a number."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from pydantic import PositiveFloat

from lora_jax import register_optimizer
from lora_jax.config.schema import OptimizerConfig
from lora_jax.training.optimizers.base import Group, Optimizer


class SignSection(OptimizerConfig):
    kind: Literal["outside-sign"] = "outside-sign"
    step: PositiveFloat = 1.0


class Sign(Optimizer):
    name, section = "outside-sign", SignSection

    def group(self, of: Group) -> optax.GradientTransformation:
        signs = optax.stateless(lambda gradients, _: jax.tree.map(lambda g: jnp.sign(g) * of.numbers["step"], gradients))
        return optax.chain(signs, optax.scale_by_learning_rate(of.learning_rate))


register_optimizer("outside-sign", Sign())
