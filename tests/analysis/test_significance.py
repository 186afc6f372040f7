"""How sure a difference is: against SciPy where only seeds or only rows vary, by simulation where both do; Holm by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lora_jax.analysis import Paired, holm


def test_holm_by_hand():
    # The smallest times 4, the next times 3, ..., and none below one before it: statsmodels' multipletests(method="holm") gives the same.
    assert holm([0.01, 0.02, 0.03, 0.005]) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert holm([0.4, 0.0001, 0.9]) == pytest.approx([0.8, 0.0003, 0.9])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([0.03]) == [0.03] and holm([]) == []


def test_seeds_alone_are_a_paired_t_test():
    a, b = np.array([41.0, 44, 39, 45]), np.array([38.0, 43, 35, 41])
    found = Paired.of((a - b)[:, None], np.array([50.0]))
    expected = stats.ttest_rel(a / 50, b / 50)
    low, high = expected.confidence_interval()
    assert found.mean == pytest.approx((low + high) / 2) and found.p == pytest.approx(expected.pvalue)
    assert found.half_width == pytest.approx((high - low) / 2) and found.of_seeds == pytest.approx(found.half_width)
    assert found.of_rows is None


def test_equal_batches_of_rows_alone_are_a_t_test_over_batches():
    differences = np.array([[1.0, 0, 2, -1, 3, 1]])
    found = Paired.of(differences, np.full(6, 8.0))
    expected = stats.ttest_1samp(differences[0] / 8, 0)
    assert found.p == pytest.approx(expected.pvalue) and found.of_seeds is None
    assert found.of_rows == pytest.approx(np.ptp(expected.confidence_interval()) / 2)


def test_nothing_differs():
    assert Paired.of(np.zeros((3, 4)), np.full(4, 8.0)) == Paired(0.0, 0.0, 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="one seed and one batch"):
        Paired.of(np.ones((1, 1)), np.ones(1))


def test_intervals_hold_what_they_promise():
    """Seeds and rows both vary, and there is no difference: at most about one interval in twenty misses 0."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 33, 40).astype(float)
    missed, trials = 0, 400
    for _ in range(trials):
        both = 0.02 * rng.standard_normal((3, 1)) + 0.1 * rng.standard_normal((1, 40)) + 0.05 * rng.standard_normal((3, 40))
        found = Paired.of(both * sizes, sizes)
        missed += abs(found.mean) > found.half_width
        assert (found.p < 0.05) == (abs(found.mean) > found.half_width)
    assert 0.005 < missed / trials < 0.075
