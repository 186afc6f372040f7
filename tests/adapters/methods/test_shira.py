"""SHiRA: its equation, its places, and how many there can be."""

from __future__ import annotations

import numpy as np
import pytest

from lora_jax.errors import InputError
from tests.adapters.methods import exact


def places(site) -> np.ndarray:
    found = np.asarray(site.places[...])
    np.testing.assert_array_equal(found, found.astype(int))
    return found[0].astype(int) * 8 + found[1].astype(int)


def test_the_equation():
    def change(a: exact.Arrays, weight: np.ndarray) -> np.ndarray:
        found = np.zeros_like(weight)
        found[tuple(a["places"].astype(int))] = a["values"]
        return found

    exact.check(change, method="shira", rank=3)


def test_places_differ_and_a_smaller_rank_has_the_first_of_them():
    two, four = (places(exact.start(method="shira", rank=rank)) for rank in (2, 4))
    assert len(set(four)) == len(four) == 4 * 20 and four.max() < 12 * 8
    np.testing.assert_array_equal(two, four[:40])
    assert set(places(exact.start(method="shira", rank=2, seed=5))) != set(two)


def test_more_places_than_the_weight_has_are_refused():
    exact.start(method="shira", rank=4)
    with pytest.raises(InputError, match=r"adapter\.rank: .*at most 4, not 5"):
        exact.start(method="shira", rank=5)
