"""HRA (arXiv:2405.17484): `h = W H x`, `H = (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T)` with each u scaled to length 1.

The product of r reflections is `I - U T U^T`, with T^-1 the part of U^T U above its diagonal plus I / 2 (the compact WY form): x is
reflected by two products with the (inputs, r) matrix U, whatever r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from pydantic import Field

from ...config.schema import AdapterConfig
from ...errors import InputError
from ...models.layers import Rows
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .peft_form import PeftForm, Weight


class HraSection(AdapterConfig):
    method: Literal["hra"] = Field(default="hra", description="Inputs reflected by a product of Householder matrices (arXiv:2405.17484).")


class HraForm(PeftForm):
    """`hra_u` (inputs, rank)."""

    peft_type, prefix, only, conv1d = "HRA", "hra_", "hra_only", False
    defaults: Mapping[str, Any] = {
        "apply_GS": False, "bias": "none", "exclude_modules": None, "init_weights": True, "layers_pattern": None,
        "layers_to_transform": None, "modules_to_save": None, "r": 8, "target_modules": None,
    }  # fmt: skip
    words: Mapping[str, str] = {"rank": "r"}
    notes = frozenset({"init_weights"})
    unsupported: Mapping[str, str] = {"apply_GS": "with orthogonal columns no product of reflections is the identity"}

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        return {"hra_u": (site.inputs, rank)}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"hra_u": arrays["u"]}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        return {"u": tensors["hra_u"]}


class Hra(Method):
    """Inputs reflected r times.

    Reflections start in equal pairs, each of which undoes the other, so the rank is even. A column of U that is 0 reflects nothing: it is
    padding. Only the columns' directions matter, but an optimizer's step turns a short one further: their start is of PEFT's length.
    """

    name, section = "hra", HraSection
    kinds = ("linear",)
    ignores = ("alpha", "alpha_pattern")
    peft = HraForm()

    def check_start(self, config: HraSection, site: Site, rank: int) -> None:
        if rank % 2:
            raise InputError(f"adapter.rank: {rank} reflections do not start as the identity ({site.name}): the rank has to be even.")

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        return {"u": Parameter((site.inputs, rank), axes=("in", None))}

    def init(self, site: Site, rank: int, config: Any, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        # Pair after pair, so that a smaller rank has the leading directions of a larger one; the length is kaiming_uniform's of r / 2.
        half = (2 * random.random((rank // 2, site.inputs), np.float32) - 1) * np.float32(np.sqrt(2 / rank))
        return {"u": np.repeat(half, 2, axis=0).T}

    def cost(self, site: Site, rank: int) -> int:
        return 4 * site.inputs * rank

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        x = inputs[0]
        u, t = (v.astype(x.dtype) for v in reflections(module.u[...]))
        return module.base(x - jnp.matmul(jnp.matmul(jnp.matmul(x, u), t.T), u.T))

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        u, t = reflections(module.u[...])
        # Rows: x H^T W, and H^T is I - U T^T U^T.
        return weight - product(product(u, t.swapaxes(-1, -2)), product(u.swapaxes(-1, -2), weight)), bias

    def low_rank(self, module: AdaptedSite) -> tuple[jax.Array, jax.Array, jax.Array]:
        u, t = reflections(module.u[...])
        weight, _ = module.base_arrays()
        changed = -product(t.swapaxes(-1, -2), product(u.swapaxes(-1, -2), weight))
        return u, changed, jnp.any(u != 0, (-2, -1)).astype(jnp.float32)


def reflections(u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """U (..., inputs, r) with columns of length 1 or 0, and T (..., r, r), for `H = I - U T U^T`; float32."""
    squares = jnp.sum(u**2, -2, keepdims=True)
    u = u * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))
    eye = jnp.broadcast_to(jnp.eye(u.shape[-1], dtype=u.dtype), (*u.shape[:-2], u.shape[-1], u.shape[-1]))
    above = jnp.triu(product(u.swapaxes(-1, -2), u), 1)
    return u, solve_triangular(above + eye / 2, eye)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matrix product in full float32."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


register_method("hra", Hra())
