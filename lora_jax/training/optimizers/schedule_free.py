"""Schedule-free AdamW (arXiv:2405.15682): gradients at `y = (1 - b1) z + b1 x`, steps of z, and x, the mean of z, in place of a decay.

The mean is weighted by the square of the learning rate; a member is evaluated and saved with x. Momentum is what y does: AdamW itself has
none. The learning rate rises over the warm-up and then stays.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import optax
from optax.contrib import schedule_free
from pydantic import Field

from ...adapters.partition import Arrays
from ...config.schema import OptimizerConfig
from ...config.types import Fraction, PositiveFloat
from .base import Group, Optimizer, register_optimizer


class ScheduleFreeSection(OptimizerConfig):
    kind: Literal["schedule_free"] = Field(default="schedule_free", description="Schedule-free AdamW (arXiv:2405.15682).")
    schedule: Literal["constant"] = Field(default="constant", description="It has no decay: the mean of the steps takes its place.")
    b1: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.9, description="How near to the mean gradients are taken.")
    b2: Fraction = Field(default=0.999, description="Decay of the second moment.")
    eps: PositiveFloat = Field(default=1e-8, description="Added to the root of the second moment.")


class ScheduleFree(Optimizer):
    name, section = "schedule_free", ScheduleFreeSection

    def group(self, of: Group) -> optax.GradientTransformation:
        b2, eps = of.numbers["b2"], of.numbers["eps"]
        base = optax.chain(
            optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
            optax.add_decayed_weights(of.weight_decay, of.decayed),
            optax.scale_by_learning_rate(of.learning_rate),
        )
        return schedule_free(base, of.learning_rate, of.numbers["b1"])

    def averaged(self, state: Any, trainable: Arrays) -> Arrays:
        # x from y and z, in the form that gives exactly what both are where they are equal.
        return {name: state.z[name] + (y - state.z[name]) / state.b1 for name, y in trainable.items()}


register_optimizer("schedule_free", ScheduleFree())
