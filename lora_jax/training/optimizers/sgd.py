"""SGD with momentum, PyTorch's form: `m = momentum m + g`, and the step goes along m, or along `g + momentum m` (Nesterov).

Weight decay is added to the gradient, as in PyTorch.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from pydantic import Field

from ...config.schema import OptimizerConfig
from ...config.types import Fraction
from .base import Group, Optimizer, register_optimizer


class SgdSection(OptimizerConfig):
    kind: Literal["sgd"] = Field(default="sgd", description="SGD with momentum; weight decay is added to the gradient.")
    momentum: Fraction = Field(default=0.9, description="Decay of the sum of gradients; 0: plain SGD.")
    nesterov: bool = Field(default=False, description="Nesterov's momentum.")


class Sgd(Optimizer):
    name, section = "sgd", SgdSection

    def group(self, of: Group) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(of.weight_decay, of.decayed)
        return optax.chain(decay, _momentum(of.numbers["momentum"], of.numbers["nesterov"]), optax.scale_by_learning_rate(of.learning_rate))


def _momentum(momentum: jax.Array, nesterov: jax.Array) -> optax.GradientTransformation:
    """`optax.trace` with a traced `nesterov`."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.TraceState]:
        sums = jax.tree.map(lambda g, m: g + momentum * m, updates, state.trace)
        along = jax.tree.map(lambda g, m: jnp.where(nesterov > 0, g + momentum * m, m), updates, sums)
        return along, optax.TraceState(sums)

    return optax.GradientTransformation(lambda params: optax.TraceState(jax.tree.map(jnp.zeros_like, params)), update)


register_optimizer("sgd", Sgd())
