"""LoRA-FA's gradient of B against the paper's, and the A that stays."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.inject import inject
from lora_jax.adapters.layout import resolve
from lora_jax.adapters.parameters import SiteArrays
from lora_jax.config.doors import METHODS
from lora_jax.errors import InputError
from lora_jax.packing.pack import Pack
from tests import tiny

METHOD = METHODS.get("lora_fa", "adapter.method")


def test_bs_gradient_is_the_papers():
    """The step of B nearest to the full weight's gradient G: `argmin |s A X - G|` is `(A^T A)^-1 A^T G / s`, and dL/dB is `s A^T G`."""
    rng = np.random.default_rng(0)
    a, g, scale = rng.standard_normal((2, 9, 3)), rng.standard_normal((2, 9, 5)), np.array([2.0, 0.5])
    a[1, :, 2] = 0  # the second layer's rank is 2
    gradient = scale[:, None, None] * np.swapaxes(a, 1, 2) @ g
    of = SiteArrays(lora_a=jnp.asarray(a, jnp.float32), scale=jnp.asarray(scale, jnp.float32))
    given = {"q.lora_b": jnp.asarray(gradient, jnp.float32), "head.kernel": jnp.ones(2)}
    found = METHOD.preconditioned(given, {"q": of})
    for layer, rank in enumerate((3, 2)):
        nearest = np.linalg.lstsq(scale[layer] * a[layer, :, :rank], g[layer])[0]
        assert tiny.relative(found["q.lora_b"][layer, :rank], nearest) < 1e-5
    assert not np.any(found["q.lora_b"][1, 2]) and np.array_equal(found["head.kernel"], given["head.kernel"])


def test_a_layer_that_is_not_adapted_stays():
    of = SiteArrays(lora_a=jnp.zeros((2, 9, 3)), scale=jnp.zeros(2))
    assert not np.any(METHOD.preconditioned({"q.lora_b": jnp.zeros((2, 3, 5))}, {"q": of})["q.lora_b"])


def test_a_is_drawn_and_not_trained():
    pack = Pack.build(tiny.classifier(2), [tiny.config(adapter__method="lora_fa", adapter__targets=["q_proj"])], 1)
    name = "base.layers.attn.q_proj.lora_a"
    assert name in pack.part.settings and name not in pack.part.trainable and np.abs(pack.fixed.settings[name]).min() > 0
    assert pack.parameter_count(0) == 2 * 4 * 32 + 32 * 3 + 3


def test_what_it_cannot_do_is_said():
    model = tiny.encoder(2)
    with pytest.raises(InputError, match=r"adapter\.targets.*lora_fa.*embed"):
        resolve(model, tiny.adapter(method="lora_fa", targets="embedding"))
    with pytest.raises(InputError, match=r"adapter\.rank.*32"):
        resolve(model, tiny.adapter(method="lora_fa", targets=["q_proj"], rank=33))
    for init, told in (("mica", "trains A alone"), ("zero_a", "starts A at 0")):
        with pytest.raises(InputError, match=rf"adapter\.init.*{told}"):
            inject(model, tiny.adapter(method="lora_fa", targets=["q_proj"], init=init), rngs=nnx.Rngs(0))
