"""The one bidirectional encoder (BERT family): embeddings, a stack of blocks, an optional pooler."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from .layers import Array, Block, BlockConfig, Context, embedding, linear, norm, row_layout, segment_mask
from .stack import Stack


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """An encoder: `depth` blocks over `vocab` tokens, at most `positions` long; `pooler` is BERT's tanh layer on the first token."""

    block: BlockConfig
    depth: int
    vocab: int
    positions: int
    token_types: int
    pooler: bool


class Encoder(nnx.Module):
    """Tokens to hidden states.

    Attributes:
        config: the shape it was built from.
        dropout: rate of the model's own dropout, in calls that are given `noise`.
        site_aliases: site path -> Hugging Face module path with `{i}` for the layer, so that those names work as targets.
    """

    is_decoder = False

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        block = config.block
        self.embed = embedding(config.vocab, block.width, "vocab", dtype=block.dtype, rngs=rngs)
        self.position_embed = embedding(config.positions, block.width, "positions", dtype=block.dtype, rngs=rngs)
        self.type_embed = embedding(config.token_types, block.width, "positions", dtype=block.dtype, rngs=rngs)
        self.embed_norm = norm(block.norm, block.width, block.norm_eps, dtype=block.dtype, rngs=rngs)
        self.layers = Stack(lambda r: Block(block, rngs=r), config.depth, rngs=rngs)
        if config.pooler:
            self.pooler = linear(block.width, block.width, ("embed", "embed_out"), bias=True, dtype=block.dtype, rngs=rngs)
        self.config = nnx.static(config)
        self.dropout = 0.0
        self.site_aliases: tuple[tuple[str, str], ...] = nnx.static(())

    def __call__(
        self,
        tokens: Array,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        *,
        gather: Array | None = None,
        noise: Array | None = None,
    ) -> Array:
        """The last hidden states.

        Args:
            tokens: (batch, seq) int32.
            attention_mask: (batch, seq), 1 for real tokens; all are by default.
            positions: (batch, seq) int32; 0, 1, ... by default.
            segment_ids: (batch, seq) int32 for packed rows: 0 is padding, tokens see their own segment alone. Replaces the mask.
            gather: (n,) int32, positions of the flattened (batch * seq) to return; all by default.
            noise: PRNG key of the model's own dropout, at the rate `dropout`; nothing is dropped without it.

        Returns:
            (batch, seq, width), or (n, width) with `gather`.
        """
        segment_ids, positions = row_layout(tokens, attention_mask, positions, segment_ids)
        bidirectional = segment_mask(segment_ids, causal=False)
        x = self.embed(tokens) + self.position_embed(positions) + self.type_embed.embedding[...][0].astype(self.config.block.dtype)
        context = Context(bidirectional, None, noise, self.dropout)
        return self.layers(context.drop(self.embed_norm(x), 0, 3), context, gather)

    def pool(self, first: Array) -> Array:
        """BERT's pooled output of the first tokens' hidden states, (n, width) -> (n, width); as they are without a pooler."""
        return jnp.tanh(self.pooler(first)) if self.config.pooler else first
