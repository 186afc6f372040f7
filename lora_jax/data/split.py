"""Which rows are trained on, which are held out, and which are kept for the test."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..errors import InputError
from .columns import row_names


def mixed_rows(at: np.ndarray, origin: np.ndarray, weights: Sequence[float], *, size: int | None, seed: int) -> np.ndarray:
    """Training rows of several sources, each with its share: whole passes over a source's rows, and the first of them once more.

    Args:
        at: (n,) indices of training rows, in a seeded order.
        origin: (rows,) which source each row is of.
        weights: of the sources; shares are in proportion.
        size: how many rows there are to be; as many as there are by default.
        seed: of their order.

    >>> mixed_rows(np.arange(6), np.array([0, 0, 0, 0, 1, 1]), [1.0, 2.0], size=None, seed=0).tolist()
    [4, 5, 0, 5, 1, 4]
    """
    total, shares = len(at) if size is None else size, np.array(weights) / np.sum(weights)
    counts = np.floor(total * shares).astype(int)
    counts[np.argsort(-(total * shares - counts), kind="stable")[: total - counts.sum()]] += 1
    own = [at[origin[at] == number] for number in range(len(weights))]
    if (empty := next((number for number, rows in enumerate(own) if not len(rows)), None)) is not None:
        raise InputError(f"task.sources: of source {empty + 1} no row is left to train on.")
    chosen = np.concatenate([np.resize(rows, count) for rows, count in zip(own, counts, strict=True)])
    return np.random.default_rng(np.random.SeedSequence([seed, 0x313])).permutation(chosen)


def split_rows(
    texts: Sequence[str] | np.ndarray, *, held_out: int, train: int | None, seed: int, test: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the training, the held-out and the test rows, each in a seeded order.

    Rows with equal text go to one part: equal rows in training and evaluation would flatter the figures. The held-out rows are the same
    whether there are test rows or not.

    Args:
        texts: what makes a row, (n,): texts, or their names (`row_names`).
        held_out: how many rows are held out.
        train: at most so many rows are trained on; all others by default.
        seed: of the choice.
        test: how many are test rows.

    Raises:
        InputError: too few rows.
    """
    count = len(texts)
    if held_out >= count:
        raise InputError(f"task.eval_size: {held_out} of {count} rows leaves no row to train on.")
    if held_out + test >= count:
        beside = f", of which {held_out} are held out," if held_out else ""
        raise InputError(f"task.test_size: {test} of {count} rows{beside} leaves no row to train on.")
    order = np.random.default_rng(np.random.SeedSequence([seed, 0x5911])).permutation(count)
    names = texts if isinstance(texts, np.ndarray) else row_names([texts])
    _, first, same = np.unique(names[order], return_index=True, return_inverse=True)
    group = np.argsort(np.argsort(first))[same]  # numbered in the order that they come in
    by_text = np.argsort(group, kind="stable")
    order, group, sizes = order[by_text], group[by_text], np.bincount(group)
    # Held out from the front of the shuffled texts until there are enough; a text with too many copies stays in training.
    part = np.zeros(len(sizes), np.int8)
    if _fill(part, sizes, range(len(sizes)), held_out, 1) < held_out:
        raise InputError(f"task.eval_size: the texts repeat so often that {held_out} rows cannot be held out without their copies.")
    # Test rows from the back: then the training rows that `train` leaves are the same, too.
    if _fill(part, sizes, range(len(sizes) - 1, -1, -1), test, 2) < test:
        raise InputError(f"task.test_size: the texts repeat so often that {test} rows cannot be kept for the test without their copies.")
    training, held, kept = (order[part[group] == number] for number in range(3))
    backwards = np.argsort(-group[part[group] == 2], kind="stable")
    return training[:train], held, kept[backwards]


def _fill(part: np.ndarray, sizes: np.ndarray, order: Iterable[int], size: int, number: int) -> int:
    """Gives the first free groups that have at most `size` rows together a number, in place; returns how many rows they have."""
    count = 0
    for group in order:
        if count == size:
            break
        if not part[group] and count + sizes[group] <= size:
            part[group], count = number, count + int(sizes[group])
    return count


def sample_rows(count: int, *, size: int | None, seed: int) -> np.ndarray:
    """`size` row indices of `count` in a seeded order; all of them where `size` is None or larger."""
    return np.random.default_rng(np.random.SeedSequence([seed, 0x5A3])).permutation(count)[:size]
