"""LoRA (arXiv:2106.09685, eq. 3): `h = W x + s B A x`, A (r x in), B (out x r), scale s = alpha / r.

Here x is a row, so A is stored (in, r) and B (r, out).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...config.schema import AdapterConfig
from ...models.experts import grouped_matmul
from ...models.layers import Rows
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, register_method


class LoraSection(AdapterConfig):
    method: Literal["lora"] = Field(default="lora", description="Low-rank updates W + s A B (arXiv:2106.09685).")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) (arXiv:2312.03732) in place of alpha / rank.")


class Lora(Method):
    """Low-rank updates, `W + scale * A B`.

    The default init is PEFT's: at a linear site A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0 (kaiming_uniform with a = sqrt 5); at an
    embedding A = 0 and B ~ N(0, 1). Each expert draws its own.
    """

    name, section = "lora", LoraSection
    kinds = ("linear", "embedding", "expert")
    dropout_kinds = ("linear", "embedding")  # none on experts, as in PEFT; an embedding's input is an index, and nothing of it is dropped
    setting_names = ("scale",)
    packs = "low-rank"
    self_padding = True

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        lead, experts = ((), ()) if site.experts is None else ((site.experts,), ("experts",))
        return {
            "lora_a": Parameter((*lead, site.inputs, rank), "adapter_a", (*experts, "in", None)),
            "lora_b": Parameter((*lead, rank, site.outputs), "adapter_b", (*experts, None, "out")),
        }

    def settings(self, config: LoraSection, rank: int, alpha: float) -> dict[str, float]:
        return {"scale": alpha / np.sqrt(rank) if config.rslora else alpha / rank}

    def init(self, site: Site, rank: int, config: Any, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        # Rank after rank is drawn, so that a smaller rank starts as the leading part of a larger (`adapter.nested_init`).
        if site.kind == "embedding":
            return {"lora_b": random.standard_normal((rank, site.outputs), np.float32)}
        experts = () if site.experts is None else (site.experts,)
        drawn = 2 * random.random((rank, *experts, site.inputs), np.float32) - 1
        return {"lora_a": np.moveaxis(drawn, 0, -1) * np.float32(1 / np.sqrt(site.inputs))}

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        a, b, scale = (v[...].astype(y.dtype) for v in (module.lora_a, module.lora_b, module.scale))
        if module.kind == "embedding":
            return y + widened(a[inputs[0]] * scale, b)
        if module.kind == "expert":
            x, expert = inputs
            return y + grouped_matmul(grouped_matmul(x.astype(y.dtype), a, expert) * scale, b, expert)
        low = jnp.matmul(module.drop(inputs[0], rows).astype(y.dtype), a)
        return y + widened(low * scale, b)

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        a, b, scale = (v[...] for v in (module.lora_a, module.lora_b, module.scale))
        scale = scale.reshape(*scale.shape, *[1] * (a.ndim - scale.ndim))
        return weight + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST), bias

    def low_rank(self, module: AdaptedSite) -> tuple[jax.Array, jax.Array, jax.Array]:
        return module.lora_a[...], module.lora_b[...], module.scale[...]

    def of_low_rank(self, a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
        return {"lora_a": a, "lora_b": b, "scale": scale}


@jax.custom_vjp
def widened(low: jax.Array, b: jax.Array) -> jax.Array:
    """`low @ b`, (..., r) by (r, outputs), with B's gradient as `low^T dy`.

    JAX's own is `(dy^T low)^T`. On a CPU that transposes the large dy, and fuses what dy is computed from (an activation's derivative)
    into that copy, element by element: it cost a third of the step where an MLP is adapted. It has no forward-mode derivative.
    """
    return jnp.matmul(low, b)


def _widened_forward(low: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.matmul(low, b), (low, b)


def _widened_backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, b = kept
    rows = tuple(range(low.ndim - 1))
    return jnp.matmul(dy, b.T), jnp.tensordot(low, dy, (rows, rows))


widened.defvjp(_widened_forward, _widened_backward)

register_method("lora", Lora())
