"""What all bases over images have in common: how they are called, normalised pixels, and one vector an image."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..weights.pixels import PixelSpec
from ..weights.provenance import Origin
from .convolution import BatchNorm
from .layers import Array, HeadShape


class VisionBase(nnx.Module):
    """A base over images, called as `base(pixels)`: pixels (batch, height, width, channels) float32, normalised.

    Args:
        config: the shape it is built from.

    Attributes:
        config: the same.
        pixels: how images become what it is given.
        dropout: rate of the model's own dropout, in calls that are given `dropout_rng`; 0 of a model that has none (`drops`).
        site_aliases: site path -> Hugging Face module path with `{i}` for the layer, so that those names work as targets.
        head_shapes: kind of head -> its shape, where the family has one of its own.
        origin: the checkpoint it was loaded from, if it was.
    """

    is_decoder = False
    # Whether there is anything that `dropout` applies to.
    drops = True

    def __init__(self, config: Any):
        self.config = nnx.static(config)
        self.pixels: PixelSpec = nnx.static(PixelSpec())
        self.dropout = 0.0
        self.site_aliases: tuple[tuple[str, str], ...] = nnx.static(())
        self.head_shapes: tuple[tuple[str, HeadShape], ...] = nnx.static(())
        self.origin: Origin | None = nnx.static(None)

    def __call__(self, pixels: Array) -> Array:
        """The last hidden states (batch, tokens, width), or the last feature map (batch, height, width, channels)."""
        return self.hidden(pixels)

    def hidden(self, pixels: Array, *, dropout_rng: Array | None = None, trunk: Array | None = None, gather: Array | None = None) -> Array:
        """The same.

        Args:
            pixels: (batch, height, width, channels) float32, normalised.
            dropout_rng: PRNG key of the model's own dropout; nothing is dropped without it.
            trunk: what `trunk` gave for the same images.
            gather: (n,) int32, positions of the flattened (batch * tokens) to return, (n, width); of a model with tokens alone.
        """
        raise NotImplementedError

    def trunk(self, pixels: Array, *, dropout_rng: Array | None = None) -> Array:
        """What enters the layers above the lowest cut of the model's stack.

        Raises:
            ValueError: there is no stack, or it is not cut.
        """
        raise ValueError("the model has no stack of layers")

    def pooled(self, hidden: Array, reads: str) -> Array:
        """(batch, n) float32: one vector an image, of what `hidden` gave.

        Args:
            reads: as `HeadShape.reads`.
        """
        raise NotImplementedError

    def pooled_width(self, reads: str) -> int:
        """How many numbers that vector has."""
        raise NotImplementedError

    def tokens(self, size: tuple[int, int]) -> int:
        """How many positions an image of (height, width) has: what a batch's size is counted in."""
        raise NotImplementedError

    @property
    def batch_norms(self) -> list[BatchNorm]:
        """Those whose statistics may be trained."""
        return []

    @property
    def queries(self) -> int:
        """How many objects it looks for by itself: its last hidden states are theirs. 0 of one that looks for none."""
        return 0

    @property
    def layer_sizes(self) -> tuple[int, int]:
        """Inputs and outputs of one of the base's largest matrices."""
        return self.config.block.width, self.config.block.hidden

    @property
    def smallest(self) -> int:
        """Pixels of the smallest side of an image that it takes."""
        return 1

    @property
    def reads(self) -> str:
        """What a head reads where the family says nothing."""
        return "mean"

    def normalised(self, values: Array) -> Array:
        """(..., height, width, channels) uint8, 0 to 255, as the model's pixels."""
        mean, std = (np.asarray(numbers, np.float32) for numbers in (self.pixels.mean, self.pixels.std))
        return (values.astype(jnp.float32) / 255 - mean) / std
