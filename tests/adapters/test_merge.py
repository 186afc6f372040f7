"""Merging: the same outputs, and the way back to the same bits."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.bank import AdapterBank
from lora_jax.adapters.inject import inject, site_modules
from lora_jax.adapters.merge import Merged, merge, merged_base, unmerge
from lora_jax.adapters.partition import partition
from lora_jax.adapters.sites import SiteModule
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")
TOKENS = np.random.default_rng(0).integers(1, tiny.VOCAB, (3, 9)).astype(np.int32)
X = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)


CASES = {
    "encoder": (lambda: tiny.encoder(3), TOKENS, {"targets": "all-linear"}),
    "lower segment": (lambda: tiny.encoder(4), TOKENS, {"targets": "all-linear", "layers": "last:2", "rank_pattern": {"q_proj": 2}}),
    "left-out layer": (lambda: tiny.encoder(4), TOKENS, {"targets": ["up_proj"], "layers": [1, 3]}),
    "embedding": (lambda: tiny.decoder(2, tied=False), TOKENS, {"targets": ["embed", "lm_head"]}),
    "tied embedding": (lambda: tiny.decoder(2), TOKENS, {"targets": "embedding"}),
    "own model": (
        lambda: nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(8, 3, rngs=nnx.Rngs(0))),
        X,
        {"targets": "all-linear"},
    ),
    "experts": (lambda: tiny.decoder_of("mixtral"), TOKENS, {"targets": ["experts.gate_up_proj", "down_proj", "gate"], "layers": "last:2"}),
    "under a head": (lambda: tiny.classifier(2).base, TOKENS, {"targets": ["pooler", "v_proj"]}),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.long) if c == "left-out layer" else c for c in CASES])
def test_merged_outputs_agree_and_unmerging_gives_the_same_bits(case):
    make, inputs, values = CASES[case]
    model = make()
    adapted = tiny.trained(model, **values)
    wanted = tiny.outputs(adapted, inputs)
    assert tiny.relative(wanted, tiny.outputs(model, inputs)) > 1e-3
    before = partition(adapted)
    merged = merge(adapted)
    assert {type(m) for _, m in nnx.iter_modules(merged)} >= {Merged}
    assert tiny.relative(tiny.outputs(merged, inputs), wanted) < 1e-5
    plain = merged_base(adapted)
    assert tiny.relative(tiny.outputs(plain, inputs), wanted) < 1e-5
    again = unmerge(merged)
    for half in (adapted, again):  # merging left its argument alone, and unmerging gives it back
        part = partition(half)
        assert tiny.arrays_equal(part.trainable, before.trainable) and tiny.arrays_equal(part.frozen, before.frozen)
    np.testing.assert_array_equal(tiny.outputs(again, inputs), wanted)
    base = tiny.base_arrays(model)
    assert all(np.array_equal(a, base[n]) for n, a in tiny.base_arrays(make()).items())


@pytest.mark.parametrize("case", CASES)
def test_merged_base_has_the_classes_of_the_base(case):
    make, _, values = CASES[case]
    plain = merged_base(tiny.trained(make(), **values))
    assert not any(isinstance(m, SiteModule | Merged) for _, m in nnx.iter_modules(plain))
    known = {type(m) for _, m in nnx.iter_modules(make())}
    assert {type(m) for _, m in nnx.iter_modules(plain)} <= known | {nnx.Linear}


def test_the_merged_weight_is_w_plus_scale_a_b():
    model = tiny.encoder(3)
    adapted = tiny.trained(model, targets=["q_proj"], layers="last:2", rank=4, alpha=6)
    site = site_modules(adapted)["layers.attn.q_proj"]
    a, b = np.asarray(site.lora_a[...], np.float64), np.asarray(site.lora_b[...], np.float64)
    kernel = tiny.base_arrays(model)["layers.segments.0.block.attn.q_proj.kernel"]
    merged = merged_base(adapted).layers.segments[1].block.attn.q_proj.kernel[...]
    np.testing.assert_allclose(merged[1:], kernel[1:] + 1.5 * a @ b, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(merged[0], kernel[0])


def test_bfloat16_is_rounded_once():
    model = tiny.encoder(2, dtype=jnp.bfloat16)
    adapted = tiny.trained(model, targets=["q_proj"], alpha=0.37)
    site = site_modules(adapted)["layers.attn.q_proj"]
    full = site.base.kernel[...].astype(jnp.float32) + tiny.update_of(site)
    merged = merged_base(adapted).layers.segments[0].block.attn.q_proj.kernel[...]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged.astype(jnp.float32), full.astype(jnp.bfloat16).astype(jnp.float32))
    twice = site.base.kernel[...] + tiny.update_of(site).astype(jnp.bfloat16)
    assert not np.array_equal(np.asarray(twice, np.float32), np.asarray(merged, np.float32))


def test_merging_copies_only_the_adapted_weights():
    adapted = tiny.trained(tiny.encoder(2), targets=["q_proj"])
    plain = merged_base(adapted)
    before = {v[...].unsafe_buffer_pointer() for _, v in nnx.iter_graph(adapted) if isinstance(v, nnx.Param)}
    fresh = [p for p, v in nnx.iter_graph(plain) if isinstance(v, nnx.Param) and v[...].unsafe_buffer_pointer() not in before]
    assert [p[-2:] for p in fresh] == [("q_proj", "kernel")]


def test_attention_of_flax_is_adapted_merged_and_mixed():
    model = nnx.Dict(attn=nnx.MultiHeadAttention(2, 8, qkv_features=12, decode=False, rngs=nnx.Rngs(0)))
    adapted = tiny.trained(model, targets="attention")
    x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
    plain, changed = model.attn(x), adapted.attn(x)
    assert np.abs(changed - plain).max() > 0.01
    np.testing.assert_allclose(merge(adapted).attn(x), changed, atol=1e-5)
    np.testing.assert_allclose(merged_base(adapted).attn(x), changed, atol=1e-5)
    assert type(merged_base(adapted).attn.query) is nnx.LinearGeneral
    np.testing.assert_array_equal(unmerge(merge(adapted)).attn(x), changed)
    np.testing.assert_array_equal(inject(model, tiny.adapter(targets="attention"), rngs=nnx.Rngs(0)).attn(x), plain)
    bank = AdapterBank(model)
    bank.add("one", adapted)
    mixed = bank.mixed(["one", None, "one"]).attn(x)
    np.testing.assert_allclose(mixed, jnp.stack([changed[0], plain[1], changed[2]]), atol=1e-5)


def test_a_linear_general_over_several_axes_that_are_not_the_last():
    model = nnx.Dict(general=nnx.LinearGeneral((4, 3), (2, 5), axis=(-2, 1), rngs=nnx.Rngs(0)))
    adapted = tiny.trained(model, targets=["general"])
    x = np.random.default_rng(0).standard_normal((6, 4, 3, 7)).astype(np.float32)
    assert adapted.general(x).shape == (6, 7, 2, 5)
    np.testing.assert_allclose(merge(adapted).general(x), adapted.general(x), atol=1e-5)
