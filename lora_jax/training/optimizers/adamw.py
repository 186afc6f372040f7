"""AdamW (arXiv:1711.05101, algorithm 2): a gradient's mean over the root of its mean square, both smoothed; the decay is decoupled."""

from __future__ import annotations

from typing import Literal

import optax
from pydantic import Field

from ...config.schema import OptimizerConfig
from ...config.types import Fraction, PositiveFloat
from .base import Group, Optimizer, register_optimizer


class AdamWSection(OptimizerConfig):
    kind: Literal["adamw"] = Field(default="adamw", description="AdamW (arXiv:1711.05101).")
    b1: Fraction = Field(default=0.9, description="Decay of the first moment.")
    b2: Fraction = Field(default=0.999, description="Decay of the second moment.")
    eps: PositiveFloat = Field(default=1e-8, description="Added to the root of the second moment.")


class AdamW(Optimizer):
    name, section = "adamw", AdamWSection

    def group(self, of: Group) -> optax.GradientTransformation:
        b1, b2, eps = (of.numbers[name] for name in ("b1", "b2", "eps"))
        return optax.adamw(of.learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=of.weight_decay, mask=of.decayed)


register_optimizer("adamw", AdamW())
