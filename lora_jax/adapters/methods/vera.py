"""VeRA (arXiv:2310.11454, eq. 2): `h = W x + b * (B (d * (A x)))`; A and B are random, frozen and shared by all sites; b and d train.

Here x is a row: A is stored (in, r) and B (r, out), as large as the largest site asks for; a smaller site uses their leading part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...config.schema import AdapterConfig
from ...config.types import Seed
from ...models.layers import Rows
from ..draws import torch_uniform
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .lora import widened
from .peft_form import PeftForm, Reader, Weight


class VeraSection(AdapterConfig):
    method: Literal["vera"] = Field(default="vera", description="Vectors b and d around frozen, shared, random A and B (arXiv:2310.11454).")
    d_initial: float = Field(default=0.1, description="What the vector d starts with.")
    projection_seed: Seed | None = Field(
        default=None, description="Seed of A and B, drawn as PEFT does (its projection_prng_key). Default: drawn by training.seed."
    )


class VeraForm(PeftForm):
    """`vera_lambda_d` (rank,) and `vera_lambda_b` (outputs,); of the whole adapter `vera_A` (rank, inputs) and `vera_B` (outputs, rank).

    A file may lack the last two: they are then drawn from its `projection_prng_key`.
    """

    peft_type, prefix, only = "VERA", "vera_lambda_", "vera_only"
    defaults: Mapping[str, Any] = {
        "bias": "none", "d_initial": 0.1, "fan_in_fan_out": False, "init_weights": True, "layers_pattern": None,
        "layers_to_transform": None, "modules_to_save": None, "projection_prng_key": 0, "r": 256, "save_projection": True,
        "target_modules": None, "vera_dropout": 0.0,
    }  # fmt: skip
    words: Mapping[str, str] = {"rank": "r", "dropout": "vera_dropout", "d_initial": "d_initial"}
    own = frozenset({"projection_prng_key"})
    notes = frozenset({"fan_in_fan_out", "init_weights", "save_projection"})
    optional = ("vera_A", "vera_B")

    def values(self, read: Reader) -> dict[str, Any]:
        return super().values(read) | {"projection_seed": read.whole("projection_prng_key", 0)}

    def fields(self, section: Any) -> dict[str, Any]:
        return super().fields(section) | {"projection_prng_key": section.projection_seed or 0, "save_projection": True}

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        return {"vera_lambda_d": (rank,), "vera_lambda_b": (site.outputs,)}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"vera_lambda_d": arrays["lambda_d"], "vera_lambda_b": arrays["lambda_b"]}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        return {"lambda_d": tensors["vera_lambda_d"], "lambda_b": tensors["vera_lambda_b"]}

    def shared(self, section: Any, sites: Mapping[Site, int]) -> dict[str, tuple[int, ...]]:
        rank = max(sites.values(), default=0)
        return {"vera_A": (rank, max((s.inputs for s in sites), default=0)), "vera_B": (max((s.outputs for s in sites), default=0), rank)}

    def shared_to_file(self, section: Any, sites: Mapping[Site, int], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"vera_A": arrays["vera_a"].T, "vera_B": arrays["vera_b"].T}

    def shared_from_file(self, section: Any, sites: Mapping[Site, int], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.optional[0] in tensors and self.optional[1] in tensors:
            return {"vera_a": tensors["vera_A"].T, "vera_b": tensors["vera_B"].T}
        return Vera().init_shared(sites, section, np.random.default_rng(0))


class Vera(Method):
    """Trained vectors at each site, around two random matrices that the whole adapter shares. There is no alpha."""

    name, section = "vera", VeraSection
    kinds = ("linear", "convolution")
    ignores = ("alpha", "alpha_pattern")
    dropout_kinds = ("linear", "convolution")
    packs = "low-rank"
    peft = VeraForm()
    self_padding = True  # beyond the rank A and d are 0, at a layer that is not adapted b and d are: neither then gets a gradient

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        return {
            "vera_a": Parameter((site.inputs, rank), axes=("in", None), trained=False, scope="adapter"),
            "vera_b": Parameter((rank, site.outputs), axes=(None, "out"), trained=False, scope="adapter"),
            "lambda_d": Parameter((rank,), axes=(None,)),
            "lambda_b": Parameter((site.outputs,), axes=("out",)),
        }

    def init(self, site: Site, rank: int, config: VeraSection, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        return {"lambda_d": np.full(rank, config.d_initial, np.float32)}

    def init_shared(self, sites: Mapping[Site, int], config: VeraSection, random: np.random.Generator) -> dict[str, np.ndarray]:
        inputs, outputs, rank = max(s.inputs for s in sites), max(s.outputs for s in sites), max(sites.values())
        shapes, bounds = [(rank, inputs), (outputs, rank)], [np.sqrt(6 / inputs), np.sqrt(6 / rank)]  # Kaiming's, by the second axis
        if config.projection_seed is not None:
            a, b = torch_uniform(config.projection_seed, shapes, bounds)
        else:
            a, b = (bound * (2 * random.random(shape, np.float32) - 1) for shape, bound in zip(shapes, bounds, strict=True))
        return {"vera_a": a.T.astype(np.float32), "vera_b": b.T.astype(np.float32)}

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        a, b = self._projections(module, y.dtype)
        low = module.project(module.drop(inputs[0], rows).astype(y.dtype), a) * module.lambda_d[...].astype(y.dtype)
        return y + widened(low, b) * module.lambda_b[...].astype(y.dtype)

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        a, b, _ = self.low_rank(module)
        return weight + jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST), bias

    def low_rank(self, module: AdaptedSite) -> tuple[jax.Array, jax.Array, jax.Array]:
        a, b = self._projections(module, jnp.float32)
        d, gain = module.lambda_d[...], module.lambda_b[...]
        adapted = (jnp.abs(d).max(-1) > 0) & (jnp.abs(gain).max(-1) > 0)
        return a * d[..., None, :], b * gain[..., None, :], adapted.astype(jnp.float32)

    @staticmethod
    def _projections(module: AdaptedSite, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The site's part of A (inputs, rank) and B (rank, outputs)."""
        rank = module.lambda_d[...].shape[-1]
        return module.vera_a[...][: module.site.inputs, :rank].astype(dtype), module.vera_b[...][:rank, : module.site.outputs].astype(dtype)


register_method("vera", Vera())
