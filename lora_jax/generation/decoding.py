"""Decoding with a KV cache: prompts to further tokens, compiled once for each shape.

Prompts are padded on the left to a length from a short list, and so is what may follow, so that few shapes occur. Each shape has two
programs. Prefill runs the prompts and chooses the first token. Decode goes on until every row has ended or has as many tokens as were
asked for; that number is data, so a stream calls the same program for each token. All models of one structure share programs. Members of
a pack are decoded by one program under `vmap`: their adapters differ, the base is one.

Rotary frequencies may change with the length of the rows (`Decoder.borders`: longrope, as Phi-3 has it). Keys cached before the border
are then rotated by the wrong frequencies. The step that takes the longest row past a border therefore runs all rows so far again, as if
they were prompts (a third program, for these models alone). The longest row of the batch decides for all rows, padding not counted, as
in transformers: rotary positions go by the largest one of a batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..models.cache import Cache, slots_for
from ..models.encoder_decoder import EncoderDecoder, Generative
from ..parallel.mesh import to_host
from ..parallel.program import TraceCounter
from .arrays import SliceCache, arrays_of, on_devices, on_one_cpu, unstacked
from .sampling import Sampling, SamplingParams, choose
from .special import Forced, stop_tokens

Array = jax.Array

# Prompts, what may follow, and both together are padded to one of these, and beyond the last to a multiple of it.
LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodingState:
    """State of a batch that is being decoded. With members, all arrays but `cache.length` and `count` have them in front.

    Attributes:
        cache: of all tokens but the last one chosen.
        tokens: (rows, room) int32, the tokens chosen so far; padding after a row's end.
        done: (rows,) bool, rows that have ended.
        count: () int32, tokens chosen so far.
    """

    cache: Cache
    tokens: Array
    done: Array
    count: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodingParams:
    """How tokens are chosen and when a row ends; traced data.

    Attributes:
        sampling: of `Sampling.params`.
        seeds: (rows,) uint32.
        stop: (n,) int32, tokens that end a row; -1 is none.
        pad: () int32, what follows in a row that has ended.
        forced: of an encoder-decoder; else None.
    """

    sampling: SamplingParams
    seeds: Array
    stop: Array
    pad: Array
    forced: Forced | None = None


class Programs:
    """The compiled programs of models of one structure.

    Args:
        prefill: structure of the model that runs prompts.
        decode: structure of the model that runs one token after the other.
        layers: how many layers each segment of the latter has.
        members: whether arrays have members in front.

    Attributes:
        prefill, decode, recompute: `count` says how often each was traced: once for each shape and method.
    """

    def __init__(self, prefill: nnx.GraphDef[Any], decode: nnx.GraphDef[Any], layers: tuple[int, ...], members: bool):
        self._prefill_def, self._decode_def, self._layers, self._members = prefill, decode, layers, members
        self.prefill, self.decode, self.recompute = (TraceCounter(f) for f in (self._prefill, self._decode, self._recompute))
        self.start = jax.jit(self.prefill, static_argnums=(5, 6, 7))
        self.advance = jax.jit(self.decode, static_argnums=5, donate_argnums=2)
        # The old cache is not read; it is an argument so that the new one reuses its buffers.
        self.run_again = jax.jit(self.recompute, static_argnums=(6, 7, 8), donate_argnums=2, keep_unused=True)

    def _prefill(
        self, own: Any, shared: Any, tokens: Array, mask: Array, params: DecodingParams, method: str, room: int, total: int
    ) -> DecodingState:
        """Runs prompts, (rows, length) int32 padded on the left, and chooses the token after each; see `Decoding.start`."""
        rows = tokens.shape[0]

        def run(own: Any) -> DecodingState:
            cache, logits = self._run_rows(own, shared, tokens, mask, total, params.forced)
            blank = jnp.full((rows, room), params.pad, jnp.int32)
            nothing = DecodingState(cache, blank, jnp.zeros(rows, bool), jnp.int32(0))
            return append_token(nothing, cache, logits, params, method)

        if not self._members:
            return run(own)
        layer_types = nnx.eval_shape(lambda: nnx.merge(self._prefill_def, jax.tree.map(lambda a: a[0], own), shared)).config.layer_types
        return jax.vmap(run, out_axes=_member_axes(slots_for(layer_types, total)[1]))(own)

    def _recompute(
        self,
        own: Any,
        shared: Any,
        decoded: DecodingState,
        tokens: Array,
        mask: Array,
        params: DecodingParams,
        method: str,
        length: int,
        total: int,
    ) -> DecodingState:
        """Runs the rows so far, the longest of which has `length` tokens, and chooses the next token; see `Decoding.recompute`."""

        def run(own: Any, decoded: DecodingState) -> DecodingState:
            rows = jnp.concatenate([tokens, decoded.tokens], axis=1)
            real = jnp.concatenate([mask, jnp.ones_like(decoded.tokens)], axis=1)
            start = tokens.shape[1] + decoded.count - length
            rows, real = (jax.lax.dynamic_slice_in_dim(a, start, length, axis=1) for a in (rows, real))
            return append_token(decoded, *self._run_rows(own, shared, rows, real, total, None), params, method)

        if self._members:
            lanes = _member_axes(decoded.cache.rolling)
            run = jax.vmap(run, in_axes=(0, lanes), out_axes=lanes)
        return run(own, decoded)

    def _run_rows(self, own: Any, shared: Any, tokens: Array, mask: Array, total: int, forced: Forced | None) -> tuple[Cache, Array]:
        """The cache of rows, (rows, length) int32 padded on the left, and the logits after each, (rows, vocab)."""
        model: Generative = nnx.merge(self._prefill_def, own, shared)
        hidden, cache = prefilled(model, tokens, mask, total, forced)
        return cache.regrouped(self._layers), model.head(hidden)

    def _decode(self, own: Any, shared: Any, decoded: DecodingState, params: DecodingParams, upto: Array, method: str) -> DecodingState:
        """Goes on until there are `upto` tokens, or all rows have ended. What `decoded` holds is used up."""

        def step(own: Any, decoded: DecodingState) -> DecodingState:
            model: Generative = nnx.merge(self._decode_def, own, shared)
            last = jax.lax.dynamic_slice_in_dim(decoded.tokens, decoded.count - 1, 1, axis=1)
            hidden, cache = model.extend(decoded.cache, last)
            return append_token(decoded, cache, model.head(hidden[:, 0]), params, method)

        if self._members:
            # Inside of the loop: a loop of a lane each would have to copy the lanes that have ended.
            lanes = _member_axes(decoded.cache.rolling)
            step = jax.vmap(step, in_axes=(0, lanes), out_axes=lanes)
        return jax.lax.while_loop(lambda d: (d.count < upto) & ~jnp.all(d.done), lambda d: step(own, d), decoded)


def prefilled(model: Generative, tokens: Array, mask: Array, total: int, forced: Forced | None) -> tuple[Array, Cache]:
    """Runs prompts, or reads sources and the token that their targets begin with; arguments as for `Decoding.start`.

    Returns:
        the last hidden states, (rows, width), and the cache.
    """
    if not isinstance(model, EncoderDecoder):
        return model.prefill(tokens, mask, total)
    assert forced is not None
    return model.prefill(tokens, mask, total, jnp.broadcast_to(forced.start, tokens.shape[:1]))


def continued(model: Generative, tokens: Array, mask: Array, params: DecodingParams, method: str, room: int) -> Array:
    """The tokens after prompts, (rows, room) int32, `params.pad` after a row's end: for programs that somebody else compiles.

    Under `vmap` all lanes go on until the last one's rows have ended: none is copied for having ended before.

    Args:
        model: none of whose `borders` is within a row's length.
        tokens, mask, params, method, room: as for `Decoding.start`.
    """
    hidden, cache = prefilled(model, tokens, mask, tokens.shape[1] + room, params.forced)
    rows = tokens.shape[0]
    blank = DecodingState(cache, jnp.full((rows, room), params.pad, jnp.int32), jnp.zeros(rows, bool), jnp.int32(0))

    def step(decoded: DecodingState) -> DecodingState:
        last = jax.lax.dynamic_slice_in_dim(decoded.tokens, decoded.count - 1, 1, axis=1)
        hidden, cache = model.extend(decoded.cache, last)
        return append_token(decoded, cache, model.head(hidden[:, 0]), params, method)

    first = append_token(blank, cache, model.head(hidden), params, method)
    return jax.lax.while_loop(lambda d: (d.count < room) & _any(~d.done), step, first).tokens


def completions(
    model: Generative, tokens: Array, mask: Array, seeds: Array, tokenizer: Any, *, temperature: float, top_p: float | None, room: int
) -> tuple[Array, Array]:
    """What follows prompts, and what of it belongs to them: `continued`, with the model's own ends and numbers of the tokenizer.

    Args:
        model, tokens, mask, room: as for `continued`.
        seeds: (rows,) uint32.
        tokenizer: says, beside the model, what ends a text, and pads.
        temperature, top_p: of `Sampling`; static.

    Returns:
        (rows, room) int32 tokens, and (rows, room) bool: those up to the one that ends the text, and that one.
    """
    sampling = Sampling(temperature, top_p=top_p)
    stop = jnp.asarray(stop_tokens(model, tokenizer) or [-1], jnp.int32)
    pad = jnp.int32(tokenizer.pad_token_id or 0)
    params = DecodingParams(sampling.params(model.config.vocab), seeds, stop, pad)
    new = continued(model, tokens, mask, params, sampling.method, room)
    ends = jnp.isin(new, stop)
    real = jnp.cumsum(ends, axis=1) - ends == 0
    return jnp.where(real, new, pad), real


@jax.custom_batching.custom_vmap
def _any(going: Array) -> Array:
    """Whether any row goes on; under `vmap` of any lane, so that the lanes' loop has one condition."""
    return jnp.any(going)


