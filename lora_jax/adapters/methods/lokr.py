"""LoKr, a Kronecker product (LyCORIS, arXiv:2309.14859, eq. 7): `h = W x + s (w1 kron w2) x`, s = alpha / r.

With in = m n and out = l k, w1 is (l x m) and w2 (k x n), the larger; `adapter.decompose_factor` chooses m and l. w2 is a product of
factors of rank r where r is below half of w2's larger side, and whole from there on; so is w1 with `adapter.decompose_both`. A rank has
either form, the other is without numbers; a pack holds both. The product with x is computed side by side, `w1 X w2^T` for X (m x n):
nothing of the weight's size is formed. A row-major x wants all of them turned over: w1 (m, l), w2 (n, k).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, PositiveInt

from ...config.schema import AdapterConfig
from ...models.layers import Rows
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .peft_form import PeftForm, Weight


class LokrSection(AdapterConfig):
    method: Literal["lokr"] = Field(default="lokr", description="Kronecker products W + s (w1 kron w2) (arXiv:2309.14859).")
    decompose_both: bool = Field(default=False, description="Factor the smaller matrix too, where the rank is below half its larger side.")
    decompose_factor: Literal[-1] | PositiveInt = Field(
        default=-1, description="Sides of the smaller matrix, as nearly as the layer's sizes divide. -1: near the square root of each."
    )


class LokrForm(PeftForm):
    """`lokr_w1` (l, m) or `lokr_w1_a` (l, rank) and `lokr_w1_b` (rank, m), and w2's likewise: ours, turned over."""

    peft_type, prefix, conv1d = "LOKR", "lokr_", False
    defaults: Mapping[str, Any] = {
        "alpha": 8, "alpha_pattern": {}, "decompose_both": False, "decompose_factor": -1, "exclude_modules": None, "init_weights": True,
        "layers_pattern": None, "layers_to_transform": None, "module_dropout": 0.0, "modules_to_save": None, "r": 8, "rank_dropout": 0.0,
        "rank_dropout_scale": False, "rank_pattern": {}, "target_modules": None, "use_effective_conv2d": False,
    }  # fmt: skip
    words: Mapping[str, str] = {
        "rank": "r", "alpha": "alpha", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern", "decompose_both": "decompose_both",
        "decompose_factor": "decompose_factor",
    }  # fmt: skip
    notes = frozenset({"init_weights", "rank_dropout_scale", "use_effective_conv2d"})
    unsupported: Mapping[str, str] = {
        "rank_dropout": "dropout of the change's rows is not supported",
        "module_dropout": "dropout of whole modules is not supported",
    }

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        own = Lokr().variant(section).parameters(site, rank)
        return {f"lokr_{name}": p.shape[::-1] for name, p in own.items() if 0 not in p.shape}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: arrays[name.removeprefix(self.prefix)].T for name in self.tensors(section, site, rank)}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        return {name.removeprefix(self.prefix): array.T for name, array in tensors.items()}


@dataclasses.dataclass(frozen=True)
class Lokr(Method):
    """A Kronecker product.

    The init is PEFT's: w1 = 0, or its factor of the outputs, and all else uniform within 1/sqrt(columns of the matrix as PEFT has it).

    Attributes: as in the section.
    """

    decompose_both: bool = False
    decompose_factor: int = -1

    name, section = "lokr", LokrSection
    kinds = ("linear",)
    setting_names = ("scale",)
    peft = LokrForm()

    def variant(self, config: LokrSection) -> Lokr:
        return Lokr(config.decompose_both, config.decompose_factor)

    def sizes(self, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
        """Those of w1, (m, l), and of w2, (n, k)."""
        (m, n), (out, k) = (split(size, self.decompose_factor) for size in (site.inputs, site.outputs))
        return (m, out), (n, k)

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        found: dict[str, Parameter] = {}
        for name, size in zip(("w1", "w2"), self.sizes(site), strict=True):
            factored = rank < max(size) / 2 and (name == "w2" or self.decompose_both)
            whole, r = (0, 0) if factored else size, rank if factored else 0
            found |= {name: Parameter(whole), f"{name}_b": Parameter((size[0], r)), f"{name}_a": Parameter((r, size[1]))}
        return found

    def extent(self, ranks: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted(set(ranks)))  # where a matrix becomes whole depends on the site

    def settings(self, config: LokrSection, rank: int, alpha: float) -> dict[str, float]:
        return {"scale": alpha / rank}

    def init(self, site: Site, rank: int, config: Any, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        (m, _), (n, k) = self.sizes(site)
        drawn = 2 * random.random((rank, m + n + k), np.float32) - 1  # rank after rank (`adapter.nested_init`)
        w1_b, w2_b, w2_a = np.split(drawn, [m, m + n], axis=1)
        w2 = 2 * random.random((n, k), np.float32) - 1
        found = {"w1_b": w1_b.T / np.sqrt(m), "w2_b": w2_b.T / np.sqrt(n), "w2_a": w2_a / np.sqrt(rank), "w2": w2 / np.sqrt(n)}
        return {
            name: found[name].astype(np.float32) for name, p in self.parameters(site, rank).items() if name in found and 0 not in p.shape
        }

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        w1, w2 = (w.astype(y.dtype) for w in _matrices(module, None))
        x = inputs[0].astype(y.dtype)
        x = x.reshape(*x.shape[:-1], w1.shape[0], w2.shape[0]) * module.scale[...].astype(y.dtype)
        return y + jnp.einsum("...mk,ml->...lk", jnp.matmul(x, w2), w1).reshape(y.shape)

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        w1, w2 = _matrices(module, jax.lax.Precision.HIGHEST)
        return weight + module.scale[...][..., None, None] * (w1[..., :, None, :, None] * w2[..., None, :, None, :]).reshape(
            weight.shape
        ), bias

    def cost(self, site: Site, rank: int) -> int:
        (m, out), (n, k) = self.sizes(site)
        return 2 * m * k * (n + out)


def _matrices(module: AdaptedSite, precision: Any) -> list[jax.Array]:
    """w1 and w2, whole, with the module's layers in front."""
    found = []
    for name in ("w1", "w2"):
        whole, b, a = (getattr(module, f"{name}{part}")[...] for part in ("", "_b", "_a"))
        if not b.size:
            found.append(whole)
        else:
            product = jnp.matmul(b, a, precision=precision)
            found.append(whole + product if whole.size else product)
    return found


def split(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`: the first is `factor` if that divides it, else the largest divisor up to that and the root.

    >>> split(128, -1), split(128, 4), split(127, -1), split(30, 4)
    ((8, 16), (4, 32), (1, 127), (3, 10))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    root = math.isqrt(size)
    first = max(d for d in range(1, min(root, root if factor == -1 else factor) + 1) if size % d == 0)
    return first, size // first


register_method("lokr", Lokr())
