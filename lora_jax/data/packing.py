"""Packing: which row of a fixed (rows, length) block each example goes to."""

from __future__ import annotations

import numpy as np


def rows_needed(group_lengths: np.ndarray, length: int) -> np.ndarray:
    """How many rows of `length` best-fit-decreasing needs for each of many groups at once.

    Args:
        group_lengths: (groups, size) int tokens of each group's examples, 0 where a group has fewer.
        length: tokens a row holds; at least the longest example.

    Returns:
        (groups,) int64.

    >>> rows_needed(np.array([[5, 4, 3, 2], [8, 0, 0, 0]]), 8)
    array([2, 1])
    """
    return best_fit(group_lengths, length).max(axis=1, initial=-1) + 1


def best_fit(group_lengths: np.ndarray, length: int) -> np.ndarray:
    """The row of each example when each group is packed by best-fit-decreasing; (groups, size) int64, -1 where the length is 0.

    Longest first, each example goes to the fullest row that still has room, the first such row where several are equal.

    >>> best_fit(np.array([[5, 4, 3, 2]]), 8)
    array([[0, 1, 0, 1]])
    """
    groups, size = group_lengths.shape
    every = np.arange(groups)
    order = np.argsort(-group_lengths, axis=1, kind="stable")
    free = np.full((groups, size), length, dtype=np.int64)
    rows = np.full((groups, size), -1, dtype=np.int64)
    opened = 0  # rows beyond the ones opened anywhere need no look
    for rank in range(size):
        example = order[:, rank]
        need = group_lengths[every, example]
        room = free[:, : opened + 1]
        row = np.argmin(np.where(room >= need[:, None], room, length + 1), axis=1)
        placed = need > 0
        rows[every[placed], example[placed]] = row[placed]
        free[every[placed], row[placed]] -= need[placed]
        opened = min(size - 1, max(opened, int(row[placed].max(initial=-1)) + 1))
    return rows
