"""Convolutional nets over images: ResNet (arXiv:1512.03385), EfficientNet (arXiv:1905.11946) and ConvNeXt (arXiv:2201.03545).

Their layers differ in shape: each is a module of its own, `blocks.0`, `blocks.1`, ..., and none is stacked. Batch norms use the running
statistics of the checkpoint, in training as in evaluation, unless `model.train_batch_stats` says otherwise. Nothing is dropped.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .convolution import BatchNorm, Blocks, DepthwiseConv, Padding, conv, even, max_pool
from .layers import Array, activation, linear, norm
from .vision import VisionBase


class ConvolutionalNet(VisionBase):
    """What the nets have in common: a stem, blocks, and the mean over the last feature map for a head."""

    blocks: Blocks
    drops = False

    @property
    def batch_norms(self) -> list[BatchNorm]:
        """All of them."""
        return [module for _, module in nnx.iter_modules(self) if isinstance(module, BatchNorm)]

    def stem(self, x: Array) -> Array:
        """What the blocks are given."""
        raise NotImplementedError

    def top(self, x: Array) -> Array:
        """What the last block's output goes through."""
        return x

    def hidden(self, pixels: Array, *, dropout_rng: Array | None = None, trunk: Array | None = None, gather: Array | None = None) -> Array:
        """The last feature map (batch, height, width, channels), in the weights' dtype."""
        if trunk is None:
            return self.top(self.blocks.above(self._below(pixels)))
        shape = jax.eval_shape(self._below, pixels).shape
        flat = trunk.reshape(shape[0], -1)[:, : math.prod(shape[1:])]
        return self.top(self.blocks.above(flat.reshape(shape)))

    def trunk(self, pixels: Array, *, dropout_rng: Array | None = None) -> Array:
        """What enters the blocks above the cut, flattened, in as many parts as the image has positions; zeros fill the last one up.

        Returns:
            (batch, positions, numbers), positions as `tokens` counts them.
        """
        x = self._below(pixels)
        flat, positions = x.reshape(x.shape[0], -1), self.tokens((pixels.shape[1], pixels.shape[2]))
        flat = jnp.pad(flat, [(0, 0), (0, -flat.shape[1] % positions)])
        return flat.reshape(x.shape[0], positions, -1)

    @property
    def trunk_depth(self) -> int:
        """How many blocks `trunk` runs."""
        return self.blocks.cut

    def _below(self, pixels: Array) -> Array:
        return self.blocks.below(self.stem(pixels.astype(self.config.dtype)))

    def pooled(self, hidden: Array, reads: str) -> Array:
        """(batch, channels) float32: the mean over rows and columns."""
        return hidden.astype(jnp.float32).mean((1, 2))

    def pooled_width(self, reads: str) -> int:
        """The channels of the last feature map."""
        return self.config.outputs

    @property
    def layer_sizes(self) -> tuple[int, int]:
        """Channels of the last feature map, twice: what most of the last convolutions have."""
        return self.config.outputs, self.config.outputs

    def tokens(self, size: tuple[int, int]) -> int:
        """The pixels of the last feature map, each of which stands for 32 x 32 of the image."""
        return -(-size[0] // 32) * -(-size[1] // 32)


@dataclasses.dataclass(frozen=True)
class ResNetBlock:
    """A residual block.

    Attributes:
        inputs, outputs: channels.
        inner: channels of the middle one of three convolutions; None where there are two.
        stride: of the block.
        early: whether of three convolutions the first has it; else the middle one.
    """

    inputs: int
    outputs: int
    inner: int | None
    stride: int
    early: bool = False

    @property
    def convolutions(self) -> list[tuple[int, int, int, int]]:
        """(inputs, outputs, kernel, stride) of each."""
        if self.inner is None:
            return [(self.inputs, self.outputs, 3, self.stride), (self.outputs, self.outputs, 3, 1)]
        first, middle = (self.stride, 1) if self.early else (1, self.stride)
        return [(self.inputs, self.inner, 1, first), (self.inner, self.inner, 3, middle), (self.inner, self.outputs, 1, 1)]

    @property
    def projects(self) -> bool:
        """Whether the shortcut is a convolution."""
        return self.inputs != self.outputs or self.stride != 1


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """A ResNet; `width` is that of the stem, `norm_eps` the batch norms'."""

    blocks: tuple[ResNetBlock, ...]
    width: int = 64
    channels: int = 3
    activation: str = "relu"
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32

    @property
    def outputs(self) -> int:
        """Channels of the last feature map."""
        return self.blocks[-1].outputs


class _Residual(nnx.Module):
    def __init__(self, spec: ResNetBlock, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.depth, self.activation, shared = len(spec.convolutions), config.activation, {"dtype": config.dtype, "rngs": rngs}
        for i, (inputs, outputs, kernel, stride) in enumerate(spec.convolutions, 1):
            setattr(self, f"conv{i}", conv(inputs, outputs, kernel, stride, even(kernel // 2), **shared))
            setattr(self, f"norm{i}", BatchNorm(outputs, config.norm_eps))
        self.projects = spec.projects
        if spec.projects:
            self.shortcut = conv(spec.inputs, spec.outputs, 1, spec.stride, even(0), **shared)
            self.shortcut_norm = BatchNorm(spec.outputs, config.norm_eps)

    def __call__(self, x: Array) -> Array:
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(y))
            y = activation(self.activation, y) if i < self.depth else y
        return activation(self.activation, y + (self.shortcut_norm(self.shortcut(x)) if self.projects else x))


class ResNet(ConvolutionalNet):
    """A ResNet; see `VisionBase` for the attributes."""

    config: ResNetConfig

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        self.stem_conv = conv(config.channels, config.width, 7, 2, even(3), dtype=config.dtype, rngs=rngs)
        self.stem_norm = BatchNorm(config.width, config.norm_eps)
        self.blocks = Blocks(_Residual(spec, config, rngs=rngs) for spec in config.blocks)

    def stem(self, x: Array) -> Array:
        """A quarter of the rows and columns."""
        return max_pool(activation(self.config.activation, self.stem_norm(self.stem_conv(x))))


@dataclasses.dataclass(frozen=True)
class MobileBlock:
    """An inverted residual block: expanded, convolved by channel, squeezed and excited, projected.

    Attributes:
        inputs, hidden, outputs: channels; without expansion `hidden` is `inputs`.
        expands: whether a convolution expands them.
        kernel, stride, padding: of the convolution by channel.
        squeeze: channels of squeeze-and-excite; None for none of it.
    """

    inputs: int
    hidden: int
    outputs: int
    expands: bool
    kernel: int
    stride: int
    padding: Padding
    squeeze: int | None
    residual: bool


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
    """An EfficientNet.

    Attributes:
        blocks: in order.
        width: of the stem.
        stem_padding: of its convolution.
        outputs: of the convolution after the last block.
        channels: of an image.
        activation: of all convolutions but the blocks' last.
        norm_eps, norm_momentum: of the batch norms.
        dtype: of the weights and convolutions.
    """

    blocks: tuple[MobileBlock, ...]
    width: int
    stem_padding: Padding
    outputs: int
    channels: int = 3
    activation: str = "silu"
    norm_eps: float = 1e-3
    norm_momentum: float = 0.1
    dtype: Any = jnp.float32


class _Mobile(nnx.Module):
    def __init__(self, spec: MobileBlock, config: EfficientNetConfig, *, rngs: nnx.Rngs):
        shared = {"dtype": config.dtype, "rngs": rngs}
        if spec.expands:
            self.expand, self.expand_norm = conv(spec.inputs, spec.hidden, 1, 1, even(0), **shared), BatchNorm(spec.hidden, config.norm_eps)
        self.depthwise = DepthwiseConv(spec.hidden, spec.kernel, spec.stride, spec.padding, **shared)
        self.depthwise_norm = BatchNorm(spec.hidden, config.norm_eps)
        if spec.squeeze is not None:
            self.squeeze = conv(spec.hidden, spec.squeeze, 1, 1, even(0), bias=True, **shared)
            self.excite = conv(spec.squeeze, spec.hidden, 1, 1, even(0), bias=True, **shared)
        self.project, self.project_norm = conv(spec.hidden, spec.outputs, 1, 1, even(0), **shared), BatchNorm(spec.outputs, config.norm_eps)
        self.spec, self.activation = nnx.static(spec), config.activation

    def __call__(self, x: Array) -> Array:
        y = activation(self.activation, self.expand_norm(self.expand(x))) if self.spec.expands else x
        y = activation(self.activation, self.depthwise_norm(self.depthwise(y)))
        if self.spec.squeeze is not None:
            squeezed = activation(self.activation, self.squeeze(y.mean((1, 2), keepdims=True)))
            y = y * jax.nn.sigmoid(self.excite(squeezed))
        y = self.project_norm(self.project(y))
        return x + y if self.spec.residual else y


class EfficientNet(ConvolutionalNet):
    """An EfficientNet; see `VisionBase` for the attributes."""

    config: EfficientNetConfig

    def __init__(self, config: EfficientNetConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        shared = {"dtype": config.dtype, "rngs": rngs}
        self.stem_conv = conv(config.channels, config.width, 3, 2, config.stem_padding, **shared)
        self.stem_norm = BatchNorm(config.width, config.norm_eps)
        self.blocks = Blocks(_Mobile(spec, config, rngs=rngs) for spec in config.blocks)
        self.top_conv = conv(config.blocks[-1].outputs, config.outputs, 1, 1, even(0), **shared)
        self.top_norm = BatchNorm(config.outputs, config.norm_eps)

    def stem(self, x: Array) -> Array:
        """Half of the rows and columns."""
        return activation(self.config.activation, self.stem_norm(self.stem_conv(x)))

    def top(self, x: Array) -> Array:
        """With the channels of the last convolution."""
        return activation(self.config.activation, self.top_norm(self.top_conv(x)))


@dataclasses.dataclass(frozen=True)
class ConvNextConfig:
    """A ConvNeXt.

    Attributes:
        widths, depths: channels and blocks of each stage.
        patch: sides of the stem's patches.
        channels: of an image.
        activation: in the blocks.
        norm_eps: of the norm before the head; the others have 1e-6.
        scaled: whether what a block adds is multiplied by trained gains.
        dtype: of the weights and convolutions.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    patch: int = 4
    channels: int = 3
    activation: str = "gelu"
    norm_eps: float = 1e-12
    scaled: bool = True
    dtype: Any = jnp.float32

    @property
    def outputs(self) -> int:
        """Channels of the last feature map."""
        return self.widths[-1]

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each block; where they differ, or a stage begins, a convolution halves the rows and columns first."""
        before = (self.widths[0], *self.widths)
        return [(before[s] if i == 0 else w, w) for s, (w, d) in enumerate(zip(self.widths, self.depths, strict=True)) for i in range(d)]

    @property
    def begins(self) -> list[bool]:
        """Whether each block begins a stage after the first."""
        return [s > 0 and i == 0 for s, depth in enumerate(self.depths) for i in range(depth)]


class _Next(nnx.Module):
    def __init__(self, inputs: int, width: int, begins: bool, config: ConvNextConfig, *, rngs: nnx.Rngs):
        shared = {"dtype": config.dtype, "rngs": rngs}
        self.begins, self.activation = begins, config.activation
        if begins:
            self.down_norm, self.down = norm("layer", inputs, 1e-6, **shared), conv(inputs, width, 2, 2, even(0), bias=True, **shared)
        self.depthwise = DepthwiseConv(width, 7, 1, even(3), bias=True, **shared)
        self.norm = norm("layer", width, 1e-6, **shared)
        self.up_proj = linear(width, 4 * width, ("embed", "mlp"), bias=True, **shared)
        self.down_proj = linear(4 * width, width, ("mlp", "embed"), bias=True, **shared)
        self.gain = nnx.Param(jnp.ones(width, config.dtype)) if config.scaled else None

    def __call__(self, x: Array) -> Array:
        x = self.down(self.down_norm(x)) if self.begins else x
        y = self.down_proj(activation(self.activation, self.up_proj(self.norm(self.depthwise(x)))))
        return x + (y if self.gain is None else self.gain[...] * y)


class ConvNext(ConvolutionalNet):
    """A ConvNeXt; see `VisionBase` for the attributes."""

    config: ConvNextConfig

    def __init__(self, config: ConvNextConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        shared = {"dtype": config.dtype, "rngs": rngs}
        self.stem_conv = conv(config.channels, config.widths[0], config.patch, config.patch, even(0), bias=True, **shared)
        self.stem_norm = norm("layer", config.widths[0], 1e-6, **shared)
        blocks = zip(config.blocks, config.begins, strict=True)
        self.blocks = Blocks(_Next(*sizes, begins, config, rngs=rngs) for sizes, begins in blocks)
        self.final_norm = norm("layer", config.outputs, config.norm_eps, **shared)

    def stem(self, x: Array) -> Array:
        """The patches."""
        return self.stem_norm(self.stem_conv(x))

    def pooled(self, hidden: Array, reads: str) -> Array:
        """(batch, channels) float32: the norm of the mean over rows and columns."""
        return self.final_norm(super().pooled(hidden, reads)).astype(jnp.float32)
