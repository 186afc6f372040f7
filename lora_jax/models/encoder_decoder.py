"""The encoder-decoder: a stack that reads a source, and one that predicts the target's next token and also attends to what the first found.

Both are stacks of the same blocks as every other model's; the decoder's have a second attention, whose keys and values are those of the
encoder's output (`BlockConfig.cross`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..parallel.constraints import gathered, take_positions
from ..weights.provenance import Origin
from .block import Block, Context, make_context
from .cache import Cache
from .decoder import Decoder
from .encoder import Encoder
from .layers import AXES, Array, BlockConfig, HeadShape, LayerType, embedding, linear, norm_of, row_layout
from .positions import Buckets, sinusoids
from .stack import Stack
from .vision import VisionBase


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """An encoder of `encoder_depth` blocks and a decoder of `depth` over `vocab` tokens.

    Attributes:
        encoder, block: a layer of the encoder, and of the decoder, whose `cross` is set.
        tied: the projection to the vocabulary has the embedding's own weights.
        start: the token that stands before every target; None: each target's own last one (mBART's code of the language).
        source_vocab: rows of the encoder's own embedding; None: it has the decoder's.
        positions: rows of each stack's table of positions; 0 where there is none.
        first_position: the row of the first position.
        sinusoidal: whether the positions are sines and cosines, from a table that never trains or, without one, computed; else they are
            learned.
        longest: tokens of the longest source and target there are positions for; None where any will do.
        buckets: of distances, for which each stack has a table of numbers to add to the scores of its heads; None for none.
        embed_scale: what embeddings are multiplied by.
        embed_norm: whether a norm follows the embeddings.
        final_norm: whether a norm follows each stack.
        logit_scale: what logits are multiplied by.
        logit_bias: whether a bias, which never trains, is added to the logits.
    """

    encoder: BlockConfig
    block: BlockConfig
    encoder_depth: int
    depth: int
    vocab: int
    tied: bool
    start: int | None
    source_vocab: int | None = None
    positions: int = 0
    first_position: int = 0
    sinusoidal: bool = False
    longest: int | None = None
    buckets: tuple[int, int] | None = None
    embed_scale: float = 1.0
    embed_norm: bool = False
    final_norm: bool = False
    logit_scale: float = 1.0
    logit_bias: bool = False

    # What every layer of either stack sees: no windows, and no rotary positions.
    layer_types = (LayerType(),)


class Half(nnx.Module):
    """The encoder or the decoder: a stack of layers, with what is added to the embeddings below it and the norm above it."""

    def __init__(self, config: EncoderDecoderConfig, *, decoder: bool, rngs: nnx.Rngs):
        block = config.block if decoder else config.encoder
        depth = config.depth if decoder else config.encoder_depth
        if config.positions and config.sinusoidal:
            self.position_table = nnx.Variable(jnp.zeros((config.positions, block.width), block.dtype))
            self.position_table.set_metadata(AXES, ("positions", "embed"))
        elif config.positions:
            self.position_embed = embedding(config.positions, block.width, "positions", dtype=block.dtype, rngs=rngs)
        if config.embed_norm:
            self.embed_norm = norm_of(block, block.width, rngs=rngs)
        if config.buckets is not None:
            # No module with an adapter's site: its numbers are looked up by distances, not by tokens.
            numbers = block.width**-0.5 * jax.random.normal(rngs.params(), (config.buckets[0], block.heads), block.dtype)
            self.distance_embed = nnx.Param(numbers)
            self.distance_embed.set_metadata(AXES, ("positions", "heads"))
        self.layers = Stack(lambda r: Block(block, rngs=r), depth, rngs=rngs)
        if config.final_norm:
            self.final_norm = norm_of(block, block.width, rngs=rngs)
        self.config = nnx.static(config)
        self.decoder = decoder

    def entering(self, embedded: Array, positions: Array) -> Array:
        """The input of layer 0 before dropout: (rows, length, width) -> the same, of tokens at positions, (rows, length) int32."""
        config = self.config
        x = embedded
        if config.embed_scale != 1.0:
            x = x * jnp.asarray(config.embed_scale, x.dtype)
        if config.sinusoidal and config.positions:
            x = x + self.position_table[...][positions]
        elif config.sinusoidal:
            assert config.longest is not None
            x = x + jnp.asarray(sinusoids(config.longest, x.shape[-1]), x.dtype)[positions]
        elif config.positions:
            x = x + self.position_embed(positions + config.first_position)
        return self.embed_norm(x) if config.embed_norm else x

    def bias(self, queries: int, cache: Cache | None = None) -> Array | None:
        """(1, heads, queries, keys) float32: what is added to the scores of a row's tokens; None where nothing is.

        Args:
            queries: tokens of a row.
            cache: that the keys are read from, these tokens' among them; None: they are the tokens' own.
        """
        if self.config.buckets is None:
            return None
        table = gathered(self.distance_embed[...], self.distance_embed.get_metadata().get(AXES)).astype(jnp.float32)
        buckets = Buckets(*self.config.buckets, causal=self.decoder)
        if cache is None:
            place = np.arange(queries)
            numbers = table[buckets.of(place[:, None] - place[None, :])]
        else:
            distance = (cache.length - queries + jnp.arange(queries))[:, None] - jnp.arange(cache.slots)
            numbers = table[buckets.of(np.arange(cache.slots))][jnp.maximum(distance, 0)]
        return jnp.moveaxis(numbers, -1, 0)[None]

    def leaving(self, x: Array) -> Array:
        """The last hidden states, of the last layer's output."""
        return self.final_norm(x) if self.config.final_norm else x


