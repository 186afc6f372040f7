"""GraLoRA, low-rank updates block by block (arXiv:2505.20355, section 3): W is cut into k x k blocks, each with a LoRA of rank r / k.

`h_j = (W x)_j + s sum_i B_ij A_ij x_i`, A_ij (r/k x in/k), B_ij (out/k x r/k), i and j from 1 to k, s = alpha / (r + hybrid_r): as many
numbers as LoRA of rank r, of a change of rank k r. With `adapter.hybrid_r` a LoRA of that rank over the whole matrix is added.

The pieces of a rank are kept on axes of their own (block of inputs, its inputs, block of outputs, r / k), so that a smaller rank is the
leading part of a larger one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from ...config.schema import AdapterConfig
from ...errors import InputError
from ...models.layers import Rows
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .peft_form import PeftForm, Weight


class GraloraSection(AdapterConfig):
    method: Literal["gralora"] = Field(default="gralora", description="Low-rank updates of k x k blocks of W (arXiv:2505.20355).")
    gralora_k: PositiveInt = Field(default=2, description="Blocks along each side; divides the rank and every adapted layer's sizes.")
    hybrid_r: NonNegativeInt = Field(default=0, description="Rank of a LoRA beside the blocks; the scale is alpha / (rank + hybrid_r).")


class GraloraForm(PeftForm):
    """`gralora_A` (k, inputs / k, rank) and `gralora_B` (k, rank, outputs / k); of the whole matrix `gralora_A_general.weight` and B's."""

    peft_type, prefix, only = "GRALORA", "gralora_", "gralora_only"
    defaults: Mapping[str, Any] = {
        "alpha": 64, "bias": "none", "fan_in_fan_out": False, "gralora_dropout": 0.0, "gralora_k": 2, "hybrid_r": 0, "init_weights": True,
        "layers_pattern": None, "layers_to_transform": None, "modules_to_save": None, "r": 32, "target_modules": None,
    }  # fmt: skip
    words: Mapping[str, str] = {
        "rank": "r", "alpha": "alpha", "dropout": "gralora_dropout", "gralora_k": "gralora_k", "hybrid_r": "hybrid_r",
    }  # fmt: skip
    notes = frozenset({"fan_in_fan_out", "init_weights"})

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        k, hybrid = section.gralora_k, section.hybrid_r
        found: dict[str, tuple[int, ...]] = {"gralora_A": (k, site.inputs // k, rank), "gralora_B": (k, rank, site.outputs // k)}
        whole = {"gralora_A_general.weight": (hybrid, site.inputs), "gralora_B_general.weight": (site.outputs, hybrid)}
        return found | whole if hybrid else found

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        shapes = self.tensors(section, site, rank)
        found = {name: arrays[ours].reshape(shapes[name]) for name, ours in (("gralora_A", "a"), ("gralora_B", "b"))}
        for side in "AB" if section.hybrid_r else "":
            found[f"gralora_{side}_general.weight"] = arrays[f"whole_{side.lower()}"].T
        return found

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        shapes = {name: p.shape for name, p in Gralora().variant(section).parameters(site, rank).items()}
        found = {ours: tensors[name].reshape(shapes[ours]) for name, ours in (("gralora_A", "a"), ("gralora_B", "b"))}
        for side in "AB" if section.hybrid_r else "":
            found[f"whole_{side.lower()}"] = tensors[f"gralora_{side}_general.weight"].T
        return found


@dataclasses.dataclass(frozen=True)
class Gralora(Method):
    """Low-rank updates of blocks.

    The init is PEFT's: A of the blocks uniform within 1/sqrt(in/k), that of the whole matrix within 1/sqrt(in); B = 0.

    Attributes:
        k, hybrid: `gralora_k` and `hybrid_r` of the section.
    """

    k: int = 2
    hybrid: int = 0

    name, section = "gralora", GraloraSection
    kinds = ("linear",)
    dropout_kinds = ("linear",)
    setting_names = ("scale",)
    packs = "low-rank"
    peft = GraloraForm()
    self_padding = True

    def variant(self, config: GraloraSection) -> Gralora:
        return Gralora(config.gralora_k, config.hybrid_r)

    def check(self, config: GraloraSection, site: Site, rank: int) -> None:
        for what, size in (("inputs", site.inputs), ("outputs", site.outputs), ("ranks (adapter.rank)", rank)):
            if size % self.k:
                raise InputError(f"adapter.gralora_k: {self.k} blocks do not divide the {size} {what} of {site.name}.")

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        k, r = self.k, rank // self.k
        found = {
            "a": Parameter((k, site.inputs // k, k, r), axes=("in", None, None, None)),
            "b": Parameter((k, k, r, site.outputs // k), axes=("out", None, None, None)),
        }
        if self.hybrid:
            found["whole_a"] = Parameter((site.inputs, self.hybrid), axes=("in", None))
            found["whole_b"] = Parameter((self.hybrid, site.outputs), axes=(None, "out"))
        return found

    def settings(self, config: GraloraSection, rank: int, alpha: float) -> dict[str, float]:
        return {"scale": alpha / (rank + config.hybrid_r)}

    def init(self, site: Site, rank: int, config: Any, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        k, size = self.k, site.inputs // self.k
        whole = 2 * random.random((self.hybrid, site.inputs), np.float32) - 1
        drawn = 2 * random.random((rank // k, k, size, k), np.float32) - 1  # rank after rank (`adapter.nested_init`)
        found = {"a": np.moveaxis(drawn, 0, -1) / np.float32(np.sqrt(size))}
        return found | ({"whole_a": whole.T / np.float32(np.sqrt(site.inputs))} if self.hybrid else {})

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        x, scale = module.drop(inputs[0], rows).astype(y.dtype), module.scale[...].astype(y.dtype)
        a, b = module.a[...].astype(y.dtype), module.b[...].astype(y.dtype)
        low = jnp.einsum("...ni,nijc->...jnc", x.reshape(*x.shape[:-1], *a.shape[:2]), a)
        change = jnp.einsum("...jnc,jnco->...jo", low * scale, b).reshape(y.shape)
        if self.hybrid:
            whole = jnp.matmul(x, module.whole_a[...].astype(y.dtype)) * scale
            change += jnp.matmul(whole, module.whole_b[...].astype(y.dtype))
        return y + change

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        a, b, scale = self.low_rank(module)
        return weight + scale[..., None, None] * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST), bias

    def low_rank(self, module: AdaptedSite) -> tuple[jax.Array, jax.Array, jax.Array]:
        # Of rank k r: each row and column has numbers in the pieces of its own blocks alone.
        a, b = module.a[...], module.b[...]
        lead, (k, size, _, r), out = a.shape[:-4], a.shape[-4:], b.shape[-1]
        own = jnp.eye(k, dtype=a.dtype)
        whole_a = jnp.einsum("...nijc,nm->...nimjc", a, own).reshape(*lead, k * size, k * k * r)
        whole_b = jnp.einsum("...jnco,jl->...njclo", b, own).reshape(*lead, k * k * r, k * out)
        if self.hybrid:
            whole_a = jnp.concatenate([whole_a, module.whole_a[...]], -1)
            whole_b = jnp.concatenate([whole_b, module.whole_b[...]], -2)
        return whole_a, whole_b, module.scale[...]


register_method("gralora", Gralora())
