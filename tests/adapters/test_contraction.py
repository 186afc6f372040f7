"""Linear layers over several axes as sites: `nnx.Einsum`, as far as it is a plain contraction, and `nnx.LinearGeneral`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.bank import AdapterBank
from lora_jax.adapters.contraction import flat_kernel, own_kernel
from lora_jax.adapters.inject import inject
from lora_jax.adapters.merge import merge, merged_base, unmerge
from lora_jax.adapters.partition import partition
from lora_jax.adapters.sites import find_sites, passed_over
from lora_jax.adapters.targets import select
from lora_jax.errors import InputError
from lora_jax.training.adapter_files import load_adapter, save_adapter
from tests import tiny

# Einsum, kernel, bias, input -> inputs and outputs of the site, shape of the result.
PLAIN = {
    "btd,dh->bth": ((4, 6), (6,), (3, 5, 4), (4, 6), (3, 5, 6)),
    "BTD,NDH->BTNH": ((2, 4, 3), (2, 3), (3, 5, 4), (4, 6), (3, 5, 2, 3)),
    "BSD,2KDH->2BSKH": ((2, 2, 4, 3), (2, 2, 3), (3, 5, 4), (4, 12), (2, 3, 5, 2, 3)),
    "BTNH,NHD->BTD": ((2, 3, 4), (4,), (3, 5, 2, 3), (6, 4), (3, 5, 4)),
    "bhtn,hon->tbo": ((2, 4, 3), (4,), (3, 2, 5, 3), (6, 4), (5, 3, 4)),
    "...d,hd->...h": ((6, 4), (6,), (3, 5, 4), (4, 6), (3, 5, 6)),
    "d...e,ed->...d": ((4, 7), None, None, None, None),
    "d...e,edh->h...": ((4, 2, 6), (6,), (2, 3, 5, 4), (8, 6), (6, 3, 5)),
}
ALLOWED = [spec for spec, case in PLAIN.items() if case[2] is not None]


def einsum_net(spec: str, bias: bool = True) -> nnx.Dict:
    kernel, own, *_ = PLAIN[spec]
    return nnx.Dict(ein=nnx.Einsum(spec, kernel, own if bias else None, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spec", ALLOWED)
def test_a_plain_einsum_is_a_site(spec, bias):
    _, _, shape, sizes, result = PLAIN[spec]
    model = einsum_net(spec, bias)
    assert [(s.name, s.kind, (s.inputs, s.outputs), s.biased) for s in find_sites(model)] == [("ein", "linear", sizes, bias)]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    plain, adapted = model.ein(x), tiny.trained(model, targets=["ein"])
    assert plain.shape == result
    start: Any = inject(model, tiny.adapter(targets=["ein"]), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(start.ein(x), plain)
    changed = adapted.ein(x)
    assert changed.shape == result and np.abs(changed - plain).max() > 0.01
    merged: Any = merge(adapted)
    folded: Any = merged_base(adapted)
    undone: Any = unmerge(merged)
    np.testing.assert_allclose(merged.ein(x), changed, atol=1e-5)
    np.testing.assert_allclose(folded.ein(x), changed, atol=1e-5)
    assert type(folded.ein) is nnx.Einsum
    np.testing.assert_array_equal(undone.ein(x), changed)


@pytest.mark.parametrize("spec", ALLOWED)
def test_the_update_is_the_one_of_an_equal_linear_layer(spec):
    """What the adapter adds is the einsum of the input with the update, put back into the kernel's own axes."""
    model, shape = einsum_net(spec), PLAIN[spec][2]
    adapted = tiny.trained(model, targets=["ein"])
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    site = adapted.ein
    update = own_kernel(model.ein, site.method.merged(site, jnp.zeros((site.site.inputs, site.site.outputs)), None)[0])
    np.testing.assert_array_equal(own_kernel(model.ein, flat_kernel(model.ein, model.ein.kernel[...])), model.ein.kernel[...])
    np.testing.assert_allclose(adapted.ein(x) - model.ein(x), jnp.einsum(spec, x, update), atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "kernel", "said"),
    [
        ("bhd,hdk->bhk", (2, 4, 3), "axis h is a batch axis"),
        ("bd,dhk->bh", (4, 2, 3), "the kernel is summed over its axis k"),
        ("btd,dh->bh", (4, 3), "the input is summed over its axis t"),
        ("bt,dh->btdh", (4, 3), "the kernel has no axis of inputs"),
        ("btd,d->bt", (4,), "the kernel has no axis of outputs"),
        ("bd,...dh->b...h", (2, 4, 3), "the kernel has an ellipsis"),
        ("...d,dh->h", (4, 3), "the input is summed over its axis ..."),
        ("bdd,dh->bh", (4, 3), "an axis stands twice in a term"),
        ("d...e,ed->...d", (4, 7), "axis d is a batch axis"),
    ],
)
def test_any_other_einsum_is_refused_by_name_and_reason(spec, kernel, said):
    model = nnx.Dict(
        ein=nnx.Einsum(spec, kernel, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0)), lin=nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    )
    why = f"nnx.Einsum '{spec}' is no plain contraction with its kernel: {said}"
    assert passed_over(model) == {"ein": why} and [s.name for s in find_sites(model)] == ["lin"]
    with pytest.raises(InputError) as error:
        inject(model, tiny.adapter(targets=["ein"]), rngs=nnx.Rngs(0))
    assert str(error.value) == f"adapter.targets: 'ein' means ein, which cannot be adapted: {why}."
    with pytest.warns(UserWarning, match="passes over 1"):
        select(find_sites(model), "all-linear", None, None, passed_over(model))