class EncoderDecoder(nnx.Module):
    """Source tokens and target tokens to logits of the target's next tokens.

    Attributes:
        config: the shape it was built from.
        dropout: rate of the model's own dropout, in calls that are given `dropout_rng`.
        site_aliases: site path -> Hugging Face module path with `{i}` for the layer, so that those names work as targets.
        head_shapes: none: families say none here.
        origin: the checkpoint it was loaded from, if it was.
    """

    is_decoder = False

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs):
        block = config.block
        self.embed = embedding(config.vocab, block.width, "vocab", dtype=block.dtype, rngs=rngs)
        if config.source_vocab is not None:
            self.source_embed = embedding(config.source_vocab, block.width, "vocab", dtype=block.dtype, rngs=rngs)
        self.encoder = Half(config, decoder=False, rngs=rngs)
        self.decoder = Half(config, decoder=True, rngs=rngs)
        if not config.tied:
            self.lm_head = linear(block.width, config.vocab, ("embed", "vocab"), bias=False, dtype=block.dtype, rngs=rngs)
        if config.logit_bias:
            # To transformers it is a buffer: whatever trains, it stays.
            self.logit_bias = nnx.Variable(jnp.zeros((1, config.vocab), block.dtype))
            self.logit_bias.set_metadata(AXES, (None, "vocab"))
        self.config = nnx.static(config)
        self.dropout = 0.0
        self.site_aliases: tuple[tuple[str, str], ...] = nnx.static(())
        self.head_shapes: tuple[tuple[str, HeadShape], ...] = nnx.static(())
        self.origin: Origin | None = nnx.static(None)

    @property
    def layers(self) -> Stack:
        """The decoder's: those whose keys and values a cache holds."""
        return self.decoder.layers

    def __call__(
        self,
        tokens: Array,
        decoder_tokens: Array,
        attention_mask: Array | None = None,
        decoder_attention_mask: Array | None = None,
    ) -> Array:
        """Logits (batch, target seq, vocab); the arguments are those of `hidden`."""
        masks = {"attention_mask": attention_mask, "decoder_attention_mask": decoder_attention_mask}
        return self.head(self.hidden(tokens, decoder_tokens=decoder_tokens, **masks))

    def hidden(
        self,
        tokens: Array,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        *,
        decoder_tokens: Array,
        decoder_attention_mask: Array | None = None,
        decoder_positions: Array | None = None,
        decoder_segment_ids: Array | None = None,
        gather: Array | None = None,
        dropout_rng: Array | None = None,
        trunk: Array | None = None,
    ) -> Array:
        """The decoder's last hidden states.

        Args:
            tokens: (batch, seq) int32, the sources.
            attention_mask: (batch, seq), 1 for real tokens; all are by default.
            positions: (batch, seq) int32; by default 0, 1, ... from the start of the row, whatever the mask, as transformers has it.
            segment_ids: (batch, seq) int32 for packed rows: 0 is padding, tokens see their own segment alone. Replaces the mask.
            decoder_tokens, decoder_attention_mask, decoder_positions, decoder_segment_ids: the same of the targets, (batch, target seq),
                each behind the token that stands before it. A target sees the source of its row with the same segment id.
            gather: (n,) int32, positions of the flattened (batch * target seq) to return; all by default.
            dropout_rng: PRNG key of the model's own dropout, at the rate `dropout`; nothing is dropped without it.
            trunk: (batch, seq, width), what `trunk` gave for the same sources; what it computes is not computed then.

        Returns:
            (batch, target seq, width), or (n, width) with `gather`.
        """
        segment_ids, positions = row_layout(tokens, attention_mask, positions, segment_ids)
        source = self._encoded(tokens, positions, segment_ids, dropout_rng, trunk)
        own, places = row_layout(decoder_tokens, decoder_attention_mask, decoder_positions, decoder_segment_ids)
        seen = {"source": source, "source_mask": (own[:, :, None] == segment_ids[:, None, :])[:, None]}
        context = self._context(self.decoder, own, places, dropout_rng, bias=self.decoder.bias(own.shape[1]), **seen)
        x = context.drop(self.decoder.entering(self.embed(decoder_tokens), places), 0, 3)
        # Nearly every token of a target is predicted: the top layer is not narrowed to some.
        return self.decoder.leaving(take_positions(self.decoder.layers(x, context), gather))

    def trunk(
        self,
        tokens: Array,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        *,
        dropout_rng: Array | None = None,
        **_: Any,
    ) -> Array:
        """(batch, seq, width): what enters the encoder's layers above their lowest cut; the encoder's output where it has no cut.

        The arguments are those of `hidden`; what is said of targets changes nothing.
        """
        segment_ids, positions = row_layout(tokens, attention_mask, positions, segment_ids)
        x, context = self._entering_encoder(tokens, positions, segment_ids, dropout_rng)
        stack = self.encoder.layers
        return stack.below(x, context) if len(stack.segments) > 1 else self.encoder.leaving(stack(x, context))

    @property
    def trunk_depth(self) -> int:
        """How many of the encoder's layers `trunk` runs."""
        return self.encoder.layers.segments[0].stop

    def _encoded(
        self, tokens: Array, positions: Array, segment_ids: Array, dropout_rng: Array | None = None, trunk: Array | None = None
    ) -> Array:
        """(batch, seq, width): the encoder's output."""
        stack = self.encoder.layers
        if trunk is not None and len(stack.segments) == 1:
            return trunk
        x, context = self._entering_encoder(tokens, positions, segment_ids, dropout_rng)
        return self.encoder.leaving(stack(x, context, trunk=trunk))

    def _entering_encoder(self, tokens: Array, positions: Array, segment_ids: Array, dropout_rng: Array | None) -> tuple[Array, Context]:
        own = self.embed if self.config.source_vocab is None else self.source_embed
        context = self._context(self.encoder, segment_ids, positions, dropout_rng, bias=self.encoder.bias(tokens.shape[1]))
        return context.drop(self.encoder.entering(own(tokens), positions), 0, 3), context

    def _context(self, half: Half, segment_ids: Array, positions: Array, dropout_rng: Array | None = None, **seen: Any) -> Context:
        # Layer for layer, the two stacks drop by keys of their own.
        key = None if dropout_rng is None else jax.random.fold_in(dropout_rng, int(half.decoder))
        options = {"causal": half.decoder, "dropout_rng": key, "dropout": self.dropout}
        return make_context(self.config.layer_types, segment_ids, positions, **options, **seen)

    @property
    def borders(self) -> tuple[int, ...]:
        """None: no positions change with a row's length (`Decoder.borders`)."""
        return ()

    def prefill(self, tokens: Array, attention_mask: Array, length: int, start: Array) -> tuple[Array, Cache]:
        """Reads sources and the token before each target.

        Args:
            tokens, attention_mask: (rows, source length) int32.
            length: tokens of a target that the cache has room for, the one before it among them.
            start: (rows,) int32, that token.

        Returns:
            the last hidden states after it, (rows, width), and the cache.
        """
        segment_ids, positions = row_layout(tokens, attention_mask, None, None)
        source, block = self._encoded(tokens, positions, segment_ids), self.config.block
        layers = [segment.stop - segment.start for segment in self.decoder.layers.segments]
        shape = (tokens.shape[0], block.kv_heads, length, block.head_dim)
        cache = Cache.empty(layers, shape, block.dtype, source_real=attention_mask > 0)
        hidden, cache = self.extend(cache, start[:, None], first=True, source=source)
        return hidden[:, -1], cache

    def extend(self, cache: Cache, tokens: Array, *, first: bool = False, source: Array | None = None) -> tuple[Array, Cache]:
        """Goes on after the targets' tokens that a cache holds.

        Args:
            cache: of `prefill` or an earlier call.
            tokens: (rows, length) int32, the tokens that come next.
            first: that the cache is empty, so that nothing of it need be read.
            source: (rows, source length, width), the encoder's output, with `first`.

        Returns:
            the last hidden states, (rows, length, width), and the cache with these tokens.
        """
        mask = jnp.ones_like(tokens)
        positions, grown = cache.positions(mask), cache.grown(mask)
        known = None if first else grown
        assert cache.source_real is not None
        real = jnp.broadcast_to(cache.source_real[:, None, None, :], (tokens.shape[0], 1, tokens.shape[1], cache.source_real.shape[1]))
        seen = {"bias": self.decoder.bias(tokens.shape[1], known), "source": source, "source_mask": real, "cache": known}
        context = self._context(self.decoder, mask, positions, **seen)
        x = self.decoder.entering(self.embed(tokens), positions)
        x, kept = self.decoder.layers.extend(x, context, cache, first=first)
        return self.decoder.leaving(x), grown.with_kept(kept)

    def head(self, hidden: Array) -> Array:
        """Logits (..., vocab) of hidden states (..., width)."""
        return self.readout()(hidden)

    def readout(self) -> Callable[[Array], Array]:
        """`head` with its weights at hand: on a mesh, gathered when this is called and not each time that is called."""
        config = self.config
        project = self.embed.projection() if config.tied else self.lm_head
        bias = self.logit_bias[...] if config.logit_bias else None

        def logits(hidden: Array) -> Array:
            # The hidden states are scaled, as T5 does it, and not the logits.
            x = hidden if config.logit_scale == 1.0 else hidden * jnp.asarray(config.logit_scale, hidden.dtype)
            out = project(x)
            return out if bias is None else out + bias.reshape(-1)

        return logits

    def untie(self) -> None:
        """Gives a tied projection weights of its own, equal to the embedding's: from here on the two may differ."""
        block = self.config.block
        self.lm_head = linear(block.width, self.config.vocab, ("embed", "vocab"), bias=False, dtype=block.dtype, rngs=nnx.Rngs(0))
        self.lm_head.kernel[...] = self.embed.embedding[...].T
        self.config = nnx.static(dataclasses.replace(self.config, tied=False))


def sees_targets(path: Sequence[Any]) -> bool:
    """Whether a module of an encoder-decoder is given the targets' tokens: those of the decoder, but for what projects the source."""
    return "decoder" in path and not ("cross_attn" in path and path[-1] in ("k_proj", "v_proj"))


# A pretrained model, and one that predicts tokens.
TextBase = Encoder | Decoder | EncoderDecoder
Base = TextBase | VisionBase
Generative = Decoder | EncoderDecoder
