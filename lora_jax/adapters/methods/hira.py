"""HiRA, a Hadamard product with the weight (ICLR 2025, openreview TwJrTz9cRS, eq. 4): `h = W x + (W * (B A)) x`, A (r x in), B (out x r).

The change has the weight's rank. It is formed whole, an array of the weight's size a member, and formed anew for the backward pass. Here x
is a row, so A is stored (in, r) and B (r, out). There is no scale, and so no `adapter.alpha`.
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
from .peft_form import PeftForm, Weight


class HiraSection(AdapterConfig):
    method: Literal["hira"] = Field(default="hira", description="Hadamard products with the weight, W + W * (B A) (openreview TwJrTz9cRS).")


class HiraForm(PeftForm):
    """`hira_A` (rank, inputs) and `hira_B` (outputs, rank); of an embedding `hira_embedding_A` and `hira_embedding_B`."""

    peft_type, prefix = "HIRA", "hira_"
    defaults: Mapping[str, Any] = {
        "exclude_modules": None, "fan_in_fan_out": False, "hira_dropout": 0.0, "init_weights": True, "layers_pattern": None,
        "layers_to_transform": None, "modules_to_save": None, "r": 32, "rank_pattern": {}, "target_modules": None,
    }  # fmt: skip
    words: Mapping[str, str] = {"rank": "r", "dropout": "hira_dropout", "rank_pattern": "rank_pattern"}
    notes = frozenset({"fan_in_fan_out", "init_weights"})

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        a, b = self._names(site)
        return {a: (rank, site.inputs), b: (site.outputs, rank)}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        a, b = self._names(site)
        return {a: arrays["a"].T, b: arrays["b"].T}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        a, b = self._names(site)
        return {"a": tensors[a].T, "b": tensors[b].T}

    def _names(self, site: Site) -> tuple[str, str]:
        return ("hira_embedding_A", "hira_embedding_B") if site.kind == "embedding" else ("hira_A", "hira_B")


class Hira(Method):
    """A Hadamard product of the weight and a low-rank matrix.

    The init is LoRA's: at a linear site A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0, at an embedding A = 0 and B ~ N(0, 1).
    """

    name, section = "hira", HiraSection
    kinds = ("linear", "embedding", "convolution")
    ignores = ("alpha", "alpha_pattern")
    dropout_kinds = ("linear", "convolution")
    packs = "weight-sized"
    peft = HiraForm()
    self_padding = True

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

        @jax.checkpoint  # or the change would be kept for the backward pass, and the product in it: two arrays of the weight's size a layer
        def changed(x: jax.Array, weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            return module.project(x, (weight * jnp.matmul(a, b)).astype(x.dtype))

        return y + changed(module.drop(inputs[0], rows).astype(y.dtype), module.base.kernel[...], a, b)

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        return weight + weight * jnp.matmul(module.a[...], module.b[...], precision=jax.lax.Precision.HIGHEST), bias

    def cost(self, site: Site, rank: int) -> int:
        return 2 * site.outputs * (rank if site.kind == "embedding" else site.inputs)


register_method("hira", Hira())
