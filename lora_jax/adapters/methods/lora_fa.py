"""LoRA-FA (arXiv:2308.03303): LoRA whose A stays as it was drawn; B alone trains.

B's gradient is what brings `s dA B + s A dB` nearest to a step along the full weight's gradient: here, with A (in, r) and B (r, out),
`(A^T A + 1e-8)^-1 dL/dB / s^2`, which the optimizer gets in its place (PEFT's LoRA-FA optimizer).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from ...errors import InputError
from ..inits.base import LowRankConfig, init_of
from ..parameters import Parameter, SiteArrays, SiteData
from ..sites import Site
from .base import register_method
from .lora import Lora

_DELTA = 1e-8


class LoraFaSection(LowRankConfig):
    method: Literal["lora_fa"] = Field(default="lora_fa", description="LoRA with a frozen A (arXiv:2308.03303).")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) (arXiv:2312.03732) in place of alpha / rank.")


class LoraFa(Lora):
    """LoRA with a frozen A; embeddings it does not adapt, since LoRA's A is 0 there.

    In PEFT an optimizer makes the difference, and files are LoRA's: they are written as such, and read as LoRA.
    """

    name, section = "lora_fa", LoraFaSection
    kinds = ("linear", "convolution", "expert")
    dropout_kinds = ("linear", "convolution")

    def check(self, config: Any, site: Site, rank: int) -> None:
        super().check(config, site, rank)
        if rank > site.inputs:
            raise InputError(f"adapter.rank: '{self.name}' takes a rank of at most the inputs, and {site.name} has {site.inputs}: {rank}.")
        if init_of(config).frozen:
            raise InputError(f"adapter.init: '{config.init.kind}' trains A alone, and '{self.name}' trains B alone.")

    def init(self, site: Site, rank: int, config: Any, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        found = super().init(site, rank, config, random, data)
        if not np.any(found.get("lora_a", 0)):
            raise InputError(f"adapter.init: '{config.init.kind}' starts A at 0, where '{self.name}' leaves it.")
        return found

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        own = super().parameters(site, rank)
        return own | {"lora_a": dataclasses.replace(own["lora_a"], trained=False)}

    def preconditioned(self, gradients: dict[str, jax.Array], sites: Mapping[str, SiteArrays]) -> dict[str, jax.Array]:
        return gradients | {f"{name}.lora_b": _projected(gradients[f"{name}.lora_b"], of.lora_a, of.scale) for name, of in sites.items()}


def _projected(gradient: jax.Array, a: jax.Array, scale: jax.Array) -> jax.Array:
    """B's gradient (..., rank, outputs) for the optimizer; 0 stays 0: of the padding, and of layers that are not adapted."""
    product = jnp.matmul(jnp.swapaxes(a, -1, -2), a, precision=jax.lax.Precision.HIGHEST)
    solved = jnp.linalg.solve(product + _DELTA * jnp.eye(a.shape[-1]), gradient)
    scale = scale.reshape(*scale.shape, *[1] * (a.ndim - scale.ndim))
    return solved / jnp.where(scale > 0, scale, 1) ** 2


register_method("lora_fa", LoraFa())
