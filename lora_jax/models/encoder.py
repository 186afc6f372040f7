"""The bidirectional encoder: embeddings, a stack of blocks and, where the family has them, a convolution, a last norm and a pooler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..parallel.constraints import gathered
from ..weights.provenance import Origin
from .block import Block, Context, make_context
from .layers import AXES, Array, BlockConfig, HeadShape, LayerType, Rows, activation, embedding, linear, norm_of, project, row_layout
from .stack import Stack


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


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """An encoder: `depth` blocks over `vocab` tokens.

    Attributes:
        positions: rows of the table of learned positions; 0 where there is none.
        token_types: rows of the table that tells two texts of a pair apart; 0 where there is none.
        pooler: BERT's tanh layer on the first token.
        padding_idx: where positions are counted from this number + 1 on and padding has this number (RoBERTa); None: from 0.
        layer_types: what each layer's attention sees; a single type is that of all layers.
        final_norm: whether a norm follows the last layer.
        relative_norm: whether the vectors of relative positions (`BlockConfig.relative`) are normed.
        convolution: tokens that a convolution of the embeddings sees, whose activation is added to the output of layer 0 and normed
            with it (DeBERTa-v2-xlarge); 0 where there is none.
        convolution_activation: `gelu`, `tanh`, ...
    """

    block: BlockConfig
    depth: int
    vocab: int
    positions: int
    token_types: int
    pooler: bool
    padding_idx: int | None = None
    layer_types: tuple[LayerType, ...] = (LayerType(),)
    final_norm: bool = False
    relative_norm: bool = False
    convolution: int = 0
    convolution_activation: str = "tanh"

    @property
    def longest(self) -> int | None:
        """Tokens of the longest text there are positions for; None where any will do."""
        first = 0 if self.padding_idx is None else self.padding_idx + 1
        return self.positions - first if self.positions else None


class Encoder(nnx.Module):
    """Tokens to hidden states.

    Attributes:
        config: the shape it was built from.
        dropout: rate of the model's own dropout, in calls that are given `dropout_rng`.
        site_aliases: site path -> Hugging Face module path with `{i}` for the layer, so that those names work as targets.
        head_shapes: kind of head -> its shape, where the family has one of its own.
        origin: the checkpoint it was loaded from, if it was.
    """

    is_decoder = False

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        block = config.block
        self.embed = embedding(config.vocab, block.width, "vocab", dtype=block.dtype, rngs=rngs)
        if config.positions:
            self.position_embed = embedding(config.positions, block.width, "positions", dtype=block.dtype, rngs=rngs)
        if config.token_types:
            self.type_embed = embedding(config.token_types, block.width, "positions", dtype=block.dtype, rngs=rngs)
        self.embed_norm = norm_of(block, block.width, rngs=rngs)
        self.layers = Stack(lambda r: Block(block, rngs=r), config.depth, rngs=rngs)
        if block.relative is not None:
            # No module with an adapter's site: PyTorch's goes by the weights alone, and one there would do nothing.
            vectors = 0.02 * jax.random.normal(rngs.params(), (2 * block.relative.span, block.width), block.dtype)
            self.relative_embed = nnx.Param(vectors)
            self.relative_embed.set_metadata(AXES, ("positions", "embed"))
        if config.relative_norm:
            self.relative_norm = norm_of(block, block.width, rngs=rngs)
        if config.convolution:
            self.convolution = TokenConvolution(block.width, config.convolution, dtype=block.dtype, rngs=rngs)
            self.convolution_norm = norm_of(block, block.width, rngs=rngs)
        if config.final_norm:
            self.final_norm = norm_of(block, block.width, rngs=rngs)
        if config.pooler:
            self.pooler = linear(block.width, block.width, ("embed", "embed_out"), bias=True, dtype=block.dtype, rngs=rngs)
        self.config = nnx.static(config)
        self.dropout = 0.0
        self.site_aliases: tuple[tuple[str, str], ...] = nnx.static(())
        self.head_shapes: tuple[tuple[str, HeadShape], ...] = nnx.static(())
        self.origin: Origin | None = nnx.static(None)

    def __call__(
        self, tokens: Array, attention_mask: Array | None = None, positions: Array | None = None, segment_ids: Array | None = None
    ) -> Array:
        """The last hidden states (batch, seq, width); the arguments are those of `hidden`."""
        return self.hidden(tokens, attention_mask, positions, segment_ids)

    def hidden(
        self,
        tokens: Array,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        *,
        token_types: Array | None = None,
        gather: Array | None = None,
        dropout_rng: Array | None = None,
        trunk: Array | None = None,
    ) -> Array:
        """The last hidden states.

        Args:
            tokens: (batch, seq) int32.
            attention_mask: (batch, seq), 1 for real tokens; all are by default.
            positions: (batch, seq) int32 from 0 on; by default 0, 1, ... along a row, and where padding has a number of its own, along
                the real tokens of a row.
            segment_ids: (batch, seq) int32 for packed rows: 0 is padding, tokens see their own segment alone. Replaces the mask.
            token_types: (batch, seq) int32, 1 in the second text of a pair; 0 by default. Nothing to a model without token types.
            gather: (n,) int32, positions of the flattened (batch * seq) to return; all by default.
            dropout_rng: PRNG key of the model's own dropout, at the rate `dropout`; nothing is dropped without it.
            trunk: (batch, seq, width), what `trunk` gave for the same rows; the layers below the cut are not run then.

        Returns:
            (batch, seq, width), or (n, width) with `gather`.
        """
        x, context, after_first = self._entering(tokens, attention_mask, positions, segment_ids, token_types, dropout_rng)
        x = self.layers(x, context, gather, after_first, trunk)
        return self.final_norm(x) if self.config.final_norm else x

    def trunk(
        self,
        tokens: Array,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        *,
        token_types: Array | None = None,
        dropout_rng: Array | None = None,
    ) -> Array:
        """(batch, seq, width): what enters the layers above the lowest cut of the stack; the arguments are those of `hidden`.

        Raises:
            ValueError: the stack is not cut.
        """
        return self.layers.below(*self._entering(tokens, attention_mask, positions, segment_ids, token_types, dropout_rng))

    def _entering(
        self,
        tokens: Array,
        attention_mask: Array | None,
        positions: Array | None,
        segment_ids: Array | None,
        token_types: Array | None,
        dropout_rng: Array | None,
    ) -> tuple[Array, Context, Callable[[Array], Array] | None]:
        """What the stack is called with: the embedded tokens, what all layers see, and what follows layer 0."""
        padding, counted = self.config.padding_idx, positions is not None
        segment_ids, positions = row_layout(tokens, attention_mask, positions, segment_ids)
        if padding is not None and not counted:
            positions = jnp.cumsum(segment_ids > 0, axis=1, dtype=jnp.int32) - 1
        x = self.embed(tokens)
        if self.config.positions:
            rows = positions if padding is None else jnp.where(segment_ids > 0, positions + padding + 1, padding)
            x += self.position_embed(rows)
        if self.config.token_types:
            types = self.type_embed.embedding[...][0].astype(x.dtype) if token_types is None else self.type_embed(token_types)
            x += types
        shared = {"dropout_rng": dropout_rng, "dropout": self.dropout, "relative": self._relative()}
        context = make_context(self.config.layer_types, segment_ids, positions, causal=False, **shared)
        x = context.drop(self.embed_norm(x), 0, 3)
        return x, context, self._convolved(x, segment_ids, context) if self.config.convolution else None

    def _relative(self) -> Array | None:
        """The vectors of relative positions, (1, 2 * span, width), if there are any."""
        if self.config.block.relative is None:
            return None
        table = gathered(self.relative_embed[...], self.relative_embed.get_metadata().get(AXES))[None]
        return self.relative_norm(table) if self.config.relative_norm else table

    def _convolved(self, embedded: Array, segment_ids: Array, context: Context) -> Callable[[Array], Array]:
        """What makes layer 1's input of layer 0's output."""

        def add(x: Array) -> Array:
            near = context.drop(self.convolution(embedded, segment_ids), 0, 5)
            return self.convolution_norm(x + activation(self.config.convolution_activation, near))

        return add

    def pool(self, first: Array, rows: Rows | None = None) -> Array:
        """BERT's pooled output of the first tokens' hidden states, (n, width) -> (n, width); as they are without a pooler.

        Args:
            first: the hidden states.
            rows: where in the batch they are, if they were gathered.
        """
        return jnp.tanh(project(self.pooler, first, rows=rows)) if self.config.pooler else first
