"""Layers of convolutional nets: convolutions of all kinds, batch norms with running statistics or a batch's own, and pooling."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import InputError
from .layers import UPDATED, Array

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
    """A convolution of each channel by itself, as a sum of shifted products: XLA's own took twenty times as long on a CPU.

    Attributes:
        shifts: False makes it one convolution, for runtimes that have a better one.
    """

    shifts: bool = True

    def __init__(self, channels: int, kernel: int, stride: int, padding: Padding, *, bias: bool = False, dtype: Any, rngs: nnx.Rngs):
        shared = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        groups = {"feature_group_count": channels, "use_bias": bias}
        super().__init__(channels, channels, (kernel, kernel), stride, padding=padding, **groups, **shared)

    def __call__(self, inputs: Array, out_sharding: None = None) -> Array:
        """(batch, height, width, channels) -> the same with other sizes."""
        if not self.shifts:
            return super().__call__(inputs)
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
    """(x - mean) / sqrt(var + eps) * scale + bias of each channel (arXiv:1502.03167), in float32.

    Mean and variance are the running statistics, as pretraining left them. Once `train` was called, they are in training those of the
    batch, over which gradients flow; the running statistics, of which the variance is the unbiased one, go on as PyTorch's do.

    Attributes:
        momentum: how much of the running statistics a batch makes up.
        use_running_average: whether the running statistics are used and stay; evaluation always does so (`nnx.view`).
    """

    def __init__(self, channels: int, eps: float):
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(channels)), nnx.BatchStat(jnp.ones(channels))
        self.eps, self.momentum, self.use_running_average = eps, 0.1, True

    def train(self, momentum: float) -> None:
        """From here on the statistics of a batch are used in training, and each member of a pack keeps running ones of its own."""
        self.momentum, self.use_running_average = momentum, False
        for statistic in (self.mean, self.var):
            statistic.set_metadata(UPDATED, True)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view(model, use_running_average=True)` calls."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: Array) -> Array:
        """(..., channels) -> the same.

        Raises:
            InputError: of a batch's statistics, where it has one value a channel.
        """
        mean, var = (self.mean[...], self.var[...]) if self.use_running_average else self._of_batch(x)
        gain = self.scale[...] * jax.lax.rsqrt(var + self.eps)
        return (x.astype(jnp.float32) * gain + (self.bias[...] - mean * gain)).astype(x.dtype)

    def _of_batch(self, x: Array) -> tuple[Array, Array]:
        values, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
        count = x.size // x.shape[-1]
        if count < 2:
            raise InputError(
                "model.train_batch_stats: a batch norm is given one value a channel, whose variance is 0. "
                "Raise training.batch_size / training.accumulate or task.image_size."
            )
        mean, var = values.mean(axes), values.var(axes)
        for running, own in ((self.mean, mean), (self.var, var * (count / (count - 1)))):
            running.set_value((1 - self.momentum) * running[...] + self.momentum * jax.lax.stop_gradient(own))
        return mean, var


class Blocks(nnx.Module):
    """Modules one after the other, by their numbers as names.

    Attributes:
        names: in order.
        cut: how many of the first ones a pack's members share; adapters set it.
    """

    def __init__(self, blocks: Iterable[nnx.Module]):
        names = []
        for i, block in enumerate(blocks):
            setattr(self, str(i), block)
            names.append(str(i))
        self.names: tuple[str, ...] = nnx.static(tuple(names))
        self.cut = 0

    def __call__(self, x: Array) -> Array:
        """(batch, height, width, channels) -> the same with other sizes."""
        return self.above(self.below(x))

    def below(self, x: Array) -> Array:
        """What the modules below the cut make of x."""
        for name in self.names[: self.cut]:
            x = getattr(self, name)(x)
        return x

    def above(self, x: Array) -> Array:
        """What the others make of that."""
        for name in self.names[self.cut :]:
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
