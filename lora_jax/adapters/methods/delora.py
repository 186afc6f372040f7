"""DeLoRA, low-rank updates whose angle and strength are apart (arXiv:2503.18225, eq. 9): `h = W x + B D A (n * x)`.

A (r x in), B (out x r), D = lambda / r over |row of A| |column of B|, n the norms of the weight's columns, one an input. The update's norm
is at most lambda, which trains. Norms below 1e-4 count as 1e-4, and have no gradient: B is 0 at the start, and so the first gradient is
some thousand times those that follow; clip it with care. Here x is a row, so A is stored (in, r) and B (r, out). There is no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, PositiveFloat

from ...config.schema import AdapterConfig
from ...models.layers import Rows
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .lora import widened
from .peft_form import PeftForm, Reader, Weight, plain

_SMALLEST = 1e-4


class DeloraSection(AdapterConfig):
    method: Literal["delora"] = Field(default="delora", description="Low-rank updates of bounded norm (arXiv:2503.18225).")
    delora_lambda: PositiveFloat = Field(default=15.0, description="Bound of the update's norm at the start; it trains.")


class DeloraForm(PeftForm):
    """`delora_A` (rank, inputs), `delora_B` (outputs, rank) and `delora_lambda` (1,); and the norms, `delora_w_norm` (inputs,).

    A file may lack the last (older versions of PEFT do not write it): it is then computed of the weight.
    """

    peft_type, prefix, only, conv1d = "DELORA", "delora_", "delora_only", False
    defaults: Mapping[str, Any] = {
        "bias": "none", "delora_lambda": 15, "exclude_modules": None, "init_weights": True, "lambda_pattern": {}, "layers_pattern": None,
        "layers_to_transform": None, "module_dropout": 0.0, "modules_to_save": None, "r": 8, "rank_pattern": {}, "target_modules": None,
    }  # fmt: skip
    words: Mapping[str, str] = {"rank": "r", "dropout": "module_dropout", "rank_pattern": "rank_pattern"}
    own = frozenset({"delora_lambda"})
    optional = ("delora_w_norm",)
    notes = frozenset({"init_weights", "lambda_pattern"})  # what lambda started with

    def values(self, read: Reader) -> dict[str, Any]:
        return super().values(read) | {"delora_lambda": read.number("delora_lambda", 15, lowest=1e-30)}

    def fields(self, section: Any) -> dict[str, Any]:
        return super().fields(section) | {"delora_lambda": plain(section.delora_lambda)}

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        return {"delora_A": (rank, site.inputs), "delora_B": (site.outputs, rank), "delora_lambda": (1,), "delora_w_norm": (site.inputs,)}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = {"delora_A": arrays["a"].T, "delora_B": arrays["b"].T, "delora_lambda": arrays["bound"]}
        return found | {"delora_w_norm": arrays["weight_norm"]}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        found = {"a": tensors["delora_A"].T, "b": tensors["delora_B"].T, "bound": tensors["delora_lambda"]}
        norm = tensors.get("delora_w_norm")
        return found | {"weight_norm": np.linalg.norm(weight(), axis=1) if norm is None else norm}


class Delora(Method):
    """Low-rank updates with normalised ranks.

    The init is PEFT's: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, lambda from the section; the norms are of the base's weight.
    """

    name, section = "delora", DeloraSection
    kinds = ("linear", "convolution")
    ignores = ("alpha", "alpha_pattern")
    dropout_kinds = ("linear", "convolution")
    setting_names = ("inverse_rank",)
    packs = "low-rank"
    peft = DeloraForm()
    self_padding = True

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
        x = module.drop(inputs[0], rows).astype(y.dtype)
        # The norms are those of a convolution's kernel at each place, where x has one number for all of them.
        low = module.project(x, norm[:, None] * a) if module.kind == "convolution" else jnp.matmul(x * norm, a)
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
