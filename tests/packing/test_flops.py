"""The count of arithmetic, against XLA's own of the same step with its loops unrolled."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from lora_jax.models.experts import grouped_matmul
from lora_jax.packing.cost import count_flops
from lora_jax.packing.pack import Pack
from lora_jax.tasks.objectives import cross_entropy
from lora_jax.training.optimizer import hyper_of
from lora_jax.training.step import MemberFixed, init_member, train_step
from tests import tiny


def test_products_convolutions_and_loops():
    a, b = jnp.ones((2, 3)), jnp.ones((3, 5))
    assert count_flops(jax.make_jaxpr(jnp.matmul)(a, b)) == 2 * 2 * 3 * 5
    assert count_flops(jax.make_jaxpr(lambda a, b: (a @ b, a @ b)[0])(a, b)) == 60  # the other is dropped
    assert count_flops(jax.make_jaxpr(jax.vmap(jnp.matmul, in_axes=(0, None)))(jnp.ones((7, 2, 3)), b)) == 7 * 60
    square = jnp.ones((4, 4))
    loop = jax.make_jaxpr(lambda x: jax.lax.scan(lambda c, _: (jax.jit(jnp.matmul)(c, x), None), x, length=6)[0])(square)
    assert count_flops(loop) == 6 * 128
    both = jax.make_jaxpr(lambda p, x: jax.lax.cond(p, lambda x: x @ x, lambda x: x, x))(True, square)
    assert count_flops(both) == 128
    x, weights, groups = jnp.ones((7, 3)), jnp.ones((2, 3, 5)), jnp.zeros(7, int)
    assert count_flops(jax.make_jaxpr(grouped_matmul)(x, weights, groups)) == 2 * 7 * 3 * 5
    slopes = jax.make_jaxpr(jax.grad(lambda *a: jnp.sum(grouped_matmul(*a, groups) ** 2), (0, 1)))(x, weights)
    assert count_flops(slopes) == 3 * 2 * 7 * 3 * 5
    image, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 16))
    conv = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert count_flops(jax.make_jaxpr(conv)(image, kernel)) == 2 * 8 * 8 * 16 * 3 * 3 * 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", pytest.param("decoder", marks=pytest.mark.long)])
def test_a_step_against_xlas_own_count(kind, monkeypatch):
    """XLA counts elementwise operations too, and a loop's body once: unrolled, it must come to about as much as the products."""
    causal = kind == "decoder"
    model = tiny.language_model(3, width=128) if causal else tiny.classifier(3, width=128)
    config = tiny.config(adapter__rank=8, adapter__targets="all-linear")
    pack = Pack.build(model, [config], 10)
    batch = tiny.batch(rows=8, length=32, causal=causal)
    fixed = MemberFixed(hyper_of(config, 10), pack.part.settings, None)
    state = jax.eval_shape(lambda t: init_member(pack.part, t, fixed), pack.part.trainable)
    args = (state, fixed, pack.part.frozen, batch, jnp.int32(0), jax.random.key(0))

    def step(*args):
        return train_step(pack.part, cross_entropy, *args)

    counted = count_flops(jax.make_jaxpr(step)(*args))
    rolled = jax.jit(step).lower(*args).cost_analysis()["flops"]
    scan = jax.lax.scan
    monkeypatch.setattr(jax.lax, "scan", lambda *a, **k: scan(*a, **{**k, "unroll": True}))
    unrolled = jax.jit(lambda *a: step(*a)).lower(*args).compile().cost_analysis()["flops"]
    print({"counted": counted, "unrolled": unrolled, "counted / unrolled": counted / unrolled, "rolled / unrolled": rolled / unrolled})
    assert 0.9 * unrolled < counted <= 1.05 * unrolled  # unrolled, the lowest layer has no gradient for what is below it
