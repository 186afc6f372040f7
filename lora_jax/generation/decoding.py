"""Decoding: prompts to further tokens, with a cache, compiled once for each shape of them.

Prompts are padded on the left to a length from a short list, and so is what may follow, so that few shapes occur. Of each there
are two programs: one runs the prompts and chooses the first token, the other goes on until every row has ended or as many tokens
are there as were asked for, which is data: a caller that wants each token as it comes calls it again and again. A third, for models
with `borders` alone, runs the rows so far as if they were prompts (`continuation.py` says when). All models of one structure share
programs. Members of a pack are lanes of one program: their adapters differ, the base under them is one.

A batch of prompts while it is decoded, and what is to be computed anew on its way.

Where the frequencies of rotary positions change with the length of the rows (`Decoder.borders`: longrope, as Phi-3 has it), keys kept
from before the border are turned by the wrong ones. So the step that takes the longest row past it is not one more token with the
cache, but all rows so far run as if they were prompts. The length of the longest row alone decides, padding not counted, and for all
rows together, as in transformers: rotary positions go by the largest one of a batch.
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
from ..parallel.program import TraceCounter
from .sampling import Numbers, choose
from .unstack import Views, on_devices, on_one_cpu, unstacked

Array = jax.Array

# Prompts, what may follow, and both together are padded to one of these, and beyond the last to a multiple of it.
LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """Where decoding stands. With members, all but `cache.length` and `count` have them in front.

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
class Choice:
    """How tokens are chosen and when a row ends: data.

    Attributes:
        numbers: of the sampling.
        seeds: (rows,) uint32.
        stop: (n,) int32, tokens that end a row; -1 is none.
        pad: () int32, what follows in a row that has ended.
    """

    numbers: Numbers
    seeds: Array
    stop: Array
    pad: Array


@dataclasses.dataclass(frozen=True)
class Arranged:
    """Models of one structure as a program takes them.

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
        first: the structure that runs prompts.
        further: the structure that runs one token after the other.
        layers: the layers of each segment of the latter.
        members: whether arrays have members in front.

    Attributes:
        prefill, decode, repeat: `count` says how often each was traced: once for each shape and method.
    """

    def __init__(self, first: nnx.GraphDef[Any], further: nnx.GraphDef[Any], layers: tuple[int, ...], members: bool):
        self._first, self._further, self._layers, self._members = first, further, layers, members
        self.prefill, self.decode, self.repeat = (TraceCounter(f) for f in (self._prefill, self._decode, self._repeat))
        self.start = jax.jit(self.prefill, static_argnums=(5, 6, 7))
        self.advance = jax.jit(self.decode, static_argnums=5, donate_argnums=2)
        # The old cache is not read, but kept as an argument: the new one goes into its arrays.
        self.again = jax.jit(self.repeat, static_argnums=(6, 7, 8), donate_argnums=2, keep_unused=True)

    def _prefill(self, own: Any, shared: Any, tokens: Array, mask: Array, choice: Choice, method: str, room: int, total: int) -> Decoded:
        """Runs prompts, (rows, length) int32 padded on the left, and chooses the token after each; see `Decoding.start`."""
        rows = tokens.shape[0]

        def run(own: Any) -> Decoded:
            cache, logits = self._whole(own, shared, tokens, mask, total)
            blank = jnp.full((rows, room), choice.pad, jnp.int32)
            nothing = Decoded(cache, blank, jnp.zeros(rows, bool), jnp.int32(0))
            return accept(nothing, cache, logits, choice, method)

        if not self._members:
            return run(own)
        kinds = nnx.eval_shape(lambda: nnx.merge(self._first, jax.tree.map(lambda a: a[0], own), shared)).config.layer_types
        return jax.vmap(run, out_axes=_lanes(slots_for(kinds, total)[1]))(own)

    def _repeat(
        self, own: Any, shared: Any, decoded: Decoded, tokens: Array, mask: Array, choice: Choice, method: str, length: int, total: int
    ) -> Decoded:
        """Runs the rows so far, the longest of which has `length` tokens, and chooses the next token; see `Decoding.again`."""

        def run(own: Any, decoded: Decoded) -> Decoded:
            rows = jnp.concatenate([tokens, decoded.tokens], axis=1)
            real = jnp.concatenate([mask, jnp.ones_like(decoded.tokens)], axis=1)
            start = tokens.shape[1] + decoded.count - length
            rows, real = (jax.lax.dynamic_slice_in_dim(a, start, length, axis=1) for a in (rows, real))
            return accept(decoded, *self._whole(own, shared, rows, real, total), choice, method)

        if self._members:
            lanes = _lanes(decoded.cache.rolling)
            run = jax.vmap(run, in_axes=(0, lanes), out_axes=lanes)
        return run(own, decoded)

    def _whole(self, own: Any, shared: Any, tokens: Array, mask: Array, total: int) -> tuple[Cache, Array]:
        """The cache of rows, (rows, length) int32 padded on the left, and the logits after each, (rows, vocab)."""
        model: Decoder = nnx.merge(self._first, own, shared)
        hidden, cache = model.extend(model.empty_cache(tokens.shape[0], total), tokens, mask, first=True)
        return cache.regrouped(self._layers), model.head(hidden[:, -1])

    def _decode(self, own: Any, shared: Any, decoded: Decoded, choice: Choice, upto: Array, method: str) -> Decoded:
        """Goes on until there are `upto` tokens, or all rows have ended. What `decoded` holds is used up."""

        def step(own: Any, decoded: Decoded) -> Decoded:
            model: Decoder = nnx.merge(self._further, own, shared)
            last = jax.lax.dynamic_slice_in_dim(decoded.tokens, decoded.count - 1, 1, axis=1)
            hidden, cache = model.extend(decoded.cache, last)
            return accept(decoded, cache, model.head(hidden[:, 0]), choice, method)

        if self._members:
            # Inside of the loop: a loop of a lane each would have to copy the lanes that have ended.
            lanes = _lanes(decoded.cache.rolling)
            step = jax.vmap(step, in_axes=(0, lanes), out_axes=lanes)
        return jax.lax.while_loop(lambda d: (d.count < upto) & ~jnp.all(d.done), lambda d: step(own, d), decoded)


