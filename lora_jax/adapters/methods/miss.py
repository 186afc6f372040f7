"""MiSS (arXiv:2409.15371): `h = W x + D^T S x`: S sums the inputs i, r + i, 2r + i, ... to the i-th of r sums; D (r, out) trains.

A rank is a shard: the update is D's rows, repeated along the inputs. It is LoRA with an A of ones and zeros, and has no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...config.schema import AdapterConfig
from ...errors import InputError
from ...models.layers import Rows
from ..parameters import Parameter
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .lora import widened
from .peft_form import PeftForm, Reader, Weight


class MissSection(AdapterConfig):
    method: Literal["miss"] = Field(default="miss", description="One trained block, repeated along the inputs (arXiv:2409.15371).")


class MissForm(PeftForm):
    """`miss_block` (rank, outputs)."""

    peft_type, prefix = "MISS", "miss_"
    defaults: Mapping[str, Any] = {
        "bias": "none", "exclude_modules": None, "init_weights": True, "layers_pattern": None, "layers_to_transform": None, "mini_r": 1,
        "miss_dropout": 0.0, "modules_to_save": None, "r": 64, "target_modules": None,
    }  # fmt: skip
    words: Mapping[str, str] = {"rank": "r", "dropout": "miss_dropout"}
    notes = frozenset({"init_weights", "mini_r"})
    only = "MiSS_only"
    conv1d = False

    def check(self, read: Reader) -> None:
        if not isinstance(read.raw.get("init_weights", True), bool):
            raise InputError(f"{read.where}: 'init_weights' is {read.raw['init_weights']!r}: bat and mini are not supported.")

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        return {"miss_block": (rank, site.outputs)}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"miss_block": arrays["miss_block"]}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        return {"miss_block": tensors["miss_block"]}


class Miss(Method):
    """A block D of `rank` rows, which starts at 0; row i is added to the weights of the inputs i, rank + i, 2 rank + i, ..."""

    name, section = "miss", MissSection
    kinds = ("linear", "convolution")
    ignores = ("alpha", "alpha_pattern")
    dropout_kinds = ("linear", "convolution")
    setting_names = ("shards",)  # the rank as a number: members of a pack have different ones
    packs = "low-rank"
    self_padding = True  # no input is summed to a row beyond the rank, nor at a layer that is not adapted: they get no gradient
    peft = MissForm()

    def check(self, config: MissSection, site: Site, rank: int) -> None:
        if rank > site.inputs:
            raise InputError(f"adapter.rank: {site.name} has {site.inputs} inputs, which cannot be summed to {rank}.")

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        return {"miss_block": Parameter((rank, site.outputs), axes=(None, "out"))}

    def settings(self, config: MissSection, rank: int, alpha: float) -> dict[str, float]:
        return {"shards": float(rank)}

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        low = module.project(module.drop(inputs[0], rows).astype(y.dtype), self._sums(module).astype(y.dtype))
        return y + widened(low, module.miss_block[...].astype(y.dtype))

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        return weight + jnp.matmul(self._sums(module), module.miss_block[...], precision=jax.lax.Precision.HIGHEST), bias

    def low_rank(self, module: AdaptedSite) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self._sums(module), module.miss_block[...], jnp.sign(module.shards[...])

    def cost(self, site: Site, rank: int) -> int:
        return 2 * rank * (site.inputs + site.outputs)

    @staticmethod
    def _sums(module: AdaptedSite) -> jax.Array:
        """S (..., inputs, padded rank) float32: 1 where an input is summed to a row."""
        shards, rows = module.shards[...], module.miss_block[...].shape[-2]
        row = jnp.arange(module.site.inputs) % jnp.maximum(shards, 1).astype(jnp.int32)[..., None]
        ones = (row[..., None] == jnp.arange(rows)).astype(jnp.float32)
        return ones * jnp.sign(shards)[..., None, None]


register_method("miss", Miss())
