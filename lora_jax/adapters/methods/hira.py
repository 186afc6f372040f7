"""HiRA, a Hadamard product with the weight (ICLR 2025, openreview TwJrTz9cRS, eq. 4): `h = W x + (W * (B A)) x`, A (r x in), B (out x r).

The change has the weight's rank. It is formed whole, an array of the weight's size a member, and formed anew for the backward pass. Here x
is a row, so A is stored (in, r) and B (r, out). There is no scale, and so no `adapter.alpha`.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...config.schema import AdapterConfig
from ...models.layers import Rows
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, refuse_alpha, register_method


class HiraSection(AdapterConfig):
    method: Literal["hira"] = Field(default="hira", description="Hadamard products with the weight, W + W * (B A) (openreview TwJrTz9cRS).")


class Hira(Method):
    """A Hadamard product of the weight and a low-rank matrix.

    The init is LoRA's: at a linear site A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0, at an embedding A = 0 and B ~ N(0, 1).
    """

    name, section = "hira", HiraSection
    kinds = ("linear", "embedding")
    dropout_kinds = ("linear",)
    packs = "weight-sized"
    self_padding = True

    def check(self, config: HiraSection, site: Site, rank: int) -> None:
        refuse_alpha(config)

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        return {"a": Parameter((site.inputs, rank), axes=("in", None)), "b": Parameter((rank, site.outputs), axes=(None, "out"))}

    def init(self, site: Site, rank: int, config: Any, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        if site.kind == "embedding":
            return {"b": random.standard_normal((rank, site.outputs), np.float32)}
        drawn = 2 * random.random((rank, site.inputs), np.float32) - 1  # rank after rank (`adapter.nested_init`)
        return {"a": drawn.T / np.float32(np.sqrt(site.inputs))}

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        a, b = module.a[...], module.b[...]
        if module.kind == "embedding":
            return y + (y * jnp.matmul(a[inputs[0]], b)).astype(y.dtype)
        return y + _changed(module.drop(inputs[0], rows).astype(y.dtype), module.base.kernel[...], a, b)

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        return weight + weight * jnp.matmul(module.a[...], module.b[...], precision=jax.lax.Precision.HIGHEST), bias

    def cost(self, site: Site, rank: int) -> int:
        return 2 * site.outputs * (rank if site.kind == "embedding" else site.inputs)


@jax.checkpoint  # or the change would be kept for the backward pass, and the product in it: two arrays of the weight's size a layer
def _changed(x: jax.Array, weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(x, (weight * jnp.matmul(a, b)).astype(x.dtype))


register_method("hira", Hira())