@_any.def_vmap
def _any_of_lanes(size: int, batched: Any, going: Array) -> tuple[Array, bool]:
    return _any(going), False


def append_token(decoded: DecodingState, cache: Cache, logits: Array, params: DecodingParams, method: str) -> DecodingState:
    """Chooses the next token of each row, from logits (rows, vocab), unless it has ended."""
    chosen = choose(method, logits, params.sampling, params.seeds, decoded.count)
    if params.forced is not None:
        forced = params.forced.at(decoded.count)
        chosen = jnp.where(forced >= 0, forced, chosen)
    chosen = jnp.where(decoded.done, params.pad, chosen)
    tokens = jax.lax.dynamic_update_slice_in_dim(decoded.tokens, chosen[:, None], decoded.count, axis=1)
    return DecodingState(cache, tokens, decoded.done | jnp.isin(chosen, params.stop), decoded.count + 1)


def _member_axes(rolling: bool) -> DecodingState:
    """Which axis of each array of a `DecodingState` counts members."""
    lanes: Any = {"tokens": 0, "done": 0, "count": None}
    return DecodingState(member_axes(rolling), **lanes)


def member_axes(rolling: bool) -> Cache:
    """Which axis of each array of a cache counts members."""
    axes: Any = {"keys": 0, "values": 0, "real": 0, "length": None, "counts": 0, "source": 0, "source_real": 0}
    return Cache(**axes, rolling=rolling)


