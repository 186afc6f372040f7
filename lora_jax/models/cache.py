"""What a decoder keeps of the tokens before: their keys and values, layer by layer, in arrays of a fixed size.

A pass over further tokens reads the cache and hands back the keys and values of its own tokens; only when all layers have read
are these written, one update an array. So XLA writes them into the arrays that are there, in a loop's carry or a donated argument.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from .attention import LayerKind

Array = jax.Array
KeysValues = tuple[Array, Array]


@dataclasses.dataclass
class Memory:
    """One layer's part of a pass: what it finds, and what it leaves.

    Attributes:
        past: keys and values of the tokens before, (rows, kv_heads, slots, head_dim) each; None where there are none.
        added: the layer's attention leaves here those of the tokens it was given, (rows, length, kv_heads, head_dim) each.
    """

    past: KeysValues | None
    added: KeysValues | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far.

    Slot s holds the newest token whose place in its row is s modulo the number of slots. Where there are fewer slots than tokens
    the oldest are written over: all layers then have windows, and none is wider than the slots.

    Attributes:
        keys, values: one array a segment of the model's stack, (layers, rows, kv_heads, slots, head_dim).
        real: (rows, slots) bool, where a token is, and not padding or nothing yet.
        length: () int32, tokens of a row so far with its padding: the place of the next one.
        counts: (rows,) int32, tokens of each row so far without it: the position of the next one.
        rolling: whether old tokens may have to make room; static.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    real: Array
    length: Array
    counts: Array
    rolling: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def empty(cls, layers: Sequence[int], shape: tuple[int, int, int, int], dtype: Any, *, rolling: bool = False) -> Cache:
        """A cache of nothing yet.

        Args:
            layers: how many each segment has.
            shape: rows, kv_heads, slots, head_dim.
            rolling: see `Cache`.
        """
        rows, _, slots, _ = shape
        keys, values = (tuple(jnp.zeros((n, *shape), dtype) for n in layers) for _ in range(2))
        return cls(keys, values, jnp.zeros((rows, slots), bool), jnp.int32(0), jnp.zeros(rows, jnp.int32), rolling)

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

    def seen(self, queries: int, window: int | None) -> Array:
        """(rows, 1, queries, slots) bool: which slots each of the next tokens sees."""
        places = self._newest()
        mask = self.real[:, None, :] & (places >= 0)
        if window is not None:
            distance = (self.length + jnp.arange(queries))[:, None] - places
            mask = mask & (distance < window)
        return jnp.broadcast_to(mask, (mask.shape[0], queries, self.slots))[:, None]

    def _newest(self) -> Array:
        """(slots,) int32: the place of the newest token that a slot can hold; negative where there was none yet."""
        last = self.length - 1
        return last - (last - jnp.arange(self.slots)) % self.slots

    def added(self, new: Sequence[KeysValues], mask: Array) -> Cache:
        """The cache with further tokens.

        Args:
            new: keys and values of each segment, (layers, rows, length, kv_heads, head_dim) each.
            mask: (rows, length), 1 for real tokens.
        """
        length = mask.shape[1]
        kept = min(length, self.slots)
        start = self.length + (length - kept)

        def write(old: Array, new: Array) -> Array:
            """`new`, (..., length, depth), into `old`, (..., slots, depth)."""
            new = new[..., length - kept :, :].astype(old.dtype)
            if self.rolling and kept > 1:
                return old.at[..., (start + jnp.arange(kept)) % self.slots, :].set(new, unique_indices=True)
            return jax.lax.dynamic_update_slice_in_dim(old, new, start % self.slots if self.rolling else start, old.ndim - 2)

        keys, values = (
            tuple(write(old, each[i].swapaxes(2, 3)) for old, each in zip(arrays, new, strict=True))
            for i, arrays in enumerate((self.keys, self.values))
        )
        real = write(self.real[..., None], mask[..., None])[..., 0]
        counts = self.counts + jnp.sum(mask, axis=1, dtype=jnp.int32)
        return dataclasses.replace(self, keys=keys, values=values, real=real, length=self.length + length, counts=counts)

    def regrouped(self, layers: Sequence[int]) -> Cache:
        """The same cache for a stack in other segments, of so many layers each."""

        def regroup(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
            if [a.shape[0] for a in arrays] == list(layers):
                return arrays
            whole, ends = jnp.concatenate(arrays), [sum(layers[: i + 1]) for i in range(len(layers))]
            return tuple(whole[stop - n : stop] for n, stop in zip(layers, ends, strict=True))

        return dataclasses.replace(self, keys=regroup(self.keys), values=regroup(self.values))


def slots_for(kinds: Sequence[LayerKind], length: int) -> tuple[int, bool]:
    """How many slots rows of up to `length` tokens need, and whether the oldest tokens have to make room then."""
    windows = [kind.window for kind in kinds]
    widest = max(w for w in windows if w is not None) if None not in windows else length
    return min(length, widest), widest < length
