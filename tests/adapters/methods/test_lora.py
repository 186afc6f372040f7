"""A site's arithmetic: the gradient of B as it is taken here, against JAX's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.adapters.methods.lora import widened


def factors(*lead: int, rank: int = 3, outputs: int = 10, dtype=jnp.float32):
    low, b, dy = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(*lead, rank), (rank, outputs), (*lead, outputs)]))
    return low.astype(dtype), b.astype(dtype), dy.astype(dtype)


@pytest.mark.parametrize("lead", [(7,), (2, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_a_product(lead, dtype):
    low, b, dy = factors(*lead, dtype=dtype)
    y, back = jax.vjp(widened, low, b)
    expected, plain = jax.vjp(jnp.matmul, low, b)
    np.testing.assert_array_equal(y, expected)
    for ours, theirs in zip(back(dy), plain(dy), strict=True):
        assert ours.dtype == theirs.dtype == dtype
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=1e-5 if dtype == jnp.float32 else 0.02, atol=1e-5)


def test_members_side_by_side():
    low, b, dy = (jnp.stack([x, 2 * x]) for x in factors(2, 5))
    both = jax.vmap(lambda low, b, dy: jax.vjp(widened, low, b)[1](dy))(low, b, dy)
    for member in range(2):
        for packed, alone in zip(both, jax.vjp(widened, low[member], b[member])[1](dy[member]), strict=True):
            np.testing.assert_allclose(packed[member], alone, rtol=1e-6)


def test_what_is_large_is_not_turned_over():
    """The first of two matrices is the one that a CPU turns over, where the sum is over its rows."""
    low, b, dy = factors(64, rank=2, outputs=48)

    def first_of(product):
        jaxpr = jax.make_jaxpr(lambda low, b, dy: jax.vjp(product, low, b)[1](dy)[1])(low, b, dy)
        (eqn,) = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general" and e.params["dimension_numbers"][0] == ((0,), (0,))]
        return eqn.invars[0].aval.shape

    assert first_of(jnp.matmul) == dy.shape  # else there is no more need of our own
    assert first_of(widened) == low.shape
