"""A convolution over the tokens of a text, which is blind to its neighbours in a packed row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..parallel.constraints import gathered
from .layers import AXES

Array = jax.Array


class TokenConvolution(nnx.Module):
    """y[t] = bias + sum over k of x[t + k - size // 2] W[k], x being 0 outside of the text.

    Args:
        width: of inputs and outputs.
        size: how many tokens it sees; odd.
    """

    def __init__(self, width: int, size: int, *, dtype: Any, rngs: nnx.Rngs):
        self.kernel = nnx.Param((size * width) ** -0.5 * jax.random.normal(rngs.params(), (size, width, width), dtype))
        self.kernel.set_metadata(AXES, (None, "embed", "embed_out"))
        self.bias = nnx.Param(jnp.zeros((width,), dtype))
        self.bias.set_metadata(AXES, ("embed_out",))

    def __call__(self, x: Array, segment_ids: Array) -> Array:
        """(rows, length, width) -> the same; tokens of one text have equal `segment_ids` (rows, length)."""
        kernel = gathered(self.kernel[...], self.kernel.get_metadata().get(AXES))
        half = kernel.shape[0] // 2
        length = x.shape[1]
        # 0 is padding, which is no text: -1 outside of the row equals no token's.
        around = jnp.pad(segment_ids, ((0, 0), (half, half)), constant_values=-1)
        beside = jnp.pad(x, ((0, 0), (half, half), (0, 0)))
        out = jnp.broadcast_to(self.bias[...], x.shape)
        for k in range(kernel.shape[0]):
            inside = around[:, k : k + length] == segment_ids
            out = out + jnp.where(inside[..., None], beside[:, k : k + length], 0) @ kernel[k]
        return out