class Mine(nnx.Einsum):
    def __call__(self, x, *more):
        return 2 * super().__call__(x, *more)


def test_what_computes_something_else_of_its_kernel_is_refused():
    other = nnx.Einsum("bd,dh->bh", (4, 3), einsum_op=lambda *args, **more: 2 * jnp.einsum(*args, **more), rngs=nnx.Rngs(0))
    model = nnx.Dict(mine=Mine("bd,dh->bh", (4, 3), rngs=nnx.Rngs(0)), other=other)
    passed = passed_over(model)
    assert find_sites(model) == [] and set(passed) == {"mine", "other"}
    assert passed["mine"].startswith("a subclass of nnx.Einsum that has a __call__") and "einsum_op" in passed["other"]


def test_another_einsum_at_the_call_is_refused():
    adapted = tiny.trained(einsum_net("btd,dh->bth"), targets=["ein"])
    x = np.ones((3, 5, 4), np.float32)
    np.testing.assert_array_equal(adapted.ein(x, None), adapted.ein(x))
    for call in (lambda: adapted.ein(x, "btd,dh->bh"), lambda: adapted.ein(x, einsum_str="btd,dh->bh")):
        with pytest.raises(InputError, match="ein: an adapted site computes the einsum it was made with"):
            call()


class Attention(nnx.Module):
    """Gemma's projections: einsums throughout."""

    def __init__(self, rngs):
        self.q_proj = nnx.Einsum("BTD,NDH->BTNH", (2, 8, 4), rngs=rngs)
        self.kv_proj = nnx.Einsum("BSD,2KDH->2BSKH", (2, 2, 8, 4), rngs=rngs)
        self.o_proj = nnx.Einsum("BTNH,NHD->BTD", (2, 4, 8), (8,), rngs=rngs)

    def __call__(self, x):
        q, (k, v) = self.q_proj(x), self.kv_proj(x)
        return x + self.o_proj(jax.nn.dot_product_attention(q, k, v))


class Stacked(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(Attention, in_axes=0)(rngs.fork(split=3))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_stacked_einsums_are_adapted_merged_mixed_trained_and_saved(tmp_path):
    model = Stacked(nnx.Rngs(0))
    sites = {s.name: s for s in find_sites(model)}
    assert {n: (s.depth, s.inputs, s.outputs) for n, s in sites.items()} == {
        "layers.q_proj": (3, 8, 8), "layers.kv_proj": (3, 8, 16), "layers.o_proj": (3, 8, 8)
    }  # fmt: skip
    adapted = tiny.trained(model, targets="all-linear")
    x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
    plain, changed = model(x), adapted(x)
    assert np.abs(changed - plain).max() > 0.01
    np.testing.assert_allclose(merge(adapted)(x), changed, atol=1e-5)
    np.testing.assert_allclose(merged_base(adapted)(x), changed, atol=1e-5)
    np.testing.assert_array_equal(unmerge(merge(adapted))(x), changed)

    part = partition(adapted)
    assert {n.rpartition(".")[2] for n in part.trainable} == {"lora_a", "lora_b"}
    grads = jax.grad(lambda arrays: (part.merge(arrays, part.settings, part.frozen, training=True)(x) ** 2).sum())(part.trainable)
    assert all(np.abs(g).max() > 0 for g in grads.values())
    identity = {"base": "f", "method": "lora", "sites": {}}
    save_adapter(tmp_path / "final", part.trainable, identity)
    back = load_adapter(tmp_path / "final", part.trainable, identity)
    np.testing.assert_array_equal(part.merge(back, part.settings, part.frozen, training=False)(x), changed)


def test_a_mixed_batch_over_einsums():
    model = nnx.Dict(attn=Attention(nnx.Rngs(0)))
    adapted = tiny.trained(model, targets=["q_proj", "o_proj"])
    x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
    bank = AdapterBank(model)
    bank.add("one", adapted)
    mixed: Any = bank.mixed(["one", None, "one"])
    np.testing.assert_allclose(mixed.attn(x), jnp.stack([adapted.attn(x)[0], model.attn(x)[1], adapted.attn(x)[2]]), atol=1e-5)


@pytest.mark.parametrize("options", [{"use_bias": False}, {"normalize_qk": True}, {"in_features": 8, "out_features": 6}])
def test_the_projections_of_flax_attention(options):
    model = nnx.Dict(attn=nnx.MultiHeadAttention(2, **({"in_features": 8} | options), qkv_features=12, decode=False, rngs=nnx.Rngs(0)))
    assert {s.name for s in find_sites(model)} == {f"attn.{name}" for name in ("query", "key", "value", "out")} and not passed_over(model)
    adapted = tiny.trained(model, targets="attention")
    merged: Any = merged_base(adapted)
    x: Any = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
    assert np.abs(adapted.attn(x) - model.attn(x)).max() > 0.01
    np.testing.assert_allclose(merged.attn(x), adapted.attn(x), atol=1e-5)
