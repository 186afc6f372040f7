"""Vision transformers (arXiv:2010.11929): an image's patches in place of tokens, through the same layers as a text's.

DeiT (arXiv:2012.12877) has a second token before the patches; DINOv2 (arXiv:2304.07193) scales what each layer adds, and may have register
tokens (arXiv:2309.16588); SigLIP's and CLIP's towers differ in norms. All of that is in the config.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

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
class VisionTransformerConfig:
    """A vision transformer: `depth` blocks over the patches of an image.

    Attributes:
        patch: (height, width) of a patch in pixels.
        grid: (rows, columns) of patches that the table of positions is made for; other images get interpolated ones.
        channels: of an image.
        class_token: whether a token stands before the patches that a head may read.
        distillation_token: whether another one follows it.
        registers: how many more tokens follow those; they have no positions.
        patch_bias: whether the patches' projection has a bias.
        entry_norm: whether a norm stands before the first layer.
        final_norm: whether one follows the last.
        detection_tokens: how many tokens stand behind the patches, with positions: the queries of a detector.
        layer_positions: whether every layer but the first adds positions of its own to what it is given.
        antialias: whether smaller images get positions that are averaged over those they take the place of.
        boxed: whether checkpoints have tokens and positions as (1, tokens, width); else (tokens, width), and (width,) of one token.
    """

    block: BlockConfig
    depth: int
    patch: tuple[int, int]
    grid: tuple[int, int]
    channels: int = 3
    class_token: bool = True
    distillation_token: bool = False
    registers: int = 0
    patch_bias: bool = True
    entry_norm: bool = False
    final_norm: bool = True
    detection_tokens: int = 0
    layer_positions: bool = False
    antialias: bool = False
    boxed: bool = True

    @property
    def placed(self) -> int:
        """Tokens before the patches that have positions."""
        return self.class_token + self.distillation_token

    @property
    def first(self) -> int:
        """Tokens before the patches."""
        return self.placed + self.registers

    @property
    def longest(self) -> int | None:
        """None: positions are interpolated to any number of patches."""
        return None


class VisionTransformer(VisionBase):
    """Images to hidden states; see `VisionBase` for the attributes."""

    config: VisionTransformerConfig

    def __init__(self, config: VisionTransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        block, width = config.block, config.block.width
        shared = {"dtype": block.dtype, "param_dtype": block.dtype, "rngs": rngs}
        self.patch_embed = nnx.Conv(
            config.channels, width, config.patch, config.patch, padding="VALID", use_bias=config.patch_bias, **shared,
            kernel_metadata={AXES: (None, None, None, "embed")}, bias_metadata={AXES: ("embed",)},
        )  # fmt: skip
        lead = (1,) if config.boxed else ()
        one = (1, 1) if config.boxed else ()
        if config.class_token:
            self.class_token = _table((*one, width), rngs, block)
        if config.distillation_token:
            self.distillation_token = _table((*one, width), rngs, block)
        if config.registers:
            self.register_tokens = _table((*lead, config.registers, width), rngs, block)
        if config.detection_tokens:
            self.detection_tokens = _table((*lead, config.detection_tokens, width), rngs, block)
        length = config.placed + math.prod(config.grid) + config.detection_tokens
        self.position_embed = _table((*lead, length, width), rngs, block)
        if config.layer_positions:
            self.layer_position_embed = _table((config.depth - 1, *lead, length, width), rngs, block)
        if config.entry_norm:
            self.entry_norm = norm_of(block, width, rngs=rngs)
        self.layers = Stack(lambda r: Block(block, rngs=r), config.depth, rngs=rngs)
        if config.final_norm:
            self.final_norm = norm_of(block, width, rngs=rngs)

    def hidden(
        self,
        pixels: Array,
        *,
        dropout_rng: Array | None = None,
        trunk: Array | None = None,
        gather: Array | None = None,
        behind: Array | None = None,
    ) -> Array:
        """The last hidden states (batch, tokens, width), or (n, width) with `gather`: class token, other tokens, patches row by row, and
        what stands behind them.

        Args:
            pixels, dropout_rng, trunk, gather: as for `VisionBase.hidden`.
            behind: (n, width), further tokens of every image, positions included.
        """
        if trunk is None:
            x, context = self._entering(pixels, dropout_rng, behind)
        else:
            x, context = trunk, self._context(trunk.shape[1], self._grid(pixels.shape[1:3]), dropout_rng)
        x = self.layers(x, context, gather, None, trunk)
        return self.final_norm(x) if self.config.final_norm else x

    def trunk(self, pixels: Array, *, dropout_rng: Array | None = None) -> Array:
        """(batch, tokens, width): what enters the layers above the lowest cut of the stack."""
        return self.layers.below(*self._entering(pixels, dropout_rng))

    def tokens(self, size: tuple[int, int]) -> int:
        """The patches of an image of (height, width), and the tokens before and behind them."""
        return self.config.first + math.prod(self._grid(size)) + self.config.detection_tokens

    @property
    def queries(self) -> int:
        """As many as there are detection tokens."""
        return self.config.detection_tokens

    @property
    def smallest(self) -> int:
        """A patch."""
        return max(self.config.patch)

    @property
    def reads(self) -> str:
        """The class token where there is one."""
        return "first" if self.config.class_token else "mean"

    def pooled_width(self, reads: str) -> int:
        """The residual width, or twice that."""
        return self.config.block.width * (2 if reads == "first_mean" else 1)

    def pooled(self, hidden: Array, reads: str) -> Array:
        """(batch, n) float32: the class token, the mean of the patches, or both."""
        hidden = hidden.astype(jnp.float32)
        if reads == "first":
            return hidden[:, 0]
        mean = hidden[:, self.config.first : hidden.shape[1] - self.config.detection_tokens].mean(1)
        return mean if reads == "mean" else jnp.concatenate([hidden[:, 0], mean], axis=-1)

    def _grid(self, size: Sequence[int]) -> tuple[int, int]:
        """(rows, columns) of patches of an image of (height, width)."""
        height, width = (side // patch for side, patch in zip(size, self.config.patch, strict=True))
        return height, width

    def _positions(self, table: Array, grid: tuple[int, int]) -> Array:
        """(tokens, width): positions of an image of so many patches, of a table made for `config.grid`."""
        config, last = self.config, len(table) - self.config.detection_tokens
        patches = interpolated(table[config.placed : last], config.grid, grid, antialias=config.antialias)
        return jnp.concatenate([table[: config.placed], patches, table[last:]])

    def _context(self, length: int, grid: tuple[int, int], dropout_rng: Array | None) -> Context:
        segments = jnp.ones((1, length), jnp.int32)  # every token of an image sees every other: one mask for all images
        places = jnp.zeros_like(segments)
        context = make_context((LayerType(),), segments, places, causal=False, dropout_rng=dropout_rng, dropout=self.dropout)
        if not self.config.layer_positions:
            return context
        tables = self._whole(self.layer_position_embed).reshape(self.config.depth - 1, -1, self.config.block.width)
        entering = jax.vmap(lambda table: self._positions(table, grid))(tables)
        return dataclasses.replace(context, entering=jnp.pad(entering, ((1, 0), (0, 0), (0, 0))))

    def _entering(self, pixels: Array, dropout_rng: Array | None, behind: Array | None = None) -> tuple[Array, Context]:
        """What the stack is called with: the patches with what stands before them, and what all layers see."""
        config, width = self.config, self.config.block.width
        patches = self.patch_embed(pixels.astype(config.block.dtype))
        rows, height, across, _ = patches.shape
        table = self._positions(self._whole(self.position_embed).reshape(-1, width), (height, across))
        own, last = table[: config.placed], len(table) - config.detection_tokens
        x = patches.reshape(rows, -1, width) + table[config.placed : last]
        first, after = [], []
        if config.class_token:
            first.append(self._whole(self.class_token).reshape(1, width) + own[:1])
        if config.distillation_token:
            first.append(self._whole(self.distillation_token).reshape(1, width) + own[1:2])
        if config.registers:
            first.append(self._whole(self.register_tokens).reshape(-1, width))
        if config.detection_tokens:
            after.append(self._whole(self.detection_tokens).reshape(-1, width) + table[last:])
        if behind is not None:
            after.append(behind.astype(x.dtype))
        spread = lambda tokens: [jnp.broadcast_to(t, (rows, *t.shape)) for t in tokens]
        if first or after:
            x = jnp.concatenate([*spread(first), x, *spread(after)], axis=1)
        context = self._context(x.shape[1], (height, across), dropout_rng)
        x = context.drop(x, 0, 3)
        return (self.entry_norm(x) if config.entry_norm else x), context

    def _whole(self, table: nnx.Param) -> Array:
        return gathered(table[...], table.get_metadata().get(AXES))


def _table(shape: tuple[int, ...], rngs: nnx.Rngs, block: BlockConfig) -> nnx.Param:
    """A table of vectors ~ N(0, 0.02) that belongs to no module."""
    table = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, block.dtype))
    table.set_metadata(AXES, (*[None] * (len(shape) - 2), *["positions"] * (len(shape) > 1), "embed"))
    return table


def interpolated(table: Array, grid: tuple[int, int], wanted: tuple[int, int], *, antialias: bool) -> Array:
    """Positions of one grid of patches for another, bicubic as `torch.nn.functional.interpolate` has it (align_corners false).

    Args:
        table: (rows * columns, width) of `grid`.
        grid, wanted: (rows, columns).
        antialias: see `VisionTransformerConfig`.

    Returns:
        (rows * columns, width) of `wanted`, in the table's dtype.
    """
    if grid == wanted:
        return table
    down, across = (jnp.asarray(_bicubic(old, new, antialias)) for old, new in zip(grid, wanted, strict=True))
    whole = table.astype(jnp.float32).reshape(*grid, -1)
    found = jnp.einsum("ai,bj,ijw->abw", down, across, whole, precision=jax.lax.Precision.HIGHEST)
    return found.reshape(-1, table.shape[-1]).astype(table.dtype)


def _bicubic(old: int, new: int, antialias: bool) -> np.ndarray:
    """(new, old) float32: the share that each of `old` samples has in each of `new`; Keys' cubic convolution (1981), a = -0.75, or -0.5
    with antialiasing, whose kernel is stretched by old / new where there are fewer samples than before."""
    a, scale = (-0.5 if antialias else -0.75), old / new
    stretch = max(scale, 1.0) if antialias else 1.0

    def kernel(x: np.ndarray) -> np.ndarray:
        x = abs(x)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * a
        return np.where(x < 1, near, np.where(x < 2, far, 0.0))

    shares = np.zeros((new, old))
    for i in range(new):
        centre = scale * (i + 0.5)
        if antialias:
            inside = np.arange(max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), old))
            found = kernel((inside + 0.5 - centre) / stretch)
            shares[i, inside] = found / found.sum()
        else:
            near = math.floor(centre - 0.5) + np.arange(-1, 3)
            np.add.at(shares[i], near.clip(0, old - 1), kernel(near + 0.5 - centre))
    return shares.astype(np.float32)
