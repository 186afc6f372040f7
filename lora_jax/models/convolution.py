"""Layers of convolutional nets: convolutions of all kinds, batch norms with the statistics of pretraining, and pooling."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .layers import Array

# Zeros before and behind the rows and columns; or TensorFlow's "same", which depends on the size.
Padding = tuple[tuple[int, int], tuple[int, int]] | str


def even(before: int, behind: int | None = None) -> Padding:
    """As many zeros at rows as at columns."""
    pads = (before, before if behind is None else behind)
    return pads, pads


def conv(
    inputs: int, outputs: int, kernel: int, stride: int, padding: Padding, *, bias: bool = False, dtype: Any, rngs: nnx.Rngs
) -> nnx.Conv:
    """A convolution with a square kernel."""
    shared = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
    make = PointwiseConv if kernel == 1 and padding == even(0) else nnx.Conv
    return make(inputs, outputs, (kernel, kernel), stride, padding=padding, use_bias=bias, **shared)


class PointwiseConv(nnx.Conv):
    """A 1 x 1 convolution, as a product: the gradient of its kernel is one too, where XLA's own is slow on a CPU."""

    def __call__(self, inputs: Array, out_sharding: None = None) -> Array:
        """(..., height, width, channels) -> the same with other sizes."""
        kernel, stride = self.kernel[...][0, 0], self.strides
        y = inputs[..., ::stride, ::stride, :].astype(kernel.dtype) @ kernel
        return y if self.bias is None else y + self.bias[...]


class DepthwiseConv(nnx.Conv):
    """A convolution of each channel by itself, as a sum of shifted products: XLA's own took twenty times as long on a CPU."""

    def __init__(self, channels: int, kernel: int, stride: int, padding: Padding, *, bias: bool = False, dtype: Any, rngs: nnx.Rngs):
        shared = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        groups = {"feature_group_count": channels, "use_bias": bias}
        super().__init__(channels, channels, (kernel, kernel), stride, padding=padding, **groups, **shared)

    def __call__(self, inputs: Array, out_sharding: None = None) -> Array:
        """(batch, height, width, channels) -> the same with other sizes."""
        kernel, stride, padding = self.kernel[...], self.strides, self.padding
        assert isinstance(stride, int)
        pads: Any = padding
        if isinstance(padding, str):
            pads = jax.lax.padtype_to_pads(inputs.shape[1:3], self.kernel_size, (stride, stride), padding)
        x = jnp.pad(inputs, [(0, 0), *pads, (0, 0)])
        height, width = ((n - k) // stride + 1 for n, k in zip(x.shape[1:3], self.kernel_size, strict=True))
        y = jnp.zeros((), inputs.dtype) if self.bias is None else self.bias[...]
        for row, column in itertools.product(*map(range, self.kernel_size)):
            shifted = x[:, row : row + stride * (height - 1) + 1 : stride, column : column + stride * (width - 1) + 1 : stride]
            y = y + shifted * kernel[row, column, 0]
        return y


class BatchNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias of each channel, with the running statistics of pretraining; in float32."""

    def __init__(self, channels: int, eps: float):
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(channels)), nnx.BatchStat(jnp.ones(channels))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """(..., channels) -> the same."""
        gain = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.eps)
        return (x.astype(jnp.float32) * gain + (self.bias[...] - self.mean[...] * gain)).astype(x.dtype)


class Blocks(nnx.Module):
    """Modules one after the other, by their numbers as names."""

    def __init__(self, blocks: Iterable[nnx.Module]):
        names = []
        for i, block in enumerate(blocks):
            setattr(self, str(i), block)
            names.append(str(i))
        self.names: tuple[str, ...] = nnx.static(tuple(names))

    def __call__(self, x: Array) -> Array:
        """(batch, height, width, channels) -> the same with other sizes."""
        for name in self.names:
            x = getattr(self, name)(x)
        return x


def max_pool(x: Array) -> Array:
    """The largest of 3 x 3 pixels, at every second row and column; (batch, height, width, channels)."""
    lowest = float(jnp.finfo(x.dtype).min)
    x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=lowest)
    height, width = ((n - 3) // 2 + 1 for n in x.shape[1:3])
    parts = [x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2] for i, j in itertools.product(range(3), repeat=2)]
    largest = parts[0]
    for part in parts[1:]:  # as a gradient, it costs a CPU less than a reduced window's
        largest = jnp.maximum(largest, part)
    return largest
