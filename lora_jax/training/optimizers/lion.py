"""Lion (arXiv:2302.06675, algorithm 2): the sign of a mix of gradient and momentum. Its best learning rate is 3 to 10 times below AdamW's,
and its weight decay as many times above."""

from __future__ import annotations

from typing import Literal

import optax
from pydantic import Field

from ...config.schema import OptimizerConfig
from ...config.types import Fraction
from .base import Group, Optimizer, register_optimizer


class LionSection(OptimizerConfig):
    kind: Literal["lion"] = Field(default="lion", description="Lion, the sign of a momentum (arXiv:2302.06675).")
    b1: Fraction = Field(default=0.9, description="How much of the momentum is in an update; the rest is the gradient.")
    b2: Fraction = Field(default=0.99, description="Decay of the momentum.")


class Lion(Optimizer):
    name, section = "lion", LionSection

    def group(self, of: Group) -> optax.GradientTransformation:
        return optax.lion(of.learning_rate, of.numbers["b1"], of.numbers["b2"], weight_decay=of.weight_decay, mask=of.decayed)


register_optimizer("lion", Lion())
