"""What a decoder keeps of the tokens before: their keys and values, layer by layer, in arrays of a fixed size.

An encoder-decoder also keeps the keys and values that its cross-attention makes of the encoder's output, once for all tokens.

A layer writes the keys and values of its new tokens into the cache and then reads all from there, in this order: so that XLA
writes them into the arrays that are there, in a loop's carry or a donated argument, and copies nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .layers import LayerType

Array = jax.Array
# Of a layer, or of the layers of a segment: keys and values, and in an encoder-decoder those of the source after them.
Kept = tuple[Array, ...]


@dataclasses.dataclass
class Memory:
    """One layer's part of a cache, while a pass over new tokens runs.

    Attributes:
        kept: keys and values, (rows, kv_heads, slots, head_dim) each, or with the layers of a segment in front; of an encoder-decoder
            those of the source after them, (rows, kv_heads, source length, head_dim). The layer puts here what it adds.
        layer: which of them is its own; None where there is one.
        slots: (length,) int32, where the new tokens go: one after the other, and round the end where the cache is rolling.
        first: whether these are the first tokens, so that nothing need be read.
        rolling: whether old tokens may have to make room.
    """

    kept: Kept
    layer: Array | int | None
    slots: Array
    first: bool
    rolling: bool

    def add(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Keeps the new tokens' keys and values; returns those that they may see, (rows, keys, kv_heads, head_dim) each.

        Args:
            k, v: (rows, length, kv_heads, head_dim).
        """
        keys, values, *source = self.kept
        keys, values = (self._write(old, new.swapaxes(1, 2)) for old, new in ((keys, k), (values, v)))
        self.kept = (keys, values, *source)
        return (k, v) if self.first else (self._own(keys).swapaxes(1, 2), self._own(values).swapaxes(1, 2))

    def source(self) -> tuple[Array, Array]:
        """The keys and values of the source, (rows, source length, kv_heads, head_dim) each."""
        keys, values = (self._own(array).swapaxes(1, 2) for array in self.kept[2:])
        return keys, values

    def keep_source(self, k: Array, v: Array) -> None:
        """Keeps the keys and values of the source, (rows, source length, kv_heads, head_dim) each."""
        new = (a.swapaxes(1, 2).astype(old.dtype) for a, old in zip((k, v), self.kept[2:], strict=True))
        if self.layer is not None:
            new = (jax.lax.dynamic_update_index_in_dim(old, a, self.layer, 0) for a, old in zip(new, self.kept[2:], strict=True))
        self.kept = (*self.kept[:2], *new)

    def _own(self, array: Array) -> Array:
        return array if self.layer is None else jax.lax.dynamic_index_in_dim(array, self.layer, keepdims=False)

    def _write(self, old: Array, new: Array) -> Array:
        new = new.astype(old.dtype)
        if self.rolling and self.slots.shape[0] > 1:
            kept = min(self.slots.shape[0], old.shape[-2])
            layer = self._own(old).at[:, :, self.slots[-kept:]].set(new[:, :, -kept:], unique_indices=True)
            return layer if self.layer is None else jax.lax.dynamic_update_index_in_dim(old, layer, self.layer, 0)
        where = (0, 0, self.slots[0], 0)
        if self.layer is None:
            return jax.lax.dynamic_update_slice(old, new, where)
        return jax.lax.dynamic_update_slice(old, new[None], (self.layer, *where))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far.

    Slot s holds the newest token whose place in its row is s modulo the number of slots. Where there are fewer slots than tokens
    the oldest are written over: all layers then have windows, and none is wider than the slots.

    Attributes:
        keys, values: one array a segment of the model's stack: (layers, rows, kv_heads, slots, head_dim), and where a segment is one
            layer without the first. (An axis of 1 between the array that is written to and what reads it costs XLA's CPU compiler
            two copies of the whole.)
        real: (rows, slots) bool, where a token is, and not padding or nothing yet.
        length: () int32, tokens of a row so far with its padding: the place of the next one.
        counts: (rows,) int32, tokens of each row so far without it: the position of the next one.
        source: of an encoder-decoder, for each segment the keys and values of the source, with its length in place of slots.
        source_real: (rows, source length) bool, where the source has tokens; None without a source.
        rolling: whether old tokens may have to make room; static.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    real: Array
    length: Array
    counts: Array
    source: tuple[tuple[Array, Array], ...] = ()
    source_real: Array | None = None
    rolling: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def empty(
        cls,
        layers: Sequence[int],
        shape: tuple[int, int, int, int],
        dtype: Any,
        *,
        rolling: bool = False,
        source_real: Array | None = None,
    ) -> Cache:
        """A cache of nothing yet.

        Args:
            layers: how many each segment has.
            shape: rows, kv_heads, slots, head_dim.
            rolling, source_real: see `Cache`.
        """
        rows, kv_heads, slots, head_dim = shape

        def blank(slots: int) -> tuple[Array, ...]:
            shape = (rows, kv_heads, slots, head_dim)
            return tuple(jnp.zeros(shape if n == 1 else (n, *shape), dtype) for n in layers)

        source: Any = () if source_real is None else zip(*(blank(source_real.shape[1]) for _ in range(2)), strict=True)
        real, counts = jnp.zeros((rows, slots), bool), jnp.zeros(rows, jnp.int32)
        return cls(blank(slots), blank(slots), real, jnp.int32(0), counts, tuple(source), source_real, rolling)

    @property
    def kept(self) -> list[Kept]:
        """What each segment keeps."""
        source: Sequence[tuple[Array, ...]] = self.source or [()] * len(self.keys)
        return [(keys, values, *both) for keys, values, both in zip(self.keys, self.values, source, strict=True)]

    def with_kept(self, kept: Sequence[Kept]) -> Cache:
        """The cache with what each segment keeps now."""
        keys, values, *source = zip(*kept, strict=True)
        return dataclasses.replace(self, keys=keys, values=values, source=tuple(zip(*source, strict=True)))

    @property
    def slots(self) -> int:
        """How many tokens of a row there is room for."""
        return self.real.shape[1]

    def positions(self, mask: Array) -> Array:
        """(rows, length) int32: what the next tokens' positions are, padding not counted.

        Args:
            mask: (rows, length), 1 for real tokens.
        """
        return jnp.maximum(self.counts[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)

    def grown(self, mask: Array) -> Cache:
        """The cache with room taken for further tokens, whose keys and values the layers have yet to write.

        Args:
            mask: (rows, length), 1 for real tokens.
        """
        length = mask.shape[1]
        kept = min(length, self.slots)
        real = self.real.at[:, self.places(length)[-kept:]].set(mask[:, -kept:] > 0, unique_indices=True)
        counts = self.counts + jnp.sum(mask, axis=1, dtype=jnp.int32)
        return dataclasses.replace(self, real=real, length=self.length + length, counts=counts)

    def places(self, length: int) -> Array:
        """(length,) int32: the slots of the next tokens."""
        return (self.length + jnp.arange(length, dtype=jnp.int32)) % self.slots

    def seen(self, queries: int, window: int | None) -> Array:
        """(rows, 1, queries, slots) bool: which slots the newest tokens see, themselves among them."""
        last = self.length - 1
        newest = last - (last - jnp.arange(self.slots)) % self.slots  # the place of each slot's token; negative where there is none yet
        distance = (self.length - queries + jnp.arange(queries))[:, None] - newest
        mask = (newest >= 0) & (distance >= 0)
        if window is not None:
            mask &= distance < window
        return (self.real[:, None, :] & mask)[:, None]

    def regrouped(self, layers: Sequence[int]) -> Cache:
        """The same cache for a stack in other segments, of so many layers each."""

        def regroup(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
            each = [a for array in arrays for a in ([array] if array.ndim == 4 else array)]
            ends = [sum(layers[: i + 1]) for i in range(len(layers))]
            return tuple(each[stop - 1] if n == 1 else jnp.stack(each[stop - n : stop]) for n, stop in zip(layers, ends, strict=True))

        if [1 if a.ndim == 4 else a.shape[0] for a in self.keys] == list(layers):
            return self
        return self.with_kept(list(zip(*map(regroup, zip(*self.kept, strict=True)), strict=True)))


def slots_for(kinds: Sequence[LayerType], length: int) -> tuple[int, bool]:
    """How many slots rows of up to `length` tokens need, and whether the oldest tokens have to make room then."""
    windows = [kind.window for kind in kinds]
    widest = max(w for w in windows if w is not None) if None not in windows else length
    return min(length, widest), widest < length
