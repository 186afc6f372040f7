"""DoRA against the paper's equation, and what its gradient and its memory must not have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.inject import inject, site_modules
from lora_jax.adapters.merge import merged_arrays
from tests import tiny

INPUTS, OUTPUTS, RANK, ROWS = 13, 11, 3, 5


def site(kind: str = "linear", *, start: bool = False, **values):
    """An adapted layer, away from its start or at it."""
    rngs = nnx.Rngs(0)
    layer = nnx.Linear(INPUTS, OUTPUTS, rngs=rngs) if kind == "linear" else nnx.Embed(INPUTS, OUTPUTS, rngs=rngs)
    if kind == "linear":
        layer.bias[...] = jax.random.normal(jax.random.key(1), (OUTPUTS,))
    targets = "all-linear" if kind == "linear" else ["0"]
    config = tiny.adapter(**{"method": "dora", "rank": RANK, "alpha": 5.0, "targets": targets} | values)
    (module,) = site_modules(inject(nnx.Sequential(layer), config, rngs=nnx.Rngs(2))).values()
    if not start:
        for i, name in enumerate(("lora_a", "lora_b", "magnitude")):
            array = getattr(module, name)
            array[...] = array[...] + 0.3 * jax.random.normal(jax.random.key(i), array.shape)
    return module


def transcribed(module) -> tuple[np.ndarray, np.ndarray]:
    """The base's weight and the adapted one, (inputs, outputs) float64: eq. 5."""
    w, a, b, m, s = (
        np.asarray(v[...], np.float64)
        for v in (getattr(module.base, module.weight), module.lora_a, module.lora_b, module.magnitude, module.scale)
    )
    direction = w + s * a @ b
    return w, m * direction / np.linalg.norm(direction, axis=0)


INPUT = np.random.default_rng(0).standard_normal((ROWS, INPUTS)).astype(np.float32)
TOKENS = np.array([0, 3, 12, 3], np.int32)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_it_is_the_papers_equation(kind):
    module = site(kind)
    _, weight = transcribed(module)
    bias = np.asarray(module.base.bias[...], np.float64) if kind == "linear" else None
    wanted, x = (INPUT @ weight + bias, INPUT) if bias is not None else (weight[TOKENS], TOKENS)
    assert tiny.relative(module(x), wanted) < 1e-5
    merged, kept = merged_arrays(module)
    assert tiny.relative(merged, weight) < 1e-5
    assert kept is None or np.array_equal(kept, module.base.bias[...])


@pytest.mark.parametrize("values", [{}, {"dropout": 0.5}, {"rslora": True}], ids=str)
def test_it_starts_as_the_base_bit_for_bit(values):
    module = site(start=True, **values)
    norm = np.linalg.norm(np.asarray(module.base.kernel[...], np.float64), axis=0)
    assert tiny.relative(module.magnitude[...], norm) < 1e-6
    for run in (lambda m, x: m(x), nnx.jit(lambda m, x: m(x))):
        np.testing.assert_array_equal(run(module, INPUT), run(module.base, INPUT))
    embedding = site("embedding", start=True)
    np.testing.assert_array_equal(embedding(TOKENS), embedding.base(TOKENS))


def test_an_output_without_weights_has_no_direction():
    layer = nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(0))
    layer.kernel[...] = layer.kernel[...].at[:, 2].set(0)
    adapted = inject(nnx.Sequential(layer), tiny.adapter(method="dora", targets="all-linear"), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(adapted(INPUT), layer(INPUT))
    (module,) = site_modules(adapted).values()
    module.lora_b[...] = jnp.ones_like(module.lora_b[...])
    assert np.isfinite(adapted(INPUT)).all() and np.abs(adapted(INPUT)[:, 2]).min() > 0


def test_dropout_is_of_the_bases_product_too():
    """As PEFT: `x W + bias + (g - 1) x' W + g s x' A B`, with one x'."""
    module = site(dropout=0.5)
    w, weight = transcribed(module)
    dropped = np.asarray(module.drop(INPUT, None), np.float64)
    assert 0 < (dropped == 0).mean() < 1
    wanted = INPUT @ w + np.asarray(module.base.bias[...]) + dropped @ (weight - w)
    assert tiny.relative(module(INPUT), wanted) < 1e-5


def test_the_norm_is_no_part_of_the_gradient():
    module = site()
    graphdef, trained, rest = nnx.split(module, nnx.LoRAParam, ...)
    target = jax.random.normal(jax.random.key(9), (ROWS, OUTPUTS))

    def plain(arrays):
        direction = module.base.kernel[...] + module.scale[...] * arrays["lora_a"] @ arrays["lora_b"]
        norm = jax.lax.stop_gradient(jnp.linalg.norm(direction, axis=0))
        return (INPUT @ (arrays["magnitude"] * direction / norm) * target).sum()

    found = jax.grad(lambda t: (nnx.merge(graphdef, t, rest)(INPUT) * target).sum())(trained)
    wanted = jax.grad(plain)({name: getattr(module, name)[...] for name in ("lora_a", "lora_b", "magnitude")})
    for name, array in wanted.items():
        assert tiny.relative(found[name][...], array) < 1e-5, name


def test_no_member_has_an_array_as_large_as_the_weight():
    module = site()
    graphdef, trained, rest = nnx.split(module, nnx.LoRAParam, ...)
    members = jax.tree.map(lambda a: jnp.stack([a, 2 * a, 3 * a]), trained)

    def gradient(trained, x):
        return jax.grad(lambda t: (nnx.merge(graphdef, t, rest)(x) ** 2).sum())(trained)

    text = jax.jit(jax.vmap(gradient, in_axes=(0, None))).lower(members, INPUT).as_text()
    sizes = (f"tensor<3x{INPUTS}x{OUTPUTS}xf32>", f"tensor<3x{OUTPUTS}x{INPUTS}xf32>")
    assert f"tensor<3x{RANK}x{OUTPUTS}xf32>" in text
    assert not any(size in text for size in sizes)
