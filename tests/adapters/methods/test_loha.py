"""LoHa: its equation, and how its factors start."""

from __future__ import annotations

import numpy as np

from tests.adapters.methods import exact


def test_the_equation():
    def change(a: exact.Arrays, _: np.ndarray) -> np.ndarray:
        return 6 / 3 * (a["a1"] @ a["b1"]) * (a["a2"] @ a["b2"])

    exact.check(change, method="loha", rank=3, alpha=6)


def test_the_start_is_pefts():
    """kaiming_uniform with a = sqrt 5 of B (out x r) is within 1 / sqrt(r), and one of the four factors is 0."""
    site = exact.start(64, 48, method="loha", rank=16)
    assert not np.any(site.a2[...])
    for array, bound in ((site.a1, 1 / 8), (site.b1, 1 / 4), (site.b2, 1 / 4)):
        assert 0.9 * bound < np.abs(array[...]).max() <= bound


def test_a_change_has_the_rank_of_both_products():
    site = exact.start(method="loha", rank=3)
    site.a2.set_value(np.float32(np.random.default_rng(0).standard_normal(site.a2.shape)))
    a, b, _ = site.method.low_rank(site)
    assert a.shape == (12, 9) and np.linalg.matrix_rank(a @ b) == 8  # of a weight of 12 x 8
