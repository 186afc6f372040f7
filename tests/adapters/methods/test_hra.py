"""HRA against its equation in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.bank import AdapterBank
from lora_jax.adapters.inject import inject, site_modules
from lora_jax.adapters.layout import resolve
from lora_jax.adapters.merge import merged_arrays
from lora_jax.adapters.methods.hra import reflections
from lora_jax.errors import InputError
from tests import tiny

INPUTS, OUTPUTS = 24, 10


def site_of(rank: int, nested: bool = True) -> Any:
    net = nnx.Sequential(nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(0)))
    config = tiny.adapter(method="hra", rank=rank, targets="all-linear", nested_init=nested)
    (site,) = site_modules(inject(net, config, rngs=nnx.Rngs(1))).values()
    return site


@pytest.mark.parametrize("rank", [2, 6, 24])
def test_it_computes_what_the_equation_says(rank: int) -> None:
    site = site_of(rank)
    u = np.random.default_rng(0).standard_normal((INPUTS, rank))
    site.u.set_value(jnp.asarray(u, jnp.float32))
    h = np.eye(INPUTS)
    for column in u.T:
        h = h @ (np.eye(INPUTS) - 2 * np.outer(column, column) / (column @ column))
    x = np.random.default_rng(2).standard_normal((5, INPUTS))
    kernel, bias = (np.asarray(v[...], np.float64) for v in (site.base.kernel, site.base.bias))
    expected = x @ (kernel.T @ h).T + bias
    assert tiny.relative(site(jnp.asarray(x, jnp.float32)), expected) < 1e-5
    weight, _ = merged_arrays(site)
    assert tiny.relative(x @ np.asarray(weight) + bias, expected) < 1e-5
    a, b, scale = (np.asarray(v, np.float64) for v in site.method.low_rank(site))
    assert a.shape == (INPUTS, rank) and tiny.relative(x @ (kernel + scale * a @ b) + bias, expected) < 1e-5


def test_it_starts_in_equal_pairs_of_peft_s_length() -> None:
    u = np.asarray(site_of(8).u[...])
    np.testing.assert_array_equal(u[:, ::2], u[:, 1::2])
    assert 0.45 < np.abs(u).max() <= 0.5  # kaiming_uniform of the (inputs, 4) half: 1 / sqrt(4)
    small = np.asarray(site_of(4).u[...])
    np.testing.assert_allclose(small / np.sqrt(2), u[:, :4], rtol=1e-6)
    assert not np.allclose(np.asarray(site_of(4, nested=False).u[...]) / np.sqrt(2), u[:, :4])


def test_columns_of_zeros_reflect_nothing_and_stay() -> None:
    u = np.zeros((INPUTS, 6), np.float32)
    u[:, :2] = np.random.default_rng(0).standard_normal((INPUTS, 2))

    def product(u: Any) -> Any:
        unit, t = reflections(u)
        return jnp.eye(INPUTS) - unit @ t @ unit.T

    np.testing.assert_allclose(product(jnp.asarray(u)), product(jnp.asarray(u[:, :2])), atol=1e-6)
    gradient = jax.grad(lambda u: (product(u) ** 3).sum())(jnp.asarray(u))
    assert np.isfinite(gradient).all() and np.abs(gradient[:, :2]).max() > 0
    np.testing.assert_array_equal(gradient[:, 2:], 0)


@pytest.mark.slow
def test_rows_of_a_batch_take_their_own_adapters() -> None:
    model, tokens = tiny.encoder(2), np.arange(1, 13, dtype=np.int32).reshape(2, 6)
    bank, outputs = AdapterBank(model), []
    for seed, layers in enumerate((None, "last:1")):
        adapted = inject(model, tiny.adapter(method="hra", rank=4, layers=layers, targets=["q_proj", "down_proj"]), rngs=nnx.Rngs(seed))
        for site in site_modules(adapted).values():
            noise = np.random.default_rng(seed).standard_normal(site.u.shape)
            site.u.set_value(jnp.asarray(site.u[...] + 0.3 * noise, jnp.float32))
        bank.add(f"own{seed}", adapted)
        outputs.append(tiny.outputs(adapted, tokens))
    mixed = tiny.outputs(bank.mixed(["own1", "own0"]), tokens)
    assert tiny.relative(mixed[0], outputs[1][0]) < 1e-5 and tiny.relative(mixed[1], outputs[0][1]) < 1e-5
    assert tiny.relative(mixed[0], outputs[0][0]) > 1e-3


def test_what_it_cannot_do_is_said() -> None:
    model = tiny.encoder(2)
    with pytest.raises(InputError, match=r"adapter\.rank: 3 .*even"):
        resolve(model, tiny.adapter(method="hra", rank_pattern={"q_proj": 3}))
    with pytest.raises(InputError, match=r"adapter\.dropout"):
        resolve(model, tiny.adapter(method="hra", dropout=0.1))
