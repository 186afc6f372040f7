"""The held-out rows: chosen by a seed, and never among the training rows, not even as a copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import InputError


def split_rows(texts: Sequence[str], *, held_out: int, train: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the held-out rows, each in a seeded order.

    Rows with equal text go to one side: equal rows in training and evaluation would flatter the figures.

    Args:
        texts: what makes a row; (n,).
        held_out: how many rows are held out.
        train: at most so many rows are trained on; all others by default.
        seed: of the choice.

    Raises:
        InputError: too few rows.
    """
    count = len(texts)
    if held_out >= count:
        raise InputError(f"task.eval_size: {held_out} of {count} rows leaves none to train on.")
    order = np.random.default_rng(np.random.SeedSequence([seed, 0x5911])).permutation(count)
    copies: dict[str, list[int]] = {}
    for i in order:
        copies.setdefault(texts[int(i)], []).append(int(i))
    groups = list(copies.values())
    taken: list[int] = []
    rest: list[int] = []
    for group in groups:
        # Held out from the front of the shuffled texts until there are enough; a text with too many copies stays in training.
        (taken if len(taken) + len(group) <= held_out else rest).extend(group)
    if len(taken) < held_out:
        raise InputError(f"task.eval_size: the texts repeat so often that {held_out} rows cannot be held out without their copies.")
    return np.array(rest[:train], np.int64), np.array(taken, np.int64)


def sample_rows(count: int, *, size: int | None, seed: int) -> np.ndarray:
    """`size` row indices of `count` in a seeded order; all of them where `size` is None or larger."""
    return np.random.default_rng(np.random.SeedSequence([seed, 0x5A3])).permutation(count)[:size]