@functools.lru_cache(maxsize=16)
def programs_for(prefill: nnx.GraphDef[Any], decode: nnx.GraphDef[Any], layers: tuple[int, ...], members: bool) -> Programs:
    """The programs of these structures: the same for equal ones, so that nothing is compiled again for another model."""
    return Programs(prefill, decode, layers, members)


class Decoding:
    """A model, or several of one structure, with their compiled programs.

    Args:
        models: decoders or encoder-decoders, with adapters or without. Several share one program: what they have in common (by
            identity of the arrays) is there once.

    Attributes:
        borders: `Decoder.borders` of the models.
        layer_types: of the models' configs.
    """

    def __init__(self, models: Sequence[Generative]):
        views, self.members = SliceCache(), len(models) if len(models) > 1 else None
        models = [nnx.view(on_devices(m), raise_if_not_found=False, deterministic=True) for m in models]
        self.prefill_arrays = self.decode_arrays = arrays_of(models)
        self.borders, self.layer_types = models[0].borders, models[0].config.layer_types
        if all(on_one_cpu(m) for m in models):
            self.decode_arrays = arrays_of([unstacked(m, views) for m in models])
        self.programs = programs_for(
            self.prefill_arrays.graphdef, self.decode_arrays.graphdef, self.decode_arrays.layers, self.members is not None
        )

    def start(self, tokens: Any, mask: Any, params: DecodingParams, method: str, room: int, total: int) -> DecodingState:
        """Runs prompts and chooses the first token after each.

        Args:
            tokens, mask: (rows, length) int32, padded on the left; an encoder-decoder's sources, padded on the right.
            method: of `Sampling`.
            room: how many tokens may follow.
            total: how long a row may become, prompt and all; of an encoder-decoder how long its target may.
        """
        return self.programs.start(self.prefill_arrays.own, self.prefill_arrays.shared, tokens, mask, params, method, room, total)

    def advance(self, decoded: DecodingState, params: DecodingParams, upto: int, method: str) -> DecodingState:
        """Goes on until there are `upto` tokens, or all rows have ended; `decoded` is used up."""
        return self.programs.advance(self.decode_arrays.own, self.decode_arrays.shared, decoded, params, jnp.int32(upto), method)

    def recompute(
        self, decoded: DecodingState, tokens: Any, mask: Any, params: DecodingParams, method: str, length: int, total: int
    ) -> DecodingState:
        """Runs prompts and all tokens that followed, and chooses the next token; `decoded` is used up.

        Args:
            tokens, mask, params, method, total: as for `start`.
            length: how many tokens the longest row has by now, without padding.
        """
        return self.programs.run_again(
            self.prefill_arrays.own, self.prefill_arrays.shared, decoded, tokens, mask, params, method, length, total
        )


