"""DeLoRA: its equation, its bound, and its first gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.adapters.methods.delora import DeloraSection
from tests.adapters.methods import exact


def test_the_equation():
    def change(a: exact.Arrays, weight: np.ndarray) -> np.ndarray:
        assert np.allclose(a["weight_norm"], np.linalg.norm(weight, axis=1), rtol=1e-6)
        unit_a, unit_b = a["a"] / np.linalg.norm(a["a"], axis=0), a["b"] / np.linalg.norm(a["b"], axis=1)[:, None]
        return a["weight_norm"][:, None] * (unit_a * a["bound"] / 3) @ unit_b

    exact.check(change, method="delora", rank=3, delora_lambda=0.7)


def test_the_first_gradient_is_large_and_finite():
    """B is 0: its norm counts as 1e-4, and gives no gradient, of which a root at 0 has none that is finite."""
    site = exact.start(method="delora", rank=2)
    graphdef, state = nnx.split(site)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 12)), jnp.float32)

    def loss(b, bound):
        module = nnx.merge(graphdef, jax.tree.map(lambda a: a, state))
        module.b.set_value(b)
        module.bound.set_value(bound)
        return module(x).sum()

    of_b, of_bound = jax.grad(loss, (0, 1))(site.b[...], site.bound[...])
    a, norm = np.asarray(site.a[...], np.float64), np.asarray(site.weight_norm[...], np.float64)
    wanted = ((np.asarray(x) * norm) @ a * 15 / 2 / (np.linalg.norm(a, axis=0) * 1e-4)).sum(0)
    np.testing.assert_allclose(of_b, np.repeat(wanted[:, None], 8, 1), rtol=1e-4)
    assert np.abs(of_b).max() > 1e4 and not np.any(of_bound)


def test_a_file_without_the_norms_has_those_of_the_weight():
    site = exact.start(method="delora", rank=2)
    form, section, weight = site.method.peft, DeloraSection(rank=2), np.asarray(site.base.kernel[...])
    arrays = {name: np.asarray(getattr(site, name)[...]) for name in ("a", "b", "bound", "weight_norm")}
    tensors = form.to_file(section, site.site, 2, arrays)
    assert {n: t.shape for n, t in tensors.items()} == form.tensors(section, site.site, 2)
    del tensors[form.optional[0]]
    found = form.from_file(section, site.site, 2, tensors, lambda: weight)
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
