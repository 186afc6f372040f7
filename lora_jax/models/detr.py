"""DETR (arXiv:2005.12872): a convolutional net's last feature map through an encoder, and a decoder whose queries each find an object."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..parallel.constraints import gathered
from .block import Block, Context, make_context
from .layers import AXES, Array, BlockConfig, LayerType, norm_of
from .stack import Stack
from .vision import VisionBase


@dataclasses.dataclass(frozen=True)
class DetrConfig:
    """A DETR.

    Attributes:
        backbone: config of the convolutional net.
        net: its class.
        encoder, block: the layers of the encoder and of the decoder, of one width.
        encoder_depth, depth: how many of each.
        queries: how many objects are looked for.
        timm: whether files have the net under timm's names.
    """

    backbone: Any
    net: Any
    encoder: BlockConfig
    block: BlockConfig
    encoder_depth: int
    depth: int
    queries: int
    timm: bool = False

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.backbone.channels


class Detr(VisionBase):
    """Images to the decoder's last hidden states, one vector a query; see `VisionBase` for the attributes."""

    config: DetrConfig
    # The backbone's layers are no stack: nothing is computed once for all members.
    trunk_depth = 0

    def __init__(self, config: DetrConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        width, dtype = config.block.width, config.block.dtype
        self.backbone = config.net(config.backbone, rngs=rngs)
        self.input_proj = nnx.Conv(config.backbone.outputs, width, (1, 1), dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.encoder = _Half(config.encoder, config.encoder_depth, rngs=rngs)
        self.decoder = _Half(config.block, config.depth, rngs=rngs)
        self.final_norm = norm_of(config.block, width, rngs=rngs)
        self.query_embed = nnx.Param(jax.random.normal(rngs.params(), (config.queries, width), dtype))
        self.query_embed.set_metadata(AXES, (None, "embed"))

    @property
    def queries(self) -> int:
        """How many objects it looks for."""
        return self.config.queries

    def hidden(self, pixels: Array, *, dropout_rng: Array | None = None, trunk: Array | None = None, gather: Array | None = None) -> Array:
        """(batch, queries, width): the decoder's last hidden states."""
        config = self.config
        found = self.input_proj(self.backbone.hidden(pixels.astype(config.block.dtype)))
        rows, height, across, width = found.shape
        places = jnp.asarray(sine_places(height, across, width))[None]
        keys = [None if dropout_rng is None else jax.random.fold_in(dropout_rng, half) for half in range(2)]
        context = dataclasses.replace(self._context(height * across, keys[0]), places=places)
        source = self.encoder.layers(context.drop(found.reshape(rows, -1, width), 0, 3), context)
        queries = gathered(self.query_embed[...], self.query_embed.get_metadata().get(AXES))
        seen = jnp.ones((rows, 1, config.queries, height * across), bool)
        context = dataclasses.replace(
            self._context(config.queries, keys[1]), places=queries[None], source=source, source_mask=seen, source_places=places
        )
        x = jnp.zeros((rows, config.queries, width), source.dtype)
        return self.final_norm(self.decoder.layers(x, context))

    def pooled(self, hidden: Array, reads: str) -> Array:
        """(batch, width) float32: the mean over the queries."""
        return hidden.astype(jnp.float32).mean(1)

    def pooled_width(self, reads: str) -> int:
        """The decoder's width."""
        return self.config.block.width

    def tokens(self, size: tuple[int, int]) -> int:
        """The positions of the feature map, and the queries."""
        return self.backbone.tokens(size) + self.config.queries

    def _context(self, length: int, dropout_rng: Array | None) -> Context:
        segments = jnp.ones((1, length), jnp.int32)
        options = {"causal": False, "dropout_rng": dropout_rng, "dropout": self.dropout}
        return make_context((LayerType(),), segments, jnp.zeros_like(segments), **options)


class _Half(nnx.Module):
    """The encoder's or the decoder's layers."""

    def __init__(self, block: BlockConfig, depth: int, *, rngs: nnx.Rngs):
        self.layers = Stack(lambda r: Block(block, rngs=r), depth, rngs=rngs)


def sine_places(rows: int, columns: int, width: int) -> np.ndarray:
    """(rows * columns, width) float32: sines and cosines of each position's row, then of its column (arXiv:2005.12872, appendix A.4).

    >>> sine_places(2, 3, 8).shape
    (6, 8)
    """
    half = width // 2
    scale = 10000.0 ** (2 * (np.arange(half) // 2) / half)

    def waves(count: int) -> np.ndarray:
        angle = (np.arange(1, count + 1) / (count + 1e-6) * 2 * np.pi)[:, None] / scale
        return np.where(np.arange(half) % 2 == 0, np.sin(angle), np.cos(angle))

    down, across = waves(rows), waves(columns)
    both = [np.broadcast_to(down[:, None], (rows, columns, half)), np.broadcast_to(across[None], (rows, columns, half))]
    return np.concatenate(both, axis=-1).reshape(rows * columns, width).astype(np.float32)