def padded_length(length: int) -> int:
    """The smallest of the lengths that shapes have (`LENGTHS`) that is no shorter."""
    last = LENGTHS[-1]
    return next((n for n in LENGTHS if n >= length), -(-length // last) * last)


class Continuation:
    """A batch of prompts and the tokens that follow.

    Args:
        decoding: of the models.
        tokens, mask, params, method, room, total: of `Decoding.start`; the mask as NumPy array.
    """

    def __init__(
        self, decoding: Decoding, tokens: np.ndarray, mask: np.ndarray, params: DecodingParams, method: str, room: int, total: int
    ):
        self._decoding, self._tokens, self._mask = decoding, tokens, mask
        self._params, self._method, self._total = params, method, total
        self._longest = int(mask.sum(1).max())
        self._ahead = [border for border in decoding.borders if border >= self._longest]
        self._decoded = decoding.start(tokens, mask, params, method, room, total)

    @property
    def tokens(self) -> np.ndarray:
        """The new tokens so far, (rows, room) int32, with members (members, rows, room); padding beyond."""
        return to_host(self._decoded.tokens)

    @property
    def ended(self) -> bool:
        """Whether all rows have ended, of all members."""
        return bool(np.all(to_host(self._decoded.done)))

    def advance(self, count: int) -> None:
        """Goes on until there are `count` new tokens, or all rows have ended."""
        # The last of the new tokens has no key yet: so many tokens after the longest prompt fill the cache up to a border.
        while self._ahead and (full := self._ahead[0] - self._longest + 1) < count:
            self._to(full)
            if self.ended:
                return
            length = self._ahead.pop(0) + 1
            self._decoded = self._decoding.recompute(
                self._decoded, self._tokens, self._mask, self._params, self._method, length, self._total
            )
        self._to(count)

    def _to(self, count: int) -> None:
        self._decoded = self._decoding.advance(self._decoded, self._params, count, self._method)
