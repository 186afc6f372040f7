"""GraLoRA: its equation block by block, and sizes that do not divide."""

from __future__ import annotations

import numpy as np
import pytest

from lora_jax.errors import InputError
from tests.adapters.methods import exact


@pytest.mark.parametrize(("k", "hybrid"), [(1, 0), (2, 0), (4, 3)])
def test_the_equation(k, hybrid):
    rank, inputs, outputs = 8, 12, 16

    def change(a: exact.Arrays, _: np.ndarray) -> np.ndarray:
        found = np.zeros((inputs, outputs))
        for i in range(k):
            for j in range(k):
                block = a["a"][i, :, j] @ a["b"][j, i]  # A of the piece that goes from inputs i to outputs j, then its B
                found[i * inputs // k : (i + 1) * inputs // k, j * outputs // k : (j + 1) * outputs // k] = block
        return 4 / (rank + hybrid) * (found + (a["whole_a"] @ a["whole_b"] if hybrid else 0))

    exact.check(change, inputs, outputs, method="gralora", rank=rank, alpha=4, gralora_k=k, hybrid_r=hybrid)


def test_blocks_have_lora_s_numbers_and_a_change_of_k_times_the_rank():
    site = exact.start(32, 32, method="gralora", rank=4, gralora_k=4)
    assert site.method.count(site.site, 4) == 4 * (32 + 32)
    site.b.set_value(np.float32(np.random.default_rng(0).standard_normal(site.b.shape)))
    a, b, _ = site.method.low_rank(site)
    assert np.linalg.matrix_rank(a @ b) == 16
    assert 0.9 / np.sqrt(8) < np.abs(site.a[...]).max() <= 1 / np.sqrt(8)  # within 1 / sqrt of a block's inputs


@pytest.mark.parametrize(("values", "said"), [({"rank": 3}, "3 ranks"), ({"rank": 5, "gralora_k": 5}, "12 inputs")])
def test_sizes_that_do_not_divide_are_refused(values, said):
    with pytest.raises(InputError, match=rf"adapter.gralora_k: .*{said}"):
        exact.start(method="gralora", **values)
