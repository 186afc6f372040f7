"""Best-fit-decreasing: no row overfull, every example in one, as few rows as the plain algorithm needs."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data.order import best_fit, rows_needed


def plainly(lengths: list[int], length: int) -> int:
    """The textbook's loop, one group at a time."""
    free: list[int] = []
    for need in sorted(lengths, reverse=True):
        fits = [i for i, room in enumerate(free) if room >= need]
        if fits:
            free[min(fits, key=lambda i: free[i])] -= need
        else:
            free.append(length - need)
    return len(free)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 16), min_size=5, max_size=5), min_size=1, max_size=6), st.integers(16, 40))
def test_rows_hold_what_they_are_given(groups, length):
    lengths = np.array(groups)
    rows = best_fit(lengths, length)
    for group, row_of in zip(lengths, rows, strict=True):
        used = np.bincount(row_of, weights=group)
        assert used.max() <= length
        assert (used > 0).all()  # rows are numbered without a gap
        assert len(used) == plainly(group.tolist(), length)
    assert rows_needed(lengths, length).tolist() == [plainly(g, length) for g in groups]


def test_absent_examples_take_no_room():
    assert best_fit(np.array([[8, 0, 0]]), 8).tolist() == [[0, -1, -1]]
    assert rows_needed(np.array([[8, 0, 0], [0, 0, 0]]), 8).tolist() == [1, 0]


def test_the_fullest_row_with_room_is_taken():
    # 6 and 5 open two rows of 8; the 2 goes where it fills a row, not where there is most room.
    assert best_fit(np.array([[6, 5, 2]]), 8).tolist() == [[0, 1, 0]]
