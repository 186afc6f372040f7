"""Decoding with a KV cache: prompts to further tokens, compiled once for each shape.

Prompts are padded on the left to a length from a short list, and so is what may follow, so that few shapes occur. Each shape has two
programs. Prefill runs the prompts and chooses the first token. Decode goes on until every row has ended or has as many tokens as were
asked for; that number is data, so a stream calls the same program for each token. All models of one structure share programs. Members of
a pack are decoded by one program under `vmap`: their adapters differ, the base is one.

Rotary frequencies may change with the length of the rows (`Decoder.borders`: longrope, as Phi-3 has it). Keys cached before the border
are then rotated by the wrong frequencies. The step that takes the longest row past a border therefore runs all rows so far again, as if
they were prompts (a third program, for these models alone). The longest row of the batch decides for all rows, padding not counted, as
in transformers: rotary positions go by the largest one of a batch.

On a CPU a model is decoded unstacked: each layer is a segment of its own, with weights that are views of the stacked arrays. A scan over
stacked weights would copy each layer's slice before it multiplies, which doubles the memory traffic.
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
from ..models.decoder import Decoder
from ..models.layers import OF_ALL_LAYERS, PER_SEGMENT
from ..models.stack import Segment, Stack
from ..parallel.mesh import to_host
from ..parallel.program import TraceCounter
from .sampling import SamplingParams, choose


class SliceCache:
    """Slices of arrays along their first axis; one and the same array gives one and the same slice."""

    def __init__(self) -> None:
        self._slices: dict[tuple[int, int], tuple[jax.Array, jax.Array]] = {}

    def of(self, array: jax.Array, index: int) -> jax.Array:
        """`array[index : index + 1]`, sharing its memory where that lies on one CPU device (and each slice is aligned)."""
        found = self._slices.get((id(array), index))
        if found is None:
            # The array is kept beside its slice, so that its id stays its own.
            found = self._slices[id(array), index] = array, _slice(array, index)
        return found[1]


def unstacked(model: nnx.Module, views: SliceCache) -> Any:
    """The model with a segment for each layer; `model` is left as it was.

    Args:
        views: of models that share arrays, the same, so that they share the slices too.
    """
    graphdef, state = nnx.split(model, graph=True)
    model = nnx.merge(graphdef, jax.tree.map(lambda a: a, state))
    for _, stack in nnx.iter_modules(model):
        if isinstance(stack, Stack):
            stack.segments = nnx.List([_layer(s, i, views) for s in stack.segments for i in range(s.start, s.stop)])
    return model


def on_devices(model: nnx.Module) -> Any:
    """The model with arrays that lie in host memory put on the default device; `model` is left as it was."""
    graphdef, state = nnx.split(model, graph=True)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a if isinstance(a, jax.Array) else jnp.asarray(a), state))


def on_one_cpu(model: nnx.Module) -> bool:
    """Whether all the model's arrays lie on one CPU device, where layers can be run from views."""
    arrays = [a for a in jax.tree.leaves(nnx.state(model)) if isinstance(a, jax.Array)]
    devices = {d for a in arrays for d in a.devices()}
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _layer(segment: Segment, layer: int, views: SliceCache) -> Segment:
    graphdef, state = nnx.split(segment.block, graph=True)

    def one(variable: nnx.Variable) -> nnx.Variable:
        if variable.get_metadata().get(OF_ALL_LAYERS, False):
            return variable
        own = variable.get_metadata().get(PER_SEGMENT, False)
        sliced = variable.replace(views.of(variable.get_value(), layer - segment.start if own else layer))
        sliced.set_metadata(PER_SEGMENT, True)
        return sliced

    state = jax.tree.map(one, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    # A block split anew: that its variables are the segment's own is part of its structure.
    block = nnx.merge(graphdef, state)
    for _, variable in nnx.iter_graph(block):
        if isinstance(variable, nnx.Variable) and not variable.get_metadata().get(OF_ALL_LAYERS, False):
            variable.set_metadata(PER_SEGMENT, True)
    return Segment(block, layer, layer + 1)


def _slice(array: jax.Array, index: int) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array[index : index + 1]
    return jax.device_put(np.asarray(array)[index : index + 1], array.sharding, may_alias=True)


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
    """

    sampling: SamplingParams
    seeds: Array
    stop: Array
    pad: Array


@dataclasses.dataclass(frozen=True)
class ModelArrays:
    """The arrays of models of one structure, as a program takes them.

    Attributes:
        graphdef: their structure.
        layers: how many layers each segment of the stack has.
        own: arrays in which the models differ, (models, ...); nothing where there is one model.
        shared: all others.
    """

    graphdef: nnx.GraphDef[Any]
    layers: tuple[int, ...]
    own: Any
    shared: Any


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
            cache, logits = self._run_rows(own, shared, tokens, mask, total)
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
            return append_token(decoded, *self._run_rows(own, shared, rows, real, total), params, method)

        if self._members:
            lanes = _member_axes(decoded.cache.rolling)
            run = jax.vmap(run, in_axes=(0, lanes), out_axes=lanes)
        return run(own, decoded)

    def _run_rows(self, own: Any, shared: Any, tokens: Array, mask: Array, total: int) -> tuple[Cache, Array]:
        """The cache of rows, (rows, length) int32 padded on the left, and the logits after each, (rows, vocab)."""
        model: Decoder = nnx.merge(self._prefill_def, own, shared)
        hidden, cache = model.extend(model.empty_cache(tokens.shape[0], total), tokens, mask, first=True)
        return cache.regrouped(self._layers), model.head(hidden[:, -1])

    def _decode(self, own: Any, shared: Any, decoded: DecodingState, params: DecodingParams, upto: Array, method: str) -> DecodingState:
        """Goes on until there are `upto` tokens, or all rows have ended. What `decoded` holds is used up."""

        def step(own: Any, decoded: DecodingState) -> DecodingState:
            model: Decoder = nnx.merge(self._decode_def, own, shared)
            last = jax.lax.dynamic_slice_in_dim(decoded.tokens, decoded.count - 1, 1, axis=1)
            hidden, cache = model.extend(decoded.cache, last)
            return append_token(decoded, cache, model.head(hidden[:, 0]), params, method)

        if self._members:
            # Inside of the loop: a loop of a lane each would have to copy the lanes that have ended.
            lanes = _member_axes(decoded.cache.rolling)
            step = jax.vmap(step, in_axes=(0, lanes), out_axes=lanes)
        return jax.lax.while_loop(lambda d: (d.count < upto) & ~jnp.all(d.done), lambda d: step(own, d), decoded)


def append_token(decoded: DecodingState, cache: Cache, logits: Array, params: DecodingParams, method: str) -> DecodingState:
    """Chooses the next token of each row, from logits (rows, vocab), unless it has ended."""
    chosen = choose(method, logits, params.sampling, params.seeds, decoded.count)
    chosen = jnp.where(decoded.done, params.pad, chosen)
    tokens = jax.lax.dynamic_update_slice_in_dim(decoded.tokens, chosen[:, None], decoded.count, axis=1)
    return DecodingState(cache, tokens, decoded.done | jnp.isin(chosen, params.stop), decoded.count + 1)


def _member_axes(rolling: bool) -> DecodingState:
    """Which axis of each array of a `DecodingState` counts members."""
    axes: Any = {"keys": 0, "values": 0, "real": 0, "length": None, "counts": 0}
    lanes: Any = {"tokens": 0, "done": 0, "count": None}
    return DecodingState(Cache(**axes, rolling=rolling), **lanes)


@functools.lru_cache(maxsize=16)
def programs_for(prefill: nnx.GraphDef[Any], decode: nnx.GraphDef[Any], layers: tuple[int, ...], members: bool) -> Programs:
    """The programs of these structures: the same for equal ones, so that nothing is compiled again for another model."""
    return Programs(prefill, decode, layers, members)


class Decoding:
    """A model, or several of one structure, with their compiled programs.

    Args:
        models: decoders, with adapters or without. Several share one program: what they have in common (by identity of the
            arrays) is there once.

    Attributes:
        borders: `Decoder.borders` of the models.
    """

    def __init__(self, models: Sequence[Decoder]):
        views, self.members = SliceCache(), len(models) if len(models) > 1 else None
        models = [nnx.view(on_devices(m), raise_if_not_found=False, deterministic=True) for m in models]
        self.prefill_arrays = self.decode_arrays = _arrays_of(models)
        self.borders = models[0].borders
        if all(on_one_cpu(m) for m in models):
            self.decode_arrays = _arrays_of([unstacked(m, views) for m in models])
        self.programs = programs_for(
            self.prefill_arrays.graphdef, self.decode_arrays.graphdef, self.decode_arrays.layers, self.members is not None
        )

    def start(self, tokens: Any, mask: Any, params: DecodingParams, method: str, room: int, total: int) -> DecodingState:
        """Runs prompts and chooses the first token after each.

        Args:
            tokens, mask: (rows, length) int32, padded on the left.
            method: of `Sampling`.
            room: how many tokens may follow.
            total: how long a row may become, prompt and all.
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


def _arrays_of(models: Sequence[Decoder]) -> ModelArrays:
    """The models' arrays: those that are not the same array in all of them are stacked, the others are there once."""
    split = [nnx.split(m, graph=True) for m in models]
    graphdef, layers = split[0][0], tuple(s.stop - s.start for s in models[0].layers.segments)
    if any(g != graphdef for g, _ in split[1:]):
        raise ValueError("models that are decoded together must have one structure, as the members of a pack have")
    flat = [dict(nnx.to_flat_state(state)) for _, state in split]
    own, shared = [], []
    for path, variable in flat[0].items():
        arrays = [f[path].get_value() for f in flat]
        if all(a is arrays[0] for a in arrays):
            shared.append((path, variable))
        else:
            own.append((path, variable.replace(jnp.stack(arrays))))
    return ModelArrays(graphdef, layers, nnx.from_flat_state(own), nnx.from_flat_state(shared))


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
