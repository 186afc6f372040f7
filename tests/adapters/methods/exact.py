"""A method's arithmetic against a transcription in float64: what an adapted layer and its merged weight compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.adapters.inject import inject, site_modules
from lora_jax.adapters.merge import merge
from tests import tiny

Arrays = dict[str, np.ndarray]


def layer(inputs: int, outputs: int) -> Any:
    """A model of one linear layer; `targets: all-linear` finds it."""
    return tiny.random_model(lambda: nnx.Sequential(nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0))))


def start(inputs: int = 12, outputs: int = 8, *, seed: int = 1, **values: Any) -> Any:
    """The adapted layer of such a model, at step 0."""
    (site,) = site_modules(inject(layer(inputs, outputs), tiny.adapter(targets="all-linear", **values), rngs=nnx.Rngs(seed))).values()
    return site


def check(change: Callable[[Arrays, np.ndarray], np.ndarray], inputs: int = 12, outputs: int = 8, **values: Any) -> None:
    """Outputs and merged weight of a layer with random numbers in its trained arrays are those of a transcription, to 1e-5.

    Args:
        change: of the method's arrays and the weight (inputs, outputs), in float64, what is added to the weight.
        inputs, outputs: of the layer.
        values: of the method's section.
    """
    model = inject(layer(inputs, outputs), tiny.adapter(targets="all-linear", **values), rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    (site,) = site_modules(model).values()
    arrays: Arrays = {}
    for name, parameter in site.method.parameters(site.site, values["rank"]).items():
        if parameter.trained:
            variable = getattr(site, name)
            variable.set_value(jnp.asarray(variable[...] + rng.standard_normal(variable.shape), jnp.float32))
        arrays[name] = np.asarray(getattr(site, name)[...], np.float64)
    x = rng.standard_normal((5, inputs)).astype(np.float32)
    weight, bias = (np.asarray(v[...], np.float64) for v in (site.base.kernel, site.base.bias))
    wanted = weight + change(arrays, weight)
    assert tiny.relative(wanted, weight) > 1e-2
    assert tiny.relative(tiny.outputs(model, x), x @ wanted + bias) < 1e-5
    assert tiny.relative(tiny.outputs(merge(model), x), x @ wanted + bias) < 1e-5
    if (factors := site.method.low_rank(site)) is not None:
        a, b, scale = (np.asarray(f, np.float64) for f in factors)
        assert tiny.relative(scale * a @ b, change(arrays, weight)) < 1e-5
