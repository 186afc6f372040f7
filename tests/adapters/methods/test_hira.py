"""HiRA: its equation at both kinds of site, and what it has no use for."""

from __future__ import annotations

import numpy as np
from flax import nnx

from lora_jax.adapters.inject import inject, site_modules
from tests import tiny
from tests.adapters.methods import exact


def test_the_equation():
    exact.check(lambda a, weight: weight * (a["a"] @ a["b"]), method="hira", rank=3)


def test_an_embedding_row_by_row():
    model = tiny.random_model(lambda: nnx.Sequential(nnx.Embed(9, 6, rngs=nnx.Rngs(0))))
    model = inject(model, tiny.adapter(method="hira", rank=2, targets=["layers.0"]), rngs=nnx.Rngs(0))
    (site,) = site_modules(model).values()
    assert not np.any(site.a[...]) and np.any(site.b[...])
    site.a.set_value(np.float32(np.random.default_rng(0).standard_normal((9, 2))))
    weight, a, b = (np.asarray(v[...], np.float64) for v in (site.base.embedding, site.a, site.b))
    tokens = np.array([[3, 8, 3], [0, 1, 2]], np.int32)
    assert tiny.relative(tiny.outputs(model, tokens), (weight + weight * (a @ b))[tokens]) < 1e-5
