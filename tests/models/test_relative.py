"""Relative positions: which row a distance has, and scores laid out by pairs. The buckets are compared with PyTorch in `tests/interop/`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.positions import Relative, of_pairs


def test_rows_of_a_table_without_buckets_are_the_distances_up_to_its_ends():
    assert Relative(3).rows(5).tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 5]
    assert Relative(3).rows(1).tolist() == [3]


def test_buckets_grow_with_the_distance():
    rows = Relative(longest=64, buckets=16).rows(70)
    assert rows[69 - 8 : 69 + 9].tolist() == list(range(8, 25))  # up to half of them one distance each
    outside = np.diff(np.flatnonzero(np.diff(rows[69 + 8 :])))
    assert rows.max() == 31 and rows.min() == 0 and (np.diff(rows) >= 0).all() and outside[-1] > outside[0]


@pytest.mark.parametrize("length", [1, 2, 7])
def test_scores_by_distance_are_those_of_pairs(length):
    scores = np.random.default_rng(0).standard_normal((2, 3, length, 2 * length - 1)).astype(np.float32)
    place = np.arange(length)
    distance = place[:, None] - place[None, :] + length - 1  # query less key
    by_query = np.take_along_axis(scores, np.broadcast_to(distance, (2, 3, length, length)), -1)
    np.testing.assert_array_equal(of_pairs(jnp.asarray(scores)), by_query)
    by_key = np.take_along_axis(scores, np.broadcast_to(distance.T, (2, 3, length, length)), -1)
    np.testing.assert_array_equal(of_pairs(jnp.asarray(scores), keys_first=True), by_key.swapaxes(-1, -2))
