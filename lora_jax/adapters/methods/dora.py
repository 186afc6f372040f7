"""DoRA (arXiv:2402.09353, eq. 5): `W' = m (W + s B A) / ||W + s B A||`, norms and magnitude m of each output; m starts as `||W||`.

The norm is no part of the gradient (section 4.3). No array of the weight's size is made for a member: with rows as inputs (A is stored
(in, r), B (r, out)) the squared norm is `||W||^2 + 2 s <W, A B> + s^2 ||A B||^2`, whose first term is the base's alone and is computed
once for all members, and whose others are made of `A^T W` (r, out) and `A^T A` (r, r).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...models.layers import Rows
from ..inits.base import LowRankConfig
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, register_method
from .lora import Lora, LoraForm, widened
from .peft_form import Weight

# Of a norm's square, what float32 can no longer tell from 0 when the update cancels the weight.
_LEAST = 1e-6


class DoraSection(LowRankConfig):
    method: Literal["dora"] = Field(default="dora", description="Magnitude and direction of the weight apart (arXiv:2402.09353).")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) (arXiv:2312.03732) in place of alpha / rank.")


class DoraForm(LoraForm):
    """LoRA's tensors, and `lora_magnitude_vector` (outputs,), of a convolution (1, outputs, 1, 1)."""

    flags: Mapping[str, Any] = {"use_dora": True}
    unsupported: Mapping[str, str] = {option: why for option, why in LoraForm.unsupported.items() if option != "use_dora"}

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        return super().tensors(section, site, rank) | {"lora_magnitude_vector": self._norms(site)}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return super().to_file(section, site, rank, arrays) | {"lora_magnitude_vector": arrays["magnitude"].reshape(self._norms(site))}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        norms = {"magnitude": tensors["lora_magnitude_vector"].reshape(-1), "start": _norm(weight())}
        return super().from_file(section, site, rank, tensors, weight) | norms

    def _norms(self, site: Site) -> tuple[int, ...]:
        return (1, site.outputs, *(1,) * len(site.window)) if site.window else (site.outputs,)


class Dora(Lora):
    """LoRA on the weight's direction, and a trained magnitude for each output (of an embedding: for each of its columns, as in PEFT).

    `start` is the norm that the magnitude started from. The site computes with `m / start` and with what the norm has grown by since:
    both are 1 at the start to the last bit, which the quotient of two norms, one from the host and one of the program, is not.
    An output that no input reaches has no direction; it is as in LoRA, with a gain of its own.
    """

    name, section = "dora", DoraSection
    kinds = ("linear", "embedding", "convolution")
    self_padding = False
    peft = DoraForm()

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        norm = {"shape": (site.outputs,), "axes": ("out",), "fill": 1.0}
        more = {"magnitude": Parameter(**norm, decays=False), "start": Parameter(**norm, trained=False)}
        return super().parameters(site, rank) | more

    def init(self, site: Site, rank: int, config: Any, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        norm = data.once("norm by output", lambda: _norm(data.weight()))
        return super().init(site, rank, config, random, data) | {"magnitude": norm, "start": norm}

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        a, b, scale = (v[...].astype(y.dtype) for v in (module.lora_a, module.lora_b, module.scale))
        weight, bias = getattr(module.base, module.weight)[...], getattr(module.base, "bias", None)
        more = (gain(module, weight) - 1).astype(y.dtype)
        if module.kind == "embedding":
            y = y + widened(a[inputs[0]] * scale, b)
            return y + more * y
        x = module.drop(inputs[0], rows)
        update = widened(module.project(x.astype(y.dtype), a) * scale, b)
        # Dropout is of all that the gain is for, so that the base's product is computed again (as in PEFT).
        straight = y if x is inputs[0] else module.base(x)
        straight = straight if bias is None else straight - bias[...].astype(y.dtype)
        return y + update + more * (straight + update)

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        a, b, scale = super().low_rank(module)
        update = scale[..., None, None] * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return gain(module, weight)[..., None, :] * (weight + update), bias

    def low_rank(self, module: AdaptedSite) -> None:
        return None  # the change of the weight is not

    def of_low_rank(self, a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> None:
        return None


def _norm(weight: np.ndarray) -> np.ndarray:
    """(outputs,): of each output; 1 where nothing reaches it."""
    norm = np.linalg.norm(weight, axis=0)
    return np.where(norm > 0, norm, 1)


def gain(module: AdaptedSite, weight: jax.Array) -> jax.Array:
    """`m / ||W + s A B||` of each output, (..., outputs) float32; differentiable in m alone.

    Args:
        module: with arrays (..., inputs, rank), (..., rank, outputs) and so on.
        weight: the base's, (..., inputs, outputs) of any dtype.
    """
    a, b, scale = (jax.lax.stop_gradient(v[...]) for v in (module.lora_a, module.lora_b, module.scale[..., None, None]))
    weight, a_t = jax.lax.stop_gradient(weight.astype(jnp.float32)), jnp.swapaxes(a, -1, -2)
    product, inner = (functools.partial(f, precision=jax.lax.Precision.HIGHEST) for f in (jnp.matmul, jnp.einsum))
    # The sums are products too: what a layer keeps for the backward pass (`Stack.remat`) are those, and these are the smallest.
    first = inner("...io,...io->...o", weight, weight)
    crossed = 2 * product(a_t, weight) + scale * product(product(a_t, a), b)
    whole = jnp.maximum(first + inner("...ro,...ro->...o", scale * b, crossed), _LEAST * first)
    # One square root of one quotient: XLA takes a quotient of two roots apart.
    shrunk = jnp.sqrt(jnp.where(first > 0, first / jnp.where(first > 0, whole, 1), 1))
    return module.magnitude[...] / module.start[...] * shrunk


register_method("dora", Dora())
