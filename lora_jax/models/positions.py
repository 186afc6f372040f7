"""Positions in attention: rotary embedding and its scaling to long contexts, and relative positions.

Rotary embedding (arXiv:2104.09864) rotates queries and keys by their position. The formulas of its scaling are those of the reference
implementation in transformers (`modeling_rope_utils.py`). Disentangled attention (DeBERTa, arXiv:2006.03654) adds scores for the
distance of two tokens: queries meet the keys of relative positions (`c2p`, content to position) and keys their queries (`p2c`), both
projections of one table of vectors that all layers share. A row of it is a distance, or, from `buckets / 2` on, a range of distances.
T5 (arXiv:1910.10683) adds a number to the scores of each head instead, by buckets of distances. The first transformer
(arXiv:1706.03762) adds sines and cosines to the embeddings.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Which features of a head are turned with the position, and how fast.

    Attributes:
        dims: features that are turned, the first ones of a head; feature k is paired with k + dims / 2.
        theta: pair k turns by theta^(-2k / dims) a position.
        kind: how the frequencies are scaled. `default`: not at all. `linear`: all divided by `factor`. `dynamic`: a larger theta
            beyond `context` (NTK-aware). `yarn` (arXiv:2309.00071) and `llama3`: those that turn less than `slow` times within
            `context` are divided by `factor`, those that turn more than `fast` times are left, between them is a ramp. `longrope`
            (arXiv:2402.13753): each divided by its own factor, from `short` up to `context` positions, from `long` beyond.
        factor: see `kind`.
        context: positions the model was trained on.
        magnitude: multiplies cosine and sine (YaRN's attention factor).
        slow, fast: see `kind`.
        truncate: whether YaRN's ramp starts and ends at whole pairs.
        short, long: see `kind`; dims / 2 numbers each.
    """

    dims: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    context: int = 0
    magnitude: float = 1.0
    slow: float = 1.0
    fast: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    @property
    def border(self) -> int | None:
        """Once a row is longer, all its positions are turned by other frequencies, those before the border too; None: never."""
        return self.context if self.kind == "longrope" else None


def rotary_angles(positions: Array, rotary: Rotary) -> tuple[Array, Array]:
    """Cosines and sines, for the half-split layout.

    Args:
        positions: (rows, length) int32. The largest of all rows is the context length that `dynamic` and `longrope` go by, as in
            transformers. Keys kept from before (`cache.py`) stay as they were turned: so does transformers have it for `dynamic`,
            whose frequencies change with each token beyond the context; for `longrope` see `Decoder.borders`.

    Returns:
        two (rows, length, dims) float32 arrays.
    """
    angles = positions[..., None].astype(jnp.float32) * _frequencies(rotary, positions)
    angles = jnp.concatenate([angles, angles], axis=-1)
    if rotary.magnitude == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * rotary.magnitude, jnp.sin(angles) * rotary.magnitude


