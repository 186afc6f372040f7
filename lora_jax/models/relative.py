"""Disentangled attention (DeBERTa, arXiv:2006.03654): scores that follow from how far apart two tokens are, beside those of what they say.

Queries meet the keys of relative positions (`c2p`, content to position) and keys their queries (`p2c`), projections of one table of
vectors that all layers share. A row of it is a distance, or, from `buckets / 2` on, a range of distances that grows with them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


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
