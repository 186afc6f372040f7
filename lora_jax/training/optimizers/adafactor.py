"""Adafactor (arXiv:1804.04235): a matrix's second moment from the sums over its rows and over its columns, without a first moment.

The form that transformers' Trainer uses (`scale_parameter` and `relative_step` off): the mean square decays by `1 - t^-decay_rate`, an
update whose root mean square is above `clip_threshold` is scaled down to it (section 6), and the learning rate is the config's. With
`parameter_scale` a step is relative to the root mean square of the array (section 8), as in PyTorch's.

Every layer has statistics of its own. They are sums and not means, and root mean squares are over a member's own numbers, so that the
padding of a pack has no part in them.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import Field

from ...config.schema import OptimizerConfig
from ...config.types import PositiveFloat
from .base import Group, Optimizer, register_optimizer

_TINY = float(np.finfo(np.float32).tiny)
_LEAST_SCALE = 1e-3  # of an array that starts at 0


class AdafactorSection(OptimizerConfig):
    kind: Literal["adafactor"] = Field(default="adafactor", description="Adafactor, factored second moments (arXiv:1804.04235).")
    decay_rate: PositiveFloat = Field(default=0.8, description="At step t, from 1, the second moment decays by 1 - t^-decay_rate.")
    clip_threshold: PositiveFloat = Field(default=1.0, description="Largest root mean square of an update, before the learning rate.")
    parameter_scale: bool = Field(default=False, description="Learning rates are relative to an array's root mean square.")
    eps: PositiveFloat = Field(default=1e-30, description="Added to the squares of the gradient.")


class AdafactorState(NamedTuple):
    """By name: sums along rows (..., m, 1) and along columns (..., 1, n) for matrices; squares, of its shape, of any other array."""

    count: jax.Array
    rows: dict[str, jax.Array]
    columns: dict[str, jax.Array]
    squares: dict[str, jax.Array]


class Adafactor(Optimizer):
    name, section = "adafactor", AdafactorSection
    shaped = True

    def group(self, of: Group) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(of.weight_decay, of.decayed)
        return optax.chain(_factored(of), decay, optax.scale_by_learning_rate(of.learning_rate))


def _factored(of: Group) -> optax.GradientTransformation:
    numbers = of.numbers

    def init(params: Any) -> AdafactorState:
        arrays = {name: array for name, array in params.items() if not isinstance(array, optax.MaskedNode)}
        matrices = {name: array for name, array in arrays.items() if of.axes(name, array) >= 2}
        rows = {name: jnp.zeros_like(array[..., :1]) for name, array in matrices.items()}
        columns = {name: jnp.zeros_like(array[..., :1, :]) for name, array in matrices.items()}
        others = {name: jnp.zeros_like(array) for name, array in arrays.items() if name not in matrices}
        return AdafactorState(jnp.zeros([], jnp.int32), rows, columns, others)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdafactorState]:
        gradients, updates = updates, dict(updates)
        count = state.count + 1
        old = 1 - jnp.float32(count) ** -numbers["decay_rate"]
        new = AdafactorState(count, {}, {}, {})
        for name, gradient in gradients.items():
            if isinstance(gradient, optax.MaskedNode):
                continue
            square = gradient**2
            if name in state.rows:
                rows = old * state.rows[name] + (1 - old) * square.sum(-1, keepdims=True)
                columns = old * state.columns[name] + (1 - old) * square.sum(-2, keepdims=True)
                new.rows[name], new.columns[name] = rows, columns
                # The decay of the first step is 0, so that eps in every square is eps once in every mean.
                m, n = _sizes(of, name, gradient)[-2:]
                rows, columns = rows + n * numbers["eps"], jnp.maximum(columns + m * numbers["eps"], _TINY)
                total = jnp.maximum(rows.sum(-2, keepdims=True) - (rows.shape[-2] - m) * n * numbers["eps"], _TINY)
                along = gradient * jax.lax.rsqrt(jnp.maximum(rows / total, _TINY)) * jax.lax.rsqrt(columns)
            else:
                new.squares[name] = old * state.squares[name] + (1 - old) * square
                along = gradient * jax.lax.rsqrt(new.squares[name] + numbers["eps"])
            along = along / jnp.maximum(1, _rms(of, name, along) / numbers["clip_threshold"])
            relative = jnp.maximum(_rms(of, name, params[name], _fill(of, name)), _LEAST_SCALE)
            updates[name] = along * jnp.where(numbers["parameter_scale"] > 0, relative, 1)
        return updates, new

    return optax.GradientTransformation(init, update)


def _fill(of: Group, name: str) -> float:
    return of.part.parameters[name].parameter.fill if name in of.part.parameters else 0.0


def _sizes(of: Group, name: str, array: jax.Array) -> list[jax.Array]:
    """Of each layer's own axes, as arrays that broadcast over the layers."""
    sizes = of.shape(name, array)
    return [sizes[..., axis].reshape(*sizes.shape[:-1], *[1] * sizes.shape[-1]) for axis in range(sizes.shape[-1])]


def _rms(of: Group, name: str, array: jax.Array, fill: float = 0.0) -> jax.Array:
    """Root mean square of each layer's own numbers, broadcast over the layer; `fill` is what the padding holds."""
    sizes = _sizes(of, name, array)
    axes, own = tuple(range(-len(sizes), 0)), math.prod(sizes)
    padding = math.prod(array.shape[axis] for axis in axes) - own
    return jnp.sqrt(jnp.maximum((array**2).sum(axes, keepdims=True) - fill**2 * padding, 0) / jnp.maximum(own, 1))


register_optimizer("adafactor", Adafactor())
