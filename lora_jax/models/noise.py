"""Random numbers for dropout that belong to a position of the batch, in whatever order, and on whatever devices, it is computed."""

from __future__ import annotations

import jax

from ..parallel.constraints import take_positions
from .positions import targets_of


def uniform(key: jax.Array, x: jax.Array) -> jax.Array:
    """Float32 numbers in [0, 1) of the shape of `x`; at the targets' positions those that all positions would get."""
    targets = targets_of(x)
    if targets is None:
        return jax.random.uniform(key, x.shape)
    index, shape = targets
    return take_positions(jax.random.uniform(key, (*shape, x.shape[-1])), index)
