"""In which order examples are seen, how batches are balanced, and how many rows they fill."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rows_needed(group_sizes: np.ndarray, room: int | Sequence[int]) -> np.ndarray:
    """How many rows best-fit-decreasing needs for each of many groups at once; arguments as for `best_fit`.

    Returns:
        (groups,) int64.

    >>> rows_needed(np.array([[5, 4, 3, 2], [8, 0, 0, 0]]), 8)
    array([2, 1])
    """
    return best_fit(group_sizes, room).max(axis=1, initial=-1) + 1


def best_fit(group_sizes: np.ndarray, room: int | Sequence[int]) -> np.ndarray:
    """The row of each example when each group is packed by best-fit-decreasing; (groups, size) int64, -1 where an example has no tokens.

    Longest first, each example goes to the fullest row that still has room, the first such row where several are equal.

    Args:
        group_sizes: (groups, size) int tokens of each group's examples, 0 where a group has fewer; or (groups, size, kinds) where
            examples have tokens of several kinds (source and target), each with room of its own.
        room: tokens that a row holds, of each kind; at least the longest example's.

    >>> best_fit(np.array([[5, 4, 3, 2]]), 8)
    array([[0, 1, 0, 1]])
    >>> best_fit(np.array([[[5, 1], [4, 2], [3, 8]]]), (8, 8))
    array([[1, 2, 0]])
    """
    sizes = group_sizes if group_sizes.ndim == 3 else group_sizes[..., None]
    most = np.atleast_1d(room).astype(np.int64)
    groups, size, kinds = sizes.shape
    every = np.arange(groups)
    order = np.argsort(-(sizes / most).max(axis=2), axis=1, kind="stable")
    free = np.broadcast_to(most, (groups, size, kinds)).copy()
    rows = np.full((groups, size), -1, dtype=np.int64)
    opened = 0  # rows beyond the ones opened anywhere need no look
    for rank in range(size):
        example = order[:, rank]
        need = sizes[every, example]
        left = free[:, : opened + 1]
        fits = (left >= need[:, None]).all(axis=2)
        row = np.argmin(np.where(fits, left.sum(axis=2), most.sum() + 1), axis=1)
        placed = (need > 0).any(axis=1)
        rows[every[placed], example[placed]] = row[placed]
        free[every[placed], row[placed]] -= need[placed]
        opened = min(size - 1, max(opened, int(row[placed].max(initial=-1)) + 1))
    return rows


def epoch_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """The seeded permutation of `range(count)` for one epoch, (count,) int64; another epoch gives another one.

    >>> sorted(epoch_order(4, seed=0, epoch=0).tolist())
    [0, 1, 2, 3]
    """
    return np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(count)


def balance(order: np.ndarray, lengths: np.ndarray, batches: int, *, seed: list[int]) -> list[np.ndarray]:
    """Splits the examples `order` into `batches` groups whose sizes differ by at most one and whose token totals are nearly equal.

    The examples are sorted by length (ties in the order given) and cut into strata of `batches`; each group gets one of each
    stratum, the longest stratum first, the stratum's longest going to the group with the fewest tokens so far. The groups
    come back in a seeded order.

    Args:
        order: (n,) indices of examples, in a seeded order.
        lengths: tokens of every example, indexed by the values of `order`.
        batches: how many groups.
        seed: of the order of the groups and of ties between them.

    >>> [sorted(group.tolist()) for group in balance(np.arange(4), np.array([9, 1, 8, 2]), 2, seed=[0])]
    [[2, 3], [0, 1]]
    """
    rng = np.random.default_rng(seed)
    by_length = order[np.argsort(-lengths[order], kind="stable")]
    groups = np.full((batches, -(-len(order) // batches)), -1, dtype=np.int64)
    totals = np.zeros(batches, dtype=np.int64)
    for column in range(groups.shape[1]):
        stratum = by_length[column * batches : (column + 1) * batches]
        # Fewest tokens first; groups with equal totals are taken in random order. (The last stratum may be short.)
        takers = np.lexsort((rng.random(batches), totals))[: len(stratum)]
        groups[takers, column] = stratum
        totals[takers] += lengths[stratum]
    return [groups[g][groups[g] >= 0] for g in rng.permutation(batches)]
