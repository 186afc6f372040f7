"""Init: PEFT's distribution, drawn by seed, site and layer alone."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.adapters.inject import draw_head, fill_member, inject_layout, site_modules
from lora_jax.adapters.layout import resolve, unite
from lora_jax.adapters.partition import partition
from lora_jax.config.schema import AdapterConfig
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.encoder(4)


def _filled(model, config, seed=0, others=()):
    """Site name -> (A, B, scale) as NumPy."""
    specs = [resolve(model, c) for c in (config, *others)]
    adapted = inject_layout(model, unite(model, specs))
    fill_member(adapted, specs[0], seed)
    return {n: tuple(np.asarray(v[...]) for v in (m.lora_a, m.lora_b, m.scale)) for n, m in site_modules(adapted).items()}


def test_a_is_uniform_within_one_over_root_in_and_b_is_0(model):
    for name, (a, b, _) in _filled(model, AdapterConfig(rank=32, targets=["q_proj", "down_proj"])).items():
        bound = 1 / np.sqrt(a.shape[1])
        assert a.shape[1] == (64 if "down" in name else 32)
        assert not b.any()
        assert np.abs(a).max() <= bound and np.abs(a).max() > 0.99 * bound
        # Kolmogorov-Smirnov distance to the uniform distribution; 4096 or more draws.
        sample = np.sort((a.ravel() / bound + 1) / 2)
        assert np.abs(sample - np.linspace(0, 1, sample.size)).max() < 1.63 / np.sqrt(sample.size)


def test_embedding_starts_as_in_peft(model):
    a, b, scale = _filled(model, AdapterConfig(rank=32, alpha=8, targets="embedding"))["embed"]
    assert not a.any() and a.shape == (tiny.VOCAB, 32) and scale == 0.25
    assert abs(b.mean()) < 0.1 and abs(b.std() - 1) < 0.1


def test_seed_site_and_layer_each_matter(model):
    config = AdapterConfig(rank=4, targets=["q_proj", "k_proj"])
    first, again, other = _filled(model, config), _filled(model, config), _filled(model, config, seed=1)
    q, k = first["layers.attn.q_proj"][0], first["layers.attn.k_proj"][0]
    assert np.array_equal(q, again["layers.attn.q_proj"][0])
    drawn = [*q, *k, *other["layers.attn.q_proj"][0]]
    assert len({d.tobytes() for d in drawn}) == len(drawn)


def test_a_member_starts_the_same_alone_and_in_any_others(model):
    config = AdapterConfig(rank=3, targets=["q_proj"], layers="last:2")
    alone = _filled(model, config)["layers.attn.q_proj"]
    others = (AdapterConfig(rank=8, targets="all-linear"), AdapterConfig(rank=2, targets="embedding"))
    packed = _filled(model, config, others=others)
    a, b, scale = packed.pop("layers.attn.q_proj")
    assert alone[0].shape == (2, 32, 3) and a.shape == (4, 32, 8)
    np.testing.assert_array_equal(a[2:, :, :3], alone[0])
    np.testing.assert_array_equal(scale, [0, 0, *alone[2]])
    assert not a[:2].any() and not a[..., 3:].any() and not b.any()
    assert packed and not any(array.any() for arrays in packed.values() for array in arrays)


def test_filling_again_leaves_nothing_of_the_member_before(model):
    specs = [
        resolve(model, AdapterConfig(rank=8, targets="all-linear", dropout=0.5)),
        resolve(model, AdapterConfig(rank=2, targets=["q_proj"])),
    ]
    adapted = inject_layout(model, unite(model, specs))
    fresh = inject_layout(model, unite(model, specs))
    fill_member(adapted, specs[0], 0)
    fill_member(adapted, specs[1], 1)
    fill_member(fresh, specs[1], 1)
    a, b = partition(adapted), partition(fresh)
    assert tiny.arrays_equal(a.trainable, b.trainable)
    keep = {n: v for n, v in a.settings.items() if "key" not in n}
    assert tiny.arrays_equal(keep, {n: b.settings[n] for n in keep})


def test_dropout_rate_only_where_the_member_is(model):
    config = AdapterConfig(rank=2, targets=["q_proj"], dropout=0.25)
    specs = [resolve(model, config), resolve(model, AdapterConfig(targets=["up_proj"]))]
    adapted = inject_layout(model, unite(model, specs))
    fill_member(adapted, specs[0], 0)
    rates = {n: np.asarray(m.dropout_rate[...]) for n, m in site_modules(adapted).items()}
    assert (rates["layers.attn.q_proj"] == 0.25).all() and not rates["layers.mlp.up_proj"].any()


def test_heads_are_drawn_by_seed():
    kernels = []
    for seed in (0, 1, 0):
        model = tiny.classifier(1, dtype=jnp.bfloat16)
        draw_head(model, seed)
        kernels.append(np.asarray(model.classifier.kernel[...]))
    assert np.array_equal(kernels[0], kernels[2]) and not np.array_equal(kernels[0], kernels[1])
    assert abs(kernels[0].std() - 0.02) < 0.005


def test_a_smaller_rank_starts_as_the_leading_part_of_a_larger(model):
    small, large = (_filled(model, AdapterConfig(rank=r, targets=["q_proj", "embed"])) for r in (3, 6))
    for name in small:
        for a, b in ((small[name][0], large[name][0][..., :3]), (small[name][1], large[name][1][..., :3, :])):
            np.testing.assert_array_equal(a, b)


def test_without_nesting_every_rank_draws_its_own_factors(model):
    small, large, again = (_filled(model, AdapterConfig(rank=r, targets=["q_proj", "embed"], nested_init=False)) for r in (3, 6, 3))
    assert not np.intersect1d(small["layers.attn.q_proj"][0], large["layers.attn.q_proj"][0]).size
    assert not np.intersect1d(small["embed"][1], large["embed"][1]).size
    assert all(np.array_equal(x, y) for name in small for x, y in zip(small[name], again[name], strict=True))
