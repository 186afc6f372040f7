"""Adapters on a mixture of experts: each expert has factors of its own, and everything else is as at any site."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.adapters.bank import AdapterBank
from lora_jax.adapters.describe import describe
from lora_jax.adapters.inject import inject, site_modules
from lora_jax.adapters.sites import find_sites
from lora_jax.config.schema import AdapterConfig
from lora_jax.errors import InputError
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")
TOKENS = np.random.default_rng(0).integers(1, tiny.VOCAB, (3, 9)).astype(np.int32)
UP, DOWN, ROUTER = "layers.mlp.experts.gate_up_proj", "layers.mlp.experts.down_proj", "layers.mlp.router"


@pytest.fixture(scope="module")
def mixtral():
    return tiny.decoder_of("mixtral")


def adapted_sites(model, targets) -> set[str]:
    return set(site_modules(inject(model, AdapterConfig(rank=2, targets=targets), rngs=tiny.nnx.Rngs(0))))


@pytest.mark.parametrize(
    ("targets", "sites"),
    [
        ("experts", {UP, DOWN}),
        (["gate_up_proj"], {UP}),
        (["mlp.experts.down_proj"], {DOWN}),
        (["gate"], {ROUTER}),
        (["router", "experts.down_proj"], {ROUTER, DOWN}),
        (r"model\.layers\.1\.mlp\.experts\..*", {UP, DOWN}),
    ],
)
def test_what_targets_name(mixtral, targets, sites):
    assert adapted_sites(mixtral, targets) == sites


def test_all_linear_leaves_experts_and_router_out_as_peft_does(mixtral):
    assert adapted_sites(mixtral, "all-linear") == {f"layers.attn.{p}_proj" for p in "qkvo"}


def test_each_expert_has_its_own_factors(mixtral):
    model = inject(mixtral, AdapterConfig(rank=2, targets="experts", layers="last:2"), rngs=tiny.nnx.Rngs(0))
    site = site_modules(model)[UP]
    assert site.lora_a.shape == (2, 4, 32, 2) and site.lora_b.shape == (2, 4, 2, 128)
    a = np.asarray(site.lora_a[...]).reshape(-1, 64)
    assert len(np.unique(a, axis=0)) == 8 and np.abs(a).max() <= 32**-0.5 and np.abs(a).max() > 0.9 * 32**-0.5
    (row,) = [r for r in describe(model).rows if r.name == UP]
    assert row.shape == (4, 32, 2, 128) and row.count == 2 * 4 * 2 * (32 + 128)
    assert tiny.outputs(model, TOKENS, bits=True).tobytes() == tiny.outputs(mixtral, TOKENS, bits=True).tobytes()


def test_a_smaller_rank_starts_as_the_leading_part_of_a_larger(mixtral):
    small, large = (
        site_modules(inject(mixtral, AdapterConfig(rank=r, targets="experts"), rngs=tiny.nnx.Rngs(0)))[UP].lora_a[...] for r in (2, 5)
    )
    np.testing.assert_array_equal(small, large[..., :2])


def test_dropout_on_experts_is_refused(mixtral):
    with pytest.raises(InputError, match=r"adapter\.dropout.*layers\.mlp\.experts\.down_proj"):
        inject(mixtral, AdapterConfig(targets="experts", dropout=0.1), rngs=tiny.nnx.Rngs(0))


def test_find_sites_counts_experts(mixtral):
    kinds = {s.name: (s.kind, s.depth, s.experts) for s in find_sites(mixtral) if "mlp" in s.name}
    assert kinds == {UP: ("expert", 3, 4), DOWN: ("expert", 3, 4), ROUTER: ("linear", 3, None)}


@pytest.mark.long
def test_adapters_on_experts_mix_and_combine(mixtral):
    """Each row as with its adapter alone, gathered positions too; a weighted sum of adapters changes the weights by the sum."""
    bank = AdapterBank(mixtral)
    bank.add("a", tiny.trained(mixtral, 1, targets=["experts.gate_up_proj", "q_proj"], rank=2))
    bank.add("b", tiny.trained(mixtral, 2, targets="experts", rank=3, layers="last:1"))
    rows = ["b", None, "a"]
    mixed, alone = bank.mixed(rows), [bank.use(name) for name in rows]
    whole = tiny.outputs(mixed, TOKENS)
    for row, model in enumerate(alone):
        np.testing.assert_allclose(whole[row], tiny.outputs(model, TOKENS)[row], rtol=1e-5, atol=1e-5)
    assert tiny.relative(whole, tiny.outputs(mixtral, TOKENS)) > 1e-3
    index = jnp.array([20, 3, 11])
    some, all_ = (tiny.outputs(mixed, TOKENS, method="hidden", **given) for given in ({"gather": index}, {}))
    np.testing.assert_allclose(some, all_.reshape(-1, tiny.WIDTH)[index], rtol=1e-5, atol=1e-5)
    bank.combine("sum", {"a": 0.5, "b": -2.0})
    updates = {name: site_modules(bank.use(name)) for name in ("a", "b", "sum")}
    expected = 0.5 * tiny.update_of(updates["a"][UP])
    expected = expected.at[-1].add(-2.0 * tiny.update_of(updates["b"][UP])[0])
    np.testing.assert_allclose(tiny.update_of(updates["sum"][UP]), expected, rtol=1e-4, atol=1e-5)
