"""DeLoRA, low-rank updates whose angle and strength are apart (arXiv:2503.18225, eq. 9): `h = W x + B D A (n * x)`.

A (r x in), B (out x r), D = lambda / r over |row of A| |column of B|, n the norms of the weight's columns, one an input. The update's norm
is at most lambda, which trains. Norms below 1e-4 count as 1e-4, and have no gradient: B is 0 at the start, and so the first gradient is
some thousand times those that follow; clip it with care. Here x is a row, so A is stored (in, r) and B (r, out). There is no alpha.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, PositiveFloat

from ...config.schema import AdapterConfig
from ...models.layers import Rows
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, refuse_alpha, register_method
from .lora import widened

_SMALLEST = 1e-4


class DeloraSection(AdapterConfig):
    method: Literal["delora"] = Field(default="delora", description="Low-rank updates of bounded norm (arXiv:2503.18225).")
    delora_lambda: PositiveFloat = Field(default=15.0, description="Bound of the update's norm at the start; it trains.")


class Delora(Method):
    """Low-rank updates with normalised ranks.

    The init is PEFT's: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, lambda from the section; the norms are of the base's weight.
    """

    name, section = "delora", DeloraSection
    kinds = ("linear",)
    dropout_kinds = ("linear",)
    setting_names = ("inverse_rank",)
    packs = "low-rank"
    self_padding = True

    def check(self, config: DeloraSection, site: Site, rank: int) -> None:
        refuse_alpha(config)

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        return {
            "a": Parameter((site.inputs, rank), axes=("in", None)),
            "b": Parameter((rank, site.outputs), axes=(None, "out")),
            "bound": Parameter((1,), axes=(None,)),
            "weight_norm": Parameter((site.inputs,), axes=("in",), trained=False),
        }

    def settings(self, config: DeloraSection, rank: int, alpha: float) -> dict[str, float]:
        return {"inverse_rank": 1 / rank}

    def init(self, site: Site, rank: int, config: Any, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        drawn = 2 * random.random((rank, site.inputs), np.float32) - 1  # rank after rank (`adapter.nested_init`)
        start = np.array([config.delora_lambda], np.float32)
        return {"a": drawn.T / np.float32(np.sqrt(site.inputs)), "bound": start, "weight_norm": np.linalg.norm(data.weight(), axis=1)}

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        a, b, strength, norm = (v.astype(y.dtype) for v in (module.a[...], module.b[...], _strength(module), module.weight_norm[...]))
        low = jnp.matmul(module.drop(inputs[0], rows).astype(y.dtype) * norm, a)
        return y + widened(low * strength, b)

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        a, b, _ = self.low_rank(module)
        return weight + jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST), bias

    def low_rank(self, module: AdaptedSite) -> tuple[jax.Array, jax.Array, jax.Array]:
        a = module.weight_norm[...][..., None] * module.a[...] * _strength(module)[..., None, :]
        return a, module.b[...], jnp.ones_like(module.inverse_rank[...])


def _strength(module: AdaptedSite) -> jax.Array:
    """(..., rank): what each rank is multiplied by."""
    product = _norm(module.a[...], -2) * _norm(module.b[...], -1)
    return module.bound[...] * module.inverse_rank[...][..., None] / product


def _norm(x: jax.Array, axis: int) -> jax.Array:
    squared = jnp.square(x).sum(axis)
    counts = squared > _SMALLEST**2
    return jnp.where(counts, jnp.sqrt(jnp.where(counts, squared, 1.0)), _SMALLEST)  # of 0 a root has no finite gradient


register_method("delora", Delora())
