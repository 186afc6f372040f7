"""The one causal decoder: embedding, a stack of blocks, a norm, the vocabulary projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from ..parallel.constraints import take_positions
from ..weights.provenance import Origin
from .block import Block, Context, make_context
from .cache import Cache, slots_for
from .layers import Array, BlockConfig, HeadShape, LayerType, embedding, linear, norm_of, row_layout
from .stack import Stack


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder of `depth` blocks over `vocab` tokens.

    Attributes:
        layer_types: what each layer's attention sees; a single type is that of all layers.
        tied: the projection to the vocabulary has the embedding's own weights.
        positions: how many learned position vectors are added to the embedding, or None for none.
        embed_scale: what embeddings are multiplied by.
        logit_scale: what logits are multiplied by.
        logit_softcap: logits l become softcap * tanh(l / softcap); None for l.
    """

    block: BlockConfig
    depth: int
    vocab: int
    layer_types: tuple[LayerType, ...]
    tied: bool
    positions: int | None = None
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def longest(self) -> int | None:
        """Tokens of the longest text there are learned positions for; None where any will do."""
        return self.positions


class Decoder(nnx.Module):
    """Tokens to next-token logits.

    Attributes:
        config: the shape it was built from.
        dropout: rate of the model's own dropout, in calls that are given `dropout_rng`.
        site_aliases: site path -> Hugging Face module path with `{i}` for the layer, so that those names work as targets.
        head_shapes: kind of head -> its shape, where the family has one of its own.
        origin: the checkpoint it was loaded from, if it was.
    """

    is_decoder = True

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        block = config.block
        self.embed = embedding(config.vocab, block.width, "vocab", dtype=block.dtype, rngs=rngs)
        if config.positions is not None:
            self.position_embed = embedding(config.positions, block.width, "positions", dtype=block.dtype, rngs=rngs)
        self.layers = Stack(lambda r: Block(block, rngs=r), config.depth, rngs=rngs)
        self.final_norm = norm_of(block, block.width, rngs=rngs)
        if not config.tied:
            self.lm_head = linear(block.width, config.vocab, ("embed", "vocab"), bias=False, dtype=block.dtype, rngs=rngs)
        self.config = nnx.static(config)
        self.dropout = 0.0
        self.site_aliases: tuple[tuple[str, str], ...] = nnx.static(())
        self.head_shapes: tuple[tuple[str, HeadShape], ...] = nnx.static(())
        self.origin: Origin | None = nnx.static(None)

    def __call__(
        self, tokens: Array, attention_mask: Array | None = None, positions: Array | None = None, segment_ids: Array | None = None
    ) -> Array:
        """Logits (batch, seq, vocab); the arguments are those of `hidden`."""
        return self.head(self.hidden(tokens, attention_mask, positions, segment_ids))

    def hidden(
        self,
        tokens: Array,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        *,
        gather: Array | None = None,
        dropout_rng: Array | None = None,
        trunk: Array | None = None,
    ) -> Array:
        """The last hidden states, after the final norm.

        Args:
            tokens: (batch, seq) int32.
            attention_mask: (batch, seq), 1 for real tokens; all are by default.
            positions: (batch, seq) int32; by default 0, 1, ... from the start of the row, whatever the mask, as transformers has it.
                Where positions are learned (GPT-2), or a window of positions is scaled, rows padded on the left want their own:
                those that count the mask's ones.
            segment_ids: (batch, seq) int32 for packed rows: 0 is padding, tokens see their own segment alone. Replaces the mask.
            gather: (n,) int32, positions of the flattened (batch * seq) to return; all by default.
            dropout_rng: PRNG key of the model's own dropout, at the rate `dropout`; nothing is dropped without it.
            trunk: (batch, seq, width), what `trunk` gave for the same rows; the layers below the cut are not run then.

        Returns:
            (batch, seq, width), or (n, width) with `gather`.
        """
        x, context = self._entering(tokens, attention_mask, positions, segment_ids, dropout_rng)
        # Leaving most of the top layer out pays only where few positions are wanted; else it is one more layer to compile.
        early = gather is not None and 2 * gather.shape[0] <= tokens.size
        x = self.layers(x, context, gather if early else None, trunk=trunk)
        return self.final_norm(x if early else take_positions(x, gather))

    def trunk(
        self,
        tokens: Array,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        *,
        dropout_rng: Array | None = None,
    ) -> Array:
        """(batch, seq, width): what enters the layers above the lowest cut of the stack; the arguments are those of `hidden`.

        Raises:
            ValueError: the stack is not cut.
        """
        return self.layers.below(*self._entering(tokens, attention_mask, positions, segment_ids, dropout_rng))

    def _entering(
        self, tokens: Array, attention_mask: Array | None, positions: Array | None, segment_ids: Array | None, dropout_rng: Array | None
    ) -> tuple[Array, Context]:
        """What the stack is called with: the embedded tokens, and what all layers see."""
        segment_ids, positions = row_layout(tokens, attention_mask, positions, segment_ids)
        context = make_context(self.config.layer_types, segment_ids, positions, causal=True, dropout_rng=dropout_rng, dropout=self.dropout)
        return context.drop(self.embedded(tokens, positions), 0, 3), context

    @property
    def borders(self) -> tuple[int, ...]:
        """Lengths, ascending: when the longest row of a batch grows past one, what a cache holds of it is to be computed anew."""
        found = {one.rotary.border for one in self.config.layer_types if one.rotary is not None}
        return tuple(sorted(border for border in found if border is not None))

    def empty_cache(self, rows: int, length: int) -> Cache:
        """Room for the keys and values of `rows` rows of up to `length` tokens, padding included; nothing is in it yet."""
        block = self.config.block
        slots, rolling = slots_for(self.config.layer_types, length)
        layers = [segment.stop - segment.start for segment in self.layers.segments]
        return Cache.empty(layers, (rows, block.kv_heads, slots, block.head_dim), block.dtype, rolling=rolling)

    def prefill(self, tokens: Array, attention_mask: Array, length: int) -> tuple[Array, Cache]:
        """Reads prompts, (rows, length) int32 padded on the left.

        Args:
            tokens, attention_mask: of the prompts.
            length: how long a row may become, padding included.

        Returns:
            the last hidden states of the prompts' last tokens, (rows, width), and the cache.
        """
        hidden, cache = self.extend(self.empty_cache(tokens.shape[0], length), tokens, attention_mask, first=True)
        return hidden[:, -1], cache

    def extend(self, cache: Cache, tokens: Array, attention_mask: Array | None = None, *, first: bool = False) -> tuple[Array, Cache]:
        """Goes on after the tokens that a cache holds.

        Each row's positions count its own real tokens, so that padding on the left changes nothing. What the cache holds is taken as
        it is: where rows grow past one of the `borders`, start with an empty one and all their tokens.

        Args:
            cache: of `empty_cache` or an earlier call.
            tokens: (rows, length) int32, the tokens that come next.
            attention_mask: (rows, length), 1 for real tokens; all are by default.
            first: that the cache is empty, so that nothing of it need be read.

        Returns:
            the last hidden states after the final norm, (rows, length, width), and the cache with these tokens.

        Raises:
            ValueError: several tokens for a rolling cache that is not empty: the first ones' keys would be written over too early.
        """
        length = tokens.shape[1]
        if cache.rolling and length > 1 and not first:
            raise ValueError("a rolling cache takes one token at a time after its first ones")
        mask = jnp.ones_like(tokens) if attention_mask is None else attention_mask.astype(jnp.int32)
        positions, grown = cache.positions(mask), cache.grown(mask)
        context = make_context(self.config.layer_types, mask, positions, causal=True, cache=None if first else grown)
        x, kept = self.layers.extend(self.embedded(tokens, positions), context, cache, first=first)
        return self.final_norm(x), grown.with_kept(kept)

    def embedded(self, tokens: Array, positions: Array) -> Array:
        """The input of layer 0, (batch, seq, width), of tokens at positions, (batch, seq) int32 each."""
        x = self.embed(tokens)
        if self.config.embed_scale != 1.0:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        return x if self.config.positions is None else x + self.position_embed(positions)

    def head(self, hidden: Array) -> Array:
        """Logits (..., vocab) of hidden states (..., width)."""
        return self.readout()(hidden)

    def readout(self) -> Callable[[Array], Array]:
        """`head` with its weights at hand: on a mesh, gathered when this is called and not each time that is called."""
        project = self._projection()
        scale, cap = self.config.logit_scale, self.config.logit_softcap

        def logits(hidden: Array) -> Array:
            out = project(hidden)
            out = out if scale == 1.0 else out * scale
            return out if cap is None else cap * jnp.tanh(out / cap)

        return logits

    def _projection(self) -> Callable[[Array], Array]:
        return self.embed.projection() if self.config.tied else self.lm_head

    def untie(self) -> None:
        """Gives a tied projection weights of its own, equal to the embedding's: from here on the two may differ."""
        block = self.config.block
        self.lm_head = linear(block.width, self.config.vocab, ("embed", "vocab"), bias=False, dtype=block.dtype, rngs=nnx.Rngs(0))
        self.lm_head.kernel[...] = self.embed.embedding[...].T
        self.config = nnx.static(dataclasses.replace(self.config, tied=False))
