"""LoKr: its equation in every form that a rank has, and where the forms change."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.adapters.methods.lokr import split
from lora_jax.training.adapter_files import load_adapter, save_adapter
from tests import tiny
from tests.adapters.methods import exact


@pytest.mark.parametrize("factor", [-1, 2])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_equation(rank, factor):
    def change(a: exact.Arrays, _: np.ndarray) -> np.ndarray:
        w1 = a["w1"] if a["w1"].size else a["w1_b"] @ a["w1_a"]
        w2 = a["w2"] if a["w2"].size else a["w2_b"] @ a["w2_a"]
        return 6 / rank * np.kron(w1, w2)

    exact.check(change, method="lokr", rank=rank, alpha=6, decompose_both=True, decompose_factor=factor)


def test_a_matrix_is_whole_from_half_its_larger_side_on():
    """Of 96 = 8 x 12 inputs and 48 = 6 x 8 outputs, w2 is 12 x 8: whole from rank 6 on; w1 is 8 x 6, and factored with decompose_both."""
    shapes = {
        (rank, both): {n: p.shape for n, p in site.method.parameters(site.site, rank).items() if 0 not in p.shape}
        for rank, both in ((5, False), (6, False), (3, True), (4, True))
        for site in [exact.start(96, 48, method="lokr", rank=rank, decompose_both=both)]
    }
    assert shapes[5, False] == {"w1": (8, 6), "w2_b": (12, 5), "w2_a": (5, 8)}
    assert shapes[6, False] == {"w1": (8, 6), "w2": (12, 8)}
    assert shapes[3, True] == {"w1_b": (8, 3), "w1_a": (3, 6), "w2_b": (12, 3), "w2_a": (3, 8)}
    assert shapes[4, True] == {"w1": (8, 6), "w2_b": (12, 4), "w2_a": (4, 8)}


@pytest.mark.parametrize(
    ("size", "factor", "found"),
    [(256, -1, (16, 16)), (128, -1, (8, 16)), (127, -1, (1, 127)), (128, 4, (4, 32)), (30, 4, (3, 10)), (12, 6, (6, 2)), (6, 50, (2, 3))],
)
def test_sizes_are_split_as_peft_splits_them(size, factor, found):
    assert split(size, factor) == found


def test_arrays_without_numbers_are_saved(tmp_path):
    site = exact.start(method="lokr", rank=1)
    arrays = {name: getattr(site, name)[...] for name in site.method.parameters(site.site, 1)}
    assert arrays["w2"].size == 0 < arrays["w2_a"].size
    identity = {"base": "none", "method": "lokr", "sites": {}}
    save_adapter(tmp_path / "adapter", arrays, identity)
    found = load_adapter(tmp_path / "adapter", {n: jnp.zeros_like(a) for n, a in arrays.items()}, identity)
    assert found.keys() == arrays.keys() and tiny.arrays_equal(found, arrays)