def accept(decoded: Decoded, cache: Cache, logits: Array, choice: Choice, method: str) -> Decoded:
    """Chooses the next token of each row, from logits (rows, vocab), unless it has ended."""
    chosen = choose(method, logits, choice.numbers, choice.seeds, decoded.count)
    chosen = jnp.where(decoded.done, choice.pad, chosen)
    tokens = jax.lax.dynamic_update_slice_in_dim(decoded.tokens, chosen[:, None], decoded.count, axis=1)
    return Decoded(cache, tokens, decoded.done | jnp.isin(chosen, choice.stop), decoded.count + 1)


def _lanes(rolling: bool) -> Decoded:
    """Which axis of each array of a `Decoded` counts members."""
    axes: Any = {"keys": 0, "values": 0, "real": 0, "length": None, "counts": 0}
    lanes: Any = {"tokens": 0, "done": 0, "count": None}
    return Decoded(Cache(**axes, rolling=rolling), **lanes)


@functools.lru_cache(maxsize=16)
def programs_for(first: nnx.GraphDef[Any], further: nnx.GraphDef[Any], layers: tuple[int, ...], members: bool) -> Programs:
    """The programs of these structures: the same for equal ones, so that nothing is compiled again for another model."""
    return Programs(first, further, layers, members)


class Decoding:
    """Decoding with a model, or with several of one structure at once.

    Args:
        models: decoders, with adapters or without. Several share one program: what they have in common (by identity of the
            arrays) is there once.

    Attributes:
        borders: `Decoder.borders` of the models.
    """

    def __init__(self, models: Sequence[Decoder]):
        views, self.members = Views(), len(models) if len(models) > 1 else None
        models = [nnx.view(on_devices(m), raise_if_not_found=False, deterministic=True) for m in models]
        self.first = self.further = _arrange(models)
        self.borders = models[0].borders
        if all(on_one_cpu(m) for m in models):
            self.further = _arrange([unstacked(m, views) for m in models])
        self.programs = programs_for(self.first.graphdef, self.further.graphdef, self.further.layers, self.members is not None)

    def start(self, tokens: Any, mask: Any, choice: Choice, method: str, room: int, total: int) -> Decoded:
        """Runs prompts and chooses the first token after each.

        Args:
            tokens, mask: (rows, length) int32, padded on the left.
            method: of `Sampling`.
            room: how many tokens may follow.
            total: how long a row may become, prompt and all.
        """
        return self.programs.start(self.first.own, self.first.shared, tokens, mask, choice, method, room, total)

    def advance(self, decoded: Decoded, choice: Choice, upto: int, method: str) -> Decoded:
        """Goes on until there are `upto` tokens, or all rows have ended; `decoded` is used up."""
        return self.programs.advance(self.further.own, self.further.shared, decoded, choice, jnp.int32(upto), method)

    def again(self, decoded: Decoded, tokens: Any, mask: Any, choice: Choice, method: str, length: int, total: int) -> Decoded:
        """Runs prompts and all tokens that followed, and chooses the next token; `decoded` is used up.

        Args:
            tokens, mask, choice, method, total: as for `start`.
            length: how many tokens the longest row has by now, without padding.
        """
        return self.programs.again(self.first.own, self.first.shared, decoded, tokens, mask, choice, method, length, total)


def padded_length(length: int) -> int:
    """The smallest of the lengths that shapes have (`LENGTHS`) that is no shorter."""
    last = LENGTHS[-1]
    return next((n for n in LENGTHS if n >= length), -(-length // last) * last)


def _arrange(models: Sequence[Decoder]) -> Arranged:
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
    return Arranged(graphdef, layers, nnx.from_flat_state(own), nnx.from_flat_state(shared))


class Continuation:
    """Prompts and what follows them.

    Args:
        decoding: of the models.
        tokens, mask, choice, method, room, total: of `Decoding.start`; the mask as NumPy array.
    """

    def __init__(self, decoding: Decoding, tokens: np.ndarray, mask: np.ndarray, choice: Choice, method: str, room: int, total: int):
        self._decoding, self._tokens, self._mask = decoding, tokens, mask
        self._choice, self._method, self._total = choice, method, total
        self._longest = int(mask.sum(1).max())
        self._ahead = [border for border in decoding.borders if border >= self._longest]
        self._decoded = decoding.start(tokens, mask, choice, method, room, total)

    @property
    def tokens(self) -> np.ndarray:
        """The new tokens so far, (rows, room) int32, with members (members, rows, room); padding beyond."""
        return np.asarray(self._decoded.tokens)

    @property
    def ended(self) -> bool:
        """Whether all rows have ended, of all members."""
        return bool(np.all(self._decoded.done))

    def advance(self, count: int) -> None:
        """Goes on until there are `count` new tokens, or all rows have ended."""
        # The last of the new tokens has no key yet: so many tokens after the longest prompt fill the cache up to a border.
        while self._ahead and (full := self._ahead[0] - self._longest + 1) < count:
            self._to(full)
            if self.ended:
                return
            length = self._ahead.pop(0) + 1
            self._decoded = self._decoding.again(self._decoded, self._tokens, self._mask, self._choice, self._method, length, self._total)
        self._to(count)

    def _to(self, count: int) -> None:
        self._decoded = self._decoding.advance(self._decoded, self._choice, count, self._method)
