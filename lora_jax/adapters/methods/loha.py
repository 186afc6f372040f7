"""LoHa, a Hadamard product of two low-rank matrices (FedPara, arXiv:2108.06098, eq. 3): `h = W x + s ((B1 A1) * (B2 A2)) x`, s = alpha / r.

A1, A2 (r x in), B1, B2 (out x r). The change has rank up to r^2 for twice LoRA's numbers. It is formed whole, an array of the weight's size
a member, and formed anew for the backward pass. A row-major x wants it the other way round: `(a1 b1) * (a2 b2)`, a (in, r) and b (r, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...config.schema import AdapterConfig
from ...models.layers import Rows
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .peft_form import PeftForm, Weight, as_kernel, kernel_shape, of_kernel


class LohaSection(AdapterConfig):
    method: Literal["loha"] = Field(default="loha", description="Hadamard products W + s (B1 A1) * (B2 A2) (arXiv:2108.06098).")


class LohaForm(PeftForm):
    """`hada_w1_a` (outputs, rank) and `hada_w1_b` (rank, inputs), and the second product's likewise."""

    peft_type, prefix, conv1d, convolutions = "LOHA", "hada_", False, True
    defaults: Mapping[str, Any] = {
        "alpha": 8, "alpha_pattern": {}, "exclude_modules": None, "init_weights": True, "layers_pattern": None, "layers_to_transform": None,
        "module_dropout": 0.0, "modules_to_save": None, "r": 8, "rank_dropout": 0.0, "rank_pattern": {}, "target_modules": None,
        "use_effective_conv2d": False,
    }  # fmt: skip
    words: Mapping[str, str] = {"rank": "r", "alpha": "alpha", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
    notes = frozenset({"init_weights", "use_effective_conv2d"})
    unsupported: Mapping[str, str] = {
        "rank_dropout": "dropout of the change's rows is not supported",
        "module_dropout": "dropout of whole modules is not supported",
    }
    names: Mapping[str, str] = {"b1": "hada_w1_a", "a1": "hada_w1_b", "b2": "hada_w2_a", "a2": "hada_w2_b"}

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        up, down = (site.outputs, rank), (rank, site.inputs)
        return {name: up if ours[0] == "b" else down for ours, name in self.names.items()}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        ups = {self.names[ours]: arrays[ours].T for ours in ("b1", "b2")}
        return ups | {self.names[ours]: as_kernel(site, arrays[ours].T).reshape(rank, -1) for ours in ("a1", "a2")}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        downs = {ours: of_kernel(site, tensors[self.names[ours]].reshape(kernel_shape(site, rank))).T for ours in ("a1", "a2")}
        return downs | {ours: tensors[self.names[ours]].T for ours in ("b1", "b2")}


class Loha(Method):
    """A Hadamard product of two low-rank matrices.

    The init is PEFT's: A1 uniform within 1/sqrt(in), B1 and B2 within 1/sqrt(r), A2 = 0.
    """

    name, section = "loha", LohaSection
    kinds = ("linear", "convolution")
    setting_names = ("scale",)
    packs = "weight-sized"
    peft = LohaForm()
    self_padding = True  # a padded rank is 0 in both factors of a product, and the gradient of either has the other in it

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        down, up = Parameter((site.inputs, rank), axes=("in", None)), Parameter((rank, site.outputs), axes=(None, "out"))
        return {"a1": down, "b1": up, "a2": down, "b2": up}

    def settings(self, config: LohaSection, rank: int, alpha: float) -> dict[str, float]:
        return {"scale": alpha / rank}

    def init(self, site: Site, rank: int, config: Any, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        # Rank after rank is drawn (`adapter.nested_init`).
        drawn = 2 * random.random((rank, site.inputs + 2 * site.outputs), np.float32) - 1
        a1, b1, b2 = np.split(drawn, [site.inputs, site.inputs + site.outputs], axis=1)
        return {"a1": a1.T / np.float32(np.sqrt(site.inputs)), "b1": b1 / np.float32(np.sqrt(rank)), "b2": b2 / np.float32(np.sqrt(rank))}

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        factors = (v[...] for v in (module.a1, module.b1, module.a2, module.b2))

        @jax.checkpoint  # or the change would be kept for the backward pass, and both products: three arrays of the weight's size a layer
        def changed(x: jax.Array, scale: jax.Array, *factors: jax.Array) -> jax.Array:
            return module.project(x, _change(scale, *factors).astype(x.dtype))

        return y + changed(inputs[0].astype(y.dtype), module.scale[...], *factors)

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        factors = (v[...] for v in (module.a1, module.b1, module.a2, module.b2))
        return weight + _change(module.scale[...], *factors, precision=jax.lax.Precision.HIGHEST), bias

    def low_rank(self, module: AdaptedSite) -> tuple[jax.Array, jax.Array, jax.Array]:
        # Of rank r^2: the product of the ranks i and j is the outer product of `a1_i * a2_j` and `b1_i * b2_j`.
        a1, b1, a2, b2 = (v[...] for v in (module.a1, module.b1, module.a2, module.b2))
        a, b = a1[..., :, :, None] * a2[..., :, None, :], b1[..., :, None, :] * b2[..., None, :, :]
        return a.reshape(*a1.shape[:-1], -1), b.reshape(*b1.shape[:-2], -1, b1.shape[-1]), module.scale[...]

    def cost(self, site: Site, rank: int) -> int:
        return 2 * site.inputs * site.outputs


def _change(scale: jax.Array, a1: jax.Array, b1: jax.Array, a2: jax.Array, b2: jax.Array, precision: Any = None) -> jax.Array:
    """(..., inputs, outputs), what is added to the weight."""
    return scale[..., None, None] * jnp.matmul(a1, b1, precision=precision) * jnp.matmul(a2, b2, precision=precision)


register_method("loha", Loha())