def rotate(x: Array, rotary: tuple[Array, Array]) -> Array:
    """Turns (rows, length, heads, head_dim) by the angles of `rotary_angles`; features beyond theirs are left."""
    cos, sin = (a[:, :, None, :].astype(x.dtype) for a in rotary)
    dims = cos.shape[-1]
    x, rest = x[..., :dims], x[..., dims:]
    turned = jnp.concatenate([-x[..., dims // 2 :], x[..., : dims // 2]], axis=-1)
    out = x * cos + turned * sin
    return jnp.concatenate([out, rest], axis=-1) if rest.shape[-1] else out


def _frequencies(rotary: Rotary, positions: Array) -> np.ndarray | Array:
    """Radians a position, (dims / 2,) float32; worked out now, but for the kinds that go by the positions."""
    plain = _plain(rotary)
    match rotary.kind:
        case "default":
            return plain
        case "linear":
            return plain / np.float32(rotary.factor)
        case "llama3":
            return (plain / llama3_divisors(rotary)).astype(np.float32)
        case "yarn":
            return (plain / _yarn_divisors(rotary)).astype(np.float32)
        case "longrope":
            short, long = (plain / np.array(factors, np.float32) for factors in (rotary.short, rotary.long))
            return jnp.where(jnp.max(positions) + 1 > rotary.context, long, short)
        case "dynamic":
            longest = jnp.maximum(jnp.max(positions) + 1, rotary.context).astype(jnp.float32)
            stretch = rotary.factor * longest / rotary.context - (rotary.factor - 1)
            base = rotary.theta * stretch ** (rotary.dims / (rotary.dims - 2))
            return 1 / base ** (np.arange(0, rotary.dims, 2, dtype=np.float32) / rotary.dims)
    raise ValueError(f"no rotary scaling '{rotary.kind}'")


def _plain(rotary: Rotary) -> np.ndarray:
    return np.float32(1) / (rotary.theta ** (np.arange(0, rotary.dims, 2) / rotary.dims)).astype(np.float32)


def _turns(rotary: Rotary) -> np.ndarray:
    """How often each pair turns within the context."""
    return rotary.context * rotary.theta ** (-np.arange(0, rotary.dims, 2) / rotary.dims) / (2 * math.pi)


def llama3_divisors(rotary: Rotary) -> np.ndarray:
    """What Llama 3's scaling divides each frequency by: (dims / 2,) float64, 1 for fast ones, `factor` for slow ones."""
    kept = np.clip((_turns(rotary) - rotary.slow) / (rotary.fast - rotary.slow), 0.0, 1.0)
    return 1.0 / ((1.0 - kept) / rotary.factor + kept)


def _yarn_divisors(rotary: Rotary) -> np.ndarray:
    """YaRN's "NTK-by-parts" (arXiv:2309.00071, section 3.2) with the ramp over pairs rather than turns, as transformers has it."""

    def pair(turns: float) -> float:
        """The (fractional) pair that turns so often within the context."""
        return rotary.dims * math.log(rotary.context / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    first, last = pair(rotary.fast), pair(rotary.slow)
    if rotary.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary.dims - 1)
    width = last - first or 0.001
    kept = 1.0 - np.clip((np.arange(rotary.dims // 2) - first) / width, 0.0, 1.0)
    return 1.0 / ((1.0 - kept) / rotary.factor + kept)


@dataclasses.dataclass(frozen=True)
class Relative:
    """Relative positions of a model.

    Attributes:
        longest: the largest distance that has a row (or a share in one).
        buckets: rows to each side where distances share them; 0 where each has its own.
        c2p, p2c: which scores there are.
        shared: positions are projected by the weights that project the tokens (DeBERTa-v3); else by their own.
    """

    longest: int
    buckets: int = 0
    c2p: bool = True
    p2c: bool = True
    shared: bool = False

    @property
    def span(self) -> int:
        """Rows of the table to each side of distance 0."""
        return self.buckets or self.longest

    def rows(self, length: int) -> np.ndarray:
        """The table's row for each distance, query's place less key's, from -(length - 1) to length - 1: (2 * length - 1,) int64.

        >>> Relative(longest=3).rows(5).tolist()
        [0, 0, 1, 2, 3, 4, 5, 5, 5]
        """
        distance = np.arange(1 - length, length)
        if self.buckets:
            middle = self.buckets // 2
            # In float32, as the reference has it: at a bucket's edge the rounding decides.
            far = np.maximum(np.abs(distance), middle).astype(np.float32) / np.float32(middle)
            share = np.log(far) / np.log(np.float32((self.longest - 1) / middle))
            bucket = np.ceil(share * np.float32(middle - 1)).astype(np.int64) + middle
            distance = np.where(np.abs(distance) <= middle, distance, np.sign(distance) * bucket)
        return np.clip(distance + self.span, 0, 2 * self.span - 1)


def of_pairs(scores: Array, *, keys_first: bool = False) -> Array:
    """Scores of tokens with distances, to scores of queries with keys.

    Args:
        scores: (..., length, 2 * length - 1), each token's with all distances in the order of `Relative.rows`.
        keys_first: the tokens are keys; else queries.

    Returns:
        (..., queries, keys). No number is looked up by its index: shifting each row by one more than the row above is a reshape.
    """
    *lead, length, distances = scores.shape
    # Query q and key k are q - k apart. Along a row of keys' scores, distances rise with q; of queries' scores, they fall with k.
    scores = scores if keys_first else scores[..., ::-1]
    flat = scores.reshape(*lead, -1)[..., length - 1 : length - 1 + length * (distances - 1)]
    pairs = flat.reshape(*lead, length, distances - 1)[..., :length] if length > 1 else scores
    return jnp.swapaxes(pairs, -1, -2) if keys_first else pairs


@dataclasses.dataclass(frozen=True)
class Buckets:
    """T5's buckets of distances (arXiv:1910.10683, section 2.1): half of them a distance each, the others wider and wider ranges.

    Attributes:
        count: how many; where keys after the query are seen, half of them are theirs.
        longest: the distance from which on all share the last one.
        causal: whether no key after the query is seen.
    """

    count: int
    longest: int
    causal: bool

    def of(self, distance: np.ndarray) -> np.ndarray:
        """The bucket of each distance, query's place less key's; int64.

        >>> Buckets(8, 20, causal=False).of(np.arange(-5, 6)).tolist()
        [6, 6, 6, 6, 5, 0, 1, 2, 2, 2, 2]
        """
        count = self.count if self.causal else self.count // 2
        first = 0 if self.causal else np.where(distance < 0, count, 0)
        far = np.maximum(distance, 0) if self.causal else np.abs(distance)
        exact = count // 2
        # In float32, as the reference has it: at a bucket's edge the rounding decides.
        share = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(self.longest / exact))
        wide = np.minimum(exact + (share * np.float32(count - exact)).astype(np.int64), count - 1)
        return first + np.where(far < exact, far, wide)


def sinusoids(positions: int, width: int) -> np.ndarray:
    """(positions, width) float32: sines in the first half of the features, cosines in the second (arXiv:1706.03762, section 3.5)."""
    pair = np.arange(width) // 2
    angles = np.arange(positions)[:, None] / np.power(10000, 2 * pair / width)
    return np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=1).astype(np.float32)
